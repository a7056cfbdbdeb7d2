"use strict";
const KEPT = 500, MINUTES = 5;
// The page may have been opened with or without the slash at the end of its path.
const base = location.pathname.replace(/\/?$/, "/");
const byId = id => document.getElementById(id);
const units = new Map(), pools = new Map();
let others = [], warnings = [], atWork = 0, now = Date.now() / 1000, paused = false, selected = new URLSearchParams(location.search).get("unit");
byId("download").href = base + "units.json";

// All content goes into the page as text: nothing of what an application does can become markup.
function make(tag, attributes = {}, ...content) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null && value !== false) element.setAttribute(name, value);
  element.append(...content.filter(part => part !== null));
  return element;
}
function draw(tag, attributes, ...content) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...content);
  return element;
}
function seconds(value) {
  if (value === null) return "";
  return value < 1 ? `${(value * 1000).toFixed(value < 0.01 ? 2 : 0)} ms` : value < 120 ? `${value.toFixed(1)} s` : `${Math.floor(value / 60)} min`;
}
const clock = at => new Date(at * 1000).toTimeString().slice(0, 8);
const heldOf = hold => (hold.returned ?? now) - hold.taken;
const heldBy = unit => unit.holds.reduce((sum, hold) => sum + heldOf(hold), unit.forgotten_for);
const KINDS = { "committed": "good", "rolled back": "warn", "commit failed": "bad", "never ended": "bad", "at work": "", "ended": "quiet" };

// --- data --------------------------------------------------------------------------------------------------------------

let server = null;
function take(data) {
  now = data.now;
  const name = `${data.worker.host}, process ${data.worker.pid}`;
  // Behind a load balancer, each stream may come from another worker, which has units of its own.
  if (server !== null && server !== name) { units.clear(); pools.clear(); warnings = []; }
  server = name;
  byId("worker").textContent = `worker ${name}`;
  for (const unit of units.values()) if (unit.ended === null) units.delete(unit.id);
  for (const unit of data.units) units.set(unit.id, unit);
  const old = [...units.values()].filter(unit => unit.ended !== null).sort((a, b) => b.started - a.started).slice(KEPT);
  for (const unit of old) if (unit.id !== selected) units.delete(unit.id);
  for (const pool of data.pools) {
    const known = pools.get(pool.name)?.samples ?? [];
    const first = pool.samples.length ? pool.samples[0][0] : Infinity;
    const samples = [...known.filter(sample => sample[0] < first), ...pool.samples].filter(sample => sample[0] > now - MINUTES * 60);
    pools.set(pool.name, { ...pool, samples });
  }
  others = data.others;
  atWork = data.at_work;
  const seen = new Set(warnings.map(warning => warning.sequence));
  warnings = [...data.warnings.filter(warning => !seen.has(warning.sequence)), ...warnings].sort((a, b) => b.sequence - a.sequence).slice(0, 100);
  if (!paused) show();
}

// --- pools -------------------------------------------------------------------------------------------------------------

// What is wrong comes first: tasks that wait, then pools that have no connection left.
const worry = pool => pool.waiting ? 2 : pool.limit !== null && pool.in_use >= pool.limit ? 1 : 0;

function showVerdict() {
  const parts = [], holds = current(), leaks = holds.filter(leaked).length;
  for (const pool of [...pools.values()].filter(worry).sort((a, b) => worry(b) - worry(a)).slice(0, 3)) {
    const use = pool.limit === null ? `${pool.in_use} connections` : `all ${pool.limit} connections`;
    parts.push(make("strong", { class: "bad" }, pool.waiting ? `${pool.waiting} waiting` : "No connection left"), ` for ${pool.name}, ${use} in use. `);
  }
  if (leaks) parts.push(make("strong", { class: "bad" }, leaks === 1 ? "1 leak. " : `${leaks} leaks. `));
  if (holds.length) {
    const { hold, unit } = holds[0];
    parts.push("Held longest: ", unit ? link(unit, shorten(unit.request)) : shortPlace(hold.where), `, for ${seconds(heldOf(hold))}.`);
  } else if (pools.size) parts.push(make("span", { class: "quiet" }, "No connection is held."));
  byId("verdict").replaceChildren(...parts);
}
const shorten = text => text.length > 80 ? text.slice(0, 79) + "…" : text;
function shortPlace(where) {
  const parts = where.split(/[\\/]/);
  return parts.length > 4 ? "…/" + parts.slice(-3).join("/") : where;
}

