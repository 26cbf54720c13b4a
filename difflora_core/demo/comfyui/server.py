"""Real ComfyUI as a subprocess, and a client of its HTTP and websocket interface.

Used by `make demo`, `make workflows`, `make comfyui` and the tests. Nothing of ComfyUI is imported:
the pack is judged from outside, as an artist's browser would.
"""

import logging
import os
import socket
import subprocess
import sys
import time
import urllib.error
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
from rich.console import Console

from ...comfy_client import ComfyClient
from ...errors import DiffLoRAError
from .workflow_api import PACK

logger = logging.getLogger(__name__)

FAILED_PACK = ("Cannot import", "Error while calling comfy_entrypoint", "Skip ")


class ComfyServerError(DiffLoRAError):
    """ComfyUI did not start, or did not take the pack."""


def comfyui_folder() -> Path:
    """ComfyUI's folder: `COMFYUI_PATH`, or the one that the set-up unpacked.

    Raises:
        ComfyServerError: no ComfyUI is there.
    """
    folder = Path(os.environ.get("COMFYUI_PATH", PACK / ".comfyui")).resolve()
    if not (folder / "main.py").exists():
        raise ComfyServerError(
            f"No ComfyUI in {folder}: run 'make setup', or set COMFYUI_PATH to the folder of yours."
        )
    return folder


def free_port() -> int:
    """A TCP port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ComfyServer:
    """A ComfyUI of its own: own base directory, database in memory, this pack linked into it.

    Use it as a context manager; `client` talks to it, `output_directory` holds what it saves and
    `log_file` what it says.
    """

    def __init__(
        self,
        base_directory: Path,
        port: int | None = None,
        packs: Sequence[Path] = (PACK,),
        cpu: bool = True,
        arguments: Sequence[str] = (),
    ) -> None:
        """Says what to start; `start` starts it.

        Args:
            base_directory: holds models/, input/, output/, user/ and custom_nodes/; made if absent.
            port: TCP port on 127.0.0.1; None takes a free one.
            packs: folders linked into custom_nodes; this one under the name DiffLoRA.
            cpu: run on the CPU even where there is a GPU.
            arguments: further command line arguments for ComfyUI's main.py.
        """
        self.base_directory = base_directory.resolve()
        self.port = port or free_port()
        self.packs = packs
        self.arguments = [*(["--cpu"] if cpu else []), *arguments]
        self.log_file = self.base_directory / "comfyui.log"
        self.client = ComfyClient(f"http://127.0.0.1:{self.port}")
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "ComfyServer":
        """Starts ComfyUI and waits until it answers."""
        return self.start()

    def __exit__(self, *_: object) -> None:
        """Stops ComfyUI."""
        self.stop()

    @property
    def output_directory(self) -> Path:
        """Where save nodes write."""
        return self.base_directory / "output"

    @property
    def pid(self) -> int | None:
        """Its process, None while it does not run."""
        return self._process.pid if self._process else None

    def cpu_seconds(self) -> float:
        """Processor time that ComfyUI has taken, which other work on the machine does not stretch.

        Raises:
            ComfyServerError: it does not run.
        """
        times = psutil.Process(self.running_pid()).cpu_times()
        return float(times.user + times.system)

    def running_pid(self) -> int:
        """Its process.

        Raises:
            ComfyServerError: it does not run, or has ended by itself.
        """
        if self._process is None or self._process.poll() is not None:
            raise ComfyServerError("ComfyUI does not run.")
        return self._process.pid

    def start(self, timeout: float = 300.0) -> "ComfyServer":
        """Starts ComfyUI and returns when it answers.

        Args:
            timeout: seconds to wait; about 12 are usual.

        Raises:
            ComfyServerError: it ended, did not answer in time, or refused one of the packs.
        """
        folder = comfyui_folder()
        self._lay_out()
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "main.py", *self._command_line()],
                cwd=folder,
                env=self._environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            self._wait_until_ready(timeout)
            self._check_packs()
        except BaseException:
            self.stop()
            raise
        logger.info("ComfyUI answers at %s", self.client.url)
        return self

    def stop(self) -> None:
        """Ends ComfyUI; does nothing when it does not run."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def wait(self) -> int:
        """Waits until ComfyUI ends by itself and returns its exit status."""
        return self._process.wait() if self._process else 0

    def log_tail(self, lines: int = 15) -> str:
        """The last lines that ComfyUI wrote."""
        return "\n".join(self.log_file.read_text(errors="replace").splitlines()[-lines:])

    def _command_line(self) -> list[str]:
        """ComfyUI's arguments: nothing shared with another ComfyUI, no browser, no network."""
        return [
            "--port",
            str(self.port),
            "--base-directory",
            str(self.base_directory),
            "--database-url",
            "sqlite:///:memory:",
            "--disable-auto-launch",
            "--disable-api-nodes",
            *self.arguments,
        ]

    def _environment(self) -> Mapping[str, str]:
        """One thread unless asked otherwise: two on two shared cores are many times slower."""
        return {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **os.environ}

    def _lay_out(self) -> None:
        """Makes the base directory and links the packs into it."""
        for name in ("models", "input", "output", "temp", "user", "custom_nodes"):
            (self.base_directory / name).mkdir(parents=True, exist_ok=True)
        for pack in self.packs:
            name = "DiffLoRA" if pack.resolve() == PACK else pack.name
            link = self.base_directory / "custom_nodes" / name
            if link.is_symlink():
                link.unlink()
            link.symlink_to(pack.resolve(), target_is_directory=True)

    def _wait_until_ready(self, timeout: float) -> None:
        """Polls /system_stats."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                raise ComfyServerError(f"ComfyUI ended while starting:\n{self.log_tail()}")
            try:
                self.client.system_stats()
                return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.2)
        raise ComfyServerError(f"ComfyUI did not answer within {timeout:.0f} s:\n{self.log_tail()}")

    def _check_packs(self) -> None:
        """ComfyUI only logs that it dropped a pack; here that is an error."""
        folder = str(self.base_directory / "custom_nodes")
        for line in self.log_file.read_text(errors="replace").splitlines():
            if folder in line and any(phrase in line for phrase in FAILED_PACK):
                raise ComfyServerError(f"ComfyUI did not load the pack: {line.strip()}")


def main() -> int:
    """Starts ComfyUI for a browser."""
    console = Console(highlight=False)
    port = int(os.environ.get("PORT", "8188"))
    with ComfyServer(PACK / "output" / "comfyui", port=port) as server:
        console.print(f"ComfyUI is ready: {server.client.url}  (Ctrl+C ends it)")
        try:
            return server.wait()
        except KeyboardInterrupt:
            return 0


if __name__ == "__main__":
    sys.exit(main())
