"""Sampling and scoring with slots that refill: parameters, decoding, scheduler, engine."""
