"""ComfyUI's own front end in headless Chromium: what an artist does, done by a program.

Chromium is the system's: `make browser` installs it where it may, `CHROMIUM` names another one.
"""

import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from playwright.sync_api import ConsoleMessage, Error, Page, Response, sync_playwright

from ...comfy_client import ComfyClient, ComfyPromptError, PromptResult
from ...errors import DiffLoRAError

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HOW_TO_INSTALL = (
    "No Chromium was found, so ComfyUI's front end is not checked. Install one (Debian: apt-get "
    "install chromium fonts-dejavu-core) or set CHROMIUM to the path of yours."
)
SWITCHES = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WINDOW = (1600, 900)
"""A usual one."""
HOST_NOISE = (
    "Failed to load resource",
    "ComfyApp graph accessed before initialization",
    "Connecting to 'https://",  # it looks up model files of its own start graph, and is refused
    "Fetch API cannot load https://",
)
OURS = "DiffLoRA"

READY = """() => window.app?.graph
    && Object.keys(window.LiteGraph?.registered_node_types ?? {}).length > 100"""
LISTEN = """() => {
    window.difflora = { ends: [], progress: [] };
    for (const kind of ["execution_success", "execution_error", "execution_interrupted"])
        app.api.addEventListener(kind, event => difflora.ends.push([kind, event.detail]));
    app.api.addEventListener("progress", event => difflora.progress.push(event.detail));
}"""
FAULTY = """complete => app.graph.nodes
    .filter(node => complete && node.has_errors
        || !(node.type in LiteGraph.registered_node_types))
    .map(node => node.type)"""
FIT = """() => {
    const boxes = app.graph.nodes.map(node => node.boundingRect);
    const low = [0, 1].map(axis => Math.min(...boxes.map(box => box[axis])) - 10);
    const high = [0, 1].map(axis => Math.max(...boxes.map(box => box[axis] + box[axis + 2])) + 10);
    app.canvas.ds.fitToBounds([...low, high[0] - low[0], high[1] - low[1]]);
    app.canvas.setDirty(true, true);
}"""
"""As a template opens: the nodes, and 10 around them, in three quarters of the window."""
SHOWN = """() => app.graph.nodes.every(node => {
    const images = app.nodeOutputs[node.id]?.images ?? [];
    return node.flags.collapsed || node.imgs?.length >= images.length || images.length === 0;
})"""

CARDS = "[data-testid^=template-workflow-]"
OTHER_CARDS = "([cards, count]) => document.querySelectorAll(cards).length !== count"
"""The template browser shows two dozen, and more when the last one is seen."""
KEPT = "async id => id in await (await app.api.fetchApi(`/history/${id}`)).json()"
"""ComfyUI writes its history after it has told of a success."""


class BrowserError(DiffLoRAError):
    """There is no browser, or the front end does not do what an artist expects."""


def find_chromium() -> str | None:
    """The path of the Chromium to use: `CHROMIUM`, or the system's; None when there is none."""
    named = os.environ.get("CHROMIUM")
    names = (named,) if named else CHROMIUM_NAMES
    return next((path for name in names if (path := shutil.which(name))), None)


