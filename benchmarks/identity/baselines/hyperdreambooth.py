"""HyperDreamBooth's second half: a prediction is tuned on its photo at a higher rank.

"Rank-relaxed fast finetuning" of arXiv:2307.06949, section 4.3: 40 steps from the predicted LoRA.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from difflora_core.training.difflora.refine import refinement_config
from difflora_core.training.lora.dreambooth import DreamBoothConfig

from ..artefacts import Artefacts
from ..people import People
from ..rows import HEADLINE, Row, first_photos, predict, refined, wanted_row

SOURCE = "HyperDreamBooth (arXiv:2307.06949), section 4.3, from our prediction"
STEPS, RELAXED = 40, 2
"""Steps of the paper, and by what the rank grows (ours; the paper goes from 1 to a higher one)."""
NAME = f"{HEADLINE}, HyperDreamBooth's refinement, {STEPS} steps"


def relaxed_config(rank: int, steps: int = STEPS) -> DreamBoothConfig:
    """Settings for predictions of a rank: both factors, twice the rank."""
    config = refinement_config(RELAXED * rank)
    return replace(config, steps=steps, train_down=True, precision="bf16")


def rows(
    artefacts: Artefacts, people: People, steps: int, wanted: Sequence[str] | None
) -> Iterator[Row]:
    """The shipped model's prediction, tuned on its photo at twice the rank, in steps of its own."""
    del steps
    if not wanted_row(NAME, wanted) or "functional" not in artefacts.models:
        return
    pictures = first_photos(people, 1)
    guess = predict(artefacts.models["functional"], artefacts.features(pictures.images))
    config = relaxed_config(artefacts.layout.rank)
    weights = refined(artefacts, people, guess, pictures, config)
    per_step = artefacts.trainer.seconds_alone(pictures, config)
    yield Row(NAME, weights, per_step * config.steps)
