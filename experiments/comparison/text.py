"""One text for all systems: prepared once, its documents in three splits.

Learning rates are chosen on the split `val`, results are of the split `test`; no document is in
two.
"""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

from tttjax.data.documents import JSON, TEXT, InputFile, Line, list_inputs, pieces_of, read_items
from tttjax.data.preparation import prepare
from tttjax.data.shards import PreparedData
from tttjax.data.splits import SplitRule
from tttjax.errors import UserError

HELD_OUT = 0.15  # share of the documents in each of val and test
BYTES_VOCABULARY = 264  # a vocabulary of this size is that of the tokenizer `bytes`
BYTES_PER_TOKEN = 5  # at most, for a small vocabulary: a document with so many is long enough
LEAST = 6  # documents: fewer, and a held-out loss would say more of the document than of a model


def prepare_text(
    text: str, out: Path, *, vocab_size: int, longest: int, splits: str = "", log=print
) -> PreparedData:
    """The prepared data set out/data; the same call again finds it finished.

    text: file or folder, or `stdlib`. longest: the longest context; shorter documents are left
    out. splits: a table with a column `split` (train, val, test) in place of splits of our own.
    Raises UserError for a text that is missing, or has too few documents that are long enough.
    """
    out.mkdir(parents=True, exist_ok=True)
    if not splits:
        splits = str(out / "splits.tsv")
        _write_splits(Path(splits), split_documents(list_inputs([text]), longest))
    tokenizer = "bytes" if vocab_size == BYTES_VOCABULARY else "sentencepiece"
    data = prepare(
        [text],
        out / "data",
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        split_manifest=splits,
        min_document_tokens=longest + 1,
        log=log,
    )
    for split in ("train", "val", "test"):
        data.split(split)  # UserError if it has none
    return data


def split_documents(files: Sequence[InputFile], longest: int) -> dict[str, str]:
    """Document -> train, val or test, by the order of a hash of the names.

    Only documents that are surely long enough for a sequence of `longest` tokens are held out.
    """
    sizes: dict[str, int] = {}
    for file in files:
        sizes |= _documents(file)
    candidates = [name for name, size in sizes.items() if size > BYTES_PER_TOKEN * longest]
    if len(candidates) < LEAST:
        raise UserError(
            f"--text has {len(candidates)} documents of more than {BYTES_PER_TOKEN * longest} "
            f"bytes, and at least {LEAST} are needed, so that training, validation and test have "
            "their own: give a folder with more files, or cut the text into several"
        )
    order = sorted(candidates, key=SplitRule(val_fraction=0, seed=0).position)
    share = max(1, round(HELD_OUT * len(order)))
    held_out = dict.fromkeys(order[:share], "test") | dict.fromkeys(order[share : 2 * share], "val")
    return {name: held_out.get(name, "train") for name in sizes}


def _documents(file: InputFile) -> dict[str, int]:
    """About how many bytes each document of a file has."""
    if file.kind == TEXT:
        return {file.id: file.size * (2 if file.compressed else 1)}
    if file.kind == JSON:
        return {}  # `prepare` leaves it out
    sizes = {}
    for item in read_items(file):
        if isinstance(item, Line):
            sizes[item.document] = len(item.raw)
        else:
            sizes |= {piece.document: len(piece.text) for piece in pieces_of(item)}
    return sizes


def _write_splits(path: Path, split_of: dict[str, str]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(("document", "split"))
    writer.writerows(split_of.items())
    if path.exists() and path.read_text() == text.getvalue():
        return
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text.getvalue())
    os.replace(temporary, path)
