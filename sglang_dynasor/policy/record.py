"""What the keys of a program's record mean; docs/reference.md is made from this, and a test compares it with real records."""

from __future__ import annotations

ALWAYS = "always"
_VOTE = "`vote` other than `majority`"
_JUDGE = "`judge`"
_COMPARED = "`equal` symbolic, model or embedding"
_STATISTICS = "statistics"
_LONG_COT = "`long_cot`"
_SEARCH = "searches"

# By key: where a record has it, and what it says.
RECORD_HELP: dict[str, tuple[str, str]] = {
    "program": (ALWAYS, "id: the response's id, or the client's program id"),
    "algorithm": (ALWAYS, "as asked for"),
    "answer": (ALWAYS, "the winning answer as written, up to 256 characters; null if no branch gave one"),
    "certaindex": (ALWAYS, "how sure the program is, in [0, 1]. Of votes 1 - `risk`; of `best_of_n` and searches the best reward, of `mcts` the mean; of a single thought the share of the last `agree` trials that say what the latest says"),
    "risk": (ALWAYS, "bound on the chance that the branches left would change the answer, each vote counted as one; 0 once the cap is used up without a tie"),
    "entropy_certaindex": (ALWAYS, "the paper's (log n - H) / log n over the votes"),
    "votes": (ALWAYS, "answers with their votes, the leading one first (by weight, if votes weigh)"),
    "num_abstentions": (ALWAYS, "branches that finished without an answer, or ended as weak"),
    "num_failed": (ALWAYS, "branches the engine gave up (time-out, full queue)"),
    "branch": (ALWAYS, "index of the branch whose text was returned; of branches that clients send, of the one that gave the answer"),
    "num_branches": (ALWAYS, "branches started; of searches, solutions finished"),
    "cap": (ALWAYS, "most branches allowed in all"),
    "num_tokens": (ALWAYS, "tokens really generated, those of ended branches included; `usage.completion_tokens` says the same"),
    "branch_tokens": (ALWAYS, "tokens of each branch; of searches, of each solution's path"),
    "stop_rule": (ALWAYS, "as asked for"),
    "stop_reason": (ALWAYS, "`certain` (the rule fired), `cap` (all used up), `deadline` (time was up: the best so far, or the text there was), `failed` (our code failed and any finished branch answered: then the record has this key and `program` only; of a search: nothing came back), `hopeless` (the author allowed a search to be abandoned); null while a client's program goes on"),
    "width": ("all but searches", "most branches the client allowed in flight; null: the load decides"),
    "gang": ("all but searches", "branches admitted together at first; fewer than asked for where the engine could not hold more"),
    "num_cached_tokens": ("all but searches", "prompt tokens that branches found in the radix cache"),
    "overtaken_tokens": ("all but searches", "service that later arrivals had been given when the newest branches started"),
    "index": ("branches that clients send", "which of them this request is, in `branch` and `branch_tokens`"),
    "vote": (f"{_VOTE}; {_SEARCH}", "what votes weigh"),
    "leader_share": (_VOTE, "the winning answer's share of all weight"),
    "rewards": (f"{_JUDGE}; {_SEARCH}", "reward of each branch in [0, 1]; null where it has none"),
    "num_judge_tokens": (_JUDGE, "tokens that the model's own judgements computed; not in `num_tokens`"),
    "merges": (_COMPARED, "answers that were found to be an earlier one: `answer`, `into` which, `by` whom, with what `score` (the model's probability of yes, the cosine; null of `symbolic`)"),
    "num_comparisons": (_COMPARED, "new answers that were compared with known ones"),
    "num_compare_tokens": ('`equal: "model"`', "tokens that the model computed to compare; not in `num_tokens`"),
    "confidences": (_STATISTICS, "lowest group confidence of each branch (nats, higher is surer)"),
    "num_weak": (_STATISTICS, "branches ended for their low confidence"),
    "answer_entropy": (_STATISTICS, "mean entropy (nats) of the branches' distributions at their answer's first token; null where no branch came to one (`choice`, `number`, `last_line` and `regex` have no mark that tells)"),
    "disagreement": (_STATISTICS, "how far those distributions differ: their Jensen-Shannon divergence (nats); null as above"),
    "exit": (_LONG_COT, "the rule that closes a thought"),
    "num_probes": (_LONG_COT, "probes made"),
    "num_probe_tokens": (_LONG_COT, "tokens that probes computed (suffix and trial answer); not in `num_tokens`"),
    "closed_at_tokens": (_LONG_COT, "of each chain, the tokens of its thought when it was closed; null where it ended by itself"),
    "trials": (_LONG_COT, "what the winning chain would have answered: `tokens`, `answer`, `probability`"),
    "warning": ('`exit: "published"`', "what that rule is known to lose"),
    "num_nodes": (_SEARCH, "nodes of the tree"),
    "num_rounds": ("`rebase`", "rounds that the width was spent in"),
    "beams": ("`beam`", "paths kept at each depth"),
    "error": ("`sglang_dynasor.solve`", "why a question failed; then the record has this key and `stop_reason` only"),
}  # fmt: skip