function showPools() {
  byId("pools").classList.toggle("many", pools.size > 3);
  const cards = [...pools.values()].sort((a, b) => worry(b) - worry(a)).map(pool => {
    const width = MINUTES * 60, height = 64;
    const most = Math.max(1, pool.limit ?? 0, ...pool.samples.map(([, used, idle, waiting]) => Math.max(used + waiting, used + idle)));
    const up = count => (height - 2) * count / most;
    const bars = pool.samples.flatMap(([at, used, idle, waiting]) => {
      const x = width - (now - at) - 1;
      return [[used, 0, "bar"], [idle, used, "idle"], [waiting, used, "wait"]].filter(([count]) => count > 0)
        .map(([count, below, kind]) => draw("rect", { class: kind, x, width: 1.06, y: height - up(below + count), height: up(count) }));
    });
    const text = `${pool.in_use} in use, ${pool.idle} idle, ${pool.waiting} waiting, ${pool.limit === null ? "no limit" : `limit ${pool.limit}`}`;
    const picture = draw("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", role: "img", "aria-label": `${pool.name}: ${text}` }, ...bars,
      draw("line", { class: "base", x1: 0, x2: width, y1: height - .5, y2: height - .5 }));
    if (pool.limit !== null) picture.append(draw("line", { class: "limit", x1: 0, x2: width, y1: height - up(pool.limit), y2: height - up(pool.limit) }));
    const state = make("span", { class: worry(pool) ? "bad" : "quiet" }, text);
    return make("div", { "data-pool": pool.name }, make("p", {}, make("strong", {}, pool.name), state), picture);
  });
  byId("pools").replaceChildren(...(cards.length ? cards : [make("div", { class: "quiet" }, "No database has been used yet.")]));
}

// --- who holds what ----------------------------------------------------------------------------------------------------

function current() {
  const holds = [...units.values()].flatMap(unit => unit.holds.filter(hold => hold.returned === null).map(hold => ({ hold, unit })));
  const known = new Set(holds.map(({ hold }) => `${hold.where}|${hold.taken}`));
  for (const hold of others) if (!known.has(`${hold.where}|${hold.taken}`)) holds.push({ hold, unit: null });
  return holds.sort((a, b) => a.hold.taken - b.hold.taken);
}
const leaked = ({ hold, unit }) => hold.leaked || unit?.outcome === "never ended" || Boolean(unit && unit.ended !== null);
function doing(hold) {
  if (hold.running_since !== null) return ["running for " + seconds(now - hold.running_since), ""];
  return hold.statements ? ["idle, after", "warn"] : ["no statement yet", "quiet"];
}
function showHeld() {
  const holds = current();
  byId("held-none").hidden = holds.length > 0;
  document.querySelector("#held").parentElement.hidden = holds.length === 0;
  document.querySelector("#held tbody").replaceChildren(...holds.slice(0, 20).map(each => {
    const { hold, unit } = each, [state, kind] = doing(hold);
    const request = make("div", { class: "clamp" }, unit ? link(unit) : make("span", { class: "quiet" }, "outside of a unit of work"));
    return make("tr", {}, make("td", {}, seconds(heldOf(hold)), leaked(each) ? make("strong", { class: "bad" }, " leak") : null), make("td", {}, request),
      make("td", {}, make("code", { title: hold.where }, shortPlace(hold.where)), make("div", { class: "quiet" }, `in ${hold.function}()`)),
      make("td", {}, make("span", { class: kind }, state), hold.statement ? make("code", { class: "clamp", title: hold.statement }, hold.statement) : null));
  }));
}
function link(unit, text = unit.request) {
  const anchor = make("a", { href: `${base}?unit=${encodeURIComponent(unit.id)}` }, text);
  anchor.addEventListener("click", event => { event.preventDefault(); select(unit.id, true); });
  return anchor;
}
function showTrouble() {
  const lines = [];
  for (const each of current().filter(leaked)) lines.push([now, make("span", { class: "bad" }, "leak: "), `a connection taken at ${each.hold.where} is still held after its unit of work`, each.unit]);
  for (const unit of units.values()) {
    if (unit.outcome === "commit failed") lines.push([unit.ended ?? now, make("span", { class: "bad" }, "commit failed: "), unit.error ?? "", unit]);
    if (unit.outcome === "never ended") lines.push([unit.started, make("span", { class: "bad" }, "never ended: "), "a unit of work was thrown away with an open session", unit]);
  }
  for (const warning of warnings) lines.push([warning.at, make("span", { class: warning.level === "warning" ? "warn" : "bad" }, `${warning.level}: `), warning.text, units.get(warning.unit)]);
  byId("trouble").hidden = lines.length === 0;
  document.querySelector("#trouble ul").replaceChildren(...lines.sort((a, b) => b[0] - a[0]).slice(0, 50).map(([at, kind, text, unit]) =>
    make("li", {}, make("span", { class: "quiet" }, clock(at) + " "), unit ? link(unit) : null, unit ? " " : null, kind, text)));
}

