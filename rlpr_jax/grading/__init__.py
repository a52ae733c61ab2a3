"""Deterministic graders of an answer against its reference."""
