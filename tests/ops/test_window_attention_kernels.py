"""Pallas kernels of window attention: numerics (interpreted), selection and TPU compilation."""

import importlib.util
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.attention_chunks import dense, random_chunk
from jax.sharding import PartitionSpec, SingleDeviceSharding

from tttjax.config import MeshConfig
from tttjax.errors import UserError
from tttjax.ops.attention.attend import AttentionMask
from tttjax.ops.window_attention import (
    QKV,
    Tiling,
    window_attention,
    window_attention_jvp,
    window_attention_pair,
    window_attention_unsupported_reason,
)
from tttjax.parallel.mesh import make_mesh
from tttjax.planning.topologies import open_mesh, parse_topology

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]

BLOCKS = Tiling(16, 16)
PAPER_125M = {"queries": 1024, "num_buffered": 8192, "heads": 12, "dim": 64, "dtype": jnp.bfloat16}


random_chunk = partial(random_chunk, dim=4)


def everything(blocked, blocked_jvp, weight, buffer_grads):
    """Value and gradient of a loss, and of a loss of (output, tangent along the chunk).

    buffer_grads: whether the gradients include buffered keys and values.
    """

    def split(x):
        return x._replace(k_buffered=None, v_buffered=None), x[1:3]

    def join(own, buffer):
        return own._replace(k_buffered=buffer[0], v_buffered=buffer[1])

    def first(own, buffer, position):
        return jnp.sum(jnp.sin(blocked(join(own, buffer), position) * weight.q))

    def second(own, buffer, along, position):
        o, o_dot = jax.jvp(lambda own: blocked_jvp(join(own, buffer), position), (own,), (along,))
        return jnp.sum(jnp.cos(o * weight.q) + jnp.sin(o_dot) * weight.k_chunk)

    def derivatives(x, dot, position):
        own, buffer = split(x)
        along, _ = split(dot)
        of_first = jax.value_and_grad(first, argnums=(0, 1) if buffer_grads else 0)
        of_second = jax.value_and_grad(second, argnums=(0, 1, 2))
        return of_first(own, buffer, position), of_second(own, buffer, along, position)

    return jax.jit(derivatives)


