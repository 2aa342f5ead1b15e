"""Whose is what: owners told apart, their ids and records in books of bounded size, and what a refused request leaves behind."""

from __future__ import annotations

import random
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.io_struct import GenerateReqInput
from starlette.datastructures import Headers

from sglang_dynasor.config import DynasorConfig
from sglang_dynasor.engine import claims, fence, front, place
from sglang_dynasor.engine.books import ids_of
from sglang_dynasor.engine.ends import failed_record
from sglang_dynasor.engine.owner import KEY, is_operator, owned, owner_in, owner_of, with_owner
from sglang_dynasor.engine.programs import Programs
from sglang_dynasor.engine.slots import Slots
from sglang_dynasor.engine.templates import with_field
from sglang_dynasor.errors import ConfigError, FieldError
from sglang_dynasor.observe.claims import Claims
from sglang_dynasor.observe.ledger import BudgetBook, IdBook, RecordBook
from sglang_dynasor.observe.log import RecordLog
from sglang_dynasor.observe.recent import Recent
from sglang_dynasor.observe.shelf import Shelf
from sglang_dynasor.policy.program import Program
from sglang_dynasor.policy.shared_budget import SharedBudgets
from sglang_dynasor.policy.spec import ProgramSpec, parse_field

ALICE, BOB = "alice", "bob"


def spec_of(owner: str = "", **field: Any) -> ProgramSpec:
    return owned(parse_field(field, 64), {KEY: owner})


def args(header: str = "", admin: str | None = None, key: str | None = None) -> Any:
    config = DynasorConfig("dynasor", dynasor_owner_header=header)
    return SimpleNamespace(_dynasor=config, api_key=key, admin_api_key=admin, tokenizer_worker_num=1)


def request(*headers: tuple[str, str], body: Any = None, route: str = "/generate") -> Any:
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers]
    return SimpleNamespace(headers=Headers(raw=raw), _json=body, scope={"route": SimpleNamespace(path=route)})


# Who sent it


@pytest.mark.parametrize(
    ("one", "other", "are_same"),
    [
        ([("Authorization", "Bearer k")], [("authorization", "bearer k")], True),  # as SGLang reads it
        ([("Authorization", "Bearer k")], [("x-api-key", "k")], True),  # as Anthropic's clients send it
        ([("Authorization", "Bearer k"), ("x-api-key", "other")], [("Authorization", "Bearer k")], True),
        ([("Authorization", "Bearer k"), ("x-user", "a")], [("Authorization", "Bearer k"), ("x-user", "b")], True),
        ([("Authorization", "Bearer k")], [("Authorization", "Bearer l")], False),
        ([("Authorization", "Bearer k")], [("Authorization", "Bearer K")], False),
        ([("Authorization", "Bearer k")], [], False),
        ([("Authorization", "Basic k")], [("Authorization", "Basic l")], False),
        ([("Authorization", "Bearer \xe9")], [("Authorization", "Bearer \xe8")], False),
    ],
)
def test_owners_are_told_apart_by_their_credential(one: Any, other: Any, are_same: bool) -> None:
    """By nothing else where no header is named; a hash says who, never the credential."""
    a, b = owner_of(args(), request(*one)), owner_of(args(), request(*other))
    assert (a == b) is are_same
    assert len(a) == 16
    assert set(a) <= set("0123456789abcdef")


def test_who_says_nothing_is_one_owner() -> None:
    """No credential, an empty one, and `sgl.Engine`, which has no request."""
    assert (
        owner_of(args(), request()) == owner_of(args(), request(("Authorization", ""))) == owner_of(args(), None) == ""
    )
    assert owner_of(args("x-user"), request()) == owner_of(args("x-user"), request(("x-user", ""))) == ""
    assert owner_of(args("x-user"), request(("Authorization", "Bearer k"))) == ""
    assert owner_of(args(), SimpleNamespace(is_disconnected=None)) == ""  # as gRPC's stand-in


