"""HyperDreamBooth's second half: a prediction is tuned on its photo at a higher rank.

"Rank-relaxed fast finetuning" of arXiv:2307.06949, section 4.3: 40 steps from the predicted LoRA.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from difflora_core.base_model.protocol import BaseModel
from difflora_core.lora.weights import LoRAWeights
from difflora_core.training.difflora.refine import refine, refinement_config
from difflora_core.training.lora.dreambooth import DreamBoothConfig, DreamBoothExamples

from ..artefacts import Artefacts
from ..drawing import groups, select
from ..dreambooth import GROUP, concatenate
from ..people import People, RealPictures
from ..rows import HEADLINE, Row, first_photos, predict, wanted_row

SOURCE = "HyperDreamBooth (arXiv:2307.06949), section 4.3, from our prediction"
STEPS, RELAXED = 40, 2
"""Steps of the paper, and by what the rank grows (ours; the paper goes from 1 to a higher one)."""
NAME = f"{HEADLINE}, HyperDreamBooth's refinement, {STEPS} steps"


def relaxed_config(rank: int, steps: int = STEPS) -> DreamBoothConfig:
    """Settings for predictions of a rank: both factors, twice the rank."""
    config = refinement_config(RELAXED * rank)
    return replace(config, steps=steps, train_down=True, precision="bf16")


def relaxed(
    base: BaseModel, guess: LoRAWeights, examples: DreamBoothExamples, config: DreamBoothConfig
) -> LoRAWeights:
    """Predictions (I) after tuning on the photos of their people."""
    return refine(base, guess, examples, config)


def rows(
    artefacts: Artefacts, people: People, steps: int, wanted: Sequence[str] | None
) -> Iterator[Row]:
    """The shipped model's prediction, tuned on its photo at twice the rank, in steps of its own."""
    del steps
    if not wanted_row(NAME, wanted) or "functional" not in artefacts.models:
        return
    pictures, parts = first_photos(people, 1), []
    guess = predict(artefacts.models["functional"], artefacts.features(pictures.images))
    config = relaxed_config(artefacts.layout.rank)
    for group in groups(len(people), GROUP):
        chosen = RealPictures(pictures.images[group], [pictures.captions[k] for k in group])
        examples = artefacts.trainer.examples(chosen, [people.seeds[k] for k in group])
        parts.append(relaxed(artefacts.base, select(guess, group), examples, config))
    per_step = artefacts.trainer.seconds_alone(pictures, config)
    yield Row(NAME, concatenate(parts), per_step * config.steps)
