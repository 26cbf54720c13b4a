"""Several processes that train together: who they are, what they share, how they stop (ours).

Every process holds the same weights and draws the same batch of a step; each computes its own part
of it. They speak to each other only between the parts of the loop, never inside them: gradients
are averaged after the backward pass and not, as in DistributedDataParallel, during it. So a process
that fails inside its step can still tell the others, which would otherwise wait for it for ever.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from .. import errors
from ..errors import ConfigError, DiffLoRAError, InterruptedTraining

T = TypeVar("T")

_GOODBYE = timedelta(seconds=10)
"""How long a process waits at its end for the others."""
_BUCKET = 2**24
"""Numbers that are sent at once."""


@dataclass(frozen=True)
class Processes:
    """This process among those of a run; `device` is what the launcher gave it, if one did."""

    rank: int = 0
    count: int = 1
    device: torch.device | None = None

    @property
    def is_main(self) -> bool:
        """True for the one that writes files and speaks to the caller."""
        return self.rank == 0

    def __str__(self) -> str:
        return f"process {self.rank + 1} of {self.count}"

    def together(self, work: Callable[[], T]) -> T:
        """Do something on every process; all stop when one fails.

        Raises:
            BaseException: see `agree`.
        """
        error = None
        try:
            result = work()
        except (Exception, KeyboardInterrupt) as raised:
            error = raised
        self.agree(error)
        return result

    def on_main(self, work: Callable[[], object]) -> None:
        """Do something on the main process; all go on when it is done, and stop when it fails."""
        self.together(work if self.is_main else lambda: None)

    def agree(self, error: BaseException | None) -> None:
        """Go on only if no process has an error; all call this at the same place.

        Raises:
            BaseException: its own error, or one that says what happened to another process. An
                error counts more than a stop, so that all take the same way out.
        """
        self.agree_on(error, [])

    def agree_on(self, error: BaseException | None, numbers: Sequence[float]) -> list[float]:
        """Like `agree`; returns the sums of numbers over all processes, in one message."""
        if isinstance(error, KeyboardInterrupt):
            error = InterruptedTraining("stopped from the keyboard")
        if self.count == 1:
            if error is not None:
                raise error
            return list(numbers)
        status = torch.tensor([float(error is not None), *numbers], dtype=torch.float64)
        failed, *sums = self._sum(status).tolist()
        if failed:
            self._raise_together(error)
        return sums

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors (...) by their means over all processes, which give equal shapes."""
        if self.count == 1:
            return
        for kind in sorted({t.dtype for t in tensors}, key=str):
            bucket: list[Tensor] = []
            for tensor in [t for t in tensors if t.dtype == kind]:
                bucket.append(tensor)
                if sum(t.numel() for t in bucket) >= _BUCKET:
                    self._average(bucket)
                    bucket = []
            self._average(bucket)

    def from_main(self, value: float) -> float:
        """The main process's value of a number."""
        return self.agree_on(None, [value if self.is_main else 0.0])[0]

    def gathered(self, value: object) -> list[object]:
        """One object of every process, in the order of their ranks."""
        if self.count == 1:
            return [value]
        found: list[object] = [None] * self.count
        dist.all_gather_object(found, value)
        return found

    @torch.no_grad()
    def _average(self, bucket: Sequence[Tensor]) -> None:
        if not bucket:
            return
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        dist.all_reduce(flat)
        flat /= self.count
        for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def _sum(self, numbers: Tensor) -> Tensor:
        there = numbers.to(self.device) if self.device is not None else numbers
        dist.all_reduce(there)
        return there.cpu()

    def _raise_together(self, error: BaseException | None) -> None:
        """Raise on every process, each naming the one where it happened."""
        kind = "stop" if isinstance(error, InterruptedTraining) else "error"
        kind = kind if error is not None else ""
        gathered = self.gathered((kind, type(error).__name__, str(error)))
        reports = [
            (rank, *report) for rank, report in enumerate(gathered) if isinstance(report, tuple)
        ]
        worst = "error" if any(kind == "error" for _, kind, _, _ in reports) else "stop"
        if error is not None and kind == worst:
            raise error
        rank, _, name, message = next(report for report in reports if report[1] == worst)
        where = f"process {rank + 1} of {self.count}"
        if worst == "stop":
            raise InterruptedTraining(f"stopped by {where}: {message}")
        own = getattr(errors, name, None)
        if isinstance(own, type) and issubclass(own, DiffLoRAError):
            raise own(message if where in message else f"{message} ({where})")
        raise DiffLoRAError(f"Training stopped because {where} failed: {name}: {message}")


def launched() -> Processes:
    """This process, as `accelerate launch` or `torchrun` started it; alone when neither did."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if not (several or (dist.is_available() and dist.is_initialized())):
        return Processes()
    from accelerate import PartialState

    began = dist.is_initialized()
    state = PartialState(cpu=not torch.cuda.is_available())
    if not began:
        atexit.register(_leave)
    return Processes(state.process_index, state.num_processes, state.device)


def _leave() -> None:
    """End the group before the interpreter does, and no sooner than the others are done.

    A process that leaves while another still speaks to it makes gloo's threads abort there. One
    that failed may never come, so the wait has an end.
    """
    if not dist.is_initialized():
        return
    with suppress(RuntimeError):
        dist.monitored_barrier(timeout=_GOODBYE) if dist.get_backend() == "gloo" else dist.barrier()
    dist.destroy_process_group()


def split(batch: dict[str, object], parts: int) -> list[dict[str, object]]:
    """Cut a batch into equal parts along its samples.

    Tensors with a dimension and lists hold one entry for each sample; all else (numbers, scalars,
    texts, tuples) belongs to every part.

    Raises:
        ConfigError: it cannot be cut evenly.
    """
    if parts == 1:
        return [batch]
    sized = {name: part for name, part in batch.items() if _has_samples(part)}
    counts = {len(part) for part in sized.values()}  # type: ignore[arg-type]
    if len(counts) != 1 or next(iter(counts)) % parts:
        found = " and ".join(str(count) for count in sorted(counts)) or "no"
        raise ConfigError(
            f"A step has {found} samples; they cannot be shared evenly by {parts} parts "
            "(processes times accumulate). Choose a batch that is a multiple of "
            f"{parts}, or fewer processes or parts."
        )
    size = next(iter(counts)) // parts
    return [
        {
            name: part[k * size : (k + 1) * size] if name in sized else part  # type: ignore[index]
            for name, part in batch.items()
        }
        for k in range(parts)
    ]


def _has_samples(part: object) -> bool:
    return isinstance(part, list) or (isinstance(part, Tensor) and part.ndim > 0)


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """A first Ctrl-C lets the step end, so that it can be saved; a second one acts at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    usual = signal.getsignal(signal.SIGINT) or signal.SIG_DFL

    def ask(number: int, frame: FrameType | None) -> None:
        del number, frame
        asked.set()
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, usual)
