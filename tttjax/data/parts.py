"""A data set that several hosts prepare: each a part of the input files, joined at the end.

part-00000-of-00004/     the data set of the first files, with its own lock and journal
manifest.json            of the whole, written once all parts are finished: its shards are those
                         of the parts, in order, so it reads like the data set of one host
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tttjax.data.input_source import InputSource
from tttjax.data.inputs import InputFile
from tttjax.data.manifest import counts_of, describe_split, is_masked, parse_manifest
from tttjax.data.prepare_settings import PrepareSettings
from tttjax.data.prepared_folder import write_json
from tttjax.data.shards import MANIFEST, TOKENIZER_DIR
from tttjax.data.splits import TRAIN, VAL
from tttjax.data.tokenizers.base import load_tokenizer
from tttjax.errors import UserError

_NAMED = 10  # unfinished parts that a line of output names


@dataclass(frozen=True)
class InputPart:
    """Part `index`, from 0, of `count`."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"part-{self.index:05d}-of-{self.count:05d}"

    @staticmethod
    def parse(text: str) -> "InputPart":
        """The part of `I/N`. UserError if there is none."""
        match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        part = InputPart(*map(int, match.groups())) if match else InputPart(0, 0)
        if not 0 <= part.index < part.count:
            raise UserError(
                f"part={text} must be I/N, part I of N parts, with I from 0 to N-1: 0/4 is the "
                "first of four."
            )
        return part

    def check(self, settings: PrepareSettings, overwrite: bool) -> None:
        """Raises UserError for what needs all documents, or the folder of the whole."""
        if overwrite:
            raise UserError(
                "overwrite does not apply to a part, whose data others join; delete the folder of "
                "--out once, before the first part starts."
            )
        if settings.tokenizer == "sentencepiece":
            raise UserError(
                "A part cannot train the vocabulary of all; train it first on a sample of the "
                "files (`tttjax prepare SAMPLE --tokenizer=sentencepiece --out=DIR`), and give all "
                "parts --tokenizer=DIR."
            )
        if settings.drop_duplicates:
            raise UserError(
                "drop_duplicates compares each document with all before it, and a part has only "
                "its own; remove duplicates from the texts first (with datatrove, for example), or "
                "prepare them on one host, without a part."
            )

    def of(self, source: InputSource) -> InputSource:
        """The part of the inputs. `identity` remains that of the whole."""
        if source.zarr_root:
            raise UserError("A Zarr folder is read by one process; remove --part.")
        files = self.files_of(source.files)
        total = sum(file.text_bytes for file in files)
        return replace(source, files=files, total_bytes=total, part=(self.index, self.count))

    def files_of(self, files: Sequence[InputFile]) -> tuple[InputFile, ...]:
        """Its consecutive files: about as many bytes as in the other parts, and at least one."""
        if len(files) < self.count:
            raise UserError(
                f"{len(files)} input files cannot be divided into {self.count} parts; make at most "
                f"{len(files)}, or split the files."
            )
        ends = np.cumsum([file.text_bytes for file in files])
        first = 0
        for number in range(self.count):
            start, remaining = first, self.count - number - 1
            nearest = int(np.abs(ends - ends[-1] * (number + 1) / self.count).argmin()) + 1
            first = min(max(nearest, start + 1), len(files) - remaining)
            if number == self.index:
                break
        return tuple(files[start : first if remaining else len(files)])

    def check_folder(self, folder: Path) -> None:
        """UserError if the folder of the whole holds anything but parts of this number."""
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file; name a folder.")
        known = {InputPart(index, self.count).name for index in range(self.count)}
        for path in folder.iterdir() if folder.exists() else ():
            is_temporary = path.name.startswith(".") or path.name.endswith(".tmp")
            if path.name not in known | {TOKENIZER_DIR, MANIFEST} and not is_temporary:
                raise UserError(
                    f"{path} is not one of the {self.count} parts; delete it, or choose another "
                    "folder for them."
                )


