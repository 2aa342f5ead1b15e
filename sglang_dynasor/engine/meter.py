"""Programs in Prometheus, beside SGLang's own metrics and with its labels. On the first rank, with --enable-metrics."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from sglang_dynasor.engine.fence import guarded
from sglang_dynasor.engine.live import LiveProgram
from sglang_dynasor.observe.metrics import METRICS, UNANSWERED, Sample, TenantLabels, samples_of


class Meter:
    """Counters grow when a program is over; what follows /dynasor/status is set when SGLang sets its own gauges.

    Args:
        collector: SGLang's, whose labels are ours.
        tenants: that always have a label of their own.
    """

    def __init__(self, collector: Any, tenants: Iterable[str], patience_tokens: int):
        # Only now: prometheus_client looks when it is imported whether SGLang has told it of several processes.
        from prometheus_client import Counter, Gauge, Histogram

        self.collector = collector
        self.tenants = TenantLabels(tenants)
        self.patience_tokens = patience_tokens
        self._labels = {key: str(value) for key, value in collector.labels.items()}
        self._seen: dict[str, int] = {}  # of counters that follow the status
        self._metrics: dict[str, Any] = {}
        self._series: dict[tuple[str, ...], Any] = {}  # of those with labels: looked up by them, it takes 5 us
        for name, metric in METRICS.items():
            names = (*self._labels, *metric.labels)
            match metric.kind:
                case "counter":
                    made = Counter(name, metric.help, names)
                case "gauge":
                    made = Gauge(name, metric.help, names, multiprocess_mode="mostrecent")
                case "histogram":
                    made = Histogram(name, metric.help, names, buckets=metric.buckets)
            self._metrics[name] = made if metric.labels else made.labels(**self._labels)

    def report(self, status: dict[str, Any]) -> None:
        """Show how things stand."""
        for name, metric in METRICS.items():
            if not metric.status:
                continue
            value = status[metric.status]
            if metric.kind == "gauge":
                self._metrics[name].set(value)
            else:
                seen = self._seen.get(name, 0)
                self._metrics[name].inc(value - seen if value >= seen else value)  # after a fresh start it counts anew
                self._seen[name] = value

    @guarded("metrics")
    def count(self, live: LiveProgram, outcome: str, record: dict[str, Any] | None = None) -> None:
        """Count a program that is over. Nothing of this may keep its client from an answer."""
        record = live.program.record() if record is None else record
        tenant = self.tenants.of(live.program.spec.tenant)
        for sample in (*samples_of(record, outcome, tenant), *self._timed(live, outcome)):
            self._add(sample)
        self.collector.last_log_time = 0.0  # SGLang reports as soon as it is idle: no gauge shows this one any more

    def _timed(self, live: LiveProgram, outcome: str) -> Iterable[Sample]:
        """What only the engine knows of a program."""
        program, mine = live.program, {"algorithm": live.program.spec.algorithm}
        assert live.parent is not None
        times: Any = live.parent.time_stats
        now = time.perf_counter()
        yield Sample("dynasor_program_seconds", now - times.scheduler_recv_time, {**mine, "outcome": outcome})
        if times.forward_entry_time:
            yield Sample("dynasor_wait_seconds", times.forward_entry_time - times.scheduler_recv_time, mine)
        if program.branches:
            yield Sample("dynasor_width", program.most_in_flight, mine)
            if self.patience_tokens > 0 and outcome not in UNANSWERED:
                yield Sample("dynasor_overtaken_ratio", program.overtaken_tokens / self.patience_tokens, {})

    def _add(self, sample: Sample) -> None:
        key = (sample.name, *sample.labels.values())
        metric = self._series.get(key)
        if metric is None:
            metric = self._metrics[sample.name]
            if METRICS[sample.name].labels:
                metric = metric.labels(**self._labels, **sample.labels)
            self._series[key] = metric
        if METRICS[sample.name].kind == "histogram":
            metric.observe(sample.value)
        else:
            metric.inc(sample.value)
