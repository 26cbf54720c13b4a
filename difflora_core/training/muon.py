"""Muon: momentum whose direction is made orthogonal, for the weights of linear layers.

Keller Jordan and others, "Muon: An optimizer for hidden layers in neural networks", 2024. What
`torch.optim.Muon` does, in every version of torch, and in float32 on a processor that has to
imitate bfloat16: there torch's own takes some twelve times as long, which is most of a training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..base_model.precision import imitates_bfloat16

POLYNOMIAL = (3.4445, -4.775, 2.0315)
"""Coefficients of x, x^3 and x^5: the steepest at zero among those that stay near 1."""
ITERATIONS = 5
EPSILON = 1e-7


class Muon(torch.optim.Optimizer):
    """W <- (1 - lr decay) W - lr sqrt(max(1, rows / columns)) orthogonal(Nesterov momentum).

    Args:
        params: matrices.
        lr: learning rate.
        weight_decay: share of a weight, times the rate, that each step takes away.
        momentum: share of the momentum that a step keeps.

    Raises:
        ValueError: a parameter is no matrix.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, defaults)
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.ndim != 2:
                    raise ValueError(f"Muon trains matrices; one has the shape {[*weight.shape]}.")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step with the gradients that are there; `closure` is not used."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._move(weight, weight.grad, group)

    def _move(self, weight: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum, rate = state["momentum_buffer"], group["lr"]
        momentum.lerp_(gradient, 1 - group["momentum"])
        ahead = gradient.lerp(momentum, group["momentum"])
        slow = imitates_bfloat16(weight.device)
        change = orthogonal(ahead, torch.float32 if slow else torch.bfloat16)
        rows, columns = weight.shape
        weight.mul_(1 - rate * group["weight_decay"])
        weight.add_(change, alpha=-rate * max(1.0, rows / columns) ** 0.5)


def orthogonal(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Nearly U V^T of a matrix U S V^T, by Newton-Schulz iterations of fifth order.

    Singular values that are not tiny come to lie between about 0.7 and 1.2.

    Args:
        matrix: (m, n).
        dtype: of the products, and of the result (m, n).
    """
    linear, cubic, quintic = POLYNOMIAL
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.to(dtype)
    x = x.T if tall else x
    x = x / x.norm().clamp(min=EPSILON)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=cubic, alpha=quintic), x, beta=linear)
    return x.T if tall else x
