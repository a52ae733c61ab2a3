"""Which rollouts an address finds, against the same asked of the files by hand; and how much is read for it."""

import json
import urllib.parse

import numpy as np
import pytest

from rlpr_jax.errors import InputError
from rlpr_jax.viewer.index import Index
from rlpr_jax.viewer.query import Searches, order, read_query, select
from tests.viewer.made_run import lines, rollouts, write


@pytest.fixture(scope="module")
def index(tmp_path_factory):
  made = Index(write(tmp_path_factory.mktemp("query") / "run", steps=6) / "rollouts")
  made.look()
  return made


ROWS = [row for step in range(1, 7) for row in rollouts(step)]


def found(index, address, most=10**9):
  """Places of rollouts, in order."""
  query, table = read_query(urllib.parse.parse_qs(address, keep_blank_values=True)), index.table()
  places = select(table, query)
  if query.words:
    places, waiting = Searches(index).search(places, query.words, most)
    assert waiting == 0
  return order(table, places, query).tolist()


@pytest.mark.parametrize(
  ("address", "wanted"),
  [
    ("", lambda row: True),
    ("step=3", lambda row: row["step"] == 3),
    ("step=2..4", lambda row: 2 <= row["step"] <= 4),
    ("step=5..", lambda row: row["step"] >= 5),
    ("reward_reference=..0.4", lambda row: row["reward_reference"] <= 0.4),
    ("source=law", lambda row: row["source"] == "law"),
    ("source=law&source=l%C3%A4w", lambda row: row["source"] in ("law", "läw")),
    ("source=none", lambda row: False),
    ("kept=1&truncated=0", lambda row: row["kept"] and row["finish"] == "eos"),
    ("scorable=0", lambda row: not row["scorable"]),
    ("length=22..&gain=0..", lambda row: row["length"] >= 22 and row["reward_reference"] >= 0.3),
    ("reward_total=-1..2", lambda row: row["scorable"]),  # NaN is in no range
  ],
)
def test_what_is_asked_for_is_found(index, address, wanted):
  expected = {place for place, row in enumerate(ROWS) if wanted(row)}
  places = found(index, address)
  assert set(places) == expected
  assert len(places) == len(expected)


def test_the_order(index):
  assert [ROWS[place]["step"] for place in found(index, "")] == sorted((row["step"] for row in ROWS), reverse=True)
  assert found(index, "sort=step") == list(range(len(ROWS)))  # what is equal stays as it was written
  places = found(index, "sort=-reward_total")
  rewards = [ROWS[place]["reward_total"] for place in places if ROWS[place]["scorable"]]
  assert rewards == sorted(rewards, reverse=True)
  for sort in ("reward_total", "-reward_total"):  # those without a reward come last either way
    assert not any(ROWS[place]["scorable"] for place in found(index, f"sort={sort}")[len(rewards) :])


@pytest.mark.parametrize(
  "words",
  [
    "water", "WATER on", "51", "zürich", "ZÜRICH", 'und "warum"', "hauptstadt?\nund", "step 3 sample", "<answer>",
    "so on and", "reward", "question", "\\u", "no such words", "ß", "no 2",
  ],
)  # fmt: skip
def test_a_search_finds_what_the_texts_have_and_no_names_of_fields(index, words):
  texts = [[row["question"], row["reference"], row["response"]] for row in ROWS]
  expected = {place for place, some in enumerate(texts) if any(words.lower() in text.lower() for text in some)}
  assert set(found(index, urllib.parse.urlencode({"q": words}))) == expected


def test_letters_that_json_does_not_spell_out(tmp_path):
  (tmp_path / "a.jsonl").write_text(json.dumps({"response": "Überall 水"}, ensure_ascii=False) + "\n", encoding="utf-8")
  index = Index(tmp_path)
  index.look()
  for words, count in (("überall", 1), ("水", 1), ("berall", 1), ("火", 0)):
    assert len(found(index, urllib.parse.urlencode({"q": words, "sort": "exact"}))) == count


def test_a_search_goes_on_where_it_stood_and_then_reads_nothing(tmp_path):
  directory = write(tmp_path / "run", steps=8) / "rollouts"
  index = Index(directory)
  index.look()
  everything, size = np.arange(len(index.table())), (directory / "step_000008.jsonl").stat().st_size
  searches, before = Searches(index), index.read_bytes
  hits, waiting = searches.search(everything, "water", size)
  assert 0 < len(hits) < waiting
  assert min(index.table().columns["step"][hits]) > 6  # the newest first
  while waiting:
    hits, waiting = searches.search(everything, "water", size)
  total = sum(file.stat().st_size for file in directory.iterdir())
  assert index.read_bytes - before <= total
  before = index.read_bytes
  again, _ = searches.search(everything, "water", size)
  assert again.tolist() == hits.tolist()
  assert index.read_bytes == before
  # A new file is all that is read then.
  (directory / "step_000009.jsonl").write_text(lines(rollouts(9)))
  index.look()
  before = index.read_bytes
  more, _ = searches.search(np.arange(len(index.table())), "water")
  assert len(more) == len(hits) + 4
  assert index.read_bytes - before <= (directory / "step_000009.jsonl").stat().st_size
  # And one that was replaced is searched anew.
  (directory / "step_000001.jsonl").write_text(lines([rollouts(1)[0] | {"response": "water"}]))
  index.look()
  assert len(searches.search(np.arange(len(index.table())), "water")[0]) == len(more) - 4 + 1


@pytest.mark.parametrize(
  ("address", "said"),
  [
    ("step=a", "step=a: expected a number, or a range"),
    ("step=1..b", "step=1..b: expected"),
    ("color_of_hair=1", "color_of_hair: no rollout has such a number, expected one of answered, "),
    ("sort=-nothing", "nothing: no rollout has such a number"),
  ],
)
def test_an_address_that_cannot_be(index, address, said):
  with pytest.raises(InputError) as caught:
    found(index, address)
  assert str(caught.value).startswith(said)


def test_without_rollouts_any_address_finds_none(tmp_path):
  index = Index(tmp_path / "nowhere")
  index.look()
  assert found(index, "shadow_x=1&q=water&sort=shadow_x&source=law") == []
