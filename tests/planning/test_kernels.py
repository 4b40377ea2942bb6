"""Launches of compiled programs on GPUs, parsed from HLO text."""

from tttjax.planning.hlo import parse_hlo
from tttjax.planning.hlo_runs import count_runs
from tttjax.planning.kernels import count_launches, kernels

# ruff: noqa: E501
TEXT = """\
HloModule jit_step, is_scheduled=true

%fused (x: f32[4,8], w: f32[8,8]) -> f32[4,8] {
  %x = f32[4,8]{1,0} parameter(0)
  %w = f32[8,8]{1,0} parameter(1)
  %dot.1 = f32[4,8]{1,0} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %sine.1 = f32[4,8]{1,0} sine(%dot.1)
}

%wrapped (y: f32[4,8]) -> f32[4,8] {
  %y = f32[4,8]{1,0} parameter(0)
  ROOT %negate.1 = f32[4,8]{1,0} negate(%y)
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
  %gemm = f32[4,8]{1,0} fusion(%a, %b), kind=kCustom, calls=%fused, backend_config={"fusion_backend_config":{"kind":"__triton_gemm"}}
  %attention = (f32[4,8]{1,0}, u8[0]{0}) custom-call(%gemm), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"a":")"}
  %c.1 = f32[4,8]{1,0} get-tuple-element(%attention), index=0
  %sent = ((f32[8,8]{1,0}), f32[4,8]{1,0}) async-start(%b), calls=%async
  %received = f32[4,8]{1,0} async-done(%sent)
  %gathered = (f32[4,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%received), replica_groups=[1,2]<=[2], dimensions={0}
  %whole = f32[8,8]{1,0} all-gather-done(%gathered)
  ROOT %next = (s32[], f32[4,8]{1,0}, f32[8,8]{1,0}) tuple(%j, %c.1, %whole)
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
  ROOT %result = f32[4,8]{1,0} fusion(%copy.1), kind=kLoop, calls=%wrapped
}
"""


def test_launches_are_counted_as_often_as_they_run():
    """What is inside a fusion, or only names arrays, launches nothing of its own."""
    program = parse_hlo(TEXT)
    launched = kernels(program, count_runs(program))
    assert count_launches(launched) == {
        "__triton_gemm": 3,
        "__cudnn$fmhaSoftmax": 3,
        "all-gather": 3,
        "reduce-scatter": 3,
        "copy": 1,
        "fusion": 1,
    }
    assert next(k for k in launched if k.kind == "reduce-scatter").name == "scatter"
