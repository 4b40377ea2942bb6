"""Collectives parsed from HLO text: a program by hand, and a compiled loop."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from tttjax.parallel.mesh import make_mesh
from tttjax.planning.collectives import Collectives, collectives
from tttjax.planning.hlo import parse_hlo
from tttjax.planning.hlo_runs import count_runs
from tttjax.planning.primitives import Transfer

# ruff: noqa: E501
TEXT = """\
HloModule jit_step, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%first_piece (p: bf16[2,128]) -> (bf16[2,128], bf16[8,128]) {
  %p = bf16[2,128]{1,0:T(8,128)(2,1)} parameter(0)
  %whole = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %start = (bf16[2,128]{1,0}, bf16[8,128]{1,0}) custom-call(%whole), custom_call_target="AsyncCollectiveStart"
}

%second_piece (q: bf16[2,128]) -> bf16[8,128] {
  %q = bf16[2,128]{1,0} parameter(0)
  ROOT %whole.2 = bf16[8,128]{1,0} all-gather(%q), replica_groups={{0,1,2,3}}, dimensions={0}, frontend_attributes={chain_id="0"}
}

%condition (state: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %state = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%open_condition (state.3: (s32[], f32[8])) -> pred[] {
  %state.3 = (s32[], f32[8]{0}) parameter(0)
  ROOT %flag = pred[] custom-call(%state.3), custom_call_target="decide"
}

%body (state.1: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state.1 = (s32[], f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%state.1), index=1
  %started = (f32[8]{0}, f32[8]{0}) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  ROOT %out = (s32[], f32[8]{0}) tuple(%x, %x)
}

%open_body (state.2: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state.2 = (s32[], f32[8]{0}) parameter(0)
  %x.2 = f32[8]{0} get-tuple-element(%state.2), index=1
  %part = f32[2]{0} reduce-scatter(%x.2), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
  ROOT %out.2 = (s32[], f32[8]{0}) tuple(%x.2, %x.2)
}

ENTRY %main (param: f32[8], small: bf16[2,128]) -> f32[8] {
  %param = f32[8]{0} parameter(0)
  %small = bf16[2,128]{1,0} parameter(1)
  %one = (bf16[2,128]{1,0}, bf16[8,128]{1,0}) fusion(%small), kind=kCustom, calls=%first_piece
  %two = bf16[8,128]{1,0} fusion(%small), kind=kCustom, calls=%second_piece
  %tuple = (s32[], f32[8]{0}) tuple(%param, %param)
  %loop = (s32[], f32[8]{0}) while(%tuple), condition=%condition, body=%body
  %stated = (s32[], f32[8]{0}) while(%tuple), condition=%open_condition, body=%body, backend_config={"known_trip_count":{"n":"7"}}
  %open = (s32[], f32[8]{0}) while(%tuple), condition=%open_condition, body=%open_body
  ROOT %both = (f32[8]{0}, f32[4]{0}) all-reduce(%param, %param), replica_groups={{0,1},{2,3}}, to_apply=%add
}
"""


def collectives_of(text: str) -> Collectives:
    program = parse_hlo(text)
    return collectives(program, count_runs(program))


def test_a_program_by_hand():
    result = collectives_of(TEXT)
    assert set(result.transfers) == {
        Transfer(
            "all-gather", 2 * 8 * 128, group_size=4, times=1.0
        ),  # the second part is the same collective
        Transfer("collective-permute", 32.0, group_size=2, times=12.0),
        Transfer("reduce-scatter", 32.0, group_size=4, times=1.0),
        Transfer("all-reduce", 64.0, group_size=2, times=1.0),
    }
    assert result.unknown_loops == 1


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[4,2]<=[8]", 2),
        ("mesh['data'=4,'fsdp'=2,'tensor'=1] {'data','fsdp'}", 8),
        ("mesh['data'=4,'fsdp'=2] {'data':(2)2}", 2),
    ],
)
def test_replica_groups_have_several_formats(groups, size):
    line = f"  ROOT %r = f32[8]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%a"
    program = f"ENTRY %main (x: f32[8]) -> f32[8] {{\n  %x = f32[8]{{0}} parameter(0)\n{line}\n}}\n"
    assert collectives_of(program).transfers == (
        Transfer("all-reduce", 32.0, group_size=size, times=1.0),
    )


def test_a_compiled_loop():
    mesh = make_mesh(4, 2, 1)

    def shard(x):
        return jax.lax.scan(lambda x, _: (jnp.sin(jax.lax.psum(x, "data")), None), x, length=6)[0]

    mapped = jax.shard_map(
        shard, mesh=mesh, in_specs=P(), out_specs=P(), axis_names={"data"}, check_vma=False
    )
    text = jax.jit(mapped).lower(jnp.ones((16, 3))).compile().as_text()
    assert collectives_of(text).transfers == (
        Transfer("all-reduce", 4.0 * 48, group_size=4, times=6.0),
    )


def test_backend_configs_may_contain_line_breaks():
    kernel = '  %k = f32[8]{0} custom-call(%x), backend_config={"a": {\n"b":"{}"\n}}, metadata={}\n'
    program = (
        "HloModule step\n\nENTRY %main (x: f32[8]) -> f32[8] {\n  %x = f32[8]{0} parameter(0)\n"
        + kernel
        + "  ROOT %sum = f32[8]{0} all-reduce(%k), replica_groups={{0,1}}, to_apply=%add\n}\n"
    )
    (transfer,) = collectives_of(program).transfers
    assert (transfer.kind, transfer.bytes, transfer.group_size) == ("all-reduce", 32, 2)
