"""ComfyUI's real front end in headless Chromium: what an artist sees of the pack."""

import copy
import json

import pytest

from difflora_core.comfy_client import ComfyPromptError
from difflora_core.demo.comfyui.browser import (
    HOW_TO_INSTALL,
    BrowserError,
    Chromium,
    FrontEnd,
    find_chromium,
)
from difflora_core.demo.comfyui.workflow_api import PACK, WorkflowError, workflow_to_prompt
from difflora_core.demo.workflows.runner import FULL_SIZE, first_picture, read_workflow
from difflora_core.demo.workflows.shown import complaints, crossings, shown

pytestmark = pytest.mark.skipif(find_chromium() is None, reason=HOW_TO_INSTALL)

WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))
QUICKSTART = PACK / "workflows" / "quickstart_demo.json"
PERSONALIZE = "DiffLoRA_Personalize"
HEARD = ["progress_text", "b_preview_with_metadata", "progress_state", "executed"]
"""Events of the front end: a text on a node, a preview, progress, a result."""
DRAWN = """() => app.graph.nodes.some(node => node.type === 'DiffLoRA_Personalize'
    && (node.imgs?.length || node.widgets.some(widget => widget.name === '$$node-text-preview')))"""


@pytest.fixture(scope="module")
def uploaded(comfy, plain_picture):
    """A photo without a face in ComfyUI's input folder, before the page lists it."""
    return comfy.upload_picture(plain_picture)


@pytest.fixture(scope="module")
def chromium():
    with Chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def front_end(chromium, comfy, uploaded):
    with FrontEnd(chromium, comfy) as page:
        yield page


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_can_be_read_and_converts_as_we_convert_it(front_end, comfy, path):
    """It opens with its text drawn, and nothing covers anything.

    That it runs, draws its result and runs again the same is `make workflows`.
    """
    workflow = read_workflow(path)
    front_end.load(workflow, path.stem, complete=not path.name.startswith(FULL_SIZE))
    seen = shown(front_end)
    assert seen["links"] == len(workflow["links"])
    assert complaints(seen) == []
    assert crossings(seen) == 0
    assert front_end.prompt() == workflow_to_prompt(workflow, comfy.object_info())
    assert front_end.problems == []


def test_what_cannot_be_read_is_noticed(front_end):
    """The checker of looks can fail, in each of its sentences."""
    workflow = read_workflow(QUICKSTART)
    nodes = {node["type"]: node for node in workflow["nodes"]}
    first, last = nodes["LoadImage"], nodes["SaveImage"]
    first["pos"] = list(nodes["DiffLoRA_LoadDemo"]["pos"])
    source = nodes["ImageScaleBy"]["pos"]
    last["pos"] = [source[0] + 3000, source[1]]
    box = [source[0] + 1500, source[1] - 15, 600, 300]  # the link begins at a collapsed node
    over = {"id": 99, "title": "Over a link", "bounding": box}
    workflow["groups"].append(workflow["groups"][0] | over)
    front_end.load(workflow, "spoilt")
    seen = shown(front_end)
    told = " ".join(complaints(seen))
    for sentence in ("no text is drawn", "covers", "stands in 0 groups"):
        assert sentence in told
    assert crossings(seen) > 0


def test_second_tab_sees_nothing_of_the_first(chromium, comfy):
    """Texts, previews and results go to the page that queued, for the prompt that runs."""
    with FrontEnd(chromium, comfy) as asked, FrontEnd(chromium, comfy) as other:
        comfy.free()
        for page in (asked, other):
            page.load(read_workflow(QUICKSTART), "two tabs")
            page.page.evaluate(
                """kinds => {
                    window.heard = {};
                    for (const kind of kinds) app.api.addEventListener(
                        kind, () => { heard[kind] = (heard[kind] ?? 0) + 1; });
                    return app.extensionManager.setting.set(
                        'Comfy.Execution.PreviewMethod', 'latent2rgb');
                }""",
                HEARD,
            )
        asked.queue()
        heard = asked.page.evaluate("() => heard")
        assert all(heard.get(kind) for kind in HEARD), heard
        assert asked.page.evaluate(DRAWN)
        assert other.page.evaluate("() => heard") == {}
        assert not other.page.evaluate(DRAWN)
        asked.page.evaluate(
            "() => app.extensionManager.setting.set('Comfy.Execution.PreviewMethod', 'default')"
        )


