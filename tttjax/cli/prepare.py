"""Tokenize text into a prepared data set: tokenizer, token shards, and a manifest.

examples:
  tttjax prepare stdlib --out=data/stdlib
      the sources of Python's standard library on this machine, as bytes
  tttjax prepare books/ --out=data/books --tokenizer=sentencepiece --vocab-size=4096
      all text files of a folder, with a SentencePiece model trained on them
  tttjax prepare part-*.jsonl.zst --out=data/web --tokenizer=llama3/tokenizer.json
      one document per line, under the key "text", with an existing tokenizer
  tttjax prepare hf://datasets/OWNER/NAME/data --out=data/web
      files of a repository or bucket; gs:// needs gcsfs, s3:// s3fs, https:// aiohttp
  tttjax prepare fineweb/*.parquet --text-key=text --out=data/fineweb
      one document per row; needs pyarrow
  tttjax prepare big/*.parquet --tokenizer=tokenizer.json --out=/shared/big --part=3/32
      the fourth of 32 hosts, each with a part of the files
  tttjax prepare chats.jsonl --chat --tokenizer=runs/base --out=data/chat
      conversations, with the tokenizer and the chat template of a run

Whole documents are held out for evaluation. Running the same command again resumes an interrupted
run, and does nothing if the data set is complete.
"""

import argparse
import sys
from dataclasses import fields

from tttjax.cli.flag_types import float32, int32, uint32
from tttjax.data.prepare_settings import EXACT, NEAR, PrepareSettings
from tttjax.errors import UserError
from tttjax.io.paths import storage_path, storage_text, text_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `tttjax prepare`."""
    default = PrepareSettings(inputs=())
    add = parser.add_argument
    add(
        "inputs",
        nargs="*",
        type=text_path,
        metavar="PATH",
        help="files, folders (searched recursively), URLs, a Zarr folder, or `stdlib`: the sources "
        "of Python's standard library on this machine. A text file (.txt, .py, ...; also .gz, .xz, "
        ".bz2, .zst) is one document, as is each line of JSON Lines (.jsonl, .ndjson, .json) and "
        "each row of Parquet",
    )
    add(
        "--out",
        type=storage_text,
        metavar="DIR",
        help="output folder of the data set, here or in a bucket (gs://, s3://)",
    )
    add(
        "--tokenizer",
        metavar="PATH",
        default=default.tokenizer,
        help="bytes (default); sentencepiece (trained on the training documents); a .model file; "
        "a Hugging Face tokenizer.json; the folder of another prepared data set, to use its "
        "tokenizer; ids (Zarr tokens without their tokenizer)",
    )
    add(
        "--vocab-size",
        type=int32,
        default=default.vocab_size,
        help="vocabulary size of `sentencepiece` and `ids` (default: %(default)s)",
    )
    add("--bos-id", type=int32, help="BOS token, if the tokenizer does not define it")
    add("--eos-id", type=int32, help="EOS token, if the tokenizer does not define it")
    add(
        "--val-fraction",
        type=float32,
        default=default.val_fraction,
        help="fraction of documents held out, by a hash of their names; a file given twice counts "
        "once (default: %(default)s)",
    )
    add(
        "--split-manifest",
        default=default.split_manifest,
        metavar="TABLE",
        help="TSV or CSV table: document names in the first column, split names in the column "
        "`split`",
    )
    add(
        "--seed", type=uint32, default=default.seed, help="seed of the split (default: %(default)s)"
    )
    add(
        "--pattern",
        default=default.pattern,
        help="glob pattern for files of a folder, such as '*.txt' (default: common text suffixes)",
    )
    add(
        "--text-key",
        default=default.text_key,
        metavar="NAME",
        help="key or column of the text in JSON Lines and Parquet (default: %(default)s)",
    )
    add(
        "--chat",
        action="store_true",
        help="JSON Lines of conversations, under `messages` (role, content) or `prompt` and "
        "`completion`: the tokenizer's chat template renders them, and only the assistant's "
        "messages are targets",
    )
    add(
        "--min-document-tokens",
        type=int32,
        default=default.min_document_tokens,
        help="drop shorter documents, which do not exercise long contexts (default: %(default)s)",
    )
    add("--no-bos", dest="add_bos", action="store_false", help="do not prepend BOS to documents")
    add("--eos", dest="add_eos", action="store_true", help="append EOS to documents")
    add(
        "--drop-duplicates",
        choices=(EXACT, NEAR),
        default=default.drop_duplicates,
        help="drop documents with the same tokens as an earlier one (exact), or about the same "
        "words (near: MinHash, needs datasketch)",
    )
    add(
        "--shard-tokens",
        type=int32,
        default=default.shard_tokens,
        help="tokens per shard (default: %(default)s)",
    )
    add("--num-workers", type=int32, help="worker processes (default: one per core)")
    add(
        "--part",
        default="",
        metavar="I/N",
        help="prepare part I (from 0) of N: one of N hosts that run the same command on the same "
        "files and the same --out; the last one joins the parts",
    )
    add(
        "--overwrite",
        action="store_true",
        help="replace an existing data set in --out",
    )
    add(
        "--check",
        type=storage_text,
        metavar="DIR",
        help="only verify the checksums of a prepared data set",
    )


def run(args: argparse.Namespace) -> int:
    """`tttjax prepare` from parsed arguments; returns the exit code."""
    if args.check:
        from tttjax.data import file_checks, shards

        folder = storage_path(args.check, "--check")
        shards.open_prepared(folder, verify=False)
        count = file_checks.check_sums(folder, shards.read_manifest(folder))
        print(f"{folder}: all {count} checksums match")
        return 0
    if not args.out:
        raise UserError("Give the output folder: --out=DIR.")

    from tttjax.data.preparation import prepare

    settings = {
        f.name: getattr(args, f.name) for f in fields(PrepareSettings) if f.name != "inputs"
    }
    data = prepare(
        args.inputs,
        args.out,
        num_workers=args.num_workers,
        overwrite=args.overwrite,
        part=args.part,
        log=_log,
        **settings,
    )
    print(data.folder)
    return 0


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
