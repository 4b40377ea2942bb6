"""Import of pretrained Hugging Face Transformers, optionally with fast MLPs added."""

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
    iter_weights,
    tensor_slots,
    unmatched_weights,
)
from tttjax.interop.huggingface.compare import transformers_logits
from tttjax.interop.huggingface.configs import OWN
from tttjax.interop.huggingface.end_tokens import end_tokens, token_ids
from tttjax.interop.huggingface.files import TensorFiles
from tttjax.interop.huggingface.names import raise_mismatch
from tttjax.interop.huggingface.seal import check_export
from tttjax.interop.huggingface.tokenizer_files import NATIVE_DIR, TOKENIZER_FILE
from tttjax.interop.source import (
    ImportSource,
    Log,
    Reference,
    check_tokenizer,
    describe_config,
    is_overridden,
    load_checked_tokenizer,
    read_json,
)
from tttjax.models.transformer import Transformer, build_model
from tttjax.runs.origin import huggingface_terms

CONFIG, ADAPTER = "config.json", "adapter_config.json"
MAX_DEFAULT_SEQ_LEN = 8192  # largest train.seq_len that an import sets by default
# Model fields that overrides may change: the comparison with transformers ignores the change.
REPLACEABLE = ("rope_theta", "rope_scaling", "norm_eps")


def is_huggingface_model(folder: Path) -> bool:
    """Whether a folder holds a Hugging Face model, complete or not."""
    return (folder / CONFIG).exists() or any(folder.glob("*.safetensors*"))


def open_huggingface(
    folder: Path,
    *,
    config: str = "",
    overrides: Sequence[str] = (),
    tokenizer: str = "",
    log: Log = print,
) -> ImportSource:
    """Opens a model's folder and checks its tensors against the configuration.

    config: experiment file; "": use `config.json`. overrides: of either; weights that they add,
    such as fast MLPs, are initialized as in a new model, the fast MLPs' last matrix to 0.
    Raises UserError if any of these is invalid, for a tttjax export that was modified, and for a
    model that tttjax cannot express.
    """
    check_export(folder)
    values = read_json(folder / CONFIG)
    stored = config_from_huggingface(values)
    family = values["model_type"]
    if (folder / ADAPTER).exists():
        raise UserError(
            f"{folder} has an adapter ({ADAPTER}), which cannot be imported; merge it into the "
            "weights, or remove it to import the base model."
        )
    files = TensorFiles(folder)
    log(f"{folder}: {family} of Hugging Face transformers, {len(files.names)} tensors")
    files.check_dtypes()
    has_separate_head = _has_separate_head(files, family)
    if stored["tie_embeddings"] and has_separate_head:
        stored["tie_embeddings"] = False
        log(f"{HEAD} differs from the embedding, though config.json ties them: imported untied")
    resolved = _resolve(config, overrides, stored, values)
    if resolved.model.tie_embeddings and has_separate_head:
        raise UserError(
            f"{folder} has a head ({HEAD}) that is not its embedding, and model.tie_embeddings = "
            "true would drop it; set --config.model.tie_embeddings=false."
        )
    model = build_model(resolved.model, resolved.inner)
    slots = tensor_slots(model, family)
    check_names(files.names, slots, str(folder))
    _check_shapes(files, slots, folder)
    added = frozenset(unmatched_weights(model, slots))
    _check_added(added, model, folder)
    describe_config(resolved, {}, log)
    if family == OWN:
        log("the modeling code in the folder is not run")
    if added:
        start = (
            "at 0, so the model's outputs are unchanged"
            if resolved.model.fast_mlp_init == "zero"
            else "at random"
        )
        log(f"the fast MLPs are new; their last matrix starts {start}")
    return ImportSource(
        config=resolved,
        step=0,
        origin={
            "kind": "Hugging Face transformers",
            "source": str(folder),
            "family": family,
            **huggingface_terms(folder),
        },
        iter_weights=lambda model: iter_weights(slots, files.read),
        tokenizer=_tokenizer(folder, tokenizer, values, resolved),
        added=added,
        reference=_reference(folder, family, resolved, stored, files),
    )


