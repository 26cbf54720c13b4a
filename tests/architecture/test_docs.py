"""README and docs/: short enough, and everything that they point at or quote exists."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.__main__ import BENCHMARKS
from difflora_core import limits

MAX_README_LINES = 200
MAX_PICTURE_BYTES = 600 * 1024
ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\((?P<path>[^)#\s]*)(?:#(?P<heading>[^)\s]*))?\)")
CODE = re.compile(r"^ *```.*?^ *```|`[^`\n]+`", re.MULTILINE | re.DOTALL)
FOLDERS = "benchmarks|difflora_core|docs|locales|nodes|tests|web|workflows"
QUOTED_PATH = re.compile(rf"`((?:{FOLDERS})/[\w./]*)`")


def code(text):
    """Everything that stands as code, one piece a line."""
    return "\n".join(CODE.findall(text))


def headings(text):
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page):
    """Relative links of a page that lead nowhere, headings included."""
    broken = []
    for link in LINK.finditer(page.read_text("utf-8")):
        if link["path"].startswith(("http:", "https:")):
            continue
        target = (page.parent / link["path"]) if link["path"] else page
        if not target.exists():
            broken.append(link[0])
        elif link["heading"] and link["heading"] not in headings(target.read_text("utf-8")):
            broken.append(link[0])
    return broken


def unknown_commands(text, root):
    """`make` targets and benchmarks in a page's code that do not exist."""
    targets = set(re.findall(r"^([\w-]+):", (root / "Makefile").read_text("utf-8"), re.MULTILINE))
    quoted = set(re.findall(r"\bmake ([a-z][\w-]*)", code(text))) - targets
    return sorted(quoted | (set(re.findall(r"\bname=(\w+)", code(text))) - set(BENCHMARKS)))


def test_readme_is_short(root):
    assert (root / "README.md").read_text("utf-8").count("\n") <= MAX_README_LINES


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_quoted_commands_exist(page, root):
    assert unknown_commands(page.read_text("utf-8"), root) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_quoted_paths_exist(page, root):
    quoted = QUOTED_PATH.findall(page.read_text("utf-8"))
    assert [path for path in quoted if not (root / path).exists()] == []


def test_the_limits_are_told_as_they_are(root):
    """The table of docs/reliability.md lists every limit with its value."""
    text = (root / "docs" / "reliability.md").read_text("utf-8")
    told = {
        name: float(value) for name, value in re.findall(r"^\| `(\w+)`[^|]*\| (\d+) ", text, re.M)
    }
    assert told == {name: value for name, value in vars(limits).items() if name.isupper()}


def test_what_is_wrong_would_be_found(tmp_path, root):
    page = tmp_path / "page.md"
    links = "[a](gone.md) [b](#a-heading-here) [c](#gone) [d](page.md)"
    page.write_text(f"# A heading: here\n{links}\n")
    assert broken_links(page) == ["](gone.md)", "](#gone)"]
    block = "```\nmake bench name=gone\nmake bench name=identity\n```"
    text = f"make sense\n`make test`, `make tea`\n{block}\n"
    assert unknown_commands(text, root) == ["gone", "tea"]
    assert QUOTED_PATH.findall("`nodes/gone.py`, `torch/nn.py`") == ["nodes/gone.py"]


def test_readme_names_every_node_and_workflow(root):
    text = (root / "README.md").read_text("utf-8")
    nodes = json.loads((root / "locales" / "en" / "nodeDefs.json").read_text("utf-8"))
    assert [n["display_name"] for n in nodes.values() if n["display_name"] not in text] == []
    workflows = [path.stem for path in (root / "workflows").glob("*_demo.json")]
    assert [w for w in workflows if f"`{w.removesuffix('_demo')}`" not in text] == []


def test_pictures_are_small_and_shown(root):
    pictures = list((root / "docs" / "pictures").iterdir())
    assert sum(path.stat().st_size for path in pictures) < MAX_PICTURE_BYTES
    shown = "".join(page.read_text("utf-8") for page in PAGES)
    assert [path.name for path in pictures if f"pictures/{path.name})" not in shown] == []
