"""Where ComfyUI keeps our files: `models/difflora`, and `models/insightface` as other packs do."""

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import folder_paths

from ..difflora_core.config import parse_json
from ..difflora_core.demo import paths
from ..difflora_core.errors import ConfigError, DiffLoRAError, FileNameError, shown
from ..difflora_core.storage.atomic import write_text
from ..difflora_core.storage.file_name import check_file_name, typed_name, with_ending
from ..difflora_core.storage.identity_models import MODEL_FOLDERS

logger = logging.getLogger(__name__)

DIFFLORA = "difflora"
INSIGHTFACE = "insightface"
LIBRARY = "difflora_library"
"""Identity libraries; `extra_model_paths.yaml` can name further folders."""
CONCEPTS = "difflora_concepts"
COVARIANCES = "difflora_covariance"
"""Trained words, and what they share for each pair of text encoders."""
STYLES = "difflora_styles"
"""What was trained without a word."""
FEATURES = "difflora_features"
"""What encoders saw of a person, where somebody kept it."""
NO_FILE = "none"
"""A choice of no prompt file."""
DEMO = "difflora_demo"
"""Holds the demo world; `extra_model_paths.yaml` can name another folder."""

DEMO_LORAS = paths.LORAS.relative_to(paths.ARTEFACTS)
DEMO_CONCEPTS = paths.CONCEPTS.relative_to(paths.ARTEFACTS)
DEMO_STYLES = paths.STYLES.relative_to(paths.ARTEFACTS)
DEMO_FACES = paths.FACES.relative_to(paths.ARTEFACTS)

WORKFLOWS = Path(__file__).resolve().parents[1] / "workflows"
DEMO_PHOTOS = "difflora_demo_*.png"
OFFERED = "offered_photos.json"
"""Which photos were put into the input folder once: whoever deletes one wants it gone."""


def register() -> None:
    """Registers our model folders with ComfyUI; twice, or beside another pack, is harmless."""
    for folder in (DIFFLORA, INSIGHTFACE, LIBRARY, CONCEPTS, COVARIANCES, STYLES, FEATURES):
        path = str(Path(folder_paths.models_dir) / folder)
        folder_paths.add_model_folder_path(folder, path)
    for kind in MODEL_FOLDERS:
        own = kind.place[0]
        folder_paths.add_model_folder_path(own, str(Path(folder_paths.models_dir) / own))
    folder_paths.add_model_folder_path(DEMO, str(paths.ARTEFACTS))
    # A new folder lists every file; ours show their own only.
    for folder in (DIFFLORA, LIBRARY, CONCEPTS, COVARIANCES, STYLES, FEATURES):
        folder_paths.folder_names_and_paths[folder][1].add(".safetensors")


def offer_photos() -> None:
    """Puts the photos that our workflows load into ComfyUI's input folder, each once.

    A template then runs at the first click. A folder that cannot be written is only logged.
    """
    inputs = Path(folder_paths.get_input_directory())
    record = own_folder() / OFFERED
    try:
        before = set(map(str, parse_json(record.read_bytes(), OFFERED)))
    except (OSError, ConfigError, TypeError):
        before = set()
    offered = {str(inputs / photo.name): photo for photo in sorted(WORKFLOWS.glob(DEMO_PHOTOS))}
    for place, photo in offered.items():
        if place not in before and not Path(place).exists():
            try:
                shutil.copyfile(photo, place)
            except OSError as error:
                logger.warning("The photo %s stays outside %s: %s", photo.name, inputs, error)
    if not before.issuperset(offered):
        try:
            write_text(record, json.dumps(sorted(before | set(offered))))
        except DiffLoRAError as error:
            logger.warning("%s", error)


def own_folder() -> Path:
    """Our folder among ComfyUI's user files."""
    return Path(folder_paths.get_user_directory()) / "difflora"


def choices(found: Sequence[str], place: str) -> list[str]:
    """The choices of a list of files of a place in models/.

    It is never empty: the front end would show "undefined", and the server say something of
    Python's.
    """
    return list(found) or [f"none yet: put one into models/{place}, press R"]


def difflora_files() -> list[str]:
    """The models that ComfyUI sees, for a node's list: ours, then folders that others publish."""
    return [*folder_paths.get_filename_list(DIFFLORA), *_model_folders()]


def _model_folders() -> dict[str, Path]:
    """Models that others publish as a folder, by their names in the list."""
    found: dict[str, Path] = {}
    for kind in MODEL_FOLDERS:
        own, *rest = kind.place
        for place in (Path(base, *rest) for base in folder_paths.get_folder_paths(own)):
            folders = (place / name for name in sorted(_packages(place)))
            for folder in filter(kind.holds, folders):
                found.setdefault(f"{own}/{folder.name}", folder)
    return found


