"""Adds LoRAs to a store in two processes that are killed at random moments, until both are done.

Called by test_lora_store.py with the folder of the store and a seed; writes how many were killed.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

from test_lora_store import LAYOUT, lora

from difflora_core.data.lora_store import NewLoRA, StoreWriter

COUNT = 60
"""So many that a writer takes long beside the time that a process needs to begin."""


def child(folder: Path, share: int) -> int:
    """A process that adds every second LoRA, those alone that are not there."""
    number = os.fork()
    if number:
        return number
    try:
        writer = StoreWriter(folder, LAYOUT, "weights")
        done = {row.identity for row in writer.rows()}
        for identity in map(str, range(share, COUNT, 2)):
            if identity not in done:
                writer.add([NewLoRA(identity, lora(int(identity)), 0.5)])
        os._exit(0)
    finally:
        os._exit(1)


def main(folder: Path, seed: int) -> None:
    """Kills both after at most half of the time that one takes undisturbed.

    The first of a few that are timed also pays for what a process needs once. The time grows from
    kill to kill, so that both get through on a machine or disk that has become slower since.
    """
    draw, killed, lengths = random.Random(seed), 0, []
    for number in range(3):
        start = time.monotonic()
        os.waitpid(child(folder.with_name(f"undisturbed-{number}"), 0), 0)
        lengths.append(time.monotonic() - start)
    length = min(lengths)
    while True:
        children = [child(folder, share) for share in (0, 1)]
        time.sleep(draw.uniform(0, length / 2))
        for number in children:
            os.kill(number, signal.SIGKILL)
        ends = [os.WIFSIGNALED(os.waitpid(number, 0)[1]) for number in children]
        killed += sum(ends)
        if not any(ends):
            break
        length *= 1.05
        if killed > 300:
            raise RuntimeError("Nothing gets done between two kills.")
    sys.stdout.write(str(killed))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
