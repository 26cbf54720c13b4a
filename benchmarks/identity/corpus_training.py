"""`make bench name=corpus_training args='--json FILE'`: identities an hour, in groups or not.

Everybody has the same pictures, steps, batch and rate. Groups are those of the `corpus` command, a
process a core; one at a time is stock peft with all cores for one person, stock peft with a process
a core, the same in the other precision, and core's Train LoRA in ComfyUI with all cores. What each
leaves is judged alike, on the same people; of core's node the price of a step is measured alone.
Seconds are those of the training, without loading; in groups captions and checks are among them.

`grouped_over_single` is identities an hour in groups over those of the fastest of stock peft's
rows, in whatever precision that is: by the clock, so it holds on a machine without other work.
`grouped_over_single_cpu` is the least processor seconds an identity of those rows over the seconds
in groups, which other work hardly moves; it says nothing of cores that stand idle.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from difflora_core.base_model.diffusers_base import DiffusersBase
from difflora_core.data.workers import Workers
from difflora_core.demo import paths
from difflora_core.demo.comfyui.server import ComfyServer
from difflora_core.demo.networks.base import demo_layout, load_base
from difflora_core.demo.world.identities import split_seeds
from difflora_core.demo.world.scenes import render_portraits
from difflora_core.evaluation.report import Report
from difflora_core.lora.flat import flatten, unflatten
from difflora_core.training.lora.dreambooth import train_dreambooth
from difflora_core.training.lora.dreambooth_config import DreamBoothConfig, DreamBoothExamples

from ..comfyui_run import run
from ..command import benchmark_console, command_parser, commit, machine, write_report
from .artefacts import load_artefacts
from .experiment import Experiment
from .identity import QUICK_PLAN
from .one_at_a_time import Trained, train_one
from .people import PHOTOS
from .rows import Row
from .trainers import CORE, prompt, slope, upload_photos

COURSE = DreamBoothConfig(
    rank=4,
    steps=150,
    samples_per_step=1,
    learning_rate=1e-2,
    decay="linear",
    loss_weighting="uniform",
    normalise_gradient=False,
    precision="bf16",
)
GROUP, JUDGED, QUICK_STEPS = 32, 4, 20
GROUPED, CORE_NODE = "groups", "core's Train LoRA"
PRECISIONS = {"bf16": "bfloat16", "no": "float32"}
CORE_LENGTHS = (10, 40)
DIGITS = {"identities_per_hour": 0, "cpu_seconds_per_identity": 2, "likeness": 3}


@dataclass(frozen=True)
class Job:
    """People to train: latents (P, M, C, h, w), captions P x M, and seeds."""

    latents: Tensor
    captions: list[list[str]]
    seeds: tuple[int, ...]

    def some(self, rows: Sequence[int]) -> Job:
        """A few of them."""
        few = list(rows)
        captions, seeds = [self.captions[k] for k in few], [self.seeds[k] for k in few]
        return Job(self.latents[few], captions, tuple(seeds))


@dataclass(frozen=True)
class Trainer:
    """Trains jobs in a process of its own; `grouped` at once, else one after another."""

    config: DreamBoothConfig
    grouped: bool
    threads: int

    def __call__(self, job: Job) -> Trained:
        """LoRAs of all people of a job; the clock begins after two steps of one."""
        torch.set_num_threads(self.threads)
        base = _base()
        short = replace(self.config, steps=2)
        self._train(base, job.some([0]), short)
        return self._train(base, job, self.config)

    def _train(self, base: DiffusersBase, job: Job, config: DreamBoothConfig) -> Trained:
        layout = demo_layout(config.rank)
        if self.grouped:
            begun, begun_cpu = time.perf_counter(), time.process_time()
            examples = DreamBoothExamples(job.latents, job.captions, job.seeds)
            made = flatten(layout, train_dreambooth(base, examples, config)[config.steps])
            return Trained(made, time.perf_counter() - begun, time.process_time() - begun_cpu)
        each = [
            train_one(base, layout, latents, captions, config, seed)
            for latents, captions, seed in zip(job.latents, job.captions, job.seeds, strict=True)
        ]
        seconds, cpu = (sum(getattr(o, n) for o in each) for n in ("seconds", "cpu_seconds"))
        return Trained(torch.cat([one.loras for one in each]), seconds, cpu)


@lru_cache(1)
def _base() -> DiffusersBase:
    """The demo's base, on the GPU where there is one."""
    base = load_base(paths.BASE)
    base.unet.to("cuda" if torch.cuda.is_available() else "cpu")
    return base


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = command_parser("Identities an hour of a corpus's training.", threads=None)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_STEPS} steps, core left out")
    parser.add_argument("--group", type=int, default=GROUP, help="people at once")
    parser.add_argument("--batch", type=int, default=1, help="pictures of each person in a step")
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default=COURSE.precision)
    options = parser.parse_args(arguments)
    console, steps = benchmark_console(), QUICK_STEPS if options.quick else COURSE.steps
    config = replace(
        COURSE, steps=steps, samples_per_step=options.batch, precision=options.precision
    )
    torch.set_num_threads(1)
    experiment = Experiment(load_artefacts({}, console.print), QUICK_PLAN, "test", JUDGED)
    cores = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    people = portraits(experiment.artefacts.base, options.group * cores)
    rows = {"base": {"likeness": experiment.base().means()["face_similarity"]}}
    for name, (trainer, jobs) in _plans(config, people, cores).items():
        rows[name] = _row(experiment, name, trainer, jobs)
        console.print(f"{name}: {rows[name]['cpu_seconds_per_identity']:.2f} s of the processor")
    facts = _facts(rows, config) | {"group": options.group, "cores": cores, "quick": options.quick}
    if not options.quick:
        rows[CORE_NODE] = core_row(experiment, config, cores)
        facts |= _ratios(rows[GROUPED], [rows[CORE_NODE]], "core")
    console.print(Report(rows).to_markdown(DIGITS | {"denoising_loss": 4}))
    console.print(", ".join(f"{k} {v}" for k, v in facts.items()))
    write_report(Report(rows, facts), options.json, console)
    return 0


