"""Precision of training: what is computed in half precision, and when a loss must be scaled."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .protocol import BaseModel, compute_dtype

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """torch's autocast for `bf16` and `fp16`, nothing for `no`.

    Nothing either for `bf16` on a processor that has to imitate it, see `imitates_bfloat16`.
    """
    if precision == "no" or (precision == "bf16" and imitates_bfloat16(device)):
        return nullcontext()
    return torch.autocast(device.type, HALF[precision])


def imitates_bfloat16(device: torch.device) -> bool:
    """True for a processor without vector instructions that torch's bfloat16 products need.

    There, which is on most desktop processors, they take some twelve times as long as those in
    float32, so nobody can want them.
    """
    if device.type != "cpu":
        return False
    asked = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return asked is None or not asked()


def needs_loss_scale(precision: str, base: BaseModel | None) -> bool:
    """True when gradients pass through float16, where those below 6e-8 vanish.

    Args:
        precision: of autocast.
        base: the base model that the loss runs through, if there is one; its weights may be in
            float16 whatever autocast does.
    """
    through_base = base is not None and compute_dtype(base) == torch.float16
    return precision == "fp16" or (precision == "no" and through_base)
