"""What a server tells others of its load and counts of its programs: SGLang's own numbers, ours, and the files made of them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from engines import ROOT
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families
from questions import held_out, prompt
from warm import WarmServer

from sglang_dynasor.engine.meter import Meter
from sglang_dynasor.observe.ledger import STATUS_HELP
from sglang_dynasor.observe.metrics import METRICS, MOST_TENANTS, OTHER_TENANT, TenantLabels, samples_of
from sglang_dynasor.policy.program import Program
from sglang_dynasor.policy.spec import parse_field

OPERATIONS = ROOT / "operations"
DASHBOARD = json.loads((OPERATIONS / "dashboard.json").read_text())
QUESTIONS = held_out(12)
NUM_ROWS = 8


# The table


def test_every_metric_that_follows_the_status_follows_one_of_its_counters() -> None:
    """And only counters and gauges do."""
    followers = {name: metric for name, metric in METRICS.items() if metric.status}
    assert {metric.status for metric in followers.values()} <= set(STATUS_HELP)
    assert {metric.kind for metric in followers.values()} == {"counter", "gauge"}
    assert not any(metric.labels for metric in followers.values())


def test_a_limited_number_of_tenants_have_a_label() -> None:
    """Those that the operator named always; the nameless one takes no place, and nobody takes two."""
    labels = TenantLabels(["gold"])
    first = [f"t{i}" for i in range(MOST_TENANTS)]
    assert [labels.of(name) for name in ["", *first, *first]] == ["", *first, *first]
    assert labels.of("late") == OTHER_TENANT
    assert labels.of("gold") == "gold"
    assert labels.of("t3") == "t3"


def over(outcome: str) -> dict[str, float]:
    """What a program of cap 8, of which two branches of 10 and 30 tokens finished and one was ended at 5, adds."""
    program = Program("p", parse_field({"answer": "hash", "branches": 8}, 64))
    for _ in range(3):
        program.start_branch()
    program.finish(0, "#### 4", 10)
    program.finish(1, "nothing", 30)
    program.end(2, 5)
    found = samples_of(program.record(), outcome, "t")
    assert all(set(sample.labels) == set(METRICS[sample.name].labels) for sample in found)
    return {sample.name + str(sample.labels.get("end", "")): sample.value for sample in found}


def test_a_finished_program_s_samples() -> None:
    """Saved tokens are branches not started, at the mean length of those that came to their own end."""
    found = over("certain")
    assert found["dynasor_tokens_total"] == 45
    assert found["dynasor_branches_totalstop"] == 2
    assert found["dynasor_branches_totalended"] == 1
    assert found["dynasor_branches_saved_total"] == 5
    assert found["dynasor_tokens_saved_estimate_total"] == 5 * 20
    assert found["dynasor_abstentions_total"] == 1


def test_a_program_without_an_answer_has_saved_nothing() -> None:
    """It was given up; what it took is counted all the same."""
    found = over("aborted")
    assert found["dynasor_tokens_total"] == 45
    assert not {"dynasor_branches_saved_total", "dynasor_tokens_saved_estimate_total", "dynasor_risk"} & set(found)


def test_counters_go_on_after_a_fresh_start() -> None:
    """What counts anew is added, and what still counts is not added twice: an exception here would be a fault of every report."""
    meter = Meter(SimpleNamespace(labels={"model_name": "m"}), [], 0)
    try:
        for num_steps, num_faults in ((7, 0), (9, 0), (2, 1), (3, 1)):
            status = {
                **dict.fromkeys(STATUS_HELP, 0),
                "num_steps_watched": num_steps,
                "num_policy_errors": num_faults,
                "is_aside": num_faults,
            }
            meter.report(status)
        names = ("dynasor_watched_steps_total", "dynasor_fallbacks_total", "dynasor_aside")
        assert [REGISTRY.get_sample_value(name, {"model_name": "m"}) for name in names] == [9 + 3, 1, 1]
    finally:
        for metric in {REGISTRY._names_to_collectors[name.removesuffix("_total")] for name in METRICS}:
            REGISTRY.unregister(metric)


def test_who_was_cut_has_saved_nothing() -> None:
    """Branches that there was no time, budget or patience for were not saved; those that nobody needed were."""
    for outcome in ("deadline", "budget", "operator"):
        found = over(outcome)
        assert (found["dynasor_branches_saved_total"], found["dynasor_tokens_saved_estimate_total"]) == (0, 0)
        assert found["dynasor_tokens_total"] == 45
    assert over("price")["dynasor_branches_saved_total"] == 5


# A running server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmServer]:
    running = WarmServer(
        tmp_path_factory.mktemp("metrics") / "log", "--scheduler", "dynasor", "--enable-metrics", "--enable-cache-report",
        "--max-running-requests", str(NUM_ROWS), "--reasoning-parser", "qwen3", "--dynasor-max-price", "0.0001",
    )  # fmt: skip
    try:
        running.wait(500)
        yield running
    finally:
        running.stop()


def generate(server: WarmServer, question: str, **field: Any) -> dict[str, Any]:
    params = {"max_new_tokens": 200, "custom_params": {"dynasor": {"answer": "hash", **field}}}
    return send(server, {"text": prompt(question), "sampling_params": params})


def send(server: WarmServer, body: dict[str, Any]) -> dict[str, Any]:
    return httpx.post(f"{server.url}/generate", json=body, timeout=120).raise_for_status().json()


@contextmanager
def endless(server: WarmServer, **field: Any) -> Iterator[list[dict[str, Any]]]:
    """A program that runs, and never votes, until the caller is through; then its answer is in the list."""
    custom = {"dynasor": {"answer": "boxed", "stop": "never", **field}}
    params = {"max_new_tokens": 900, "ignore_eos": True, "custom_params": custom}
    body = {"text": prompt(QUESTIONS[2].text), "rid": f"endless-{time.monotonic()}", "sampling_params": params}
    outs: list[dict[str, Any]] = []
    sender = threading.Thread(target=lambda: outs.append(send(server, body)))
    sender.start()
    try:
        num_rows = field.get("width", NUM_ROWS)
        reached(server, lambda told: told["num_running_reqs"] == num_rows)
        yield outs
    finally:
        httpx.post(f"{server.url}/dynasor/programs/{body['rid']}/finish", timeout=60)
        sender.join(120)


def reached(server: WarmServer, is_so: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The first load report of which it is so. Half a minute at most."""
    for _ in range(1500):
        if is_so(told := load(server)):
            return told
        time.sleep(0.02)
    raise AssertionError(told)


