"""LoRA adapters without pinned memory, which SGLang's torch_native backend asks for unseen and a machine without an accelerator has not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

# What pins memory on its way: adapters as they are loaded, and who uses which in each batch.
WHO_PINS = (
    "sglang.srt.lora.lora_manager.LoRAManager.__init__",
    "sglang.srt.lora.lora_manager.LoRAManager.load_lora_adapter",
    "sglang.srt.lora.lora_manager.LoRAManager.load_lora_adapter_from_tensors",
    "sglang.srt.lora.backend.torch_backend.TorchNativeLoRABackend.prepare_lora_batch",
)


class Unpinned(TorchFunctionMode):
    """Memory that is asked to be pinned is left as it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.pin_memory:
            return args[0]
        return func(*args, **{key: value for key, value in (kwargs or {}).items() if key != "pin_memory"})


def unpinned(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call one of SGLang's functions."""
    with Unpinned():
        return original(*args, **kwargs)
