"""Where ComfyUI keeps our files: `models/difflora`, and `models/insightface` as other packs do."""

import os

import folder_paths

DIFFLORA = "difflora"
INSIGHTFACE = "insightface"


def register() -> None:
    """Registers our model folders with ComfyUI; twice, or beside another pack, is harmless."""
    for folder in (DIFFLORA, INSIGHTFACE):
        folder_paths.add_model_folder_path(folder, os.path.join(folder_paths.models_dir, folder))
    # A new folder lists every file; ours shows checkpoints only.
    folder_paths.folder_names_and_paths[DIFFLORA][1].add(".safetensors")


def difflora_files() -> list[str]:
    """The DiffLoRA checkpoints that ComfyUI sees, for a node's list."""
    return folder_paths.get_filename_list(DIFFLORA)


def difflora_file(name: str) -> str:
    """The full path of a DiffLoRA checkpoint.

    Raises:
        FileNotFoundError: the file is not there; the message names the folders searched.
    """
    path = folder_paths.get_full_path(DIFFLORA, name)
    if path is None:
        folders = " or ".join(folder_paths.get_folder_paths(DIFFLORA))
        raise FileNotFoundError(
            f"The DiffLoRA model '{name}' was not found. Put the file into {folders} and press R."
        )
    return path


def insightface_folders() -> list[str]:
    """The folders that may hold face analysis packages, as `<folder>/models/<package>/*.onnx`."""
    return folder_paths.get_folder_paths(INSIGHTFACE)
