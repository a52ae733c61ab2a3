"""The viewer's page in a real browser: Chromium without a window, driven by playwright."""

import contextlib
import re
import shutil
import threading

import pytest

from rlpr_jax.viewer.server import Server, Viewer
from tests.viewer.made_run import lines, metrics, rollouts, write

playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]
PATIENCE = 120_000  # milliseconds: a machine that is busy draws slowly
HOSTILE = "<img src=x onerror='document.body.id=`hacked`'><script>document.body.id='hacked'</script>"
STEPS = 30
ONE = "view=rollouts&id=step_000003:6"


@pytest.fixture(scope="module")
def browser():
  with playwright.sync_playwright() as driver:
    started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    yield started
    started.close()


@pytest.fixture
def workdir(tmp_path):
  return write(tmp_path / "run", steps=STEPS, prompts=3)


@pytest.fixture
def visit(browser, workdir):
  """Opens addresses of the page; in the end nothing was asked of another place, and nothing went wrong in the page."""
  server = Server(0, Viewer(workdir))
  threading.Thread(target=server.serve_forever, daemon=True).start()
  with contextlib.ExitStack() as contexts:

    def open_page(query: str = "", **settings):
      context = browser.new_context(**settings)
      contexts.callback(context.close)
      page = context.new_page()
      page.set_default_timeout(PATIENCE)
      page.on("request", lambda request: asked.append(request.url))
      page.on("pageerror", lambda error: trouble.append(str(error)))
      page.on("console", lambda message: trouble.append(message.text) if message.type == "error" else None)
      page.goto(f"{server.address}{query}")
      return page

    asked, trouble = [], []
    expect.set_options(timeout=PATIENCE)
    yield open_page
  server.shutdown()
  server.server_close()
  assert asked
  assert all(url.startswith((server.address, "data:")) for url in asked)
  assert trouble == []


def chosen(page):
  return page.locator("#rows tr[aria-selected=true]")


def wait_for_card(page, id):
  """Until the rollout of that id is chosen, in the list and in the address."""
  expect(chosen(page)).to_have_attribute("data-id", id)
  expect(page).to_have_url(re.compile(f"id={id.replace(':', '%3A')}"))


def test_curves_show_the_values_at_the_pointer_and_lead_to_rollouts(visit):
  page = visit()
  panel = page.locator("figure", has=page.locator("figcaption", has_text="Total reward"))
  expect(panel.locator("b")).to_have_text(f"{0.1 * STEPS:.3g}")
  box = panel.locator("svg").bounding_box()
  page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] * 0.5)
  expect(panel.locator("em")).to_have_text(re.compile(r"step 1[2-7]$"))
  step = int(panel.locator("em").inner_text().split()[1])
  expect(panel.locator("b")).to_have_text(f"{0.1 * step:.3g}")
  # The same step in another panel, of a metric that the viewer does not know.
  other = page.locator("figure[data-keys='my/number']")
  expect(other.locator("em")).to_have_text(f"step {step}")
  expect(other.locator("b")).to_have_text(f"{2 * step}")
  page.keyboard.press("/")
  page.keyboard.type("my/num")
  expect(page.locator("figure:visible")).to_have_count(1)
  expect(page).to_have_url(re.compile("find=my"))
  page.locator("#find").fill("")
  panel.locator("svg").click(position={"x": box["width"] * 0.5, "y": box["height"] * 0.5})
  expect(page).to_have_url(re.compile(rf"view=rollouts&step={step}$"))
  expect(page.locator("#rows tr")).to_have_count(12)
  page.go_back()
  expect(page.locator("#curves")).to_be_visible()


def test_rollouts_by_keyboard_and_permalinks(visit):
  page = visit("?view=rollouts&sort=step")
  expect(page.locator("#rows tr").first).to_have_attribute("data-id", "step_000001:1")
  page.keyboard.press("j")
  wait_for_card(page, "step_000001:1")
  page.keyboard.press("j")
  wait_for_card(page, "step_000001:2")
  page.keyboard.press("J")
  wait_for_card(page, "step_000001:5")  # the next prompt's
  page.keyboard.press("k")
  wait_for_card(page, "step_000001:4")
  page.keyboard.press("J")
  card = page.locator("#card")
  expect(card.locator(".question")).to_have_text("Why does ice float on Water?")
  expect(card.locator(".own")).to_have_text("Because it is less dense")
  r = rollouts(1)[4]["reward_reference"]
  expect(card.locator(".token small").first).to_have_text(f"{r:.2f}")
  page.keyboard.press("c")
  expect(card.locator(".token small").first).to_have_text("0.30")
  page.keyboard.press("c")
  expect(card.locator(".token small").first).to_have_text(f"{r - 0.3:+.2f}")
  page.keyboard.press("g")
  expect(card.locator("article")).to_have_count(4)
  expect(card.locator("article.chosen")).to_have_attribute("data-id", "step_000001:5")
  again = visit(page.url.partition("/?")[2].join(["?", ""]))
  wait_for_card(again, "step_000001:5")
  expect(again.locator("#card article")).to_have_count(4)
  expect(again.locator("#card article.chosen .token small").first).to_have_text(f"{r - 0.3:+.2f}")
  page.keyboard.press("Escape")
  expect(page.locator("#detail")).to_be_hidden()
  page.keyboard.press("?")
  expect(page.locator("dialog")).to_be_visible()