def _has_separate_head(files: TensorFiles, family: str) -> bool:
    """Whether the files have a head that a model with tied embeddings would drop."""
    if family == "gemma3_text" or not {EMBEDDING, HEAD} <= files.names:
        return False  # Gemma's head is always read and compared
    return not np.array_equal(files.read(EMBEDDING), files.read(HEAD))


# Configuration -----------------------------------------------------------------------------------


def _resolve(
    file: str, overrides: Sequence[str], stored: Mapping[str, Any], values: Mapping[str, Any]
) -> Config:
    """The run's configuration: the file's or the model's own, with overrides."""
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
    if is_added and not is_overridden("model.fast_mlp_init", overrides):
        config.model.fast_mlp_init = "zero"
    if not is_overridden("train.seq_len", overrides):
        chunk = config.inner.chunk_size
        longest = values.get("max_position_embeddings") or MAX_DEFAULT_SEQ_LEN
        config.train.seq_len = max(chunk, min(MAX_DEFAULT_SEQ_LEN, longest) // chunk * chunk)
    return from_config_dict(config)


def _check_shapes(files: TensorFiles, slots, folder: Path) -> None:
    """Raises UserError that lists tensors whose shape is not the model's."""
    problems = [
        f"{slot.name} has shape {shape}, not {slot.shape}"
        for slot in slots
        if (shape := files.shape(slot.name)) != slot.shape
    ]
    raise_mismatch(str(folder), problems)


def _check_added(added: frozenset[str], model: Transformer, folder: Path) -> None:
    """Raises UserError if the source lacks weights other than fast MLPs."""
    missing = sorted(path for path in added if "/fast_mlp" not in path)
    if missing:
        raise UserError(
            f"{folder} has no tensor for {', '.join(missing[:4])}: only fast MLPs can be added, "
            "with --config.model.fast_mlp=true --config.model.suffix_layers=N."
        )


# Tokenizer and comparison ------------------------------------------------------------------------


def _tokenizer(
    folder: Path, override_path: str, values: Mapping[str, Any], config: Config
) -> Tokenizer | None:
    """The tokenizer at `override_path`, else the folder's own with its special tokens."""
    if override_path:
        return load_checked_tokenizer(override_path, config)
    if (native := open_tokenizer(folder / NATIVE_DIR)) is not None:
        return native
    path = folder / TOKENIZER_FILE
    if not path.exists():
        return None

    eos_ids = end_tokens(folder, values)
    # A model without BOS uses EOS between documents.
    bos_candidates = (*token_ids(values, "bos_token_id"), *token_ids(values, "eos_token_id"))
    result = HuggingFaceTokenizer(
        path,
        bos_id=bos_candidates[0] if bos_candidates else None,
        eos_id=eos_ids[0] if eos_ids else None,
        eos_ids=eos_ids,
    )
    check_tokenizer(result, str(path), config)
    return result


def _reference(
    folder: Path, family: str, config: Config, stored: Mapping[str, Any], files: TensorFiles
) -> Reference | None:
    """The reference logits by transformers; None for a model with its own modeling code."""
    if family == OWN:
        return None

    def logits(token_T: np.ndarray) -> np.ndarray | None:
        padded_T = np.concatenate((token_T, token_T[:1]))  # the last token is only a target
        return transformers_logits(folder, padded_T, np.arange(len(token_T)), trust_code=False)

    as_stored = {name: stored[name] for name in REPLACEABLE}
    if config.model.mixers == stored["mixers"]:
        as_stored["window_size"] = stored.get("window_size", config.model.window_size)
    else:  # large enough that the window covers the whole sample
        as_stored["window_size"] = max(config.model.window_size, 4096)
    model = dataclasses.replace(config.model, compute_dtype="float32", **as_stored)
    has_float32 = any(files.dtype(name) in ("F32", "F64") for name in files.names)
    exact = config.model.param_dtype != "bfloat16" or not has_float32
    return Reference("transformers", logits, dataclasses.replace(config, model=model), exact)
