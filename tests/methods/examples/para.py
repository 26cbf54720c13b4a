"""What PaRa could have trained on the small network."""

import torch

from difflora_core.adapters.para import orthonormal
from difflora_core.methods.base import PreparedAdaptation, TrainedAdaptation
from difflora_core.methods.para import PaRaConfig


def example(prepared, encodings):
    """One direction of the four outputs of both value projections, and any encodings."""
    g = torch.Generator().manual_seed(4)
    layers = {
        f"{block}.attn2.to_v": {
            "directions": orthonormal(torch.randn(4, 1, generator=g, dtype=torch.float64)),
            "width": torch.tensor([6.0]),
        }
        for block in ("input_blocks.1", "middle_block")
    }
    made = TrainedAdaptation("para", "tiny", PaRaConfig(bound=0.25), {}, layers)
    return PreparedAdaptation(made), encodings()
