"""The one field a client sends, checked and made into a ProgramSpec."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from sglang_dynasor.config import CAREFUL, LEVELS
from sglang_dynasor.errors import FieldError, quoted, spelled
from sglang_dynasor.policy.algorithm import ENGINE_ALGORITHMS, SELF_CONSISTENCY, AlgorithmRecord
from sglang_dynasor.policy.answers import EXTRACTORS, FORMS, answer_marks, check_extractor
from sglang_dynasor.policy.budget_spec import MOST_BUDGET_PROGRAMS, BudgetSpec, parse_budget
from sglang_dynasor.policy.equal import COMPARERS, EQUALS
from sglang_dynasor.policy.rules import StopRule, parse_stop
from sglang_dynasor.policy.thought_spec import (
    EXITS,
    HOLD_TOKENS,
    MAX_SUFFIX_CHARS,
    MAX_WORD_CHARS,
    MOST_AGREE,
    MOST_MIN_TOKENS,
    MOST_PROBE_TOKENS,
    TOGETHER,
    ThoughtSpec,
    check_together,
    parse_thought,
)
from sglang_dynasor.policy.values import (
    ID_VALUES,
    TEMPLATE_VALUES,
    read_flag,
    read_frac,
    read_id,
    read_seconds,
    read_template,
    read_text,
    read_whole,
)

JUDGES = ("self", "model", "steps")
VOTES = ("majority", "confidence", "reward", "best")
_UNBOUNDED = ("confidence", "best")  # of these one vote more may change the answer, however far another one leads
DEFAULT_GROUP_TOKENS = 128
# How likely the model must say yes, how close two vectors must be. A model too small for the question says yes by chance:
# SmolLM2-135M gives 0.37 to 0.71 whatever the answers are (docs/answers.md).
SCORES = {"model": 0.7, "embedding": 0.9}
MOST_GROUP_TOKENS = 8192
GREEDY_BELOW = 1e-6  # temperature: SGLang takes the likeliest token there

_RECORDS = ENGINE_ALGORITHMS.values()
_OWNERS = {key: record.name for record in _RECORDS for key in record.engine_keys}  # of keys that one algorithm has


def _default(attribute: str) -> str:
    """A default as help texts say it: that of most algorithms, then those that have another."""
    usual = getattr(SELF_CONSISTENCY, attribute)
    others = [f"{record.name} {value}" for record in _RECORDS if (value := getattr(record, attribute)) != usual]
    return "; ".join([f"default {usual}", *others])


_HELP = {
    "algorithm": (", ".join(ENGINE_ALGORITHMS), "; ".join(record.summary for record in _RECORDS)),
    "branches": ("1 to --dynasor-max-branches", f"the cap: most branches the program may use ({_default('branches')})"),
    "width": ("1 to branches", "most branches in flight at once (default: as many as the load allows)"),
    "stop": (f"{', '.join(LEVELS)}, or NAME[:LEVEL], joined by and / or", f"when to end early ({_default('stop')}; --dynasor-level in place of {SELF_CONSISTENCY.stop}; long_cot with several branches: that or {TOGETHER})"),
    "answer": (", ".join((*EXTRACTORS, *FORMS)), "where the answer stands in the text (default auto)"),
    "equal": ("math, text, symbolic, model[:PROBABILITY], embedding[:COSINE]", "which answers are one vote: math merges writings of one value, text only white space; symbolic also what sympy proves equal, model what the served model says means the same, embedding what an embedding server puts close together (default math; " + ", ".join(f"{kind}:{score:g}" for kind, score in SCORES.items()) + ")"),
    "deadline_s": ("above 0 to 86400", "seconds from arrival after which the best answer so far is given (default none)"),
    "tenant": (ID_VALUES, "who shares the engine by weight with other tenants (default none)"),
    "vote": ("majority, confidence, reward, best", f"what a branch's vote weighs ({_default('vote')}; confidence with stop=confidence); best: the branch of the highest reward decides"),
    "judge": ("self, model, steps", "who gives each finished branch a reward in [0, 1]: the model itself, or the operator's reward model, asked once or after each line (default nobody)"),
    "judge_suffix": (f"up to {MAX_SUFFIX_CHARS} characters", "what follows prompt and branch when they are judged; needed with judge=self"),
    "judge_good": ("one token", "with judge=self: what a good branch is followed by"),
    "judge_bad": ("one token", "with judge=self: what a bad branch is followed by"),
    "group_tokens": ("1 to 8192", f"tokens over which a branch's confidence is averaged (default {DEFAULT_GROUP_TOKENS})"),
    "weak_frac": ("0 to below 1", "running branches less confident than this share of the first ones are ended (default 0: none)"),
    "statistics": ("true, false", "tell confidences, rewards and answer entropies of the branches in the record (default false)"),
    "exit": (EXITS, "when a thought is closed by its own trials; published is the rule of the Dynasor repository, which loses answers (default trial:0.99; of several that decide together none, unless exit or agree is sent)"),
    "agree": (f"1 to {MOST_AGREE}", "probes in a row that must give the same answer (default 2)"),
    "min_tokens": (f"0 to {MOST_MIN_TOKENS}", "tokens of a thought before it is probed (default 512)"),
    "probe_tokens": (f"1 to {MOST_PROBE_TOKENS}", "tokens from one probe to the next (default: as often as 3 % of the thought pays for)"),
    "hold_tokens": (f"1 to {MOST_PROBE_TOKENS}", f"with several branches and stop=trials: tokens that each thinks on while the leading answer keeps its share, no fewer than probe_tokens (default {HOLD_TOKENS})"),
    "probe_word": (f"up to {MAX_WORD_CHARS} characters", "a word such as 'wait': a thought is asked only where it has just said that, as DEER does (default: at the end of a line)"),
    "probe_suffix": (f"up to {MAX_SUFFIX_CHARS} characters", "what a thought is followed by when it is asked for its answer (default: think_end and the answer's mark)"),
    "think_end": (f"up to {MAX_SUFFIX_CHARS} characters", "what ends a thought (default: the model's own)"),
    "effort": ("low, medium, high", "agree, probability and min_tokens together, as OpenAI's reasoning_effort (default medium)"),
    "budget_tokens": ("1 or more", "tokens that the programs of one request spend together, each branch where it is worth most (default: no bound)"),
    "budget": (ID_VALUES, "id of a budget that programs of several requests share"),
    "budget_programs": (f"1 to {MOST_BUDGET_PROGRAMS}", "with budget: how many programs share it"),
    "template": (f"{TEMPLATE_VALUES} of --dynasor-templates", "settings of the operator's, the newest version unless one is named; keys that are sent beside it win"),
    "program": (ID_VALUES, "id of a program whose branches the client sends as requests of their own"),
}  # fmt: skip
FIELD_HELP = {
    key: (values, f"{_OWNERS[key]}: {meaning}" if key in _OWNERS else meaning)
    for key, (values, meaning) in _HELP.items()
}


@dataclass(frozen=True, slots=True)
class JudgeSpec:
    """Who rewards a finished branch.

    Without `is_external` the model itself: what follows prompt, branch and `suffix` is read as one token, `good` or `bad`,
    and the reward is p(good) / (p(good) + p(bad)). Else the operator's reward model, which is sent the same text; with
    `by_steps` also what was there after each line, and the least reward counts (a process reward model).
    """

    suffix: str
    good: str = ""
    bad: str = ""
    is_external: bool = False
    by_steps: bool = False


@dataclass(frozen=True, slots=True)
class ProgramSpec:
    """What a client asked for, every value in range."""

    algorithm: str
    branches: int
    width: int | None  # None: the load decides
    stop: StopRule
    answer: str
    program: str | None = None  # None: the server makes the branches; else the client sends them under this id
    deadline_s: float | None = None
    tenant: str = ""
    vote: str = "majority"
    judge: JudgeSpec | None = None
    group_tokens: int = DEFAULT_GROUP_TOKENS
    weak_frac: float = 0.0
    statistics: bool = False
    thought: ThoughtSpec | None = None
    equal: str = "math"
    budget: BudgetSpec | None = None
    template: str = ""  # whose settings these are, as NAME@VERSION
    owner: str = ""  # who sent the request, as the front process names them; nothing of the field

    @property
    def about(self) -> AlgorithmRecord:
        """The record of its algorithm."""
        return ENGINE_ALGORITHMS[self.algorithm]

    @property
    def comparer(self) -> str:
        """Who compares new answers beside the loop; empty where their keys say all."""
        kind = self.equal.partition(":")[0]
        return kind if kind in COMPARERS else ""

    @property
    def least_score(self) -> float:
        """From which on `model` and `embedding` take two answers for the same."""
        kind, _, level = self.equal.partition(":")
        return float(level or SCORES[kind])

    @property
    def needs_statistics(self) -> bool:
        """Whether somebody reads the logits of its branches."""
        return self.statistics or self.vote == "confidence" or self.weak_frac > 0 or self.stop.needs_statistics


def parse_field(field: Any, max_branches: int, level: str = CAREFUL) -> ProgramSpec:
    """The program that a request's `dynasor` field asks for.

    Args:
        field: an algorithm's name, or a flat mapping of the keys in FIELD_HELP.
        max_branches: the operator's limit on the cap.
        level: one of LEVELS, by which programs stop that do not say how.

    Raises:
        FieldError: an unknown key, a wrong type or a value out of range; the message names the key and what is allowed.
    """
    if isinstance(field, str):
        field = {"algorithm": field}
    if not isinstance(field, dict):
        raise FieldError(
            f"dynasor={quoted(field)} is a {type(field).__name__}; send an object such as "
            f'{{"algorithm": "{SELF_CONSISTENCY.name}"}}, or the algorithm\'s name'
        )
    options = cast("dict[str, Any]", field)
    for key in options:
        if key not in FIELD_HELP:
            raise FieldError(f"dynasor.{spelled(key)} is not a key of the field; the keys are {', '.join(FIELD_HELP)}")
    about = _about(options)
    default_branches = min(about.branches, max_branches)
    branches = read_whole(options, "branches", default_branches, max_branches, "--dynasor-max-branches")
    width = read_whole(options, "width", branches, branches, "dynasor.branches") if "width" in options else None
    answer = _text(options, "answer", "auto")
    check_extractor(answer)
    equal = _equal(options, answer, about)
    default_stop = level if about.stop == CAREFUL else about.stop
    if about.is_thought and branches > 1:
        default_stop = f"{default_stop} or {TOGETHER}"
    stop = parse_stop(_text(options, "stop", default_stop))
    check_together(stop, branches, about)
    program = read_id(options, "program")
    deadline_s = read_seconds(options, "deadline_s") if "deadline_s" in options else None
    tenant = read_id(options, "tenant")
    if program is not None and deadline_s is not None:
        raise FieldError(
            f"dynasor.deadline_s={quoted(options['deadline_s'])} with dynasor.program={quoted(program)}: branches that you send are queued like any "
            "other request; leave out one of the two"
        )
    judge = _judge(options)
    weighs_confidence = about.vote == "majority" and stop.uses("confidence")
    vote = _text(options, "vote", "confidence" if weighs_confidence else about.vote)
    if vote not in VOTES:
        raise FieldError(f"dynasor.vote={quoted(vote)} is not known; use one of {', '.join(VOTES)}")
    if stop.uses("margin") and vote in _UNBOUNDED:
        raise FieldError(
            f"dynasor.stop={quoted(stop.text)} with vote {quoted(vote)}{' (the default with this stop)' if weighs_confidence and 'vote' not in options else ''}: nothing bounds what one more branch changes, so that margin never "
            "holds; use another rule, or vote majority or reward"
        )
    needs_rewards = about.needs_rewards or vote in ("reward", "best") or stop.uses("reward") or stop.uses("best")
    if judge is None and needs_rewards:
        key = "algorithm" if about.needs_rewards else "vote" if vote in ("reward", "best") else "stop"
        raise FieldError(
            f"dynasor.{key}={quoted(options[key])} without dynasor.judge: nobody gives rewards; send a judge"
        )
    if judge is not None and program is not None:
        raise FieldError(
            f"dynasor.judge with dynasor.program={quoted(program)}: branches that you send are judged by you; leave out one of the two"
        )
    if stop.reads_answers and not answer_marks(answer):
        raise FieldError(
            f"dynasor.stop={quoted(stop.text)} with dynasor.answer={quoted(answer)}: nothing marks where such an answer begins; "
            "use answer hash, boxed or auto, or another rule"
        )
    thought = parse_thought(options, stop) if about.is_thought else None
    budget = parse_budget(options)
    if budget is not None and vote == "best":
        raise FieldError(
            f"dynasor.budget_tokens={quoted(budget.tokens)} with vote 'best' is not supported: nothing says what one more branch would change; "
            "leave it out, or use another vote"
        )
    refused = ("program", "judge", "weak_frac", "budget_tokens") if about.is_thought else ()
    if key := next((key for key in refused if key in options), None):
        raise FieldError(
            f"dynasor.{key}={quoted(options[key])} with algorithm {about.name!r} is not supported; leave out one of the two"
        )
    group_tokens = read_whole(options, "group_tokens", DEFAULT_GROUP_TOKENS, MOST_GROUP_TOKENS, "the limit")
    return ProgramSpec(
        about.name, branches, width, stop, answer, program, deadline_s, tenant or "",
        vote, judge, group_tokens, read_frac(options, "weak_frac"), read_flag(options, "statistics"), thought, equal, budget,
        read_template(options),
    )  # fmt: skip


def _equal(options: dict[str, Any], answer: str, about: AlgorithmRecord) -> str:
    equal = _text(options, "equal", "math")
    kind, sep, level = equal.partition(":")
    if kind not in EQUALS or (sep and kind not in SCORES):
        forms = (f"{kind}:{score:g}" for kind, score in SCORES.items())
        raise FieldError(f"dynasor.equal={quoted(equal)} is not known; use one of {', '.join((*EQUALS, *forms))}")
    try:
        is_inside = not sep or 0 < float(level) <= 1
    except ValueError:
        is_inside = False
    if not is_inside:
        raise FieldError(
            f"dynasor.equal={quoted(equal)}: the level {quoted(level)} is outside (0, 1]; send one such as {SCORES[kind]:g}"
        )
    if kind == "symbolic" and (answer in ("json", "yes_no", "choice") or answer.startswith(("tool_call", "code"))):
        raise FieldError(
            f"dynasor.equal='symbolic' with dynasor.answer={quoted(answer)}: such answers are no formulas; use another equality"
        )
    if kind in COMPARERS and about.is_thought:
        raise FieldError(
            f"dynasor.equal={quoted(equal)} with algorithm {about.name!r} is not supported: thoughts are closed by what their trials say at once; "
            "use math or text"
        )
    if kind in COMPARERS and "program" in options:
        raise FieldError(
            f"dynasor.equal={quoted(equal)} with dynasor.program={quoted(options['program'])}: branches that you send are answered as they end, before "
            "anything is compared; use math or text"
        )
    return equal


def _judge(options: dict[str, Any]) -> JudgeSpec | None:
    texts = {key: _text(options, key, "") for key in ("judge_suffix", "judge_good", "judge_bad")}
    if "judge" not in options:
        if key := next((key for key in texts if key in options), None):
            raise FieldError(
                f"dynasor.{key}={quoted(options[key])} without dynasor.judge; send judge 'self', 'model' or 'steps' too"
            )
        return None
    judge = _text(options, "judge", "")
    if judge not in JUDGES:
        raise FieldError(f"dynasor.judge={quoted(judge)} is not known; use one of {', '.join(JUDGES)}")
    suffix, good, bad = texts.values()
    if len(suffix) > MAX_SUFFIX_CHARS:
        raise FieldError(f"dynasor.judge_suffix has {len(suffix)} characters; at most {MAX_SUFFIX_CHARS} are allowed")
    if judge != "self":
        if key := next((key for key in ("judge_good", "judge_bad") if key in options), None):
            raise FieldError(
                f"dynasor.{key}={quoted(options[key])} with judge {quoted(judge)}, which gives a number; leave it out"
            )
        return JudgeSpec(suffix, is_external=True, by_steps=judge == "steps")
    if missing := next((key for key, text in texts.items() if not text), None):
        raise FieldError(f"dynasor.judge='self' without dynasor.{missing}; send {', '.join(texts)}")
    if good == bad:
        raise FieldError(f"dynasor.judge_good={quoted(good)} is also judge_bad; send two different tokens")
    return JudgeSpec(suffix, good, bad)


def check_greedy(num_branches: int, sampling: dict[str, Any]) -> None:
    """Raise FieldError where several branches of one prompt would all say the same."""
    if num_branches > 1 and is_greedy(sampling):
        raise FieldError(
            f"{num_branches} branches with temperature={quoted(sampling.get('temperature', 1.0))}, top_k={quoted(sampling.get('top_k', -1))}: "
            "greedy branches would all be the same; send a temperature above 0, or dynasor.branches=1"
        )


def is_greedy(sampling: dict[str, Any]) -> bool:
    """Whether SGLang takes the likeliest token each time, by these sampling parameters of its."""
    temperature = sampling.get("temperature")
    return sampling.get("top_k") == 1 or (isinstance(temperature, int | float) and temperature < GREEDY_BELOW)


def _about(options: dict[str, Any]) -> AlgorithmRecord:
    """The record of the algorithm that is asked for."""
    name = _text(options, "algorithm", SELF_CONSISTENCY.name)
    if name not in ENGINE_ALGORITHMS:
        raise FieldError(
            f"dynasor.algorithm={quoted(name)} is not known to the engine; use one of {', '.join(ENGINE_ALGORITHMS)}. Searches run "
            "through the frontend: sglang_dynasor.solve() or reason()"
        )
    about = ENGINE_ALGORITHMS[name]
    if key := next((key for key, owner in _OWNERS.items() if key in options and owner != name), None):
        raise FieldError(
            f"dynasor.{key}={quoted(options[key])} is for algorithm {_OWNERS[key]!r}; leave it out, or ask for that"
        )
    return about


def _text(options: dict[str, Any], key: str, default: str) -> str:
    return read_text(options, key, default, FIELD_HELP[key][0])