def test_without_a_key_records_belong_to_the_credential_that_was_sent(server: WarmServer) -> None:
    """SGLang checks none there; a gateway has. Who sends none is one owner."""
    credentials: list[dict[str, str]] = [{"Authorization": "Bearer a"}, {"x-api-key": "b"}, {}]
    for i, headers in enumerate(credentials):
        body = {
            "text": "Q",
            "rid": "owned",
            "sampling_params": {"max_new_tokens": 4, "custom_params": {"dynasor": {"branches": i + 1}}},
        }
        httpx.post(f"{server.url}/generate", json=body, headers=headers, timeout=60).raise_for_status()
    path = f"{server.url}/dynasor/programs/owned"
    assert [httpx.get(path, headers=headers, timeout=30).json()["cap"] for headers in credentials] == [1, 2, 3]
    assert httpx.get(path, headers={"Authorization": "Bearer c"}, timeout=30).status_code == 404
    # Who sends none may list everybody's, and read them, as where the OpenAI client sends a key that means nothing.
    somebody_s = {
        "text": "Q",
        "rid": "somebody-s",
        "sampling_params": {"max_new_tokens": 4, "custom_params": {"dynasor": {}}},
    }
    httpx.post(f"{server.url}/generate", json=somebody_s, headers=credentials[0], timeout=60).raise_for_status()
    path = f"{server.url}/dynasor/programs/somebody-s"
    assert [httpx.get(path, headers=headers, timeout=30).status_code for headers in credentials] == [200, 404, 200]


def scraped(server: WarmServer) -> dict[str, list[tuple[dict[str, str], float]]]:
    """What Prometheus would read: samples by name."""
    text = httpx.get(f"{server.url}/metrics", timeout=30, follow_redirects=True).raise_for_status().text
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def totals(server: WarmServer) -> dict[str, float]:
    return {name: sum(value for _, value in samples) for name, samples in scraped(server).items()}


def load(server: WarmServer) -> dict[str, Any]:
    return httpx.get(f"{server.url}/v1/loads", timeout=30).json()["loads"][0]


def replicas(told: dict[str, Any]) -> int:
    """How many servers a client that scales on load reports would want: each full, none waiting."""
    return max(1, ceil((told["num_running_reqs"] + told["num_waiting_reqs"]) / told["max_running_requests"]))


def grown(server: WarmServer, before: dict[str, float], name: str, least: float) -> float:
    """How much a total has grown, once it has by `least`: SGLang counts a moment after it has answered. Half a minute at most."""
    for _ in range(300):
        now = totals(server)[name] - before.get(name, 0)
        if now >= least:
            break
        time.sleep(0.1)
    return now


