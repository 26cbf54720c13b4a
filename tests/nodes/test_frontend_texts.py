"""What the front end says about our nodes: help pages, locales, tooltips; asked as it asks."""

import re

import pytest

from difflora_core.demo.comfyui.workflow_api import PACK

DOCS = "/extensions/DiffLoRA/docs"
CHINESE = re.compile("[\u4e00-\u9fff]")
MARKUP = re.compile(r"[{}|@]")
"""vue-i18n reads these as its own syntax."""


@pytest.fixture(scope="module")
def nodes(comfy):
    """Our nodes as /object_info tells them."""
    info = comfy.object_info()
    ours = {node: told for node, told in info.items() if node.startswith("DiffLoRA_")}
    assert ours, "the checks would hold for nothing"
    return ours


@pytest.fixture(scope="module")
def locales(comfy):
    return comfy.get("/i18n")


def inputs_of(told):
    """Input id to its options."""
    groups = (told["input"].get(group) or {} for group in ("required", "optional"))
    return {name: spec[1] for group in groups for name, spec in group.items()}


def test_every_node_explains_itself_and_is_found(nodes):
    for node, told in nodes.items():
        assert told["description"], node
        assert told["search_aliases"], node
        assert re.fullmatch(r"DiffLoRA(/[A-Za-z0-9 -]+)?", told["category"]), node
        assert "_" not in told["display_name"], node
        assert [name for name, options in inputs_of(told).items() if not options["tooltip"]] == []


def test_no_two_nodes_have_the_same_name(comfy):
    """Neither with one of ours nor with one of core's, where the menu would show both alike."""
    names = [told["display_name"] for told in comfy.object_info().values()]
    ours = {t["display_name"] for n, t in comfy.object_info().items() if n.startswith("DiffLoRA_")}
    assert {name: names.count(name) for name in ours} == dict.fromkeys(ours, 1)


@pytest.mark.parametrize("page", ["{node}.md", "{node}/zh.md"])
def test_every_node_has_a_help_page_where_the_front_end_looks(nodes, comfy, ask, page):
    for node, told in nodes.items():
        text = ask(comfy, f"{DOCS}/{page.format(node=node)}")
        missing = [name for name in inputs_of(told) if f"`{name}`" not in text]
        assert missing == [], node
        assert text.startswith("# "), node
        assert bool(CHINESE.search(text)) == page.endswith("zh.md"), node
        assert 400 < len(text.encode()) < 6000, node


def test_title_of_a_help_page_is_the_name_of_the_node(nodes, comfy, ask, locales):
    for node, told in nodes.items():
        for page, name in (
            (f"{node}.md", told["display_name"]),
            (f"{node}/zh.md", locales["zh"]["nodeDefs"][node]["display_name"]),
        ):
            assert ask(comfy, f"{DOCS}/{page}").split("\n")[0] == f"# {name}"


def test_no_help_page_is_left_over(nodes):
    pages = {path.stem for path in (PACK / "web" / "docs").glob("*.md")}
    folders = {path.name for path in (PACK / "web" / "docs").iterdir() if path.is_dir()}
    assert pages == folders == set(nodes)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_locale_covers_exactly_the_sockets(nodes, locales, language):
    locale = {n: e for n, e in locales[language]["nodeDefs"].items() if n.startswith("DiffLoRA_")}
    assert locale.keys() == nodes.keys()
    for node, told in nodes.items():
        entry = locale[node]
        assert entry["inputs"].keys() == inputs_of(told).keys(), node
        assert list(entry["outputs"]) == [str(k) for k in range(len(told["output"]))], node
        texts = [entry["display_name"], entry["description"]]
        texts += [socket[key] for socket in entry["inputs"].values() for key in ("name", "tooltip")]
        for socket, tooltip in zip(entry["outputs"].values(), told["output_tooltips"], strict=True):
            assert ("tooltip" in socket) == bool(tooltip), node
            texts += socket.values()
        assert all(texts), node
        assert [text for text in texts if MARKUP.search(text)] == [], node


def test_english_says_what_the_schemas_say(nodes, locales):
    """`make contracts` writes it."""
    for node, told in nodes.items():
        entry = locales["en"]["nodeDefs"][node]
        assert entry["display_name"] == told["display_name"]
        assert entry["description"] == told["description"]
        for name, options in inputs_of(told).items():
            assert entry["inputs"][name]["tooltip"] == options["tooltip"], (node, name)


def test_chinese_is_chinese(nodes, locales):
    for node in nodes:
        entry = locales["zh"]["nodeDefs"][node]
        texts = [entry["display_name"], entry["description"]]
        texts += [socket["tooltip"] for socket in entry["inputs"].values()]
        assert [text for text in texts if not CHINESE.search(text)] == [], node
