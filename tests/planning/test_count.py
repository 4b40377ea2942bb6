"""FLOPs, bytes and collectives of a traced program against counts by hand."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from tttjax.ops.attention.attend import AttentionMask
from tttjax.ops.attention.library import attend_sequence
from tttjax.ops.window_attention import window_attention
from tttjax.parallel.mesh import make_mesh
from tttjax.planning.count import count
from tttjax.planning.primitives import Count, Transfer

X = jnp.ones((3, 5))
W = jnp.ones((5, 5))
ONCE = 2 * 3 * 5 * 5


def flops(function, *args) -> float:
    return count(jax.make_jaxpr(function)(*args)).flops


def loop(x, body, length):
    return jax.lax.scan(lambda x, _: (body(x), None), x, None, length=length)[0]


def test_a_product_and_its_bytes():
    assert count(jax.make_jaxpr(jnp.dot)(X, W)) == Count(
        flops=ONCE, product_bytes=4 * (15 + 25 + 15)
    )


def test_a_product_of_several_dimensions():
    x, y = jnp.ones((2, 3, 4, 5)), jnp.ones((2, 4, 5, 7))
    assert flops(partial(jnp.einsum, "bikl,bklj->bij"), x, y) == 2 * (2 * 3 * 7) * (4 * 5)


def test_convolution_counts_taps_and_features_of_its_group():
    x, kernel = jnp.ones((2, 10, 6)), jnp.ones((4, 3, 8))  # 2 groups of 3 to 4 features

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            *(x, kernel, (1,), "VALID"),
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=2,
        )

    assert flops(convolve, x, kernel) == 2 * (2 * 7 * 8) * (4 * 3)


def test_nested_scans_count_the_product_of_lengths():
    assert flops(lambda x: loop(x, lambda x: x @ W, 7), X) == 7 * ONCE
    assert flops(lambda x: loop(x, lambda x: loop(x, lambda x: x @ W, 4), 7), X) == 28 * ONCE


def test_recomputation_shows():
    def loss(x, w, body):
        return jnp.sum(body(body(x, w), w))

    def body(x, w):
        return jnp.sin(x @ w)

    plain = flops(jax.grad(partial(loss, body=body), argnums=1), X, W)
    again = flops(jax.grad(partial(loss, body=jax.checkpoint(body)), argnums=1), X, W)
    assert plain == (2 + 3) * ONCE  # forward twice; two weights' gradients, one input's
    assert plain < again <= plain + 2 * ONCE


def test_custom_derivatives_are_counted():
    @jax.custom_vjp
    def double(x):
        return x @ W

    double.defvjp(lambda x: (x @ W, None), lambda _, g: (g @ W @ W @ W,))
    assert flops(double, X) == ONCE
    assert flops(jax.grad(lambda x: jnp.sum(double(x))), X) == 4 * ONCE

    @jax.custom_jvp
    def half(x):
        return x @ W

    half.defjvp(lambda primals, tangents: (half(primals[0]), tangents[0] @ W @ W))
    assert flops(half, X) == ONCE
    assert flops(lambda x: jax.jvp(half, (x,), (x,)), X) == 3 * ONCE


def test_the_most_expensive_branch_counts():
    branches = [lambda x: x, lambda x: x @ W, lambda x: x @ W @ W]
    assert flops(lambda i, x: jax.lax.switch(i, branches, x), 0, X) == 2 * ONCE


def test_while_counts_its_trip_count_or_is_reported():
    def rounds(limit, x):
        return jax.lax.while_loop(lambda c: c[0] < limit, lambda c: (c[0] + 1, c[1] @ W), (0, x))

    assert count(jax.make_jaxpr(partial(rounds, 6))(X)) == count(
        jax.make_jaxpr(jnp.dot)(X, W)
    ).times(6)
    unknown = count(jax.make_jaxpr(rounds)(6, X))
    assert (unknown.flops, unknown.unknown_loops) == (ONCE, 1)


def test_while_may_update_its_counter_in_any_way():
    def rounds(x):
        return jax.lax.while_loop(lambda c: c[0] < 8, lambda c: (c[0] * 2, c[1] @ W), (1, x))

    assert flops(rounds, X) == 3 * ONCE  # 1, 2, 4


def test_shard_map_counts_every_device_and_its_collectives():
    mesh = make_mesh(2, 2, 2)

    def shard(x, w):
        w = jax.lax.all_gather(w, "fsdp", axis=0, tiled=True)
        x = loop(x, lambda x: jax.lax.psum(x @ w, ("data", "fsdp")), 3)
        return jax.lax.psum_scatter(x, "fsdp", scatter_dimension=1, tiled=True)

    mapped = jax.shard_map(
        *(shard,),
        mesh=mesh,
        in_specs=(P("data"), P("fsdp")),
        out_specs=P("data", "fsdp"),
        axis_names={"data", "fsdp"},
        check_vma=False,
    )
    result = count(jax.make_jaxpr(mapped)(jnp.ones((4, 6)), jnp.ones((6, 6))))
    assert result.flops == 4 * 3 * (2 * 2 * 6 * 6)  # 4 manual devices, 3 steps
    assert result.transfers == (
        Transfer("all-gather", 4 * 36, group_size=2),
        Transfer("all-reduce", 4 * 12, group_size=4, times=3.0),
        Transfer("reduce-scatter", 4 * 12, group_size=2),
    )


def test_a_kernel_counts_every_cell_of_its_grid():
    pallas = pytest.importorskip("jax.experimental.pallas")

    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...] @ x_ref[...]

    def call(x):
        return pallas.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct((32, 8), jnp.float32),
            grid=(4,),
            in_specs=[pallas.BlockSpec((8, 8), lambda i: (i, 0))],
            out_specs=pallas.BlockSpec((8, 8), lambda i: (i, 0)),
            interpret=True,
        )(x)

    assert flops(call, jnp.ones((32, 8))) == 4 * 2 * 8**3


def test_loop_bounds_computed_from_a_counter_are_folded():
    """Tiles of causal attention: chunk i of a scan reads tiles 0 .. i // 2."""

    def chunk(x, i):
        stop = jnp.minimum(i // 2 + 1, 3)
        return jax.lax.fori_loop(0, stop, lambda _, x: x @ W, x), None

    def chunks(x):
        return jax.lax.scan(chunk, x, jnp.arange(8))[0]

    result = count(jax.make_jaxpr(chunks)(X))
    assert (result.flops, result.unknown_loops) == ((1 + 1 + 2 + 2 + 3 + 3 + 3 + 3) * ONCE, 0)

    def with_carry(x):
        def step(carry, _):
            x, i = carry
            return (chunk(x, i)[0], i + 2), None

        return jax.lax.scan(step, (x, 0), None, length=4)[0][0]

    assert flops(with_carry, X) == (1 + 2 + 3 + 3) * ONCE


def test_a_conditional_on_a_counter_counts_its_branch():
    def step(x, i):
        return jax.lax.cond(i > 1, lambda x: x @ W, lambda x: x, x), None

    assert flops(lambda x: jax.lax.scan(step, x, jnp.arange(5))[0], X) == 3 * ONCE


def test_loops_inside_platform_dependent_are_counted():
    """Also where differentiation splits it and passes the loop bounds on."""
    shapes = [(1024, 12, 64), *[(2048, 12, 64)] * 2, *[(1024, 12, 64)] * 2]
    chunk = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]

    def gradients(*chunk):
        def step(_, i):
            def loss(q):
                out = window_attention(q, *chunk[1:], 1024 * i, AttentionMask(window=2048))
                return jnp.sum(out.astype(jnp.float32))

            return None, jax.grad(loss)(chunk[0])

        return jax.lax.scan(step, None, jnp.arange(3))[1]

    result = count(jax.make_jaxpr(gradients)(*chunk))
    assert result.unknown_loops == 0
    # Two products forward, five backward, for at least the visible pairs.
    visible_pairs = sum(min(1024 * i + t + 1, 2048) for i in range(3) for t in range(1024))
    assert result.flops > 2 * 7 * visible_pairs * 12 * 64


@pytest.mark.parametrize(
    ("window", "pairs"), [(0, 256 * 257 / 2), (130, 130 * 131 / 2 + 126 * 130)]
)
def test_attention_by_cudnn_counts_its_visible_pairs(monkeypatch, window, pairs):
    """Two products forward, again in recomputation, and five backward."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    q = jax.ShapeDtypeStruct((2, 256, 4, 8), jnp.bfloat16)

    def attention(q):
        attend = partial(attend_sequence, attention_mask=AttentionMask(window), query_block=64)
        return jax.vmap(attend)(q, q, q)

    def loss(q, body=attention):
        return jnp.sum(body(q).astype(jnp.float32))

    def counted(function, platform="cuda"):
        return count(jax.make_jaxpr(function)(q), platform).flops

    one = 2 * 2 * 4 * 8 * pairs  # a product over all pairs of two sequences and four heads
    again = jax.checkpoint(attention, prevent_cse=False)
    assert counted(attention) == 2 * one
    assert counted(jax.grad(loss)) == 7 * one
    assert counted(jax.grad(partial(loss, body=again))) == 9 * one
    assert counted(attention, "cpu") > 2 * one  # in XLA, by whole blocks