// --- units -------------------------------------------------------------------------------------------------------------

function lane(unit, length) {
  const end = Math.max(unit.ended ?? now, ...unit.holds.map(hold => hold.returned ?? now));
  const scale = 1000 / (length ?? Math.max(end - unit.started, 1e-6));
  const x = at => Math.max(0, (at - unit.started) * scale);
  const rect = (kind, from, to, y, height) => draw("rect", { class: kind, x: x(from), y, width: Math.max(x(to) - x(from), 2), height });
  const parts = [rect("span", unit.started, unit.ended ?? now, 2, 14)];
  // Sessions that hold connections at once, of several databases for instance, are drawn one below the other.
  const free = [], placed = [...unit.holds].sort((a, b) => a.taken - b.taken).map(hold => {
    const found = free.findIndex(end => end <= hold.taken);
    const row = found >= 0 ? found : free.length < 4 ? free.length : 3;
    free[row] = Math.max(free[row] ?? 0, hold.returned ?? Infinity);
    return { hold, row };
  });
  const height = 10 / Math.max(1, free.length);
  for (const { hold, row } of placed) {
    const until = hold.returned ?? now, y = 4 + row * height, thick = free.length > 1 ? height - 1 : height;
    parts.push(rect(hold.streamed ? "body" : "hold", hold.taken, until, y, thick));
    if (hold.commit_at !== null) parts.push(rect({ "commit failed": "fail", "rolled back": "undo" }[hold.outcome] ?? "run", hold.commit_at, Math.max(until, hold.commit_at), y, thick));
  }
  const text = `${seconds(end - unit.started)} in all, connection held for ${seconds(heldBy(unit))}`;
  return draw("svg", { class: "lane", viewBox: "0 0 1000 18", preserveAspectRatio: "none", role: "img", "aria-label": text }, ...parts);
}
function matches(unit) {
  const text = byId("text").value.trim().toLowerCase(), outcome = byId("outcome").value, least = Number(byId("least").value) / 1000;
  if (outcome && unit.outcome !== outcome) return false;
  if (least && heldBy(unit) < least) return false;
  return !text || [unit.id, unit.request, unit.error ?? "", ...unit.holds.flatMap(hold => [hold.where, hold.function, hold.statement ?? ""])].some(part => part.toLowerCase().includes(text));
}
const rows = new Map();
function showUnits() {
  const found = [...units.values()].filter(matches).sort((a, b) => b.started - a.started);
  const shown = found.slice(0, 200);
  const length = byId("scale").value === "common" ? Math.max(1e-6, ...shown.map(unit => (unit.ended ?? now) - unit.started)) : null;
  const working = [...units.values()].filter(unit => unit.ended === null).length;
  byId("count").textContent = `${found.length} of ${units.size}` + (found.length > shown.length ? `, the last ${shown.length} are shown` : "") +
    (atWork > working ? `; ${atWork - working} more are at work and hold nothing` : "");
  const list = byId("units"), items = [];
  for (const unit of shown) {
    // Kept from one update to the next, so that the focus of the keyboard stays where it is.
    let item = rows.get(unit.id);
    const mark = JSON.stringify([unit, length, unit.ended === null ? now : 0, unit.id === selected]);
    if (!item) {
      const button = make("button", { class: "unit", type: "button", "data-unit": unit.id });
      button.addEventListener("click", () => select(unit.id === selected ? null : unit.id, true));
      item = make("li", {}, button);
      rows.set(unit.id, item);
    }
    if (item.mark !== mark) {
      item.mark = mark;
      const button = item.firstChild, kind = KINDS[unit.outcome] ?? "";
      button.setAttribute("aria-expanded", String(unit.id === selected));
      button.setAttribute("aria-controls", "detail");
      button.replaceChildren(make("span", { class: "quiet" }, clock(unit.started)), make("span", { class: "name clamp", title: unit.request }, unit.request),
        make("span", { class: kind }, (unit.status ? `${unit.status} ` : "") + unit.outcome), make("span", { class: "num" }, seconds(heldBy(unit))), lane(unit, length));
    }
    items.push(item);
  }
  for (const id of rows.keys()) if (!units.has(id)) rows.delete(id);
  // Moving an element takes the focus from it: only what has changed its place is touched.
  const wanted = new Set(items);
  for (const child of [...list.children]) if (!wanted.has(child)) child.remove();
  items.forEach((item, index) => { if (list.children[index] !== item) list.insertBefore(item, list.children[index] ?? null); });
}

