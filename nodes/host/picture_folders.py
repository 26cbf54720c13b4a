"""The folders of pictures in ComfyUI's input folder."""

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ...difflora_core.errors import ConfigError
from ...difflora_core.training.picture_folder import pictures_in
from .. import model_paths


def picture_folders() -> list[str]:
    """The folders in ComfyUI's input folder that hold pictures, after the choice of none."""
    found = Path(folder_paths.get_input_directory()).iterdir()
    return [
        model_paths.NO_FILE,
        *sorted(path.name for path in found if path.is_dir() and _has_pictures(path)),
    ]


def _has_pictures(folder: Path) -> bool:
    try:
        return bool(pictures_in(folder))
    except ConfigError:
        return False


def picture_folder(name: str) -> Path | None:
    """The full path of a folder in the input folder; see `model_paths.in_input_folder`."""
    return model_paths.in_input_folder(name, picture_folders, "folder")


def folder_pictures(name: str) -> tuple[Path, ...]:
    """The pictures of a folder that was chosen; none where none was.

    Raises:
        FileNameError: it is not there.
    """
    path = picture_folder(name)
    return tuple(pictures_in(path)) if path else ()


class TakesFolder(io.ComfyNode):
    """A node with the input `folder`: what it holds is looked at when the node is queued."""

    @classmethod
    def validate_inputs(cls, folder=model_paths.NO_FILE):
        return model_paths.problem(picture_folder, folder)

    @classmethod
    def fingerprint_inputs(cls, folder=model_paths.NO_FILE, **others):
        path = picture_folder(folder)
        return model_paths.fingerprint(path) if path else None
