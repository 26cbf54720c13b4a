"""Prepares in child processes that are killed at random moments until one comes to its end.

Called by test_kills.py with the folder of pictures, that of the datasets, a command for captions,
a seed and a number of kills; datasets are begun one after another until so many children were
killed. One process imports everything; its children are forks, so that they start at once.
"""

import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import datasets
import insightface.app
from conftest import demo_settings

from difflora_core.data import prepare as module
from difflora_core.data import prepared, shards

SHARE = 0.5
"""A child is killed after at most this share of the time that an undisturbed one takes."""


def child(place: str, folder: str, command: str) -> int:
    """A process that prepares."""
    number = os.fork()
    if number:
        return number
    module.prepare(place, folder, replace(demo_settings(), caption_command=command))
    os._exit(0)


def until_whole(place: str, folder: Path, command: str, longest: float, draw: random.Random) -> int:
    """Kills until a child is faster; returns how many were killed.

    The time grows from kill to kill: so does what a child has to look through when it begins.
    """
    killed = 0
    while True:
        number = child(place, str(folder), command)
        time.sleep(draw.uniform(0, longest))
        os.kill(number, signal.SIGKILL)
        _, status = os.waitpid(number, 0)
        if (folder / prepared.FACTS).exists():
            prepared.PreparedDataset(folder)  # what is there is whole
        if not os.WIFSIGNALED(status):
            assert status == 0
            return killed
        killed += 1
        longest *= 1.05


def main(place: str, folder: str, command: str, seed: str, kills: str) -> None:
    """Small steps, so that there is much between two of them."""
    module.LOOKS = 2
    prepared.SHARD_ROWS = shards.SHARD_ROWS = module.SHARD_ROWS = 4
    start = time.monotonic()
    os.waitpid(child(place, str(Path(folder) / "undisturbed"), command), 0)
    longest = SHARE * (time.monotonic() - start)
    draw, killed, number = random.Random(int(seed)), 0, 0
    while killed < int(kills):
        number += 1
        killed += until_whole(place, Path(folder) / f"killed {number}", command, longest, draw)


if __name__ == "__main__":
    assert datasets
    assert insightface.app
    main(*sys.argv[1:])
