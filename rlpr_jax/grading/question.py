"""A question whose answers are graded."""

from dataclasses import dataclass

GRADERS = ("multiple_choice", "math", "number", "text")


@dataclass(frozen=True)
class Question:
  """A question of a benchmark and what its answer is graded by."""

  id: str  # unique in its benchmark and the same in every run
  prompt: str  # what the user says; for multiple choice the question, then the options as lines "A. text"
  reference: str  # gold answer; the letter for multiple choice
  category: str
  grader: str  # one of GRADERS
  options: tuple[str, ...] = ()  # texts of options A, B, ...; () where there are none
  row: int = 0  # 1-based data row
  # How far a number may be from the reference: relative to it, and absolute.
  rtol: float = 0.0
  atol: float = 0.0
