// The page of `rlpr view`. The address holds all that is chosen; the server says what there is to show.
"use strict";

const $ = (id) => document.getElementById(id);
const OWN = ["view", "find", "group", "id", "color"]; // parameters of the page itself: the rest chooses the list
const COLORS = { r: "r", baseline: "r′", gain: "r − r′" };
const YES_NO = ["kept", "truncated", "empty", "exact", "scorable"];
const WAIT = 2000; // milliseconds between two questions whether there is anything new

let state = new URLSearchParams(location.search);
let run = null; // the last answer of api/run
let curves = null; // the last answer of api/curves
let list = { rows: [], offset: 0, matched: 0, version: -1, asked: 0 };
let drawAfter = 0; // milliseconds of this page's life: curves that take long to make are asked for less often
let pending = null; // of a typed field, until the typing pauses

// --- what is chosen

const view = () => state.get("view") || "curves";
const color = () => (state.get("color") in COLORS ? state.get("color") : "r");
const chosen = () => state.get("id");

function choose(changes, push = false) {
  for (const [name, value] of Object.entries(changes)) {
    if (value === null || value === "") state.delete(name);
    else state.set(name, value);
  }
  history[push ? "pushState" : "replaceState"](null, "", `${location.pathname}${String(state) && `?${state}`}`);
}

function query(extra = {}) {
  const asked = new URLSearchParams(state);
  OWN.forEach((name) => asked.delete(name));
  for (const [name, value] of Object.entries(extra)) asked.set(name, value);
  return asked;
}

// --- small things

async function ask(path) {
  const reply = await fetch(path);
  const content = await reply.json();
  if (!reply.ok) throw new Error(content.error || reply.statusText);
  return content;
}

function make(name, properties = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key in node) node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

