"""The rooms of the package in their order, which a test of imports and a test of the docs read."""

# From the bottom to the top. A room is a folder, or a file beside the folders; it imports of rooms that stand on lines
# above its own.
ORDER = (
  ("interruption",),
  ("__init__", "output"),
  ("errors", "resources", "compilation", "answers"),
  ("fields",),
  ("machine", "config", "sharding", "processes", "filtering", "grpo"),
  ("types",),
  ("rewards", "command_line", "custom_reward"),
  ("splicing", "models"),
  ("reference_reward",),
  ("huggingface",),
  ("data",),
  ("sampling", "grading", "policy"),
  ("runs",),
  ("judging",),
  ("training",),
  ("validation",),
  ("curation", "diagnosis", "evaluation", "planning", "report", "serving"),  # of which nothing above imports anything
  ("viewer",),  # a page with the report's curves and cards
  ("entry",),
  ("train", "sft", "evaluate", "plan", "serve", "curate", "diagnose", "view", "export"),
  ("__main__",),
)
