"""`make bench name=train_lora args='--quick --json FILE'`: Train Identity LoRA, two comparisons.

Likeness by the judges on people that no trained part has met: 300 steps of the recipe behind the
node against 300 steps of the DreamBooth yardstick at the same settings, from eight photos and from
one; and 25 steps from the prediction against 300 from nothing, on the same photos. Then, in one
ComfyUI, one person, the same photos and settings: our node against core's Train LoRA.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from difflora_core.demo import paths
from difflora_core.demo.networks.concept_text import demo_concept_text
from difflora_core.demo.world.scenes import PICTURE_SIZE
from difflora_core.evaluation.report import Report, bootstrap_interval
from difflora_core.lora.weights import LoRAWeights
from difflora_core.methods.lora import lora_weights
from difflora_core.training.adaptation_run import run_adaptation
from difflora_core.training.difflora.refine import refinement_config
from difflora_core.training.lora.dreambooth_config import DreamBoothConfig
from difflora_core.training.lora.objective import LoRAObjective, LoRATraining
from difflora_core.training.picture_buckets import bucketed
from difflora_core.training.picture_task import PictureTask
from difflora_core.vision.training_pictures import training_pictures

from ..command import benchmark_console, command_parser, commit, machine, set_threads, write_report
from .artefacts import Artefacts, load_artefacts
from .drawing import select
from .dreambooth import SETTINGS
from .experiment import Experiment, Trial
from .identity import FULL_PLAN, PEOPLE, QUICK_PEOPLE, QUICK_PLAN
from .measure import COLUMNS
from .people import PHOTOS, People
from .rows import ALL, ONE, Row, dreambooth_name, first_photos, predict
from .trainers import compare_trainers

NODE = "Train Identity LoRA"
PREDICTED = "functional, {}"
REFINED = f"{NODE}, {{}}, {{}} steps from the prediction"
JUDGES = {"face_similarity": 1, "parameter_error": -1, "denoising_loss": -1}
"""Column to whether more (1) or less (-1) is better."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = command_parser("Likeness, seconds and memory of Train Identity LoRA.", threads=1)
    parser.add_argument("--quick", action="store_true", help="5 people, 6 prompts")
    parser.add_argument("--people", type=int, help="so many people instead")
    parser.add_argument("--only", choices=("likeness", "trainers"), help="one of the two alone")
    options = parser.parse_args(arguments)
    set_threads(options.threads)
    console, started = benchmark_console(), time.perf_counter()
    artefacts = load_artefacts(log=console.print)
    count = options.people or (QUICK_PEOPLE if options.quick else PEOPLE)
    plan = QUICK_PLAN if options.quick else FULL_PLAN
    experiment = Experiment(artefacts, plan, "test", count)
    rows, facts = {}, {}
    if options.only != "trainers":
        rows, facts["differences"] = likeness(experiment, console)
    if options.only != "likeness":
        facts["trainers"] = compare_trainers(experiment, options.quick, console)
    facts |= {"people": count, "quick": options.quick, "commit": commit(), "machine": machine()}
    facts["minutes"] = (time.perf_counter() - started) / 60
    console.print(f"{facts['minutes']:.0f} minutes; {facts['machine']}")
    write_report(Report(rows, facts), options.json, console)
    return 0


def likeness(
    experiment: Experiment, console: Console
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, list[float]]]]:
    """The table of the judges, and mean differences of pairs of rows with their intervals."""
    trials = {"real": experiment.real()[0], "base": experiment.base()}
    for row in trained_rows(experiment.artefacts, experiment.people, console):
        trials[row.name] = experiment.trial(row, 1.0)
    rows = {
        trial.row: {k: v for k, v in trial.means().items() if k in COLUMNS}
        for trial in trials.values()
    }
    console.print(Report(rows).to_markdown({"strength": 0, "file_kb": 0, "denoising_loss": 4}))
    steps = refinement_config(1).steps
    pairs = [
        pair
        for photos in (ALL, ONE)
        for pair in (
            (name(photos), dreambooth_name(photos, SETTINGS.steps)),
            (REFINED.format(photos, steps), name(photos)),
        )
    ]
    found = {f"{a} - {b}": differences(trials[a], trials[b]) for a, b in pairs}
    for pair, judges in found.items():
        words = (f"{k} {v:+.4f} [{low:+.4f}, {high:+.4f}]" for k, (v, low, high) in judges.items())
        console.print(f"{pair}: {', '.join(words)}")
    return rows, found


