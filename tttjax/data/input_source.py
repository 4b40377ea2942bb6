"""The resolved inputs of `prepare`: text files, or one Zarr folder."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tttjax.data import zarr
from tttjax.data.file_checks import crc32_of
from tttjax.data.inputs import CHATS, JSON, LINES, InputFile, list_inputs
from tttjax.data.prepare_settings import CHAT_KEY, TEXT_KEY, PrepareSettings
from tttjax.data.shards import TOKENIZER_DIR
from tttjax.data.tokenizers.base import CONFIG_FILE
from tttjax.data.tokenizers.huggingface import TEMPLATE_FILE
from tttjax.errors import UserError
from tttjax.io.paths import is_url


@dataclass(frozen=True)
class InputSource:
    """The resolved inputs: text files or one Zarr folder. `identity` changes when they do.

    ignored: single JSON documents within folders, which are rarely text.
    part: (index, count) if `files` are one of several parts, and `identity` is that of all.
    """

    files: tuple[InputFile, ...]
    zarr_root: str
    total_bytes: int
    identity: str
    ignored: tuple[InputFile, ...] = ()
    part: tuple[int, int] | None = None

    @staticmethod
    def find(settings: PrepareSettings) -> "InputSource":
        if any(zarr.is_zarr(path) for path in settings.inputs):
            return InputSource._find_zarr(settings)
        key = CHAT_KEY if settings.chat else settings.text_key
        listed = list_inputs(settings.inputs, settings.pattern, key)
        ignored = _single_documents(settings, listed)
        files = tuple(file for file in listed if file.kind != JSON)
        if not files:
            raise _not_lines(ignored[0])
        if settings.chat:
            files = tuple(map(_as_conversations, files))
        marks = [[file.id, file.size, file.version] for file in files]
        total = sum(file.text_bytes for file in files)
        return InputSource(files, "", total, _hash([marks, _named_files(settings)]), ignored)

    @staticmethod
    def _find_zarr(settings: PrepareSettings) -> "InputSource":
        if len(settings.inputs) > 1:
            raise UserError("A Zarr folder must be the only input: its arrays are its splits.")
        unsupported = (
            settings.min_document_tokens,
            settings.split_manifest,
            settings.pattern,
            settings.chat,
            settings.drop_duplicates,
        )
        if any(unsupported) or settings.text_key != TEXT_KEY:
            raise UserError(
                "min_document_tokens, split_manifest, pattern, text_key, chat and drop_duplicates "
                "do not apply to a Zarr folder; remove them."
            )
        total, marks = zarr.zarr_size(settings.inputs[0])
        return InputSource((), settings.inputs[0], total, _hash([marks, _named_files(settings)]))


def _single_documents(settings: PrepareSettings, files: list[InputFile]) -> tuple[InputFile, ...]:
    """The single JSON documents in `files`. UserError for one that the settings name or match."""
    named = {name if is_url(name) else str(Path(name)) for name in settings.inputs}
    single = tuple(file for file in files if file.kind == JSON)
    for file in single:
        if settings.pattern or file.path in named:
            raise _not_lines(file)
    return single


def _as_conversations(file: InputFile) -> InputFile:
    if file.kind != LINES:
        raise UserError(
            f"{file.path} is {file.kind}, and conversations are read from JSON lines (.jsonl); "
            "exclude it, or name the files with --pattern."
        )
    return replace(file, kind=CHATS)


def _not_lines(file: InputFile) -> UserError:
    return UserError(
        f"{file.path} is one JSON document, not JSON lines (one object per line); convert it "
        "(jq -c '.[]' for an array), or rename it to .txt to read it as text."
    )


def _named_files(settings: PrepareSettings) -> list[str]:
    """Checksums of the tokenizer file, its chat template and the split manifest."""
    paths = [Path(name) for name in (settings.tokenizer, settings.split_manifest) if name]
    if settings.chat:
        given = paths[0]
        folders = [given.parent] if given.is_file() else [given, given / TOKENIZER_DIR]
        paths += [folder / name for folder in folders for name in (TEMPLATE_FILE, CONFIG_FILE)]
    return [f"{crc32_of(path):08x}" for path in paths if path.is_file()]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
