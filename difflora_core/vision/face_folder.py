"""Check an insightface model folder before insightface sees it: no guess, no download.

insightface sorts the .onnx files by name and takes the first detector (five outputs or more) and
the first recogniser (square input of at least 112, a multiple of 16). We read the same from the
files, so that a missing or half-downloaded one is named.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

from ..config import parse_json
from ..errors import EncoderError, shown

PACKAGES = "antelopev2, buffalo_l or the free AuraFace"
OTHER_SIDES = (192, 96)  # landmark and age models, which the square-input rule would also take


@dataclass(frozen=True)
class FaceFolder:
    """What lies in one folder.

    Attributes:
        path: Absolute folder.
        files: Names of all model files, sorted as insightface sorts them.
        detector: The file insightface will use to find faces, or None.
        recogniser: The file it will use to recognise them, or None.
        unreadable: Files that are not ONNX models, e.g. cut short.
    """

    path: Path
    files: tuple[str, ...]
    detector: str | None
    recogniser: str | None
    unreadable: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """True when insightface can load the folder."""
        return bool(self.detector and self.recogniser) and not self.unreadable

    def problem(self) -> str:
        """What is wrong, as one sentence; empty when complete."""
        found = f"found {', '.join(self.files)}"
        if self.unreadable:
            return (
                f"{', '.join(self.unreadable)} in {self.path} cannot be read as an ONNX model, "
                f"probably a half download ({found}). Delete it and download the package again."
            )
        lacking = [
            text
            for text, file in (
                ("a detector (e.g. scrfd_10g_bnkps.onnx or det_10g.onnx)", self.detector),
                ("a recogniser (e.g. glintr100.onnx or w600k_r50.onnx)", self.recogniser),
            )
            if file is None
        ]
        if not lacking:
            return ""
        return (
            f"The insightface folder {self.path} lacks {' and '.join(lacking)}; {found}. "
            "Put all files of the package in that folder."
        )


def find_face_folder(directory: str | Path, name: str | None = None) -> FaceFolder:
    """Find the folder that really holds the model files.

    Looks in `directory`, `directory/name` and `directory/name/name` (some zip files unpack into a
    folder of their own name), and in `directory/models/...` as insightface lays it out.

    Args:
        directory: Where to look.
        name: Package name; by default the folder's own name, for the nested case.

    Returns:
        The first complete folder.

    Raises:
        EncoderError: Nothing there, or not complete; says what was found and what is missing.
    """
    base = Path(directory).expanduser().resolve()
    inner = name or base.name
    nested = [base / inner, base / inner / inner]
    roots = [base / "models" / inner, base / "models" / inner / inner]
    # A package asked for by name goes before whatever else lies in the folder.
    candidates = [*nested, *roots, base] if name else [base, *nested]
    folders = [read_face_folder(path) for path in candidates if path.is_dir()]
    for folder in folders:
        if folder.complete:
            return folder
    for folder in folders:
        if folder.files:
            raise EncoderError(folder.problem())
    raise EncoderError(_nothing_found(base, candidates))


def read_face_folder(path: Path) -> FaceFolder:
    """Read which models lie directly in a folder (or are named by its version-2 manifest).

    Raises:
        EncoderError: the manifest is damaged.
    """
    manifest = _manifest_files(path)
    if manifest is not None:
        return _packaged_folder(path, manifest)
    files = sorted(file for file in path.glob("*.onnx"))
    tasks = {file.name: _task(file) for file in files}

    def first(task: str) -> str | None:
        return next((name for name, found in tasks.items() if found == task), None)

    return FaceFolder(
        path=path.resolve(),
        files=tuple(tasks),
        detector=first("detection"),
        recogniser=first("recognition"),
        unreadable=tuple(name for name, found in tasks.items() if found == "unreadable"),
    )


def _task(file: Path) -> str:
    """detection, recognition, other or unreadable, by insightface's own rules of shape."""
    try:
        onnx = importlib.import_module("onnx")
    except ImportError as error:
        raise EncoderError(
            f"Face analysis needs the package onnx, which could not be loaded ({error}). "
            "In ComfyUI's Python run: python -m pip install 'insightface>=2' onnxruntime"
        ) from error
    try:
        graph = onnx.load_model(str(file), load_external_data=False).graph
    except Exception:  # protobuf's decoding error has different homes in different versions
        return "unreadable"
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    if not inputs or not graph.output or not graph.node:
        return "unreadable"
    if len(graph.output) >= 5:
        return "detection"
    sides = [axis.dim_value for axis in inputs[0].type.tensor_type.shape.dim][2:4]
    if len(inputs) > 1 or len(sides) != 2 or sides[0] != sides[1] or sides[0] in OTHER_SIDES:
        return "other"
    return "recognition" if sides[0] >= 112 and sides[0] % 16 == 0 else "other"


def _manifest_files(path: Path) -> dict[str, str] | None:
    """Task to file of a version-2 package (insightface 2.x), None when there is no such manifest.

    Other manifests are ignored, as insightface ignores them.

    Raises:
        EncoderError: a damaged one, which insightface might still follow.
    """
    try:
        content = (path / "manifest.json").read_bytes()
    except OSError:
        return None
    what = f"manifest.json of {shown(path.name)} (download the package again)"
    document = parse_json(content, what, EncoderError)
    if not isinstance(document, dict) or document.get("manifest_version") != 2:
        return None
    tasks = document.get("tasks")
    entries = tasks.items() if isinstance(tasks, dict) else ()
    return {task: str(entry.get("file")) for task, entry in entries if isinstance(entry, dict)}


def _packaged_folder(path: Path, files: dict[str, str]) -> FaceFolder:
    """A folder whose manifest names the files; those that are not there count as missing."""
    present = {task: file for task, file in files.items() if _is_inside(path, file)}
    return FaceFolder(
        path=path.resolve(),
        files=tuple(sorted(present.values())) or ("manifest.json",),
        detector=present.get("detection"),
        recogniser=present.get("recognition"),
        unreadable=tuple(file for file in present.values() if _task(path / file) == "unreadable"),
    )


def _is_inside(folder: Path, name: str) -> bool:
    """Whether a name from a manifest is that of a file in the folder or below it."""
    try:
        file = (folder / name).resolve()
        return file.is_file() and folder.resolve() in file.parents
    except (OSError, ValueError):  # too long, or no name at all
        return False


def _nothing_found(base: Path, candidates: list[Path]) -> str:
    """The sentence for a folder without any model file."""
    if not base.is_dir():
        start = f"The insightface folder {base} does not exist."
    else:
        looked = ", ".join(str(path) for path in candidates)
        start = f"There are no .onnx files in {looked}."
        others = sorted({file.parent.name for file in base.glob("*/*.onnx")})
        if others:
            start += f" {base} holds the packages {', '.join(others)}: choose one of them by name."
    return f"{start} Download a package yourself ({PACKAGES}) and unpack its .onnx files there."
