"""The Inception-v3 that FID and KID are defined on: its features come from one file of weights.

The file is `pt_inception-2015-12-05-6726825d.pth` of pytorch-fid, or the same as safetensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import inception_v3

from ..errors import EncoderError, LoRAFileError, shown
from ..storage.safetensors_io import read_file
from ..storage.torch_file import read_torch_file

SIDE, CLASSES = 299, 1008
_BLOCKS = (
    *("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
    *("Mixed_7b", "Mixed_7c"),
)


class InceptionFeatures:
    """Features of the last pooling, 2048 a picture.

    TensorFlow's network of 2015, from which the weights come, differs from torchvision's in its
    pooling branches: padding does not count in a mean, and the last block takes the maximum.

    Args:
        file: of the weights.
        device: where it computes.

    Raises:
        EncoderError: the file is not theirs.
    """

    def __init__(self, file: Path, device: torch.device) -> None:
        tensors = _tensors(file)
        network = fid_network()
        wanted = {n for n in network.state_dict() if not n.endswith("num_batches_tracked")}
        found = {name: tensors[name].float() for name in wanted & tensors.keys()}
        shapes = network.state_dict()
        wrong = [n for n in sorted(wanted) if n not in found or found[n].shape != shapes[n].shape]
        if wrong:
            raise EncoderError(
                f"{shown(str(file), 300)} is not the Inception of FID: {wrong[0]} is missing or of "
                "another shape. Name pt_inception-2015-12-05-6726825d.pth of pytorch-fid."
            )
        network.load_state_dict(found, strict=False)  # but for the counters, all are there
        network.fc = nn.Identity()
        self.network, self.device = network.eval().requires_grad_(False).to(device), device

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        """(N, 2048) of pictures (H, W, 3) in [0, 1]."""
        squares = [
            F.interpolate(p.movedim(-1, 0)[None].float(), size=(SIDE, SIDE), mode="bilinear")
            for p in pictures
        ]
        return self.network((2 * torch.cat(squares) - 1).to(self.device)).cpu()


def fid_network() -> Any:
    """torchvision's Inception-v3 with the pooling branches of TensorFlow's of 2015, untrained."""
    network = inception_v3(
        weights=None, num_classes=CLASSES, aux_logits=False, transform_input=False,
        init_weights=False,
    )  # fmt: skip
    for name in _BLOCKS:
        pool = _largest if name == _BLOCKS[-1] else _mean
        getattr(network, name).register_forward_hook(_with_pool(pool))
    return network


def _with_pool(pool: Callable[[Tensor], Tensor]) -> Callable[[Any, Any, Tensor], Tensor]:
    """A hook that computes a block's pooling branch, its last channels, in another way."""

    def hook(block: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        own = block.branch_pool(pool(inputs[0]))
        return torch.cat([output[:, : -own.shape[1]], own], 1)

    return hook


def _mean(x: Tensor) -> Tensor:
    """Mean of the 3 x 3 neighbours that there are."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _largest(x: Tensor) -> Tensor:
    """Largest of the 3 x 3 neighbours."""
    return F.max_pool2d(x, 3, 1, 1)


def _tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of the file."""
    if file.suffix == ".safetensors":
        return dict(read_file(file, "file of Inception", EncoderError)[0])
    try:
        return read_torch_file(file)
    except LoRAFileError as error:
        raise EncoderError(str(error)) from error