def differences(first: Trial, second: Trial) -> dict[str, list[float]]:
    """Mean difference over people by each judge, with its 95 % bootstrap interval."""
    found = {}
    for column in JUDGES:
        interval = bootstrap_interval(first.columns[column] - second.columns[column])
        found[column] = [interval.value, interval.low, interval.high]
    return found


def name(photos: str, steps: int = SETTINGS.steps) -> str:
    """Name of a row of the node."""
    return f"{NODE}, {photos}, {steps} steps"


def trained_rows(artefacts: Artefacts, people: People, console: Console) -> list[Row]:
    """DreamBooth's rows, the node's at the same settings, the prediction, and it refined."""
    rows: list[Row] = []
    trainer, model = NodeTrainer(artefacts, console), artefacts.models["functional"]
    config = refinement_config(artefacts.layout.rank)
    for count, photos in ((PHOTOS, ALL), (1, ONE)):
        pictures = first_photos(people, count)
        trained = artefacts.trainer.train(pictures, people.seeds, SETTINGS)
        rows.append(Row(dreambooth_name(photos, SETTINGS.steps), trained))
        weights, seconds = trainer.train(people, count, node_settings(SETTINGS))
        rows.append(Row(name(photos), weights, seconds))
        guess = predict(model, artefacts.features(people.photos.images[:, :count]))
        rows.append(Row(PREDICTED.format(photos), guess))
        refined, seconds = trainer.train(people, count, node_settings(config), guess)
        rows.append(Row(REFINED.format(photos, config.steps), refined, seconds))
    return rows


def node_settings(config: DreamBoothConfig) -> LoRATraining:
    """DreamBooth's settings in the words of the node's recipe."""
    return LoRATraining(
        steps=config.steps,
        batch=config.samples_per_step,
        weighting=config.loss_weighting,
        evaluate_every=config.steps,  # the last step counts, as DreamBooth's does
        precision=SETTINGS.precision,
        learning_rate=config.learning_rate,
        schedule=config.decay,
        warmup=config.warmup,
        rank=config.rank,
        targets=config.targets,
        train_down=config.train_down,
        normalise_gradient=config.normalise_gradient,
        seed=config.seed,
    )


@dataclass(frozen=True)
class NodeTrainer:
    """The node's recipe on the benchmark's people, one after another."""

    artefacts: Artefacts
    console: Console

    def train(
        self,
        people: People,
        photos: int,
        config: LoRATraining,
        start: LoRAWeights | None = None,
    ) -> tuple[LoRAWeights, float]:
        """One LoRA per person from the first photos (I, ...), and seconds for one person."""
        task = PictureTask(self.artefacts.base, demo_concept_text(paths.BASE), "demo")
        begun, made = time.perf_counter(), []
        for person in range(len(people)):
            images = people.photos.images[person, :photos]
            captions = {k: [people.photos.captions[person][k]] for k in range(photos)}
            examples = bucketed(
                task.base, training_pictures(images), captions, PICTURE_SIZE, flip=False
            )
            own = None if start is None else select(start, [person]).batch_item(0)
            objective = LoRAObjective(task, replace(config, seed=person), own)
            folder = Path(tempfile.mkdtemp())
            result = run_adaptation(objective, examples, folder)
            shutil.rmtree(folder)
            made.append(lora_weights(result.adaptations[0]))
        seconds = (time.perf_counter() - begun) / len(people)
        self.console.print(
            f"{NODE}: {config.steps} steps on {photos} photos, {seconds:.0f} s a person"
        )
        return LoRAWeights.stack(made), seconds
