"""Attention kernels of TPUs and GPUs behind `attention.attend`."""


def splash_attention(queries, keys, values, segment_ids, settings, windowed):
  raise NotImplementedError


def tokamax_attention(queries, keys, values, segment_ids, settings, windowed):
  raise NotImplementedError