def join(folder: Path, count: int, log: Callable[[str], None]) -> None:
    """Writes the manifest of the whole if all parts are finished.

    Any number of hosts may do so at once, since its content is a function of the parts. Raises
    UserError if the parts differ in settings or inputs, or a split is empty.
    """
    parts = [InputPart(index, count) for index in range(count)]
    missing = [p.index for p in parts if not (folder / p.name / MANIFEST).exists()]
    if missing:
        names = ", ".join(map(str, missing[:_NAMED])) + ", ..." * (len(missing) > _NAMED)
        log(
            f"prepare: {len(missing)} of {count} parts of {folder} are not finished ({names}); the "
            "last one joins them, as does the command of any part that is run again"
        )
        return
    manifests = [parse_manifest(folder / part.name / MANIFEST) for part in parts]
    for part, manifest in zip(parts, manifests, strict=True):
        _check_alike(folder, part, manifest, manifests[0])
    splits = _joined_splits(parts, manifests)
    _check_splits(manifests[0]["settings"], splits, count)
    skipped = {
        name: sum(manifest["skipped"][name] for manifest in manifests)
        for name in manifests[0]["skipped"]
    }
    joined = {**manifests[0], "skipped": skipped, "splits": splits}
    del joined["part"]
    load_tokenizer(folder / parts[0].name / TOKENIZER_DIR).save(folder / TOKENIZER_DIR)
    write_json(folder / MANIFEST, joined)
    log(f"prepare: {count} parts are joined in {folder}")
    for split, entry in splits.items():
        log(f"prepare: {describe_split(split, entry)}")


def _check_alike(
    folder: Path, part: InputPart, manifest: dict[str, Any], first: dict[str, Any]
) -> None:
    """UserError, naming the setting, if a part was made otherwise than the first."""
    if manifest.get("part") != [part.index, part.count]:
        raise UserError(
            f"{folder / part.name} holds part {manifest.get('part')}; delete it, and run part "
            f"{part} again."
        )
    settings, expected = manifest["settings"], first["settings"]
    names = [name for name in expected if settings.get(name) != expected[name]]
    differing = [f"{name}={settings.get(name)!r}, not {expected[name]!r}" for name in names]
    if manifest["inputs"] != first["inputs"]:
        differing.append("other input files, or a file of another size or time")
    if manifest["tokenizer"] != first["tokenizer"]:
        differing.append("another tokenizer")
    if differing:
        raise UserError(
            f"Part {part} of {folder} has {'; '.join(differing)}, compared with part 0; delete "
            f"the folder of the wrong one, and run it again with the settings of the others."
        )


def _joined_splits(
    parts: Sequence[InputPart], manifests: Sequence[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Counts and shards of each split, in the order of the parts."""
    joined = {}
    for split in sorted({split for manifest in manifests for split in manifest["splits"]}):
        pairs = [
            (part, manifest["splits"][split])
            for part, manifest in zip(parts, manifests, strict=True)
            if split in manifest["splits"]
        ]
        joined[split] = {
            **{
                count: sum(entry[count] for _, entry in pairs)
                for count in counts_of(is_masked(manifests[0]))
            },
            "longest_document": max(entry["longest_document"] for _, entry in pairs),
            "shards": [
                {**shard, "name": f"{part.name}/{shard['name']}"}
                for part, entry in pairs
                for shard in entry["shards"]
            ],
        }
    return joined


def _check_splits(settings: dict[str, Any], splits: dict[str, Any], count: int) -> None:
    """UserError if a split that documents are assigned to by hash is empty."""
    by_hash = not settings["split_manifest"] and settings["val_fraction"] > 0
    needed = {TRAIN: "to train on", VAL: "to hold out"} if by_hash else {}
    empty = [purpose for split, purpose in needed.items() if split not in splits]
    if empty or not splits:
        raise UserError(
            f"No document of the {count} parts is left {empty[0] if splits else 'at all'}; delete "
            "their folders, and prepare them with another val_fraction, seed or "
            "min_document_tokens, or without parts, where one document would be moved."
        )
