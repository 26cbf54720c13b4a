"""C, the uncentred second moment of text encodings, and the inner product of its inverse.

Perfusion (arXiv 2305.01644, section 4) compares encodings by e' C^-1 f: directions that ordinary
language uses a lot count little. C belongs to a pair of text encoders, not to a concept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..errors import ConfigError
from .encoders import TextEncoders, text_probe

RIDGE = 1e-3  # share of the mean variance; perfusion.md 6 names 1e-4 to 1e-2
BATCH = 64  # captions encoded at a time
MAX_CONDITION = 1e10  # beyond it float64 leaves fewer than six digits of C^-1


class SecondMoment:
    """Running C = E[e e'] of encodings, in float64.

    Args:
        dim: width of an encoding.
    """

    def __init__(self, dim: int) -> None:
        self.total = torch.zeros(dim, dim, dtype=torch.float64)
        self.count = 0

    def add(self, encodings: Tensor) -> None:
        """Take in encodings (n, dim), one row per real token.

        Raises:
            ConfigError: another width, or values that are not finite.
        """
        rows = encodings.detach().to("cpu", torch.float64)
        if rows.ndim != 2 or rows.shape[1] != len(self.total):
            raise ConfigError(
                f"Text encodings must be (tokens, {len(self.total)}), got {tuple(rows.shape)}."
            )
        if not bool(torch.isfinite(rows).all()):
            raise ConfigError("The text encoders gave values that are not finite numbers.")
        self.total += rows.mT @ rows
        self.count += len(rows)

    def matrix(self) -> Tensor:
        """C (dim, dim) so far, divided by the number of tokens.

        Raises:
            ConfigError: nothing was added.
        """
        if self.count == 0:
            raise ConfigError("The covariance needs at least one caption with a word in it.")
        return self.total / self.count


@dataclass(frozen=True, eq=False)
class Covariance:
    """C with its ridge, ready for products with the inverse.

    Args:
        matrix: (d, d) symmetric, not yet regularised.
        tokens: number of encodings behind it.
        ridge: lambda; C + lambda * tr(C) / d * I is what gets inverted (ours).
        probe: (P,) fingerprint of the text encoders, see `new_words.text_probe`.

    Raises:
        ConfigError: not square, not symmetric, not finite, or it cannot be inverted.
    """

    matrix: Tensor
    tokens: int
    ridge: float = RIDGE
    probe: Tensor | None = None

    def __post_init__(self) -> None:
        matrix = self.matrix
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
            raise ConfigError(f"A covariance is square, got {tuple(matrix.shape)}.")
        if not bool(torch.isfinite(matrix).all()):
            raise ConfigError("The covariance holds values that are not finite; build it again.")
        fine = matrix.double()
        if not torch.allclose(fine, fine.mT, rtol=1e-4, atol=1e-6 * float(fine.abs().max())):
            raise ConfigError("The covariance is not symmetric; the file was altered.")
        if not 0 <= self.ridge <= 1:
            raise ConfigError(f"The ridge must lie in 0 to 1, got {self.ridge}.")
        if not self.condition_number <= MAX_CONDITION:
            raise ConfigError(
                f"The covariance cannot be inverted (condition number "
                f"{self.condition_number:.1e}): use more captions, or a larger ridge than "
                f"{self.ridge:g}."
            )

    @property
    def dim(self) -> int:
        """Width of an encoding."""
        return len(self.matrix)

    @cached_property
    def regularised(self) -> Tensor:
        """C + lambda * tr(C) / d * I (d, d) float64."""
        fine = self.matrix.double()
        fine = (fine + fine.mT) / 2
        eye = torch.eye(self.dim, dtype=torch.float64, device=fine.device)
        return fine + self.ridge * fine.diagonal().mean() * eye

    @cached_property
    def condition_number(self) -> float:
        """Largest over smallest eigenvalue after the ridge; infinite when one is not positive."""
        values = torch.linalg.eigvalsh(self.regularised)
        low, high = float(values[0]), float(values[-1])
        return high / low if low > 0 else float("inf")

    @cached_property
    def _factor(self) -> Tensor:
        """Lower Cholesky factor of the regularised C."""
        return torch.linalg.cholesky(self.regularised)

    @cached_property
    def inverse(self) -> Tensor:
        """C^-1 (d, d) float64."""
        return torch.cholesky_inverse(self._factor)

    def solve(self, rows: Tensor) -> Tensor:
        """C^-1 e for rows e (..., d); float64, gradients flow."""
        fine = rows.double()
        return fine @ self.inverse.to(fine.device)

    def covector(self, direction: Tensor) -> Tensor:
        """C^-1 i / (i' C^-1 i): its product with e is the similarity a of e to i.

        Section 4 of arXiv 2305.01644 (energy and similarity).

        Args:
            direction: i* (d,), not zero.

        Returns:
            (d,) float64; its product with `direction` is 1.
        """
        return normalised(self.solve(direction), direction.double())


def normalised(dual: Tensor, direction: Tensor) -> Tensor:
    """The covector along C^-1 i whose product with i is 1 (arXiv 2305.01644, section 4).

    Args:
        dual: any multiple of C^-1 i (..., d).
        direction: i (..., d), not zero, of the same type.

    Returns:
        (..., d); gradients flow into both.
    """
    return dual / (dual * direction).sum(-1, keepdim=True)


def build_covariance(
    text: TextEncoders,
    captions: Sequence[str],
    ridge: float = RIDGE,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
) -> Covariance:
    """Uncentred second moment of the encodings of all real tokens (perfusion.md 6).

    Start, end and padding do not count; the sum is divided by the number of tokens.

    Args:
        text: the frozen text encoders.
        captions: any texts; thousands give a C that can be inverted.
        ridge: see `Covariance`.
        progress: called as (captions done, captions, metrics); it may raise to stop.

    Raises:
        ConfigError: no captions, or C cannot be inverted.
    """
    probe = text_probe(text)
    moment: SecondMoment | None = None
    for start in range(0, len(captions), BATCH):
        encoded = text.encode(captions[start : start + BATCH], {}, padded=False)
        real = encoded.real.to(encoded.context.device)
        moment = moment or SecondMoment(encoded.context.shape[-1])
        moment.add(encoded.context[real])
        if progress is not None:
            done = min(start + BATCH, len(captions))
            progress(done, len(captions), {"tokens": float(moment.count)})
    moment = moment or SecondMoment(1)
    return Covariance(moment.matrix(), moment.count, ridge, probe)
