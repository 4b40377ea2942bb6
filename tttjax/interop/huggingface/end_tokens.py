"""Which tokens end a text, by the files of a Hugging Face model: all of them stop a generation."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from tttjax.errors import UserError
from tttjax.interop.source import read_json

GENERATION, SETTINGS = "generation_config.json", "tokenizer_config.json"
TOKENIZER = "tokenizer.json"


def end_tokens(folder: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids that `config.json`, `generation_config.json` and the tokenizer say end a text, in order.

    config: the contents of `config.json`. Raises UserError for entries that are no token ids.
    """
    found = [*token_ids(config, "eos_token_id")]
    if (folder / GENERATION).exists():
        found += token_ids(read_json(folder / GENERATION), "eos_token_id")
    if (folder / SETTINGS).exists():
        found += _named(folder, read_json(folder / SETTINGS).get("eos_token"))
    return tuple(dict.fromkeys(found))


def token_ids(config: Mapping[str, Any], field: str) -> list[int]:
    """A field that holds a token id, several, or none. UserError for anything else."""
    value = config.get(field)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if type(token) is not int or token < 0:
            raise UserError(f"the model's files say {field} = {value!r}, which is no token id.")
    return ids


def _named(folder: Path, name: Any) -> Iterator[int]:
    """The id of the token of this name, if the tokenizer has it."""
    if isinstance(name, dict):
        name = name.get("content")
    if isinstance(name, str):
        try:
            found = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER)).token_to_id(name)
        except Exception:  # of the library's own kind; opening the tokenizer says what is wrong
            return
        if found is not None:
            yield found
