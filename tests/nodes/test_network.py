"""Nothing asks the network: every ComfyUI of these tests refuses, and writes down who tried.

What it wrote is compared with nothing when the server ends, see `comfy_server`.
"""

import os
import subprocess
import sys
from pathlib import Path

import psutil

PROGRAM = """
import socket, urllib.request
with socket.socket() as local:
    local.bind(("127.0.0.1", 0))
    local.listen()
    socket.create_connection(local.getsockname()).close()
for ask in (
    lambda: urllib.request.urlopen("https://huggingface.co"),
    lambda: socket.create_connection(("192.0.2.1", 80), timeout=1),
):
    try:
        ask()
    except OSError:
        continue
    raise SystemExit("it answered")
"""


def test_the_watch_sees_names_and_addresses(watched):
    """And lets this machine talk to itself."""
    variables = watched()
    environment = {**os.environ, **variables}
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, env=environment, timeout=60)
    asked = Path(variables["ASKED"]).read_text("utf-8").splitlines()
    assert [line.split(" by ")[0] for line in asked] == ["huggingface.co", "192.0.2.1"]


def test_the_server_is_watched(comfy_server):
    variables = psutil.Process(comfy_server.pid).environ()
    assert "no_network" in variables["PYTHONPATH"]
    assert variables["HF_HUB_OFFLINE"] == "0"
