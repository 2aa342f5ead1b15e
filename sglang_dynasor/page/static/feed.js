// The stream of events of the server that sent this page. It is read by fetch, which can send a key; EventSource cannot.

const SILENT_MS = 15_000; // longer than the server is ever silent
const HIDDEN_MS = 5_000; // nobody looks: the server need not, either
const MOST_CHARS = 64_000_000; // of one event

export class Feed {
  constructor(path, { onEvent, onState }) {
    Object.assign(this, { path, onEvent, onState, key: sessionStorage.getItem("dynasor.key") ?? "", tries: 0, running: null, timer: 0 });
    document.addEventListener("visibilitychange", () => {
      clearTimeout(this.hiding);
      if (document.hidden) this.hiding = setTimeout(() => this.stop(), HIDDEN_MS);
      else if (!this.running) this.start();
    });
  }

  headers() {
    return this.key ? { Authorization: `Bearer ${this.key}` } : {};
  }

  setKey(key) {
    this.key = key;
    if (key) sessionStorage.setItem("dynasor.key", key);
    else sessionStorage.removeItem("dynasor.key");
    this.tries = 0;
    this.stop();
    this.start();
  }

  start() {
    clearTimeout(this.timer);
    if (document.hidden) return; // opened in a tab that nobody looks at yet
    this.running = new AbortController();
    this.read(this.running);
  }

  stop() {
    clearTimeout(this.timer);
    this.running?.abort();
    this.running = null;
  }

  async read(running) {
    let silence = 0;
    const alive = () => {
      clearTimeout(silence);
      silence = setTimeout(() => running.abort(), SILENT_MS);
    };
    let why = "the connection ended";
    try {
      alive();
      const response = await fetch(this.path, { headers: this.headers(), cache: "no-store", signal: running.signal });
      if (response.status === 401 || response.status === 403) {
        if (running === this.running) this.running = null;
        this.onState("locked", this.key ? "the server does not take this key" : "the server asks for a key");
        return;
      }
      if (!response.ok) throw new Error(`the server answers ${response.status}`);
      this.tries = 0;
      this.onState("on", "");
      await this.events(response.body, alive);
    } catch (error) {
      if (running !== this.running) return; // we stopped it
      why = error.name === "AbortError" ? "the server is silent" : error.message;
    } finally {
      clearTimeout(silence);
    }
    if (running !== this.running) return;
    this.running = null;
    const wait_ms = Math.min(15_000, 500 * 2 ** this.tries++);
    this.onState("off", `${why}; next try in ${Math.max(1, Math.round(wait_ms / 1000))} s`);
    if (!document.hidden) this.timer = setTimeout(() => this.start(), wait_ms);
  }

  async events(body, alive) {
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    let pieces = [];
    let size = 0;
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      alive();
      pieces.push(value);
      size += value.length;
      if (size > MOST_CHARS) throw new Error("an event is too long");
      // Joined only where an event may end, so that one that comes in many pieces is not copied for each.
      if (!value.includes("\n")) continue;
      const events = pieces.join("").split("\n\n");
      const rest = events.pop();
      pieces = [rest];
      size = rest.length;
      for (const event of events) this.hear(event);
    }
  }

  hear(text) {
    const event = { event: "message", id: "", data: "" };
    for (const line of text.split("\n")) {
      const at = line.indexOf(":");
      if (at > 0) event[line.slice(0, at)] = line.slice(at + 1).trimStart();
    }
    if (event.data) this.onEvent(event.event, JSON.parse(event.data), event.id);
  }
}
