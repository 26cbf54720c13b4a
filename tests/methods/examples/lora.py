"""What LoRA could have trained on the small network."""

import torch

from difflora_core.lora.weights import LoRALayer, LoRAWeights
from difflora_core.methods.base import PreparedAdaptation
from difflora_core.methods.lora import lora_adaptation


def example(prepared, encodings):
    """One layer of rank two, and any encodings."""
    g = torch.Generator().manual_seed(3)
    layer = LoRALayer(
        torch.randn(2, 6, generator=g, dtype=torch.float64),
        torch.randn(4, 2, generator=g, dtype=torch.float64),
        1.0,
    )
    weights = LoRAWeights({"middle_block.attn2.to_v": layer})
    return PreparedAdaptation(lora_adaptation(weights, "tiny")), encodings()
