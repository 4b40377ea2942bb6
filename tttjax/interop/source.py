"""The source of an import: opened weights, their configuration, tokenizer and reference."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from tttjax.config import Config, from_config_dict, parameter_count
from tttjax.config.files import OVERRIDE_PREFIX, apply_override
from tttjax.data.tokenizers.base import Tokenizer
from tttjax.data.tokenizers.vocabulary import open_tokenizer
from tttjax.errors import UserError
from tttjax.interop.streaming import WeightSlice
from tttjax.io.paths import local_path
from tttjax.models.transformer import Transformer

Log = Callable[[str], None]


@dataclass(frozen=True)
class Reference:
    """The same model in its own project's code.

    name: of that code. logits: tokens [T] -> float32 logits [T, V]; None if the code is not
    installed. config: for our logits in the comparison, the run's without deliberate changes of the
    model. exact: whether the import rounds no weight.
    """

    name: str
    logits: Callable[[np.ndarray], np.ndarray | None]
    config: Config
    exact: bool = True


@dataclass(frozen=True)
class ImportSource:
    """Weights that are opened but not read.

    step: of the imported checkpoint. origin: source and terms of the weights, for `origin.json`.
    iter_weights: reads them one by one, in the model's layout. added: paths of weights that the
    source lacks; they are initialized as in a new model.
    """

    config: Config
    step: int
    origin: dict[str, Any]
    iter_weights: Callable[[Transformer], Iterator[WeightSlice]]
    tokenizer: Tokenizer | None
    added: frozenset[str] = frozenset()
    reference: Reference | None = None


def is_overridden(name: str, overrides: Sequence[str]) -> bool:
    """Whether an override sets the field of this dotted name."""
    return any(
        override.removeprefix(OVERRIDE_PREFIX).split("=")[0] == name for override in overrides
    )


def config_with_overrides(values: ConfigDict, overrides: Sequence[str]) -> Config:
    """The configuration with the overrides, validated."""
    for override in overrides:
        apply_override(values, override)
    return from_config_dict(values)


def describe_config(config: Config, assumed: dict[str, Any], log: Log) -> None:
    """Logs the model's size and the assumed fields of its configuration."""
    model = config.model
    count = parameter_count(model)
    fast = f", fast MLPs in the last {model.suffix_layers}" if model.fast_mlp else ""
    log(
        f"{model.num_layers} blocks of width {model.embed_dim}, {model.num_heads} heads, MLPs of "
        f"{model.mlp_dim}{fast}, vocabulary {model.vocab_size}; {count['total']:,} parameters, "
        f"{count['fast']:,} of them fast"
    )
    if assumed:
        fields = ", ".join(f"{name}={_format(value)}" for name, value in assumed.items())
        log(f"assumed, because the weights do not determine them: {fields}")


def _format(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else f"{value}"


def load_checked_tokenizer(path: str, config: Config) -> Tokenizer:
    """The tokenizer of a file or folder. Raises UserError if it is absent or does not fit."""
    tokenizer = open_tokenizer(local_path(path, "--tokenizer"))
    if tokenizer is None:
        raise UserError(
            f"there is no tokenizer at {path}; give a tokenizer.json, a SentencePiece .model file, "
            "or a folder of prepared data or of a run."
        )
    check_tokenizer(tokenizer, path, config)
    return tokenizer


def check_tokenizer(tokenizer: Tokenizer, path: str, config: Config) -> None:
    """Raises UserError for a vocabulary larger than the model's."""
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer {path} has {tokenizer.vocab_size} tokens, more than the "
            f"{config.model.vocab_size} of the model; give the model's own tokenizer."
        )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a model's JSON file. Raises UserError if it is missing or damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path.parent} has no {path.name}, which describes the model; copy it from the "
            "model's source."
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); copy it again.") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} does not hold a JSON object; copy it again.")
    return values
