"""`python -m difflora_core COMMAND ...`: finds the command, runs it, and says how it ended."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from rich.console import Console

from ..errors import DiffLoRAError, InterruptedTraining, shown
from .options import read_settings
from .registry import COMMANDS, listing

DONE, FAILED, MISUSED = 0, 1, 2
SIGNALLED = 128
"""Exit status of a program that a signal ended, beside the number of the signal."""


def main(arguments: Sequence[str]) -> int:
    """Runs the command that is named first.

    Returns:
        The exit status: 0 done, 1 failed with a sentence, 2 for words that make no command, 130
        and 143 stopped by Ctrl-C and SIGTERM.
    """
    name, *words = arguments or ("",)
    says, complains = plain_console(), plain_console(stderr=True)
    if name in ("-h", "--help"):
        says.print(listing())
        return DONE
    if name not in COMMANDS:
        complains.print(f"There is no command {shown(name)}.\n" * bool(name) + listing())
        return MISUSED
    with _stops() as received, warnings.catch_warnings():
        if not sys.warnoptions:  # notices of libraries to their programmers
            warnings.simplefilter("ignore")
        try:
            module = importlib.import_module(f".{name}", __package__)
            settings = read_settings(module.Settings, words, f"python -m difflora_core {name}")
            module.run(settings, says)
        except DiffLoRAError as error:
            if not isinstance(error, InterruptedTraining):
                complains.print(f"{name}: {error}")
                return FAILED
            complains.print(f"{name} was {error}.")
        except KeyboardInterrupt:
            complains.print(f"{name} was stopped; run it again to go on with what is left.")
        except BrokenPipeError:  # whoever read along has left
            received.append(signal.SIGPIPE)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        else:
            return DONE
    return SIGNALLED + (received or [signal.SIGINT])[0]


def plain_console(stderr: bool = False) -> Console:
    """A console that prints text as it is: no markup, no colours of its own, no broken lines."""
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)


@contextmanager
def _stops() -> Iterator[list[int]]:
    """SIGTERM stops a command as Ctrl-C does; gives the list of what came.

    In the background of a script Ctrl-C is ignored, and SIGTERM must still be heard.
    """
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        as_ctrl_c = signal.getsignal(signal.SIGINT)
        if not callable(as_ctrl_c):
            raise KeyboardInterrupt
        as_ctrl_c(signal.SIGINT, frame)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)
