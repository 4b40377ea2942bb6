"""Reference cases of the `e2e` family: builds the model, inner loop and optimizer of a case's JSON.

The semantics are those of the official code: `seq_modeling_block` and `train_mode` together
determine a block's attention mask (`_mixers`). An unsupported setting raises UserError;
`unknown_fields` lists fields that are not known at all.
"""

import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tttjax.config import InnerConfig, ModelConfig, OptimConfig
from tttjax.errors import UserError
from tttjax.interop.official.names import TOP_LEVEL_NAMES, suffix_names
from tttjax.models.stacking import path_filter
from tttjax.models.transformer import Transformer, build_model
from tttjax.training.optimizer import make_optimizer, make_schedule
from tttjax.ttt.outer_loss import InnerLoop, inner_lr, make_inner_loop, make_outer_loss
from tttjax.types import Array, Batch, Params

LOCAL_BLOCKS = ("self_attention", "SWAFull")  # no KV cache: every chunk is a separate sequence

# Fields that are used, and fields that cannot change a number.
_USED = {
    "model": (
        "vocab_size output_size hidden_size intermediate_size num_hidden_layers prime suffix_len "
        "num_attention_heads mini_batch_size sliding_window_size rms_norm_eps rope_theta "
        "resid_pdrop embd_pdrop attn_pdrop tie_word_embeddings seq_modeling_block compute_dtype "
        "param_dtype state_dtype qk_norm pre_norm post_norm feed_forward_prime "
        "seq_len initializer_range bos_token_id eos_token_id"
    ),
    "training": (
        "train_mode seq_length spec_inner spec_outer ilr_init ilr_warmup_steps step_index "
        "global_batch_size accum_steps inner_remat_freq batch effective_inner_lr"
    ),
    "inner_optimizer": "type lr clip_gradient momentum",
    "outer_optimizer": (
        "optimizer_type lr init_lr end_lr lr_warmup_steps lr_decay_steps b1 b2 weight_decay "
        "clip_gradient bf16_momentum emb_wd eps eps_root used_in_this_case"
    ),
}


def unknown_fields(case: Mapping[str, Any]) -> list[str]:
    """Unknown settings of a case, as `section.field = value`."""
    return [
        f"{section}.{field} = {value!r}"
        for section, used in _USED.items()
        for field, value in (case.get(section) or {}).items()
        if field not in used.split()
    ]


def _require(section: str, values: Mapping[str, Any], allowed: Mapping[str, tuple]) -> None:
    for field, choices in allowed.items():
        if field in values and values[field] not in choices:
            raise UserError(
                f"unsupported setting: {section}.{field} = {values[field]!r}, not "
                + " or ".join(map(repr, choices))
            )


@dataclass(frozen=True)
class CaseSetup:
    """One setup of a case: a model, an inner loop and its learning rate."""

    model: Transformer
    inner: InnerLoop
    learn: bool
    lr: float
    lr_init: float
    lr_warmup_steps: int
    sequences_per_row: int  # independent sequences in each row of the batch
    dtype: str  # of compute

    def inner_lr(self, step: Array | int) -> Array | float:
        """Inner learning rate at outer step `step`."""
        return inner_lr(step, lr=self.lr, lr_init=self.lr_init, warmup_steps=self.lr_warmup_steps)

    def outer_loss(self, params: Params, batch: Batch, step: Array | int):
        """(loss, ForwardOutput) with the inner learning rate of outer step `step`."""
        sequences = jax.tree.map(
            lambda x: x.reshape(x.shape[0] * self.sequences_per_row, -1), batch
        )
        loss = make_outer_loss(self.model, self.inner, learn=self.learn)
        return loss(params, sequences, self.inner_lr(step))

    def prefix_output(self, params: Params, batch: Batch) -> Array:
        """Hidden states entering the suffix, [B, T, D]."""

        def one(token_T):
            x_TD = self.model.embed(params.slow, token_T)
            return self.model.run_part("prefix", params.slow, None, x_TD)[0]

        return jax.vmap(one)(batch.inputs)