@pytest.mark.engine
def test_load_is_told_truly(server: WarmServer) -> None:
    """A client that scales on /v1/loads or on SGLang's gauge sees programs wait, and sees when nobody does any more."""
    before = totals(server)
    outs: list[dict[str, Any]] = []
    senders = [
        threading.Thread(target=lambda text=question.text: outs.append(generate(server, text)))
        for question in QUESTIONS
    ]
    with endless(server, branches=NUM_ROWS, width=NUM_ROWS) as filler:
        for sender in senders:
            sender.start()
        # Each program that waits is expected to need several branches.
        most = reached(server, lambda told: told["num_waiting_reqs"] > 2 * len(QUESTIONS))
        gauge = 0.0
        for _ in range(300):
            if (gauge := totals(server)["sglang:num_queue_reqs"]) > len(QUESTIONS):
                break
        time.sleep(0.2)
    for sender in senders:
        sender.join(120)
    outs += filler
    num_asked = len(QUESTIONS) + 1
    assert len(outs) == num_asked
    assert most["queues"]["waiting"] == most["num_waiting_reqs"]
    assert most["num_total_tokens"] > most["num_used_tokens"] + most["num_waiting_uncached_tokens"] > 0
    assert gauge > len(QUESTIONS)
    assert replicas(most) >= 3  # twelve programs for eight rows
    # One request each to SGLang's histograms, and to its counters what was generated.
    num_tokens = sum(out["meta_info"]["dynasor"]["num_tokens"] for out in outs)
    assert grown(server, before, "sglang:generation_tokens_total", num_tokens) == num_tokens
    for name in ("queue_time_seconds", "time_to_first_token_seconds", "e2e_request_latency_seconds"):
        assert grown(server, before, f"sglang:{name}_count", num_asked) == num_asked
    assert max(out["meta_info"]["queue_time"] for out in outs) > 0.1  # the wait of the program, not of its branch
    for _ in range(300):
        if not totals(server)["sglang:num_queue_reqs"] + load(server)["num_waiting_reqs"]:
            break
        time.sleep(0.1)
    now = totals(server)
    assert (now["sglang:num_queue_reqs"], now["dynasor_held_programs"], load(server)["num_waiting_reqs"]) == (0, 0, 0)
    assert replicas(load(server)) == 1


@pytest.mark.engine
def test_nobody_waits_where_there_is_room(server: WarmServer) -> None:
    """One program is no queue, though its reserve branches have not started."""
    with endless(server, width=2, branches=16):
        seen = [load(server)["num_waiting_reqs"] for _ in range(20)]
    assert sum(num > 1 for num in seen) <= 5, seen  # but for the moment between a change and the next step


@pytest.mark.engine
def test_a_plain_request_counts_as_ever(server: WarmServer) -> None:
    """Nothing of ours touches its numbers."""
    before = totals(server)
    body = {"text": prompt(QUESTIONS[0].text), "sampling_params": {"max_new_tokens": 20, "ignore_eos": True}}
    meta = httpx.post(f"{server.url}/generate", json=body, timeout=60).json()["meta_info"]
    assert meta["completion_tokens"] == 20
    assert grown(server, before, "sglang:generation_tokens_total", 20) == 20
    assert grown(server, before, "sglang:prompt_tokens_total", 1) == meta["prompt_tokens"]
    assert totals(server).get("dynasor_programs_total", 0) == before.get("dynasor_programs_total", 0)


