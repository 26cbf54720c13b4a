"""The fingerprint of a pair of text encoders."""

import pytest
import torch

from difflora_core.errors import ConfigError
from difflora_core.text.encoders import check_probe


def test_fingerprints_pass_rounding_and_nothing_else():
    noise = torch.Generator().manual_seed(0)
    own = torch.randn(64, generator=noise)
    check_probe(own, own.half().float(), "It")
    check_probe(own, own + 0.01 * torch.randn(64, generator=noise), "It")
    for other in (-own, torch.randn(64, generator=noise), own[:32], 1.5 * own):
        with pytest.raises(ConfigError, match="other text encoders"):
            check_probe(own, other, "It")
