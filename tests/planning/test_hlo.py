"""What devices send each other, read from texts as compilers write them, against sums by hand."""

import pytest

from rlpr_jax.planning import hlo

# Two layers' weights are gathered in a loop of 28, in the text of a TPU; and a reduction, whole and of parts.
TPU = """\
HloModule jit_f, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%all-reduce-scatter.1 (input: f32[64,32]) -> f32[64,8] {
  %input = f32[64,32]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[64,32]{1,0:T(8,128)} all-reduce(%input), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %part = f32[64,8]{1,0:T(8,128)} dynamic-slice(%all-reduce.1, %zero, %place), dynamic_slice_sizes={64,8}
}

%body (state: (s32[], bf16[16,32])) -> (s32[], bf16[16,32]) {
  %all-gather.2 = bf16[16,32]{1,0:T(8,128)(2,1)} all-gather(%x), replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}
  %fusion.1 = f32[64,8]{1,0:T(8,128)} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %state.1 = (s32[], bf16[16,32]{1,0}) tuple(%i, %all-gather.2)
}

%condition (state: (s32[], bf16[16,32])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(28)
  ROOT %lt = pred[]{:T(512)} compare(%i, %constant.1), direction=LT
}

%dynamic_condition (state: (s32[], s32[])) -> pred[] {
  ROOT %lt.1 = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%outer (state: (s32[], s32[])) -> (s32[], s32[]) {
  %while.1 = (s32[], bf16[16,32]{1,0}) while(%state.2), condition=%condition, body=%body
  ROOT %state.3 = (s32[], s32[]) tuple(%i, %n)
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %while.2 = (s32[], s32[]) while(%state.4), condition=%dynamic_condition, body=%outer
  %all-reduce.3 = (f32[10]{0:T(256)}, f32[]{:T(128)}) all-reduce(%a, %b), replica_groups={{0,1},{2,3}}, to_apply=%add
}
"""


def test_loops_groups_and_fusions_of_a_tpu():
  groups = []

  def far(group):
    groups.append(group)
    return group == [0, 1]

  found = hlo.traffic(TPU, trips=(5,), far=far)
  runs = 5 * 28
  assert found["all-gather"] == (runs, runs * 0.75 * 16 * 32 * 2, 0)
  assert found["reduce-scatter"] == (runs, runs * 0.75 * 64 * 32 * 4, 0)
  assert found["all-reduce"] == (1, 2 * 0.5 * (10 + 1) * 4, 2 * 0.5 * (10 + 1) * 4)
  assert groups == [[0, 2, 4, 6], [0, 1, 2, 3], [0, 1]]  # along 'a' of a mesh of 4 x 2


FUSED = """\
%first (x: f32[4,32]) -> (f32[16,32], u32[]) {
  %all-gather.1 = f32[16,32]{1,0} all-gather(%x), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
}

%async_collective_fusion.2 (x: f32[4,32], y: f32[8,8]) -> (f32[8,8], f32[16,32], u32[]) {
  %product = f32[8,8]{1,0} convolution(%y, %y)
  %all-gather.2 = f32[16,32]{1,0} all-gather(%x), channel_id=7, replica_groups={{0,1,2,3}}, dimensions={0}
}

ENTRY %main (p: f32[4,32]) -> f32[4] {
  %async-collective-start.1 = (f32[16,32]{1,0}, u32[]) fusion(%p), kind=kCustom, calls=%first
  %fusion.2 = (f32[8,8]{1,0}, f32[16,32]{1,0}) fusion(%p, %q), kind=kCustom, calls=%async_collective_fusion.2
  %async-collective-done.1 = f32[16,32]{1,0} fusion(%fusion.2), kind=kCustom, calls=%first
  %all-gather.3 = f32[16,32]{1,0} all-gather(%r), channel_id=8, replica_groups={{0,1,2,3}}, dimensions={0}
}
"""


def test_one_that_goes_on_in_several_fusions_counts_once():
  assert hlo.traffic(FUSED, 1, bool)["all-gather"] == (2, 2 * 0.75 * 16 * 32 * 4, 2 * 0.75 * 16 * 32 * 4)


