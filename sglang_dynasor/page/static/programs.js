// The programs in flight, a row each: their branches as lanes, their votes, how sure they are.

import { answered, brief, label, make, many, put, seconds, share } from "./dom.js";
import { drawLanes, drawLine, lanesHeight } from "./draw.js";
import { parts, Table } from "./table.js";

const visible = new WeakSet();
const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (entry.isIntersecting) {
      visible.add(entry.target);
      entry.target.redraw?.();
    } else visible.delete(entry.target);
  }
}, { rootMargin: "200px" });

// Draws now if somebody sees it, and when it comes into sight.
function drawn(canvas, draw) {
  canvas.redraw = draw;
  if (visible.has(canvas)) draw();
}

function canvasOf(name) {
  const canvas = make("canvas", { class: name, role: "img" });
  watcher.observe(canvas);
  return canvas;
}

export function tally(branches, cap) {
  const numbers = { running: 0, queued: 0, finished: 0, ended: 0, failed: 0 };
  for (const { state } of branches) {
    if (state in numbers) numbers[state] += 1;
    else if (state === "weak") numbers.ended += 1;
    else if (state === "probed") numbers.running += 1;
    else numbers.finished += 1; // judged, compared
  }
  const said = [];
  if (numbers.running) said.push(`${numbers.running} running`);
  if (numbers.queued) said.push(`${numbers.queued} queued`);
  if (numbers.finished) said.push(`${numbers.finished} finished`);
  if (numbers.ended) said.push(`${numbers.ended} ended early`);
  if (numbers.failed) said.push(`${numbers.failed} failed`);
  if (cap > branches.length) said.push(`${cap - branches.length} in reserve`);
  return said.join(", ");
}

export const inFlight = (data) => data.branches.filter(({ state }) => ["running", "queued", "probed"].includes(state)).length;

export function programsTable(host, { open, manyServers }) {
  return new Table(host, {
    name: "programs", caption: "Programs in flight", empty: "No program is in flight.", sort: "age", most: 100, key: (program) => program.key,
    mark: (program) => `is-${program.data.state === "waiting" ? "waiting" : "running"}`,
    columns: [
      { key: "id", title: "Program", value: (p) => p.data.id, fill: (cell, p) => fillId(cell, p, open, manyServers) },
      { key: "lanes", title: "Branches", value: (p) => p.data.branches.length, numeric: false, fill: fillLanes },
      { key: "votes", title: "Votes", value: (p) => p.data.votes.length, fill: fillVotes },
      { key: "sure", title: "Certaindex", value: (p) => p.data.certaindex, fill: fillSure, hint: "1: more branches would not change the answer" },
      { key: "width", title: "Width", numeric: true, value: (p) => inFlight(p.data), hint: "Branches in flight, of the most that the client allows", text: (p) => `${inFlight(p.data)} of ${p.data.width ?? p.data.cap}` },
      { key: "tokens", title: "Tokens", numeric: true, value: (p) => p.data.num_tokens, text: (p) => brief(p.data.num_tokens) },
      { key: "age", title: "Age", numeric: true, value: (p) => p.data.age_s, text: (p) => seconds(p.data.age_s) },
    ],
  });
}

function fillId(cell, program, open, manyServers) {
  const [button, sub] = parts(cell, () => {
    const made = [make("button", { type: "button", class: "open clip", onclick: () => open(program.key) }), make("span", { class: "sub clip" })];
    cell.append(...made);
    return made;
  });
  const { id, algorithm, tenant, state } = program.data;
  put(button, id);
  label(button, "title", id);
  const said = [algorithm, tenant, state === "waiting" ? "waiting" : null, manyServers() ? program.server.name : null].filter(Boolean).join(" · ");
  put(sub, said);
  label(sub, "title", said);
}

function fillLanes(cell, program) {
  const [canvas] = parts(cell, () => {
    const made = [canvasOf("lanes")];
    cell.append(...made);
    return made;
  });
  const { branches, cap } = program.data;
  canvas.style.height = `${lanesHeight(Math.max(cap, branches.length))}px`;
  label(canvas, "aria-label", tally(branches, cap));
  label(canvas, "title", tally(branches, cap));
  drawn(canvas, () => drawLanes(canvas, branches, cap, program.leader));
}

export function fillBar(bar, weights) {
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  while (bar.children.length > weights.length) bar.lastChild.remove();
  while (bar.children.length < weights.length) bar.append(make("i"));
  weights.forEach((weight, index) => (bar.children[index].style.width = `${(100 * weight) / (total || 1)}%`));
}

export const weighed = (weight) => (Number.isInteger(weight) ? String(weight) : weight.toFixed(2));

export function saidVotes(votes, most = 3) {
  const told = votes.slice(0, most).map(([answer, weight]) => `${answered(answer)} ×${weighed(weight)}`);
  if (votes.length > most) told.push(`${many(votes.length - most, "other")}`);
  return told.join(" · ");
}

function fillVotes(cell, program) {
  const [bar, said] = parts(cell, () => {
    const made = [make("div", { class: "bar", "aria-hidden": "true" }), make("span", { class: "clip" })];
    cell.append(...made);
    return made;
  });
  const { votes } = program.data;
  bar.hidden = votes.length === 0;
  fillBar(bar, votes.slice(0, 6).map(([, weight]) => weight));
  const text = votes.length ? saidVotes(votes) : "none yet";
  put(said, text);
  label(said, "title", text);
  label(said, "class", votes.length ? "clip" : "clip sub");
}

function fillSure(cell, program) {
  const [value, canvas] = parts(cell, () => {
    const [value, canvas] = [make("b"), canvasOf("spark")];
    canvas.setAttribute("aria-hidden", "true");
    cell.append(make("div", { class: "sure" }, value, canvas));
    return [value, canvas];
  });
  const { certaindex, votes } = program.data;
  put(value, votes.length || certaindex ? share(certaindex) : "–");
  const points = program.history.map(({ t, certaindex }) => [t, certaindex ?? 0]);
  drawn(canvas, () => drawLine(canvas, points, { from: points[0][0], until: points.at(-1)[0], height: 26 }));
}
