"""DiffLoRA for ComfyUI: a reference photo becomes that person's SDXL LoRA."""

import logging
from typing import Any

logger = logging.getLogger(__name__)

WEB_DIRECTORY = "./web"  # help pages: web/docs/<node id>.md


OLDEST = "0.24.0"
"""The oldest ComfyUI that this pack is tested with; older ones are tried, and told."""


async def comfy_entrypoint() -> Any:
    """Gives ComfyUI the extension of this pack.

    The imports stay inside: test runners import this file as a package, without ComfyUI.

    Raises:
        RuntimeError: this ComfyUI is too old; it logs the sentence.
    """
    import comfyui_version

    version = comfyui_version.__version__
    old = _numbers(version) < _numbers(OLDEST)
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
            f"DiffLoRA needs ComfyUI {OLDEST} or newer, and this is {version}. "
            f"Update ComfyUI, then start it again. ({error})"
        ) from error
    if old:
        logger.warning(
            "DiffLoRA is made for ComfyUI %s and newer, and this is %s: some of its nodes will "
            "fail. Update ComfyUI.",
            OLDEST,
            version,
        )
    return DiffLoRAExtension()


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers of a version, to be compared."""
    parts = version.split("+")[0].split("-")[0].split(".")
    return tuple(int(part) for part in parts if part.isdigit())