def _mixers(block: str, meta: bool, layers: int, suffix: int, chunk: int) -> tuple[str, ...]:
    if block not in ("SWA", *LOCAL_BLOCKS):
        raise UserError(
            f"unsupported setting: seq_modeling_block {block!r} is none of SWA, "
            + ", ".join(LOCAL_BLOCKS)
        )
    mixer = "full" if block == "self_attention" else "window"
    if not meta or block == "SWA":
        return (mixer,) * layers
    return (mixer,) * (layers - suffix) + (f"local:{chunk}",) * suffix


def _dtype(model: Mapping[str, Any], field: str, x64: bool) -> str:
    """The dtype that a field names; with x64, float32 becomes float64, bfloat16 does not."""
    name = model.get(field, "fp32")
    dtypes = {"fp32": "float64" if x64 else "float32", "bf16": "bfloat16"}
    if x64:
        dtypes["fp64"] = "float64"
    if name not in dtypes:
        hint = " without x64" if name == "fp64" else ""
        raise UserError(f"unsupported setting: model.{field} = {name!r}{hint}")
    return dtypes[name]


def _check_model(model: Mapping[str, Any]) -> None:
    _require(
        "model",
        model,
        {
            "resid_pdrop": (0, None),
            "embd_pdrop": (0, None),
            "attn_pdrop": (0, None),
            "feed_forward_prime": ("swiglu", None),
        },
    )
    if not model["tie_word_embeddings"]:
        _require("model", model, {"output_size": (model["vocab_size"],)})


def make_case_setup(
    model: Mapping[str, Any],
    training: Mapping[str, Any],
    inner_optimizer: Mapping[str, Any] | None,
    x64: bool,
) -> CaseSetup:
    """The setup that a case's `model`, `training` and `inner_optimizer` describe.

    x64: compute in float64 what the case computed in float32.
    Raises UserError for unsupported settings.
    """
    _check_model(model)
    _require("training", training, {"train_mode": ("meta", "pretrain")})
    meta = training["train_mode"] == "meta"
    block = model["seq_modeling_block"]
    length, chunk = training["seq_length"], model["mini_batch_size"]
    if length % chunk:
        raise UserError(f"mini_batch_size {chunk} does not divide seq_length {length}")
    suffix = model["suffix_len"]
    window = length if block == "self_attention" else model["sliding_window_size"]
    optimizer = inner_optimizer or {"type": "sgd", "lr": 0.0, "clip_gradient": 0.0}
    _require("inner_optimizer", optimizer, {"type": ("sgd",)})
    inner = InnerConfig(
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
        fast_dtype=_dtype(model, "state_dtype", x64),
    )
    transformer = build_model(
        ModelConfig(
            vocab_size=model["vocab_size"],
            embed_dim=model["hidden_size"],
            num_layers=model["num_hidden_layers"],
            num_heads=model["num_attention_heads"],
            head_dim=0,
            mlp_dim=model["intermediate_size"],
            mixers=_mixers(block, meta, model["num_hidden_layers"], suffix, chunk),
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
            param_dtype=_dtype(model, "param_dtype", x64),
            compute_dtype=_dtype(model, "compute_dtype", x64),
            remat="none",
        ),
        inner,
    )
    if meta:
        fast_patterns = _inner_paths(transformer, training["spec_inner"])
        transformer = replace(transformer, fast_patterns=fast_patterns)
    return CaseSetup(
        model=transformer,
        inner=make_inner_loop(inner),
        learn=meta,
        lr=optimizer["lr"] or 0.0,
        lr_init=training.get("ilr_init", 0.0),
        lr_warmup_steps=training.get("ilr_warmup_steps", 0),
        sequences_per_row=length // chunk if not meta and block in LOCAL_BLOCKS else 1,
        dtype=_dtype(model, "compute_dtype", x64),
    )


