"""DiffLoRA for ComfyUI: a reference photo becomes that person's SDXL LoRA."""

from typing import Any

WEB_DIRECTORY = "./web"  # help pages: web/docs/<node id>.md


OLDEST = "0.30.0"
"""The ComfyUI that this pack is tested with; older ones are tried."""


async def comfy_entrypoint() -> Any:
    """Gives ComfyUI the extension of this pack.

    The imports stay inside: test runners import this file as a package, without ComfyUI.

    Raises:
        RuntimeError: this ComfyUI is too old; it logs the sentence.
    """
    import comfyui_version

    old = _numbers(comfyui_version.__version__) < _numbers(OLDEST)
    try:
        from .nodes import NODES, DiffLoRAExtension, model_paths

        if old:  # what it lacks shows when a node describes itself
            model_paths.register()
            for node in NODES:
                node.GET_SCHEMA()
    except (ImportError, AttributeError, TypeError) as error:
        if not old:
            raise
        raise RuntimeError(
            f"DiffLoRA needs ComfyUI {OLDEST} or newer, and this is {comfyui_version.__version__}. "
            f"Update ComfyUI, then start it again. ({error})"
        ) from error
    return DiffLoRAExtension()


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers of a version, to be compared."""
    parts = version.split("+")[0].split("-")[0].split(".")
    return tuple(int(part) for part in parts if part.isdigit())
