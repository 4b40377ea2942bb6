"""What an import starts from: weights that were opened and not read, and their configuration."""

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
from tttjax.interop.streaming import WeightPiece
from tttjax.io.paths import local_path
from tttjax.models import Transformer

Say = Callable[[str], None]


@dataclass(frozen=True)
class Reference:
    """The same model by its own project's code.

    logits: tokens [T] -> logits [T, V] in float32; None where that code is not installed. name: of
    the code. config: under which our logits are compared, the run's but for what was changed of
    the model on purpose. exact: whether no weight is rounded on the way.
    """

    name: str
    logits: Callable[[np.ndarray], np.ndarray | None]
    config: Config
    exact: bool = True


@dataclass(frozen=True)
class ImportSource:
    """Weights that have been opened, and not read.

    step: the number that the imported checkpoint gets. origin: where the weights are from and
    under what terms, for `origin.json`. pieces: reads them one by one, in the model's layout.
    added: paths of weights that are not there, and start as in a new model.
    """

    config: Config
    step: int
    origin: dict[str, Any]
    pieces: Callable[[Transformer], Iterator[WeightPiece]]
    tokenizer: Tokenizer | None
    added: frozenset[str] = frozenset()
    reference: Reference | None = None


def is_named(name: str, overrides: Sequence[str]) -> bool:
    """Whether an override sets the field of this dotted name."""
    return any(
        override.removeprefix(OVERRIDE_PREFIX).split("=")[0] == name for override in overrides
    )


def overridden(values: ConfigDict, overrides: Sequence[str]) -> Config:
    """The checked configuration with the overrides."""
    for override in overrides:
        apply_override(values, override)
    return from_config_dict(values)


def describe_config(config: Config, assumed: dict[str, Any], say: Say) -> None:
    """Says what the model is, and what of its configuration was assumed."""
    model = config.model
    count = parameter_count(model)
    fast = f", fast MLPs in the last {model.suffix_layers}" if model.fast_mlp else ""
    say(
        f"{model.num_layers} blocks of width {model.embed_dim}, {model.num_heads} heads, MLPs of "
        f"{model.mlp_dim}{fast}, vocabulary {model.vocab_size}; {count['total']:,} parameters, "
        f"{count['fast']:,} of them fast"
    )
    if assumed:
        told = ", ".join(f"{name}={_plain(value)}" for name, value in assumed.items())
        say(f"assumed, since the source does not tell: {told}")


def _plain(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else f"{value}"


def given_tokenizer(path: str, config: Config) -> Tokenizer:
    """That of a file or folder. UserError if there is none, or one too large for the model."""
    found = open_tokenizer(local_path(path, "--tokenizer"))
    if found is None:
        raise UserError(
            f"there is no tokenizer at {path}: give a tokenizer.json, a SentencePiece .model file, "
            "or the folder of prepared data or of a run."
        )
    check_tokenizer(found, path, config)
    return found


def check_tokenizer(tokenizer: Tokenizer, path: str, config: Config) -> None:
    """UserError for more tokens than the model has."""
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer {path} has {tokenizer.vocab_size} tokens, more than the "
            f"{config.model.vocab_size} of the model; give the one that it was trained with."
        )


def read_json(path: Path) -> dict[str, Any]:
    """The fields of a model's JSON file. UserError if there are none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path.parent} has no {path.name}, which says what model its tensors are; copy it "
            "from where the model is from."
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); copy it again.") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} does not hold the fields of a model; copy it again.")
    return values
