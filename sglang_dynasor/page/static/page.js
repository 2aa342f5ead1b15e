// The live page: what the stream says, shown.

import { brief, byId, count, make, many, money, percent, put } from "./dom.js";
import { drawKind, drawLine, KINDS } from "./draw.js";
import { Feed } from "./feed.js";
import { finishedTable, row, SAVED_KEYS } from "./finished.js";
import { Opened } from "./opened.js";
import { programsTable } from "./programs.js";
import { csv, save } from "./save.js";
import { loadOf, rate, State, sumsBy } from "./state.js";
import { Table } from "./table.js";

const state = new State();
let only = ""; // of the servers; empty: all
let price = Number(localStorage.getItem("dynasor.price")) || 0; // per million tokens
const cost = (tokens) => (price > 0 && Number.isFinite(tokens) ? money((tokens * price) / 1e6) : "");

// What comes twice a second is shown once for each picture of the screen, and not where nobody looks.
let isDue = false;
function show() {
  if (isDue) return;
  isDue = true;
  requestAnimationFrame(() => {
    isDue = false;
    render();
  });
}

const feed = new Feed("dynasor/events", {
  onEvent: (event, data, id) => {
    state.hear(event, data, id);
    show();
  },
  onState: (is, why) => {
    byId("dot").className = `dot ${is === "on" ? "on" : "off"}`;
    byId("key-form").hidden = is !== "locked";
    byId("key-button").hidden = !feed.key;
    connection = is === "on" ? "" : why;
    if (is === "locked") byId("key").focus();
    show();
  },
});
let connection = "connecting";

const opened = new Opened(byId("opened"), { state, feed, money: cost });
const open = (key) => opened.open(key);
const flight = programsTable(byId("flight-table"), { open, manyServers: () => state.servers.size > 1 });
const finished = finishedTable(byId("finished-table"), { open });
const sums = (host, title) => new Table(byId(host), {
  name: "sums", caption: `By ${title.toLowerCase()}`, empty: "Nothing yet.", sort: "tokens", most: 12, key: (s) => s.label,
  columns: [
    { key: "label", title, value: (s) => s.label },
    { key: "flight", title: "In flight", numeric: true, value: (s) => s.flight },
    { key: "programs", title: "Answered", numeric: true, value: (s) => s.num_programs, text: (s) => count(s.num_programs) },
    { key: "tokens", title: "Tokens", numeric: true, value: (s) => s.num_tokens, text: (s) => brief(s.num_tokens) },
    { key: "saved", title: "Saved", numeric: true, value: (s) => savedOf(s), text: (s) => percent(savedOf(s)) },
    { key: "cost", title: "Cost", numeric: true, value: (s) => s.num_tokens, text: (s) => cost(s.num_tokens) },
  ],
});
const savedOf = (s) => (s.num_tokens ? s.num_saved_tokens / (s.num_saved_tokens + s.num_tokens) : NaN);
const algorithms = sums("algorithm-table", "Algorithm");
const tenants = sums("tenant-table", "Tenant");

// Figures at the top

const FIGURES = ["Programs", "Rows", "KV tokens", "Answered", "Tokens spent", "Tokens saved"];
const figures = FIGURES.map((name) => {
  const [value, more, canvas] = [make("dd", { class: "value" }), make("dd", { class: "more" }), make("canvas", { "aria-hidden": "true" })];
  byId("figures").append(make("dl", { class: "figure" }, make("dt", {}, name), value, more, make("dd", {}, canvas)));
  return { value, more, canvas };
});

function figure(place, value, small, more, points = null, most = 1) {
  const { value: shown, more: below, canvas } = figures[place];
  if (!shown.childElementCount) shown.append(make("span"), make("small"));
  put(shown.firstChild, value);
  put(shown.lastChild, small ? ` ${small}` : "");
  put(below, more);
  canvas.hidden = points === null || points.length < 2;
  if (!canvas.hidden) drawLine(canvas, points, { from: points[0][0], until: points.at(-1)[0], most, height: 22, fill: true });
}

// The load of several servers over time, as one: each moment of the one that is heard most, with what the others said last.
function loadOver(servers, key) {
  const [first, ...others] = servers.filter((server) => server.load.length).sort((a, b) => b.load.length - a.load.length);
  if (!first) return [];
  return first.load.map((moment) => {
    const rest = others.reduce((sum, server) => sum + ((server.load.findLast(({ t }) => t <= moment.t) ?? server.load[0])[key] ?? 0), 0);
    return [moment.t, moment[key] + rest];
  });
}