def difflora_file(name: str) -> str:
    """The full path of a DiffLoRA checkpoint, or of a folder that another project publishes.

    Raises:
        FileNameError: it is not there; the message names the folders searched.
    """
    path = folder_paths.get_full_path(DIFFLORA, name) or _model_folders().get(name)
    if path is None:
        folders = " or ".join(folder_paths.get_folder_paths(DIFFLORA))
        raise FileNameError(
            f"The DiffLoRA model '{shown(name)}' was not found. Put the file into {folders} and "
            "press R."
        )
    return str(path)


def lora_files() -> list[str]:
    """The LoRA files that ComfyUI sees, and after them those of the demo world."""
    return _with_demo("loras", DEMO_LORAS)


def lora_file(name: str) -> str:
    """The full path of a LoRA file.

    Raises:
        FileNameError: the file is not there; the message names the folders searched.
    """
    path = _mine_or_demo("loras", DEMO_LORAS, name)
    if path is not None:
        return path
    folders = " or ".join(folder_paths.get_folder_paths("loras"))
    raise FileNameError(
        f"The LoRA file '{shown(name)}' was not found. Put it into {folders} and press R."
    )


def _with_demo(kind: str, part: Path) -> list[str]:
    """The files of a kind that ComfyUI sees, and after them those in a part of the demo world."""
    found = folder_paths.get_filename_list(kind)
    demo = [p.name for folder in _demo_folders(part) for p in sorted(folder.glob("*.safetensors"))]
    return [*found, *(name for name in demo if name not in found)]


def _mine_or_demo(kind: str, part: Path, name: str) -> str | None:
    """The full path of such a file, or None."""
    path = folder_paths.get_full_path(kind, name) if name else None
    if path is not None:
        return path
    for folder in _demo_folders(part):
        if name in {file.name for file in folder.glob("*.safetensors")}:  # it is from a prompt
            return str(folder / name)
    return None


def _demo_folders(part: Path) -> list[Path]:
    """Where the demo world keeps such files."""
    return [Path(folder) / part for folder in folder_paths.get_folder_paths(DEMO)]


def concept_files() -> list[str]:
    """The concepts that ComfyUI sees, and after them those of the demo world."""
    return _with_demo(CONCEPTS, DEMO_CONCEPTS)


def concept_file(name: str) -> str:
    """The full path of a concept.

    Raises:
        FileNameError: the file is not there; the message names the folders searched.
    """
    path = _mine_or_demo(CONCEPTS, DEMO_CONCEPTS, name)
    if path is None:
        folders = " or ".join(folder_paths.get_folder_paths(CONCEPTS))
        raise FileNameError(
            f"The concept '{shown(name)}' was not found. Train one, or put the file into "
            f"{folders}, and press R."
        )
    return path


def prompt_files() -> list[str]:
    """The text files in ComfyUI's input folder, after the choice of none."""
    found = Path(folder_paths.get_input_directory()).glob("*.txt")
    return [NO_FILE, *sorted(path.name for path in found)]


def prompt_file(name: str) -> Path | None:
    """The full path of a text file in the input folder; see `in_input_folder`."""
    return in_input_folder(name, prompt_files, "prompt file")


def in_input_folder(name: str, listed: Callable[[], Sequence[str]], kind: str) -> Path | None:
    """The full path of what was chosen of what is `listed` in the input folder; None for none.

    Raises:
        FileNameError: it is not there; the message names its `kind` and the folder.
    """
    if name in ("", NO_FILE):
        return None
    folder = Path(folder_paths.get_input_directory())
    if name not in listed():  # it is from a prompt
        raise FileNameError(
            f"The {kind} '{shown(name)}' was not found. Put it into {folder} and press R."
        )
    return folder / name


def style_files() -> list[str]:
    """The styles that ComfyUI sees, and after them those of the demo world."""
    return _with_demo(STYLES, DEMO_STYLES)


def style_file(name: str) -> str:
    """The full path of a style.

    Raises:
        FileNameError: the file is not there; the message names the folders searched.
    """
    path = _mine_or_demo(STYLES, DEMO_STYLES, name)
    if path is None:
        folders = " or ".join(folder_paths.get_folder_paths(STYLES))
        raise FileNameError(
            f"The style '{shown(name)}' was not found. Train one, or put the file into "
            f"{folders}, and press R."
        )
    return path


def feature_files() -> list[str]:
    """The feature files that ComfyUI sees, for a node's list."""
    return list(folder_paths.get_filename_list(FEATURES))


def feature_file(name: str) -> str:
    """The full path of a feature file.

    Raises:
        FileNameError: the file is not there; the message names the folders searched.
    """
    path = folder_paths.get_full_path(FEATURES, name) if name else None
    if path is None:
        folders = " or ".join(folder_paths.get_folder_paths(FEATURES))
        raise FileNameError(
            f"The features '{shown(name)}' were not found. Save some, or put the file into "
            f"{folders}, and press R."
        )
    return path


