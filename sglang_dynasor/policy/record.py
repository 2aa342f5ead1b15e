"""A program's record: what the client and the operator are told, and what its keys mean.

docs/reference.md is made from RECORD_HELP, and a test compares that with real records.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang_dynasor.policy.answers import shown
from sglang_dynasor.policy.branch import BranchState
from sglang_dynasor.policy.certaindex import entropy_certaindex
from sglang_dynasor.policy.hint import hint
from sglang_dynasor.policy.thought import PUBLISHED_WARNING, agreement

if TYPE_CHECKING:
    from sglang_dynasor.policy.program import Program

ALWAYS = "always"
_VOTE = "`vote` other than `majority`"
_JUDGE = "`judge`"
_COMPARED = "`equal` symbolic, model or embedding"
_REASONING = "`--reasoning-parser`"
_STATISTICS = "statistics"
_LONG_COT = "`long_cot`"
_SEVERAL = "`long_cot` with `trials` in `stop`"
_SEARCH = "searches"

# By key: where a record has it, and what it says.
RECORD_HELP: dict[str, tuple[str, str]] = {
    "program": (ALWAYS, "id: the response's id, or the client's program id"),
    "algorithm": (ALWAYS, "as asked for"),
    "template": ("`template`, or a default", "NAME@VERSION of the operator's settings that it had"),
    "tenant": ("`tenant`", "as asked for"),
    "answer": (ALWAYS, "the winning answer as written, up to 256 characters; null if no branch gave one"),
    "certaindex": (ALWAYS, "how sure the program is, in [0, 1]. Of votes 1 - `risk`; of `best_of_n` and searches the best reward, of `mcts` the mean; of a single thought the share of the last `agree` trials that say what the latest says; of several that decided while they thought the leading answer's share of them"),
    "risk": (ALWAYS, "bound on the chance that the branches left would change the answer, each vote counted as one and trusted the less the more were in flight when it ended; once the cap is used up, that as many branches again would"),
    "entropy_certaindex": (ALWAYS, "the paper's (log n - H) / log n over the votes"),
    "votes": (ALWAYS, "answers with their votes, the leading one first (by weight, if votes weigh)"),
    "branch_votes": ("all but searches", "of each branch, the place in `votes` of the answer that it voted for; null: it did not vote"),
    "leader_share": (ALWAYS, "the winning answer's share of all votes, by weight"),
    "num_abstentions": (ALWAYS, "branches that finished without an answer, or ended as weak"),
    "num_truncated": (ALWAYS, "branches that ended by their length (or, at a deadline, because time was up); such a one votes only where a mark says that its answer is complete"),
    "num_failed": (ALWAYS, "branches the engine gave up (time-out, full queue)"),
    "branch": (ALWAYS, "index of the branch whose text was returned; of branches that clients send, of the one that gave the answer"),
    "num_branches": (ALWAYS, "branches started; of searches, solutions finished"),
    "cap": (ALWAYS, "most branches allowed in all"),
    "num_tokens": (ALWAYS, "tokens really generated, those of ended branches included; `usage.completion_tokens` says the same"),
    "branch_tokens": (ALWAYS, "tokens of each branch; of searches, of each solution's path"),
    "finish_reasons": (ALWAYS, "how each ended: `stop` or `length` by itself, `ended` (no longer needed), `weak`, `failed`; null while in flight"),
    "hint": ("where there is one", "what to change: nobody could vote, or what was asked for works against itself"),
    "stop_rule": (ALWAYS, "as asked for"),
    "stop_reason": (ALWAYS, "`certain` (the rule fired before every branch was used), `cap` (all used up), `deadline` (time was up: the best so far, or the text there was), `operator` (who runs the server wanted the answer then), `budget` (the tokens that it shares were used up, or no branch could change its answer), `price` (one more branch was not worth its price under the load), `aborted` (the client gave it up, or it waited longer than SGLang lets requests wait; what there was), `failed` (our code failed and any finished branch answered: then the record has only this key, `program`, and `tenant` if there is one; of a search: nothing came back), `hopeless` (the author allowed a search to be abandoned); null while a client's program goes on"),
    "width": ("all but searches", "most branches the client allowed in flight; null: the load decides"),
    "gang": ("all but searches", "branches admitted together at first; fewer than asked for where the engine could not hold more"),
    "num_cached_tokens": ("all but searches", "prompt tokens that branches found in the radix cache"),
    "overtaken_tokens": ("all but searches", "service that later arrivals had been given when the newest branches started"),
    "budget_tokens": ("`budget_tokens`", "as asked for, of all programs that share it"),
    "budget_left_tokens": ("`budget_tokens`", "tokens that the programs so far had brought and not used, less those held for branches in flight; below 0: overdrawn"),
    "price": ("`--dynasor-max-price`", "of a branch when the program was last asked about it, by the load then: what it must be worth, as risk removed"),
    "num_reasoning_tokens": (_REASONING, "of `num_tokens`, those in thoughts"),
    "index": ("branches that clients send", "which of them this request is, in `branch` and `branch_tokens`"),
    "vote": (f"{_VOTE}; {_SEARCH}", "what votes weigh"),
    "rewards": (f"{_JUDGE}; {_SEARCH}", "reward of each branch in [0, 1]; null where it has none"),
    "reward_mean": (_JUDGE, "of the rewards that came before the decision; null where there are none, as the next two"),
    "reward_max": (_JUDGE, "the best of them"),
    "reward_variance": (_JUDGE, "of them as the whole population"),
    "num_judge_tokens": (_JUDGE, "tokens that the model's own judgements computed; not in `num_tokens`"),
    "merges": (_COMPARED, "answers that were found to be an earlier one: `answer`, `into` which, `by` whom, with what `score` (the model's probability of yes, the cosine; null of `symbolic`)"),
    "num_comparisons": (_COMPARED, "new answers that were compared with known ones before the program was over"),
    "num_compare_tokens": ('`equal: "model"`', "tokens that the model computed to compare; not in `num_tokens`"),
    "confidences": (_STATISTICS, "lowest group confidence of each branch (nats, higher is surer)"),
    "num_weak": (_STATISTICS, "branches ended for their low confidence"),
    "answer_entropy": (_STATISTICS, "mean entropy (nats) of the branches' distributions over their answers, all tokens of one together; null where no branch said one to its end (`choice`, `number`, `last_line` and `regex` have no mark that tells)"),
    "disagreement": (_STATISTICS, "how far those distributions differ: their Jensen-Shannon divergence (nats); null as above"),
    "num_answer_tokens": (_STATISTICS, "tokens of answers that these two are over, all branches together, what ends an answer included"),
    "exit": (_LONG_COT, "the rule by which a thought's own trials close it; `together`: none, what all chains say does"),
    "num_probes": (_LONG_COT, "probes made"),
    "num_probe_tokens": (_LONG_COT, "tokens that probes computed (suffix and trial answer); not in `num_tokens`"),
    "closed_at_tokens": (_LONG_COT, "of each chain, the tokens of its thought when it was closed; null where it ended by itself"),
    "asked_at_tokens": (_SEVERAL, "of each chain, the tokens of its thought when it was asked"),
    "shares": (_SEVERAL, "each change of what the chains said together: `tokens` of thought since the first was asked, the `answer` that led, as it was written first (null: a tie, or nobody says any), its `share` of all chains"),
    "trials": (_LONG_COT, "what the winning chain would have answered: `tokens`, `answer`, `probability`"),
    "warning": ('`exit: "published"`', "what that rule is known to lose"),
    "num_nodes": (_SEARCH, "nodes of the tree"),
    "num_rounds": ("`rebase`", "rounds that the width was spent in"),
    "beams": ("`beam`", "paths kept at each depth"),
    "error": ("`sglang_dynasor.solve`", "why a question failed; then the record has this key and `stop_reason` only"),
}  # fmt: skip


def record_of(program: Program) -> dict[str, Any]:
    """What the client and the operator are told; JSON. Keys are explained in docs/reference.md."""
    evidence, winner = program.evidence, program.winner
    return {
        "program": program.id,
        "algorithm": program.spec.algorithm,
        **({"template": program.spec.template} if program.spec.template else {}),
        **({"tenant": program.spec.tenant} if program.spec.tenant else {}),
        "answer": shown(program.branches[winner].answer) if winner is not None else None,
        "certaindex": round(program.certaindex, 6),
        "risk": round(program.risk, 6),
        "entropy_certaindex": round(entropy_certaindex(evidence.counts), 6),
        "votes": [
            {"answer": shown(program.branches[min(who)].answer), "votes": len(who)} for who in program.votes.ranking
        ],
        "branch_votes": _branch_votes(program),
        "leader_share": round(evidence.leader_share, 6),
        "num_abstentions": evidence.abstentions,
        "num_truncated": sum(b.ending is not None and b.ending.is_cut for b in program.branches),
        "num_failed": program.num_failed,
        "branch": winner,
        "num_branches": len(program.branches),
        "cap": program.spec.branches,
        "width": program.spec.width,
        "gang": program.gang,
        "num_tokens": sum(branch.num_tokens for branch in program.branches),
        "num_cached_tokens": sum(branch.num_cached_tokens for branch in program.branches),
        "branch_tokens": [branch.num_tokens for branch in program.branches],
        "finish_reasons": [branch.finish_reason for branch in program.branches],
        "overtaken_tokens": program.overtaken_tokens,
        "stop_rule": program.spec.stop.text,
        "stop_reason": None if program.reason is None else str(program.reason),
        **_statistics(program),
        **_thoughts(program),
        **program.comparisons.record(program.branches),
        **_prices(program),
        **_hint(program),
    }


def _branch_votes(program: Program) -> list[int | None]:
    voted = {index: place for place, who in enumerate(program.votes.ranking) for index in who}
    return [voted.get(index) for index in range(len(program.branches))]


def _thoughts(program: Program) -> dict[str, Any]:
    """Keys that the record of a long chain of thought has."""
    thought, winner = program.spec.thought, program.winner
    if thought is None:
        return {}
    trials = [] if winner is None else program.branches[winner].trials
    more: dict[str, Any] = {
        "exit": f"{thought.agree} agreeing trials, each at least {thought.level:g} likely"
        if thought.settles
        else "together",
        "num_probes": program.num_probes,
        "num_probe_tokens": program.num_probe_tokens,
        "closed_at_tokens": [branch.closed_at for branch in program.branches],
        "trials": [
            {"tokens": t.num_tokens, "answer": shown(t.answer), "probability": round(t.probability, 6)} for t in trials
        ],
    }
    if (chains := program.chains) is not None and chains.decide_together:
        more["asked_at_tokens"] = [[trial.num_tokens for trial in branch.trials] for branch in program.branches]
        more["shares"] = [
            {
                "tokens": moment.tokens,
                "answer": None if moment.leader is None else shown(chains.written[moment.leader]),
                "share": round(moment.share, 6),
            }
            for moment in chains.moments
        ]
    if program.spec.branches == 1:
        more["certaindex"] = round(agreement(trials, thought.agree), 6)
    if thought.is_published:
        more["warning"] = PUBLISHED_WARNING
    return more


def _prices(program: Program) -> dict[str, Any]:
    """Keys that a record has where branches have a price, tokens are shared, or SGLang counts those of thoughts."""
    more: dict[str, Any] = {}
    if program.budget is not None:
        more["budget_tokens"] = program.budget.tokens
        more["budget_left_tokens"] = round(program.budget.left_tokens)
    if program.price is not None:
        more["price"] = round(program.price, 6)
    if num_tokens := sum(branch.num_reasoning_tokens for branch in program.branches):
        more["num_reasoning_tokens"] = num_tokens
    return more


def _hint(program: Program) -> dict[str, Any]:
    """What the client could do better, where there is something."""
    said = hint(program.spec, program.branches, program.constraint)
    return {} if said is None else {"hint": said}


def _statistics(program: Program) -> dict[str, Any]:
    """Keys that a record has where the client asked for a judge or for statistics."""
    more: dict[str, Any] = {}
    if program.spec.vote != "majority":
        more["vote"] = program.spec.vote
    if program.spec.judge is not None:
        more["num_judge_tokens"] = program.num_judge_tokens
        more["rewards"] = [_rounded(branch.reward) for branch in program.branches]
        evidence = program.evidence
        more["reward_mean"] = _rounded(evidence.reward_mean)
        more["reward_max"] = _rounded(evidence.reward_max)
        more["reward_variance"] = _rounded(evidence.reward_variance)
    if program.spec.needs_statistics:
        more["confidences"] = [_rounded(b.confidence and b.confidence.lowest) for b in program.branches]
        more["num_weak"] = sum(branch.state is BranchState.WEAK for branch in program.branches)
        mixture = program.answers.mixture
        is_said = mixture.num_branches > 0  # an answer that begins by a mark
        more["answer_entropy"] = round(mixture.mean_entropy, 6) if is_said else None
        more["disagreement"] = round(mixture.disagreement, 6) if is_said else None
        more["num_answer_tokens"] = mixture.num_tokens
    return more


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)
