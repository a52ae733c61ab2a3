"""What Avg@k counts."""

import contextlib
import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from rlpr_jax.data import builtin
from rlpr_jax.data.pipeline import PromptSettings, prepare
from rlpr_jax.errors import InputError
from rlpr_jax.grading import mathverify
from rlpr_jax.runs.inputs import digest_rows
from rlpr_jax.runs.interrupt import StopRequest
from rlpr_jax.runs.unfinished import KeptRows
from rlpr_jax.sampling.decode import DecodeSettings
from rlpr_jax.sampling.device import Device
from rlpr_jax.sampling.engine import Engine, SampleOptions, StoppedError
from rlpr_jax.sampling.scheduler import Group, Request
from rlpr_jax.sampling.shapes import Shapes
from rlpr_jax.training.held_out import evaluate, evaluate_run
from rlpr_jax.training.run import Run, set_up
from rlpr_jax.types import Prompt, Rollouts
from tests.tiny_run import tiny


class Told(Engine):
  """An engine that answers each draw as it is told: texts[draw][sample]."""

  template = "think"

  def __init__(self, texts):
    self.__dict__ |= {"texts": texts, "calls": []}  # an engine is frozen

  def sample(self, params, draws, key, samples, options):
    self.calls.append([draw for draw, _ in draws])
    texts = [text for draw, _ in draws for text in self.texts[draw]]
    assert len(texts) == len(draws) * samples
    for done in (0, len(texts)):
      options.progress(done, len(texts))
    for draw, prompt in draws:
      if options.interrupted():
        raise StoppedError
      group = Group(prompt, draw, self.sampling, (), waiting=0)
      requests = [
        Request(group, sample, 99, text=text, tokens=np.zeros(len(text), np.int32))
        for sample, text in enumerate(self.texts[draw])
      ]
      options.ended(requests)
    fields = dict.fromkeys(Rollouts._fields) | {"texts": texts, "lengths": np.array([len(text) for text in texts])}
    return Rollouts(**fields | {"refused": np.zeros(len(texts), bool)})


def prompt(reference, source):
  return Prompt(ids=np.array([1], np.int32), reference=reference, source=source)


RIGHT, LOOSE, WRONG = "<think></think><answer> 1 </answer>", "so <answer> 1 </answer>", "<think></think><answer>2"


def test_what_counts():
  """Five prompts, two samples each."""
  texts = [[RIGHT, RIGHT], [LOOSE, WRONG], [WRONG, WRONG], [RIGHT, WRONG], [LOOSE, LOOSE]]
  prompts = [prompt("1", source) for source in ("a", "b", "a", "b", "b")]
  engine, seen = Told(texts), []
  values = evaluate(
    engine, {}, prompts, 2, jax.random.key(0), SampleOptions(progress=lambda done, total: seen.append((done, total)))
  )
  assert values == {
    "accuracy": pytest.approx(6 / 10),
    "accuracy/a": pytest.approx(2 / 4),
    "accuracy/b": pytest.approx(4 / 6),
    "exact": pytest.approx(6 / 10),
    "exact/a": pytest.approx(2 / 4),
    "exact/b": pytest.approx(4 / 6),
    "format": pytest.approx(3 / 10),
    "response_length": pytest.approx((3 * len(RIGHT) + 3 * len(LOOSE) + 4 * len(WRONG)) / 10),
  }
  assert engine.calls == [[0, 1, 2, 3, 4]]  # each prompt, and no number twice
  assert seen == [(0, 10), (10, 10)]