def new_file(folder: str, name: str) -> Path:
    """Where a new file of ours goes: the first folder of that kind.

    Raises:
        FileNameError: the name is no plain file name.
    """
    plain = check_file_name(typed_name(name))
    return Path(folder_paths.get_folder_paths(folder)[0]) / f"{plain}.safetensors"


def unused_file(folder: str, name: str) -> Path:
    """Like `new_file`, with a number where a file of that name is there already."""
    path, number = new_file(folder, name), 1
    while path.exists():
        number += 1
        path = new_file(folder, with_ending(typed_name(name), f"_{number:03d}"))
    return path


def run_folder(fingerprint: str) -> Path:
    """Where a training run keeps its state until it is done: it outlives a restart of ComfyUI."""
    return own_folder() / "training" / fingerprint


def drawn_folder() -> Path:
    """Where what teachers drew is kept: ComfyUI's temporary folder, gone at its next start."""
    return Path(folder_paths.get_temp_directory()) / "difflora" / "drawn"


def insightface_folders() -> list[Path]:
    """The folders that may hold face analysis packages."""
    return [Path(path) / "models" for path in folder_paths.get_folder_paths(INSIGHTFACE)]


def insightface_packages() -> list[str]:
    """Names of the packages there, for a node's list; a half-empty one is listed, to be named."""
    return sorted({name for folder in insightface_folders() for name in _packages(folder)})


def _packages(folder: Path) -> set[str]:
    """Names of what lies directly in a folder: a name from a prompt is compared with them."""
    return {path.name for path in folder.iterdir() if path.is_dir()} if folder.is_dir() else set()


def insightface_package(name: str) -> str:
    """The folder of a face analysis package.

    Raises:
        FileNameError: it is not there; the message names the folders searched.
    """
    for folder in insightface_folders():
        if name in _packages(folder):
            return str(folder / name)
    folders = " or ".join(str(folder) for folder in insightface_folders())
    raise FileNameError(
        f"The face analysis package '{shown(name)}' was not found. Download one yourself "
        f"(antelopev2, buffalo_l or the free AuraFace), unpack it as a folder in {folders}, and "
        "press R."
    )


def demo_paths(preset: str = "functional") -> tuple[list[Path], Path]:
    """The demo world's base, CLIP vision, DiffLoRA and ControlNet, and its face analysis folder.

    `preset`: that trained the DiffLoRA model, a name of `paths.MODELS`.

    Raises:
        FileNameError: one of them is missing.
    """
    files = (paths.BASE, paths.CLIP_VISION, paths.MODELS[preset], paths.CONTROLNET)
    parts = [file.name for file in files] + [DEMO_FACES]
    folders = [Path(path) for path in folder_paths.get_folder_paths(DEMO)]
    for folder in folders:
        *found, faces = (folder / part for part in parts)
        if all(file.is_file() for file in found) and faces.is_dir():
            return found, faces
    missing = ", ".join(Path(part).name for part in parts if not (folders[0] / part).exists())
    raise FileNameError(
        f"The demo world in {folders[0]} lacks {missing}. Install the node pack again, or rebuild "
        "the demo with 'make demo-world'."
    )


def new_library_file(name: str) -> Path:
    """The path of an identity library, which need not exist yet.

    Raises:
        FileNameError: the name is no plain file name; the message says what is.
    """
    plain = check_file_name(typed_name(name))  # directly in one of the folders and nowhere else
    found = folder_paths.get_full_path(LIBRARY, f"{plain}.safetensors")
    return Path(found or Path(folder_paths.get_folder_paths(LIBRARY)[0], f"{plain}.safetensors"))


def library_file(name: str) -> Path:
    """The path of an identity library that is there.

    Raises:
        FileNameError: it is not; the message names the folder and the libraries in it.
    """
    path = new_library_file(name)
    if not path.is_file():
        there = ", ".join(Path(n).stem for n in folder_paths.get_filename_list(LIBRARY)[:20])
        raise FileNameError(
            f"There is no identity library '{path.stem}' in {path.parent} (there: "
            f"{there or 'none'}). Make one with Add to Identity Library."
        )
    return path


def library_state(name: str | None) -> object:
    """Changes with the library; a library that is linked or missing is looked at every time."""
    try:
        return fingerprint(library_file(name or ""))
    except FileNameError:
        return float("nan")


def problem(find: Callable[[str], object], name: str | None) -> bool | str:
    """True when `find` finds the name, else its message; for a node's validate_inputs."""
    try:
        find(name or "")
    except FileNameError as error:
        return str(error)
    return True


def fingerprint(*paths: str | Path) -> list[tuple[str, int, int]]:
    """Path, size and time of each file (of all files of a folder): changes when the model does."""
    files = [
        file
        for path in map(Path, paths)
        for file in (sorted(filter(Path.is_file, path.rglob("*"))) if path.is_dir() else [path])
    ]
    return [(str(f), (stat := f.stat()).st_size, stat.st_mtime_ns) for f in files]
