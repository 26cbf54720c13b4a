"""Texts on nodes in the browser, as core's Get Image Size shows its own."""

from comfy_execution.utils import get_executing_context


def show(node_id: str | None, text: str) -> None:
    """Shows a text on a node, in the browser that queued the prompt that runs."""
    from server import PromptServer  # noqa: PLC0415  there is none before ComfyUI runs

    server = getattr(PromptServer, "instance", None)
    if node_id and server is not None and server.client_id is not None:
        server.send_progress_text(text, node_id, server.client_id)


def show_here(text: str) -> None:
    """Shows a text on the node that runs; outside of a graph nowhere."""
    running = get_executing_context()
    if running is not None:
        show(running.node_id, text)
