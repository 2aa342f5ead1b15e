// One program, opened: what its branches answered and why each ended, merges, trials, votes and certaindex over time, texts.

import { answered, count, label, make, many, percent, put, seconds, share } from "./dom.js";
import { drawHistory, VOTE_COLOURS } from "./draw.js";
import { savedFrac } from "./finished.js";
import { inFlight, saidVotes, weighed } from "./programs.js";
import { Table } from "./table.js";
import { endOf, reasonOf, STATES } from "./words.js";

const MORE_MS = 2000;
const CHART = 190;

// A program as this page knows it: from the schedulers while it is in flight, from its record afterwards, mostly from both.
function known(state, key) {
  const live = state.find(key);
  const record = state.finished.get(key) ?? null;
  if (live === null && record === null) return null;
  return { live, record, server: (live ?? record).server, isLive: live !== null && live.server.programs.has(key) };
}

function branchesOf({ live, record, isLive }) {
  const seen = live?.data.branches ?? [];
  if (isLive || record === null || !record.branch_tokens)
    return seen.map((branch, index) => ({ index, ...branch, said: STATES[branch.state] ?? branch.state, why: endOf(branch.finish_reason) }));
  return record.branch_tokens.map((num_tokens, index) => {
    const reason = record.finish_reasons?.[index] ?? null;
    const vote = record.branch_votes?.[index];
    const answer = vote === null || vote === undefined ? (seen[index]?.answer ?? null) : (record.votes[vote]?.answer ?? null);
    const said = reason === "stop" || reason === "length" ? "finished" : (STATES[reason] ?? "gone");
    return { index, num_tokens, answer, reward: record.rewards?.[index] ?? null, trials: seen[index]?.trials ?? [], said, why: endOf(reason) };
  });
}

function votesOf({ live, record, isLive }) {
  if (isLive || record === null || !record.votes) return live?.data.votes ?? [];
  return record.votes.map(({ answer, votes }) => [answer, votes]);
}

