"""Library attention kernels: numerics, supported inputs and platform selection."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.small import random_batch, small_config, worst
from jax.sharding import PartitionSpec as P

from tttjax.models.transformer import build_model
from tttjax.ops.attention import library
from tttjax.ops.attention.attend import AttentionMask, attend, mask_fn
from tttjax.ops.attention.library import attend_sequence, unsupported_reason
from tttjax.ops.attention.splash import _WindowMask, choose_tile, splash_attention
from tttjax.parallel.mesh import make_mesh, manual_axes
from tttjax.planning.count import count
from tttjax.ttt.outer_loss import make_inner_loop, make_outer_loss

pytestmark = [pytest.mark.slow, pytest.mark.exhaustive]

BF16 = jax.ShapeDtypeStruct((256, 2, 8), jnp.bfloat16)
QUERIES = jax.ShapeDtypeStruct((256, 4, 8), jnp.bfloat16)  # two query heads per KV head of BF16


@pytest.fixture
def everywhere(monkeypatch):
    """Simulates a machine that can compile for every platform."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(library, "unsupported_reason_on_backend", lambda *_: "")


def lowered(platform: str, kernel: str = "auto", window: int = 130) -> str:
    """StableHLO of the gradient of a rematerialized layer in a loop, over a batch."""

    def loss(q, k, v):
        @partial(jax.checkpoint, prevent_cse=False)
        def layer(x, _):
            attention = partial(
                attend_sequence,
                attention_mask=AttentionMask(window=window),
                query_block=64,
                kernel=kernel,
            )
            return x + jax.vmap(attention)(x, k, v), None

        return jnp.sum(jax.lax.scan(layer, q, None, length=2)[0].astype(jnp.float32))

    q, k = (jax.ShapeDtypeStruct((2, *x.shape), x.dtype) for x in (QUERIES, BF16))
    program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, k)
    return program.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    ("length", "window", "kv_heads"), [(200, 0, 4), (300, 130, 2), (129, 1, 1)]
)
def test_splash_equals_dense_attention(length, window, kv_heads):
    rng = np.random.default_rng(length)
    heads = 4, kv_heads, kv_heads, 4
    q, k, v, weight = (rng.normal(size=(length, h, 8)).astype(np.float32) for h in heads)
    position = jnp.arange(length)
    expected_mask = mask_fn(position, position, AttentionMask(window=window))

    def value_and_gradient(attention):
        def loss(q, k, v):
            out = attention(q, k, v)
            return jnp.sum(out * weight), out

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    (_, out), grads = value_and_gradient(partial(splash_attention, window=window, interpret=True))
    (_, expected), expected_grads = value_and_gradient(lambda *qkv: attend(*qkv, expected_mask))
    assert worst(out, expected) < 2e-6
    assert worst(grads, expected_grads) < 1e-5


@pytest.mark.parametrize("window", [0, 1, 127, 128, 129, 300, 511])
def test_mask_tiles_equal_the_dense_mask(window):
    position = np.arange(512)
    expected_mask = np.asarray(mask_fn(position, position, AttentionMask(window=window)))
    mask = _WindowMask(512, window)
    for row in range(0, 512, 128):
        for col in range(0, 512, 128):
            index = slice(row, row + 128), slice(col, col + 128)
            assert (mask[index] == expected_mask[index]).all()


def test_tile_size_limits_padding():
    assert [choose_tile(n, 0) for n in (129, 600, 1100, 2048, 8192, 8320)] == [128] * 3 + [512] * 3
    assert [choose_tile(8192, window) for window in (1, 128, 300, 512, 4096)] == [
        *(128, 128, 256, 512, 512)
    ]


@pytest.mark.parametrize(
    ("platform", "shape", "dtype", "attention_mask", "expected"),
    [
        ("cuda", (128, 2, 64), "bfloat16", AttentionMask(), ""),
        ("cuda", (128, 2, 64), "float16", AttentionMask(window=3), ""),
        ("tpu", (128, 2, 64), "bfloat16", AttentionMask(window=3), ""),
        ("cpu", (128, 2, 64), "bfloat16", AttentionMask(), "there is no library kernel for cpu"),
        (
            "cuda",
            (128, 2, 64),
            "float32",
            AttentionMask(),
            "bfloat16 or float16, not float32",
        ),
        ("tpu", (128, 2, 64), "float16", AttentionMask(), "bfloat16, not float16"),
        (
            "tpu",
            (128, 2, 64),
            "bfloat16",
            AttentionMask(4, 4),
            "splash attention does not support",
        ),
        ("cuda", (128, 2, 60), "bfloat16", AttentionMask(), "a multiple of 8, not 60"),
        ("tpu", (128, 2, 264), "bfloat16", AttentionMask(), "head sizes up to 256"),
        ("tpu", (127, 2, 64), "bfloat16", AttentionMask(), "at least 128 tokens, not 127"),
    ],
)
def test_unsupported_reasons(platform, shape, dtype, attention_mask, expected):
    reason = unsupported_reason(platform, jax.ShapeDtypeStruct(shape, dtype), attention_mask)
    assert expected in reason
    assert bool(reason) == bool(expected)