CASES = {
    # queries, buffered keys, KV heads, window, block, buffer_grads, positions
    "window, partial tiles": (20, 37, 1, 37, 0, True, (0, 7, 37, 1000)),
    "short window, constant buffer": (48, 64, 1, 17, 0, False, (0, 10, 64)),
    "within blocks of the sequence": (32, 32, 2, 0, 24, False, (0, 5, 48)),
    "no buffer": (20, 0, 2, 9, 0, True, (0,)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_interpreted_kernels_equal_dense_derivatives(case):
    queries, num_buffered, kv_heads, window, block, buffer_grads, positions = case
    attention_mask = AttentionMask(window, block)
    with jax.enable_x64(True):
        check_against_dense(
            (queries, num_buffered), kv_heads, attention_mask, buffer_grads, positions
        )


def check_against_dense(lengths, kv_heads, attention_mask, buffer_grads, positions):
    x, dot = (random_chunk(*lengths, seed, kv_heads=kv_heads) for seed in range(2))
    weight = random_chunk(*lengths, seed=2)
    own = partial(everything, weight=weight, buffer_grads=buffer_grads)
    actual = own(
        lambda x, position: window_attention(*x, position, attention_mask, BLOCKS, "pallas"),
        lambda x, position: window_attention_jvp(*x, position, attention_mask, BLOCKS, "pallas"),
    )
    expected = own(*2 * [lambda x, position: dense(x, position, attention_mask)])
    for position in positions:
        result, true = actual(x, dot, position), expected(x, dot, position)
        jax.tree.map(partial(np.testing.assert_allclose, atol=2e-12, rtol=1e-11), result, true)


def pair_vjp(x, dot, position, bar, *, attention_mask, kernel, tiling=BLOCKS):
    """(o, o_dot) and all cotangents, for the cotangent `bar` of both o and o_dot."""
    pair = partial(
        window_attention_pair,
        position=position,
        attention_mask=attention_mask,
        tiling=tiling,
        kernel=kernel,
    )
    out, back = jax.vjp(pair, x, dot)
    return out, back((bar, bar))


def blocked_vjp(x, position, bar, *, attention_mask, kernel, tiling=BLOCKS):
    def blocked(q, k_chunk, v_chunk):
        own = x._replace(q=q, k_chunk=k_chunk, v_chunk=v_chunk)
        return window_attention(*own, position, attention_mask, tiling, kernel)

    out, back = jax.vjp(blocked, x.q, x.k_chunk, x.v_chunk)
    return out, back(bar)


def test_bfloat16_equals_xla():
    """Sums are in another order, with the same roundings."""
    x, dot, bar = (random_chunk(32, 40, seed, dtype=jnp.bfloat16) for seed in range(3))
    dot = dot._replace(k_buffered=None, v_buffered=None)
    run = partial(pair_vjp, x, dot, 25, bar.q, attention_mask=AttentionMask(40))
    result, expected = (jax.jit(partial(run, kernel=kernel))() for kernel in ("pallas", "xla"))
    for ours, theirs in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == jnp.bfloat16
        ours, theirs = ours.astype(jnp.float32), theirs.astype(jnp.float32)
        assert np.linalg.norm(ours - theirs) < 0.01 * np.linalg.norm(theirs)


def test_vmap_and_heads_sharded_by_the_partitioner():
    x, dot, bar = (random_chunk(16, 32, seed, heads=4, dtype=np.float32) for seed in range(3))
    dot = dot._replace(k_buffered=None, v_buffered=None)
    run = partial(pair_vjp, attention_mask=AttentionMask(32), kernel="pallas")
    plain = jax.jit(run)(x, dot, 20, bar.q)
    mesh = make_mesh(2, 1, 2, devices=jax.devices()[:4])
    of_batch = PartitionSpec("data")

    def on_shard(x, dot, position, bar):
        reason_for = partial(
            window_attention_unsupported_reason, "cpu", x.q.shape, 32, x.q.dtype, kernel="pallas"
        )
        assert reason_for(kv_heads=2) == ""
        assert "1 heads are not a multiple" in reason_for(kv_heads=1)
        return jax.vmap(run, in_axes=(0, 0, None, 0))(x, dot, position, bar)

    sharded = jax.shard_map(
        on_shard,
        mesh=mesh,
        in_specs=(of_batch, of_batch, PartitionSpec(), of_batch),
        out_specs=of_batch,
        axis_names={"data", "fsdp"},
        check_vma=False,
    )
    result = jax.jit(sharded)(x, dot, 20, bar.q)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5), result, plain)


def test_unsupported_meshes():
    reason_for = partial(
        window_attention_unsupported_reason, "tpu", num_buffered=8192, dtype=jnp.bfloat16
    )
    mesh = make_mesh(1, 1, 8)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        assert "cannot shard a kernel" in reason_for(shape=(1024, 12, 64))

    def inside():
        assert "12 heads are not a multiple of 8 devices" in reason_for(shape=(1024, 12, 64))
        assert reason_for(shape=(1024, 16, 64)) == ""
        return jnp.zeros(())

    specs = {"in_specs": (), "out_specs": PartitionSpec()}
    jax.eval_shape(jax.shard_map(inside, mesh=mesh, axis_names={"data"}, check_vma=False, **specs))