class Chromium:
    """A running headless Chromium, for one `FrontEnd` or several; use it as a context manager."""

    def __init__(self) -> None:
        """Starts it.

        Raises:
            BrowserError: no Chromium was found, or it did not start.
        """
        path = find_chromium()
        if path is None:
            raise BrowserError(HOW_TO_INSTALL)
        self._driver = sync_playwright().start()
        try:
            self._browser = self._driver.chromium.launch(
                executable_path=path, args=list(SWITCHES), timeout=120_000
            )
        except Error as error:
            self._driver.stop()
            raise BrowserError(f"{path} did not start: {error.message}") from error

    def __enter__(self) -> "Chromium":
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends it with all its pages."""
        self._browser.close()
        self._driver.stop()

    def page(self, language: str) -> Page:
        """An empty page with cookies and storage of its own."""
        size = {"width": WINDOW[0], "height": WINDOW[1]}
        page = self._browser.new_page(viewport=size, locale=language)
        page.set_default_timeout(60_000)
        return page


class FrontEnd:
    """ComfyUI's page; use it as a context manager.

    `page` is the driver's page. `problems` lists what it complained about since the last `load`:
    every error but the host's own, and every error that names this pack.
    """

    def __init__(
        self,
        chromium: Chromium,
        client: ComfyClient,
        language: str = "en-US",
        first_visit: bool = False,
    ) -> None:
        """Makes an empty page.

        Args:
            chromium: the browser.
            client: the running ComfyUI.
            language: of the browser; the front end follows it.
            first_visit: True opens the template browser, as for an artist who is new here.
        """
        self.client = client
        self.problems: list[str] = []
        self._settings = {"TutorialCompleted": not first_visit, "Minimap.Visible": False}
        self.page = chromium.page(language)
        self.page.on("console", self._listen)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))

    def __enter__(self) -> "FrontEnd":
        """Opens the page and waits until it can load workflows."""
        try:
            for name, value in self._settings.items():
                url = f"{self.client.url}/settings/Comfy.{name}"
                self.page.request.post(url, data=json.dumps(value))
            self.page.goto(self.client.url)
            self.page.wait_for_function(READY, timeout=180_000)
            self.page.evaluate(LISTEN)
        except Error as error:
            self.page.close()
            raise BrowserError(f"ComfyUI's page did not come up: {error.message}") from error
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the page."""
        self.page.close()

    def load(self, workflow: Mapping[str, Any], name: str, complete: bool = True) -> None:
        """Loads a workflow as if its file were dropped on the page, and shows all of it.

        Args:
            workflow: the file's content.
            name: shown on the tab.
            complete: False when model files that it names need not be there.

        Raises:
            BrowserError: the front end does not know one of its nodes, lost one, or misses a file.
        """
        self.problems.clear()
        load = "([graph, name]) => app.loadGraphData(graph, true, true, name)"
        self.page.evaluate(load, [workflow, name])
        faulty = self.page.evaluate(FAULTY, complete)
        if faulty:
            names = ", ".join(sorted(set(faulty)))
            raise BrowserError(f"Drawn in red, the node or a file of it is missing: {names}.")
        loaded, saved = self.page.evaluate("() => app.graph.nodes.length"), len(workflow["nodes"])
        if loaded != saved:
            raise BrowserError(f"The front end shows {loaded} of {saved} nodes.")
        self.page.evaluate(FIT)

    def find_template(self, pack: str, name: str) -> None:
        """Scrolls to a template of a pack in the template browser of a first visit.

        Cards come page by page, in the order of the folder on disk.

        Raises:
            BrowserError: there is no such card at the end.
        """
        self.page.get_by_text(pack, exact=True).click()
        cards = self.page.locator(CARDS)
        wanted = self.page.get_by_test_id(f"template-workflow-{name}")
        cards.first.wait_for()
        while not wanted.count():
            count = cards.count()
            cards.last.scroll_into_view_if_needed()
            try:
                self.page.wait_for_function(OTHER_CARDS, arg=[CARDS, count], timeout=10_000)
            except Error as error:
                raise BrowserError(f"No template {name} among {count} of {pack}.") from error
        wanted.scroll_into_view_if_needed()

    def open_template(self, name: str) -> None:
        """Clicks on a template and waits until its nodes are there."""
        self.page.evaluate("() => app.graph.clear()")
        self.page.get_by_test_id(f"template-workflow-{name}").click()
        self.page.wait_for_function("() => app.graph.nodes.length > 0")

    def prompt(self) -> dict[str, Any]:
        """What the front end would queue, in API form."""
        return dict(self.page.evaluate("async () => (await app.graphToPrompt()).output"))

    def queue(self, timeout: float = 600.0) -> PromptResult:
        """Clicks Run and waits until every result is drawn on its node.

        Args:
            timeout: seconds for the run.

        Raises:
            ComfyPromptError: ComfyUI refused the graph, or a node failed.
            BrowserError: a result was not shown.
        """
        begun = time.monotonic()
        self.page.evaluate("() => Object.assign(difflora, {ends: [], progress: []})")
        with self.page.expect_response(_is_queueing) as posted:
            self.page.get_by_test_id("queue-button").click()
        answer = posted.value.json()
        if "prompt_id" not in answer or answer.get("node_errors"):
            raise ComfyPromptError(f"ComfyUI refused the graph: {json.dumps(answer)}")
        ended = self.page.wait_for_function("() => difflora.ends[0]", timeout=timeout * 1000)
        kind, detail = ended.json_value()
        if kind != "execution_success":
            message = str(detail.get("exception_message", "stopped")).strip()
            raise ComfyPromptError(message, str(detail["node_id"]), str(detail["node_type"]))
        try:
            self.page.wait_for_function(SHOWN, timeout=30_000)
        except Error as error:
            raise BrowserError("A node does not show the picture that it made.") from error
        seconds = time.monotonic() - begun
        self.page.wait_for_function(KEPT, arg=answer["prompt_id"])
        return self.client.result(answer["prompt_id"], seconds=seconds)

    def screenshot(self, path: Path) -> None:
        """Writes what the artist sees now as a PNG file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.wait_for_timeout(500)  # the canvas draws in its own time
        self.page.screenshot(path=path)

    def _listen(self, message: ConsoleMessage) -> None:
        """Keeps an error of the page, unless it is the host's own."""
        where = message.location.get("url", "")
        host = message.text.startswith(HOST_NOISE) and OURS not in where
        if message.type == "error" and not host:
            self.problems.append(f"{message.text} ({where})")


def _is_queueing(answer: Response) -> bool:
    """True for the answer to a click on Run."""
    return answer.request.method == "POST" and answer.url.endswith("/prompt")
