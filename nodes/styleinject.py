"""StyleInject: what is its own among the nodes of styles."""

from comfy_api.latest import io

NODES: list[type[io.ComfyNode]] = []