@pytest.mark.parametrize(
    ("platform", "shape", "num_buffered", "dtype", "kernel", "reason"),
    [
        ("tpu", (1024, 12, 64), 8192, "bfloat16", "auto", "^$"),
        ("tpu", (16, 12, 128), 8192, "float32", "auto", "^$"),
        ("cuda", (1024, 12, 128), 8192, "float32", "auto", "^$"),
        ("cpu", (1024, 12, 64), 8192, "bfloat16", "auto", "interpreted"),
        ("cpu", (1024, 12, 3), 8192, "float64", "pallas", "^$"),
        ("tpu", (1024, 12, 64), 8192, "bfloat16", "xla", "requested"),
        ("tpu", (1024, 12, 64), 8192, "float64", "pallas", "not float64"),
        ("tpu", (1024, 12, 72), 8192, "float32", "auto", "72 is not a multiple of 16"),
        ("cuda", (1024, 12, 96), 8192, "float32", "auto", "96 is none of 16, 32, 64, 128"),
        ("tpu", (1024, 12, 128), 2**17, "bfloat16", "auto", "MiB of a TPU's VMEM"),
        ("cuda", (64, 12, 64), 128, "bfloat16", "auto", "192 keys are fewer"),
        ("cuda", (64, 12, 64), 128, "bfloat16", "pallas", "^$"),
        ("rocm", (1024, 12, 64), 8192, "bfloat16", "auto", "no kernel for rocm"),
    ],
)
def test_unsupported_reasons(platform, shape, num_buffered, dtype, kernel, reason):
    result = window_attention_unsupported_reason(
        platform, shape, num_buffered, jnp.dtype(dtype), kernel=kernel
    )
    assert re.search(reason, result)


def test_unknown_kernel_is_refused():
    with pytest.raises(UserError, match="'cudnn': choose among auto, xla, pallas"):
        window_attention(*random_chunk(4, 5, dtype=np.float32), 3, AttentionMask(5), kernel="cudnn")


def programs(sharding=None, *, queries, num_buffered, heads, dim, dtype):
    """(function of `kernel`, argument shapes) of the inner step, and of the pair."""
    array = partial(jax.ShapeDtypeStruct, sharding=sharding)
    q, buffered = (array((1, length, heads, dim), dtype) for length in (queries, num_buffered))
    position, x = array((), jnp.int32), QKV(q, buffered, buffered, q, q)
    own = {"attention_mask": AttentionMask(num_buffered), "tiling": Tiling()}
    yield partial(blocked_vjp, **own), (x, position, q)
    dot = x._replace(k_buffered=None, v_buffered=None)
    yield partial(pair_vjp, **own), (x, dot, position, q)


def test_target_platform_selects_the_kernel():
    """Programs are only lowered, so neither accelerator is needed."""
    for program, arguments in programs(**PAPER_125M):
        traced = jax.jit(partial(program, kernel="auto")).trace(*arguments)
        lowered = {
            platform: traced.lower(lowering_platforms=(platform,)).as_text()
            for platform in ("cpu", "tpu", "cuda")
        }
        calls = {
            platform: [text.count(call) for call in ("tpu_custom_call", "triton", "case")]
            for platform, text in lowered.items()
        }
        kernels = 3 + (program.func is pair_vjp)
        assert calls["cpu"][:2] == [0, 0]
        assert calls["tpu"][:2] == [kernels, 0]
        assert calls["cuda"][:2] == [0, kernels]


def test_target_platform_selects_xla_tiling():
    (blocked, arguments), _ = programs(**PAPER_125M | {"heads": 1})
    traced = jax.jit(partial(blocked, kernel="xla")).trace(*arguments)
    loops = {
        platform: traced.lower(lowering_platforms=(platform,)).as_text().count("stablehlo.while")
        for platform in ("cpu", "tpu")
    }
    assert loops["tpu"] < loops["cpu"]  # all queries in one block


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
@pytest.mark.parametrize("chip", ["v5e:2x2", "v5p:2x2x1"])
def test_compiled_for_a_tpu(chip):
    """At the size of the paper's 125M model: no scores in memory, and no copies of keys."""
    device = open_mesh(parse_topology(chip), MeshConfig(data=4)).devices.flat[0]
    for program, arguments in programs(SingleDeviceSharding(device), **PAPER_125M):
        compiled = jax.jit(partial(program, kernel="auto")).lower(*arguments).compile()
        assert compiled.as_text().count('custom_call_target="tpu_custom_call"') >= 3
        assert compiled.memory_analysis().temp_size_in_bytes < 2**20
