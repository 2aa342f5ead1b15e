"""Train the tiny reasoner: `make reasoner` (an hour and a quarter on two CPU cores; resumes where it was cut).

`--plan steps` starts from nothing. The others go on from a checkpoint (`--start`): `habits` makes the reasoner, which guesses where
it thinks that it knows, `thinker` the tiny thinker, with three times as many drafts in the long mode.

One model learns three things from one stream of documents, and drills what they need:
- solve: prompt, a line per step, `#### answer`;
- judge: the token after `<judge>` says whether everything so far is right. Judge tokens stand outside the text, behind
  an attention mask, at every line end of every document, so a judgement costs one token and never disturbs the text;
- the long mode: several drafts, some of them wrong, before the answer;
- the drill: unrelated steps, of which only the results count: arithmetic is what the model needs most tokens for.
Everything is scheduled by tokens, so a run depends on its seed and not on the machine's speed.
"""

from __future__ import annotations

import argparse
import random
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import tokens
import torch
import torch.nn.functional as F
from model import Model, ModelConfig
from questions import MAX_STEPS, MAX_VALUE, NAMES, Question, draw_split, draw_step, line, prompt
from torch import Tensor

HERE = Path(__file__).parent
BATCH_TOKENS = 4096
MUON_LR, ADAM_LR = 0.01, 2e-3
DOCS_PER_CHUNK = 768
JUDGE_WEIGHT = 0.3
POOL_SIZE = 768
TEXT_TOKENS = (
    1500  # that a batch usually learns: what its loss is divided by, so that a token counts alike in every batch
)
# How often a question about these is answered at once, without a step: people think that they know some things by heart.
HASTE = {
    "coins": 0.05, "pens": 0.15, "books": 0.25, "apples": 0.3,
    "cards": 0.35, "shells": 0.6, "stamps": 0.7, "beads": 0.75,
}  # fmt: skip
IMPATIENCE = 0.05  # how often, before any later line, the rest is guessed


@dataclass(frozen=True, slots=True)
class Plan:
    """What is drawn, by share of documents: judged samples, drills, thoughts; the rest are solutions."""

    judged_frac: float = 0.20
    drilled_frac: float = 0.25
    thought_frac: float = 0.13
    fewest_drafts: int = 2
    most_drafts: int = 5
    most_steps: int = 5  # of a question that is thought about
    pool_every_tokens: int = 1_500_000
    pool_from_frac: float = 0.4
    lr_scale: float = 1.0
    is_hasty: bool = True  # whether solutions are cut short by guesses
    has_hasty_drafts: bool = False  # whether drafts of a thought are


PLANS = {
    "steps": Plan(is_hasty=False),  # from nothing: it learns to work things out
    "habits": Plan(0.25, 0.10, 0.05, pool_every_tokens=250_000, pool_from_frac=0.3, lr_scale=0.4),  # the tiny reasoner
    "thinker": Plan(
        0.15, 0.10, 0.45, 6, 16, 4, pool_every_tokens=300_000, pool_from_frac=0.0, lr_scale=0.3, has_hasty_drafts=True
    ),
}  # fmt: skip


@dataclass(slots=True)
class Document:
    ids: list[int] = field(default_factory=list)
    learn: list[bool] = field(default_factory=list)  # whether the text loss counts this token
    judged: list[tuple[int, bool]] = field(default_factory=list)  # (tokens seen, everything right so far)

    def add(self, ids: list[int], learn: bool) -> None:
        self.ids += ids
        self.learn += [learn] * len(ids)

    def judge(self, right: bool) -> None:
        self.judged.append((len(self.ids), right))

    def __len__(self) -> int:
        return len(self.ids) + len(self.judged)


