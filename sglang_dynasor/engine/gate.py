"""With several tokenizer workers, in which SGLang loads no plugins: what their requests ask for is looked at in the scheduler.

What the field alone says is read by policy/spec.py as ever, and what the server can run by validation.py. What takes one front
process that knows all requests is refused: ids that clients name, budgets, and choices, whose requests nobody could tell apart.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from sglang_dynasor.engine.flag import has_many_fronts
from sglang_dynasor.engine.live import tag_of
from sglang_dynasor.engine.media import check_judge
from sglang_dynasor.engine.owner import owned
from sglang_dynasor.engine.validation import CONSTRAINTS, NO_ROOM, check_harmless, check_spec, check_thought
from sglang_dynasor.errors import FieldError, quoted
from sglang_dynasor.policy.spec import ProgramSpec, check_greedy, parse_field

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

# What of a Req is not its text, and what of the field one front process would have to know.
INPUTS = {"input_embeds": "input_embeds", "session": "session_params", "positional_embed_overrides": "positional_embed_overrides",
    "beam_group": "beam_width"}  # fmt: skip
KEYS = ("program", "budget_tokens", "template")


class Gate:
    """Who looks at requests of tokenizer workers. Where there is one front process it has done so, and this lets all pass."""

    def __init__(self, scheduler: Any, max_branches: int):
        self.max_branches = max_branches
        # Whether a front process has looked.
        self.is_open = not has_many_fronts(scheduler.server_args)
        self._server = scheduler  # has a tokenizer, a model_config and server_args as a front process has

    def is_forged(self, req: Req) -> bool:
        """Whether a client's request has an id as the server's own have: SGLang would abort those with it."""
        return not self.is_open and tag_of(req) is None and req.rid.startswith("\0")

    def is_warm_up(self, req: Req) -> bool:
        """Whether it only fills the cache, as SGLang sends one before n choices; a client that asks for no token is told."""
        params: Any = req.sampling_params
        return params.max_new_tokens == 0 and (self.is_open or params.n != 1)

    def read(self, req: Req, field: Any, level: str) -> ProgramSpec:
        """The program that a request asks for.

        Raises:
            FieldError: the field is wrong, or cannot be served with the request around it.
        """
        spec = parse_field(field, self.max_branches, level)
        if self.is_open:
            return owned(spec, req.sampling_params.custom_params)
        self._check(req, field if isinstance(field, dict) else {}, spec)
        return spec

    def _check(self, req: Req, field: dict[str, Any], spec: ProgramSpec) -> None:
        params: Any = req.sampling_params
        # Where images stand are numbers beyond the vocabulary, and SGLang reads none of it as tokens.
        ids = req.origin_input_ids if req.multimodal_inputs is None else None
        check_harmless(ids, {"top_k": params.top_k}, self._server.model_config.vocab_size)
        if key := next((key for key in KEYS if key in field), None):
            raise FieldError(
                f"dynasor.{key}={quoted(field[key])} on a server with --tokenizer-worker-num above 1, whose workers know only their own "
                "requests; leave it out"
            )
        if params.max_new_tokens == 0:
            raise FieldError(NO_ROOM)
        if params.n != 1:
            raise FieldError(
                f"n={params.n} with dynasor on a server with --tokenizer-worker-num above 1; send n=1 and dynasor.branches={params.n}"
            )
        if name := next(
            (name for attribute, name in INPUTS.items() if getattr(req, attribute, None) is not None), None
        ):
            raise FieldError(f"{name} with dynasor is not supported; leave out one of the two")
        if req.multimodal_inputs is not None:
            check_judge(spec, "image_data")
        check_greedy(spec.branches, {"temperature": params.temperature, "top_k": params.top_k})
        check_spec(spec, self._server)
        if spec.thought is not None:
            given = {key: getattr(params, key, None) for key in CONSTRAINTS}
            check_thought(spec, SimpleNamespace(return_logprob=req.return_logprob), given)
