"""Runs `corpus` in child processes that are killed at random moments, then once to its end.

Called by test_corpus.py with a seed, a number of kills, the folder and the words of the command.
One process imports everything; its children are forks, so that they start at once. Where a child
comes to its end before there were enough kills, all begins anew: the number does not depend on the
speed of the machine.
"""

import os
import random
import shutil
import signal
import sys
import time

import datasets

from difflora_core.commands import corpus
from difflora_core.commands.main import main as run

SHARE = 0.7
"""A child is killed after at most this share of the time that an undisturbed one takes."""


def child(folder: str, words: list[str]) -> int:
    """A process that makes the corpus."""
    number = os.fork()
    if number:
        return number
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os._exit(run(["corpus", words[0], folder, *words[1:]]))


def ended(number: int) -> int:
    """Status of a process that ends by itself."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def main(seed: str, kills: str, folder: str, *words: str) -> None:
    """One undisturbed run beside, then kills, then the end."""
    draw, killed = random.Random(int(seed)), 0
    start = time.monotonic()
    assert ended(child(f"{folder}-whole", list(words))) == 0
    length = time.monotonic() - start
    while killed < int(kills):
        number = child(folder, list(words))
        time.sleep(draw.uniform(0, SHARE * length))
        os.kill(number, signal.SIGKILL)
        if ended(number) == -signal.SIGKILL:
            killed += 1
        elif killed < int(kills):
            shutil.rmtree(folder)
    assert ended(child(folder, list(words))) == 0


if __name__ == "__main__":
    assert datasets
    assert corpus
    main(*sys.argv[1:])