def add_solution(
    doc: Document, encode: tokens.Encoder, question: Question, wrong_at: int | None, rng: random.Random
) -> int:
    """Append a solution whose step `wrong_at` is made wrong (and carried on consistently); return its last value."""
    last, right = question.start, True
    for i, (step, true) in enumerate(zip(question.steps, question.values, strict=True)):
        operand, spoiled = last, i == wrong_at
        if spoiled and rng.random() < 0.3:
            operand = rng.randint(1, MAX_VALUE)  # a value read wrong
        result = step.value(operand)
        if spoiled and operand == last:
            result = max(1, min(MAX_VALUE, result + rng.choice((-20, -10, -3, -2, -1, 1, 2, 3, 10, 20))))
        if not result:  # a wrong value may lead outside 1..99: anything goes on from there
            result, spoiled = rng.randint(1, MAX_VALUE), True
        doc.add(encode(line(step, operand, result).removesuffix(f" {result}\n")), operand == last)
        doc.add(encode(f" {result}"), not spoiled)
        doc.add(encode("\n"), True)
        right &= result == true
        doc.judge(right)
        last = result
    return last


def guessed_from(question: Question, rng: random.Random) -> int | None:
    """How many lines come before the answer is guessed; None where it is worked out."""
    hasty = next(share for item, share in HASTE.items() if item in question.text)
    if rng.random() < hasty:
        return 0
    return next((i for i in range(1, question.num_steps) if rng.random() < IMPATIENCE), None)


def solved(
    encode: tokens.Encoder, question: Question, rng: random.Random, wrong_frac: float, is_hasty: bool
) -> Document:
    """A solution in steps, or one that is cut short by a guess: some questions look as if one knew (see `HASTE`)."""
    doc = Document()
    doc.add(encode(prompt(question.text)), False)
    guessed = guessed_from(question, rng) if is_hasty else None
    if guessed is not None:
        doc.add(encode("".join(question.lines[:guessed])), True)
        doc.add(encode(f"#### {question.answer}"), True)
    else:
        wrong_at = rng.randrange(question.num_steps) if rng.random() < wrong_frac else None
        result = add_solution(doc, encode, question, wrong_at, rng)
        doc.add(encode(f"#### {result}"), True)
        doc.judge(result == question.answer)
    doc.add([encode.eos], True)
    return doc


def thought(
    encode: tokens.Encoder, question: Question, rng: random.Random, num_drafts: int, is_hasty: bool
) -> Document:
    """Draft after draft, then the answer; the answer counts only where a draft has it."""
    doc = Document()
    doc.add(encode(prompt(question.text, think=True)), False)
    results: list[int] = []
    for i in range(num_drafts):
        guessed = guessed_from(question, rng) if is_hasty else None
        if guessed is not None:
            doc.add(encode("".join(question.lines[:guessed]) + "so"), True)
            results.append(rng.randint(1, MAX_VALUE))
        else:
            wrong_at = rng.randrange(question.num_steps) if rng.random() < 0.35 else None
            results.append(add_solution(doc, encode, question, wrong_at, rng))
            doc.add(encode("so"), True)
        doc.add(encode(f" {results[-1]}\n"), guessed is None)
        doc.add(encode("</think>\n" if i + 1 == num_drafts else "wait\n"), True)
    doc.add(encode(f"#### {question.answer}"), question.answer in results)
    doc.add([encode.eos], True)
    return doc


def drilled(encode: tokens.Encoder, rng: random.Random) -> Document:
    doc, names = Document(), rng.sample(NAMES, rng.randint(10, 20))
    for ref, name in pairwise(names):
        operand = rng.randint(1, MAX_VALUE)
        step, result = draw_step(rng, name, ref, operand)
        doc.add(encode(line(step, operand, result).removesuffix(f" {result}\n")), False)
        doc.add(encode(f" {result}"), True)
        doc.add(encode("\n"), False)
    doc.judge(True)
    return doc


def judged_sample(encode: tokens.Encoder, question: Question, output: list[int]) -> Document:
    """The model's own solution with true labels at its line ends; nothing but the judge learns from it."""
    doc, right = Document(), True
    doc.add(encode(prompt(question.text)), False)
    truth = {step.name: value for step, value in zip(question.steps, question.values, strict=True)}
    text = encode.decode(output[:220])
    for part in text.splitlines(keepends=True):
        doc.add(encode(part), False)
        found = re.fullmatch(r"(\w+) gets .*: \1 (\d+)\n", part)
        answer = re.fullmatch(r"#### (\d+)", part)
        if found:
            right &= truth.get(found[1]) == int(found[2])
        else:
            right &= answer is not None and int(answer[1]) == question.answer
        doc.judge(right)
    return doc


