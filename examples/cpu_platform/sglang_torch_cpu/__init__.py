"""An SGLang platform for machines without an accelerator.

It is a distribution of its own because SGLang drops every plugin of a distribution that ships a platform which was
not selected.
"""

from __future__ import annotations

import os


def activate() -> str | None:
    """The platform's class where nothing else serves this machine, else None."""
    import torch

    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1":
        return None  # SGLang's own CPU engine was asked for
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and accelerator.type != "cpu":
        return None
    return "sglang_torch_cpu.platform.TorchCpuPlatform"


def register() -> None:
    """Let --enable-deterministic-inference serve seeded sampling here, and --enable-lora adapters.

    SGLang's batch-invariant matrix products and its seeded hash are kernels for accelerators. The first is left out:
    PyTorch's products may round differently in batches of different size, so a seed reproduces samples up to rounding.
    The second is written in PyTorch (`seeded.py`). LoRA adapters are served without pinned memory (`unpinned.py`).
    """
    if activate() is None:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sglang_torch_cpu.seeded import multinomial_with_seed
    from sglang_torch_cpu.unpinned import WHO_PINS, unpinned

    HookRegistry.register(
        "sglang.srt.model_executor.model_runner.ModelRunner.maybe_enable_batch_invariant_mode",
        lambda original, runner: None,
        HookType.AROUND,
    )
    HookRegistry.register(
        "sglang.srt.layers.sampler.multinomial_with_seed",
        lambda original, *args: multinomial_with_seed(*args),
        HookType.AROUND,
    )
    for target in WHO_PINS:
        HookRegistry.register(target, unpinned, HookType.AROUND)
