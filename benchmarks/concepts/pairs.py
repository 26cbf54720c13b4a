"""Two concepts in one picture: what is asked for, what is drawn, how often both are recognised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from difflora_core.demo.world.concepts import DemoConcept
from difflora_core.demo.world.scenes import Scene

from .methods.base import TrainedConcept
from .word_pictures import Columns, ConceptEvaluator, EvaluationPrompt, evaluation_prompts

Pair = tuple[DemoConcept, DemoConcept]


def pair_prompts(
    pairs: Mapping[int, Pair], scenes: Sequence[Scene], seed: int
) -> list[list[EvaluationPrompt]]:
    """The pictures of each pair in the noise of a training seed; its number names the pair."""
    return [evaluation_prompts(pair, scenes, number, seed) for number, pair in pairs.items()]


def pair_columns(
    evaluator: ConceptEvaluator,
    wanted: Sequence[Sequence[Sequence[EvaluationPrompt]]],
    trained: Sequence[Mapping[str, TrainedConcept]],
    setting: float,
) -> Columns:
    """Columns (N,) of all pictures of pairs by one method at a setting.

    Args:
        evaluator: draws and judges.
        wanted: for each training seed, for each pair, its pictures.
        trained: for each training seed word to what was learned.
        setting: of the method.
    """
    parts = [
        evaluator.columns(group, [own[c.word] for c in group[0].concepts], setting)
        for own, groups in zip(trained, wanted, strict=True)
        for group in groups
    ]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def shares_of_both(
    columns: Columns, wanted: Sequence[Sequence[Sequence[EvaluationPrompt]]]
) -> Tensor:
    """Shares (S, P), seeds and pairs, of pictures in which both concepts are recognised."""
    return columns["all_recognised"].unflatten(0, (len(wanted), len(wanted[0]), -1)).mean(2)
