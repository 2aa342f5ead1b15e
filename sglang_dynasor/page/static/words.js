// What states and reasons mean, in words.

export const STATES = {
  queued: "queued", running: "running", probed: "asked for its answer", judged: "being judged", compared: "answer being compared",
  finished: "finished", ended: "ended early", weak: "ended early", failed: "given up",
};

const ENDS = {
  stop: "by itself", length: "cut by its length", ended: "no longer needed", weak: "low confidence", failed: "the engine gave it up (time-out, full queue)",
};

export const endOf = (reason) => (reason === null || reason === undefined ? "" : (ENDS[reason] ?? String(reason)));

const REASONS = {
  certain: "sure enough before every branch was used", cap: "every branch was used", deadline: "its time was up", operator: "the operator wanted its answer",
  budget: "the tokens that it shares were used up", price: "one more branch was not worth its price", failed: "nothing could answer", hopeless: "the search was abandoned",
  aborted: "its client gave it up, or it waited too long",
};

export const reasonOf = (reason) => (reason === null || reason === undefined ? "goes on" : (REASONS[reason] ?? String(reason)));