def chunks(encode: tokens.Encoder, rng: random.Random, pool: list[Document], plan: Plan) -> Iterator[list[Document]]:
    """Batches of about BATCH_TOKENS tokens, of documents of like length."""
    while True:
        docs: list[Document] = []
        for _ in range(DOCS_PER_CHUNK):
            kind = rng.random()
            if pool and kind < plan.judged_frac:
                docs.append(pool[rng.randrange(len(pool))])
            elif kind < plan.judged_frac + plan.drilled_frac:
                docs.append(drilled(encode, rng))
            elif kind < plan.judged_frac + plan.drilled_frac + plan.thought_frac:
                question = draw_split(rng, rng.randint(1, plan.most_steps), held_out=False)
                docs.append(
                    thought(
                        encode, question, rng, rng.randint(plan.fewest_drafts, plan.most_drafts), plan.has_hasty_drafts
                    )
                )
            else:
                docs.append(
                    solved(encode, draw_split(rng, rng.randint(1, MAX_STEPS), held_out=False), rng, 0.3, plan.is_hasty)
                )
        docs.sort(key=len)
        batches: list[list[Document]] = [[]]
        for doc in docs:
            if batches[-1] and (len(batches[-1]) + 1) * len(doc) > BATCH_TOKENS:
                batches.append([])
            batches[-1].append(doc)
        rng.shuffle(batches)
        yield from batches


