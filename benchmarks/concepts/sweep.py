"""A method of new words along its own setting: the pictures' judged columns, and the two goals."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
from rich.console import Console
from torch import Tensor

from difflora_core.demo import paths
from difflora_core.demo.networks.base import load_base
from difflora_core.demo.networks.concept_judge import load_concept_judge
from difflora_core.demo.networks.concept_text import demo_concept_text
from difflora_core.demo.networks.judges import Judges, load_judge
from difflora_core.text.captions import captions
from difflora_core.text.covariance import build_covariance

from ..command import CACHE
from ..prompts import CONTEXT, EXPRESSION, LOOK
from .methods.base import ComparedMethod, ConceptModels, TrainedConcept
from .word_pictures import Columns, ConceptEvaluator, EvaluationPrompt
from .words import ConceptTrainer

SCENES = CONTEXT + EXPRESSION + LOOK
GOALS = ("concept_similarity", "prompt_agreement")
CAPTIONS = 10_000


def demo_evaluator(console: Console) -> ConceptEvaluator:
    """The demo world's models and judges."""
    text = demo_concept_text(paths.BASE)
    covariance = build_covariance(text, captions(CAPTIONS, "demo"))
    base_hash = hashlib.sha256(paths.BASE.read_bytes()).hexdigest()
    base, folder = load_base(paths.BASE), CACHE / "words"
    models = ConceptModels(base, text, covariance)
    trainer = ConceptTrainer(models, base_hash, folder, console.print)
    judge = load_concept_judge(paths.CONCEPT_JUDGE)
    prompts = Judges({"attributes": load_judge(paths.PROMPT_JUDGE)})
    return ConceptEvaluator(trainer, prompts, judge, CACHE / "word_trials")


def sweep(
    evaluator: ConceptEvaluator,
    method: ComparedMethod,
    trained: Mapping[str, TrainedConcept],
    wanted: Mapping[str, Sequence[EvaluationPrompt]],
) -> list[Columns]:
    """For each setting of a method the mean columns (C,) of its concepts' pictures.

    Args:
        evaluator: draws and judges.
        method: its settings are taken.
        trained: word to what the method learned.
        wanted: word to the pictures.
    """
    table = []
    for setting in method.settings:
        each = [evaluator.columns(wanted[w], [own], setting) for w, own in trained.items()]
        names = [name for name in each[0] if name != "all_recognised"]
        table.append({n: torch.stack([columns[n].mean() for columns in each]) for n in names})
    return table


def leak(
    evaluator: ConceptEvaluator,
    method: ComparedMethod,
    trained: Mapping[str, TrainedConcept],
    wanted: Mapping[str, Sequence[EvaluationPrompt]],
) -> Tensor:
    """Likeness (C,) to each concept in pictures of the plain word of its kind.

    Drawn on the taught model, at the method's usual setting; for arguments see `sweep`.
    """
    plain = [
        evaluator.columns(wanted[w], [own], method.usual, plain=True) for w, own in trained.items()
    ]
    return torch.stack([columns["concept_similarity"].mean() for columns in plain])


def goals(table: Sequence[Columns]) -> Tensor:
    """The two goals of a sweep: (settings, concepts, 2)."""
    return torch.stack([torch.stack([columns[n] for n in GOALS], 1) for columns in table])


def means(columns: Columns) -> dict[str, float]:
    """Means over pictures."""
    shown = {name: values for name, values in columns.items() if name != "all_recognised"}
    return {name: float(values.mean()) for name, values in shown.items()}
