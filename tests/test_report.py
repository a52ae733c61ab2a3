"""The report and the picture of a made-up run."""

import json
import math
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from rlpr_jax import errors, report
from rlpr_jax.report import charts, gallery, markup, panels, picture, records, style

ROOT = pathlib.Path(__file__).parents[1]
DOMAINS = ("addition", "chains", "letters", "price", "weekday")
HOSTILE = "<script>alert('x')</script> & \"quotes\" $\\frac{1}{2$ \ud800 \u202e <think> a </think> <answer> 4"
QUESTIONS = (
  ("addition", "What is 4817 + 2694?", "7511", ["7", "5", "1", "1"]),
  ("weekday", "Today is Thursday. Which day is it in 23 days?", "Saturday", [" Saturday"]),
  ("letters", "How many times does the letter s occur in possesses?", "5 times", [" ", "5", " times"]),
  ("price", "3 pens at 14 and a bag of 27. How much?", "69 coins", [" ", "6", "9", " coins"]),
  (
    "chains",
    "Why does ice float on water?",
    "Because ice is less dense than liquid water",
    [" Because", " ice", " is", " less", " dense", " than", " liquid", " water"],
  ),
)


def metrics_row(step: int, steps: int, rng: np.random.Generator) -> dict:
  """What a step of a run that learns might say."""
  done = 1 - math.exp(-3 * step / steps)
  seconds = {"rollout": 3.1 - done, "score": 0.4, "update": 1.6}
  return {
    "step": step,
    "reward/total": 0.2 + 0.35 * done + rng.normal(0, 0.03),
    "reward/reference": 0.4 + 0.4 * done + rng.normal(0, 0.03),
    "reward/baseline": 0.3 + rng.normal(0, 0.02),
    "reward/debiased": 0.15 + 0.35 * done + rng.normal(0, 0.03),
    "reward/format": 0.8 + 0.19 * done,
    "reward/repetition": -0.02 * (1 - done),
    "reward/group_std": 0.25 - 0.1 * done + rng.normal(0, 0.01),
    "filter/threshold": 0.2 - 0.05 * done,
    "filter/kept": 32,
    "filter/drawn": 32 + int(rng.integers(0, 20)),
    "rollout/response_length": 19 + 5 * done + rng.normal(0, 0.5),
    "rollout/truncated": 0.06 * (1 - done),
    "rollout/scorable": 0.9 + 0.09 * done,
    "answer/exact": 0.2 + 0.5 * done,
    "answer/empty": 0.02 * (1 - done),
    "answer/length": 1.4 - 0.3 * done,
    "update/loss": rng.normal(0, 0.02),
    "update/entropy": 0.5 - 0.3 * done,
    "update/grad_norm": 0.4 + rng.exponential(0.1),
    "update/step_kl": 0.004 + rng.exponential(0.002),
    "update/clip_fraction": 0.01 + rng.exponential(0.003),
    "update/ratio_mean": 1 + rng.normal(0, 0.001),
    "update/ratio_worst": 1 + rng.exponential(0.1),
    "seconds/rollout": seconds["rollout"],
    "seconds/score": seconds["score"],
    "seconds/update": seconds["update"],
    "seconds/step": sum(seconds.values()) + 0.2,
    "tokens_per_second/rollout": 2800 + rng.normal(0, 100),
    "tokens_per_second/update": 6100 + rng.normal(0, 100),
    "compilations": 9,
    "surprise/new_metric": done,
  }


def held_out_row(step: int, steps: int) -> dict:
  """An evaluation: 38.9% before, 65.9% after."""
  done = step / steps
  by_domain = {f"held_out/accuracy/{name}": 0.2 + 0.1 * i + 0.27 * done for i, name in enumerate(DOMAINS)}
  by_domain |= {f"held_out/exact/{name}": 0.1 + 0.2 * done for name in DOMAINS}
  values = {"accuracy": 0.389 + 0.27 * done, "exact": 0.204 + 0.2 * done, "format": 0.8 + 0.19 * done}
  return {"step": step} | {f"held_out/{name}": value for name, value in values.items()} | by_domain