def test_an_evaluation_that_was_cut_short_goes_on(tmp_path):
  """Prompts that had ended are not sampled again, and the numbers are those of one that was left alone."""
  texts = [[RIGHT, RIGHT], [LOOSE, WRONG], [WRONG, WRONG], [RIGHT, WRONG], [LOOSE, LOOSE]]
  prompts = [prompt("1", source) for source in ("a", "b", "a", "b", "b")]
  whole = evaluate(Told(texts), {}, prompts, 2, jax.random.key(0), SampleOptions())
  asked = iter([False, False, True])
  options = SampleOptions(interrupted=lambda: next(asked))
  with pytest.raises(StoppedError):
    evaluate(Told(texts), {}, prompts, 2, jax.random.key(0), options, KeptRows(tmp_path, "held_out", of="it"))
  for _ in range(2):  # the second time nothing is left to be sampled
    engine = Told(texts)
    kept = KeptRows(tmp_path, "held_out", of="it")
    assert evaluate(engine, {}, prompts, 2, jax.random.key(0), SampleOptions(), kept) == whole
  assert engine.calls == [[]]
  engine = Told(texts)
  evaluate(engine, {}, prompts, 2, jax.random.key(0), SampleOptions(), KeptRows(tmp_path, "held_out", of="another"))
  assert engine.calls == [[0, 1, 2, 3, 4]]


def test_all_wrong_and_all_right():
  prompts = [prompt("1", "a")] * 3
  for text, accuracy in ((RIGHT, 1.0), (WRONG, 0.0)):
    values = evaluate(Told([[text]] * 3), {}, prompts, 1, jax.random.key(0), SampleOptions(progress=lambda *_: None))
    assert values["accuracy"] == values["accuracy/a"] == accuracy


def test_any_reference_is_right():
  prompts = [dataclasses.replace(prompt("one", "a"), alternatives=("1",)), prompt("one", "b")]
  values = evaluate(Told([[RIGHT, WRONG]] * 2), {}, prompts, 2, jax.random.key(0), SampleOptions())
  assert (values["accuracy/a"], values["accuracy/b"]) == (0.5, 0.0)


def test_sentences_count_by_what_they_say():
  """Any wording of the right content, whatever the reference's; other questions by exact match."""
  question, reference = "ann 17 cats, bob 31. who has more?", "bob has 14 more cats than ann"
  answers = ["ann trails bob by 14", reference, "bob trails ann by 14", "bob has 13 more cats than ann"]
  texts = [[f"<think></think><answer> {answer} </answer>" for answer in answers]] * 2
  prompts = [dataclasses.replace(prompt(reference, source), question=q) for source, q in (("gap", question), ("b", ""))]
  values = evaluate(Told(texts), {}, prompts, 4, jax.random.key(0), SampleOptions(progress=lambda *_: None))
  assert values["accuracy/gap"] == 2 / 4
  assert values["accuracy/b"] == values["exact/gap"] == values["exact/b"] == 1 / 4


def test_form_and_ability_are_told_apart():
  """An answer that lost its unit is right by the number grader alone; a wrong number is right by none."""
  answers = ["814 students", "814", "813 students", "so many"]
  texts = [[f"<think></think><answer> {answer} </answer>" for answer in answers]]
  for verifier, accuracy in (("number", 2 / 4), ("inferred", 2 / 4), ("exact", 1 / 4), ("builtin", 1 / 4)):
    values = evaluate(
      Told(texts), {}, [prompt("814 students", "a")], 4, jax.random.key(0), SampleOptions(), verifier=verifier
    )
    assert values["accuracy"] == values["accuracy/a"] == accuracy, verifier
    assert values["exact"] == values["exact/a"] == 1 / 4


def late_on(monkeypatch, answer):
  """Lets mathematics take too long where an answer has some text."""

  def ask(pair, reference):
    mathverify.process.timeouts += answer in pair
    return False

  monkeypatch.setattr(mathverify.process, "ask", ask)


def test_comparisons_that_took_too_long_are_counted(monkeypatch):
  late_on(monkeypatch, "99")
  answers = ["\\sum_{k=1}^{99} k", "\\sum_{k=1}^{9} k", "3", "\\sum_{k=1}^{99} k^2"]
  texts = [[f"<think></think><answer> {answer} </answer>" for answer in answers]] * 2
  prompts = [prompt("\\sum_{k=1}^{7} k", "a")] * 2
  for verifier, counts in (("math", {"timeouts": 4}), ("inferred", {"timeouts": 4}), ("exact", {})):
    values = evaluate(Told(texts), {}, prompts, 4, jax.random.key(0), SampleOptions(), verifier=verifier)
    assert {name: value for name, value in values.items() if "timeouts" in name} == counts, verifier


