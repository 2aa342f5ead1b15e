// What the page knows: servers, programs in flight with their history, and the newest that finished.

const MOST_MOMENTS = 600; // of one program's history, and of a server's load
const MOST_ENDED = 400; // programs whose history is kept after they ended
const MOST_FINISHED = 3000;
const RATE_S = 10; // over which tokens per second are counted

export class State {
  constructor() {
    this.servers = new Map(); // by number, as the stream names them
    this.ended = new Map(); // programs seen in flight that no longer are, by key
    this.finished = new Map(); // records, by key
  }

  server(id) {
    if (!this.servers.has(id))
      this.servers.set(id, { id, name: "", model: "", hasTexts: false, trouble: "", frame: null, programs: new Map(), load: [], totals: [] });
    return this.servers.get(id);
  }

  hear(event, data, id) {
    const server = this.server(id);
    if (event === "server") server.name = data.name;
    else if (event === "hello") {
      Object.assign(server, { model: data.model, hasTexts: data.has_texts, version: data.version });
      server.trouble = "";
    } else if (event === "state") this.see(server, data);
    else if (event === "finished") this.finish(server, data);
    else if (event === "trouble") {
      server.trouble = data.error;
      if (data.is_gone) [server.frame, server.programs] = [null, new Map()];
    }
  }

  see(server, frame) {
    server.frame = frame;
    server.trouble = "";
    const seen = new Map();
    for (const scheduler of frame.schedulers)
      for (const data of scheduler.programs) {
        const key = keyOf(server, data.owner, data.id);
        const known = server.programs.get(key) ?? { key, server, rank: scheduler.rank, history: [], firstSeen: frame.time_s };
        known.data = data;
        known.leader = data.votes.length ? data.votes[0][0] : undefined;
        remember(known.history, { t: frame.time_s, certaindex: data.certaindex, votes: data.votes, tokens: data.num_tokens });
        seen.set(key, known);
        this.ended.delete(key);
      }
    for (const [key, program] of server.programs)
      if (!seen.has(key)) {
        this.ended.set(key, program);
        if (this.ended.size > MOST_ENDED) this.ended.delete(this.ended.keys().next().value);
      }
    server.programs = seen;
    const load = loadOf(frame);
    push(server.load, { t: frame.time_s, ...load });
    push(server.totals, { t: frame.time_s, tokens: load.spent });
  }

  finish(server, rows) {
    for (const row of rows) {
      const key = keyOf(server, row.owner, row.program);
      this.finished.delete(key); // the newest last
      this.finished.set(key, { key, server, ...row, program: row.program });
    }
    while (this.finished.size > MOST_FINISHED) this.finished.delete(this.finished.keys().next().value);
  }

  chosen(only) {
    const servers = [...this.servers.values()];
    return only === "" ? servers : servers.filter((server) => server.id === only);
  }

  find(key) {
    for (const server of this.servers.values()) if (server.programs.has(key)) return server.programs.get(key);
    return this.ended.get(key) ?? null;
  }
}

// Two owners may call their programs the same.
function keyOf(server, owner, id) {
  return `${server.id}\n${owner ?? ""}\n${id}`;
}

function push(list, moment) {
  list.push(moment);
  if (list.length > MOST_MOMENTS) list.shift();
}

// Only changes, and now: what stays the same is one moment that grows.
function remember(history, moment) {
  const [before, last] = [history.at(-2), history.at(-1)];
  const same = (a, b) => a && b && a.certaindex === b.certaindex && JSON.stringify(a.votes) === JSON.stringify(b.votes);
  if (same(before, last) && same(last, moment)) history.pop();
  push(history, moment);
}

export function loadOf(frame) {
  const sum = (value) => frame.schedulers.reduce((total, scheduler) => total + value(scheduler), 0);
  const flight = sum((s) => s.programs.reduce((total, program) => total + program.num_tokens, 0));
  const over = (frame.sums ?? []).reduce((total, line) => total + line.num_tokens, 0); // of programs that were given up, too
  return {
    rows: sum((s) => s.rows.used), rowsOf: sum((s) => s.rows.of), kv: sum((s) => s.kv_tokens.used), kvOf: sum((s) => s.kv_tokens.of),
    queued: sum((s) => s.num_queued), flight, spent: flight + over, unseen: sum((s) => s.num_programs_left ?? 0),
  };
}

export function rate(server) {
  const last = server.totals.at(-1);
  if (!last) return NaN;
  const first = server.totals.find((moment) => moment.t >= last.t - RATE_S);
  const [tokens, time] = [last.tokens - first.tokens, last.t - first.t];
  return time > 1 ? Math.max(0, tokens / time) : NaN; // one that has just ended may be in neither sum for a moment
}

// Sums of the servers since their start, by what `name` says of each line.
export function sumsBy(servers, name) {
  const lines = new Map();
  const line = (label) => {
    if (!lines.has(label)) lines.set(label, { label, flight: 0, num_programs: 0, num_branches: 0, num_branches_saved: 0, num_tokens: 0, num_saved_tokens: 0 });
    return lines.get(label);
  };
  for (const server of servers) {
    for (const sum of server.frame?.sums ?? []) {
      const into = line(name(sum));
      for (const key of ["num_programs", "num_branches", "num_branches_saved", "num_tokens", "num_saved_tokens"]) into[key] += sum[key];
    }
    for (const program of server.programs.values()) line(name(program.data)).flight += 1;
  }
  return [...lines.values()];
}
