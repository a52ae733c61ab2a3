"""What the program costs, measured and counted. Each module's docstring says how to run it."""