def test_behind_a_gateway_its_header_says_who() -> None:
    """Whatever the credential is. A client that adds a second header becomes nobody who is there."""
    server = args("X-User")
    alice, bob = (owner_of(server, request(("x-user", name))) for name in (ALICE, BOB))
    assert alice != bob
    assert owner_of(server, request(("X-USER", ALICE), ("Authorization", "Bearer gateway"))) == alice
    for forged in ([ALICE, BOB], [BOB, ALICE], [ALICE, ALICE]):
        assert owner_of(server, request(*(("x-user", name) for name in forged))) not in (alice, bob, "")


def test_the_admin_key_is_the_operator_s() -> None:
    """Where there is one; where there is no key at all, it is who sends none, unless a gateway says who that is."""
    assert is_operator(args(admin="boss"), request(("Authorization", "Bearer boss")))
    assert is_operator(args(), request())
    assert is_operator(args(admin=""), request(("Authorization", "Bearer ")))
    assert not is_operator(args(key="key"), request())
    assert not is_operator(args("x-user"), request())
    assert not is_operator(args("x-user"), request(("x-user", ALICE)))
    for sent in (
        [("Authorization", "Bearer key")],
        [],
        [("Authorization", "Bearer \xe9")],
        [("Authorization", "Bearer ")],
    ):
        assert not is_operator(args(admin="boss"), request(*sent))
        assert not is_operator(args(key="key"), request(*sent))
    assert not is_operator(args(), request(("Authorization", "Bearer any")))


@pytest.mark.parametrize("name", ["x user", "x:user", "x-user\r\n", "\xe9"])
def test_a_header_that_is_none_stops_the_start(name: str) -> None:
    with pytest.raises(ConfigError, match=r"--dynasor-owner-header=.* is no name of an HTTP header"):
        DynasorConfig("dynasor", dynasor_owner_header=name)
    DynasorConfig("dynasor", dynasor_owner_header="X-Forwarded_User")


def test_no_client_says_whose_it_is() -> None:
    """What it puts where the front process says so is replaced, or removed; whatever it is."""
    for forged in ("bob", ["bob"], {"a": 1}, 7):
        assert owner_in(with_owner({"dynasor": {}, KEY: forged}, "a1")) == "a1"
        assert with_owner({"dynasor": {}, KEY: forged}, "") == {"dynasor": {}}
    custom = {"dynasor": {}}
    assert with_owner(custom, "") is custom
    assert owned(parse_field({}, 64), custom) == parse_field({}, 64)
    assert owner_in({KEY: ["bob"]}) == owner_in(None) == ""


def placed(params: Any, *headers: tuple[str, str], **more: Any) -> Any:
    obj = GenerateReqInput(
        text=["Q"] * len(params) if isinstance(params, list) else "Q", sampling_params=params, **more
    )
    obj.normalize_batch_and_arguments()
    manager = SimpleNamespace(server_args=args())
    place.check_place(manager, obj, request(*headers, body={}))
    return obj


KEYED = ("Authorization", "Bearer secret")


