"""Copies of a program's first branch are what SGLang itself would make. Real Reqs; no engine."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_dynasor.engine.live import BranchTag, LiveProgram
from sglang_dynasor.engine.mould import Mould
from sglang_dynasor.engine.req import branch_seed, make_branch
from sglang_dynasor.policy.program import Program
from sglang_dynasor.policy.spec import parse_field

SCHEDULER: Any = SimpleNamespace(disaggregation_mode=DisaggregationMode.NULL)
KEEPER: Any = SimpleNamespace()
# Where two Reqs of one program differ: their names, when they were made, and who they are to it.
DIFFERENT = {"rid", "cache_request_handle", "time_stats", "sampling_params", "dynasor_tag"}


def parent_of(**fields: Any) -> Req:
    params = SamplingParams(max_new_tokens=24, temperature=1.0, custom_params={"dynasor": {}}, sampling_seed=5)
    params.normalize(None)
    given: dict[str, Any] = {
        "eos_token_ids": {0, 7},
        "vocab_size": 100,
        "priority": 3,
        "extra_key": "key",
        "cache_salt": "salt",
    }
    req = Req("parent", "", array("q", range(9)), params, **{**given, **fields})
    req.tokenizer = SimpleNamespace()  # type: ignore[assignment]
    req.logprob_start_len = 4
    req.time_stats.set_wait_queue_entry_time()
    return req


def branches_of(parent: Req, num: int) -> list[Req]:
    live = LiveProgram(Program("p", parse_field({"branches": 16}, 64)), parent=parent)
    tags = [BranchTag(live, live.program.start_branch(), KEEPER) for _ in range(num)]
    return [make_branch(SCHEDULER, parent, f"rid-{tag.index}.", tag) for tag in tags]


def changeable(value: Any) -> bool:
    return not isinstance(value, int | float | str | bytes | tuple | frozenset | None | DisaggregationMode)


def contents(value: Any) -> Any:
    """What is in an object, so that two of them can be compared."""
    names = getattr(value, "__struct_fields__", getattr(value, "__slots__", ()))
    return {name: getattr(value, name) for name in names} if names else value


def test_a_copy_is_what_sglang_makes() -> None:
    """Field by field, but for its name, its seed and its times."""
    parent = parent_of()
    first, second = branches_of(parent, 2)
    (alone,) = branches_of(parent, 1)
    assert vars(second).keys() == vars(first).keys() == vars(alone).keys()
    for name in vars(alone).keys() - DIFFERENT:
        made, copied = vars(alone)[name], vars(second)[name]
        assert type(made) is type(copied), name
        assert contents(made) == contents(copied), name
    assert contents(second.sampling_params) == contents(parent.sampling_params) | {"sampling_seed": branch_seed(5, 1)}
    assert vars(second.time_stats).keys() == vars(alone.time_stats).keys()
    assert (second.rid, second.cache_request_handle.rid, second.dynasor_tag.index) == ("rid-1.", "rid-1.", 1)  # type: ignore[attr-defined]
    assert second.time_stats.scheduler_recv_time >= first.time_stats.scheduler_recv_time > 0


def test_copies_share_only_what_is_their_clients() -> None:
    """Nothing that a Req changes in place is another's: neither in its fields nor in what they hold."""
    parent = parent_of()
    first, *copies = branches_of(parent, 3)
    first.output_ids.append(1)
    first.kv.component_evicted_seqlens["x"] = 1  # type: ignore[index]
    first.logprob.output_token_logprobs_val = [0.5]
    assert [list(req.output_ids) for req in copies] == [[], []]
    assert not any(req.kv.component_evicted_seqlens or req.logprob.output_token_logprobs_val for req in copies)
    for one, other in ((first, copies[0]), (copies[0], copies[1])):
        shared = {name for name, value in vars(one).items() if changeable(value) and value is vars(other)[name]}
        assert shared == {name for name in shared if vars(one)[name] is vars(parent)[name]}
        assert shared == {"origin_input_ids", "origin_input_ids_unpadded", "eos_token_ids", "tokenizer"}
        for name in ("kv", "logprob"):
            held, others = contents(vars(one)[name]), contents(vars(other)[name])
            assert not any(changeable(value) and value is others[key] for key, value in held.items()), name


@pytest.mark.parametrize(
    "fields", [{"return_logprob": True}, {"custom_logit_processor": "{}"}, {"return_sampling_mask": True}]
)
def test_what_holds_more_of_its_own_is_made_by_sglang(fields: dict[str, Any]) -> None:
    """Lists of log-probabilities, or a reference to the Req itself: each has its own."""
    parent = parent_of(**fields)
    first, second = branches_of(parent, 2)
    assert not first.dynasor_tag.live.mould.is_usable  # type: ignore[attr-defined]
    for name, value in vars(first).items():
        if isinstance(value, list) or name == "logprob":
            assert value is not vars(second)[name], name
    assert contents(first.logprob) == contents(second.logprob)


def test_what_nobody_knows_how_to_copy_is_not_copied() -> None:
    """A field that a later SGLang adds: the Req is made by SGLang, then."""
    parent, req = parent_of(), parent_of()
    req.origin_input_ids = req.origin_input_ids_unpadded = parent.origin_input_ids
    req.tokenizer, req.eos_token_ids = parent.tokenizer, parent.eos_token_ids
    assert Mould(req, parent).is_usable
    req.added = SimpleNamespace()  # type: ignore[attr-defined]
    assert not Mould(req, parent).is_usable
    parent.added = req.added  # type: ignore[attr-defined]
    assert Mould(req, parent).is_usable
