"""Runs tests in the oldest ComfyUI that the pack works with: run by `make test-oldest`.

It lies in the cache; everything else is that of the usual set-up.
"""

from __future__ import annotations

import os
import subprocess
import sys

import setup

OLDEST = setup.Release(
    "0.24.0", "2.4.0", "d3b3431ce2a40be7213a329ec8874e72f2bd2faf199ace7f793d8ff8ac68a557"
)
TESTS = (
    *("comfy_server", "quickstart", "personalize", "lora", "save_lora", "word_places"),
    *("clip_layers", "shipped_styles", "faces", "library"),
)
"""Files of tests/nodes that ask for nothing which only later versions have."""


def main() -> int:
    """Unpack, then test."""
    folder = setup.CACHE / f"comfyui-{OLDEST.version}"
    if not folder.exists():
        setup.unpack(OLDEST, folder)
    tests = [f"tests/nodes/test_{name}.py" for name in TESTS]
    command = [setup.venv_python(), "-m", "pytest", *sys.argv[1:], *tests]
    variables = {**os.environ, "COMFYUI_PATH": str(folder)}
    return subprocess.run(command, cwd=setup.ROOT, env=variables).returncode


if __name__ == "__main__":
    sys.exit(main())
