"""`make bench name=fit_linear`: fit the linear baselines, PCA and ridge regression.

They are fitted on the corpus of DreamBooth LoRAs that the `paper` preset was trained on (trained
here, resumably, when it is not on disk) and written beside the artefacts.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from difflora_core.demo import paths
from difflora_core.demo.build import made, stages_lora

from ..command import benchmark_console, command_parser, set_threads
from .artefacts import load_artefacts
from .linear import fit_linear, save_linear


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = command_parser("Fit the linear baselines of the benchmark.", report=False)
    parser.add_argument("--components", type=int, default=32, help="directions of the PCA")
    options = parser.parse_args(arguments)
    set_threads(options.threads)
    console = benchmark_console()
    artefacts = load_artefacts(log=console.print)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("corpus and features", total=None)

        def report(step: int, total: int, metrics: dict[str, float]) -> None:
            bar.update(task, completed=step, total=total)

        corpus = stages_lora.paper_loras()
        features = stages_lora.features_of(stages_lora.PAPER_SET, corpus, report)
    pictures = stages_lora.PICTURES
    learned = stages_lora.PAPER_PEOPLE
    photos = [
        [features.select(k * pictures + j) for j in range(pictures)] for k in range(len(corpus))
    ]
    parts = (corpus.identities[:learned], corpus.identities[learned:])
    halves = [corpus.select(names) for names in parts]
    linear = fit_linear(
        (halves[0].weights, halves[1].weights),
        (photos[:learned], photos[learned:]),
        corpus.layout,
        options.components,
    )
    facts = {"people": learned, "components": linear.size, "base": artefacts.base_hash}
    save_linear(linear, paths.LINEAR, facts)
    made.list_artefacts()
    console.print(f"wrote {paths.LINEAR.name}, {paths.LINEAR.stat().st_size / 1024:.0f} KB")
    return 0
