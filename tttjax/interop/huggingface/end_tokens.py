"""The end-of-text tokens that the files of a Hugging Face model name; each stops generation."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from tttjax.errors import UserError
from tttjax.interop.huggingface.tokenizer_files import TOKENIZER_CONFIG, TOKENIZER_FILE
from tttjax.interop.source import read_json

GENERATION_CONFIG = "generation_config.json"


def end_tokens(folder: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """EOS ids of `config.json`, `generation_config.json` and the tokenizer, in that order.

    config: the contents of `config.json`. Raises UserError for entries that are not token ids.
    """
    ids = [*token_ids(config, "eos_token_id")]
    if (folder / GENERATION_CONFIG).exists():
        ids += token_ids(read_json(folder / GENERATION_CONFIG), "eos_token_id")
    if (folder / TOKENIZER_CONFIG).exists():
        ids += _token_id_of(folder, read_json(folder / TOKENIZER_CONFIG).get("eos_token"))
    return tuple(dict.fromkeys(ids))


def token_ids(config: Mapping[str, Any], field: str) -> list[int]:
    """The token ids in a field: one, a list, or none. Raises UserError for anything else."""
    value = config.get(field)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if type(token) is not int or token < 0:
            raise UserError(f"the model's files have {field} = {value!r}, which is no token id.")
    return ids


def _token_id_of(folder: Path, name: Any) -> Iterator[int]:
    """The id of the token of this name; nothing if the tokenizer lacks it."""
    if isinstance(name, dict):
        name = name.get("content")
    if isinstance(name, str):
        try:
            path = str(folder / TOKENIZER_FILE)
            token = tokenizers.Tokenizer.from_file(path).token_to_id(name)
        except Exception:  # opening the tokenizer reports the error later
            return
        if token is not None:
            yield token
