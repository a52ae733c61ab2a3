"""The viewer over HTTP: what it answers, what it refuses, how much it reads for an answer; and the program."""

import http.client
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.parse

import pytest

from rlpr_jax import view
from rlpr_jax.viewer.server import LIMIT, Server, Viewer
from tests.viewer.made_run import SAMPLES, lines, metrics, rollouts, write

ROOT = pathlib.Path(__file__).parents[2]
HOSTILE = '<script>alert(1)</script><img src=x onerror=alert(2)> \u202e & "quotes" </div>'


class Client:
  """Asks a viewer that runs in this process."""

  def __init__(self, workdir: pathlib.Path):
    self.viewer = Viewer(workdir)
    self.server = Server(0, self.viewer)
    threading.Thread(target=self.server.serve_forever, daemon=True).start()
    self.port = self.server.server_address[1]

  def ask(self, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
    try:
      connection.request(method, path, headers=headers)
      reply = connection.getresponse()
      return reply.status, dict(reply.headers), reply.read().decode()
    finally:
      connection.close()

  def get(self, path: str, **parameters: object) -> dict:
    status, _, content = self.ask(f"{path}?{urllib.parse.urlencode(parameters)}")
    assert status == 200, content

    def refuse(name: str) -> None:
      raise AssertionError(f"{name} is no JSON")

    return json.loads(content, parse_constant=refuse)

  def __enter__(self) -> "Client":
    return self

  def __exit__(self, *_: object) -> None:
    self.server.shutdown()
    self.server.server_close()


@pytest.fixture
def workdir(tmp_path):
  return write(tmp_path / "run")


@pytest.fixture
def client(workdir):
  with Client(workdir) as client:
    client.get("/api/run")
    yield client


def test_the_page_and_its_files_name_no_other_place(client):
  for path, kind in (("/", "text/html"), ("/page.js", "text/javascript"), ("/page.css", "text/css")):
    status, headers, content = client.ask(path)
    assert (status, headers["Content-Type"]) == (200, f"{kind}; charset=utf-8")
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "http" not in content.replace("http://www.w3.org/2000/svg", "")
  assert "<script>" not in client.ask("/")[2]
  assert "prefers-color-scheme: dark" in client.ask("/page.css")[2]


def test_what_there_is(client):
  said = client.get("/api/run")
  assert (said["name"], said["step"], said["count"], said["steps"]) == ("run", 3, 36, [1, 3])
  assert said["sources"] == ["law", "läw", "physics"]
  assert said["columns"][:3] == ["step", "reward_total", "reward_reference"]
  assert (said["behind"], said["damaged"]) == (False, 0)


def test_curves_have_every_metric_and_only_finite_values(client):
  said = client.get("/api/curves")
  assert {key for key in metrics(1) if key != "step"} <= said["series"].keys()
  assert said["series"]["reward/total"]["values"] == pytest.approx([0.1, 0.2, 0.3])
  assert said["series"]["update/loss"]["steps"] == [1, 3]  # the second was NaN
  keys = [line["key"] for theme in said["themes"] for panel in theme["panels"] for line in panel["lines"]]
  assert {"my/number", "held_out/accuracy/law"} <= set(keys)


def test_a_page_of_the_list(client):
  said = client.get("/api/rollouts", sort="-reward_reference", kept=1, limit=5)
  kept = sorted((row["reward_reference"] for step in (1, 2, 3) for row in rollouts(step) if row["kept"]), reverse=True)
  assert (said["total"], said["matched"], said["offset"]) == (36, len(kept), 0)
  assert [row["numbers"]["reward_reference"] for row in said["rows"]] == kept[:5]
  assert said["rows"][0]["question"] in {row["question"].replace("\n", " ") for row in rollouts(1)}
  further = client.get("/api/rollouts", sort="-reward_reference", kept=1, limit=5, offset=5)
  assert [row["numbers"]["reward_reference"] for row in further["rows"]] == kept[5:10]
  # The page on which one stands, as a permalink asks.
  there = client.get("/api/rollouts", sort="-reward_reference", kept=1, limit=5, id=further["rows"][2]["id"])
  assert (there["offset"], there["rows"]) == (5, further["rows"])


def test_one_rollout_in_each_colour(client):
  row = rollouts(2)[4]
  id, r = "step_000002:5", row["reward_reference"]
  shown = {color: client.get("/api/rollout", id=id, color=color)["html"] for color in ("r", "baseline", "gain")}
  assert shown["r"].count(f"<small>{r:.2f}</small>") == 3
  assert shown["baseline"].count("<small>0.30</small>") == 3
  assert shown["gain"].count(f"<small>{r - 0.3:+.2f}</small>") == 3
  assert len(set(shown.values())) == 3
  assert '<div class="text own">Because it is less dense</div>' in shown["r"]
  assert client.get("/api/rollout", id=id)["responses"] == SAMPLES
  empty, cut = (client.get("/api/rollout", id=f"step_000002:{number}")["html"] for number in (6, 8))
  assert ">empty<" in empty
  assert ">none: no &lt;answer&gt;" in cut
  assert "cut at the limit" in cut


def test_a_rollout_of_a_run_that_wrote_no_r_of_tokens_without_reasoning(workdir):
  row = {name: value for name, value in rollouts(1)[0].items() if name != "baseline_probs"}
  (workdir / "rollouts" / "step_000009.jsonl").write_text(lines([row]))
  with Client(workdir) as client:
    client.get("/api/run")
    html = client.get("/api/rollout", id="step_000009:1", color="gain")["html"]
  assert html.count("<small>—</small>") == 2
  assert "Not known" in html


def test_a_group_side_by_side(client):
  said = client.get("/api/group", id="step_000002:6")
  assert said["responses"] == SAMPLES == said["html"].count("<article")
  assert said["html"].count("Why does ice float on Water?") == 1
  assert re.findall(r'class="card chosen" data-id="([^"]+)"', said["html"]) == ["step_000002:6"]
  assert {f"step_000002:{number}" for number in (5, 6, 7, 8)} == set(re.findall(r'data-id="([^"]+)"', said["html"]))


def test_what_a_model_writes_stays_text(workdir):
  row = rollouts(1)[0] | dict.fromkeys(("source", "question", "reference", "response"), HOSTILE)
  row |= {"response": f"<answer>{HOSTILE}</answer>", "reference_tokens": [HOSTILE, "<b>"], HOSTILE: 1.0}
  (workdir / "rollouts" / "step_000009.jsonl").write_text(lines([row, row]))
  with Client(workdir) as client:
    client.get("/api/run")
    for path in ("rollout", "group"):
      html = client.get(f"/api/{path}", id="step_000009:1")["html"]
      assert "&lt;script&gt;" in html
      tags = set(re.findall(r"<(\w+)", html))
      assert tags <= {"article", "div", "span", "b", "small", "i", "u", "p"}
      assert "\u202e" not in html
    assert client.ask("/api/row?id=step_000009:1")[1]["Content-Type"] == "application/json"


@pytest.mark.parametrize(
  "path",
  [
    "/config.json", "/../config.json", "/%2e%2e/config.json", "/page.css/../../config.json", "//evil/api/run", "/api/",
    "/rollouts/step_000001.jsonl", "/api/row?id=../config:1", "/api/row?id=..%2Fconfig:1", "/api/row", "/api/row?id=:1",
    "/api/rollout?id=step_000001:99", "/[",
  ],
)  # fmt: skip
def test_nothing_else_is_there(client, path):
  assert client.ask(path)[0] == 404


@pytest.mark.parametrize(
  ("path", "said"),
  [
    ("/api/rollouts?step=x", "step=x: expected a number"),
    ("/api/rollouts?limit=0", "limit=0: expected 1 to 100"),
    ("/api/rollouts?limit=1000", "limit=1000: expected 1 to 100"),
    ("/api/rollouts?offset=-1", "offset=-1: expected a whole number"),
    ("/api/rollouts?hair=1", "hair: no rollout has such a number"),
    ("/api/rollout?id=step_000001:1&color=red", "color=red: expected one of r, baseline, gain"),
  ],
)
def test_an_address_that_cannot_be_is_said_in_one_line(client, path, said):
  status, _, content = client.ask(path)
  assert status == 400
  assert json.loads(content)["error"].startswith(said)
  assert "\n" not in json.loads(content)["error"]


def test_only_get_and_only_by_its_own_name(client):
  for method in ("POST", "PUT", "DELETE", "OPTIONS", "HEAD"):
    assert client.ask("/api/run", method)[0] == 501
  assert client.ask("/api/run", Host="evil.example:80")[0] == 403
  assert client.ask("/api/run", Host="127.0.0.1.evil.example:80")[0] == 403
  for host in ("localhost:9000", "127.0.0.1:1", "localhost"):  # through a tunnel
    assert client.ask("/api/run", Host=host)[0] == 200


def test_a_run_that_goes_on(client, workdir):
  before = client.get("/api/run")
  with (workdir / "metrics.jsonl").open("a") as file:
    file.write(lines([metrics(4)]) + '{"step": 5, "rew')
  (workdir / "rollouts" / "step_000004.jsonl").write_text(lines(rollouts(4)))
  after = client.get("/api/run")
  assert (after["step"], after["count"], after["damaged"]) == (4, 48, 0)
  assert after["curves"] > before["curves"]
  assert after["rollouts"] > before["rollouts"]
  assert client.get("/api/curves")["series"]["reward/total"]["steps"] == [1, 2, 3, 4]
  assert client.get("/api/rollouts")["rows"][0]["id"] == "step_000004:1"
  # The run begins anew.
  (workdir / "metrics.jsonl").write_text(lines([metrics(1)]))
  for path in (workdir / "rollouts").iterdir():
    path.unlink()
  anew = client.get("/api/run")
  assert (anew["step"], anew["count"], anew["steps"]) == (1, 0, None)
  assert client.get("/api/rollouts", id="step_000001:1")["rows"] == []


def test_a_run_without_anything_yet(tmp_path):
  (tmp_path / "config.json").write_text("{}")
  with Client(tmp_path) as client:
    said = client.get("/api/run")
    assert (said["step"], said["count"], said["age"]) == (None, 0, None)
    assert client.get("/api/rollouts", kept=1, sort="-reward_total", q="x")["rows"] == []
    assert client.get("/api/curves")["series"] == {}


def test_what_is_shown_is_all_that_is_read(tmp_path):
  """Counted, of 12,000 rollouts: once the index is there, an answer parses what it shows, and nothing is read twice."""
  client = Client(write(tmp_path / "run", steps=10, prompts=300))
  size = sum(path.stat().st_size for path in (tmp_path / "run" / "rollouts").iterdir())
  longest = 2 * size / 12_000
  with client:
    assert client.get("/api/run")["count"] == 12_000
    index = client.viewer.index
    assert index.read_bytes == size
    client.get("/api/run")
    assert index.read_bytes == size

    def cost(path: str, **parameters: object) -> tuple[int, int]:
      rows, read = index.rows_read, index.read_bytes
      client.get(path, **parameters)
      return index.rows_read - rows, index.read_bytes - read

    for parameters in (
      {},
      {"sort": "-reward_total", "offset": 5_000},
      {"sort": "length", "kept": 0, "empty": 1, "source": "law"},
      {"step": "3..7", "gain": "0..", "id": "step_000005:700"},
    ):
      rows, read = cost("/api/rollouts", **parameters)
      assert 0 < rows <= LIMIT
      assert read <= LIMIT * longest
    assert cost("/api/rollout", id="step_000004:9")[0] == 1
    assert cost("/api/group", id="step_000004:9")[0] == SAMPLES + 1
    # Words are looked for once in everything, and not again for the next page of what was found.
    rows, read = cost("/api/rollouts", q="water")
    assert rows <= LIMIT
    assert size <= read <= size + LIMIT * longest
    assert cost("/api/rollouts", q="water", offset=100)[1] <= LIMIT * longest


# --- the program ---


def start(workdir: pathlib.Path, *words: str) -> tuple[subprocess.Popen, str]:
  command = [sys.executable, "-m", "rlpr_jax", "view", f"--workdir={workdir}", *words]
  program = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  return program, program.stdout.readline()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_program_serves_until_it_is_told_to_stop(workdir, number):
  program, said = start(workdir)
  try:
    port = int(re.search(r"http://127\.0\.0\.1:(\d+)/ ", said)[1])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/api/run")
    assert json.loads(connection.getresponse().read())["count"] == 36
    program.send_signal(number)  # the connection stays open meanwhile
    assert program.wait(60) == 0
    assert program.stderr.read() == ""
  finally:
    program.kill()
    program.communicate()
  assert not any(path.name not in ("config.json", "metrics.jsonl", "rollouts") for path in workdir.iterdir())


def test_it_needs_neither_jax_nor_what_draws_the_report():
  code = "import sys, rlpr_jax.view; print(*{'jax', 'matplotlib', 'transformers', 'uvicorn'} & set(sys.modules))"
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
  assert done.stdout.strip() == ""


def test_wrong_input_is_one_line(tmp_path, workdir, capsys):
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    for words, expected in (
      ([], "--workdir: missing, expected the run's directory"),
      ([f"--workdir={tmp_path / 'nothing'}"], f"--workdir: {tmp_path / 'nothing'} holds no run"),
      ([f"--workdir={workdir}", f"--port={port}"], f"--port {port}: cannot be listened on (Address already in use)"),
      ([f"--workdir={workdir}", "--port=70000"], "--port 70000: cannot be listened on"),
      ([f"--workdir={workdir}", "more"], "more: unexpected argument"),
    ):
      with pytest.raises(SystemExit) as done:
        view.main(["rlpr view", *words])
      assert done.value.code == 2
      said = capsys.readouterr().err
      assert said.startswith(f"error: {expected}")
      assert said.count("\n") == 1


def test_the_browser_is_opened_where_it_is_asked_for(workdir, tmp_path, monkeypatch):
  told = tmp_path / "told"
  browser = tmp_path / "browser.sh"
  browser.write_text(f'#!/bin/sh\necho "$1" > {told}.part && mv {told}.part {told}\n')
  browser.chmod(0o755)
  monkeypatch.setitem(os.environ, "BROWSER", f"{browser} %s")
  program, said = start(workdir, "--browser")
  try:
    for _ in range(600):
      if told.exists():
        break
      threading.Event().wait(0.1)
    assert told.read_text().strip() in said
  finally:
    program.kill()
    program.communicate()
