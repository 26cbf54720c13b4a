"""Prices from steps in turn: the arithmetic (pairs.py), and nodes with which ComfyUI takes them.

This folder is a node pack of its own, which the overhead benchmark links into its ComfyUI; outside
of it only pairs.py can be imported.
"""


async def comfy_entrypoint():
    """What ComfyUI loads."""
    from .nodes import InterleavingExtension

    return InterleavingExtension()