@pytest.mark.engine
def test_usage_counts_each_kind_of_token_for_all_branches(server: WarmServer) -> None:
    """As the client of a chat reads it."""
    body = {
        "model": "any", "messages": [{"role": "user", "content": QUESTIONS[4].text}], "max_tokens": 300,
        "chat_template_kwargs": {"enable_thinking": True}, "return_meta_info": True,
        "custom_params": {"dynasor": {"answer": "hash", "branches": 6, "stop": "never"}},
    }  # fmt: skip
    before = totals(server)
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120).json()
    usage, record = response["usage"], response["choices"][0]["meta_info"]["dynasor"]
    assert usage["completion_tokens"] == record["num_tokens"]
    assert usage["prompt_tokens"] % 6 == 0
    cached_tokens = usage["prompt_tokens_details"]["cached_tokens"]
    assert 0 < cached_tokens == record["num_cached_tokens"] < usage["prompt_tokens"]
    assert 0 < usage["reasoning_tokens"] == record["num_reasoning_tokens"] <= record["num_tokens"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert grown(server, before, "sglang:prompt_tokens_total", 1) == usage["prompt_tokens"]
    assert grown(server, before, "sglang:cached_tokens_total", 1) == cached_tokens


@pytest.fixture
def exercised(server: WarmServer) -> dict[str, list[tuple[dict[str, str], float]]]:
    """The samples of a server that has answered programs of each kind."""
    generate(server, QUESTIONS[0].text, tenant="a")
    record = generate(server, QUESTIONS[1].text, algorithm="long_cot", min_tokens=0, probe_tokens=1)["meta_info"][
        "dynasor"
    ]
    generate(server, QUESTIONS[3].text, deadline_s=0.001)
    before = totals(server)["dynasor_probes_total"]
    assert record["num_probes"] <= before
    for _ in range(300):
        if totals(server)["dynasor_held_programs"] == 0:
            break
        time.sleep(0.1)
    return scraped(server)


@pytest.mark.engine
def test_a_server_has_the_metrics_that_are_explained(exercised: Any, server: WarmServer) -> None:
    """All of them, no other, with these labels and SGLang's; they agree with its own counters."""
    ends = {"counter": "", "gauge": "", "histogram": "_count"}
    theirs = set(exercised["sglang:num_queue_reqs"][0][0])
    for name, metric in METRICS.items():
        labels, _ = exercised[name + ends[metric.kind]][0]
        assert set(labels) == theirs | set(metric.labels), name
    ours = {re.sub("_(bucket|sum|count|created)$", "", name) for name in exercised if name.startswith("dynasor_")}
    assert ours == set(METRICS)
    status, now = server.status(), totals(server)
    assert now["dynasor_programs_total"] == status["num_programs"] + status["num_aborted"]
    assert now["dynasor_tokens_total"] == status["num_tokens"]
    assert now["dynasor_branches_saved_total"] == status["num_branches_saved"]
    assert now["dynasor_fallbacks_total"] == status["num_policy_errors"] == 0
    by = {(labels["outcome"], labels["tenant"]): value for labels, value in exercised["dynasor_programs_total"]}
    assert by[("deadline", "")] == 1
    assert sum(value for (_, tenant), value in by.items() if tenant == "a") == 1


def expressions() -> list[str]:
    """Every PromQL expression of the dashboard and the alert rules, without what Grafana fills in."""
    panels = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    rules = re.findall(r"^        expr: (?:>\n)?((?:.|\n          )*)$", (OPERATIONS / "alerts.yml").read_text(), re.M)
    assert len(panels) > 30
    assert len(rules) > 10
    return [*panels, *rules, DASHBOARD["templating"]["list"][1]["query"]["query"]]


@pytest.mark.engine
def test_dashboard_and_alerts_name_what_a_server_has(exercised: Any) -> None:
    """Every metric, and every label that is asked of it; all of ours but the fewest are on the dashboard."""
    used: set[str] = set()
    for expression in expressions():
        names = [name.replace("[:_]", ":") for name in re.findall(r"(?:dynasor_|sglang\[:_\])\w+", expression)]
        assert names, expression
        for name in names:
            assert name in exercised, name
        used |= set(names)
        asked = set(re.findall(r"(\w+)=~?\"", expression)) - {"__name__"}
        for group in re.findall(r"by \(([\w, ]+)\)", expression):
            asked |= set(group.split(", "))
        for name in names:
            assert asked <= set(exercised[name][0][0]), (expression, name)
    shown = {re.sub("_(bucket|sum|count)$", "", name) for name in used}
    assert set(METRICS) - shown == {"dynasor_queued_branches", "dynasor_program_tokens"}


@pytest.mark.engine
def test_a_scrape_by_prometheus_2_finds_the_same(exercised: Any, server: WarmServer) -> None:
    """It asks for OpenMetrics and is given SGLang's names with an underscore; ours are as they are."""
    wants = {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"}
    text = httpx.get(f"{server.url}/metrics", timeout=30, follow_redirects=True, headers=wants).text
    found = set(re.findall(r"^([\w:]+)\{", text, re.M))
    for expression in expressions():
        for name in re.findall(r"(?:dynasor_|sglang\[:_\])\w+", expression):
            assert any(re.fullmatch(name, other) for other in found), name


def test_legends_are_of_labels_that_are_kept() -> None:
    """`{{outcome}}` of a sum by outcome."""
    for panel in DASHBOARD["panels"]:
        for target in panel["targets"]:
            for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                assert f"by ({label})" in target["expr"], panel["title"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="apt-get install prometheus (for its promtool)")
def test_every_alert_fires_in_its_case_and_in_no_other() -> None:
    """As promtool runs operations/alerts_test.yml; every rule has both cases there."""
    cases = (OPERATIONS / "alerts_test.yml").read_text()
    for alert in re.findall(r"alert: (\w+)", (OPERATIONS / "alerts.yml").read_text()):
        assert f"{alert} fires" in cases
        assert f"{alert} stays quiet" in cases
    done = subprocess.run(
        ["promtool", "test", "rules", "alerts_test.yml"], cwd=OPERATIONS, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_explained() -> None:
    """docs/operations.md says what to do, of each and of nothing else."""
    told = re.findall(r"^\| `(Dynasor\w+)` \|", Path(ROOT / "docs" / "operations.md").read_text(), re.M)
    assert told == re.findall(r"alert: (\w+)", (OPERATIONS / "alerts.yml").read_text())
