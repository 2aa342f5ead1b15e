// Lanes of branches, and lines over time, on canvases: a hundred programs of sixteen branches are drawn twice a second.

const LANES = 32; // in one column
let colours = null;

export function theme() {
  if (colours === null) {
    const style = getComputedStyle(document.documentElement);
    colours = {};
    for (const name of ["paper", "ink", "mid", "faint", "line", "accent", "soft", "bad"]) colours[name] = style.getPropertyValue(`--${name}`).trim();
  }
  return colours;
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => (colours = null));

// A canvas as wide as it is shown, in the screen's own pixels; null where it is not shown.
export function open(canvas, height) {
  const width = canvas.clientWidth;
  if (!width || !height) return null;
  const scale = Math.min(3, devicePixelRatio || 1);
  const [w, h] = [Math.round(width * scale), Math.round(height * scale)];
  if (canvas.width !== w || canvas.height !== h) [canvas.width, canvas.height] = [w, h];
  const pen = canvas.getContext("2d");
  pen.setTransform(scale, 0, 0, scale, 0, 0);
  pen.clearRect(0, 0, width, height);
  return { pen, width, height };
}

// How a branch is shown: what it says of itself, and whether its answer leads.
export function kind(branch, leader) {
  if (branch.state !== "finished") return branch.state;
  if (branch.answer === null || branch.answer === undefined) return "silent";
  return branch.answer === leader ? "leading" : "other";
}

export const KINDS = {
  running: "running", queued: "queued", probed: "probed", judged: "judged, compared", leading: "finished: leads", other: "another answer", silent: "none",
  ended: "ended early", failed: "failed", reserve: "reserve",
};

function lane(pen, what, x, y, length, thick, width) {
  const c = theme();
  const bar = (colour, from = x, size = length) => {
    pen.fillStyle = colour;
    pen.fillRect(from, y, Math.max(size, 1), thick);
  };
  switch (what) {
    case "running":
      return bar(c.accent);
    case "queued":
      pen.strokeStyle = c.accent;
      pen.lineWidth = 1;
      return pen.strokeRect(x + 0.5, y + 0.5, Math.max(length, 9) - 1, Math.max(thick - 1, 0.5));
    case "probed":
      bar(c.accent);
      return bar(c.ink, x + Math.max(length, 3), 3);
    case "judged":
    case "compared":
      pen.globalAlpha = 0.5;
      bar(c.accent);
      pen.globalAlpha = 1;
      return bar(c.ink, x + Math.max(length, 3), 3);
    case "leading":
      return bar(c.ink);
    case "other":
      return bar(c.faint);
    case "silent":
      pen.strokeStyle = c.faint;
      pen.lineWidth = 1;
      return pen.strokeRect(x + 0.5, y + 0.5, Math.max(length, 3) - 1, Math.max(thick - 1, 0.5));
    case "failed":
      return bar(c.bad);
    case "reserve":
      pen.fillStyle = c.line;
      return pen.fillRect(x, y + thick / 2 - 0.5, width, 1);
    default: // ended, weak
      pen.fillStyle = c.faint;
      pen.fillRect(x, y + thick / 2 - 0.5, Math.max(length, 1), 1);
      return pen.fillRect(x + Math.max(length, 1), y, 1.5, thick);
  }
}

export const lanesHeight = (cap) => Math.max(20, Math.min(LANES, cap) * (cap <= 16 ? 3.5 : 2.5));

// One lane for each branch that the cap allows, as long as its tokens, the longest across the whole width.
export function drawLanes(canvas, branches, cap, leader) {
  const height = lanesHeight(Math.max(cap, branches.length));
  if (canvas.style.height !== `${height}px`) canvas.style.height = `${height}px`;
  const opened = open(canvas, height);
  if (opened === null) return;
  const num = Math.max(cap, branches.length, 1);
  const columns = Math.ceil(num / LANES);
  const rows = Math.min(num, LANES);
  const pitch = height / Math.max(rows, 6);
  const thick = Math.min(Math.max(pitch - 1, 1), 5);
  const wide = (opened.width - 8 * (columns - 1)) / columns;
  const longest = branches.reduce((most, branch) => Math.max(most, branch.num_tokens), 1);
  for (let index = 0; index < num; index++) {
    const x = Math.floor(index / LANES) * (wide + 8);
    const y = (index % LANES) * pitch;
    const branch = branches[index];
    if (branch === undefined) lane(opened.pen, "reserve", x, y, 0, thick, wide);
    else lane(opened.pen, kind(branch, leader), x, y, ((wide - 5) * branch.num_tokens) / longest, thick, wide);
  }
}