def rollout_row(step: int, row: int, rng: np.random.Generator) -> dict:
  """One response; every fifth is cut off before it answers."""
  source, question, reference, tokens = QUESTIONS[row % len(QUESTIONS)]
  scorable = row % 6 != 5
  probabilities = [round(float(p), 6) for p in rng.beta(1.6, 0.8, len(tokens))] if scorable else []
  score, baseline = (float(np.mean(probabilities)) if scorable else 0.0), 0.3
  thought = "<think> Let me go through it step by step. First the units, then the tens; nothing is carried twice. "
  response = thought + (f"</think> <answer> {reference} </answer>" if scorable else "Let me go through it " * 9)
  debiased = min(max(score - baseline, 0.0), 1.0)
  return {
    "step": step,
    "row": row,
    "source": source,
    "question": question,
    "reference": reference,
    "response": response,
    "finish": "eos" if scorable else "length",
    "length": len(response.split()),
    "reference_tokens": tokens if scorable else [],
    "reference_probs": probabilities,
    "reward_reference": score,
    "reward_baseline": baseline,
    "reward_debiased": debiased,
    "reward_format": float(scorable),
    "reward_repetition": 0.0,
    "reward_total": 0.9 * debiased + 0.1 * scorable,
    "advantage": float(rng.normal()),
    "group_std": 0.21,
    "kept": row % 3 != 1,
    "scorable": scorable,
  }


def write_lines(path: pathlib.Path, rows: list[dict]) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_workdir(directory: pathlib.Path, steps: int = 60, seed: int = 0) -> pathlib.Path:
  """What a run of `steps` steps leaves behind, evaluated six times."""
  rng = np.random.default_rng(seed)
  evaluations = [held_out_row(step, steps) for step in range(0, steps + 1, steps // 5)]
  training = [metrics_row(step, steps, rng) for step in range(1, steps + 1)]
  write_lines(directory / "metrics.jsonl", sorted(evaluations + training, key=lambda row: row["step"]))
  for step in (steps - 1, steps):
    rows = [rollout_row(step, row, rng) for row in range(24)]
    write_lines(directory / "rollouts" / f"step_{step:06d}.jsonl", rows)
  config = {"seed": 0, "model": {"path": "tiny", "layers": 3}, "reward": {"aggregate": "mean_prob"}}
  (directory / "config.json").write_text(json.dumps(config))
  return directory


@pytest.fixture
def workdir(tmp_path):
  return make_workdir(tmp_path / "toy")


def read_lines(workdir: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def page_of(directory: pathlib.Path) -> str:
  return report.write_report(directory).read_text(encoding="utf-8")


def test_headline_numbers(workdir):
  page = page_of(workdir)
  assert "<span>Held-out accuracy, before RL → step 60</span><b>38.9% → 65.9%</b>" in page
  assert ">+27.0 points<" in page
  assert "<span>Held-out answers with a reference&#x27;s text</span><b>20.4% → 40.4% " in page
  assert page.count("<small> exact 30.0%</small>") == len(DOMAINS)
  assert "<span>Steps</span><b>60 " in page
  seconds = sum(row.get("seconds/step", 0) for row in read_lines(workdir))
  assert f"<span>Wall time of the steps</span><b>{style.duration(seconds)} " in page


def test_a_run_before_its_first_evaluation(tmp_path):
  write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "update/loss": 0.5}])
  page = page_of(tmp_path)
  assert "Held-out accuracy, not evaluated yet" in page
  assert "No rollouts were written." in page


def test_one_evaluation_has_no_gain(tmp_path):
  write_lines(tmp_path / "metrics.jsonl", [{"step": 4, "held_out/accuracy": 0.5}])
  page = page_of(tmp_path)
  assert "<span>Held-out accuracy, step 4</span><b>50.0%</b>" in page
  assert "points" not in page


def test_every_metric_is_shown(workdir):
  page = page_of(workdir)
  assert "surprise/new_metric" in page
  shown = {key for theme in panels.THEMES.values() for panel in theme for key in panel.lines}
  written = {key for row in read_lines(workdir) for key in row}
  assert {key for key in written - shown if not key.startswith("held_out/")} == {"step", "surprise/new_metric"}
  for panel in (panel for theme in panels.THEMES.values() for panel in theme):
    assert f"<strong>{panel.title}</strong>" in page


@pytest.mark.parametrize(
  "key", sorted((metrics_row(1, 1, np.random.default_rng(0)) | held_out_row(0, 1)).keys() - {"step"})
)
def test_any_metric_alone(tmp_path, key):
  """Any key may be missing: here all but one are."""
  write_lines(tmp_path / "metrics.jsonl", [{"step": step, key: 0.5} for step in (1, 2)])
  assert "</html>" in page_of(tmp_path)