// --- one unit ----------------------------------------------------------------------------------------------------------

function showDetail() {
  const unit = selected === null ? null : units.get(selected);
  byId("detail").hidden = selected === null;
  if (selected === null) return;
  byId("detail-title").textContent = unit ? unit.request : `unit ${selected}`;
  const content = document.querySelector("#detail > div");
  if (!unit) { content.replaceChildren(make("p", {}, "This worker knows nothing of it, or nothing any more.")); return; }
  const mark = JSON.stringify([unit, unit.ended === null || unit.holds.some(hold => hold.returned === null) ? now : 0]);
  if (content.mark === mark) return;
  content.mark = mark;
  const pairs = [["id", make("span", { class: "mono" }, unit.id)], ["started", clock(unit.started)],
    ["lasted", unit.ended === null ? `${seconds(now - unit.started)} so far` : seconds(unit.ended - unit.started)],
    ["connection held", seconds(heldBy(unit))], ["not shown", unit.forgotten ? `${unit.forgotten} earlier connections, held for ${seconds(unit.forgotten_for)}` : null],
    ["status", unit.status === null ? null : String(unit.status)], ["outcome", unit.outcome], ["error", unit.error]];
  const list = entries => make("dl", {}, ...entries.filter(([, value]) => value !== null).flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
  const address = `${location.origin}${base}?unit=${encodeURIComponent(unit.id)}`;
  content.replaceChildren(list(pairs), lane(unit, null), ...unit.holds.map((hold, index) => make("div", {}, make("h3", {}, `Connection ${index + 1}`), list([
    ["pool", hold.pool], ["taken at", make("code", {}, hold.where)], ["in", `${hold.function}()`], ["after", seconds(hold.taken - unit.started)],
    ["held for", seconds(heldOf(hold)) + (hold.returned === null ? " so far" : "")], ["statements", String(hold.statements)],
    ["last statement", hold.statement === null ? null : make("pre", {}, hold.statement)], ["outcome", hold.outcome], ["error", hold.error]]))),
    make("p", {}, "Permalink: ", make("a", { href: address }, address), " ", make("a", { href: `${base}units.json?unit=${encodeURIComponent(unit.id)}`, download: `${unit.id}.json` }, "JSON")));
}
function select(id, focus) {
  selected = id;
  document.querySelector("#detail > div").mark = null;
  history.replaceState(null, "", id === null ? base : `${base}?unit=${encodeURIComponent(id)}`);
  show();
  if (id !== null && focus) { byId("detail").focus({ preventScroll: true }); byId("detail").scrollIntoView({ block: "nearest" }); }
}
function close() {
  const button = rows.get(selected)?.firstChild;
  select(null, false);
  (button ?? byId("text")).focus();
}

function show() { showVerdict(); showPools(); showHeld(); showTrouble(); showUnits(); showDetail(); }
byId("close").addEventListener("click", close);
document.addEventListener("keydown", event => { if (event.key === "Escape" && selected !== null) close(); });
byId("filters").addEventListener("submit", event => event.preventDefault());
byId("filters").addEventListener("input", show);
byId("pause").addEventListener("click", () => {
  paused = !paused;
  byId("pause").setAttribute("aria-pressed", String(paused));
  byId("pause").textContent = paused ? "Go on" : "Pause";
  if (!paused) show();
});

let source, silence;
function alive() {
  clearTimeout(silence);
  document.body.classList.remove("stale");
  byId("state").textContent = "live"; byId("state").className = "good";
  silence = setTimeout(() => {
    document.body.classList.add("stale");
    byId("state").textContent = "The application does not answer: this is how it was."; byId("state").className = "bad";
  }, 5000);
}
function connect() {
  source = new EventSource(base + "events");
  source.addEventListener("message", event => { alive(); take(JSON.parse(event.data)); });
  source.addEventListener("error", () => {
    // A stream that has ended is asked for again by the browser itself; one that was refused is not.
    if (source.readyState !== EventSource.CLOSED) return;
    clearTimeout(silence);
    document.body.classList.add("stale");
    byId("state").textContent = "The updates are refused: too many pages are open, or you may not look any more."; byId("state").className = "bad";
    setTimeout(connect, 2000);
  });
}
connect();
