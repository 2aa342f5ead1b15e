"""Prometheus metrics of programs: their names, what they mean, and what a finished program adds to them.

docs/reference.md is made from METRICS; tests compare it with a server's /metrics, and the dashboard and alerts with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from sglang_dynasor.observe.savings import SAVING
from sglang_dynasor.policy.program import StopReason

MOST_TENANTS = 16  # that have a label of their own, besides those that the operator named
OTHER_TENANT = "other"  # the label of all beyond
# The outcome besides a record's `stop_reason`.
FALLBACK = "fallback"
UNANSWERED = (StopReason.FAILED, StopReason.ABORTED, FALLBACK)  # there is nothing to be sure of

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)
_BRANCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128, 256)
_TOKENS = (64, 256, 1024, 4096, 16384, 65536, 262144, 1048576)
_PROGRAM = ("algorithm",)


class Metric(NamedTuple):
    """One metric. `status` is the counter of /dynasor/status that it follows at SGLang's own intervals."""

    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    status: str = ""


METRICS: dict[str, Metric] = {
    # Of programs that are over
    "dynasor_programs_total": Metric("counter", "programs that are over, by outcome: a record's `stop_reason`, or `fallback`: our own code failed", (*_PROGRAM, "outcome", "tenant")),
    "dynasor_program_seconds": Metric("histogram", "seconds from a program's arrival in the scheduler to its end", (*_PROGRAM, "outcome"), _SECONDS),
    "dynasor_wait_seconds": Metric("histogram", "seconds that a program waited until its gang started", _PROGRAM, _SECONDS),
    "dynasor_overtaken_ratio": Metric("histogram", "service that later arrivals got before a program's newest branches started, over `--dynasor-patience-tokens`; 1 makes it head of the line (0 patience: not observed)", (), (0.01, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 4, 8)),
    "dynasor_gang_branches": Metric("histogram", "branches admitted together at first", _PROGRAM, _BRANCHES),
    "dynasor_width": Metric("histogram", "most branches that a program had in flight at once", _PROGRAM, _BRANCHES),
    "dynasor_program_branches": Metric("histogram", "branches that a program started", _PROGRAM, _BRANCHES),
    "dynasor_program_tokens": Metric("histogram", "tokens that a program generated", _PROGRAM, _TOKENS),
    "dynasor_certaindex": Metric("histogram", "certaindex of answered programs at the end", _PROGRAM, (0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.98, 0.99, 1)),
    "dynasor_risk": Metric("histogram", "risk of answered programs at the end", _PROGRAM, (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)),
    "dynasor_branches_total": Metric("counter", "branches that programs started, by how each ended (`stop`, `length`, `weak`, `failed`; `ended`: no longer needed) and the program's outcome", (*_PROGRAM, "end", "outcome")),
    "dynasor_branches_saved_total": Metric("counter", "branches that their caps allowed and that were never started, of programs that ended as sure or priced out; others have saved nothing", _PROGRAM),
    "dynasor_tokens_total": Metric("counter", "tokens that programs generated, all branches together", (*_PROGRAM, "tenant")),
    "dynasor_tokens_saved_estimate_total": Metric("counter", "estimate: of each program, the branches saved times the mean length of its branches that came to their own end; the rest of branches that were ended is not in it", _PROGRAM),
    "dynasor_branches_truncated_total": Metric("counter", "branches that ended by their length, or because time was up", _PROGRAM),
    "dynasor_abstentions_total": Metric("counter", "branches without an answer, or ended as weak", _PROGRAM),
    "dynasor_probes_total": Metric("counter", "times that a running thought was asked for its answer"),
    "dynasor_probe_tokens_total": Metric("counter", "tokens that this computed; not in dynasor_tokens_total"),
    "dynasor_judge_tokens_total": Metric("counter", "tokens that the model computed to judge branches; not in dynasor_tokens_total"),
    "dynasor_compare_tokens_total": Metric("counter", "tokens that the model computed to compare answers; not in dynasor_tokens_total"),
    # As /dynasor/status counts
    "dynasor_fallbacks_total": Metric("counter", "exceptions in our own code that fell back to stock behaviour: must stay 0", status="num_policy_errors"),
    "dynasor_aside": Metric("gauge", "1: such exceptions came again and again, and programs are refused with HTTP 503; 0: they are served", status="is_aside"),
    "dynasor_reward_errors_total": Metric("counter", "branches that went on without the reward model's word", status="num_reward_errors"),
    "dynasor_comparisons_total": Metric("counter", "answers compared beside the loop (`equal` symbolic, model, embedding)", status="num_comparisons"),
    "dynasor_merges_total": Metric("counter", "of those, found to be a known answer", status="num_merges"),
    "dynasor_comparison_errors_total": Metric("counter", "of those, left apart because what compares did not say", status="num_comparison_errors"),
    "dynasor_probe_waves_total": Metric("counter", "prefill passes in which thoughts were asked together", status="num_probe_waves"),
    "dynasor_watched_steps_total": Metric("counter", "steps in which logits were read", status="num_steps_watched"),
    # Live
    "dynasor_held_programs": Metric("gauge", "programs that owe their client an answer", status="num_held_programs"),
    "dynasor_waiting_programs": Metric("gauge", "of those, waiting for room", status="num_waiting_programs"),
    "dynasor_expected_branches": Metric("gauge", "branches that waiting programs are expected to need, and those that follow their leader: in sglang:num_queue_reqs, too", status="num_branches_expected"),
    "dynasor_inside_branches": Metric("gauge", "branches, judges and probes that SGLang holds, queued or running", status="num_branches_inside"),
    "dynasor_queued_branches": Metric("gauge", "of those, queued and not yet in a batch", status="num_branches_queued"),
    "dynasor_max_overtaken_tokens": Metric("gauge", "most service that later arrivals were given before a program that waited was started", status="max_overtaken_tokens"),
    "dynasor_patience_tokens": Metric("gauge", "service that later arrivals may get before a waiting program is head of the line", status="patience_tokens"),
    "dynasor_fixed_rows": Metric("gauge", "rows that take as long as the fixed part of a step on this machine", status="fixed_rows"),
    "dynasor_price": Metric("gauge", "of a branch when a program was last asked about it (`--dynasor-max-price`), as risk removed; 0 where no program is there", status="price"),
}  # fmt: skip