def test_missing_cudnn_is_reported():
    assert library.unsupported_reason_on_backend("cuda", BF16) == "cuDNN is not detected"


def test_target_platform_selects_the_kernel(everywhere):
    tpu, cuda, cpu = (lowered(platform) for platform in ("tpu", "cuda", "cpu"))
    assert "tpu_custom_call" in tpu
    assert "__cudnn$fmha" in cuda
    assert "sliding_window_length" in cuda
    assert "tpu_custom_call" not in cuda + cpu
    assert "__cudnn$fmha" not in tpu + cpu
    assert "custom_call" not in lowered("tpu", kernel="xla")


def test_window_of_the_full_sequence_is_dropped(everywhere):
    assert lowered("cuda", window=256) == lowered("cuda", window=0)


@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 1, 2), (2, 1, 2)])
def test_mesh_shards_the_kernel_over_heads(everywhere, shape):
    mesh = make_mesh(*shape, devices=jax.devices()[: np.prod(shape)])
    batch = P("data") if shape[0] > 1 else P()

    def gradient(q):
        def loss(q):
            return jnp.sum(jax.vmap(lambda q: attend_sequence(q, q, q, AttentionMask(), 64))(q))

        return jax.grad(loss)(q)

    sharded = jax.shard_map(
        gradient,
        mesh=mesh,
        in_specs=batch,
        out_specs=batch,
        axis_names=manual_axes(mesh),
        check_vma=False,
    )
    q = jax.ShapeDtypeStruct((2, *BF16.shape), BF16.dtype)
    text = jax.jit(sharded).trace(q).lower(lowering_platforms=("tpu",)).as_text()
    heads = BF16.shape[1] // shape[2]
    assert f"tensor<{2 // shape[0]}x{heads}x256x8xbf16>" in text
    assert "tpu_custom_call" in text


def test_auto_mesh_falls_back_to_xla(everywhere):
    mesh = jax.make_mesh((2,), ("tensor",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        assert "tpu_custom_call" not in lowered("tpu")


def test_flops_equal_those_of_xla(everywhere):
    """Library kernels report no FLOPs; covers forward, backward, and a loop."""

    def flops(kernel):
        def loss(q, k, v):
            def layer(x, _):
                attention = partial(
                    attend_sequence,
                    attention_mask=AttentionMask(window=30),
                    query_block=64,
                    kernel=kernel,
                )
                return x + jax.vmap(attention)(x, k, v), None

            layer = jax.checkpoint(layer, prevent_cse=False)
            return jnp.sum(jax.lax.scan(layer, q, None, length=3)[0].astype(jnp.float32))

        q, k = (jax.ShapeDtypeStruct((2, *x.shape), x.dtype) for x in (QUERIES, BF16))
        program = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(q, k, k)
        result = count(program)
        assert ("platform_index" in str(program)) == (kernel == "auto")
        assert result.unknown_loops == 0
        return result.flops

    assert flops("auto") == flops("xla") > 0


@pytest.mark.parametrize(
    "inner",
    [
        {"form": "fast"},
        {"form": "reference"},
        {"form": "fast", "fast_paths": ("suffix/**/mixer/wq",)},
        {"form": "reference", "fast_paths": ("suffix/**/mixer/wq",)},
    ],
)
def test_training_differentiates_the_kernel_once(monkeypatch, inner):
    """Full-sequence attention needs only a first derivative, in every form of training."""
    used = []

    @partial(jax.custom_vjp, nondiff_argnums=(3,))
    def once(q, k, v, window):
        return q

    def forward(q, k, v, window):
        used.append(window)
        return q, None

    once.defvjp(forward, lambda window, _, bar: (bar, bar, bar))
    monkeypatch.setattr(library, "IMPLEMENTATIONS", {"cpu": once})
    monkeypatch.setattr(
        library, "unsupported_reason", lambda p, q, attention_mask: "local" * attention_mask.block
    )
    monkeypatch.setattr(library, "unsupported_reason_on_backend", lambda *_: "")
    layers = {"num_layers": 3, "mixers": ("window", "full", "local:4")}
    config = small_config(model={**layers, "remat": "block"}, inner=inner)
    model = build_model(config.model, config.inner)
    loss = make_outer_loss(model, make_inner_loop(config.inner), learn=True)
    gradient = jax.grad(loss, has_aux=True)
    jax.eval_shape(gradient, model.abstract_params(), random_batch(config), 1.0)
    assert set(used) == {5, 0}
