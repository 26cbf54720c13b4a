"""`python -m benchmarks fit_linear`: fit the linear baselines, PCA and ridge regression.

They are fitted on the corpus of DreamBooth LoRAs that the `paper` preset was trained on (trained
here, resumably, when it is not on disk) and written beside the artefacts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from difflora_core.demo.build import stages, stages_lora
from difflora_core.demo.build.features import pool_features

from ..world import LINEAR, benchmark_console, load_world, set_threads
from .linear import fit_linear, save_linear


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Fit the linear baselines of the benchmark.")
    parser.add_argument("--components", type=int, default=32, help="directions of the PCA")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 = all cores")
    options = parser.parse_args(arguments)
    set_threads(options.threads)
    console = benchmark_console()
    world = load_world(say=console.print)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("corpus and features", total=None)

        def report(step: int, total: int, metrics: dict[str, float]) -> None:
            bar.update(task, completed=step, total=total)

        corpus = stages_lora.corpus_of_loras(world.base, report)
        count, pictures = len(corpus), stages_lora.PICTURES
        pool = stages.drawn_pool().head(count * pictures)
        features = pool_features("train", pool, report)
    kept = stages_lora.CORPUS_PEOPLE
    photos = [
        [features.select(k * pictures + j) for j in range(pictures)] for k in range(len(corpus))
    ]
    halves = [corpus.select(corpus.identities[rows]) for rows in (slice(kept), slice(kept, None))]
    linear = fit_linear(
        (halves[0].weights, halves[1].weights),
        (photos[:kept], photos[kept:]),
        corpus.layout,
        options.components,
    )
    facts = {"people": kept, "components": linear.size, "base": world.base_hash}
    save_linear(linear, LINEAR, facts)
    console.print(f"wrote {LINEAR.name}, {LINEAR.stat().st_size / 1024:.0f} KB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
