"""`make bench name=plots args='--identity FILE --out FOLDER'`: plots of what other commands wrote.

`--identity`, `--compression` and `--seeds` take their --json; `--run NAME=FOLDER` a training run,
whose events.jsonl is drawn. Each that is given becomes one PNG.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from difflora_core.config import parse_json
from difflora_core.errors import ConfigError
from difflora_core.evaluation.report import bootstrap_interval
from difflora_core.storage.atomic import replacing
from difflora_core.training.event_log import EVENTS

from ..command import benchmark_console, command_parser
from .rows import BASE, REAL, TIMES, wanted_row

SIZE, DPI = (7.5, 5.0), 110
FACE, AGREEMENT = "face_similarity", "prompt_agreement"
ENDS = (REAL, BASE)
KEPT = {"kept_face_similarity": "face judge", "kept_parameter_error": "parameter judge"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = command_parser("Plots of reports and of training runs.", report=False, threads=None)
    for name, (about, _) in PLOTS.items():
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=about)
    parser.add_argument(
        "--run", action="append", default=[], metavar="NAME=FOLDER", help="a run's loss by step"
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        metavar="TEXT",
        help="of the main table, base, and rows whose name contains one of these; =TEXT: is TEXT",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="of the plots")
    options = parser.parse_args(arguments)
    console = benchmark_console()
    options.out.mkdir(parents=True, exist_ok=True)
    for name, (_, draw) in PLOTS.items():
        given = getattr(options, name)
        if given is not None:
            report = only(read_report(given), options.rows)
            console.print(f"wrote {save(draw(report), options.out / f'{name}.png')}")
    if options.run:
        runs = {name: read_events(Path(at)) for name, at in (r.split("=", 1) for r in options.run)}
        console.print(f"wrote {save(training(runs), options.out / 'training.png')}")
    return 0


def identity(report: Mapping[str, Any]) -> Figure:
    """Likeness against prompt agreement: every row with its 95 % intervals over people.

    A row at several strengths is a line.
    """
    figure, axes = _axes("prompt agreement", "face similarity")
    lines: dict[str, list[Mapping[str, Sequence[float]]]] = {}
    for name, columns in report["per_identity"].items():
        if FACE in columns and AGREEMENT in columns:
            lines.setdefault(name.split(TIMES)[0], []).append(columns)
    for number, (row, points) in enumerate(lines.items()):
        x, *across = zip(*(_interval(point[AGREEMENT]) for point in points), strict=True)
        y, *up = zip(*(_interval(point[FACE]) for point in points), strict=True)
        colour = "black" if row in ENDS else colormaps["tab20"](number % 20)
        marker = "*" if row in ENDS else "os^Dv"[number % 5]
        bars = {"elinewidth": 0.6, "capsize": 1.5, "linewidth": 1.0, "label": row}
        axes.errorbar(x, y, up, across, marker=marker, markersize=6, color=colour, **bars)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def compression(report: Mapping[str, Any]) -> Figure:
    """Share of the gain in likeness that is left, by the numbers an autoencoder keeps."""
    figure, axes = _axes("numbers", "share of the gain that is left")
    kinds: dict[str, list[Mapping[str, float]]] = {}
    for name, row in report["rows"].items():
        kind, _, *changes = name.split(", ")
        if not changes:
            kinds.setdefault(kind, []).append(row)
    for number, (kind, rows) in enumerate(kinds.items()):
        rows.sort(key=itemgetter("numbers"))
        for style, (column, judge) in zip(("-", "--"), KEPT.items(), strict=True):
            drawn = [[row[name] for row in rows] for name in ("numbers", column)]
            axes.plot(*drawn, f"o{style}", color=f"C{number}", label=f"{kind}, {judge}")
    axes.set_xscale("log", base=2)
    axes.legend(fontsize=8)
    return figure


def seeds(report: Mapping[str, Any]) -> Figure:
    """Every training seed of every row, by both judges."""
    figure, axes = _axes("face similarity", "parameter error")
    found: dict[str, list[tuple[float, float]]] = {}
    for name, row in report["rows"].items():
        what, _, which = name.rpartition(", ")
        if which.startswith("seed "):
            found.setdefault(what, []).append((row[FACE], row["parameter_error"]))
    for what, points in found.items():
        axes.scatter(*zip(*points, strict=True), label=f"{what}, {len(points)} seeds")
    axes.legend(fontsize=8)
    return figure


def training(runs: Mapping[str, Mapping[str, list[float]]]) -> Figure:
    """Denoising loss by step of every run."""
    figure, axes = _axes("step", "denoising loss")
    for name, events in runs.items():
        axes.plot(events["step"], events["denoising"], linewidth=1, label=name)
    axes.set_yscale("log")
    axes.legend(fontsize=8)
    return figure


PLOTS = {
    "identity": ("the main table: likeness against prompt agreement", identity),
    "compression": ("of autoencoders: the share that is left", compression),
    "seeds": ("spread between training seeds", seeds),
}
"""Option to what it is and how it is drawn."""


def only(report: Mapping[str, Any], wanted: Sequence[str] | None) -> Mapping[str, Any]:
    """A report with those of its people's rows that are wanted, see `rows.wanted_row`."""
    people = {
        name: columns
        for name, columns in report.get("per_identity", {}).items()
        if name in ENDS or wanted_row(name.split(TIMES)[0], wanted)
    }
    return {**report, "per_identity": people}


def read_report(path: Path) -> dict[str, Any]:
    """A report's JSON.

    Raises:
        ConfigError: it is none.
    """
    report = parse_json(path.read_bytes(), path.name)
    if not isinstance(report, dict) or "rows" not in report:
        raise ConfigError(f"{path.name} is no report; write one with --json.")
    return report


def read_events(folder: Path) -> dict[str, list[float]]:
    """Steps and denoising losses that a run has logged.

    Raises:
        ConfigError: it has logged none.
    """
    path = folder / EVENTS
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    events = [parse_json(line.encode(), path.name) for line in lines]
    found = [event for event in events if "denoising" in event]
    if not found:
        raise ConfigError(f"There is no training run with a denoising loss in {folder}.")
    return {name: [float(event[name]) for event in found] for name in ("step", "denoising")}


def save(figure: Figure, path: Path) -> Path:
    """Writes a plot, whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI, bbox_inches="tight")
    return path


def _axes(across: str, up: str) -> tuple[Figure, Axes]:
    """An empty plot; a figure of its own, so nothing is kept of it when it is written."""
    figure = Figure(figsize=SIZE)
    axes = figure.subplots()
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(alpha=0.3)
    return figure, axes


def _interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and how far the interval reaches below and above it."""
    found = bootstrap_interval(torch.tensor(values, dtype=torch.float64), draws=2000)
    return found.value, found.value - found.low, found.high - found.value
