"""The tiny reasoner's network: a Llama of 3 million parameters in plain PyTorch, saved as Hugging Face saves one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class ModelConfig:
    vocab_size: int
    hidden_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 64  # the smallest that flashinfer's GPU kernels serve
    intermediate_size: int = 640
    max_positions: int = 1024
    rope_theta: float = 10_000.0


class Layer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        d, h = config.hidden_size, config.head_dim
        self.config = config
        self.input_layernorm = nn.RMSNorm(d, eps=1e-6)
        self.post_attention_layernorm = nn.RMSNorm(d, eps=1e-6)
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(d, config.num_heads * h, bias=False),
                "k_proj": nn.Linear(d, config.num_kv_heads * h, bias=False),
                "v_proj": nn.Linear(d, config.num_kv_heads * h, bias=False),
                "o_proj": nn.Linear(config.num_heads * h, d, bias=False),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(d, config.intermediate_size, bias=False),
                "up_proj": nn.Linear(d, config.intermediate_size, bias=False),
                "down_proj": nn.Linear(config.intermediate_size, d, bias=False),
            }
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: list[Tensor] | None) -> Tensor:
        config, (batch, length, _) = self.config, x.shape
        normed = self.input_layernorm(x)
        attn = self.self_attn
        q = _rotate(attn["q_proj"](normed).view(batch, length, config.num_heads, config.head_dim), cos, sin)
        k = _rotate(attn["k_proj"](normed).view(batch, length, config.num_kv_heads, config.head_dim), cos, sin)
        v = attn["v_proj"](normed).view(batch, length, config.num_kv_heads, config.head_dim)
        if cache is not None:
            k, v = (torch.cat([old, new], 1) for old, new in zip(cache, (k, v), strict=True)) if cache else (k, v)
            cache[:] = [k, v]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        x = x + attn["o_proj"](out.transpose(1, 2).reshape(batch, length, -1))
        normed = self.post_attention_layernorm(x)
        return x + self.mlp["down_proj"](F.silu(self.mlp["gate_proj"](normed)) * self.mlp["up_proj"](normed))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Model(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.num_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, eps=1e-6)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                scale = 0.02 if "embed" in name else p.shape[1] ** -0.5
                nn.init.normal_(
                    p, std=scale / (2 * config.num_layers) ** 0.5 if "o_proj" in name or "down" in name else scale
                )

    def forward(self, ids: Tensor, positions: Tensor, mask: Tensor, caches: list[list[Tensor]] | None = None) -> Tensor:
        """Hidden states [B, T, d] after the last norm; `mask` [B, 1, T, S] is True where attention is allowed."""
        inverse = 1.0 / self.config.rope_theta ** (torch.arange(0, self.config.head_dim, 2) / self.config.head_dim)
        angles = (positions[..., None] * inverse).repeat(1, 1, 2).unsqueeze(2)
        dtype = self.embed_tokens.weight.dtype
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        x = self.embed_tokens(ids)
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, mask, caches[i] if caches is not None else None)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.embed_tokens.weight)

    @torch.inference_mode()
    def sample(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        eos: int,
        generator: torch.Generator,
        temperature: float = 1.0,
    ) -> list[list[int]]:
        """One sample at temperature 1 for each prompt, without the end token; prompts are padded on the left."""
        longest = max(map(len, prompts))
        pad = torch.tensor([longest - len(p) for p in prompts])
        ids = torch.tensor([[eos] * (longest - len(p)) + p for p in prompts])
        outputs: list[list[int]] = [[] for _ in prompts]
        alive = torch.ones(len(prompts), dtype=torch.bool)
        caches: list[list[Tensor]] = [[] for _ in self.layers]
        total = 0
        for _ in range(max_new_tokens):
            length = ids.shape[1]
            at = torch.arange(total, total + length)
            seen = torch.arange(total + length)
            mask = (seen[None, None, :] >= pad[:, None, None]) & (seen[None, None, :] <= at[None, :, None])
            mask |= seen[None, None, :] == at[None, :, None]  # padding rows see themselves, so no row is empty
            hidden = self(ids, (at[None] - pad[:, None]).clamp(min=0), mask[:, None], caches)
            total += length
            ids = torch.multinomial(
                (self.logits(hidden[:, -1]).float() / temperature).softmax(-1), 1, generator=generator
            )
            alive &= ids[:, 0] != eos
            if not alive.any():
                break
            for i in alive.nonzero()[:, 0].tolist():
                outputs[i].append(int(ids[i, 0]))
        return outputs

    def save(self, folder: Path, eos: int) -> None:
        """Write weights (bf16) and config as Hugging Face's LlamaForCausalLM reads them."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {f"model.{k}": v.detach().to(torch.bfloat16).contiguous() for k, v in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        c = self.config
        config = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": c.vocab_size,
            "hidden_size": c.hidden_size, "num_hidden_layers": c.num_layers, "num_attention_heads": c.num_heads,
            "num_key_value_heads": c.num_kv_heads, "head_dim": c.head_dim, "intermediate_size": c.intermediate_size,
            "max_position_embeddings": c.max_positions, "rope_theta": c.rope_theta, "rms_norm_eps": 1e-6,
            "hidden_act": "silu", "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
            "eos_token_id": eos, "bos_token_id": None, "torch_dtype": "float32",
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        # Nothing is cut off by default: the model's own distribution is what the programs sample from.
        generation = {"eos_token_id": eos, "do_sample": True, "temperature": 1.0, "top_p": 1.0}
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")

    def load(self, folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        self.load_state_dict({k.removeprefix("model."): v.float() for k, v in weights.items()})
