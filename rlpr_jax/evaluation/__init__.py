"""Benchmarks: their questions, the responses, statistics over them, a summary."""
