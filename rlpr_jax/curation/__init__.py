"""Checks of training questions before anything is trained on them."""