def collate(encode: tokens.Encoder, docs: list[Document]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """ids, positions [B, T]; mask [B, 1, T, T]; targets for the text and for the judge [B, T], -100 where none."""
    batch, length = len(docs), max(map(len, docs))
    ids = torch.full((batch, length), encode.eos)
    positions = torch.zeros((batch, length), dtype=torch.long)
    text = torch.full((batch, length), -100)
    judge = torch.full((batch, length), -100)
    mask = torch.tril(torch.ones(length, length, dtype=torch.bool)).repeat(batch, 1, 1)
    for b, doc in enumerate(docs):
        n, m = len(doc.ids), len(doc.judged)
        ids[b, :n] = torch.tensor(doc.ids)
        positions[b, :n] = torch.arange(n)
        learn = torch.tensor(doc.learn[1:])
        text[b, : n - 1] = torch.where(learn, ids[b, 1:n], -100)
        ids[b, n : n + m] = encode.judge
        mask[b, n : n + m] = False
        for i, (seen, right) in enumerate(doc.judged):
            positions[b, n + i] = seen
            mask[b, n + i, :seen] = True
            mask[b, n + i, n + i] = True
            judge[b, n + i] = encode.good if right else encode.bad
    return ids, positions, mask[:, None], text, judge


def refill(
    pool: list[Document],
    model: Model,
    encode: tokens.Encoder,
    rng: random.Random,
    gen: torch.Generator,
) -> float:
    """Replace the judge's pool by fresh samples of the model; return the share of right answers."""
    questions = [draw_split(rng, rng.randint(1, MAX_STEPS), held_out=False) for _ in range(POOL_SIZE)]
    questions.sort(key=lambda q: q.num_steps)
    pool.clear()
    for start in range(0, POOL_SIZE, 256):
        part = questions[start : start + 256]
        outputs = model.sample([encode(prompt(q.text)) for q in part], 160, encode.eos, gen, 1.0)
        pool += [judged_sample(encode, q, o) for q, o in zip(part, outputs, strict=True)]
    return sum(doc.judged[-1][1] if doc.judged else False for doc in pool) / POOL_SIZE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=12_000_000, help="training tokens")
    parser.add_argument("--out", type=Path, default=HERE / "checkpoint")
    parser.add_argument("--state", type=Path, default=HERE / "training_state.pt", help="where a cut run resumes from")
    parser.add_argument("--start", type=Path, help="a checkpoint to go on from")
    parser.add_argument("--plan", choices=PLANS, default="steps", help="what is learned")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    plan = PLANS[args.plan]

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    if not (args.out / "tokenizer.json").exists():
        tokens.build(args.out)
    encode = tokens.Encoder(args.out)
    model = Model(ModelConfig(encode.vocab_size))
    if args.start:
        model.load(args.start)
    master = {name: p.detach().clone() for name, p in model.named_parameters()}  # fp32; the model itself runs in bf16
    model.bfloat16()
    matrices = [p for n, p in master.items() if p.dim() == 2 and "embed" not in n]
    rest = [p for n, p in master.items() if p.dim() != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.0, momentum=0.95),
        torch.optim.AdamW(rest, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    base_lrs = [MUON_LR * plan.lr_scale, ADAM_LR * plan.lr_scale]
    rng, gen = random.Random(args.seed), torch.Generator().manual_seed(args.seed)
    seen_tokens, next_pool, pool = 0, int(args.tokens * plan.pool_from_frac), []
    if args.state.exists():
        state = torch.load(args.state, weights_only=False)
        for name, p in model.named_parameters():
            master[name].copy_(state["master"][name])
            p.data.copy_(master[name])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        seen_tokens, next_pool, pool = state["seen_tokens"], state["next_pool"], state["pool"]
        rng.setstate(state["rng"])
        gen.set_state(state["gen"])
        print(f"resumed at {seen_tokens:,} tokens", flush=True)

    stream = chunks(encode, rng, pool, plan)
    started, started_at, step, sums, next_save = time.time(), seen_tokens, 0, [0.0] * 3, seen_tokens + 2_000_000
    while seen_tokens < args.tokens:
        batch = next(stream)
        ids, positions, mask, text, judge = collate(encode, batch)
        frac = seen_tokens / args.tokens
        for optimizer, base in zip(optimizers, base_lrs, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * min(1.0, 50 * frac + 0.02) * (1 - frac)
        hidden = model(ids, positions, mask)
        text_logits = model.logits(hidden[text != -100]).float()
        judge_logits = model.logits(hidden[judge != -100]).float()
        judge_loss = F.cross_entropy(judge_logits, judge[judge != -100])
        loss = JUDGE_WEIGHT * judge_loss
        counted = len(text_logits) > 0
        if counted:
            text_loss = F.cross_entropy(text_logits, text[text != -100], reduction="sum")
            loss = loss + text_loss / TEXT_TOKENS
            sums = [
                sums[0] + float(text_loss.detach()) / len(text_logits),
                sums[1] + float(judge_loss.detach()),
                sums[2] + 1,
            ]
        loss.backward()
        for name, p in model.named_parameters():
            master[name].grad = p.grad.float() if p.grad is not None else None
            p.grad = None
        for optimizer in optimizers:
            optimizer.step()
        for name, p in model.named_parameters():
            p.data.copy_(master[name])
        seen_tokens += sum(map(len, batch))
        step += 1
        if step % 100 == 0:
            rate = (seen_tokens - started_at) / (time.time() - started)
            print(
                f"{seen_tokens:>11,} tokens  text {sums[0] / sums[2]:.4f}  judge {sums[1] / sums[2]:.4f}  {rate:,.0f} tok/s",
                flush=True,
            )
            sums = [0.0] * 3
        if seen_tokens >= next_pool:
            accuracy = refill(pool, model, encode, rng, gen)
            next_pool = seen_tokens + plan.pool_every_tokens
            print(f"{seen_tokens:>11,} tokens  single-sample accuracy {accuracy:.3f}", flush=True)
        if seen_tokens >= next_save:
            next_save = seen_tokens + 2_000_000
            model.save(args.out, encode.eos)
            torch.save(
                {
                    "master": master, "optimizers": [o.state_dict() for o in optimizers],
                    "seen_tokens": seen_tokens, "next_pool": next_pool, "pool": pool,
                    "rng": rng.getstate(), "gen": gen.get_state(),
                },
                args.state,
            )  # fmt: skip
    model.save(args.out, encode.eos)
    print(f"done: {seen_tokens:,} tokens", flush=True)


if __name__ == "__main__":
    main()
