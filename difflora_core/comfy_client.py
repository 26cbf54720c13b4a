"""A client of a running ComfyUI: run a prompt, follow its progress, fetch what it made."""

import io
import json
import struct
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import websocket
from numpy.typing import NDArray
from PIL import Image

from .errors import DiffLoRAError

Prompt = Mapping[str, Mapping[str, Any]]

WANTS_PREVIEWS = {"type": "feature_flags", "data": {"supports_preview_metadata": True}}
TEXT, PREVIEW = 3, 4
"""ComfyUI's numbers of binary events: a node's id or a picture's facts, then the thing itself."""


class ComfyPromptError(DiffLoRAError):
    """ComfyUI refused a prompt, or one of its nodes failed.

    Attributes:
        node_id: the node that failed, None when the prompt as a whole was refused.
        node_type: its class.
        message: what the node said, without the node's name.
    """

    def __init__(self, message: str, node_id: str | None = None, node_type: str = "") -> None:
        """Puts the node's name before its message."""
        super().__init__(f"Node {node_id} ({node_type}): {message}" if node_id else message)
        self.message, self.node_id, self.node_type = message, node_id, node_type


class ComfyInterrupted(DiffLoRAError):
    """The prompt was stopped by /interrupt."""


@dataclass(frozen=True)
class NodeProgress:
    """One step of a running prompt: node `node_id` (a `node_type`) did `value` of `maximum`."""

    node_id: str
    node_type: str
    value: float
    maximum: float


@dataclass(frozen=True)
class PromptResult:
    """What a finished prompt left.

    Attributes:
        prompt_id: ComfyUI's id of the run.
        outputs: node id to what that node shows, as in /history.
        pictures: node id to its decoded pictures, (H, W, C) uint8.
        cached: ids of the nodes that were not run again.
        seconds: from queueing to the end.
    """

    prompt_id: str
    outputs: Mapping[str, Mapping[str, Any]]
    pictures: Mapping[str, list[NDArray[np.uint8]]] = field(repr=False)
    cached: frozenset[str]
    seconds: float

    def picture(self, node_id: str | int | None = None) -> NDArray[np.uint8]:
        """The first picture of a node, or of the only node that made pictures.

        Raises:
            ComfyPromptError: that node made none, or the choice is open.
        """
        key = str(node_id) if node_id is not None else next(iter(self.pictures), "")
        if not self.pictures.get(key) or (node_id is None and len(self.pictures) > 1):
            raise ComfyPromptError(
                f"No single picture of node {key!r}: {list(self.pictures)} made some."
            )
        return self.pictures[key][0]


