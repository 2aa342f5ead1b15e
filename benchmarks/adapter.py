"""A random LoRA adapter of the tiny reasoner, as PEFT writes one."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

# What each layer adapts: features in and out (examples/tiny_reasoner/checkpoint/config.json).
SHAPES = {"self_attn.q_proj": (256, 256), "self_attn.v_proj": (256, 256), "mlp.down_proj": (640, 256)}
NUM_LAYERS, RANK, ALPHA = 4, 4, 32


def make_adapter(folder: Path, seed: int) -> Path:
    """Write one that is large enough to change what the model says; return its folder."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    for layer in range(NUM_LAYERS):
        for module, (num_in, num_out) in SHAPES.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            weights[f"{name}.lora_A.weight"] = torch.randn(RANK, num_in, generator=generator) * num_in**-0.5
            weights[f"{name}.lora_B.weight"] = torch.randn(num_out, RANK, generator=generator) * 0.1
    save_file(weights, folder / "adapter_model.safetensors")
    targets = [module.split(".")[1] for module in SHAPES]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
