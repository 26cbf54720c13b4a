"""`make bench name=seeds args='--steps 600 --seeds 3'`: the two headline rows, trained again.

Every seed trains a DiffLoRA model from nothing and, for every person, a DreamBooth LoRA. The model
that is shipped was trained much longer than the default here, which shows the spread alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from scipy.stats import t as student
from torch import Tensor

from difflora_core.demo import paths
from difflora_core.demo.build import stages_lora
from difflora_core.demo.networks.base import load_base
from difflora_core.evaluation.report import Report, crossed_interval
from difflora_core.models.difflora import DiffLoRAModel
from difflora_core.models.face_reader import FaceReader, FaceReaderConfig
from difflora_core.storage.checkpoint import load_model, save_model
from difflora_core.storage.safetensors_io import read_file
from difflora_core.training.difflora import functional
from difflora_core.training.loop import LoopConfig, Progress

from ..command import benchmark_console, command_parser, commit, machine, set_threads, write_report
from .artefacts import Artefacts, load_artefacts
from .choose_strength import read_strengths
from .demo_training import new_model
from .dreambooth import SETTINGS
from .experiment import Experiment, Trial
from .identity import QUICK_PLAN
from .rows import ALL, HEADLINE, Row, dreambooth_name, predict

JUDGES = ("face_similarity", "parameter_error")
DREAMBOOTH = dreambooth_name(ALL, SETTINGS.steps)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = command_parser("Spread of the headline rows between seeds.")
    parser.add_argument("--steps", type=int, default=600, help="steps of the DiffLoRA training")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--people", type=int, default=10)
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    options = parser.parse_args(arguments)
    set_threads(options.threads)
    console = benchmark_console()
    artefacts = load_artefacts(log=console.print)
    experiment = Experiment(artefacts, QUICK_PLAN, options.split, options.people)
    strengths = read_strengths(paths.STRENGTHS)
    trials: dict[str, list[Trial]] = {HEADLINE: [], DREAMBOOTH: []}
    for seed in range(options.seeds):
        model = functional_model(artefacts, options.steps, seed, console)
        for row in (functional_row(experiment, model), dreambooth_row(experiment, seed)):
            trials[row.name].append(experiment.trial(row, strengths.get(row.name, 1.0)))
    facts = {"steps": options.steps, "commit": commit(), "machine": machine()}
    found = {"over seeds": differences(trials), "over people and seeds": crossed(trials)}
    report = Report(table(trials), {**facts, "differences": found})
    console.print(report.to_markdown({"strength": 2, "denoising_loss": 4}))
    for way, intervals in found.items():
        for judge, (value, low, high) in intervals.items():
            interval_text = f"{value:+.3f} [{low:+.3f}, {high:+.3f}] {way}"
            console.print(f"{HEADLINE} minus {DREAMBOOTH}, {judge}: {interval_text}")
    write_report(report, options.json, console)
    return 0


def functional_model(
    artefacts: Artefacts, steps: int, seed: int, console: Console
) -> DiffLoRAModel:
    """A model that was trained for so many steps from this seed, cached on disk."""
    folder = artefacts.cache / "seeds" / f"{artefacts.base_hash[:12]}-{steps}-{seed}"
    path = folder / "model.safetensors"
    if not path.exists():
        model = new_model(100 + seed, stages_lora.functional_settings().targets)
        loop = replace(stages_lora.FUNCTIONAL_LOOP, steps=steps, seed=seed)

        def progress(step: int, total: int, metrics: dict[str, float]) -> None:
            line = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            console.print(f"seed {seed}, step {step} of {total}: {line}")

        train_functional(model, loop, folder / "run", progress)
        save_model(model, path, torch.float16, {"steps": str(steps), "seed": str(seed)})
    return load_model(path).eval().requires_grad_(False)


def train_functional(
    model: DiffLoRAModel, loop: LoopConfig, folder: Path, progress: Progress
) -> None:
    """Train MIF, predictor and decoder on the demo world's training people."""
    people = stages_lora.people_of(stages_lora.TRAIN, progress).pictures
    sizes = people.features.sizes.face, people.latents[:1].shape[1]
    judge = FaceReader(FaceReaderConfig(face=sizes[0], channels=sizes[1]))
    judge.load_state_dict(read_file(paths.FACE_READER, "face reader")[0])
    base = load_base(paths.BASE)
    objective = functional.FunctionalObjective(model, base, stages_lora.FUNCTIONAL, judge)
    functional.fit(objective, people, loop, folder, progress)


def functional_row(experiment: Experiment, model: DiffLoRAModel) -> Row:
    """The prediction from one photo."""
    photos = experiment.people.photos.images[:, :1]
    return Row(HEADLINE, predict(model, experiment.artefacts.features(photos)))


def dreambooth_row(experiment: Experiment, seed: int) -> Row:
    """LoRAs trained from another seed."""
    people, config = experiment.people, replace(SETTINGS, seed=seed)
    return Row(DREAMBOOTH, experiment.artefacts.trainer.train(people.photos, people.seeds, config))


def table(trials: dict[str, list[Trial]]) -> dict[str, dict[str, float]]:
    """Every seed of every row, then mean and standard deviation over seeds."""
    rows = {}
    for name, made in trials.items():
        means = [trial.means() for trial in made]
        for seed, values in enumerate(means):
            rows[f"{name}, seed {seed}"] = values
        for word, reduce in (("mean", torch.mean), ("standard deviation", torch.std)):
            rows[f"{name}, {word}"] = {
                column: float(reduce(torch.tensor([values[column] for values in means])))
                for column in means[0]
            }
    return rows


def differences(trials: dict[str, list[Trial]]) -> dict[str, tuple[float, float, float]]:
    """Prediction minus DreamBooth over seeds by each judge, with its 95 % interval."""
    result = {}
    for judge in JUDGES:
        ours, theirs = (seed_means(trials[name], judge) for name in (HEADLINE, DREAMBOOTH))
        result[judge] = interval(ours - theirs)
    return result


def crossed(trials: dict[str, list[Trial]]) -> dict[str, tuple[float, float, float]]:
    """Prediction minus DreamBooth by each judge; the interval resamples people and seeds.

    The two rows of a seed are paired by person, as both draw the same people.
    """
    result = {}
    for judge in JUDGES:
        ours, theirs = (
            torch.stack([trial.columns[judge] for trial in trials[name]])
            for name in (HEADLINE, DREAMBOOTH)
        )
        found = crossed_interval(ours - theirs)
        result[judge] = (found.value, found.low, found.high)
    return result


def seed_means(trials: Sequence[Trial], column: str) -> Tensor:
    """(S,) mean over people of every seed."""
    return torch.stack([trial.columns[column].double().mean() for trial in trials])


def interval(values: Tensor, level: float = 0.95) -> tuple[float, float, float]:
    """Mean of (S,) values and its interval by Student's t; the interval of one value is unknown."""
    count, mean = len(values), float(values.mean())
    if count < 2:
        return mean, float("nan"), float("nan")
    half = float(student.ppf((1 + level) / 2, count - 1)) * float(values.std()) / count**0.5
    return mean, mean - half, mean + half
