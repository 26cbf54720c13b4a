"""DiffLoRA for ComfyUI: a reference photo becomes that person's SDXL LoRA."""

from typing import Any

WEB_DIRECTORY = "./web"  # help pages: web/docs/<node id>.md


async def comfy_entrypoint() -> Any:
    """Gives ComfyUI the extension of this pack.

    The import stays inside: test runners import this file as a package, without ComfyUI.
    """
    from .nodes import DiffLoRAExtension

    return DiffLoRAExtension()
