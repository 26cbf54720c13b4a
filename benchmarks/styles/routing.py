"""What the routers of a style tell apart: how far, and whether by the look that a prompt names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def routing_columns(weights: Sequence[Tensor], looks: Sequence[str]) -> dict[str, float]:
    """Means over layers of what their routers say of the same pictures.

    Args:
        weights: (P, n) of each layer; layers with one style count for nothing.
        looks: of the pictures.

    Returns:
        `routed_apart`: distance (total variation) of a picture's mixture to the mean mixture, from
        0 where all get the same to 1 - 1 / n; `routed_by_look`: share of the variance of mixtures
        that lies between looks, of P pictures without any order (looks - 1) / (P - 1). Empty where
        no layer chooses.
    """
    groups = torch.tensor([sorted(set(looks)).index(look) for look in looks])
    apart, by_look = [], []
    for layer in (w.double() for w in weights if w.shape[1] > 1):
        centred = layer - layer.mean(0)
        apart.append(centred.abs().sum(1).mean() / 2)
        members = torch.nn.functional.one_hot(groups).double()  # P looks
        between = members.mT @ centred / members.sum(0)[:, None].sqrt()
        whole = centred.square().sum()
        by_look.append(between.square().sum() / whole if whole > 0 else whole)
    if not apart:
        return {}
    named = {"routed_apart": apart, "routed_by_look": by_look}
    return {name: float(torch.stack(values).mean()) for name, values in named.items()}