function renderFigures(servers) {
  const frames = servers.map((server) => server.frame).filter(Boolean);
  const loads = frames.map(loadOf);
  const sum = (key) => loads.reduce((total, load) => total + load[key], 0);
  const counted = (name) => frames.reduce((total, frame) => total + frame.schedulers.reduce((part, s) => part + (s.status[name] ?? 0), 0), 0);
  const programs = servers.flatMap((server) => [...server.programs.values()]);
  const waiting = programs.filter(({ data }) => data.state === "waiting").length;
  const unseen = sum("unseen");
  const others = [waiting ? `${count(waiting)} waiting` : "", unseen ? `${count(unseen)} not shown` : ""].filter(Boolean).join(", ");
  figure(0, count(programs.length - waiting), "running", others || "none waits");
  figure(1, count(sum("rows")), `of ${count(sum("rowsOf"))}`, `${count(sum("queued"))} queued in SGLang`, loadOver(servers, "rows"), sum("rowsOf") || 1);
  figure(2, percent(sum("kv") / sum("kvOf")) || "–", "", `${brief(sum("kv"))} of ${brief(sum("kvOf"))}`, loadOver(servers, "kv"), sum("kvOf") || 1);
  const answeredNum = counted("num_programs");
  const certain = counted("num_certain") / answeredNum;
  const late = counted("num_expired");
  figure(3, count(answeredNum), "", [Number.isFinite(certain) ? `${percent(certain)} certain` : "since the start", late ? `${count(late)} at their deadline` : ""].filter(Boolean).join(", "));
  const totals = sumsBy(servers, () => "all")[0] ?? { num_tokens: 0, num_saved_tokens: 0 };
  const spent = sum("spent");
  const rates = servers.map(rate).filter(Number.isFinite);
  const perSecond = rates.length ? `${brief(rates.reduce((total, value) => total + value, 0))} per s` : "since the start";
  figure(4, brief(spent), cost(spent) && `cost ${cost(spent)}`, perSecond);
  const saved = totals.num_saved_tokens;
  figure(5, brief(saved), cost(saved) && `worth ${cost(saved)}`, totals.num_tokens ? `${percent(saved / (saved + totals.num_tokens))} of what caps allow` : "");
}

// What is wrong, in one line

function troubles(servers) {
  const told = connection ? [connection] : [];
  for (const server of servers) if (server.trouble) told.push(`${server.name}: ${server.trouble}`);
  for (const server of servers) {
    const errors = (server.frame?.schedulers ?? []).reduce((sum, s) => sum + (s.status.num_policy_errors ?? 0), 0);
    if (errors) told.push(`${many(errors, "exception")} in dynasor's own code fell back to stock behaviour; the server's log has more`);
  }
  return told.join(". ");
}

function renderServers() {
  const names = [...state.servers.values()];
  const select = byId("server");
  byId("server-field").hidden = names.length < 2;
  while (select.options.length < names.length + 1) select.append(make("option"));
  names.forEach((server, index) => {
    select.options[index + 1].value = server.id;
    put(select.options[index + 1], server.name);
  });
  const [first] = names;
  if (first && names.length === 1 && !first.name) first.name = location.host;
  const one = first ? [first.name, first.model].filter(Boolean).join(" · ") : "";
  put(byId("where"), connection === "connecting" ? connection : names.length > 1 ? many(names.length, "server") : one || connection);
}

// Filters

const within = (filter, values) => !filter || values.some((value) => value !== null && value !== undefined && String(value).toLowerCase().includes(filter));
const filterOf = (id) => byId(id).value.trim().toLowerCase();

function render() {
  const servers = state.chosen(only);
  renderServers();
  const wrong = troubles(servers);
  byId("trouble").hidden = !wrong || !byId("key-form").hidden;
  put(byId("trouble"), wrong);
  renderFigures(servers);
  const programs = servers.flatMap((server) => [...server.programs.values()]);
  const [text, wanted] = [filterOf("flight-filter"), byId("flight-state").selectedIndex ? byId("flight-state").value : ""];
  flight.update(programs.filter(({ data, server }) =>
    (!wanted || data.state === wanted) && within(text, [data.id, data.tenant, data.algorithm, server.name, ...data.votes.map(([answer]) => answer)])));
  const left = servers.reduce((sum, { frame }) => sum + (frame?.schedulers ?? []).reduce((part, s) => part + (s.num_programs_left ?? 0), 0), 0);
  put(byId("flight-count"), `${count(programs.length + left)}${left ? `, ${count(left)} of them not sent` : ""}`);
  algorithms.update(sumsBy(servers, ({ algorithm }) => algorithm || "–"));
  tenants.update(sumsBy(servers, ({ tenant }) => tenant || "none"));
  const done = [...state.finished.values()].filter(({ server }) => servers.includes(server));
  const filter = filterOf("finished-filter");
  finished.update(done.filter((r) => within(filter, [r.program, r.tenant, r.algorithm, r.answer, r.stop_reason, r.server.name])));
  put(byId("finished-count"), done.length ? `the newest ${count(done.length)}` : "");
  if (opened.dialog.open) opened.update();
}

// Controls

for (const id of ["flight-filter", "flight-state", "finished-filter"]) byId(id).addEventListener("input", show);
byId("server").addEventListener("change", (event) => {
  only = event.target.value;
  show();
});
byId("price").value = price || "";
byId("price").addEventListener("input", (event) => {
  price = Math.max(0, Number(event.target.value) || 0);
  localStorage.setItem("dynasor.price", String(price));
  show();
});
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  feed.setKey(byId("key").value.trim());
  byId("key").value = "";
});
byId("key-button").addEventListener("click", () => feed.setKey(""));
const named = () => `dynasor-${new Date().toISOString().slice(0, 19).replaceAll(":", "-")}`;
byId("save-csv").addEventListener("click", () => save(`${named()}.csv`, "text/csv", csv(finished.sorted.map(row), SAVED_KEYS)));
byId("save-json").addEventListener("click", () => save(`${named()}.json`, "application/json", JSON.stringify(finished.sorted.map(row), null, 1)));
byId("legend").append(...Object.entries(KINDS).map(([what, name]) => {
  const canvas = make("canvas", { "aria-hidden": "true" });
  canvas.dataset.kind = what;
  return make("li", {}, canvas, name);
}));
const drawLegend = () => document.querySelectorAll("[data-kind]").forEach((canvas) => drawKind(canvas, canvas.dataset.kind));
new ResizeObserver(() => {
  drawLegend();
  show();
}).observe(document.body);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  drawLegend();
  show();
});
feed.start();
