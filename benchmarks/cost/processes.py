"""`make bench name=processes`: the training loop on 1, 2 and 4 processes of this machine.

A DreamBooth step of four people on the demo base, through gloo on the CPU, in float64, so that
rounding hides nothing. Every number of processes gets the same batches; what is compared are the
weights at the end, what a stop on the last process alone does to all, and the seconds of a step.
Every process computes on one thread; where there are fewer cores than processes they wait for each
other.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from difflora_core.adapters.attach import attach
from difflora_core.adapters.lora import lora_adapter_set
from difflora_core.base_model.protocol import BaseModel
from difflora_core.demo import paths
from difflora_core.demo.networks.base import load_base
from difflora_core.diffusion.objective import stratified_timesteps
from difflora_core.evaluation.report import Report
from difflora_core.training.loop import Draw, Hooks, Stopped, train
from difflora_core.training.lora.dreambooth import DreamBoothConfig, DreamBoothObjective
from difflora_core.training.lora.dreambooth_start import starting_weights
from difflora_core.training.processes import launched

from ..command import benchmark_console, commit, machine, set_threads, write_report

COUNTS = (1, 2, 4)
PEOPLE, SAMPLES = 4, 4
TO_ROUNDING = 1e-6
"""Largest difference of weights over the largest weight that still counts as the same. Adam takes
as large a step for a tiny gradient as for a large one, so float64's own 1e-16 grows."""
CAPTION = "photo portrait of a young woman"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; with --worker it is one of the processes."""
    parser = argparse.ArgumentParser(description="The training loop on several processes.")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--worker", nargs=2, metavar=("FOLDER", "STOP"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        work(Path(options.worker[0]), options.steps, int(options.worker[1]))
        return 0
    console = benchmark_console()
    with tempfile.TemporaryDirectory() as folder:
        report = measure(Path(folder), options.steps)
    console.print(report.to_markdown({"relative difference": 12}))
    console.print(
        f"same weights: {report.facts['same_weights']}, stops together: "
        f"{report.facts['stops_together']}; {report.facts['machine']}"
    )
    write_report(report, options.json, console)
    return 0


def measure(folder: Path, steps: int, counts: Sequence[int] = COUNTS) -> Report:
    """Train with every number of processes, then stop two in the middle and go on.

    Args:
        folder: for states and weights.
        steps: of the optimiser.
        counts: numbers of processes; the first one is what the others are compared with.
    """
    rows: dict[str, dict[str, float]] = {}
    seconds: dict[str, float] = {}
    for count in counts:
        (first, *_) = launch(folder / str(count), count, steps)
        apart = difference(folder / str(count), folder / str(counts[0]))
        seconds[str(count)] = first["seconds"]
        rows[f"{count} processes" if count > 1 else "1 process"] = {
            "seconds": first["seconds"],
            "seconds per step": first["seconds"] / steps,
            "relative difference": apart,
        }
    stopped = launch(folder / "stopped", 2, steps, stop=steps // 2)
    launch(folder / "stopped", 2, steps)
    resumed = difference(folder / "stopped", folder / str(counts[0]))
    largest = max(resumed, *(row["relative difference"] for row in rows.values()))
    facts = {
        "same_weights": largest < TO_ROUNDING,
        "largest_relative_difference": largest,
        "stops_together": [one["stopped"] for one in stopped] == [steps // 2] * 2,
        "relative_difference_after_resuming": resumed,
        "seconds": seconds,
        "steps": steps,
        "people": PEOPLE,
        "samples_per_person": SAMPLES,
        "commit": commit(),
        "machine": machine(),
    }
    return Report(rows, facts)


def launch(folder: Path, count: int, steps: int, stop: int = -1) -> list[dict[str, Any]]:
    """What every process of a run reports; with `stop` the last one stops before that step."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("report-*.json"):
        old.unlink()
    command = [sys.executable, "-m", "benchmarks.cost.processes", "--steps", str(steps)]
    command += ["--worker", str(folder), str(stop)]
    workers = []
    for rank in range(count):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
        own |= {"MASTER_ADDR": "127.0.0.1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": 1}
        environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
        workers.append(subprocess.Popen(command, cwd=paths.ROOT, env=environment))
    for worker in workers:
        worker.wait()
    reports = [folder / f"report-{rank}.json" for rank in range(count)]
    if not all(report.exists() for report in reports):
        raise RuntimeError(f"a run with {count} processes failed; see above")
    return [json.loads(report.read_text()) for report in reports]


def work(folder: Path, steps: int, stop: int) -> None:
    """One process: train, and write a report; the main one writes the weights too."""
    set_threads(1)
    processes, base = launched(), load_base(paths.BASE)
    config = DreamBoothConfig(steps=steps, learning_rate=2e-3, checkpoint_every=steps)
    layout = base.layout("demo", config.rank)
    start = starting_weights(layout, range(PEOPLE), config, None, None).to(torch.float64)
    text = base.encode_prompts([CAPTION])
    base.unet.double()
    objective = DreamBoothObjective(base, start, text, config)
    asked = iter(range(steps))
    last = processes.rank == processes.count - 1
    hooks = Hooks(
        scale_gradients=objective.scale_gradients,
        stop=(lambda: next(asked) == stop) if last and stop >= 0 else None,
        base=base,
    )
    stopped, began = -1, time.perf_counter()
    with attach(base.unet, lora_adapter_set(objective.weights), names=layout.module_names):
        try:
            train(objective, batches(base), config.loop, folder, hooks)
        except Stopped as early:
            stopped = early.step
    report = {"seconds": time.perf_counter() - began, "stopped": stopped}
    if processes.is_main:
        weights = {name: p.detach().contiguous() for name, p in objective.named_parameters()}
        save_file(weights, folder / "weights.safetensors")
    (folder / f"report-{processes.rank}.json").write_text(json.dumps(report))


def batches(base: BaseModel) -> Draw:
    """Random pictures: entry (k, b) of every tensor is sample k of person b."""
    count, steps = SAMPLES * PEOPLE, len(base.alphas_cumprod)
    shape = (SAMPLES, PEOPLE, *base.encode_images(torch.zeros(1, 64, 64, 3)).shape[1:])

    def draw(generator: torch.Generator) -> dict[str, Tensor]:
        return {
            "latents": torch.randn(shape, generator=generator, dtype=torch.float64),
            "noise": torch.randn(shape, generator=generator, dtype=torch.float64),
            "timesteps": stratified_timesteps(count, generator, steps).reshape(SAMPLES, PEOPLE),
            "captions": torch.zeros(SAMPLES, PEOPLE, dtype=torch.long),
        }

    return draw


def difference(folder: Path, reference: Path) -> float:
    """Largest difference of two runs' weights, over the largest weight."""
    own, other = (load_file(one / "weights.safetensors") for one in (folder, reference))
    apart = max(float((own[name] - other[name]).abs().max()) for name in other)
    return apart / max(float(tensor.abs().max()) for tensor in other.values())


if __name__ == "__main__":
    raise SystemExit(main())
