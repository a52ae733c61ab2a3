"""Questions: where they come from, how they become prompts, and a built-in set."""