class TenantLabels:
    """Which tenants have a label of their own: those that the operator named, and the first MOST_TENANTS others."""

    def __init__(self, named: Iterable[str]):
        self._known = {"", *named}
        self._num_left = MOST_TENANTS

    def of(self, tenant: str) -> str:
        """Its label: its name, or OTHER_TENANT."""
        if tenant in self._known:
            return tenant
        if not self._num_left:
            return OTHER_TENANT
        self._num_left -= 1
        self._known.add(tenant)
        return tenant


class Sample(NamedTuple):
    """What one program adds to one metric."""

    name: str
    value: float
    labels: dict[str, str]


def samples_of(record: dict[str, Any], outcome: str, tenant: str) -> list[Sample]:
    """What a program that is over adds to the metrics, but for what only the engine knows: time, patience and width.

    Args:
        record: as policy/record.py makes it.
        tenant: its label.
    """
    mine = {"algorithm": record["algorithm"]}
    ends: dict[str, int] = {}
    for reason in record["finish_reasons"]:
        ends[reason or "ended"] = ends.get(reason or "ended", 0) + 1
    made = [
        Sample("dynasor_programs_total", 1, {**mine, "outcome": outcome, "tenant": tenant}),
        Sample("dynasor_tokens_total", record["num_tokens"], {**mine, "tenant": tenant}),
        Sample("dynasor_probes_total", record.get("num_probes", 0), {}),
        Sample("dynasor_probe_tokens_total", record.get("num_probe_tokens", 0), {}),
        Sample("dynasor_judge_tokens_total", record.get("num_judge_tokens", 0), {}),
        Sample("dynasor_compare_tokens_total", record.get("num_compare_tokens", 0), {}),
        *(
            Sample("dynasor_branches_total", num, {**mine, "end": end, "outcome": outcome})
            for end, num in ends.items()
        ),
    ]  # fmt: skip
    if outcome in UNANSWERED:
        return made
    num_saved = record["cap"] - record["num_branches"] if outcome in SAVING else 0
    whole = [
        tokens
        for tokens, reason in zip(record["branch_tokens"], record["finish_reasons"], strict=True)
        if reason in ("stop", "length")
    ]
    mean_tokens = sum(whole) / len(whole) if whole else 0.0
    values = {
        "dynasor_branches_saved_total": num_saved,
        "dynasor_tokens_saved_estimate_total": num_saved * mean_tokens,
        "dynasor_branches_truncated_total": record["num_truncated"],
        "dynasor_abstentions_total": record["num_abstentions"],
        "dynasor_program_branches": record["num_branches"],
        "dynasor_program_tokens": record["num_tokens"],
        "dynasor_gang_branches": record["gang"],
        "dynasor_certaindex": record["certaindex"],
        "dynasor_risk": record["risk"],
    }
    return made + [Sample(name, value, mine) for name, value in values.items()]
