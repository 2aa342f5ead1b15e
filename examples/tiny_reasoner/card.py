"""Measure the tiny reasoner on held-out questions and write what its model card tells: `python card.py`.

Samples come from the real engine; the judge is read off the network itself.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from pathlib import Path
from statistics import mean, quantiles
from typing import Any

import tokens
import torch
from model import Model, ModelConfig
from questions import MAX_STEPS, held_out, prompt
from train import judged_sample

HERE = Path(__file__).parent
NUM_QUESTIONS, NUM_SAMPLES = 300, 16
TEMPERATURE = 1.0
MARK = "<!-- measured -->"


def write_held_out(num_questions: int = 600) -> None:
    """The held-out questions as data, for users who need no generator."""
    lines = [
        json.dumps({"prompt": prompt(q.text), "question": q.text, "answer": q.answer, "num_steps": q.num_steps})
        for q in held_out(num_questions)
    ]
    (HERE / "held_out.jsonl").write_text("\n".join(lines) + "\n")


def number(text: str) -> str | None:
    mark, _, rest = text.rpartition("####")
    return rest.strip() if mark or "####" in text else None


def vote(answers: list[str | None]) -> str | None:
    counts = Counter(a for a in answers if a is not None)
    return counts.most_common(1)[0][0] if counts else None


def auc(scores: list[float], labels: list[bool]) -> float:
    """The chance that a right one scores above a wrong one; a tie counts half."""
    right = [s for s, label in zip(scores, labels, strict=True) if label]
    wrong = [s for s, label in zip(scores, labels, strict=True) if not label]
    if not right or not wrong:
        return float("nan")
    return mean((r > w) + 0.5 * (r == w) for r in right for w in wrong)


def main() -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import sglang as sgl

    write_held_out()
    questions = held_out(NUM_QUESTIONS)
    prompts = [prompt(q.text) for q in questions]
    engine = sgl.Engine(model_path=str(HERE / "checkpoint"), dtype="float32", log_level="error")
    greedy = [o["text"] for o in engine.generate(prompts, {"temperature": 0, "max_new_tokens": 200})]
    flat: list[dict[str, Any]] = engine.generate(
        [p for p in prompts for _ in range(NUM_SAMPLES)], {"temperature": TEMPERATURE, "max_new_tokens": 200}
    )
    samples = [flat[i : i + NUM_SAMPLES] for i in range(0, len(flat), NUM_SAMPLES)]
    long_prompts = [prompt(q.text, think=True) for q in questions if q.num_steps <= 5]
    long_texts = [o["text"] for o in engine.generate(long_prompts, {"temperature": 1.0, "max_new_tokens": 800})]
    engine.shutdown()

    model = Model(ModelConfig(tokens.Encoder(HERE / "checkpoint").vocab_size))
    model.load(HERE / "checkpoint")
    scores, labels, best, chance = judge(model, questions, samples)

    rows = [
        "| steps | questions | greedy % | one sample % | majority@16 % | tokens per sample |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    totals: dict[str, list[float]] = {"greedy": [], "single": [], "majority": [], "tokens": []}
    groups: list[tuple[str, list[int]]] = [
        (str(n), [i for i, q in enumerate(questions) if q.num_steps == n]) for n in range(1, MAX_STEPS + 1)
    ]
    for name, members in [*groups, ("all", list(range(len(questions))))]:
        gold = [str(questions[i].answer) for i in members]
        one = {
            "greedy": [float(number(greedy[i]) == g) for i, g in zip(members, gold, strict=True)],
            "single": [mean(number(o["text"]) == g for o in samples[i]) for i, g in zip(members, gold, strict=True)],
            "majority": [
                float(vote([number(o["text"]) for o in samples[i]]) == g) for i, g in zip(members, gold, strict=True)
            ],
            "tokens": [mean(o["meta_info"]["completion_tokens"] for o in samples[i]) for i in members],
        }
        totals = one
        rows.append(
            f"| {name} | {len(members)} | {100 * mean(one['greedy']):.0f} | {100 * mean(one['single']):.0f} "
            f"| {100 * mean(one['majority']):.0f} | {mean(one['tokens']):.0f} |"
        )
    lengths = [o["meta_info"]["completion_tokens"] for o in flat]
    cuts = quantiles(lengths, n=20)
    firsts, finals = [], []
    for text, question in zip(long_texts, [q for q in questions if q.num_steps <= 5], strict=True):
        drafts = [
            part.split("\n")[0].strip() for part in text.split("so ")[1:] if part.split("\n")[0].strip().isdigit()
        ]
        firsts.append(bool(drafts) and drafts[0] == str(question.answer))
        finals.append(number(text) == str(question.answer))
    rows += [
        "",
        f"All: greedy {100 * mean(totals['greedy']):.1f} %, one sample {100 * mean(totals['single']):.1f} %, "
        f"majority@16 {100 * mean(totals['majority']):.1f} %. "
        f"Tokens per sample: p5 {cuts[0]:.0f}, median {cuts[9]:.0f}, p95 {cuts[18]:.0f}.",
        "",
        f"Judge (300 questions x 4 samples): AUC over all samples {auc(scores, labels):.3f}; best of 8 by judge "
        f"{100 * best:.1f} % against {100 * chance:.1f} % for a random one of the 8.",
        "",
        f"Long mode (questions of up to 5 steps): the first draft is right in {100 * mean(firsts):.1f} %, the final answer "
        f"in {100 * mean(finals):.1f} %.",
    ]
    card = HERE / "README.md"
    head, _, rest = card.read_text().partition(MARK)
    _, _, tail = rest.partition(MARK)
    card.write_text(f"{head}{MARK}\n" + "\n".join(rows) + f"\n{MARK}{tail}")
    print("\n".join(rows))


@torch.inference_mode()
def judge(model: Model, questions: list[Any], samples: list[list[Any]]) -> tuple[list[float], list[bool], float, float]:
    """Judge probabilities and truth of 4 samples per question, accuracy of the best of 8, and of a random one."""
    encode = tokens.Encoder(HERE / "checkpoint")
    rng = random.Random(0)
    scores: list[float] = []
    labels: list[bool] = []
    best: list[bool] = []
    chance: list[float] = []
    for question, outs in zip(questions, samples, strict=True):
        eight = rng.sample(outs, 8)
        docs = [judged_sample(encode, question, [i for i in o["output_ids"] if i != encode.eos]) for o in eight]
        truth = [bool(doc.judged) and doc.judged[-1][1] for doc in docs]
        probabilities: list[float] = []
        for doc in docs:
            ids = torch.tensor([[*doc.ids, encode.judge]])
            n = ids.shape[1]
            hidden = model(ids, torch.arange(n)[None], torch.tril(torch.ones(n, n, dtype=torch.bool))[None, None])
            good, bad = model.logits(hidden[0, -1])[[encode.good, encode.bad]].softmax(-1).tolist()
            probabilities.append(good / (good + bad))
        scores += probabilities[:4]
        labels += truth[:4]
        best.append(truth[max(range(8), key=probabilities.__getitem__)])
        chance.append(mean(truth))
    return scores, labels, mean(best), mean(chance)


if __name__ == "__main__":
    main()
