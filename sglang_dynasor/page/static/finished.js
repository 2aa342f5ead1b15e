// The newest programs that finished: sorted, filtered, and saved as a file.

import { answered, brief, clock, label, make, percent, put, seconds, share } from "./dom.js";
import { parts, Table } from "./table.js";
import { reasonOf } from "./words.js";

export const SAVED_KEYS = [
  "time", "program", "server", "algorithm", "tenant", "answer", "certaindex", "risk", "stop_reason", "stop_rule", "num_branches", "cap", "num_tokens",
  "num_saved_tokens", "latency_s", "leader_share", "num_abstentions", "num_truncated", "num_failed", "votes",
];

export const row = ({ key, server, ...record }) => ({ ...record, time: new Date(1000 * record.time_s).toISOString(), server: server.name });

function clipped(text, title = text) {
  return (cell, r) => {
    const [span] = parts(cell, () => {
      const span = make("span", { class: "clip" });
      cell.append(span);
      return [span];
    });
    put(span, text(r));
    label(span, "title", String(title(r) ?? ""));
  };
}

export function finishedTable(host, { open }) {
  return new Table(host, {
    name: "finished", caption: "Finished programs", empty: "No program has finished yet.", sort: "time", most: 50, key: (r) => r.key,
    columns: [
      { key: "time", title: "Time", value: (r) => r.time_s, text: (r) => clock(r.time_s) },
      { key: "id", title: "Program", value: (r) => r.program, fill: (cell, r) => {
        const [button] = parts(cell, () => {
          const button = make("button", { type: "button", class: "open clip", onclick: () => open(cell.parts.key) });
          cell.append(button);
          return Object.assign([button], { key: "" });
        });
        cell.parts.key = r.key;
        put(button, r.program);
        label(button, "title", r.program);
      } },
      { key: "algorithm", title: "Algorithm", value: (r) => r.algorithm ?? "", fill: clipped((r) => r.algorithm ?? "") },
      { key: "tenant", title: "Tenant", value: (r) => r.tenant ?? "", fill: clipped((r) => r.tenant ?? "") },
      { key: "answer", title: "Answer", value: (r) => r.answer ?? "", fill: clipped((r) => answered(r.answer)) },
      { key: "reason", title: "Ended by", value: (r) => r.stop_reason ?? "", fill: clipped((r) => r.stop_reason ?? "goes on", (r) => reasonOf(r.stop_reason)) },
      { key: "sure", title: "Certaindex", numeric: true, value: (r) => r.certaindex, text: (r) => share(r.certaindex) },
      { key: "branches", title: "Branches", numeric: true, value: (r) => r.num_branches, text: (r) => (r.cap ? `${r.num_branches} of ${r.cap}` : "") },
      { key: "tokens", title: "Tokens", numeric: true, value: (r) => r.num_tokens, text: (r) => brief(r.num_tokens) },
      { key: "saved", title: "Saved", numeric: true, hint: "Against using every branch of the cap, each as long as its own branches were", value: (r) => savedFrac(r), text: (r) => percent(savedFrac(r)) },
      { key: "latency", title: "Took", numeric: true, value: (r) => r.latency_s, text: (r) => seconds(r.latency_s) },
    ],
  });
}

export const savedFrac = (r) => (r.num_tokens ? r.num_saved_tokens / (r.num_saved_tokens + r.num_tokens) : NaN);