def test_a_fault_of_ours_names_no_owner_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang goes on with the request as it is then: nobody's."""
    program = {"custom_params": {"dynasor": {"branches": 2}, KEY: "forged"}}
    for where in ("_misplaced", "give_templates", "owner_of"):
        obj = GenerateReqInput(text="Q", sampling_params=program)
        obj.normalize_batch_and_arguments()
        with monkeypatch.context() as patched:
            patched.setattr(place, where, lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                place.check_place(SimpleNamespace(server_args=args()), obj, request(KEYED, body={}))
        assert obj.sampling_params["custom_params"] == {"dynasor": {"branches": 2}}
    assert with_field({"custom_params": {KEY: "forged"}}, {"branches": 2})["custom_params"] == {
        "dynasor": {"branches": 2}
    }


def test_headers_of_another_server_of_sglang_s_are_read() -> None:
    """Its gRPC server's have no lists."""
    told = SimpleNamespace(headers=SimpleNamespace(get=lambda name, default=None: {"x-user": "a"}.get(name, default)))
    assert owner_of(args("x-user"), told) == owner_of(args("x-user"), request(("x-user", "a")))
    assert owner_of(args("x-other"), told) == ""


def test_each_program_of_a_request_has_its_owner() -> None:
    """Also where the prompts of one have settings of their own; a plain prompt is left as it came."""
    owner = owner_of(args(), request(KEYED))
    program, plain = {"custom_params": {"dynasor": {"branches": 2}, KEY: "forged"}}, {"custom_params": {KEY: "mine"}}
    assert owner_in(placed(program, KEYED).sampling_params["custom_params"]) == owner
    assert KEY not in placed(program).sampling_params["custom_params"]
    assert placed(plain, KEYED).sampling_params == plain
    batch = placed([program, plain, program], KEYED)
    assert [owner_in(batch[i].sampling_params["custom_params"]) for i in range(3)] == [owner, "mine", owner]
    assert "secret" not in repr(batch.sampling_params)
    assert program["custom_params"][KEY] == "forged"  # what the client sent is not changed


@pytest.mark.parametrize("rid", ["\ud800x", ["fine", "\udfff"]])
def test_a_rid_that_cannot_be_written_is_refused(rid: Any) -> None:
    """One such in a list of programs, and nobody could read it. Letters of any language can; a plain request is SGLang's."""
    params = {"custom_params": {"dynasor": {}}}
    num = len(rid) if isinstance(rid, list) else 0
    with pytest.raises(FieldError, match=r"rid='\\ud.*' has half a surrogate pair"):
        placed([params] * num if num else params, rid=rid)
    placed({}, rid="\ud800x")
    placed(params, rid="ä/𝕏")


# Books of bounded size


def test_a_flood_pushes_out_its_own() -> None:
    """Whoever has most loses the oldest of theirs; who has less keeps what they have."""
    book = RecordBook(size=10)
    for i in range(3):
        book.keep(f"a{i}", {"program": f"a{i}"}, ALICE)
    for i in range(1000):
        book.keep(f"b{i}", {"program": f"b{i}"}, BOB)
    assert [record["program"] for owner, record in book.newest() if owner == ALICE] == ["a2", "a1", "a0"]
    assert [record["program"] for owner, record in book.newest() if owner == BOB] == [
        f"b{i}" for i in range(999, 992, -1)
    ]
    assert len(book) == 10


def test_one_owner_has_the_whole_book() -> None:
    """As long as there is no other."""
    book = RecordBook(size=10)
    for i in range(20):
        book.keep(str(i), {"program": str(i)})
    assert [record["program"] for _, record in book.newest()] == [str(i) for i in range(19, 9, -1)]


@pytest.mark.parametrize("seed", range(20))
def test_a_shelf_does_what_it_says(seed: int) -> None:
    """As a list would that is looked through each time."""
    draw, shelf = random.Random(seed), Shelf[int](7)
    naive: OrderedDict[tuple[str, str], int] = OrderedDict()
    for number in range(400):
        owner, key = draw.choice("abcd"[: 1 + number // 100]), draw.choice("uvwxyz")
        if draw.random() < 0.15 and (owner, key) in naive:
            shelf.drop(owner, key)
            del naive[owner, key]
            continue
        shelf.keep(owner, key, number)
        naive[owner, key] = number
        naive.move_to_end((owner, key))
        if len(naive) > 7:
            (gone,) = set(naive) - set(shelf._values)
            sizes = [sum(o == owner for o, _ in naive) for owner, _ in naive]
            assert sum(o == gone[0] for o, _ in naive) == max(sizes)
            assert gone == next(place for place in naive if place[0] == gone[0])
            del naive[gone]
        assert list(shelf.newest()) == [(owner, value) for (owner, _), value in reversed(naive.items())]
        assert len(shelf) == len(naive)
        assert set(shelf.owners_of("u")) == {owner for owner, key in naive if key == "u"}
        assert all(shelf.find(owner, key) == naive.get((owner, key)) for owner in "abcd" for key in "uvwxyz")


@pytest.mark.parametrize("owner", [lambda i: str(i), lambda i: "one", lambda i: str(i % 100)])
def test_a_full_book_is_as_quick_as_an_empty_one(owner: Callable[[int], str]) -> None:
    """However many owners there are; a microsecond or two here, bounded loosely for shared machines."""
    book, record = RecordBook(), {"program": "p"}
    for i in range(10_000):
        book.keep(str(i), record, owner(i))
    began = time.thread_time()
    for i in range(10_000, 30_000):
        book.keep(str(i), record, owner(i))
    assert time.thread_time() - began < 2.0
    assert len(book) == 10_000


def test_finished_programs_of_two_owners_are_two_rows() -> None:
    recent = Recent()
    for owner in (ALICE, BOB, ALICE, ""):
        recent.add({"program": "x", "stop_reason": "failed"}, time_s=1.0, latency_s=1.0, owner=owner)
    assert [row["owner"] for row in recent.since(0)[1]] == [BOB, ALICE, None]


# Ids


class Held:
    """What SGLang holds of a request."""


class Requests(dict[str, Any]):
    """What SGLang holds of those under way, by rid."""

    def begin(self, rid: str) -> str:
        self[rid] = Held()
        return rid


def test_two_owners_use_the_same_ids_and_know_nothing_of_each_other() -> None:
    """Rids, program ids and budget ids, with tenants and settings of their own; one owner's tenants are kept apart as ever."""
    under_way, records = Requests(), RecordBook()
    ids, budgets = IdBook(under_way.get), BudgetBook(under_way.get)
    shared = {"budget": "b", "budget_programs": 2}
    for owner, tenant, branches, tokens in ((ALICE, "t", 4, 100), (BOB, "u", 5, 200), ("", "v", 6, 300)):
        first, other = under_way.begin(f"{owner}-1"), under_way.begin(f"{owner}-2")
        ids.claim(first, spec_of(owner, program="p", tenant=tenant, branches=branches), records)
        records.keep("p", {"program": "p", "tenant": tenant}, owner)
        records.keep("rid", {"program": "rid", "tenant": tenant}, owner)
        budgets.claim(first, spec_of(owner, budget_tokens=tokens, **shared), 10)
        with pytest.raises(FieldError, match="rid='rid' is another tenant's"):
            ids.claim("rid", spec_of(owner), records)
        with pytest.raises(FieldError, match="other settings"):
            ids.claim(other, spec_of(owner, program="p", tenant=tenant, branches=branches + 1), records)
        with pytest.raises(FieldError, match="was declared with budget_tokens"):
            budgets.claim(other, spec_of(owner, budget_tokens=tokens + 1, **shared), 10)
    assert {owner: record["tenant"] for owner, record in records.newest()} == {ALICE: "t", BOB: "u", "": "v"}
    assert set(records.owners_of("p")) == {ALICE, BOB, ""}
    assert records.find("p", "carol") is None


@pytest.mark.parametrize("again", ["1", "2"])
def test_what_was_refused_in_the_end_has_claimed_nothing(again: str) -> None:
    """By a full queue, a server that drains, another prompt of the same request: over, and no record came of it. Also where it comes
    again under the same rid, or that is another's by now."""
    under_way, records = Requests(), RecordBook()
    ids, budgets = IdBook(under_way.get), BudgetBook(under_way.get)
    shared = {"budget": "b", "budget_programs": 2}
    under_way.begin("1")
    ids.claim("1", spec_of(program="p", branches=4), records)
    budgets.claim("1", spec_of(budget_tokens=100, **shared), 10)
    with pytest.raises(FieldError, match="other settings"):
        ids.claim(under_way.begin("3"), spec_of(program="p", branches=5), records)
    under_way.clear()
    under_way.begin("1")
    ids.claim(under_way.begin(again), spec_of(program="p", branches=5, tenant="t"), records)
    budgets.claim(again, spec_of(budget_tokens=200, tenant="t", **shared), 10)


def test_what_had_a_record_stays_claimed() -> None:
    """Also where a later request of the same id was refused; its settings are not those that hold."""
    under_way, records = Requests(), RecordBook()
    ids, budgets = IdBook(under_way.get), BudgetBook(under_way.get)
    shared = {"budget": "b", "budget_programs": 2}
    ids.claim(under_way.begin("1"), spec_of(program="p", branches=4), records)
    budgets.claim("1", spec_of(budget_tokens=100, **shared), 10)
    ids.keep("1", "p", "")
    budgets.keep("1", "b", "")
    under_way.clear()
    with pytest.raises(FieldError, match="other settings"):
        ids.claim(under_way.begin("2"), spec_of(program="p", branches=5), records)
    with pytest.raises(FieldError, match="was declared with"):
        budgets.check(spec_of(budget_tokens=200, **shared), 10)
    ids.claim(under_way.begin("mine"), spec_of(tenant="t"), records)
    ids.keep("mine", "mine", "")
    ids.claim(under_way.begin("own-0"), spec_of(program="mine", branches=3, tenant="t"), records)  # refused in the end
    under_way.clear()
    ids.claim(under_way.begin("own-0"), spec_of(program="mine", branches=4, tenant="t"), records)


def test_a_branch_that_is_refused_leaves_the_others_their_program() -> None:
    under_way, records = Requests(), RecordBook()
    ids = IdBook(under_way.get)
    for rid in ("1", "2"):
        ids.claim(under_way.begin(rid), spec_of(program="p", branches=4), records)
    del under_way["2"]
    with pytest.raises(FieldError, match="other settings"):
        ids.claim(under_way.begin("3"), spec_of(program="p", branches=5), records)


def test_a_rid_that_is_sent_again_and_again_holds_one_thing() -> None:
    """With other settings each time, and a record each time."""
    under_way = Requests()
    book: Claims[int] = Claims(under_way.get)
    for number in range(100):
        book.take("", "session", number, under_way.begin("session"))
        book.keep("", "session", "session")
        under_way.clear()
        assert book.holding("", "session") == [number]


@pytest.mark.parametrize("goes_on", [True, False])
def test_requests_that_are_over_do_not_gather(goes_on: bool) -> None:
    """A client that tries again and again while it is refused, with one that goes on and without."""
    under_way = Requests()
    book: Claims[int] = Claims(under_way.get)
    for rid in ("first", *map(str, range(1000))):
        book.take("", "p", 7, under_way.begin(rid))
        if rid != "first" or not goes_on:
            del under_way[rid]
    (said,) = book._said.find("", "p") or []
    assert len(said.requests) <= 3
    assert book.holding("", "p") == ([7] if goes_on else [])


def test_a_program_of_which_nobody_trusts_the_counts_has_a_tenant() -> None:
    """Its client tries again under the same rid; another does not."""
    under_way, records = Requests(), RecordBook()
    ids = IdBook(under_way.get)
    records.keep("r", failed_record(Program("r", spec_of(tenant="acme"))))
    ids.claim(under_way.begin("r"), spec_of(tenant="acme"), records)
    with pytest.raises(FieldError, match="another tenant's"):
        ids.claim("r", spec_of(), records)
    assert failed_record(Program("r", spec_of())) == {"program": "r", "stop_reason": "failed"}


# In the front process


def front_process(tmp_path: Path, **config: Any) -> Any:
    """As much of SGLang's tokenizer manager as our books read."""
    given = DynasorConfig("dynasor", dynasor_log=str(tmp_path / "log"), **config)
    return SimpleNamespace(
        server_args=SimpleNamespace(_dynasor=given, tokenizer_worker_num=1),
        rid_to_state={},
        preferred_sampling_params=None,
        served_model_name="m",
    )


def test_a_record_is_its_owner_s_also_after_a_restart(tmp_path: Path) -> None:
    """The line says whose; one of a server without owners says nothing of it."""
    manager = front_process(tmp_path)
    state = SimpleNamespace(time_stats=SimpleNamespace(created_time=time.perf_counter()))
    for owner in (ALICE, BOB, ""):
        custom = with_owner({"dynasor": {"program": "p"}}, owner)
        state.obj = SimpleNamespace(sampling_params={"custom_params": custom})
        record = {"program": "p", "stop_reason": "failed", "of": owner}
        meta_info = {"id": "r", "prompt_tokens": 3, "completion_tokens": 1}
        front.add_record(lambda *args: None, manager, meta_info, state, {"dynasor": [[record]]}, 0, None)
    front.log_of(manager).flush()  # type: ignore[union-attr]
    assert [line.get("owner") for line in RecordLog(tmp_path / "log").newest(10)] == [ALICE, BOB, None]
    for book in (front.records_of(manager), front.records_of(front_process(tmp_path))):
        assert [book.find("r", owner)["of"] for owner in (ALICE, BOB, "")] == [ALICE, BOB, ""]  # type: ignore[index]
        assert book.find("r", "carol") is None


def test_a_record_is_kept_whatever_the_request_says_of_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its field may come from --preferred-sampling-params; and where the log's line fails the record and the usage are told."""
    manager = front_process(tmp_path)
    state = SimpleNamespace(
        time_stats=SimpleNamespace(created_time=time.perf_counter()), obj=SimpleNamespace(sampling_params={})
    )
    meta_info = {"id": "p", "prompt_tokens": 3, "completion_tokens": 1, "cached_tokens": 0}
    record = {
        "program": "p",
        "algorithm": "self_consistency",
        "num_tokens": 20,
        "num_cached_tokens": 0,
        "branch_tokens": [20],
        "finish_reasons": ["stop"],
        "stop_reason": "certain",
        "num_branches": 1,
        "cap": 2,
    }
    monkeypatch.setattr(fence, "FENCE", fence.Fence())  # an engine of another test may have made this process strict
    monkeypatch.setattr(front, "line_of", lambda *args: 1 / 0)
    front.add_record(lambda *args: None, manager, meta_info, state, {"dynasor": [[record]]}, 0, None)
    assert meta_info["completion_tokens"] == 20
    assert front.records_of(manager).find("p") == record


def test_a_request_claims_for_its_owner(tmp_path: Path) -> None:
    """Until it is over without a record."""
    manager = front_process(tmp_path)

    def send(rid: str, owner: str, **field: Any) -> None:
        params = {"custom_params": with_owner({"dynasor": field}, owner)}
        manager.rid_to_state[rid] = Held()
        claims.claim(None, manager, GenerateReqInput(text="Q", rid=rid, sampling_params=params))

    send("1", ALICE, program="p", tenant="t")
    send("2", BOB, program="p")
    with pytest.raises(FieldError, match="another tenant's"):
        send("3", ALICE, program="p")
    manager.rid_to_state.clear()
    send("3", ALICE, program="p")
    ids_of(manager).keep("3", "p", ALICE)
    manager.rid_to_state.clear()
    with pytest.raises(FieldError, match="another tenant's"):
        send("4", ALICE, program="p", tenant="t")
    send("4", BOB, program="p", tenant="t")


# In the scheduler


def test_programs_of_two_owners_are_two() -> None:
    """With the same id, tenant and settings. One owner's second branch joins the first."""
    programs = Programs(Slots(2))

    def join(owner: str, **field: Any) -> Program:
        return programs.join(Program("p", spec_of(owner, program="p", **field))).program

    alice, bob = join(ALICE), join(BOB)
    assert alice is not bob
    assert join(ALICE) is alice
    assert join("") is not alice
    assert programs.sent_by(ALICE, "p") is None  # nobody waits for it
    alice.start_branch()
    assert programs.sent_by(ALICE, "p") is not None
    assert programs.sent_by(BOB, "p") is None
    assert programs.knows(spec_of(ALICE, program="p"))
    assert not programs.knows(spec_of("carol", program="p"))
    assert not programs.knows(spec_of(ALICE))


def test_an_id_that_nothing_came_of_is_declared_anew() -> None:
    """Not one that runs or has an answer; never another tenant's."""
    programs = Programs(Slots(2))

    def join(**field: Any) -> Program:
        return programs.join(Program("p", spec_of(program="p", **field))).program

    first = join(branches=4)
    assert join(branches=5) is not first
    second = join(branches=5)
    second.end(second.start_branch(), 0)  # SGLang's queue was full
    third = join(branches=6)
    assert third is not second
    third.start_branch()
    assert join(branches=7) is third
    third.finish(0, "#### 1", 5)
    assert join(branches=7) is third
    assert join(branches=6, tenant="t") is not third


def test_budgets_of_two_owners_are_two() -> None:
    budgets = SharedBudgets()

    def join(owner: str, tokens: int = 100) -> Program:
        program = Program("p", spec_of(owner, budget_tokens=tokens, budget="b", budget_programs=3))
        assert program.spec.budget is not None
        budgets.join(program.spec.budget, program, program, 10)
        return program

    alice, bob = join(ALICE), join(BOB)
    assert alice.budget is not bob.budget
    assert join(ALICE).budget is alice.budget
    budgets.leave(bob)
    assert (
        join(BOB, 200).budget is not bob.budget
    )  # nobody was told of it, else the front process would have refused that
    assert bob.budget not in budgets.due
