"""How much each photo of a person counts (ours).

Every network here averages over photos, or attends to all of them, so a photo that stands there
twice counts twice, exactly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from ..errors import ConfigError, counted
from .features import ImageFeatures

FINEST = 20
"""Times that the heaviest photo is counted at most: weights are rounded to a twentieth of it."""
DECIMAL_COMMA = re.compile(r"\s*\d+,\d+\s*")


def read_weights(text: str) -> tuple[float, ...]:
    """Numbers of a text, divided by commas, semicolons, spaces or new lines; none of an empty one.

    Between semicolons 1,5 is one and a half.

    Raises:
        ConfigError: something is no number from 0 to 1000.
    """
    weights = []
    if ";" in text:
        own = text.split(";")
        text = " ".join(p.replace(",", ".") if DECIMAL_COMMA.fullmatch(p) else p for p in own)
    for part in filter(None, re.split(r"[\s,]+", text.strip())):
        try:
            weights.append(float(part))
        except ValueError:
            weights.append(math.nan)
        if not 0 <= weights[-1] <= 1000:
            raise ConfigError(
                f"The photo weight '{part[:40]}' is no number from 0 to 1000. Write one number a "
                "photo, for example 1, 0.5, 2."
            )
    return tuple(weights)


def weighted(features: ImageFeatures, weights: Sequence[float]) -> ImageFeatures:
    """Features in which each photo counts as much as its weight says; 0 leaves it out.

    Args:
        features: of N photos.
        weights: one each, or none at all for equal ones.

    Raises:
        ConfigError: another number of them, or all are 0.
    """
    if not weights:
        return features
    if len(weights) != len(features):
        raise ConfigError(
            f"There are {len(weights)} photo weights for {counted(len(features), 'photo')}; "
            "write one a photo, with a point for decimals: 1.5."
        )
    if not max(weights) > 0:
        raise ConfigError("Every photo has the weight 0, so nobody is left. Raise one of them.")
    shares = [FINEST * weight / max(weights) for weight in weights]
    counts = [max(round(share), 1) if share > 0 else 0 for share in shares]
    step = math.gcd(*counts)
    rows = [row for row, count in enumerate(counts) for _ in range(count // step)]
    return features.select(rows)
