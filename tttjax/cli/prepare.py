"""Turn text into a prepared data set: a tokenizer, token shards, and a manifest.

  tttjax prepare stdlib --out=data/stdlib
      the sources of Python's standard library on this machine, as bytes
  tttjax prepare books/ --out=data/books --tokenizer=sentencepiece --vocab-size=4096
      all text files of a folder, with a vocabulary learned from them
  tttjax prepare part-*.jsonl.zst --out=data/web --tokenizer=llama3/tokenizer.json
      documents under the key "text", one per line, with a given vocabulary
  tttjax prepare fineweb/*.parquet --text-key=text --out=data/fineweb
      a document each row, with pyarrow

Documents, never parts of them, are held out for evaluation. The same command again continues an
interrupted run, and does nothing if the data set is finished.
"""

import argparse
import sys
from dataclasses import fields

from tttjax.cli.flag_types import float32, int32, uint32
from tttjax.data import shards
from tttjax.data.preparation import PrepareSettings, prepare
from tttjax.data.shards import open_prepared
from tttjax.errors import UserError
from tttjax.io.paths import local_path

__all__ = ["PrepareSettings", "add_arguments", "prepare", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tttjax prepare`."""
    default = PrepareSettings(inputs=())
    add = parser.add_argument
    add(
        "inputs",
        nargs="*",
        metavar="PATH",
        help="files, folders (searched recursively), a Zarr folder, or the word "
        "`stdlib`: the sources of Python's standard library on this machine. A text file (.txt, "
        ".py, ...; also .gz, .xz, .zst) is one document; so is each line of JSON lines (.jsonl, "
        ".ndjson, .json) and each row of Parquet",
    )
    add("--out", metavar="DIR", help="folder of the prepared data set")
    add(
        "--tokenizer",
        metavar="PATH",
        default=default.tokenizer,
        help="bytes (the default: no vocabulary to learn); "
        "sentencepiece (trained on the training documents); a .model file; a Hugging Face "
        "tokenizer.json; the folder of another prepared data set (its tokenizer); ids (Zarr tokens "
        "without their tokenizer)",
    )
    add(
        "--vocab-size",
        type=int32,
        default=default.vocab_size,
        help="of a trained SentencePiece model, or of `ids` (default %(default)s)",
    )
    add("--bos-id", type=int32, help="token that begins a document, if the tokenizer does not say")
    add("--eos-id", type=int32, help="token that ends a document, if the tokenizer does not say")
    add(
        "--val-fraction",
        type=float32,
        default=default.val_fraction,
        help="share of documents held out, by a hash of their names; a file that is named twice "
        "counts once (default %(default)s)",
    )
    add(
        "--split-manifest",
        default=default.split_manifest,
        metavar="TABLE",
        help="table (tabs or "
        "commas) whose first column names a document and whose column `split` says where it goes",
    )
    add("--seed", type=uint32, default=default.seed, help="changes which documents are held out")
    add(
        "--pattern",
        default=default.pattern,
        help="which files of a folder, such as '*.txt' (default: the usual suffixes of text)",
    )
    add(
        "--text-key",
        default=default.text_key,
        metavar="NAME",
        help="key, or column, of the text in JSON lines and Parquet (default: %(default)s)",
    )
    add(
        "--min-document-tokens",
        type=int32,
        default=default.min_document_tokens,
        help="leave shorter documents out: long contexts are learned from long documents",
    )
    add("--no-bos", dest="add_bos", action="store_false", help="do not begin documents with BOS")
    add("--eos", dest="add_eos", action="store_true", help="end documents with EOS")
    add(
        "--shard-tokens",
        type=int32,
        default=default.shard_tokens,
        help="tokens after which a new shard begins (default %(default)s)",
    )
    add("--num-workers", type=int32, help="processes (default: one per core)")
    add(
        "--overwrite",
        action="store_true",
        help="replace the data set that is in DIR already",
    )
    add("--check", metavar="DIR", help="instead: compare every checksum of a prepared data set")


def run(args: argparse.Namespace) -> int:
    """`tttjax prepare` from parsed arguments; the exit code."""
    if args.check:
        folder = local_path(args.check, "--check")
        open_prepared(folder, verify=False)
        count = shards.check_sums(folder, shards.read_manifest(folder))
        print(f"{folder}: {count} files are whole")
        return 0
    if not args.out:
        raise UserError("Say where the prepared data go: --out=DIR.")
    settings = {
        f.name: getattr(args, f.name) for f in fields(PrepareSettings) if f.name != "inputs"
    }
    prepare(
        args.inputs,
        args.out,
        num_workers=args.num_workers,
        overwrite=args.overwrite,
        log=_log,
        **settings,
    )
    print(args.out)
    return 0


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