def test_values_that_are_not_finite_are_left_out(tmp_path):
  rows = [{"step": i, "update/loss": value} for i, value in enumerate([0.25, math.nan, math.inf])]
  write_lines(tmp_path / "metrics.jsonl", rows)
  assert "<b>0.25</b>" in page_of(tmp_path)


def test_a_half_written_line_is_skipped(workdir):
  with (workdir / "metrics.jsonl").open("a") as file:
    file.write('{"step": 61, "held_out/accuracy": 0.9')
  page = page_of(workdir)
  assert "38.9% → 65.9%" in page
  assert "1 line(s) were not whole" in page


def test_a_step_written_again_after_a_resume_counts_once(tmp_path):
  rows = [{"step": 1, "seconds/step": 10}, {"step": 2, "seconds/step": 10}, {"step": 2, "seconds/step": 12}]
  write_lines(tmp_path / "metrics.jsonl", rows)
  assert records.read_run(tmp_path).seconds() == 22


def test_what_a_model_writes_stays_text(tmp_path):
  rows = [{"step": 1, "reward/total": 0.1, f"odd/{HOSTILE}": 1.0}, {"step": 2, "held_out/accuracy/<b>$": 0.5}]
  write_lines(tmp_path / "metrics.jsonl", rows)
  row = rollout_row(1, 0, np.random.default_rng(0)) | dict.fromkeys(("source", "question", "response"), HOSTILE)
  row |= {"reference": HOSTILE, "reference_tokens": [HOSTILE, "<i>"], "reference_probs": [0.5, math.nan]}
  write_lines(tmp_path / "rollouts" / "step_000001.jsonl", [row])
  (tmp_path / "config.json").write_text(json.dumps({HOSTILE: HOSTILE}))
  page = page_of(tmp_path)
  assert "<script" not in page
  assert "&lt;script&gt;alert" in page
  assert '<span class="tag">&lt;think&gt;</span>' in page
  assert "\\u202e" in page
  assert "\u202e" not in page
  assert "Content-Security-Policy" in page
  report.save_picture(tmp_path, tmp_path / "picture.png")


def made_up_diagnosis() -> dict:
  """What diagnosis.json holds, with hostile text wherever a model or a data set may have put it."""
  figure = {"value": 0.7, "low": 0.6, "high": None, "groups": 3}
  aucs = {"all": figure, "within": None, "between": figure}
  verdicts = {"responses": 4, "groups": 2, "right": figure, "scores": {"total": aucs, HOSTILE: aucs}}
  verdicts |= {"by_source": {HOSTILE: aucs, "b": aucs}, "by_length": {"1 to 2 tokens": aucs}}
  tokens = [{"token": HOSTILE, "with": 0.75, "without": 0.25}]
  example = dict.fromkeys(("source", "question", "reference", "response"), HOSTILE)
  return {
    "policy": HOSTILE, "when": "step 1", "prompts": 2, "samples": 2, "verdicts": HOSTILE,
    "accuracy": {"sampled": {"all": figure, HOSTILE: figure}, "greedy": {"all": None}},
    "likelihood": {"token": figure, "token_without": figure, "marginal": None},
    "sampled": verdicts,
    "trained": {},
    "reasoning": {"own": {"r": figure}, "other": {"r": figure, "loss": figure, "helped": figure}},
    "information": {},
    "likes": {
      "lengths": {"tokens": {"total": figure, "right": None}},
      "words": [{"word": HOSTILE, "reward": figure, "right": None, "responses": 2}],
    },
    "examples": [example | {"right": False, "reward": 0.5, "tokens": {"reference": tokens, "own": []}}],
  }  # fmt: skip


def test_a_diagnosis_is_a_section_of_the_report_and_a_page(workdir):
  assert "Does the reasoning matter?" not in page_of(workdir)
  (workdir / "diagnosis.json").write_text(json.dumps(made_up_diagnosis()))
  alone = report.page.render_diagnosis("toy", made_up_diagnosis())
  for text in (page_of(workdir), alone):
    assert "Does the reasoning matter?" in text
    assert "another prompt&#x27;s" in text
    assert "+0.50" in text  # what the reasoning adds to a token
    assert "<script" not in text
    assert "&lt;script&gt;alert" in text


