"""TensorBoard and the other trackers that accelerate knows, for a run that asks for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..config import Config
from ..errors import ConfigError, shown
from ..training.hooks import Progress
from ..training.processes import launched


@contextmanager
def tracked(
    names: Sequence[str], folder: Path, settings: Config, progress: Progress
) -> Iterator[Progress]:
    """A progress that is also told to trackers.

    Args:
        names: of accelerate's trackers: "tensorboard", "wandb", ….
        folder: where those that write files write them.
        settings: of the run.
        progress: told as well.

    Raises:
        ConfigError: a tracker is unknown, or its package is not installed.
    """
    if not names or not launched().is_main:
        yield progress
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    installed = [str(name) for name in get_available_trackers()]
    trackers: list[Any] = []
    for name in names:
        if name not in installed:
            raise ConfigError(
                f"The tracker {shown(name)} is unknown or not installed; there are "
                f"{', '.join(installed) or 'none'}."
            )
        kind = LOGGER_TYPE_TO_CLASS[name]
        place = {"logging_dir": str(folder)} if kind.requires_logging_directory else {}
        tracker = kind(folder.name, **place)
        getattr(tracker, "start", lambda: None)()
        tracker.store_init_configuration(dict(_flat(settings.to_dict())))
        trackers.append(tracker)

    def report(step: int, total: int, metrics: dict[str, float]) -> None:
        for tracker in trackers:
            tracker.log(metrics, step=step)
        progress(step, total, metrics)

    try:
        yield report
    finally:
        for tracker in trackers:
            tracker.finish()


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values of settings, as trackers take them: numbers, truths and texts."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            plain = isinstance(value, int | float | str | bool)
            yield f"{prefix}{name}", value if plain else str(value)