def test_missing_node_and_missing_photo_are_seen(front_end):
    for change in ({"type": "DiffLoRA_Gone"}, {"widgets_values": ["gone.png", "image"]}):
        workflow = read_workflow(QUICKSTART)
        photo = next(node for node in workflow["nodes"] if node["type"] == "LoadImage")
        photo.update(change)
        with pytest.raises(BrowserError, match="Drawn in red"):
            front_end.load(workflow, "broken")


def test_first_artist_gets_a_picture_with_two_clicks(chromium, comfy_server, is_shipped):
    """ComfyUI's processor time is measured, which other work on the machine does not stretch."""
    if not is_shipped:
        pytest.skip("the shipped demo world is not trained yet (make demo-world)")
    result, _, seconds = first_picture(comfy_server, chromium)
    assert seconds < 60
    saved = [node for node, shown in result.outputs.items() if "output" in json.dumps(shown)]
    assert all(len(result.pictures[node]) == 4 for node in saved)
    assert len(saved) == 2


def test_error_is_one_sentence_on_the_node(front_end, uploaded):
    workflow = read_workflow(QUICKSTART)
    photo = next(node for node in workflow["nodes"] if node["type"] == "LoadImage")
    photo["widgets_values"][0] = uploaded
    front_end.load(workflow, "no face")
    with pytest.raises(ComfyPromptError) as error:
        front_end.queue()
    assert error.value.node_type == PERSONALIZE
    assert "\n" not in error.value.message
    front_end.page.get_by_text("Personalize failed").wait_for()
    front_end.page.get_by_text("View details").click()
    front_end.page.get_by_text(error.value.message).first.wait_for()


def test_help_button_shows_our_page(front_end):
    front_end.load(read_workflow(QUICKSTART), "help")
    front_end.page.evaluate(
        "type => app.canvas.selectNode(app.graph.nodes.find(node => node.type === type))",
        PERSONALIZE,
    )
    front_end.page.get_by_test_id("info-button").click()
    front_end.page.get_by_text("A likeness too weak?").wait_for()


def test_front_end_speaks_chinese(chromium, comfy):
    with FrontEnd(chromium, comfy, language="zh-CN") as front_end:
        node = front_end.page.evaluate(
            """type => {
                const node = LiteGraph.createNode(type);
                const labels = list => list.map(item => item.label ?? item.localized_name);
                return [node.title, ...labels(node.inputs), ...labels(node.outputs)];
            }""",
            PERSONALIZE,
        )
    locale = json.loads((PACK / "locales/zh/nodeDefs.json").read_text("utf-8"))[PERSONALIZE]
    names = {socket["name"] for group in ("inputs", "outputs") for socket in locale[group].values()}
    assert node[0] == locale["display_name"]
    assert set(node[1:]) == names


def test_no_browser_says_how_to_get_one(monkeypatch):
    monkeypatch.setenv("CHROMIUM", "/nowhere/chromium")
    with pytest.raises(BrowserError, match="apt-get install chromium"):
        Chromium()


def test_other_pixels_in_the_second_run_are_noticed(comfy):
    """The comparison of `make workflows` can fail."""
    from difflora_core.demo.workflows.runner import compare

    node = {"class_type": "EmptyImage", "inputs": {"width": 8, "height": 8, "batch_size": 1}}
    runs = []
    for colour in (0, 0, 255):
        prompt = {"1": copy.deepcopy(node), "2": {"class_type": "PreviewImage", "inputs": {}}}
        prompt["1"]["inputs"]["color"] = colour
        prompt["2"]["inputs"]["images"] = ["1", 0]
        runs.append(comfy.run(prompt))
    compare(runs[0], runs[1])
    with pytest.raises(WorkflowError, match="Node 2 made other pixels"):
        compare(runs[0], runs[2])
