"""The pictures of the documentation: cut from what workflows save, laid out in labelled rows."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from difflora_core.demo.workflows.pictures import GAP, LABEL, SIDE, Strip, draw, saved_pictures
from difflora_core.demo.workflows.targets import GRID_SIDE

RED, BLUE = (255, 0, 0), (0, 0, 255)


def plain(colour, width=64, height=64):
    """A picture of one colour as ComfyUI hands it out."""
    return np.full((height, width, 3), colour, np.uint8)


@pytest.fixture
def workflow():
    """A plain Save Image node, and one that saves a grid."""
    nodes = [
        {"id": 1, "type": "ImageScaleBy"},
        {"id": 2, "type": "SaveImage", "widgets_values": ["DiffLoRA/alone"]},
        {"id": 3, "type": "DiffLoRA_CompareGrid"},
        {"id": 4, "type": "SaveImage", "widgets_values": ["DiffLoRA/grid"]},
    ]
    return {"nodes": nodes, "links": [[1, 1, 0, 2, 0, "IMAGE"], [2, 3, 0, 4, 0, "IMAGE"]]}


def test_saved_pictures_are_named_and_grids_are_cut(workflow):
    grid = np.concatenate([plain(RED, GRID_SIDE, 214), plain(BLUE, GRID_SIDE, 214)], 1)
    result = SimpleNamespace(pictures={"2": [plain(RED), plain(BLUE)], "4": [grid]})
    found = saved_pictures(workflow, result)
    assert {key: picture.getpixel((0, 0)) for key, picture in found.items()} == {
        ("alone", 0): RED,
        ("alone", 1): BLUE,
        ("grid", 0): RED,
        ("grid", 1): BLUE,
    }
    assert found["grid", 1].size == (GRID_SIDE, GRID_SIDE)


def test_rows_stand_below_each_other_and_wide_pictures_stay_wide():
    saved = {
        ("a", 0): Image.fromarray(plain(RED)),
        ("b", 0): Image.fromarray(plain(BLUE, width=128)),
    }
    sheet = draw(Strip("", [[("a", ("a", 0)), ("b", ("b", 0))], [("", ""), ("", "")]]), saved)
    assert sheet.size == (SIDE + GAP + 2 * SIDE, 2 * (SIDE + LABEL))
    assert sheet.getpixel((SIDE - 1, SIDE - 1)) == RED
    assert sheet.getpixel((SIDE + GAP, 0)) == sheet.getpixel((sheet.width - 1, SIDE - 1)) == BLUE
    assert sheet.getpixel((0, SIDE + LABEL)) == (255, 255, 255)
    labels = np.asarray(sheet)[SIDE : SIDE + LABEL]
    assert (labels < 128).any(), "the first row is labelled"
