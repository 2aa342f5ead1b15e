"""The tiny reasoner with eyes: a Qwen2-VL whose text half is the reasoner, and whose vision tower is tiny and random."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from engines import CHECKPOINT
from PIL import Image
from safetensors.torch import load_file, save_file

MARKS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"  # in a prompt, where an image stands
PATCH, MERGE, FRAMES = (
    14,
    2,
    2,
)  # of the image processor: pixels of a patch's side, patches of a token's side, frames of a patch
WIDTH = 32  # of the tower
LOUDNESS = 3.0  # of what it sees beside an embedding: an image changes what the model says, and not that it reasons


def picture(seed: int, width: int = 112, height: int = 84) -> Image.Image:
    """Noise; of the default size twelve tokens."""
    return Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(3 * width * height))


def make_vision_model(folder: Path) -> Path:
    """Write the model as Hugging Face has it; return its folder."""
    folder.mkdir(parents=True)
    config: dict[str, Any] = json.loads((CHECKPOINT / "config.json").read_text())
    marks = {mark: config["vocab_size"] + i for i, mark in enumerate(MARKS)}
    _write_weights(folder, config, len(marks))
    _write_tokenizer(folder, marks)
    tower = {
        "model_type": "qwen2_vl", "depth": 1, "embed_dim": WIDTH, "num_heads": 2, "mlp_ratio": 2, "hidden_size": config["hidden_size"],
        "patch_size": PATCH, "spatial_merge_size": MERGE, "temporal_patch_size": FRAMES, "in_channels": 3, "in_chans": 3,
    }  # fmt: skip
    del config["head_dim"]
    config |= {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "vocab_size": config["vocab_size"] + len(marks),
        "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
        "vision_config": tower,
        **{f"{name}_token_id": marks[mark] for name, mark in zip(("vision_start", "vision_end", "image", "video"), MARKS, strict=True)},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor", "patch_size": PATCH, "merge_size": MERGE,
        "temporal_patch_size": FRAMES, "min_pixels": 28 * 28, "max_pixels": 64 * 28 * 28,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def _write_weights(folder: Path, config: dict[str, Any], num_marks: int) -> None:
    weights = load_file(CHECKPOINT / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = torch.cat([embedding, embedding.new_zeros(num_marks, embedding.shape[1])])
    for layer in range(config["num_hidden_layers"]):
        for part in "qkv":  # which Qwen has and Llama has not
            name = f"model.layers.{layer}.self_attn.{part}_proj"
            weights[f"{name}.bias"] = embedding.new_zeros(weights[f"{name}.weight"].shape[0])
    generator = torch.Generator().manual_seed(0)
    hidden, merged = config["hidden_size"], WIDTH * MERGE**2
    shapes = {
        "blocks.0.attn.qkv": (3 * WIDTH, WIDTH), "blocks.0.attn.proj": (WIDTH, WIDTH), "blocks.0.mlp.fc1": (2 * WIDTH, WIDTH),
        "blocks.0.mlp.fc2": (WIDTH, 2 * WIDTH), "merger.mlp.0": (merged, merged), "merger.mlp.2": (hidden, merged),
    }  # fmt: skip
    tower = {"patch_embed.proj.weight": torch.randn(WIDTH, 3, FRAMES, PATCH, PATCH, generator=generator) * 0.05}
    for name, (num_out, num_in) in shapes.items():
        tower[f"{name}.weight"] = torch.randn(num_out, num_in, generator=generator) * num_in**-0.5
        tower[f"{name}.bias"] = torch.zeros(num_out)
    tower["merger.mlp.2.weight"] *= LOUDNESS * embedding.float().std()
    for name in ("blocks.0.norm1", "blocks.0.norm2", "merger.ln_q"):
        tower |= {f"{name}.weight": torch.ones(WIDTH), f"{name}.bias": torch.zeros(WIDTH)}
    save_file(weights | {f"visual.{name}": weight for name, weight in tower.items()}, folder / "model.safetensors")


def _write_tokenizer(folder: Path, marks: dict[str, int]) -> None:
    tokenizer = json.loads((CHECKPOINT / "tokenizer.json").read_text())
    like = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer["added_tokens"] += [{"id": token, "content": mark, **like} for mark, token in marks.items()]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(CHECKPOINT / name, folder)
