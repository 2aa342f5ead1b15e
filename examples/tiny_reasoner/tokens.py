"""The tiny reasoner's tokenizer: a byte-level BPE in which each of 0..99 is one token."""

from __future__ import annotations

import random
import re
from functools import lru_cache
from pathlib import Path

from questions import MAX_STEPS, draw_split, prompt
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END, JUDGE, THINK, THINK_END = "<|end|>", "<judge>", "<think>", "</think>"
GOOD, BAD = " good", " bad"
VOCAB_SIZE = 768

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}Q: {{ m['content'] }}\nA:\n{% elif m['role'] == 'assistant' %}"
    "{{ m['content'] }}<|end|>{% endif %}{% endfor %}{% if enable_thinking is defined and enable_thinking %}<think>\n{% endif %}"
)
_PIECE = re.compile(r"<judge>|</?think>|<\|end\|>| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")


def build(folder: Path) -> None:
    """Train the tokenizer on training questions and save it as Hugging Face reads it."""
    rng = random.Random(0)
    corpus = [" " + str(n) for n in range(100) for _ in range(1000)]
    corpus += [f" good bad wait so {THINK}"] * 1000
    for _ in range(4000):
        question = draw_split(rng, rng.randint(1, MAX_STEPS), held_out=False)
        corpus.append(prompt(question.text) + "".join(question.lines) + f"#### {question.answer}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken(END, special=True)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 3, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in (JUDGE, THINK, THINK_END)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


class Encoder:
    """Text to ids, piece by piece with a cache; equal to the tokenizer's own answer on the text of this task."""

    def __init__(self, folder: Path):
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.vocab_size = self.tokenizer.get_vocab_size()
        self.eos, self.judge, self.good, self.bad = map(self.one, (END, JUDGE, GOOD, BAD))
        self._piece = lru_cache(maxsize=4096)(lambda piece: tuple(self.tokenizer.encode(piece).ids))

    def one(self, text: str) -> int:
        ids = self.tokenizer.encode(text).ids
        if len(ids) != 1:
            raise ValueError(f"{text!r} is {len(ids)} tokens; it must be one")
        return ids[0]

    def __call__(self, text: str) -> list[int]:
        return [i for piece in _PIECE.findall(text) for i in self._piece(piece)]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)