class ComfyClient:
    """Speaks to one ComfyUI at `url`; safe to use from several threads, one run per thread."""

    def __init__(self, url: str) -> None:
        """Remembers the address; nothing is sent yet."""
        self.url = url
        # A proxy of the machine must not stand between us and our own server.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def run(
        self,
        prompt: Prompt,
        on_progress: Callable[[NodeProgress], None] | None = None,
        timeout: float = 600.0,
        shown: list[Image.Image | str] | None = None,
    ) -> PromptResult:
        """Queues a prompt in API form and waits for its end.

        Args:
            prompt: node id to {class_type, inputs}.
            on_progress: called with every step that ComfyUI reports.
            timeout: seconds for the whole run.
            shown: gets what nodes show on their way: previews, and lines "node: text".

        Raises:
            ComfyPromptError: a node refused its input or failed, or the time is over.
            ComfyInterrupted: somebody stopped the run.
        """
        begun = time.monotonic()
        client_id = uuid.uuid4().hex
        address = self.url.replace("http", "ws", 1) + f"/ws?clientId={client_id}"
        events = websocket.create_connection(address, timeout=30)
        try:
            if shown is not None:
                events.send(json.dumps(WANTS_PREVIEWS))
            prompt_id = self._queue(prompt, client_id, "none" if shown is None else "auto")
            stream = self._events(events, begun + timeout, shown)
            cached = self._follow(stream, prompt_id, prompt, on_progress)
        finally:
            events.close()
        return self.result(prompt_id, cached, time.monotonic() - begun)

    def run_fresh(
        self,
        prompt: Prompt,
        timeout: float = 600.0,
        shown: list[Image.Image | str] | None = None,
    ) -> PromptResult:
        """Runs a prompt with nothing taken from the cache, see `run`.

        ComfyUI empties its cache when its worker wakes, which may be after this prompt; then it is
        empty for the next.
        """
        self.free()
        result = self.run(prompt, timeout=timeout, shown=shown)
        return self.run(prompt, timeout=timeout, shown=shown) if result.cached else result

    def result(
        self, prompt_id: str, cached: frozenset[str] = frozenset(), seconds: float = 0.0
    ) -> PromptResult:
        """What a finished prompt left, whoever queued it.

        Raises:
            ComfyPromptError: ComfyUI has no history of it.
        """
        entry = self.get(f"/history/{prompt_id}").get(prompt_id)
        if entry is None:
            raise ComfyPromptError(f"ComfyUI has no history of prompt {prompt_id}.")
        outputs = dict(entry["outputs"])
        pictures = {
            node: [self.picture(item) for item in shown["images"]]
            for node, shown in outputs.items()
            if shown.get("images")
        }
        return PromptResult(prompt_id, outputs, pictures, cached, seconds)

    def object_info(self, node_type: str | None = None) -> dict[str, Any]:
        """The schemas of all nodes, or of one."""
        return self.get("/object_info" + (f"/{node_type}" if node_type else ""))

    def system_stats(self) -> dict[str, Any]:
        """ComfyUI's versions and devices."""
        return self.get("/system_stats")

    def free(self) -> None:
        """Unloads the models and empties the cache of results."""
        self._request("/free", {"unload_models": True, "free_memory": True})

    def picture(self, item: Mapping[str, str]) -> NDArray[np.uint8]:
        """Fetches one picture named by an output, as (H, W, C) uint8."""
        with Image.open(io.BytesIO(self.file(item))) as image:
            return np.asarray(image.convert("RGBA" if image.mode == "RGBA" else "RGB"))

    def file(self, item: Mapping[str, str]) -> bytes:
        """Fetches one file named by an output: {filename, subfolder, type}."""
        return self._request("/view?" + urllib.parse.urlencode(item))

    def upload_picture(self, path: Path) -> str:
        """Puts a picture file into ComfyUI's input folder and returns its name for LoadImage."""
        boundary = uuid.uuid4().hex
        part = f"--{boundary}\r\nContent-Disposition: form-data; name="
        head = f'{part}"overwrite"\r\n\r\ntrue\r\n'
        head += f'{part}"image"; filename="{path.name}"\r\n'
        body = head.encode() + b"\r\n" + path.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
        kind = f"multipart/form-data; boundary={boundary}"
        answer = json.loads(self._request("/upload/image", body, kind))
        return str(answer["name"])

    def _queue(self, prompt: Prompt, client_id: str, preview_method: str) -> str:
        """Posts the prompt; a refusal names the node and the input."""
        more = {"preview_method": preview_method}
        body = {"prompt": prompt, "client_id": client_id, "extra_data": more}
        try:
            answer = self._request("/prompt", body)
        except urllib.error.HTTPError as refusal:
            raise _refusal(refusal.read(), prompt) from refusal
        return str(json.loads(answer)["prompt_id"])

    def _follow(
        self,
        events: Iterable[tuple[str, Mapping[str, Any]]],
        prompt_id: str,
        prompt: Prompt,
        on_progress: Callable[[NodeProgress], None] | None,
    ) -> frozenset[str]:
        """Reads events until the run is over; returns the ids of cached nodes."""
        cached: frozenset[str] = frozenset()
        for kind, data in events:
            if data.get("prompt_id") != prompt_id:
                continue
            if kind == "execution_cached":
                cached = frozenset(data["nodes"])
            elif kind == "execution_error":
                message = str(data["exception_message"]).strip()
                raise ComfyPromptError(message, str(data["node_id"]), str(data["node_type"]))
            elif kind == "execution_interrupted":
                raise ComfyInterrupted(f"The run was stopped in node {data.get('node_id')}.")
            elif kind == "executing" and data["node"] is None:
                break  # execution_success comes before the history is written
            elif kind in ("executing", "progress") and on_progress is not None:
                node = str(data["node"])
                name = str(prompt.get(node, {}).get("class_type", ""))
                on_progress(NodeProgress(node, name, data.get("value", 0), data.get("max", 1)))
        return cached

    def _events(
        self, events: websocket.WebSocket, deadline: float, shown: list[Image.Image | str] | None
    ) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """All events in JSON; pictures and texts, which are binary, go to `shown`."""
        while True:
            events.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                message = events.recv()
            except websocket.WebSocketTimeoutException as late:
                raise ComfyPromptError("ComfyUI did not finish the prompt in time.") from late
            except (websocket.WebSocketException, OSError) as gone:
                raise ComfyPromptError("ComfyUI ended while running the prompt.") from gone
            if isinstance(message, str) and message:
                event = json.loads(message)
                yield event["type"], event.get("data") or {}
            elif isinstance(message, bytes) and shown is not None:
                kind, size = struct.unpack_from(">II", message)
                about, content = message[8 : 8 + size], message[8 + size :]
                if kind == PREVIEW:
                    shown.append(Image.open(io.BytesIO(content)))
                elif kind == TEXT:
                    shown.append(f"{about.decode()}: {content.decode()}")

    def get(self, path: str) -> dict[str, Any]:
        """A GET answered in JSON."""
        return dict(json.loads(self._request(path)))

    def _request(
        self,
        path: str,
        body: Mapping[str, Any] | bytes | None = None,
        kind: str = "application/json",
    ) -> bytes:
        """A GET, or a POST when there is a body."""
        data = json.dumps(body).encode() if isinstance(body, Mapping) else body
        request = urllib.request.Request(self.url + path, data, {"Content-Type": kind})
        with self._opener.open(request, timeout=60) as answer:
            return bytes(answer.read())


def _refusal(body: bytes, prompt: Prompt) -> ComfyPromptError:
    """The first complaint of a refused prompt."""
    answer = json.loads(body or b"{}")
    for node_id, node in (answer.get("node_errors") or {}).items():
        complaints = "; ".join(f"{e['message']}: {e['details']}" for e in node["errors"])
        return ComfyPromptError(complaints, node_id, node.get("class_type", ""))
    error = answer.get("error") or {
        "message": f"ComfyUI refused the prompt of {len(prompt)} nodes."
    }
    return ComfyPromptError(error if isinstance(error, str) else str(error.get("message")))