def _plans(
    config: DreamBoothConfig, people: Job, cores: int
) -> dict[str, tuple[Trainer, list[Job]]]:
    """Ways to train: in groups first, then stock peft's."""
    few, other = people.some(range(JUDGED)), "no" if config.precision == "bf16" else "bf16"
    shares = [_share(few, k, cores) for k in range(cores)]
    singles = "stock peft, a process a core"
    return {
        GROUPED: (Trainer(config, True, 1), [_share(people, k, cores) for k in range(cores)]),
        "stock peft": (Trainer(config, False, cores), [few]),
        singles: (Trainer(config, False, 1), shares),
        f"{singles}, {PRECISIONS[other]}": (
            Trainer(replace(config, precision=other), False, 1),
            shares,
        ),
    }


def portraits(base: DiffusersBase, count: int) -> Job:
    """PHOTOS pictures each of people; the first are those of the experiment."""
    seeds = split_seeds("test", count)
    drawn = render_portraits([s for s in seeds for _ in range(PHOTOS)], [*range(PHOTOS)] * count)
    latents = base.encode_images(drawn.images).unflatten(0, (count, PHOTOS))
    captions = [list(drawn.captions[k * PHOTOS : (k + 1) * PHOTOS]) for k in range(count)]
    return Job(latents, captions, tuple(range(count)))


def _share(people: Job, number: int, of: int) -> Job:
    """Every so many people, from one on."""
    return people.some(range(number, len(people.seeds), of))


def _row(
    experiment: Experiment, name: str, trainer: Trainer, jobs: Sequence[Job]
) -> dict[str, float]:
    """What a way to train costs and reaches, in as many processes as there are jobs."""
    with Workers(max(2, len(jobs))) as workers:  # never in this process, which has seen much
        done = list(workers.each(trainer, jobs))
    count = sum(len(job.seeds) for job in jobs)
    longest, cpu = max(one.seconds for one in done), sum(one.cpu_seconds for one in done)
    numbers = [seed for job in jobs for seed in job.seeds]
    chosen = [numbers.index(k) for k in range(JUDGED)]
    loras = unflatten(demo_layout(trainer.config.rank), torch.cat([o.loras for o in done])[chosen])
    judged = experiment.trial(Row(name, loras), 1.0).means()
    return {
        "identities_per_hour": 3600 * count / longest,
        "seconds_per_identity": longest / count,
        "cpu_seconds_per_identity": cpu / count,
        "likeness": judged["face_similarity"],
        "denoising_loss": judged["denoising_loss"],
    }


def core_row(experiment: Experiment, config: DreamBoothConfig, cores: int) -> dict[str, float]:
    """Core's node in ComfyUI: the price of a step, times the steps."""
    own = {"bypass_mode": True, "batch_size": config.samples_per_step, "rank": config.rank}
    precision = "bf16" if config.precision == "bf16" else "fp32"
    own |= {"learning_rate": config.learning_rate, "training_dtype": precision}
    os.environ["OMP_NUM_THREADS"] = str(cores)  # of the server that is started
    seconds, spent = [], []
    with tempfile.TemporaryDirectory() as folder, ComfyServer(Path(folder)) as server:
        photos, info = upload_photos(server, experiment), server.client.object_info()
        for steps in CORE_LENGTHS:
            begun = server.cpu_seconds()
            done = run(server, prompt(photos, CORE, own, steps), info)
            seconds.append(done.seconds[CORE])
            spent.append(server.cpu_seconds() - begun)
    each, cpu = (slope(CORE_LENGTHS, found) * config.steps for found in (seconds, spent))
    return {
        "identities_per_hour": 3600 / each,
        "seconds_per_identity": each,
        "cpu_seconds_per_identity": cpu,
    }


def _facts(rows: dict[str, dict[str, float]], config: DreamBoothConfig) -> dict[str, object]:
    """The ratios, and what was measured."""
    stock = {name: row for name, row in rows.items() if name.startswith("stock")}
    facts: dict[str, object] = {
        **_ratios(rows[GROUPED], list(stock.values()), "single"),
        "fastest_single": max(stock, key=lambda name: stock[name]["identities_per_hour"]),
        "steps": config.steps,
        "batch": config.samples_per_step,
        "precision": config.precision,
    }
    return facts | {"commit": commit(), "machine": machine()}


def _ratios(
    grouped: dict[str, float], others: Sequence[dict[str, float]], name: str
) -> dict[str, object]:
    """How much faster groups are than the best of others, by the clock and by the processor."""
    hour, cpu = "identities_per_hour", "cpu_seconds_per_identity"
    return {
        f"grouped_over_{name}": grouped[hour] / max(other[hour] for other in others),
        f"grouped_over_{name}_cpu": min(other[cpu] for other in others) / grouped[cpu],
    }
