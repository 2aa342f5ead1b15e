"""Plain PyTorch on the CPU: no custom kernels, no graphs, no pinned memory."""

from __future__ import annotations

from typing import Any

from sglang.srt.arg_groups import choices
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import SRTPlatform

ATTENTION = "torch_native"


class TorchCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Serves Hugging Face models through SGLang's torch-native paths, for development, tests and demonstrations."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"

    def apply_server_args_defaults(self, server_args: Any) -> None:
        # By now SGLang has filled in intel_amx for any x86 CPU; it needs kernels that the normal install lacks.
        if server_args.attention_backend in (None, "intel_amx"):
            server_args.attention_backend = ATTENTION
        if server_args.dtype == "auto":
            server_args.dtype = "float32"  # what every CPU computes natively
        if server_args.max_total_tokens is None:
            server_args.max_total_tokens = 131_072  # SGLang's default would fill the machine's memory with KV cache
        if server_args.max_running_requests is None:
            server_args.max_running_requests = 64  # a CPU's throughput is flat beyond
        if server_args.sampling_backend is None:
            server_args.sampling_backend = "pytorch"
        if server_args.lora_backend == "csgmv":  # SGLang's default, of kernels for accelerators
            server_args.lora_backend = "torch_native"
        if ATTENTION not in choices.DETERMINISTIC_ATTENTION_BACKEND_CHOICES:
            # One row's attention never depends on the others here, so seeded sampling is reproducible.
            choices.DETERMINISTIC_ATTENTION_BACKEND_CHOICES.append(ATTENTION)
            choices.RADIX_SUPPORTED_DETERMINISTIC_ATTENTION_BACKEND.append(ATTENTION)

    def get_device(self, device_id: int = 0) -> str:  # type: ignore[override]  # SGLang splits it as a string
        return "cpu"

    def get_default_attention_backend(self) -> str:
        return ATTENTION

    def get_dispatch_key_name(self) -> str:
        return "native"