function draw(name, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function compact(value) {
  if (Math.abs(value) >= 1000) return value.toLocaleString("en", { maximumFractionDigits: 0 });
  return String(Number(value.toPrecision(3)));
}

const plural = (count, what) => `${count.toLocaleString("en")} ${what}${count === 1 ? "" : "s"}`;

function age(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s ago`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  return seconds < 129600 ? `${Math.round(seconds / 3600)} h ago` : `${Math.round(seconds / 86400)} days ago`;
}

// --- curves

const WIDTH = 320, HEIGHT = 160, LEFT = 40, RIGHT = 14, TOP = 8, BOTTOM = 18;
let drawn = []; // functions that show the values of a step in a panel, or the last ones for null

function ticks(low, high, most, whole) {
  const rough = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  let step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  if (whole) step = Math.max(1, Math.round(step));
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
  return found;
}

function interpolate(series, step) {
  const { steps, values } = series;
  if (!steps.length) return 0;
  const at = steps.findIndex((other) => other >= step);
  if (at < 0) return values[values.length - 1];
  if (at === 0 || steps[at] === step) return values[at];
  const part = (step - steps[at - 1]) / (steps[at] - steps[at - 1]);
  return values[at - 1] + part * (values[at] - values[at - 1]);
}

function nearest(steps, step) {
  let best = 0;
  steps.forEach((other, i) => { if (Math.abs(other - step) < Math.abs(steps[best] - step)) best = i; });
  return best;
}

function stack(lines, all) {
  // Areas of the parts of a whole; the last line's is what the parts leave of it.
  const parts = lines.slice(0, -1).map((line) => all.steps.map((step) => interpolate(line.series, step)));
  parts.push(all.values.map((value, i) => Math.max(value - parts.reduce((sum, part) => sum + part[i], 0), 0)));
  let below = all.steps.map(() => 0);
  return parts.map((part) => {
    const above = part.map((value, i) => value + below[i]);
    const area = { below, above };
    below = above;
    return area;
  });
}

function drawPanel(panel, series) {
  if (!panel.lines.length) return null; // of domains, where none was evaluated
  const none = { steps: [], values: [], smooth: null };
  const lines = panel.lines.map((line) => ({ ...line, series: series[line.key] || none }));
  const shown = lines.filter((line) => line.series.steps.length);
  const whole = lines[lines.length - 1].series;
  if (panel.stacked ? !whole.steps.length : !shown.length) return null;
  const areas = panel.stacked ? stack(lines, whole) : null;
  const steps = [...new Set((panel.stacked ? [{ series: whole }] : shown).flatMap((line) => line.series.steps))]
    .sort((a, b) => a - b);
  const values = areas ? [0, ...areas[areas.length - 1].above] : shown.flatMap((line) => line.series.values);
  let low = Math.min(...values), high = Math.max(...values);
  const room = (high - low || Math.abs(high) || 1) * 0.08;
  [low, high] = [areas ? 0 : low - room, high + room];
  const first = steps[0], last = Math.max(steps[steps.length - 1], first + 1);
  const x = (step) => LEFT + ((step - first) / (last - first)) * (WIDTH - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - ((value - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  const path = (of, at) => of.map((step, i) => `${i ? "L" : "M"}${x(step).toFixed(1)} ${y(at[i]).toFixed(1)}`).join("");

  const svg = draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": panel.title });
  for (const value of ticks(low, high, 4, panel.whole)) {
    svg.append(draw("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }));
    svg.append(draw("text", { x: LEFT - 4, y: y(value) + 3, "text-anchor": "end" }, compact(value)));
  }
  for (const step of ticks(first, last, 5, true)) {
    svg.append(draw("text", { x: x(step), y: HEIGHT - 6, "text-anchor": "middle" }, compact(step)));
  }
  svg.append(draw("line", { class: "axis", x1: LEFT, x2: WIDTH - RIGHT, y1: HEIGHT - BOTTOM, y2: HEIGHT - BOTTOM }));
  lines.forEach((line, i) => {
    if (areas) {
      const { above, below } = areas[i];
      const back = path([...whole.steps].reverse(), [...below].reverse()).replace("M", "L");
      svg.append(draw("path", { d: `${path(whole.steps, above)}${back}Z`, style: `fill: ${line.color}`,
        opacity: 0.85 }));
      return;
    }
    const { steps: of, values: at, smooth } = line.series;
    const style = `fill: none; stroke: ${line.color}`;
    if (smooth) svg.append(draw("path", { d: path(of, at), style, opacity: 0.3, "stroke-width": 0.8 }));
    svg.append(draw("path", { d: path(of, smooth || at), style, "stroke-width": 1.7 }));
    if (!smooth && of.length < 24) {
      of.forEach((step, j) => svg.append(
        draw("circle", { cx: x(step), cy: y(at[j]), r: 2.4, style: `fill: ${line.color}` })));
    }
  });
  const mark = draw("line", { class: "at", y1: TOP, y2: HEIGHT - BOTTOM });
  svg.append(mark);

  const where = make("em");
  const numbers = lines.map(() => make("b"));
  const legend = make("span", { className: "legend" }, ...lines.map((line, i) =>
    line.series.steps.length || (areas && i === lines.length - 1)
      ? make("span", { title: line.key }, make("i", { style: `background: ${line.color}` }),
        `${line.label} `, numbers[i])
      : null));
  const show = (step) => {
    const at = step === null ? null : steps[nearest(steps, step)];
    const near = at !== null && step >= first && step <= last;
    where.textContent = near ? ` step ${compact(at)}` : ` ${panel.unit}`;
    mark.style.visibility = near ? "visible" : "";
    if (near) { mark.setAttribute("x1", x(at)); mark.setAttribute("x2", x(at)); }
    lines.forEach((line, i) => {
      const of = line.series.steps;
      if (!of.length) return;
      const place = near ? nearest(of, at) : of.length - 1;
      const value = areas && i === lines.length - 1
        ? areas[i].above[place] - areas[i].below[place] : line.series.values[place];
      numbers[i].textContent = compact(value);
    });
  };
  const stepAt = (event) => {
    const box = svg.getBoundingClientRect();
    const part = ((event.clientX - box.left) / box.width) * WIDTH;
    return steps[nearest(steps, first + ((part - LEFT) / (WIDTH - LEFT - RIGHT)) * (last - first))];
  };
  svg.addEventListener("pointermove", (event) => drawn.forEach((other) => other(stepAt(event))));
  svg.addEventListener("pointerleave", () => drawn.forEach((other) => other(null)));
  svg.addEventListener("click", (event) => {
    const step = stepAt(event);
    if (run.steps && step > 0) {
      choose({ view: "rollouts", step: String(step), id: null }, true);
      render();
    }
  });
  show(null);
  drawn.push(show);
  const title = make("strong", {}, panel.title, where);
  return make("figure", { "data-keys": panel.lines.map((line) => line.key).join(" ") },
    make("figcaption", {}, title, legend), svg);
}

function renderCurves() {
  if (!curves) return;
  drawn = [];
  const sections = [];
  for (const theme of curves.themes) {
    const figures = theme.panels.map((panel) => drawPanel(panel, curves.series)).filter(Boolean);
    if (!figures.length) continue;
    const together = make("div", { className: "panels" }, ...figures);
    sections.push(make("section", {}, make("h2", {}, theme.title), together));
  }
  if (!sections.length) {
    sections.push(make("p", { className: "muted empty" }, "No metrics yet: they come with the first step."));
  }
  $("themes").replaceChildren(...sections);
  findMetrics();
}

function findMetrics() {
  const words = (state.get("find") || "").toLowerCase();
  let count = 0;
  for (const section of $("themes").querySelectorAll("section")) {
    let any = false;
    for (const figure of section.querySelectorAll("figure")) {
      const text = `${figure.dataset.keys} ${figure.querySelector("figcaption").textContent}`.toLowerCase();
      figure.hidden = !text.includes(words);
      any = any || !figure.hidden;
      count += !figure.hidden;
    }
    section.hidden = !any;
  }
  $("found").textContent = words ? plural(count, "panel") : "";
}

// --- filters

function option(value, label) { return make("option", { value }, label); }

function fillFilters() {
  const form = $("form");
  const keep = (select, options) => {
    const value = select.value;
    select.replaceChildren(...options);
    select.value = value;
  };
  const columns = run.columns.map((name) => option(name, name.replace(/^reward_/, "reward: ").replaceAll("_", " ")));
  keep(form.source, [option("", "all"), ...run.sources.map((name) => option(name, name))]);
  keep(form.sort, columns.map((each) => each.cloneNode(true)));
  keep(form.column, columns.filter((each) => !["step", ...YES_NO].includes(each.value)));
  if (!form.column.value && form.column.options.length) form.column.selectedIndex = 0;
}

function sortOf() {
  const sort = state.get("sort") || "-step";
  return { column: sort.replace(/^-/, ""), down: sort.startsWith("-") };
}

function showFilters() {
  const form = $("form"), { column, down } = sortOf();
  const [from, to] = (state.get("step") || "").split("..");
  const values = { q: state.get("q"), source: state.get("source"), from, to: to === undefined ? from : to };
  YES_NO.forEach((name) => { values[name] = state.get(name); });
  for (const [name, value] of Object.entries(values)) {
    if (form[name] !== document.activeElement) form[name].value = value || "";
  }
  form.sort.value = column;
  $("direction").textContent = down ? "↓ highest first" : "↑ lowest first";
  const special = [...OWN, ...YES_NO, "q", "source", "step", "sort"];
  $("ranges").replaceChildren(...[...state].filter(([name]) => !special.includes(name)).map(([name, value]) =>
    make("button", { type: "button", title: "Take this filter away", onclick: () => refilter({ [name]: null }) },
      `${name.replaceAll("_", " ")} ${value.replace("..", " … ")} ✕`)));
  const count = [...query()].filter(([name]) => name !== "sort").length;
  $("active").textContent = count ? `${count} set` : "";
}

function refilter(changes) {
  choose({ ...changes, id: null });
  showFilters();
  loadList();
}

function range(from, to) {
  if (!from && !to) return null;
  return from === to ? from : `${from}..${to}`;
}

function readForm(event) {
  const form = $("form"), name = event.target.name;
  const changes = { q: form.q.value, source: form.source.value,
    step: range(form.from.value.trim(), form.to.value.trim()) };
  YES_NO.forEach((each) => { changes[each] = form[each].value; });
  if (name === "sort") changes.sort = `-${form.sort.value}`;
  if (["column", "least", "most"].includes(name)) return;
  clearTimeout(pending);
  pending = setTimeout(() => refilter(changes), event.type === "input" && event.target.tagName === "INPUT" ? 250 : 0);
}

// --- the list

const COLUMNS = [
  ["step", "step", "number"],
  [null, "question", "question line"],
  [null, "own answer / reference", "line words-only"],
  ["reward_reference", "r", "number narrow words-only"],
  ["reward_baseline", "r′", "number narrow words-only"],
  ["reward_total", "reward", "number"],
  ["length", "tokens", "number narrow words-only"],
  [null, "", "marks words-only"],
];

function renderHead() {
  const { column, down } = sortOf();
  $("list").querySelector("thead").replaceChildren(make("tr", {}, ...COLUMNS.map(([name, label, kind]) => {
    if (!name || !run.columns.includes(name)) return make("th", { className: kind }, label);
    const arrow = name === column ? (down ? " ↓" : " ↑") : "";
    const turn = () => refilter({ sort: name === column && down ? name : `-${name}` });
    return make("th", { className: kind }, make("button", { type: "button", onclick: turn }, label + arrow));
  })));
}

function marks(row) {
  const { kept, truncated, empty, exact, answered } = row.numbers;
  const found = [];
  if (exact) found.push(["exact", "good"]);
  if (truncated) found.push(["cut", "warn"]);
  if (empty) found.push(["empty", "warn"]);
  else if (answered === 0) found.push(["no answer", "warn"]);
  if (kept === 0) found.push(["dropped", ""]);
  return found.map(([label, kind]) => make("span", { className: `badge ${kind}` }, label));
}

function rowNode(row, before) {
  const number = (name) => (name in row.numbers ? row.numbers[name] : null);
  const shown = (name) => (number(name) === null ? "—" : number(name).toFixed(2));
  const cells = [
    String(number("step") ?? "—"), row.question, row.answer === null ? "—" : `${row.answer} / ${row.reference}`,
    shown("reward_reference"), shown("reward_baseline"), shown("reward_total"), String(number("length") ?? "—"),
  ];
  const nodes = cells.map((text, i) =>
    make("td", { className: COLUMNS[i][2], title: text.length > 20 ? text : "" }, text));
  nodes[2].title = "own answer / reference";
  nodes.push(make("td", { className: "marks words-only" }, ...marks(row)));
  return make("tr", {
    "data-id": row.id, "aria-selected": String(row.id === chosen()),
    className: before && before.group !== row.group ? "other" : "", onclick: () => open(row.id, true),
  }, ...nodes);
}

function renderRows() {
  renderHead();
  $("rows").replaceChildren(...list.rows.map((row, i) => rowNode(row, list.rows[i - 1])));
  $("earlier").hidden = !list.offset;
  $("more").hidden = list.offset + list.rows.length >= list.matched;
}

function say(reply) {
  const means = [["reward_total", "reward"], ["gain", "r − r′"], ["length", "tokens"]]
    .filter(([name]) => reply.means[name] !== null).map(([name, label]) => `${label} ${compact(reply.means[name])}`);
  const parts = [reply.matched === reply.total ? plural(reply.total, "rollout")
    : `${reply.matched.toLocaleString("en")} of ${plural(reply.total, "rollout")}`];
  if (means.length && reply.matched) parts.push(`in the mean ${means.join(", ")}`);
  if (reply.waiting) parts.push(`searching: ${reply.waiting.toLocaleString("en")} left`);
  if (!reply.total) parts.push(run.behind ? "reading them" : "none were written yet");
  $("summary").textContent = parts.join(" · ");
}

async function loadList(place = "start") {
  const asked = ++list.asked;
  const extra = {};
  if (place === "start" && chosen()) extra.id = chosen();
  if (place === "more") extra.offset = list.offset + list.rows.length;
  if (place === "earlier") {
    extra.offset = Math.max(list.offset - 100, 0);
    extra.limit = list.offset - extra.offset;
  }
  try {
    let reply;
    do { // a search goes on where it stood
      reply = await ask(`api/rollouts?${query(extra)}`);
      if (asked !== list.asked) return;
      say(reply);
      if (place === "start") Object.assign(list, { rows: reply.rows, offset: reply.offset });
      list.matched = reply.matched;
      list.version = reply.version;
      if (place === "start") renderRows();
    } while (reply.waiting);
    if (place === "start") scrollToChosen();
    if (place === "more") list.rows.push(...reply.rows);
    if (place === "earlier") Object.assign(list, { rows: [...reply.rows, ...list.rows], offset: reply.offset });
    $("news").hidden = true;
    renderRows();
  } catch (error) {
    if (asked !== list.asked) return;
    Object.assign(list, { rows: [], offset: 0, matched: 0 });
    renderRows();
    $("summary").textContent = error.message;
  }
}

async function move(by, whole) {
  const at = list.rows.findIndex((row) => row.id === chosen());
  const group = at >= 0 ? list.rows[at].group : null;
  const target = () => {
    if (at < 0) return 0;
    let place = list.rows.findIndex((row) => row.id === chosen()) + by;
    while (whole && list.rows[place] && list.rows[place].group === group) place += by;
    return place;
  };
  while (target() >= list.rows.length && list.offset + list.rows.length < list.matched) {
    const before = list.rows.length;
    await loadList("more");
    if (list.rows.length <= before) return;
  }
  while (target() < 0 && list.offset) {
    const before = list.rows.length;
    await loadList("earlier");
    if (list.rows.length <= before) return;
  }
  const row = list.rows[target()];
  if (row) open(row.id, false);
}

// --- one rollout, or its group

function scrollToChosen() {
  const row = chosen() && $("rows").querySelector(`[data-id="${CSS.escape(chosen())}"]`);
  if (row) row.scrollIntoView({ block: "nearest" });
}

function open(id, click) {
  choose({ id }, click && !chosen());
  renderDetail();
  if (!click) scrollToChosen();
}

async function renderDetail() {
  const id = chosen(), grouped = state.get("group") === "1";
  document.querySelector(".panes").classList.toggle("open", Boolean(id));
  document.querySelector(".panes").classList.toggle("wide", Boolean(id) && grouped);
  $("detail").hidden = !id;
  for (const row of $("rows").children) row.setAttribute("aria-selected", String(row.dataset.id === id));
  for (const button of document.querySelectorAll("[data-color]")) {
    button.setAttribute("aria-pressed", String(button.dataset.color === color()));
  }
  if (!id) return;
  const scale = make("span", { className: "scale" });
  $("legend").replaceChildren(...(color() === "gain" ? ["−1", scale, "1"] : ["0", scale, "1"]));
  $("json").href = `api/row?${new URLSearchParams({ id })}`;
  $("group").setAttribute("aria-pressed", String(grouped));
  try {
    const reply = await ask(`api/${grouped ? "group" : "rollout"}?${new URLSearchParams({ id, color: color() })}`);
    if (id !== chosen() || grouped !== (state.get("group") === "1")) return;
    $("card").innerHTML = reply.html; // escaped where it was made, and the page's policy runs no script in it
    $("group").textContent = `side by side (${reply.responses})`;
    const card = $("card").querySelector(".chosen");
    if (card) card.scrollIntoView({ block: "nearest", inline: "nearest" });
  } catch (error) {
    if (id === chosen()) $("card").replaceChildren(make("p", { className: "muted empty" }, error.message));
  }
}

function turnColor() {
  const names = Object.keys(COLORS);
  choose({ color: names[(names.indexOf(color()) + 1) % names.length] });
  renderDetail();
}

function turnGroup() {
  if (!chosen()) return;
  choose({ group: state.get("group") === "1" ? null : "1" });
  renderDetail();
}

// --- the page as a whole

function render() {
  for (const name of ["curves", "rollouts"]) {
    $(name).hidden = name !== view();
    const button = document.querySelector(`[data-view="${name}"]`);
    if (name === view()) button.setAttribute("aria-current", "page");
    else button.removeAttribute("aria-current");
  }
  if ($("find") !== document.activeElement) $("find").value = state.get("find") || "";
  if (view() === "curves") {
    findMetrics();
    if (run && (!curves || curves.version !== run.curves)) loadCurves();
  } else if (run) {
    fillFilters();
    showFilters();
    loadList();
    renderDetail();
  }
}

async function loadCurves() {
  const began = performance.now();
  curves = await ask("api/curves");
  renderCurves();
  drawAfter = performance.now() + 10 * (performance.now() - began);
}

function showStatus() {
  const parts = [];
  if (run.step !== null) parts.push(`step ${run.step.toLocaleString("en")}`);
  parts.push(plural(run.count, "rollout"));
  if (run.age !== null) parts.push(`written ${age(run.age)}`);
  if (run.damaged) parts.push(`${plural(run.damaged, "line")} not whole`);
  if (run.behind) parts.push("reading …");
  $("status").textContent = parts.join(" · ");
}

async function look() {
  let wait = WAIT;
  try {
    const before = run;
    run = await ask("api/run");
    $("name").textContent = run.name;
    document.title = `${run.name} · rlpr view`;
    showStatus();
    if (!before) render();
    else if (view() === "curves") {
      if (performance.now() >= drawAfter && (!curves || curves.version !== run.curves)) await loadCurves();
    } else if (view() === "rollouts" && list.version !== run.rollouts) {
      fillFilters();
      if (before.behind || !list.rows.length) await loadList();
      else {
        const more = run.count - before.count;
        const what = more > 0 ? "There are new rollouts" : "The rollouts have changed";
        $("news").textContent = `${what}: show them (r)`;
        $("news").hidden = false;
      }
    }
    if (run.behind) wait = 0;
  } catch (error) {
    $("status").textContent = `no answer from rlpr view (${error.message})`;
  }
  setTimeout(() => {
    if (document.hidden) document.addEventListener("visibilitychange", look, { once: true });
    else look();
  }, wait);
}

function close() {
  choose({ id: null, group: null });
  renderDetail();
}

const KEYS = {
  j: () => move(1), ArrowDown: () => move(1), k: () => move(-1), ArrowUp: () => move(-1),
  J: () => move(1, true), ArrowRight: () => move(1, true), K: () => move(-1, true), ArrowLeft: () => move(-1, true),
  g: turnGroup, c: turnColor, r: () => loadList(), Escape: close,
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
  if (event.target.closest("input, select, textarea")) {
    if (event.key !== "Escape") return;
    event.preventDefault(); // a browser would empty the field
    event.target.blur();
    return;
  }
  const keys = { "?": () => $("help").showModal(), 1: () => turn("curves"), 2: () => turn("rollouts") };
  keys["/"] = () => {
    if (view() === "rollouts") $("filters").open = true;
    (view() === "rollouts" ? $("form").q : $("find")).focus();
  };
  const action = keys[event.key] || (view() === "rollouts" ? KEYS[event.key] : null);
  if (!action) return;
  event.preventDefault();
  action();
});

function turn(name) {
  choose({ view: name === "curves" ? null : name }, true);
  render();
}

for (const button of document.querySelectorAll("[data-view]")) button.onclick = () => turn(button.dataset.view);
for (const button of document.querySelectorAll("[data-color]")) {
  button.onclick = () => {
    choose({ color: button.dataset.color === "r" ? null : button.dataset.color });
    renderDetail();
  };
}
for (const name of YES_NO) $("form")[name].replaceChildren(option("", "any"), option("1", "yes"), option("0", "no"));
$("find").addEventListener("input", () => { choose({ find: $("find").value }); findMetrics(); });
$("form").addEventListener("input", readForm);
$("form").addEventListener("reset", (event) => {
  event.preventDefault();
  const changes = Object.fromEntries([...query()].map(([name]) => [name, null]));
  $("form").least.value = $("form").most.value = "";
  refilter(changes);
});
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const form = $("form"), chosenRange = range(form.least.value.trim(), form.most.value.trim());
  if (chosenRange !== null) refilter({ [form.column.value]: chosenRange });
});
$("direction").onclick = () => { const { column, down } = sortOf(); refilter({ sort: down ? column : `-${column}` }); };
$("news").onclick = () => loadList();
$("more").onclick = () => loadList("more");
$("earlier").onclick = () => loadList("earlier");
$("back").onclick = close;
$("previous").onclick = () => move(-1);
$("next").onclick = () => move(1);
$("group").onclick = turnGroup;
$("keys").onclick = () => $("help").showModal();
$("card").addEventListener("click", (event) => {
  const card = event.target.closest("[data-id]");
  if (card && card.dataset.id !== chosen() && !String(getSelection())) open(card.dataset.id, false);
});
new IntersectionObserver(([entry]) => { if (entry.isIntersecting && !$("more").hidden) loadList("more"); })
  .observe($("more"));
addEventListener("popstate", () => { state = new URLSearchParams(location.search); render(); });
if (matchMedia("(max-width: 999px)").matches) $("filters").open = false;
render();
look();
