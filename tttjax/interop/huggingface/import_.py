"""Pretrained Transformers of Hugging Face as a source, as they are or to be extended."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tttjax.config import Config, default_config, from_config_dict, load_config
from tttjax.config.files import apply_override
from tttjax.data.tokenizers.base import Tokenizer
from tttjax.data.tokenizers.huggingface import HuggingFaceTokenizer
from tttjax.data.tokenizers.vocabulary import open_tokenizer
from tttjax.errors import UserError
from tttjax.interop.huggingface import (
    EMBEDDING,
    HEAD,
    check_names,
    config_from_huggingface,
    inner_from_huggingface,
    pieces,
    tensor_places,
    unplaced,
)
from tttjax.interop.huggingface.compare import their_logits
from tttjax.interop.huggingface.configs import OWN
from tttjax.interop.huggingface.end_tokens import end_tokens, token_ids
from tttjax.interop.huggingface.files import TensorFiles
from tttjax.interop.huggingface.seal import check_export
from tttjax.interop.huggingface.tokenizer_files import ASIDE
from tttjax.interop.source import (
    ImportSource,
    Reference,
    Say,
    check_tokenizer,
    describe_config,
    given_tokenizer,
    is_named,
    read_json,
)
from tttjax.models import Transformer, build_model
from tttjax.runs.origin import huggingface_terms

CONFIG, TOKENIZER, ADAPTER = "config.json", "tokenizer.json", "adapter_config.json"
LONGEST = 8192  # tokens of the sequences that a run is set to train on, unless told otherwise
# Of the model, what may be changed on purpose while every weight stays what it is.
MAY_CHANGE = ("rope_theta", "rope_scaling", "norm_eps")


def looks_like_huggingface(folder: Path) -> bool:
    """Whether a folder holds a model in this form, complete or not."""
    return (folder / CONFIG).exists() or any(folder.glob("*.safetensors*"))


def open_huggingface(
    folder: Path,
    *,
    config: str = "",
    overrides: Sequence[str] = (),
    tokenizer: str = "",
    say: Say = print,
) -> ImportSource:
    """A model's folder, compared with the configuration by names and shapes.

    config: experiment file; "": the configuration is that of `config.json`. overrides: of either;
    what they add, such as fast MLPs, starts as in a new model, the fast MLPs' last matrix at 0.
    Raises UserError for anything wrong with these, for an export of ours that was changed since,
    and for a model that ours cannot express.
    """
    check_export(folder)
    values = read_json(folder / CONFIG)
    stored = config_from_huggingface(values)
    family = values["model_type"]
    if (folder / ADAPTER).exists():
        raise UserError(
            f"{folder} has an adapter ({ADAPTER}), which would be left out; merge it into the "
            "weights first, or remove it to import the model without."
        )
    files = TensorFiles(folder)
    say(f"{folder}: {family} of Hugging Face transformers, {len(files.names)} tensors")
    files.check_kinds()
    has_other_head = _has_other_head(files, family)
    if stored["tie_embeddings"] and has_other_head:
        stored["tie_embeddings"] = False
        say(f"{HEAD} is not the embedding, though config.json ties them: imported untied")
    resolved = _resolve(config, overrides, stored, values)
    if resolved.model.tie_embeddings and has_other_head:
        raise UserError(
            f"{folder} has a head ({HEAD}) that is not its embedding, and model.tie_embeddings = "
            "true would leave it out; set --config.model.tie_embeddings=false."
        )
    model = build_model(resolved.model, resolved.inner)
    places = tensor_places(model, family)
    check_names(files.names, places, str(folder))
    _check_shapes(files, places, folder)
    added = frozenset(unplaced(model, places))
    _check_added(added, model, folder)
    describe_config(resolved, {}, say)
    if family == OWN:
        say("its files carry code of their own, which is not run here")
    if added:
        start = (
            "at 0, so that it changes nothing"
            if resolved.model.fast_mlp_init == "zero"
            else "at random"
        )
        say(f"the fast MLPs are new; their last matrix starts {start} until they have learned")
    return ImportSource(
        config=resolved,
        step=0,
        origin={
            "kind": "Hugging Face transformers",
            "source": str(folder),
            "family": family,
            **huggingface_terms(folder),
        },
        pieces=lambda model: pieces(places, files.read),
        tokenizer=_tokenizer(folder, tokenizer, values, resolved),
        added=added,
        reference=_reference(folder, family, resolved, stored, files),
    )


def _has_other_head(files: TensorFiles, family: str) -> bool:
    """Whether there is a head that a model with tied embeddings would leave out."""
    if family == "gemma3_text" or not {EMBEDDING, HEAD} <= files.names:
        return False  # of Gemma's, the head is read and compared in any case
    return not np.array_equal(files.read(EMBEDDING), files.read(HEAD))


# Configuration -----------------------------------------------------------------------------------


def _resolve(
    file: str, overrides: Sequence[str], stored: Mapping[str, Any], values: Mapping[str, Any]
) -> Config:
    """The run's configuration: the file's, or the model's own, with the overrides."""
    if file:
        return load_config(file, overrides)
    config = default_config()
    config.model.update(stored)
    config.inner.update(inner_from_huggingface(values))
    if values.get("dtype", values.get("torch_dtype")) in ("bfloat16", "float16"):
        config.model.compute_dtype = "bfloat16"
    for override in overrides:
        apply_override(config, override)
    is_added = config.model.fast_mlp and not stored.get("fast_mlp")
    if is_added and not is_named("model.fast_mlp_init", overrides):
        config.model.fast_mlp_init = "zero"
    if not is_named("train.seq_len", overrides):
        chunk, longest = config.inner.chunk_size, values.get("max_position_embeddings") or LONGEST
        config.train.seq_len = max(chunk, min(LONGEST, longest) // chunk * chunk)
    return from_config_dict(config)


def _check_shapes(files: TensorFiles, places, folder: Path) -> None:
    """UserError with the tensors that have another shape than the model's."""
    wrong = [
        f"{place.name} has shape {shape}, not {place.shape}"
        for place in places
        if (shape := files.shape(place.name)) != place.shape
    ]
    if wrong:
        more = f"; and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise UserError(f"{folder} does not fit this model: {'; '.join(wrong[:8])}{more}")


def _check_added(added: frozenset[str], model: Transformer, folder: Path) -> None:
    """UserError for weights that the source lacks, but for fast MLPs."""
    lacking = sorted(path for path in added if "/fast_mlp" not in path)
    if lacking:
        raise UserError(
            f"{folder} has no tensor for {', '.join(lacking[:4])}: only fast MLPs can be added, "
            "with --config.model.fast_mlp=true --config.model.suffix_layers=N."
        )


# Tokenizer and comparison ------------------------------------------------------------------------


def _tokenizer(
    folder: Path, given: str, values: Mapping[str, Any], config: Config
) -> Tokenizer | None:
    """That of --tokenizer, or the folder's own with the special tokens that its files name."""
    if given:
        return given_tokenizer(given, config)
    if (aside := open_tokenizer(folder / ASIDE)) is not None:
        return aside
    path = folder / TOKENIZER
    if not path.exists():
        return None

    ends = end_tokens(folder, values)
    # Where the model has no BOS, EOS stands between documents.
    begins = (*token_ids(values, "bos_token_id"), *token_ids(values, "eos_token_id"))
    found = HuggingFaceTokenizer(
        path,
        bos_id=begins[0] if begins else None,
        eos_id=ends[0] if ends else None,
        eos_ids=ends,
    )
    check_tokenizer(found, str(path), config)
    return found


def _reference(
    folder: Path, family: str, config: Config, stored: Mapping[str, Any], files: TensorFiles
) -> Reference | None:
    """transformers itself; None for a model that brings code of its own, which is not run here."""
    if family == OWN:
        return None

    def logits(token_T: np.ndarray) -> np.ndarray | None:
        more_T = np.concatenate((token_T, token_T[:1]))  # the last token is only a target
        return their_logits(folder, more_T, np.arange(len(token_T)), trusted=False)

    as_stored = {name: stored[name] for name in MAY_CHANGE}
    if config.model.mixers == stored["mixers"]:
        as_stored["window_size"] = stored.get("window_size", config.model.window_size)
    else:  # the sample is short enough for any window to see all of it
        as_stored["window_size"] = max(config.model.window_size, 4096)
    model = dataclasses.replace(config.model, compute_dtype="float32", **as_stored)
    is_wide = any(files.kind(name) in ("F32", "F64") for name in files.names)
    exact = config.model.param_dtype != "bfloat16" or not is_wide
    return Reference("transformers", logits, dataclasses.replace(config, model=model), exact)
