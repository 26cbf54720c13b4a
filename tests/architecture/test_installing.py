"""`pip install -r requirements.txt` in three usual environments: what is there stays.

A real pip judges stand-ins of packages, with the names, versions and requirements of the real ones;
newer versions and other flavours of everything lie at hand.
"""

import os
import subprocess
import sys
import venv
import zipfile

import pytest

FACES = (
    *("Pillow", "albumentations", "cython", "easydict", "matplotlib", "numpy", "onnx"),
    *("prettytable", "requests", "scikit-image", "scikit-learn", "scipy", "tqdm"),
)
"""What insightface 0.7.3 asks for: no onnxruntime and no OpenCV, which its users choose."""
OFFERED = {
    "insightface": ("2.1.0", ("numpy", "onnxruntime", "opencv-python")),
    "onnxruntime": ("1.30.0", ("numpy",)),
    "opencv-python": ("5.0.0", ("numpy",)),
    "numpy": ("2.4.0", ()),
    "torch": ("2.12.0", ()),
    "diffusers": ("0.40.0", ("numpy",)),
    "peft": ("0.20.0", ("numpy", "torch")),
    "transformers": ("5.30.0", ("numpy",)),
    "accelerate": ("1.20.0", ("numpy", "torch")),
    "safetensors": ("0.8.0", ()),
    "filelock": ("3.30.0", ()),
    "rich": ("15.0.0", ()),
}
COMFYUI = {"numpy": "1.26.4", "torch": "2.7.1", "transformers": "4.57.0", "safetensors": "0.5.3"}
OURS = {"diffusers": "0.36.0", "peft": "0.18.0", "accelerate": "1.10.0", "filelock": "3.20.3"}
OURS["rich"] = "14.0.0"
ENVIRONMENTS = {
    "faces on a GPU, of other packs": {
        **COMFYUI, **OURS, **dict.fromkeys(FACES, "1.26.4"), "insightface": "0.7.3",
        "onnxruntime-gpu": "1.22.0", "opencv-contrib-python-headless": "4.11.0",
    },
    "faces on the CPU, of other packs": {
        **COMFYUI, **OURS, "insightface": "2.1.0", "onnxruntime": "1.22.0",
        "opencv-python": "4.11.0",
    },
    "ComfyUI alone": COMFYUI,
}  # fmt: skip
ADDED = {"ComfyUI alone": {*OURS, "insightface", "onnxruntime", "opencv-python"}}


def metadata(name, version, needs=()):
    """What pip reads of a package."""
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    return "\n".join([*lines, *(f"Requires-Dist: {need}" for need in needs), ""])


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """A folder that pip may take packages from."""
    folder = tmp_path_factory.mktemp("wheels")
    for name, (version, needs) in OFFERED.items():
        stem = f"{name.replace('-', '_')}-{version}"
        info = f"{stem}.dist-info"
        with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{info}/METADATA", metadata(name, version, needs))
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    return folder


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_what_is_there_stays(root, tmp_path, wheels, name):
    venv.create(tmp_path / "env", with_pip=False)
    (packages,) = (tmp_path / "env").glob("[Ll]ib/**/site-packages")
    for package, version in ENVIRONMENTS[name].items():
        needs = FACES if (package, version) == ("insightface", "0.7.3") else ()
        needs = OFFERED["insightface"][1] if version == "2.1.0" else needs
        info = packages / f"{package.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(metadata(package, version, needs))
    (python,) = (tmp_path / "env").glob("*/python" if os.name != "nt" else "*/python.exe")
    said = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "--python", str(python), "install", "--dry-run"),
            *("--no-index", "--find-links", str(wheels), "-r", str(root / "requirements.txt")),
        ],
        capture_output=True,
        text=True,
    )
    assert said.returncode == 0, said.stderr
    lines = [line for line in said.stdout.splitlines() if line.startswith("Would install")]
    added = {item.rsplit("-", 1)[0].lower() for line in lines for item in line.split()[2:]}
    assert {item.replace("_", "-") for item in added} == ADDED.get(name, set())
