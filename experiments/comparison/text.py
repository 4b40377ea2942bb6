"""Prepares one text for all systems, with its documents in three splits.

Learning rates are chosen on the split `val`; results are on the split `test`. No document is in
two splits.
"""

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

from tttjax.data.documents import Line, item_spans, read_items
from tttjax.data.inputs import JSON, TEXT, InputFile, list_inputs
from tttjax.data.preparation import prepare
from tttjax.data.shards import PreparedData
from tttjax.data.splits import SplitRule
from tttjax.errors import UserError

HELD_OUT = 0.15  # share of the documents in each of val and test
BYTES_VOCABULARY = 264  # vocabulary size of the tokenizer `bytes`
BYTES_PER_TOKEN = 5  # upper bound for a small vocabulary
MIN_DOCUMENTS = 6  # with fewer, held-out losses depend mostly on the document


def prepare_text(
    text: str, out: Path, *, vocab_size: int, longest: int, splits: str = "", log=print
) -> PreparedData:
    """Prepares the data set out/data, or opens it if it is finished.

    text: file or folder, or `stdlib`. longest: the longest context; shorter documents are left
    out. splits: a table with a column `split` (train, val, test) (default: split by hash).
    Raises UserError if the text is missing or has too few documents that are long enough.
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
        data.split(split)  # raises UserError if it is empty
    return data


def split_documents(files: Sequence[InputFile], longest: int) -> dict[str, str]:
    """Document -> train, val or test, by a hash of its name.

    Only documents certainly longer than `longest` tokens are held out.
    """
    sizes: dict[str, int] = {}
    for file in files:
        sizes |= _documents(file)
    candidates = [name for name, size in sizes.items() if size > BYTES_PER_TOKEN * longest]
    if len(candidates) < MIN_DOCUMENTS:
        raise UserError(
            f"--text has {len(candidates)} documents of more than {BYTES_PER_TOKEN * longest} "
            f"bytes, but at least {MIN_DOCUMENTS} are needed for training, validation and test: "
            "give a folder with more files, or split the text into several"
        )
    order = sorted(candidates, key=SplitRule(val_fraction=0, seed=0).position)
    share = max(1, round(HELD_OUT * len(order)))
    held_out = dict.fromkeys(order[:share], "test") | dict.fromkeys(order[share : 2 * share], "val")
    return {name: held_out.get(name, "train") for name in sizes}


def _documents(file: InputFile) -> dict[str, int]:
    """Document -> approximate bytes, for each document of a file."""
    if file.kind == TEXT:
        return {file.id: file.size * (2 if file.compressed else 1)}
    if file.kind == JSON:
        return {}  # `prepare` ignores it
    sizes = {}
    for item in read_items(file):
        if isinstance(item, Line):
            sizes[item.document] = len(item.raw)
        else:
            sizes |= {span.document: len(span.text) for span in item_spans(item)}
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
