"""One prompt in ComfyUI: seconds of each node, the most memory, and its pictures."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from difflora_core.comfy_client import ComfyPromptError, NodeProgress, PromptResult
from difflora_core.demo.comfyui.server import ComfyServer

HOUR = 3600.0


@dataclass
class NodeClock:
    """Seconds of each node type from the events of a run; hand it over as `on_progress`.

    `begun`: ids of the nodes that were run.
    """

    prompt: Mapping[str, Mapping[str, Any]]
    seconds: dict[str, float] = field(default_factory=dict)
    begun: set[str] = field(default_factory=set)
    _node: str | None = None
    _begun: float = 0.0

    def __call__(self, event: NodeProgress) -> None:
        """A node begins, or goes on."""
        if event.node_id != self._node:
            self.stop()
            self.begun.add(event.node_id)
            self._node, self._begun = event.node_id, time.monotonic()

    def stop(self) -> None:
        """The run is over, or the next node begins."""
        if self._node is not None:
            name = self.prompt.get(self._node, {}).get("class_type", self._node)
            spent = time.monotonic() - self._begun
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
        self._node = None


class PeakMemory:
    """The most memory of its own that a process holds while a block runs, in GB.

    Pages of files that it maps are not counted where the system tells them apart (Linux): it drops
    them when memory is short. It looks every tenth of a second.
    """

    def __init__(self, pid: int) -> None:
        self.process, self.gigabytes = psutil.Process(pid), 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            try:
                info = self.process.memory_info()
            except psutil.NoSuchProcess:
                return
            held = info.rss - getattr(info, "shared", 0)
            self.gigabytes = max(self.gigabytes, held / 1e9)
            if self._over.wait(0.1):
                return


@dataclass(frozen=True)
class Measured:
    """A finished run: what it made, seconds by node type, and the most memory in GB."""

    result: PromptResult
    seconds: Mapping[str, float]
    peak_gb: float


def run(
    server: ComfyServer, prompt: Mapping[str, Mapping[str, Any]], info: Mapping[str, Any]
) -> Measured:
    """Run a prompt to its end.

    Args:
        server: it runs.
        prompt: in API form.
        info: ComfyUI's /object_info.

    Raises:
        ComfyPromptError: a node refused or failed, or ComfyUI left a part of the graph out because
            a node in it refused its inputs.
        ComfyServerError: ComfyUI does not run.
    """
    clock = NodeClock(prompt)
    with PeakMemory(server.running_pid()) as memory:
        result = server.client.run(prompt, clock, timeout=HOUR)
        clock.stop()
    wanted = {key for key, node in prompt.items() if info[node["class_type"]]["output_node"]}
    if left_out := wanted - clock.begun - result.cached:
        names = ", ".join(f"{key} ({prompt[key]['class_type']})" for key in sorted(left_out))
        raise ComfyPromptError(f"ComfyUI did not run {names}: something before it was refused.")
    return Measured(result, clock.seconds, memory.gigabytes)


def difference(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
    """Mean difference of two pictures in grey levels, 0 to 255."""
    return float(np.abs(first.astype(np.float64) - second.astype(np.float64)).mean())
