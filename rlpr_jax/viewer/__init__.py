"""The page that `rlpr view` serves: a run's curves and rollouts, while it trains and after.

metrics.jsonl        -> tail -> curves --------------------------------\\
rollouts/*.jsonl     -> tail -> index (offsets, columns) -> query -> cards -> server -> page.html, page.js, page.css

Nothing is written, and of the rollouts only those that are shown are read again.
"""