def run_of(config, texts, prompts):
  """What `evaluate_run` takes of a run, with an engine that answers as it is told."""
  policy = SimpleNamespace(sampling_params=lambda params: params)
  fields = {"config": config, "held_out": prompts, "engine": Told(texts), "policy": policy, "key": jax.random.key(0)}
  return Run(**dict.fromkeys(Run._fields) | fields)


def test_rows_of_another_verifier_or_of_other_columns_are_not_taken(tmp_path, monkeypatch):
  """Neither those of a version that measured three things, whose file was named by settings and rows alone."""
  replace = dataclasses.replace  # which knows nothing of an engine that is told
  monkeypatch.setattr(dataclasses, "replace", lambda x, **new: x if isinstance(x, Told) else replace(x, **new))
  config, prompts = tiny(), [prompt("814 students", "a")]
  texts = [[f"<think></think><answer> {answer} </answer>" for answer in ("814", "814 students")]]
  settings = config.evaluation
  old = KeptRows(tmp_path, "held_out-0", of=f"{settings} {digest_rows(prompts)}")
  old.add({0: np.zeros(6, np.float32)})

  def measure():
    run = run_of(config, texts, prompts)
    values = evaluate_run(run, {}, 0, tmp_path, StopRequest())
    return len(run.engine.calls[0]), values["held_out/accuracy"], values["held_out/exact"]

  assert measure() == (1, 0.5, 0.5)
  assert measure() == (0, 0.5, 0.5)  # what was kept
  settings.verifier = "number"
  assert measure() == (1, 1.0, 0.5)
  assert measure() == (0, 1.0, 0.5)


def test_values_of_a_policy_do_not_depend_on_the_slots(policy):
  """Nor on how many prompts are read at once."""
  prompts, _ = prepare(
    builtin.examples("held_out", 5),
    policy.tokenizer,
    PromptSettings(template="think", instruction="", worked_examples=(), prompt_limit=14, max_reference_length=16),
  )
  key, values, seen = jax.random.key(2), [], []
  for slots, prefill_rows in ((20, 5), (3, 2)):
    device = Device(
      policy.model,
      DecodeSettings(steps=4, eos_ids=(policy.tokenizer.eos_token_id,)),
      Shapes(
        slots=slots, prompt_limit=14, max_response_length=20, suffix_length=4, steps=4, prefill_rows=prefill_rows,
        score_rows=2, insert_rows=2,
      ),
    )  # fmt: skip
    engine = Engine(device, policy.tokenizer, "think", baseline_prefix="bare")
    values.append(
      evaluate(engine, policy.params, prompts, 4, key, SampleOptions(progress=lambda *progress: seen.append(progress)))
    )
    assert seen[-1] == (20, 20)
  lengths = engine.sample(policy.params, list(enumerate(prompts)), key, 4).lengths
  assert values[0] == values[1]
  assert values[0]["response_length"] == pytest.approx(np.mean(lengths))
  assert np.ptp(lengths) > 0
  measured = {f"{name}/{prompt.source}" for prompt in prompts for name in ("accuracy", "exact")}
  assert {name for name in values[0] if "/" in name} == measured


@pytest.mark.parametrize(
  ("verifier", "prompts", "needed"), [("math", 1, True), ("math", 0, False), ("inferred", 1, True)]
)
def test_mathematics_needs_its_package_before_anything_is_compiled(tmp_path, monkeypatch, verifier, prompts, needed):
  monkeypatch.setattr(mathverify.importlib.util, "find_spec", lambda name: None)
  config, path = tiny(), tmp_path / "questions.jsonl"
  path.write_text('{"question": "3*y=9", "answer": "y=3"}\n')
  config.evaluation.path, config.evaluation.verifier, config.evaluation.prompts = str(path), verifier, prompts
  with pytest.raises(InputError, match="math-verify is not installed") if needed else contextlib.nullcontext():
    set_up(config)