export class Opened {
  constructor(dialog, { state, feed, money }) {
    Object.assign(this, { dialog, state, feed, money, key: null, more: null, asked: 0 });
    dialog.addEventListener("close", () => (this.key = null));
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close()); // beside it
  }

  open(key) {
    this.key = key;
    [this.more, this.asked] = [null, 0];
    this.build();
    if (!this.dialog.open) this.dialog.showModal();
    this.update();
  }

  build() {
    this.title = make("h2", { id: "opened-title" });
    this.sub = make("p", { class: "sub" });
    this.facts = make("dl", { class: "facts" });
    this.chart = make("canvas", { class: "chart", role: "img" });
    this.legend = make("ul", { class: "key-list" });
    this.noChart = make("p", { class: "empty" }, "This page saw nothing of it while it ran.");
    const [branches, merges, trials] = [make("div"), make("div"), make("div")];
    this.branches = new Table(branches, {
      name: "branches", caption: "Branches", empty: "No branch has started.", sort: "index", descending: false, most: 256, key: (b) => b.index,
      columns: [
        { key: "index", title: "Branch", value: (b) => b.index },
        { key: "state", title: "State", value: (b) => b.said },
        { key: "answer", title: "Answer", value: (b) => b.answer ?? "", text: (b) => b.answer ?? "–" },
        { key: "why", title: "Ended", value: (b) => b.why },
        { key: "reward", title: "Reward", numeric: true, value: (b) => b.reward, text: (b) => share(b.reward ?? NaN) },
        { key: "tokens", title: "Tokens", numeric: true, value: (b) => b.num_tokens, text: (b) => count(b.num_tokens) },
      ],
    });
    this.merges = new Table(merges, {
      name: "merges", caption: "Merges", empty: "", sort: "place", descending: false, key: (m) => m.place,
      columns: [
        { key: "place", title: "#", value: (m) => m.place },
        { key: "answer", title: "Answer", value: (m) => m.answer, text: (m) => answered(m.answer) },
        { key: "into", title: "Is the same as", value: (m) => m.into, text: (m) => answered(m.into) },
        { key: "by", title: "By", value: (m) => m.by },
        { key: "score", title: "Score", numeric: true, value: (m) => m.score, text: (m) => share(m.score ?? NaN) },
      ],
    });
    this.trials = new Table(trials, {
      name: "trials", caption: "Trials", empty: "", sort: "tokens", descending: false, most: 200, key: (t) => t.place,
      columns: [
        { key: "tokens", title: "At token", numeric: true, value: (t) => t.tokens, text: (t) => count(t.tokens) },
        { key: "branch", title: "Branch", value: (t) => t.branch },
        { key: "answer", title: "Would have answered", value: (t) => t.answer, text: (t) => answered(t.answer) },
        { key: "probability", title: "Probability", numeric: true, value: (t) => t.probability, text: (t) => share(t.probability) },
      ],
    });
    this.parts = { merges: make("section", { hidden: true }, make("h3", {}, "Merged answers"), merges), trials: make("section", { hidden: true }, make("h3", {}, "Trials of running thoughts"), trials) };
    this.textParts = make("div", { hidden: true });
    const close = make("button", { type: "button", onclick: () => this.dialog.close() }, "Close");
    this.dialog.replaceChildren(
      make("div", { class: "opened-head" }, make("div", {}, this.title, this.sub), close),
      make("div", { class: "opened-body", tabindex: "0" }, this.facts, make("h3", {}, "Certaindex over the shares of votes"), this.chart, this.noChart, this.legend,
        make("h3", {}, "Branches"), branches, this.parts.merges, this.parts.trials, this.textParts),
    );
    this.shownTexts = new Map();
  }

  update() {
    if (this.key === null) return;
    const program = known(this.state, this.key);
    if (program === null) return;
    const { live, record, isLive, server } = program;
    const data = { ...(this.more ?? null), ...live?.data, ...(isLive ? null : record) };
    put(this.title, live?.data.id ?? record.program);
    put(this.sub, [data.algorithm, data.tenant, this.state.servers.size > 1 ? server.name : null, isLive ? data.state : record === null ? "ended" : `ended: ${reasonOf(record.stop_reason)}`].filter(Boolean).join(" · "));
    this.fillFacts(data, program);
    this.fillChart(live, record);
    const branches = branchesOf(program);
    this.branches.table.classList.toggle("no-rewards", branches.every(({ reward }) => reward === null));
    this.branches.update(branches);
    this.fillMerges(data.merges ?? []);
    this.fillTrials(program);
    this.askMore(program);
  }

  fillFacts(data, { record, isLive }) {
    const spent = data.num_tokens;
    const facts = [
      ["Answer", isLive ? (data.votes[0] ? answered(data.votes[0][0]) : "none yet") : answered(record?.answer), true],
      ["Certaindex", share(data.certaindex), true],
      ["Tokens", count(spent), true],
      isLive ? ["Age", seconds(data.age_s), true] : ["Took", seconds(record?.latency_s ?? data.age_s), true],
      ["Risk", Number.isFinite(data.risk) ? data.risk.toPrecision(2) : ""],
      ["Branches", isLive ? `${data.branches.length} of ${data.cap}` : record ? `${record.num_branches ?? ""} of ${record.cap ?? ""}` : ""],
      isLive ? ["In flight", `${inFlight(data)}`] : ["Saved", record && Number.isFinite(savedFrac(record)) ? `${count(record.num_saved_tokens)} (${percent(savedFrac(record))})` : ""],
      ["Width", data.width === null || data.width === undefined ? "by the load" : String(data.width)],
      ["First admitted", data.gang ? many(data.gang, "branch", "branches") : ""],
      ["Rule", data.stop_rule ?? ""],
      ["Probes", data.num_probes ? `${count(data.num_probes)}, ${count(data.num_probe_tokens)} tokens` : ""],
      ["Price of a branch", data.price ?? ""],
      ["Budget left", Number.isFinite(data.budget_left_tokens) ? `${count(data.budget_left_tokens)} of ${count(data.budget_tokens)}` : ""],
      ["Cost", this.money(spent)],
      ["Hint", data.hint ?? ""],
      ["Warning", data.warning ?? ""],
    ].filter(([, value]) => value !== "" && value !== null);
    const names = facts.map(([name]) => name).join();
    if (this.factNames !== names || !this.facts.childElementCount) {
      this.factNames = names;
      this.facts.replaceChildren(...facts.map(([name, , big]) => make("div", {}, make("dt", {}, name), make("dd", { class: big ? "big" : "" }))));
    }
    facts.forEach(([, value], index) => put(this.facts.children[index].lastChild, value));
  }

  fillChart(live, record) {
    const has = live !== null && live.history.length > 0;
    this.chart.hidden = this.legend.hidden = !has;
    this.noChart.hidden = has;
    if (!has) return;
    const last = votesOf({ live, record, isLive: live.server.programs.has(this.key) });
    const answers = last.slice(0, VOTE_COLOURS.length).map(([answer]) => answer);
    const said = [["Certaindex", "accent"], ...last.slice(0, 3).map(([answer, weight], index) => [`${answered(answer)} ×${weighed(weight)}`, VOTE_COLOURS[index]])];
    while (this.legend.children.length > said.length) this.legend.lastChild.remove();
    while (this.legend.children.length < said.length) this.legend.append(make("li", {}, make("i"), make("span")));
    said.forEach(([name, colour], index) => {
      const item = this.legend.children[index];
      item.firstChild.style.background = `var(--${colour})`;
      item.firstChild.style.opacity = index ? 0.45 : 1;
      put(item.lastChild, name);
    });
    label(this.chart, "aria-label", `Certaindex now ${share(live.history.at(-1).certaindex)}; votes: ${saidVotes(last) || "none"}`);
    drawHistory(this.chart, live.history, answers, CHART);
  }

  fillMerges(merges) {
    this.parts.merges.hidden = merges.length === 0;
    this.merges.update(merges.map((merge, index) => ({ place: index + 1, ...merge })));
  }

  fillTrials(program) {
    const rows = branchesOf(program).flatMap(({ index, trials }) =>
      (trials ?? []).map(([tokens, answer, probability], place) => ({ place: `${index}.${place}`, branch: index, tokens, answer, probability })));
    if (!rows.length)
      rows.push(...(program.record?.trials ?? []).map((trial, place) => ({ place: `r${place}`, branch: program.record.branch, ...trial })));
    this.parts.trials.hidden = rows.length === 0;
    this.trials.update(rows);
  }

  // What the stream does not carry of a program in flight: its record so far, and its texts where the operator shows them.
  async askMore({ live, isLive, server }) {
    const now = performance.now();
    if (!isLive || now - this.asked < MORE_MS) return;
    this.asked = now;
    const key = this.key;
    const query = new URLSearchParams({ id: live.data.id, owner: live.data.owner ?? "", server: server.id });
    try {
      const response = await fetch(`dynasor/opened?${query}`, { headers: this.feed.headers(), cache: "no-store" });
      if (!response.ok) return;
      const more = await response.json();
      if (key !== this.key) return; // another was opened meanwhile
      this.more = more;
      if (this.more.texts) this.fillTexts(this.more.texts);
    } catch {
      // The stream says what is wrong.
    }
  }

  fillTexts({ prompt, branches }) {
    this.textParts.hidden = false;
    if (!this.shownTexts.size) this.textParts.replaceChildren(make("h3", {}, "Texts"));
    const show = (name, text) => {
      if (!this.shownTexts.has(name)) {
        const pre = make("pre", { tabindex: "0" });
        this.shownTexts.set(name, pre);
        this.textParts.append(make("details", {}, make("summary", {}, name), pre));
      }
      put(this.shownTexts.get(name), text);
    };
    show("Prompt", prompt);
    for (const [index, text] of Object.entries(branches)) show(`Branch ${index}`, text);
  }
}
