"""Makes sure that there is a Chromium for the front-end checks: run by make after the set-up.

One that is there is taken. Where this is root on a Debian, it is installed; elsewhere one line
says what will not be checked and how to change that. That is never an error here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from difflora_core.demo.comfyui.browser import HOW_TO_INSTALL, find_chromium  # noqa: E402

TRIED = ROOT / ".cache" / "browser-not-installed.txt"
PACKAGES = ("chromium", "fonts-dejavu-core", "fonts-wqy-microhei")
COMMANDS = (
    ("apt-get", "update", "--quiet"),
    ("apt-get", "install", "--yes", "--quiet", "--no-install-recommends", *PACKAGES),
)


def say(text: str) -> None:
    """One line of progress."""
    sys.stdout.write(f"browser: {text}\n")
    sys.stdout.flush()


def may_install() -> bool:
    """True as root on a system with Debian's packages (Ubuntu's chromium is a snap)."""
    release = Path("/etc/os-release")
    is_debian = release.exists() and "ID=debian" in release.read_text().splitlines()
    return is_debian and os.geteuid() == 0 and shutil.which("apt-get") is not None


def install() -> None:
    """Installs Chromium; a failure is kept, so that the next run does not try again."""
    say("installing Chromium (once)")
    for command in COMMANDS:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        if result.returncode:
            TRIED.write_text(result.stdout + result.stderr)
            say(f"{' '.join(command[:2])} failed, see {TRIED.relative_to(ROOT)}")
            return


def main() -> None:
    """Finds or installs it."""
    wanted = "CHROMIUM" not in os.environ and not TRIED.exists()
    if find_chromium() is None and wanted and may_install():
        install()
    if find_chromium() is None:
        say(HOW_TO_INSTALL)


if __name__ == "__main__":
    main()
