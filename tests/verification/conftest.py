"""A tiny reference case that this package computes itself.

It tests `tttjax verify` without the reference folder: what is compared, and that wrong numbers
fail. `test_reference.py` tests the numbers.
"""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tttjax.interop.official.names import to_official
from tttjax.verification import golden

CASE = {
    "case": "tiny",
    "model": {
        "vocab_size": 13,
        "output_size": 13,
        "hidden_size": 8,
        "intermediate_size": 6,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "mini_batch_size": 4,
        "sliding_window_size": 6,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.3,
        "tie_word_embeddings": True,
        "seq_modeling_block": "SWA",
        "rope_theta": 100.0,
        "compute_dtype": "fp32",
        "param_dtype": "fp32",
        "state_dtype": "fp32",
        "suffix_len": 1,
        "prime": True,
        "qk_norm": True,
        "pre_norm": True,
        "post_norm": True,
        "feed_forward_prime": "swiglu",
    },
    "training": {
        "train_mode": "meta",
        "seq_length": 8,
        "spec_inner": ["language_model.**.suffix_blocks.feed_forward_prime.**"],
        "spec_outer": ["**"],
        "ilr_init": 0.1,
        "ilr_warmup_steps": 4,
    },
    "inner_optimizer": {"type": "sgd", "lr": 1.0, "clip_gradient": 0.5, "momentum": None},
    "outer_optimizer": {
        "optimizer_type": "adamw",
        "lr": 0.01,
        "init_lr": 0.001,
        "end_lr": 1e-5,
        "lr_warmup_steps": 1,
        "lr_decay_steps": 6,
        "b1": 0.9,
        "b2": 0.95,
        "weight_decay": 0.1,
        "clip_gradient": 1.0,
        "bf16_momentum": False,
        "emb_wd": True,
        "eps": 1e-8,
        "eps_root": 0.0,
    },
    "step_index": 1,
}


def compute(case):
    """The arrays of a case: losses, gradient, and one optimizer step."""
    (setup,) = golden.case_setups(case, x64=False).values()
    rng = np.random.default_rng(0)
    tokens = rng.integers(13, size=(1, 2, 9))
    batch = {"input_ids": tokens[..., :-1], "target_tokens": tokens[..., 1:]}
    batch["loss_masks"] = batch["target_tokens"] != 0
    arrays = {f"traj/{name}": x for name, x in batch.items()}
    arrays |= {f"batch/{name}": x[0] for name, x in batch.items()}
    params = setup.model.init(jax.random.key(0))
    loss = jax.jit(jax.value_and_grad(setup.outer_loss, has_aux=True))
    (value, output), grads = loss(params, golden.load_batch(arrays), jnp.asarray(1))
    optimizer, schedule = golden.outer_optimizer(case)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    final = to_official(optax.apply_updates(params, updates), setup.model)
    arrays |= {
        "loss": value,
        "chunk_loss": output.chunk_loss_N,
        "token_nll": output.token_nll_T,
        "inner_grad_norm": output.grad_norm_N,
        "traj/loss": value[None],
        "traj/lr": np.asarray([schedule(0)]),
        "traj/step_index": np.asarray([1]),
    }
    for name, tree in (("params", params), ("grads", grads)):
        arrays |= {f"{name}/{k}": x for k, x in to_official(tree, setup.model).items()}
    return {k: np.asarray(x) for k, x in {**arrays, **add_prefix("final_params", final)}.items()}


def add_prefix(prefix, arrays):
    return {f"{prefix}/{name}": x for name, x in arrays.items()}


@pytest.fixture(scope="session")
def tiny_arrays():
    return compute(CASE)


@pytest.fixture
def write_case(tmp_path, tiny_arrays):
    """write_case(change_json, change_arrays) -> folder with the case, which both modify in place.

    Omits the slow parts, optimizer steps and gradient, unless `everything`.
    """

    def write(change_json=None, change_arrays=None, everything=False):
        case, arrays = copy.deepcopy(CASE), dict(tiny_arrays)
        if not everything:
            heavy = ("grads/", "traj/", "final_params/")
            arrays = {k: x for k, x in arrays.items() if not k.startswith(heavy)}
        arrays = {k: np.array(x) for k, x in arrays.items()}
        if change_json:
            change_json(case)
        if change_arrays:
            change_arrays(arrays)
        (tmp_path / "tiny.json").write_text(json.dumps(case))
        np.savez(tmp_path / "tiny.npz", **arrays)
        return tmp_path

    return write
