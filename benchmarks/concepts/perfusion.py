"""`make bench name=perfusion args='--quick --json FILE'`: words by Perfusion and by others.

Sixteen concepts, three training seeds, 20 prompts; every method learns from the same four pictures,
masks, steps, batches and seeds, and draws from the same noise, another one for each training seed.
That takes hours, so `--concepts` and `--seeds` choose some of them; what was trained and judged is
kept on disk. Likeness against prompt agreement along each method's own setting: the gate's bias for
Perfusion, the strength for the others; and at the setting that artists start from the leak,
likeness to the concept in pictures of the plain word of its kind. Then two concepts in one picture.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from rich.console import Console
from torch import Tensor

from difflora_core.config import Config
from difflora_core.demo.world.concepts import CONCEPTS, DemoConcept, render_items
from difflora_core.demo.world.identities import split_seeds
from difflora_core.demo.world.scenes import Scene
from difflora_core.evaluation.pareto import hypervolume, shortfall
from difflora_core.evaluation.report import Report, crossed_interval, crossed_means

from ..command import (
    benchmark_console,
    command_parser,
    commit,
    machine,
    set_threads,
    write_report,
)
from ..prompts import with_plain_things
from .methods import DREAMBOOTH, METHODS
from .methods.base import TrainedConcept, TrainingSettings
from .methods.perfusion import METHOD as PERFUSION
from .pairs import pair_columns, pair_prompts, shares_of_both
from .sweep import SCENES, demo_evaluator, goals, leak, means, sweep
from .word_pictures import (
    GUIDANCE,
    STEPS,
    ConceptEvaluator,
    EvaluationPrompt,
    evaluation_prompts,
)
from .words import PHOTOS

PAIRS = (
    *((0, 4), (0, 2), (1, 5), (4, 3), (6, 7), (1, 7), (6, 5), (7, 2)),
    *((8, 10), (10, 9), (12, 13), (13, 11), (14, 15), (12, 15), (14, 9), (8, 11)),
)
"""Concepts that stand together in one picture."""
BOTH, BOTH_LORA = "two_concepts_both", "two_concepts_both_lora"
BASE, BASE_TWO = "base, plain words", "two: base, plain words"
REAL, REAL_VAE = "real pictures", "real pictures, through the VAE"


@dataclass(frozen=True)
class Size(Config):
    """How much is measured: numbers of `concepts`, training `seeds`, `scenes`, `pairs` of concepts
    in the first `pair_scenes`, and what all trainings share."""

    concepts: tuple[int, ...] = tuple(range(len(CONCEPTS)))
    scenes: tuple[Scene, ...] = SCENES
    pairs: tuple[tuple[int, int], ...] = PAIRS
    pair_scenes: int = 10
    training: TrainingSettings = field(default_factory=TrainingSettings)
    seeds: tuple[int, ...] = (0, 1, 2)

    def wanted(self, concept: DemoConcept, seed: int = 0) -> list[EvaluationPrompt]:
        """Every prompt with one concept, in the noise that belongs to a training seed.

        Half of them name another thing too.
        """
        scenes = with_plain_things(self.scenes, concept.kind)
        return evaluation_prompts([concept], scenes, CONCEPTS.index(concept), seed)

    def some(self, concepts: Sequence[int] | None, seeds: Sequence[int] | None) -> Size:
        """A part of it: these concepts, with the pairs among them, and these seeds."""
        chosen = self.concepts if concepts is None else tuple(concepts)
        pairs = tuple(pair for pair in self.pairs if set(pair) <= set(chosen))
        return replace(
            self, concepts=chosen, pairs=pairs, seeds=self.seeds if seeds is None else tuple(seeds)
        )


QUICK = Size((0, 4), SCENES[:6], ((0, 4),), 4, TrainingSettings(steps=200), (0,))


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = command_parser("New words by Perfusion and by others.", threads=1)
    parser.add_argument("--quick", action="store_true", help="2 concepts, 6 prompts, 200 steps")
    numbers = range(len(CONCEPTS))
    parser.add_argument("--concepts", type=int, nargs="+", choices=numbers, help="these concepts")
    parser.add_argument("--seeds", type=int, nargs="+", help="these training seeds")
    options = parser.parse_args(arguments)
    set_threads(options.threads)
    console, started = benchmark_console(), time.perf_counter()
    size = (QUICK if options.quick else Size()).some(options.concepts, options.seeds)
    report = measure(demo_evaluator(console), size)
    minutes = (time.perf_counter() - started) / 60
    facts = {"quick": options.quick, "minutes": minutes, "machine": machine(), "commit": commit()}
    report = Report(report.rows, {**report.facts, **facts})
    print_results(report, console)
    write_report(report, options.json, console)
    return 0


def measure(evaluator: ConceptEvaluator, size: Size) -> Report:
    """All rows and conclusions."""
    chosen = [CONCEPTS[k] for k in size.concepts]
    wanted = [{c.word: size.wanted(c, seed) for c in chosen} for seed in size.seeds]
    rows = ceilings(evaluator, [w for asked in wanted for group in asked.values() for w in group])
    trained = {
        name: [
            evaluator.trainer.train_each(chosen, method, replace(size.training, seed=seed))
            for seed in size.seeds
        ]
        for name, method in METHODS.items()
    }
    sweeps: dict[str, Tensor] = {}
    leaks = {"base": rows[BASE]["concept_similarity"]}
    rows[BASE]["leak"] = leaks["base"]
    for name, method in METHODS.items():
        pairs = list(zip(trained[name], wanted, strict=True))
        tables = [sweep(evaluator, method, own, asked) for own, asked in pairs]
        every = [one for own in trained[name] for one in own.values()]
        for place, setting in enumerate(method.settings):
            rows[method.label(setting)] = {
                **_mean_over_seeds([table[place] for table in tables]),
                **costs(evaluator, every, setting),
            }
        sweeps[name] = torch.stack([goals(table) for table in tables])
        leaked = torch.stack([leak(evaluator, method, own, asked) for own, asked in pairs])
        leaks[name] = float(leaked.mean())
        rows[method.label(method.usual)]["leak"] = leaks[name]
    together, both = two_concepts(evaluator, trained, size)
    reference = torch.tensor([rows[BASE]["concept_similarity"], 0.0]).double()
    facts = {
        **conclusions(sweeps, reference),
        **both,
        "leak": leaks,
        "protocol": {
            "concepts": len(chosen),
            "seeds": len(size.seeds),
            "prompts": len(size.scenes),
            "pictures_to_learn_from": PHOTOS,
            "steps": size.training.steps,
            "batch": size.training.batch,
            "sampling_steps": STEPS,
            "guidance": GUIDANCE,
        },
    }
    return Report({**rows, **together}, facts)


def _mean_over_seeds(tables: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    """Means over seeds and concepts of columns (C,)."""
    return {name: float(torch.stack([t[name] for t in tables]).mean()) for name in tables[0]}


def costs(
    evaluator: ConceptEvaluator, trained: Sequence[TrainedConcept], setting: float
) -> dict[str, float]:
    """Seconds to train, size of a file, and what a UNet step costs over the base."""
    return {
        "seconds": sum(t.seconds for t in trained) / len(trained),
        "file_kb": sum(t.size for t in trained) / len(trained) / 1024,
        "step_ms": evaluator.step_milliseconds(trained[:1], setting),
    }


def ceilings(
    evaluator: ConceptEvaluator, wanted: Sequence[EvaluationPrompt]
) -> dict[str, dict[str, float]]:
    """Real pictures of the prompted scenes, which prove the judge, and the base model alone."""
    images, base = real_pictures(wanted), evaluator.models.base
    shown = {
        REAL: images,
        REAL_VAE: base.decode_latents(base.encode_images(images)),
        BASE: evaluator.draw(wanted),
    }
    return {name: means(evaluator.judged(pictures, wanted)) for name, pictures in shown.items()}


def real_pictures(wanted: Sequence[EvaluationPrompt]) -> Tensor:
    """Rendered people with what the prompts ask for."""
    people = split_seeds("validation", len(wanted), 5000)
    things = [(*w.concepts, w.beside) for w in wanted]
    return render_items(people, range(len(wanted)), [w.scene for w in wanted], things)


def two_concepts(
    evaluator: ConceptEvaluator,
    trained: Mapping[str, Sequence[Mapping[str, TrainedConcept]]],
    size: Size,
) -> tuple[dict[str, dict[str, float]], dict[str, object]]:
    """Rows of pictures with two concepts, and the share in which both are recognised.

    Args:
        evaluator: draws and judges.
        trained: method to what each training seed made, word by word.
        size: which pairs; without any there are no rows.
    """
    pairs = {100 + PAIRS.index((a, b)): (CONCEPTS[a], CONCEPTS[b]) for a, b in size.pairs}
    if not pairs:
        return {}, {}
    wanted = [pair_prompts(pairs, size.scenes[: size.pair_scenes], seed) for seed in size.seeds]
    flat = [prompt for groups in wanted for group in groups for prompt in group]
    shown = {f"two: {REAL}": real_pictures(flat), BASE_TWO: evaluator.draw(flat)}
    table = {name: evaluator.judged(pictures, flat) for name, pictures in shown.items()}
    shares = {}
    for name, method in METHODS.items():
        columns = pair_columns(evaluator, wanted, trained[name], method.pair_setting)
        table[f"two: {method.label(method.pair_setting)}"] = columns
        shares[name] = shares_of_both(columns, wanted)
    rows = {
        name: {**means(columns), "both_recognised": float(columns["all_recognised"].mean())}
        for name, columns in table.items()
    }
    facts: dict[str, object] = {}
    for method, name in ((PERFUSION, BOTH), (DREAMBOOTH, BOTH_LORA)):
        interval = crossed_interval(shares[method.name])
        facts |= {name: interval.value, f"{name}_ci95": [interval.low, interval.high]}
    return rows, facts


def conclusions(sweeps: Mapping[str, Tensor], reference: Tensor) -> dict[str, object]:
    """Hypervolumes, and whether Perfusion's sweep lies on or above all others.

    Intervals resample training seeds and concepts.

    Args:
        sweeps: method to (S, K, C, 2), seeds, settings, concepts, goals.
        reference: (2,) from which areas are measured: the base's likeness, no agreement.
    """
    own = sweeps[PERFUSION.name].double()
    others = torch.cat([sweeps[m].double() for m in METHODS if m != PERFUSION.name], 1)
    counts = [own.shape[1], others.shape[1]]

    def missing(columns: Tensor) -> Tensor:
        front, points = columns.unflatten(-1, (-1, 2)).split(counts, -2)
        return shortfall(front, points)

    table = _by_concept(own, others)
    short = crossed_interval(table, missing, draws=2000)
    dominating = missing(crossed_means(table, draws=200)) <= 0
    facts: dict[str, object] = {
        "front_dominates": short.value <= 0,
        "front_dominates_share": float(dominating.double().mean()),
        "front_shortfall": short.value,
        "front_shortfall_ci95": [short.low, short.high],
    }
    areas, gains = {}, {}
    for method in METHODS:
        theirs = sweeps[method].double()
        areas[method] = float(hypervolume(theirs.mean((0, 2)), reference))
        if method != PERFUSION.name:

            def more(columns: Tensor, size: int = theirs.shape[1]) -> Tensor:
                front, points = columns.unflatten(-1, (-1, 2)).split([counts[0], size], -2)
                return hypervolume(front, reference) - hypervolume(points, reference)

            gain = crossed_interval(_by_concept(own, theirs), more, draws=2000)
            gains[method] = [gain.value, gain.low, gain.high]
    return {**facts, "hypervolume": areas, "hypervolume_gain_ci95": gains}


def _by_concept(*sweeps: Tensor) -> Tensor:
    """Sweeps (S, K, C, 2) beside each other: (S, C, all K times 2)."""
    return torch.cat(sweeps, 1).permute(0, 2, 1, 3).flatten(2)


def print_results(report: Report, console: Console) -> None:
    """Print the table and the conclusions."""
    console.print(report.to_markdown({"seconds": 1, "file_kb": 1, "step_ms": 2}))
    facts = report.facts
    console.print(f"{facts['machine']}, {facts['commit'][:12]}, {facts['minutes']:.1f} minutes")
    for name, area in facts["hypervolume"].items():
        gain = facts["hypervolume_gain_ci95"].get(name)
        more = "" if gain is None else " (Perfusion {:+.3f} [{:+.3f}, {:+.3f}])".format(*gain)
        console.print(f"hypervolume of {name}: {area:.3f}{more}")
    share = facts["front_dominates_share"]
    console.print(f"front_dominates: {facts['front_dominates']} ({share:.0%} of resamples)")
    low, high = facts["front_shortfall_ci95"]
    console.print(f"front_shortfall: {facts['front_shortfall']:+.4f} [{low:+.4f}, {high:+.4f}]")
    leaks = ", ".join(f"{name} {value:.3f}" for name, value in facts["leak"].items())
    console.print(f"leak, likeness in pictures of the plain word: {leaks}")
    for name in (BOTH, BOTH_LORA) if BOTH in facts else ():
        low, high = facts[f"{name}_ci95"]
        console.print(f"{name}: {facts[name]:.2f} [{low:.2f}, {high:.2f}]")
