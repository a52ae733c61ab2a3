#!/usr/bin/env bash
# Compiler flags that let collectives overlap with computing, each with its reason; sourced by the launch scripts.
#
# XLA and libtpu end a program that has a flag that they do not know: those of the tested versions take all of these
# (tests/launch/test_launch.py asks them). What they bring was not measured here. They are the flags that JAX's and
# NVIDIA's guides to performance and MaxText name. What the environment sets already stands behind them, and so wins.

# Of LIBTPU_INIT_ARGS, for every TPU. Parameters lie in parts over `fsdp`: each layer gathers its weights, and the next
# layer's should arrive while this one is computed.
TPU_FLAGS=(
  --xla_enable_async_all_gather=true                               # an all-gather begins, and is waited for later
  --xla_tpu_enable_async_collective_fusion=true                    # collectives are fused with what computes meanwhile
  --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true    # those that fetch the weights too
  --xla_tpu_enable_async_collective_fusion_multiple_steps=true     # one may stretch over several fusions
  --xla_tpu_overlap_compute_collective_tc=true                     # on the tensor core itself
)

# For more than one slice. Gradients are summed between slices over the data centre's network, which is slow.
MULTISLICE_FLAGS=(
  --xla_tpu_enable_data_parallel_all_reduce_opt=true     # the all-reduces of the data axis overlap with the backward pass
  --xla_tpu_data_parallel_opt_different_sized_ops=true   # also where tensors differ in size
)

# Of XLA_FLAGS, for GPUs.
GPU_FLAGS=(
  --xla_gpu_enable_latency_hiding_scheduler=true         # orders the program so that collectives begin early, end late
  --xla_gpu_enable_pipelined_all_gather=true             # layers are a loop: the next turn's weights in this turn
  --xla_gpu_enable_pipelined_reduce_scatter=true         # and the last turn's gradients
  --xla_gpu_enable_while_loop_double_buffering=true      # unrolls that loop by two: no copies between turns
)

tpu_flags() { # SLICES: value of LIBTPU_INIT_ARGS
  local flags=("${TPU_FLAGS[@]}")
  if (($1 > 1)); then flags+=("${MULTISLICE_FLAGS[@]}"); fi
  echo "${flags[*]}${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}"
}

# JAX takes three quarters of a GPU's memory; nothing else runs there. rlpr_jax/planning/hardware.py reckons with it.
GPU_MEMORY_SHARE=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}

gpu_flags() { # value of XLA_FLAGS
  echo "${GPU_FLAGS[*]}${XLA_FLAGS:+ $XLA_FLAGS}"
}
