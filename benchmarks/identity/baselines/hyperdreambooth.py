"""HyperDreamBooth's second half: a prediction is tuned on its photo at a higher rank.

"Rank-relaxed fast finetuning" of arXiv:2307.06949, section 4.3: 40 steps from the predicted LoRA.
"""

from __future__ import annotations

from dataclasses import replace

from difflora_core.base_model.protocol import BaseModel
from difflora_core.lora.weights import LoRAWeights
from difflora_core.training.difflora.refine import refine, refinement_config
from difflora_core.training.lora.dreambooth import DreamBoothConfig, DreamBoothExamples

SOURCE = "HyperDreamBooth (arXiv:2307.06949), section 4.3, from our prediction"
STEPS, RELAXED = 40, 2
"""Steps of the paper, and by what the rank grows (ours; the paper goes from 1 to a higher one)."""


def relaxed_config(rank: int, steps: int = STEPS) -> DreamBoothConfig:
    """Settings for predictions of a rank: both factors, twice the rank."""
    config = refinement_config(RELAXED * rank)
    return replace(config, steps=steps, train_down=True, precision="bf16")


def relaxed(
    base: BaseModel, guess: LoRAWeights, examples: DreamBoothExamples, config: DreamBoothConfig
) -> LoRAWeights:
    """Predictions (I) after tuning on the photos of their people."""
    return refine(base, guess, examples, config)