def test_filters_order_and_search(visit):
  page = visit("?view=rollouts")
  first, summary = page.locator("#rows tr").first, page.locator("#summary")
  expect(first).to_have_attribute("data-id", f"step_{STEPS:06d}:1")
  page.select_option("[name=empty]", "1")
  expect(summary).to_contain_text(f"{3 * STEPS} of {12 * STEPS} rollouts")
  page.select_option("[name=source]", "law")
  expect(summary).to_contain_text(f"{STEPS} of {12 * STEPS} rollouts")
  page.click("button[type=reset]")
  expect(summary).to_contain_text(f"{12 * STEPS} rollouts")
  page.select_option("[name=column]", "reward_reference")
  page.fill("[name=least]", "0.7")
  page.press("[name=least]", "Enter")
  high = [row for step in range(1, STEPS + 1) for row in rollouts(step) if row["reward_reference"] >= 0.7]
  expect(summary).to_contain_text(f"{len(high)} of {12 * STEPS} rollouts")
  page.click("#ranges button")
  page.click("th button:has-text('reward')")
  best = max(row["reward_total"] for step in range(1, STEPS + 1) for row in rollouts(step) if row["scorable"])
  expect(first.locator("td").nth(5)).to_have_text(f"{best:.2f}")
  page.keyboard.press("/")
  page.keyboard.type("step 12 sample")
  expect(summary).to_contain_text(f"9 of {12 * STEPS} rollouts")  # of twelve, those that are not cut off
  expect(page).to_have_url(re.compile(r"q=step\+12\+sample"))
  page.keyboard.press("Escape")
  page.keyboard.press("j")
  expect(page.locator("#card .box")).to_contain_text("step 12 sample")


def test_the_list_goes_on_where_it_is_read(visit):
  page = visit("?view=rollouts&sort=step&id=step_000020%3A1")
  wait_for_card(page, "step_000020:1")  # the 229th: on the third page of a hundred
  for _ in range(29):
    page.keyboard.press("k")
  wait_for_card(page, "step_000017:8")  # the 200th, on the page before
  expect(page.locator("#earlier")).to_be_visible()


def test_a_run_that_goes_on_is_followed(visit, workdir):
  page = visit("?view=rollouts")
  expect(page.locator("#rows tr").first).to_have_attribute("data-id", f"step_{STEPS:06d}:1")
  new = STEPS + 1
  with (workdir / "metrics.jsonl").open("a") as file:
    file.write(lines([metrics(new)]))
  (workdir / "rollouts" / f"step_{new:06d}.jsonl").write_text(lines(rollouts(new)))
  expect(page.locator("#news")).to_be_visible()
  expect(page.locator("#status")).to_contain_text(f"step {new}")
  page.keyboard.press("r")
  expect(page.locator("#rows tr").first).to_have_attribute("data-id", f"step_{new:06d}:1")
  page.keyboard.press("1")
  panel = page.locator("figure[data-keys='my/number']")
  expect(panel.locator("b")).to_have_text(f"{2 * new}")
  with (workdir / "metrics.jsonl").open("a") as file:
    file.write(lines([metrics(new + 1)]))
  expect(panel.locator("b")).to_have_text(f"{2 * new + 2}")


def test_what_a_model_writes_does_nothing(visit, workdir):
  row = rollouts(1)[0] | dict.fromkeys(("source", "question", "reference", "response"), HOSTILE)
  row |= {"response": f"<answer>{HOSTILE}</answer>", "reference_tokens": [HOSTILE, "x"], f"reward_{HOSTILE}": 1.0}
  (workdir / "rollouts" / "step_000099.jsonl").write_text(lines([row, row]))
  with (workdir / "metrics.jsonl").open("a") as file:
    file.write(lines([{"step": 99, HOSTILE: 1.0, f"held_out/accuracy/{HOSTILE}": 0.5}]))
  page = visit("?view=rollouts&id=step_000099:1")
  expect(page.locator("#card .box")).to_contain_text("hacked")
  page.keyboard.press("g")
  expect(page.locator("#card article")).to_have_count(2)
  page.keyboard.press("1")
  expect(page.locator("#themes")).to_contain_text("hacked")
  assert page.locator("body").get_attribute("id") is None
  assert page.locator("main script, main img").count() == 0


@pytest.mark.parametrize(
  "query", ["", "?view=rollouts", "?view=rollouts&id=step_000003:6", "?view=rollouts&id=step_000003:6&group=1"]
)
def test_on_a_phone_and_in_the_dark(visit, query):
  page = visit(query, viewport={"width": 360, "height": 740}, color_scheme="dark")
  expect(page.locator("figure:visible, #rows tr:visible, #card article:visible").first).to_be_visible()
  assert page.locator("body").evaluate("body => body.ownerDocument.documentElement.scrollWidth") <= 360
  red, green, blue = map(
    int, re.findall(r"\d+", page.locator("body").evaluate("body => getComputedStyle(body).backgroundColor"))
  )
  assert red + green + blue < 120
  if "id=" in query:
    page.click("#back")
    expect(page.locator("#rows tr").first).to_be_visible()


def test_a_run_that_has_just_begun(visit, workdir):
  (workdir / "metrics.jsonl").unlink()
  for path in (workdir / "rollouts").iterdir():
    path.unlink()
  page = visit()
  expect(page.locator("#themes")).to_contain_text("No metrics yet")
  page.keyboard.press("2")
  expect(page.locator("#summary")).to_contain_text("none were written yet")
  (workdir / "rollouts" / "step_000001.jsonl").write_text(lines(rollouts(1)))
  expect(page.locator("#rows tr")).to_have_count(12)