WINDOWED = """\
%body (state: (bf16[112,8], u32[], u32[])) -> (bf16[112,8], u32[], u32[]) {
  %two = u32[]{:T(128)} constant(2)
  %one = u32[]{:T(128)} constant(1)
  %i = u32[]{:T(128)} get-tuple-element(%state), index=1
  %s.1 = (bf16[112,8]{1,0}, bf16[112,8]{1,0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1}}
  %next = u32[]{:T(128)} add(%i, %two), control-predecessors={%i}
  %other = u32[]{:T(128)} add(%j, %one)
  ROOT %state.1 = (bf16[112,8]{1,0}, u32[], /*index=2*/u32[]) tuple(%done.1, %next, /*index=2*/%other)
}

%condition (state: (bf16[112,8], u32[], u32[])) -> pred[] {
  %end = u32[]{:T(128)} constant(15)
  %i.1 = u32[]{:T(128)} get-tuple-element(%state), index=1
  ROOT %lt = pred[]{:T(512)} compare(%i.1, %end), direction=LT
}

ENTRY %main (p: bf16[112,8]) -> bf16[112,8] {
  %while.1 = (bf16[112,8]{1,0}, u32[], u32[]) while(%p), condition=%condition, body=%body
}
"""


def test_a_loop_that_counts_by_twos():
  """As those in which weights come from the neighbours while their product is computed."""
  assert hlo.traffic(WINDOWED, 1, bool)["collective-permute"][:2] == (8, 8 * 112 * 8 * 2)


GPU = """\
ENTRY %main (p: f32[4]) -> f32[4] {
  %all-gather-start.1 = (bf16[4,32]{1,0}, bf16[16,32]{1,0}) all-gather-start(%p), replica_groups=[2,4]<=[8]
  %all-gather-done.1 = bf16[16,32]{1,0} all-gather-done(%all-gather-start.1)
  %reduce-scatter.1 = f32[8,32]{1,0} reduce-scatter(%q), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
  %start.1 = ((f32[8]{0}, f32[4]{0}), (f32[2]{0}, f32[1]{0})) reduce-scatter-start(%r), replica_groups=[2,4]<=[8]
  %while.1 = (s32[]) while(%s), condition=%c, body=%b, backend_config={"known_trip_count":{"n":"7"}}
}

%b (s: (s32[])) -> (s32[]) {
  %collective-permute.1 = f32[100]{0} collective-permute(%r), source_target_pairs={{0,1},{1,0}}
}
"""


def test_the_text_of_a_gpu():
  groups = []
  found = hlo.traffic(GPU, trips=(1,), far=lambda group: bool(groups.append(group)))
  assert found["all-gather"].received == 0.75 * 16 * 32 * 2
  assert found["reduce-scatter"].received == 1 * 8 * 32 * 4 + 3 * (2 + 1) * 4
  assert found["collective-permute"] == (7, 7 * 400, 0)
  assert groups == [[0, 1, 2, 3], [0, 4], [0, 1, 2, 3], [0, 1]]


@pytest.mark.parametrize("text", ["", "ENTRY %main (p: f32[]) -> f32[] {\n}\n"])
def test_nothing_is_sent(text):
  assert hlo.traffic(text, 1, bool) == {}


@pytest.mark.parametrize(
  ("text", "kernels"),
  [
    ('%c.1 = f32[8]{0} custom-call(%p), custom_call_target="mosaic_gpu_v2"', ["mosaic_gpu"]),
    ('%c.1 = f32[8]{0} custom-call(%p), custom_call_target="__gpu$xla.gpu.triton"', ["triton"]),
    ('%c.1 = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call"', ["splash"]),
    (
      '%ragged_attention.1 = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call"\n'
      '%c.1 = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call"',
      ["ragged", "splash"],
    ),
    ("%0 = stablehlo.custom_call @mosaic_gpu_v2(%arg0) : (tensor<8xf32>) -> tensor<8xf32>", ["mosaic_gpu"]),
    ('%c.1 = f32[8]{0} custom-call(%p), custom_call_target="__cublas$gemm"', []),
    (GPU, []),
  ],
)
def test_kernels(text, kernels):
  assert hlo.kernels(text) == kernels
