"""Reference cases of the `e2e` family: a case's JSON turned into a model and its two loops.

The semantics are those of the official code: which positions a block sees in which mode is decided
by `seq_modeling_block` and `train_mode` together (`_mixers`).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from tttjax.errors import UserError
from tttjax.interop import official
from tttjax.meta import InnerLoop, inner_lr, make_inner_loop, make_outer_loss
from tttjax.models import Transformer, build_model, path_filter
from tttjax.types import Array, Batch, Params

LOCAL_BLOCKS = ("self_attention", "SWAFull")  # no cache: a chunk is a sequence of its own


@dataclass(frozen=True)
class Setting:
    """One way to read the case's batch: a model, an inner loop and its learning rate."""

    model: Transformer
    inner: InnerLoop
    learn: bool
    lr: float
    lr_init: float
    lr_warmup_steps: int
    pieces: int  # independent sequences that each row of the batch is cut into

    def outer_loss(self, params: Params, batch: Batch, step: Array | int):
        """(loss, Reading) with the inner learning rate of outer step `step`."""
        lr = inner_lr(step, lr=self.lr, lr_init=self.lr_init, warmup_steps=self.lr_warmup_steps)
        cut = jax.tree.map(lambda x: x.reshape(x.shape[0] * self.pieces, -1), batch)
        return make_outer_loss(self.model, self.inner, learn=self.learn)(params, cut, lr)


def _mixers(block: str, meta: bool, layers: int, suffix: int) -> tuple[str, ...]:
    if block not in ("SWA", *LOCAL_BLOCKS):
        raise UserError(f"seq_modeling_block {block!r} is none of SWA, {', '.join(LOCAL_BLOCKS)}")
    whole = "full" if block == "self_attention" else "window"
    if not meta or block == "SWA":
        return (whole,) * layers
    return (whole,) * (layers - suffix) + ("local",) * suffix


def make_setting(
    model: Mapping[str, Any],
    training: Mapping[str, Any],
    inner_optimizer: Mapping[str, Any] | None,
    dtype: str,
) -> Setting:
    """The setting that a case's `model`, `training` and `inner_optimizer` describe.

    dtype: of parameters, compute and fast weights ("float32" or "float64").
    """
    meta = training["train_mode"] == "meta"
    block = model["seq_modeling_block"]
    length, chunk = training["seq_length"], model["mini_batch_size"]
    suffix = model["suffix_len"]
    window = length if block == "self_attention" else model["sliding_window_size"]
    optimizer = inner_optimizer or {"type": "sgd", "lr": 0.0, "clip_gradient": 0.0}
    if optimizer["type"] != "sgd":
        raise UserError(f"inner optimizer {optimizer['type']!r} is not sgd")
    inner = SimpleNamespace(
        chunk_size=chunk,
        rule="momentum" if optimizer.get("momentum") else "sgd",
        clip=optimizer["clip_gradient"] or 0.0,
        momentum=optimizer.get("momentum") or 0.0,
        b1=0.0,
        b2=0.0,
        eps=0.0,
        fast_paths=(),
        meta_gradient="exact",
        truncate_chunks=0,
        remat=True,
        fast_dtype=dtype,
    )
    transformer = build_model(
        SimpleNamespace(
            vocab_size=model["vocab_size"],
            embed_dim=model["hidden_size"],
            num_layers=model["num_hidden_layers"],
            num_heads=model["num_attention_heads"],
            head_dim=0,
            mlp_dim=model["intermediate_size"],
            mixers=_mixers(block, meta, model["num_hidden_layers"], suffix),
            window_size=window,
            suffix_layers=suffix,
            fast_mlp=bool(model["prime"]) and suffix > 0,
            tie_embeddings=model["tie_word_embeddings"],
            rope_theta=model["rope_theta"],
            norm_eps=model["rms_norm_eps"],
            init_std=model["initializer_range"],
            qk_norm=model["qk_norm"],
            pre_norm=model["pre_norm"],
            post_norm=model["post_norm"],
            param_dtype=dtype,
            compute_dtype=dtype,
            remat="none",
        ),
        inner,
    )
    if meta:
        specs = training["spec_inner"]
        specs = [specs] if isinstance(specs, str) else specs
        matches = path_filter([spec.replace(".", "/") for spec in specs])
        chosen = [
            path
            for path, name in official.suffix_names(transformer).items()
            if matches(name.replace(".", "/"))
        ]
        transformer = replace(transformer, fast_patterns=tuple(sorted(chosen)))
    return Setting(
        model=transformer,
        inner=make_inner_loop(inner),
        learn=meta,
        lr=optimizer["lr"] or 0.0,
        lr_init=training.get("ilr_init", 0.0),
        lr_warmup_steps=training.get("ilr_warmup_steps", 0),
        pieces=length // chunk if not meta and block in LOCAL_BLOCKS else 1,
    )


def variants(case: Mapping[str, Any], dtype: str) -> dict[str, Setting]:
    """Every setting of a case by the prefix of its arrays ("" for the case itself)."""
    model, training = case["model"], case["training"]
    if "variants" not in case:
        found = {"": make_setting(model, training, case.get("inner_optimizer"), dtype)}
        for name in case.get("alternates", {}):
            match = re.fullmatch(r"alt_(\w+)_chunk(\d+)", name)
            if not match:
                raise UserError(f"alternate {name!r} is not named alt_<block>_chunk<size>")
            changed = {
                "seq_modeling_block": match[1],
                "mini_batch_size": int(match[2]),
            }
            found[f"{name}/"] = make_setting(
                {**model, **changed}, training, case.get("inner_optimizer"), dtype
            )
        return found
    found = {}
    for name, variant in case["variants"].items():
        optimizer = {
            "type": "sgd",
            "lr": variant["inner_lr"],
            "clip_gradient": variant["inner_clip"],
            "momentum": variant.get("inner_momentum"),
        }
        found[f"{name}/"] = make_setting(
            {**model, **variant}, {**training, **variant}, optimizer, dtype
        )
    return found


def load_batch(arrays: Mapping[str, np.ndarray], prefix: str = "batch/") -> Batch:
    """The batch (or the stack of batches) stored under a prefix."""
    return Batch(
        inputs=arrays[prefix + "input_ids"],
        targets=arrays[prefix + "target_tokens"],
        mask=arrays[prefix + "loss_masks"],
    )


def under(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays whose key starts with `prefix`, by the rest of their key."""
    return {key[len(prefix) :]: arrays[key] for key in arrays if key.startswith(prefix)}
