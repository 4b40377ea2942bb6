"""Launches of compiled programs on GPUs and their rooflines, parsed from HLO text."""

import pytest

from tttjax.planning.hlo import parse_hlo
from tttjax.planning.hlo_runs import count_runs
from tttjax.planning.kernels import LAUNCH_SECONDS, by_operation, count_launches, kernels, roofline
from tttjax.planning.topologies import parse_topology

# ruff: noqa: E501
TEXT = """\
HloModule jit_step, is_scheduled=true

%fused (x: f32[4,8], w: f32[8,8]) -> f32[4,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %w = f32[8,8]{1,0} parameter(1)
  %dot.1 = f32[4,8]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %sine.1 = f32[4,8]{1,0} sine(%dot.1)
}

%slicing (y: f32[4,8], list: f32[64,8], k: s32[]) -> (f32[4,8], f32[64,8]) {
  %y = f32[4,8]{1,0} parameter(0)
  %list = f32[64,8]{1,0} parameter(1)
  %k = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  %part = f32[1,8]{1,0} dynamic-slice(%list, %k, %zero.1), dynamic_slice_sizes={1,8}
  %wide = f32[4,8]{1,0} broadcast(%part), dimensions={0,1}
  %sum = f32[4,8]{1,0} add(%y, %wide)
  %update = f32[64,8]{1,0} dynamic-update-slice(%list, %part, %zero.1, %zero.1)
  %same = f32[64,8]{1,0} bitcast(%update)
  ROOT %both = (f32[4,8]{1,0}, f32[64,8]{1,0}) tuple(%sum, %same)
}

%async (z: f32[8,8]) -> f32[4,8] {
  %z = f32[8,8]{1,0} parameter(0)
  ROOT %scatter = f32[4,8]{1,0} reduce-scatter(%z), replica_groups=[1,2]<=[2], dimensions={0}, to_apply=%add
}

%condition (c: (s32[], f32[4,8], f32[8,8])) -> pred[] {
  %c = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %three = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %three), direction=LT
}

%body (p: (s32[], f32[4,8], f32[8,8])) -> (s32[], f32[4,8], f32[8,8]) {
  %p = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%p), index=0
  %a = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %b = f32[8,8]{1,0} get-tuple-element(%p), index=2
  %gemm = f32[4,8]{1,0} fusion(%a, %b), kind=kCustom, calls=%fused, metadata={op_name="jit(step)/while/body/td,dv->tv/dot_general"}, backend_config={"fusion_backend_config":{"kind":"__triton_gemm"}}
  %query = f32[1,4,2,4]{3,2,1,0} bitcast(%gemm)
  %attention = (f32[1,2,4,4]{3,1,2,0}, u8[0]{0}) custom-call(%query, %query, %query), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"mask_type": "CAUSAL", "sliding_window_length": 2}
  %values = f32[1,2,4,4]{3,1,2,0} get-tuple-element(%attention), index=0
  %hidden = f32[4,8]{1,0} custom-call(%values), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(step)/pallas_call"}, backend_config={ir = "("}
  %sent = ((f32[8,8]{1,0}), f32[4,8]{1,0}) async-start(%b), calls=%async
  %received = f32[4,8]{1,0} async-done(%sent)
  %gathered = (f32[4,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%received), replica_groups=[1,2]<=[2], dimensions={0}
  %whole = f32[8,8]{1,0} all-gather-done(%gathered)
  ROOT %next = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) tuple(%j, %hidden, %whole)
}

ENTRY %main (x.1: f32[4,8], w.1: f32[8,8]) -> f32[4,8] {
  %x.1 = f32[4,8]{1,0} parameter(0)
  %w.1 = f32[8,8]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) tuple(%zero, %x.1, %w.1)
  %loop = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %out = f32[4,8]{1,0} get-tuple-element(%loop), index=1
  %flat = f32[32]{0} bitcast(%out)
  %copy.1 = f32[4,8]{1,0} copy(%out)
  %many = f32[64,8]{1,0} constant({...})
  %pair = (f32[4,8]{1,0}, f32[64,8]{1,0}) fusion(%copy.1, %many, %zero), kind=kLoop, calls=%slicing
  ROOT %result = f32[4,8]{1,0} get-tuple-element(%pair), index=0
}
"""


@pytest.fixture(scope="module")
def launched():
    program = parse_hlo(TEXT)
    return kernels(program, count_runs(program))


def test_launches_are_counted_as_often_as_they_run(launched):
    """What is inside a fusion, or only names arrays, launches nothing of its own."""
    assert count_launches(launched) == {
        "__triton_gemm": 3,
        "__cudnn$fmhaSoftmax": 3,
        "__gpu$xla.gpu.triton": 3,
        "all-gather": 3,
        "reduce-scatter": 3,
        "copy": 1,
        "fusion": 1,
    }


def test_flops_and_bytes_by_hand(launched):
    kernel = {kernel.kind: kernel for kernel in launched}
    gemm = kernel["__triton_gemm"]
    assert gemm.operation == "td,dv->tv/dot_general"
    assert gemm.flops == gemm.wide_flops == 3 * 2 * 4 * 8 * 8
    assert gemm.bytes == 3 * 4 * (32 + 64 + 32)
    attention = kernel["__cudnn$fmhaSoftmax"]
    assert attention.flops == 3 * 2 * 2 * (1 + 2 + 2 + 2) * 2 * 4  # pairs, heads, head size
    assert attention.bytes == 3 * 4 * (3 * 32 + 32)
    assert (kernel["all-gather"].sent, kernel["reduce-scatter"].sent) == (3 * 128, 3 * 128)
    # An array that is sliced, and updated in place: one row read, one written.
    assert kernel["fusion"].bytes == 4 * (32 + 8 + 1) + 4 * (32 + 8)


def test_a_roofline_by_hand(launched):
    topology = parse_topology("gpu:h100:2")
    program_flops = sum(kernel.flops for kernel in launched) + 5e12
    times = roofline(launched, topology, program_flops)
    first, *rest = times
    assert first.kernel.kind == "__gpu$xla.gpu.triton"  # gets the products that no other shows
    assert (first.limit, first.seconds) == ("compute", pytest.approx(5e12 / 989e12))
    assert {time.limit for time in rest} == {"launch"}
    assert sum(time.seconds for time in rest) == pytest.approx((3 * 4 + 2) * LAUNCH_SECONDS)
    gemm = next(time for time in rest if time.kernel.kind == "__triton_gemm")
    assert gemm.compute == 2 * gemm.kernel.flops / 989e12  # of float32
    assert gemm.memory == gemm.kernel.bytes / 3350e9
    assert by_operation(times)[0] == [first]