export function drawKind(canvas, what) {
  const opened = open(canvas, 7);
  if (opened !== null) lane(opened.pen, what, 0, 1, what === "queued" ? 14 : 16, 5, opened.width);
}

function path(pen, points) {
  pen.beginPath();
  points.forEach(([x, y], index) => (index ? pen.lineTo(x, y) : pen.moveTo(x, y)));
}

// Values over time, the last one held until now; with `most` as the top.
export function drawLine(canvas, points, { from, until, most = 1, height, fill = false }) {
  const opened = open(canvas, height);
  if (opened === null || points.length === 0) return;
  const { pen, width } = opened;
  const span = Math.max(until - from, 1e-6);
  const place = (t) => Math.max(0, ((t - from) / span) * (width - 3));
  const level = (v) => height - 2 - Math.min(1, Math.max(0, v / most)) * (height - 4);
  const steps = [];
  points.forEach(([t, v], index) => {
    if (index) steps.push([place(t), steps.at(-1)[1]]);
    steps.push([place(t), level(v)]);
  });
  steps.push([width - 3, steps.at(-1)[1]]);
  const c = theme();
  if (fill) {
    path(pen, [...steps, [steps.at(-1)[0], height], [steps[0][0], height]]);
    pen.fillStyle = c.soft;
    pen.fill();
  }
  path(pen, steps);
  pen.strokeStyle = c.accent;
  pen.lineWidth = 1.5;
  pen.lineJoin = "round";
  pen.stroke();
  if (!fill) {
    pen.fillStyle = c.accent;
    pen.fillRect(width - 4.5, steps.at(-1)[1] - 1.5, 3, 3);
  }
}

export const VOTE_COLOURS = ["ink", "mid", "faint"]; // of the answers that lead; the others share the last

// The certaindex as a line over the shares of the votes, from when the page first saw the program.
export function drawHistory(canvas, history, answers, height) {
  const opened = open(canvas, height);
  if (opened === null || history.length === 0) return;
  const { pen, width } = opened;
  const c = theme();
  const [left, right, top, bottom] = [30, width - 8, 8, height - 20];
  const until = history.at(-1).t;
  const from = history[0].t;
  const span = Math.max(until - from, 0.5);
  const place = (t) => left + ((t - from) / span) * (right - left);
  const level = (v) => bottom - v * (bottom - top);
  pen.font = `11px ${getComputedStyle(document.body).fontFamily}`;
  pen.fillStyle = c.mid;
  pen.textBaseline = "middle";
  for (const v of [0, 0.5, 1]) {
    pen.textAlign = "right";
    pen.fillText(v === 0.5 ? "0.5" : String(v), left - 7, level(v));
  }
  // Shares of votes, stacked from below, the answers in the order of the legend.
  history.forEach((moment, index) => {
    const x = Math.round(place(moment.t)); // whole pixels, or seams show
    const next = Math.round(index + 1 < history.length ? place(history[index + 1].t) : right);
    const total = moment.votes.reduce((sum, [, weight]) => sum + weight, 0);
    if (!total) return;
    let below = 0;
    const stack = (weight, colour) => {
      if (!weight) return;
      pen.fillStyle = colour;
      pen.fillRect(x, level((below + weight) / total), next - x, level(below / total) - level((below + weight) / total));
      below += weight;
    };
    pen.globalAlpha = 0.28;
    answers.forEach((answer, rank) => {
      const found = moment.votes.find(([other]) => other === answer);
      stack(found ? found[1] : 0, c[VOTE_COLOURS[Math.min(rank, VOTE_COLOURS.length - 1)]]);
    });
    pen.globalAlpha = 0.12;
    stack(total - below, c.faint);
    pen.globalAlpha = 1;
  });
  pen.strokeStyle = c.line;
  pen.lineWidth = 1;
  for (const v of [0, 0.5, 1]) {
    path(pen, [[left, Math.round(level(v)) + 0.5], [right, Math.round(level(v)) + 0.5]]);
    pen.stroke();
  }
  const steps = [];
  history.forEach(({ t, certaindex }, index) => {
    if (index) steps.push([place(t), steps.at(-1)[1]]);
    steps.push([place(t), level(certaindex ?? 0)]);
  });
  steps.push([right, steps.at(-1)[1]]);
  path(pen, steps);
  pen.strokeStyle = c.accent;
  pen.lineWidth = 2;
  pen.lineJoin = "round";
  pen.stroke();
  pen.fillStyle = c.mid;
  pen.textAlign = "left";
  pen.fillText("0 s", left, height - 8);
  pen.textAlign = "right";
  pen.fillText(`${span < 10 ? span.toFixed(1) : Math.round(span)} s`, right, height - 8);
}