def test_a_diagnosis_of_another_version_is_said_to_be_one(workdir):
  (workdir / "diagnosis.json").write_text('{"policy": "x"}')
  assert "diagnosis.json has no accuracy" in page_of(workdir)


def test_the_page_fetches_nothing(workdir):
  page = page_of(workdir)
  namespaces = page.replace("http://www.w3.org/2000/svg", "").replace("http://www.w3.org/1999/xlink", "")
  assert "http" not in namespaces.replace("http-equiv", "")
  assert "url(http" not in page


def test_values_at_the_pointer_stand_where_their_points_do(tmp_path):
  """Without a script: strips over the drawing, which the style sheet shows. matplotlib says where the points are."""
  write_lines(tmp_path / "metrics.jsonl", [{"step": step, "update/loss": 0.5 / step} for step in (1, 2, 5)])
  (drawing,) = re.findall(r"<svg.*?</svg>", page_of(tmp_path), re.DOTALL)
  drawn, pointer = drawing.split('<g class="pointer">')
  points = [float(x) for x in re.findall(r'<use [^>]*x="([\d.]+)"', drawn)]
  marks = [float(x) for x in re.findall(r'd="M([\d.]+) ', pointer)]
  assert len(marks) == 3
  assert all(min(abs(point - mark) for point in points) < 0.1 for mark in marks)
  assert (marks[1] - marks[0]) / (marks[2] - marks[0]) == pytest.approx(1 / 4, abs=0.01)
  strips = [
    (float(x), float(width)) for x, width in re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', pointer)
  ]
  for (x, width), mark, (beside, _) in zip(strips, marks, [*strips[1:], (math.inf, 0.0)], strict=True):
    assert x <= mark <= x + width <= beside + 0.2
  said = re.findall(r">(step \d+)</tspan><tspan [^>]*>([^<]+)<", pointer)
  assert said == [(f"step {step}", f"clipped policy loss {0.5 / step:.3g}") for step in (1, 2, 5)]


def test_a_dark_screen_turns_all_that_is_drawn(workdir):
  page = page_of(workdir)
  assert "@media (prefers-color-scheme: dark)" in page
  drawings = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
  assert drawings
  assert not any(re.search(r"(fill|stroke): #", drawing) for drawing in drawings)
  names = set(re.findall(r"var\(--([\w-]+)\)", page))
  assert names <= style.SHADES.keys()
  assert max(drawing.count("<rect ") for drawing in drawings) <= charts.STRIPS + 1


def test_the_reference_is_coloured_by_its_probabilities():
  row = {"reference_tokens": [" 4", "2", "!"], "reference_probs": [1.0, 0.0]}
  chips = [gallery.token_chip(*pair) for pair in gallery.reference_tokens(row)]
  assert f"background:{style.probability_color(1)}" in chips[0]
  assert ">␣4<" in chips[0]
  assert ">1.00<" in chips[0]
  assert f"background:{style.probability_color(0)}" in chips[1]
  assert "style" not in chips[2]


def test_probability_colours_run_through_their_stops():
  colors = [style.probability_color(p) for p in (-1, 0, 0.5, 1, 2)]
  assert colors == ["#f2a08a", "#f2a08a", "#f9efd0", "#76c6b4", "#76c6b4"]


def test_the_gallery_groups(workdir):
  run = records.read_run(workdir)
  groups = gallery.choose(run)
  totals = [row["reward_total"] for row in run.rollouts]
  scorable = [row["reward_total"] for row in run.rollouts if row["scorable"]]
  assert {row["step"] for row in groups["Newest"]} == {60}
  assert groups["Highest reward"][0]["reward_total"] == max(totals)
  assert groups["Lowest reward among the scorable"][0]["reward_total"] == min(scorable)
  assert not any(row["scorable"] for row in groups["Not scorable: no reward for the answer"])
  for rows in groups.values():
    assert len({row["question"] for row in rows}) == len(rows) <= gallery.GROUP_SIZE


def test_the_featured_pair_answers_one_question(workdir):
  high, low = gallery.featured(records.read_run(workdir))
  assert (high["step"], high["question"]) == (low["step"], low["question"])
  assert high["reward_reference"] > low["reward_reference"]


