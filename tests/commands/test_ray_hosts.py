"""A Ray cluster of hosts with networks of their own, one of which is unplugged in the middle.

Every host is a network namespace with an address on one bridge, so what they say to each other
goes over the network, and a host can fall silent without a process ending. That takes root, and
minutes: Ray waits for a silent host before it gives it up.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from difflora_core.data.lora_store import LoRAStore
from difflora_core.demo import paths
from difflora_core.demo.world.identities import split_seeds
from difflora_core.demo.world.scenes import render_portraits
from difflora_core.storage.image_files import write_image

PEOPLE, PICTURES = 12, 4
PORT = 6379
PATIENCE = 400
"""Seconds that a command may take, with the minute that Ray waits for a silent host."""
pytestmark = pytest.mark.slow


def run(*words):
    """A command that has to end well."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(map(str, words))}: {done.stdout[-300:]} {done.stderr[-300:]}"
        )


class Hosts:
    """Hosts of a cluster; the first holds its head, and no worker."""

    def __init__(self, cleanup):
        self.mark = f"d{os.getpid() % 10**7}"
        run("ip", "link", "add", self.mark, "type", "bridge")
        cleanup.callback(run, "ip", "link", "delete", self.mark)
        run("ip", "link", "set", self.mark, "up")
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))  # a socket's path must be short
        cleanup.callback(shutil.rmtree, self.folder, ignore_errors=True)
        self.cleanup = cleanup

    @staticmethod
    def address(number):
        return f"10.77.0.{10 + number}"

    def add(self, number):
        """A host with one core, plugged in and in the cluster."""
        name, plug = f"{self.mark}-{number}", f"{self.mark}v{number}"
        run("ip", "netns", "add", name)
        self.cleanup.callback(run, "ip", "netns", "delete", name)
        self.cleanup.callback(self.kill, number)
        run("ip", "link", "add", plug, "type", "veth", "peer", "name", "eth0", "netns", name)
        run("ip", "link", "set", plug, "master", self.mark, "up")
        run("ip", "-n", name, "addr", "add", f"{self.address(number)}/24", "dev", "eth0")
        for link in ("eth0", "lo"):
            run("ip", "-n", name, "link", "set", link, "up")
        role = ["--address", f"{self.address(0)}:{PORT}", "--num-cpus", "1"]
        if not number:
            role = ["--head", "--port", str(PORT), "--num-cpus", "0", "--include-dashboard=false"]
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats"]
        place = ["--node-ip-address", self.address(number), "--temp-dir", self.folder / str(number)]
        run("ip", "netns", "exec", name, *ray, *role, *place, "--object-store-memory=100000000")

    def unplug(self, number):
        """Nothing that it says arrives, and nothing reaches it; its processes go on."""
        run("ip", "link", "set", f"{self.mark}v{number}", "down")

    def kill(self, number):
        """Every process of it, at once."""
        name = f"{self.mark}-{number}"
        found = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True)
        for pid in found.stdout.split():
            subprocess.run(["kill", "-9", pid], check=False, capture_output=True)

    def start(self, *words):
        """One of our commands on the first host."""
        command = [sys.executable, "-m", "difflora_core", *map(str, words)]
        return subprocess.Popen(
            ["ip", "netns", "exec", f"{self.mark}-0", *command],
            cwd=paths.ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_ADDRESS": ""},
        )


@pytest.fixture
def hosts():
    """A head and two hosts that work."""
    pytest.importorskip("ray")
    with ExitStack() as cleanup:
        try:
            made = Hosts(cleanup)
        except (OSError, RuntimeError) as reason:
            pytest.skip(f"hosts of their own need root and network namespaces: {reason}")
        for number in range(3):
            made.add(number)
        yield made


@pytest.fixture
def photos(tmp_path):
    """A folder of drawn portraits for each person."""
    for who, seed in enumerate(split_seeds("train", PEOPLE, 90)):
        own = render_portraits([seed] * PICTURES, range(PICTURES), looks=("photo",))
        for number, image in enumerate(own.images):
            path = tmp_path / "photos" / f"p{who:02}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_image(image, path)
    return tmp_path / "photos"


def files(folder):
    """What must not depend on who made it."""
    kept = ("data-*.arrow", "prepare.json", "shards/*", "index.*")
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for pattern in kept
        for path in sorted(folder.glob(pattern))
    }


def until(condition, process):
    """Waits while a process runs."""
    while not condition():
        assert process.poll() is None, "it ended before that"
        time.sleep(0.02)


def test_hosts_that_fall_silent(hosts, photos, tmp_path):
    """One is unplugged while corpus trains: the bytes of one process, nobody twice or missing."""
    words = ["--faces", paths.FACES, "--resolution", 64, "--smallest-face", 12]
    words += ["--encoding", "png", "--choices.same-person", 0.3]
    train = ["--base", "demo", "--rank", 4, "--group", 1, "--training.steps", 20]
    train += ["--training.no-checkpointing", "--training.precision", "no"]
    cluster = ["--ray", f"{hosts.address(0)}:{PORT}", "--workers", 2]
    for name, more in (("alone", ["--workers", 1]), ("hosts", cluster)):
        done = hosts.start("prepare", photos, tmp_path / name, *words, *more)
        assert done.wait(PATIENCE) == 0
    assert files(tmp_path / "hosts") == files(tmp_path / "alone")
    alone = hosts.start("corpus", tmp_path / "alone", tmp_path / "loras-alone", *train)
    assert alone.wait(PATIENCE) == 0
    place = tmp_path / "loras-hosts"
    running = hosts.start("corpus", tmp_path / "alone", place, *train, *cluster)
    until(lambda: list((place / "shards").glob("*")), running)
    hosts.unplug(2)
    assert running.wait(PATIENCE) == 0
    assert files(place) == files(tmp_path / "loras-alone")
    assert [row.identity for row in LoRAStore(place).rows] == [f"p{n:02}" for n in range(PEOPLE)]
