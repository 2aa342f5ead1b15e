"""Images, video and audio of a program: each Req that the server makes for it has items of its own, and all share the features."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.managers.schedule_batch import MultimodalDataItem, MultimodalInputs

from sglang_dynasor.errors import FieldError
from sglang_dynasor.policy.spec import ProgramSpec

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

INPUTS = ("image_data", "video_data", "audio_data")  # of a request


def check_judge(spec: ProgramSpec, name: str) -> None:
    """Raise FieldError where branches would be judged by who does not see what they are about.

    Args:
        name: the input that a request has, one of INPUTS.
    """
    if spec.judge is not None and spec.judge.is_external:
        raise FieldError(
            f"dynasor.judge='model' with {name}: the reward model reads text only; use judge 'self', another vote, or leave one of the two out"
        )


def check_longer(spec: ProgramSpec, req: Req) -> None:
    """Raise FieldError where a text longer than that of `req` is asked for, and nobody knows what the model sees from there."""
    inputs: Any = req.multimodal_inputs
    if inputs is None or inputs.visible_frame_counts is None:
        return
    wrong = (
        f"algorithm={spec.algorithm!r}"
        if spec.thought is not None
        else "judge='self'"
        if spec.judge is not None
        else None
    )
    if wrong is not None:
        raise FieldError(
            f"dynasor.{wrong} with image_data or video_data on this model, which counts the frames that each token sees: what is "
            "asked after a branch has no such count; use another algorithm or vote, or leave the images out"
        )


def keep(req: Req) -> None:
    """Let what a program's request has to see be there until it ends: in this process, and in the host's memory.

    SGLang reads features of a running request once, and moves them to the host then. Those of a program are read again, by a
    branch that starts late, or that was retracted when the radix cache no longer has the prompt.
    """
    inputs = req.multimodal_inputs
    if inputs is None:
        return
    for item in inputs.mm_items:
        if item.has_cuda_ipc_proxy():  # lent by the front process, to be given back once
            item.reconstruct(torch.cuda.current_device())
        item.feature, item.precomputed_embeddings = _on_host(item.feature), _on_host(item.precomputed_embeddings)


def _on_host(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_on_host(part) for part in value)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    return value.cpu() if isinstance(value, torch.Tensor) else value


def give(req: Req, parent: Req) -> None:
    """Let `req`, whose tokens begin with those of `parent`, see what that sees."""
    if parent.multimodal_inputs is not None:
        req.multimodal_inputs = _own(parent.multimodal_inputs)
        req.inherit_mm_token_counts(parent)
        reach(req)


def reach(req: Req) -> None:
    """Let what `req` sees tell a position of each token that it begins with: SGLang takes those of prompts from a table."""
    inputs, num_tokens = req.multimodal_inputs, len(req.origin_input_ids) + len(req.output_ids)
    if inputs is None:
        return
    table = inputs.mrope_positions
    if table is not None and table.shape[1] < num_tokens:
        # As SGLang counts on while it decodes: what follows is text.
        delta = 0 if inputs.mrope_position_delta is None else int(inputs.mrope_position_delta.flatten()[0])
        places = torch.arange(table.shape[1], num_tokens, dtype=table.dtype, device=table.device)
        inputs.mrope_positions = torch.cat([table, (places + delta).expand(table.shape[0], -1)], dim=1)
    kinds = inputs.token_modalities
    if kinds is not None and len(kinds) < num_tokens:
        inputs.token_modalities = [*kinds, *[0] * (num_tokens - len(kinds))]  # 0: text


def drop(req: Req) -> None:
    """Forget what a program's request had to see: nobody starts or comes back for it any more."""
    if req.multimodal_inputs is not None:
        req.get_mm_token_counts()  # its client is told them
        req.release_mm_inputs_on_abort()


def _own(inputs: MultimodalInputs) -> MultimodalInputs:
    """The same to see. SGLang drops and replaces what it holds as soon as one Req has ended; others must not miss it."""
    return replace(inputs, mm_items=[_own_item(item) for item in inputs.mm_items])


def _own_item(item: MultimodalDataItem) -> MultimodalDataItem:
    own = copy(item)
    own.model_specific_data = dict(item.model_specific_data)  # marks are put there, and taken away
    return own
