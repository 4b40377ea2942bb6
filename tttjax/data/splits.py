"""Assigns documents to splits by the hash of their names or by a table."""

import csv
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tttjax.errors import UserError

TRAIN, VAL = "train", "val"


@dataclass(frozen=True)
class SplitRule:
    """Document name -> split, independent of the other documents and their order.

    listed: name -> split, if given. Otherwise a document is held out if the hash of seed and name
    is below `val_fraction`, unless `forced` assigns it.
    """

    val_fraction: float
    seed: int
    listed: Mapping[str, str] | None = None
    forced: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, document: str) -> str:
        if self.listed is not None:
            return self._look_up(document)
        held_out = self.position(document) < self.val_fraction
        return self.forced.get(document, VAL if held_out else TRAIN)

    def position(self, document: str) -> float:
        """Pseudo-random number in [0, 1) from the hash of seed and document name."""
        digest = hashlib.sha256(f"{self.seed}:{document}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    def _look_up(self, document: str) -> str:
        assert self.listed is not None
        name = PurePosixPath(document).name
        for key in (document, name, name.split(".")[0]):
            if key in self.listed:
                return self.listed[key]
        raise UserError(
            f"Document {document} is not in the split manifest; add a line for it or exclude the "
            "file with --pattern."
        )


def read_split_manifest(path: str) -> dict[str, str]:
    """Document -> split from the first column and the column `split` of a table with a header.

    The table is tab- or comma-separated. The first column has a document's name, its file name, or
    its file name without suffixes.
    """
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            header = file.readline()
            file.seek(0)
            delimiter = "\t" if "\t" in header else ","
            rows = list(csv.DictReader(file, delimiter=delimiter))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read the split manifest {path}: {error}.") from error
    if not rows or "split" not in rows[0]:
        raise UserError(f'The split manifest {path} has no column "split" or no rows.')
    first = next(iter(rows[0]))
    listed = {row[first]: row["split"] or "" for row in rows}
    for document, split in listed.items():
        if not re.fullmatch(r"[a-z0-9_]+", split):
            raise UserError(
                f"The split manifest {path} gives {document} the split {split!r}; use lower-case "
                "letters, digits and underscores."
            )
    return listed