def test_only_the_newest_rollouts_are_read(tmp_path):
  write_lines(tmp_path / "metrics.jsonl", [{"step": 1}])
  for step in range(records.RECENT_FILES + 5):
    write_lines(tmp_path / "rollouts" / f"step_{step:06d}.jsonl", [{"step": step}])
  steps = [row["step"] for row in records.read_run(tmp_path).rollouts]
  assert steps == list(range(records.RECENT_FILES + 4, 4, -1))


def test_tags_and_the_answer_are_marked():
  assert gallery.highlight("<think>a<b</think><answer> 4") == (
    '<span class="tag">&lt;think&gt;</span>a&lt;b<span class="tag">&lt;/think&gt;</span>'
    '<span class="tag">&lt;answer&gt;</span><span class="answer"> 4</span>'
  )


def test_markup_escapes_all_but_markup():
  assert markup.tag("a", "<", markup.tag("b", "&"), href='"') == '<a href="&quot;">&lt;<b>&amp;</b></a>'


def test_smoothing_keeps_a_straight_line_and_thins_a_long_one():
  line = np.arange(1000.0)
  np.testing.assert_allclose(panels.smooth(line), line)
  thinned = panels.thin(records.Series(np.arange(1000), line))
  assert len(thinned) == panels.POINTS
  assert thinned.steps[-1] == 999


@pytest.mark.parametrize(
  ("seconds", "shown"), [(48.2, "48 s"), (725, "12 min 05 s"), (3 * 3600 + 7 * 60 + 3, "3 h 07 min")]
)
def test_durations(seconds, shown):
  assert style.duration(seconds) == shown


def test_the_report_is_replaced_whole(workdir):
  (workdir / "report.html").write_text("old")
  before = {path.name for path in workdir.iterdir()}
  report.write_report(workdir)
  assert {path.name for path in workdir.iterdir()} == before
  assert (workdir / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_the_picture_is_a_wide_png(workdir, tmp_path):
  path = report.save_picture(workdir, tmp_path / "docs" / "run.png")
  with Image.open(path) as image:
    assert image.format == "PNG"
    assert image.width == 2400
    assert 1200 < image.height < 2800
  assert path.stat().st_size < 1_000_000


def test_a_picture_without_rollouts(tmp_path):
  write_lines(tmp_path / "metrics.jsonl", [held_out_row(0, 1)])
  with Image.open(report.save_picture(tmp_path, tmp_path / "run.png")) as image:
    assert image.width == 2400


def test_the_picture_cuts_what_is_long():
  lines = picture.wrap(picture.response_words("<think>" + "word " * 300 + "</think><answer> 4 </answer>"), 40)
  assert len(lines) == picture.LINES
  assert lines[0][0].text == "<think>"
  assert lines[-1][-1].text == "</answer>"
  assert max(sum(len(word.text) + 1 for word in line) - 1 for line in lines) <= 40
  row = {"reference_tokens": ["token"] * 100, "reference_probs": [0.5] * 100}
  chips = picture.place_chips(row, 300.0)
  assert (chips[-1].row, chips[-1].text, chips[-1].probability) == (picture.CHIP_ROWS - 1, "…", None)
  assert all(chip.left + chip.width <= 300 for chip in chips)


@pytest.mark.parametrize(
  ("files", "message"),
  [
    (None, "no such directory"),
    ({}, r"metrics\.jsonl: no such file"),
    ({"metrics.jsonl": '{"step"'}, "no whole row"),
    ({"metrics.jsonl": '{"step": 1}\n', "config.json": "{"}, r"config\.json: not JSON"),
  ],
)
def test_wrong_input_is_one_line(tmp_path, files, message):
  workdir = tmp_path / "run"
  if files is not None:
    workdir.mkdir()
    for name, content in files.items():
      (workdir / name).write_text(content)
  with pytest.raises(errors.InputError, match=message) as caught:
    report.write_report(workdir)
  assert "\n" not in str(caught.value)


def test_the_command(workdir, tmp_path):
  command = [sys.executable, "-m", "rlpr_jax.report"]
  picture = tmp_path / "run.png"
  subprocess.run([*command, f"--workdir={workdir}", f"--picture={picture}"], check=True, cwd=ROOT)
  assert (workdir / "report.html").exists()
  assert picture.exists()
  result = subprocess.run([*command, f"--workdir={tmp_path}/none"], capture_output=True, text=True, cwd=ROOT)
  assert (result.returncode, result.stderr.count("\n")) == (2, 1)