def _inner_paths(model: Transformer, specs: str | list[str]) -> tuple[str, ...]:
    """Paths of the weights that a case's `spec_inner` selects by official name."""
    specs = [specs] if isinstance(specs, str) else specs
    names = suffix_names(model)
    for spec in specs:
        matches = path_filter([spec.replace(".", "/")])
        if matches(TOP_LEVEL_NAMES["embedding"].replace(".", "/")):
            raise UserError(
                f"unsupported setting: spec_inner {spec!r} makes the embedding an inner weight"
            )
        if not any(matches(name.replace(".", "/")) for name in names.values()):
            raise UserError(f"spec_inner {spec!r} matches no weight of the suffix")
    matches = path_filter([spec.replace(".", "/") for spec in specs])
    return tuple(sorted(p for p, name in names.items() if matches(name.replace(".", "/"))))


def case_setups(case: Mapping[str, Any], x64: bool) -> dict[str, CaseSetup]:
    """Every setup of a case by the prefix of its arrays ("" for the case itself)."""
    model, training = case["model"], case["training"]
    if "variants" not in case:
        setups = {"": make_case_setup(model, training, case.get("inner_optimizer"), x64)}
        for name in case.get("alternates", {}):
            match = re.fullmatch(r"alt_(\w+)_chunk(\d+)", name)
            if not match:
                raise UserError(f"alternate {name!r} is not named alt_<block>_chunk<size>")
            changed = {
                "seq_modeling_block": match[1],
                "mini_batch_size": int(match[2]),
            }
            setups[f"{name}/"] = make_case_setup(
                {**model, **changed}, training, case.get("inner_optimizer"), x64
            )
        return setups
    setups = {}
    for name, variant in case["variants"].items():
        optimizer = {
            "type": "sgd",
            "lr": variant["inner_lr"],
            "clip_gradient": variant["inner_clip"],
            "momentum": variant.get("inner_momentum"),
        }
        setups[f"{name}/"] = make_case_setup(
            {**model, **variant}, {**training, **variant}, optimizer, x64
        )
    return setups


def outer_optimizer(
    case: Mapping[str, Any],
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The outer optimizer of a case, and its learning rate at update 0, 1, ...

    Raises UserError for unsupported settings.
    """
    fields = case["outer_optimizer"]
    _require(
        "outer_optimizer",
        fields,
        {"optimizer_type": ("adamw",), "bf16_momentum": (False, None), "eps_root": (0, None)},
    )
    _require("training", case["training"], {"spec_outer": (["**"], "**", None)})
    cfg = OptimConfig(
        peak_lr=fields["lr"],
        init_lr=fields["init_lr"] if fields["lr"] else 0.0,
        end_lr=fields["end_lr"] if fields["lr"] else 0.0,
        warmup_steps=fields["lr_warmup_steps"],
        decay_steps=fields["lr_decay_steps"],
        b1=fields["b1"],
        b2=fields["b2"],
        eps=fields.get("eps", 1e-8),
        weight_decay=fields["weight_decay"],
        decay_embeddings=fields["emb_wd"],
        clip=fields["clip_gradient"] or 0.0,
    )
    optimizer = make_optimizer(cfg, cfg.decay_steps)
    if fields["clip_gradient"] == 0:  # the official clip of 0 makes every gradient 0
        optimizer = optax.chain(optax.scale(0.0), optimizer)
    return optimizer, make_schedule(cfg, cfg.decay_steps)


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz file. Raises UserError if it is missing or damaged."""
    try:
        with path.open("rb") as file, np.load(file) as stored:
            return dict(stored)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; it holds the arrays of the case") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged ({error}); copy it again") from error


def load_batch(arrays: Mapping[str, np.ndarray], prefix: str = "batch/") -> Batch:
    """The batch (or the stack of batches) stored under a prefix."""
    names = ("input_ids", "target_tokens", "loss_masks")
    missing = [prefix + name for name in names if prefix + name not in arrays]
    if missing:
        raise UserError(f"the case has no array {', '.join(missing)}")
    inputs, targets, mask = (jnp.asarray(arrays[prefix + name]) for name in names)
    return Batch(inputs=inputs, targets=targets, mask=mask.astype(bool))


def select_prefix(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays whose key starts with `prefix`, without the prefix."""
    return {key[len(prefix) :]: arrays[key] for key in arrays if key.startswith(prefix)}
