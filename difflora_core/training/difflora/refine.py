"""Refinement: a few DreamBooth steps on the reference photos, from a predicted LoRA.

HyperDreamBooth (arXiv:2307.06949, section 4.3) tunes its prediction for 40 steps at a higher rank;
HyperLoRA advises 50. Ours takes 25 steps at the rank of the prediction by default.
"""

from __future__ import annotations

from ...base_model.protocol import BaseModel
from ...lora.weights import LoRAWeights
from ..loop import Progress
from ..lora.dreambooth import DreamBoothConfig, DreamBoothExamples, train_dreambooth

REFINEMENT_STEPS = 25


def refinement_config(rank: int) -> DreamBoothConfig:
    """Settings of a refinement: 25 steps that train `up` alone, falling rate."""
    return DreamBoothConfig(
        rank=rank,
        steps=REFINEMENT_STEPS,
        samples_per_step=8,
        learning_rate=2e-3,
        decay="linear",
        train_down=False,
    )


def refine(
    base: BaseModel,
    weights: LoRAWeights,
    examples: DreamBoothExamples,
    config: DreamBoothConfig | None = None,
    progress: Progress | None = None,
) -> LoRAWeights:
    """Train predicted LoRAs on for a few steps.

    Args:
        base: frozen base model.
        weights: one LoRA, or one for each of the B people of `examples`; `weights.scaled(s)`
            starts from another strength.
        examples: the reference photos; at most a few per person.
        config: settings; a rank above the LoRA's adds components that start at zero, which learn
            only with `train_down`.
        progress: as in `train_dreambooth`.

    Returns:
        Refined weights, batched if `weights` was.

    Raises:
        LayoutError: the LoRA does not fit the base model, or not the number of people.
    """
    config = config or refinement_config(next(iter(weights.layers.values())).rank)
    result = train_dreambooth(base, examples, config, progress, initial=weights)[config.steps]
    return result if weights.batch_shape or len(examples) > 1 else result.batch_item(0)
