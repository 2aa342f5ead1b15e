"""Rewards for sampled texts: one token of the model itself, or the author's own code. Works on stock SGLang."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from math import exp
from typing import Any, NamedTuple

from sglang_dynasor.algorithms.check import check_reward
from sglang_dynasor.errors import FieldError
from sglang_dynasor.frontend.backend import Backend
from sglang_dynasor.policy.spec import JudgeSpec


class Verdict(NamedTuple):
    """A reward, None where none was to be had, and the tokens computed for it."""

    reward: float | None
    num_tokens: int = 0


Judge = Callable[[str, str], Verdict]  # of the question and of what was sampled after it
Reward = Callable[[str, str], float | None]  # the author's own, of the same; None where it cannot say


@dataclass(frozen=True, slots=True)
class OwnJudge:
    """The author's function from question and sampled text to a reward in [0, 1], or None."""

    reward: Reward

    def __call__(self, prompt: str, text: str) -> Verdict:
        value = self.reward(prompt, text)
        check_reward("reward", value)
        return Verdict(value)


@dataclass(frozen=True, slots=True)
class ModelJudge:
    """p(good) / (p(good) + p(bad)) of the token that follows prompt, text and suffix."""

    backend: Backend
    suffix: str
    good: int
    bad: int

    def __call__(self, prompt: str, text: str) -> Verdict:
        asked = {
            "text": prompt + text + self.suffix,
            "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
            "return_logprob": True,
            "token_ids_logprob": [self.good, self.bad],
        }
        try:
            out = self.backend.post(asked)
        except FieldError:  # with the suffix the text is too long for the model: no reward, as in the engine
            return Verdict(None)
        if out is None or not out["meta_info"].get("output_token_ids_logprobs"):
            return Verdict(None)
        meta: dict[str, Any] = out["meta_info"]
        logprobs = {token: logprob for logprob, token, *_ in meta["output_token_ids_logprobs"][0]}
        computed = meta["prompt_tokens"] - meta.get("cached_tokens", 0) + meta["completion_tokens"]
        return Verdict(reward_of(logprobs[self.good], logprobs[self.bad]), computed)


def check_reward_function(reward: Any) -> None:
    """Raise FieldError unless `reward` is None or can be called with a question and a text."""
    if reward is None:
        return
    name = getattr(reward, "__name__", repr(reward))
    if not callable(reward):
        raise FieldError(f"reward={reward!r} is a {type(reward).__name__}; send a function reward(question, text)")
    try:
        signature(reward).bind("", "")
    except TypeError:
        raise FieldError(
            f"reward={name}{signature(reward)} cannot be called as reward(question, text); give it these two arguments"
        ) from None
    except ValueError:  # a builtin that does not tell what it takes
        return


def reward_of(good: float, bad: float) -> float:
    """p(good) / (p(good) + p(bad)) of two log-probabilities, in [0, 1]; 1/2 where both are impossible."""
    if max(good, bad) < -700:
        return 0.5
    return 1.0 / (1.0 + exp(max(-700.0, min(700.0, bad - good))))


def model_judge(backend: Backend, judge: JudgeSpec) -> ModelJudge:
    """The judge that `judge` describes.

    Raises:
        FieldError: a label that is not exactly one token, both the same, or a suffix of no tokens.
    """
    if not backend.tokenize(judge.suffix):
        raise FieldError(f"dynasor.judge_suffix={judge.suffix!r} is no token of this model; send a text that is")
    ids: list[int] = []
    for key, text in (("good", judge.good), ("bad", judge.bad)):
        tokens = backend.tokenize(text)
        if len(tokens) != 1:
            raise FieldError(
                f"dynasor.judge_{key}={text!r} is {len(tokens)} tokens of this model; send a text that is one (mind a leading space)"
            )
        ids += tokens
    if ids[0] == ids[1]:
        raise FieldError(
            f"dynasor.judge_good={judge.good!r} and judge_bad={judge.bad!r} are the same token; send two different ones"
        )
    return ModelJudge(backend, judge.suffix, ids[0], ids[1])
