"""`make bench name=engines args='--json FILE'`: what more workers bring `prepare` and `corpus`.

Drawn people are prepared and trained by the commands themselves, from nothing each time: in this
process, in processes of this machine, and on a Ray cluster of this machine with as many nodes.
Seconds are those of the whole command, so a worker's start counts; the bytes must be the same.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import torch

from difflora_core.commands import corpus, prepare
from difflora_core.commands.main import plain_console
from difflora_core.data.choices import ChoiceSettings
from difflora_core.demo import paths
from difflora_core.demo.world.identities import split_seeds
from difflora_core.demo.world.scenes import render_portraits
from difflora_core.evaluation.report import Report
from difflora_core.storage.image_files import write_image
from difflora_core.training.lora.dreambooth_config import DreamBoothConfig

from ..command import benchmark_console, command_parser, commit, machine, write_report

PICTURES = 8
COURSE = DreamBoothConfig(rank=4, steps=40, samples_per_step=1, same_start=True)
KEPT = ("data-*.arrow", "prepare.json", "shards/*", "index.*")
"""Files that must not depend on who made them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = command_parser("Throughput of prepare and corpus against workers.", threads=None)
    parser.add_argument("--quick", action="store_true", help="8 people, 10 steps")
    parser.add_argument("--workers", type=int, nargs="+", default=[2], help="how many, each a row")
    options = parser.parse_args(arguments)
    console, people = benchmark_console(), 8 if options.quick else 32
    steps = 10 if options.quick else COURSE.steps
    torch.set_num_threads(1)  # as workers have: other sums are rounded otherwise
    rows = {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # notices of libraries to their programmers
        photos = draw(Path(folder) / "photos", people)
        plans = [("one process", 1, False)]
        plans += [(f"{n} processes", n, False) for n in options.workers]
        plans += [(f"Ray, {n} nodes", n, True) for n in options.workers]
        digests = set()
        for number, (name, workers, on_ray) in enumerate(plans):
            with cluster(workers if on_ray else 0) as address:
                place = Path(folder) / str(number)
                rows[name] = measure(photos, place, workers, address, steps)
                digests.add(digest(place))
                console.print(f"{name}: {rows[name]['pictures_per_second']:.2f} pictures a second")
    facts = {"people": people, "pictures": people * PICTURES, "steps": steps}
    facts |= {"same_bytes": len(digests) == 1, "quick": options.quick, "commit": commit()}
    facts["machine"] = machine()
    console.print(Report(rows).to_markdown({"identities_per_hour": 0}))
    console.print(", ".join(f"{k} {v}" for k, v in facts.items()))
    write_report(Report(rows, facts), options.json, console)
    return 0 if facts["same_bytes"] else 1


def measure(photos: Path, folder: Path, workers: int, ray: str, steps: int) -> dict[str, float]:
    """Both commands, from nothing."""
    quiet = plain_console(stderr=True)
    quiet.quiet = True
    choices = ChoiceSettings(same_person=0.3)
    faces = {"faces": str(paths.FACES), "smallest_face": 12, "resolution": 64}
    dataset, out = folder / "dataset", folder / "corpus"
    asked = prepare.Settings(
        source=str(photos), out=str(dataset), workers=workers, ray=ray, choices=choices, **faces
    )
    seconds = [_timed(lambda: prepare.run(asked, quiet))]
    course = replace(COURSE, steps=steps)
    trained = corpus.Settings(
        *(str(dataset), str(out), "demo", 4), group=4, training=course, workers=workers, ray=ray
    )
    seconds.append(_timed(lambda: corpus.run(trained, quiet)))
    people = len(list(photos.iterdir()))
    return {
        "prepare_seconds": seconds[0],
        "pictures_per_second": people * PICTURES / seconds[0],
        "corpus_seconds": seconds[1],
        "identities_per_hour": 3600 * people / seconds[1],
    }


def draw(folder: Path, people: int) -> Path:
    """One folder a person."""
    for who, seed in enumerate(split_seeds("train", people, 300)):
        own = render_portraits([seed] * PICTURES, range(PICTURES))
        (folder / f"p{who}").mkdir(parents=True)
        for number, image in enumerate(own.images):
            write_image(image, folder / f"p{who}" / f"{number}.png")
    return folder


@contextmanager
def cluster(nodes: int) -> Iterator[str]:
    """Address of a Ray cluster of nodes with one processor each; empty for none of them."""
    if not nodes:
        yield ""
        return
    made = import_module("ray.cluster_utils").Cluster(
        True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    try:
        for _ in range(nodes):
            made.add_node(num_cpus=1)
        yield made.address
    finally:
        made.shutdown()


def digest(folder: Path) -> str:
    """Of what was made."""
    found = hashlib.sha256()
    for part in ("dataset", "corpus"):
        for path in sorted(p for pattern in KEPT for p in (folder / part).glob(pattern)):
            found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def _timed(do: Callable[[], object]) -> float:
    """Seconds of a call."""
    begun = time.perf_counter()
    do()
    return time.perf_counter() - begun
