"""Seeded sampling in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """murmur3's 32-bit finaliser on int64 that holds 32 bits."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


def multinomial_with_seed(logprobs: Tensor, seed: Tensor, positions: Tensor) -> Tensor:
    """One sample per row by the Gumbel trick; a row's noise depends on its seed, its position and the column only.

    Args:
        logprobs: [B, V] log-probabilities, -inf where impossible.
        seed: [B] integers.
        positions: [B] the tokens' positions in their sequences.

    Returns:
        [B, 1] int64.
    """
    seed, positions = seed.to(torch.int64), positions.to(torch.int64)
    row = _mix((_mix(seed & _MASK) + 0x9E3779B9 * _mix((seed >> 32) & _MASK)) & _MASK)
    row = _mix((row + 0x85EBCA77 * positions) & _MASK)
    columns = _mix(torch.arange(logprobs.shape[1]))
    uniform = (_mix((row[:, None] + columns * 0x9E3779B1) & _MASK).to(torch.float64) + 0.5) / 2**32
    return (logprobs.to(torch.float64) - (-uniform.log()).log()).argmax(-1, keepdim=True)
