"""A run: what a step collects, the rewards, the packed update, the state."""
