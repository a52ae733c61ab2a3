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
  rounded: bool = False  # whether an answer that is no integer is rounded to one first
  alternatives: tuple["Question", ...] = ()  # the same question with other gold answers, each as right

  @property
  def forms(self) -> tuple["Question", ...]:
    """The question with each of its gold answers."""
    return (self, *self.alternatives)

  @property
  def gold(self) -> str:
    """All gold answers, for a reader.

    >>> half = Question(id="1", prompt="1 / 2?", reference="half", category="", grader="text")
    >>> Question(id="1", prompt="1 / 2?", reference="0.5", category="", grader="number", alternatives=(half,)).gold
    '0.5 or half'
    """
    return " or ".join(form.reference for form in self.forms)
