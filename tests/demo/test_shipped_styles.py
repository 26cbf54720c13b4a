"""The looks of the demo's styles: one hue, tones kept, whatever colours the picture had."""

import pytest
import torch

from difflora_core.demo import paths
from difflora_core.demo.build.stages_shipped_styles import shipped_styles
from difflora_core.demo.world.art_styles import LUMA
from difflora_core.demo.world.shipped_styles import (
    BROWN,
    CREAM,
    PAPER,
    PRUSSIAN,
    SHIPPED,
    cyanotype,
    photo_name,
    sepia,
    style_pictures,
)
from difflora_core.methods.base import StyleMethod
from difflora_core.methods.registry import method
from difflora_core.storage.adapter_file import read_adaptation

LINES = {"demo_cyanotype": (PRUSSIAN, PAPER), "demo_sepia": (BROWN, CREAM)}


@pytest.mark.parametrize("name", list(SHIPPED))
def test_a_look_has_one_hue_and_keeps_who_is_on_the_picture(name):
    pictures, captions = style_pictures(SHIPPED[name], 3)
    plain, same = style_pictures(lambda images: images, 3)
    assert captions == same
    dark, light = (torch.tensor(colour) for colour in LINES[name])
    share = ((pictures - dark) / (light - dark)).clamp(0, 1)
    torch.testing.assert_close(share[..., 0], share[..., 2], atol=1e-4, rtol=0)
    tones = torch.stack([(plain @ torch.tensor(LUMA)).flatten(), share[..., 0].flatten()])
    assert float(torch.corrcoef(tones)[0, 1]) > 0.7


def test_cyanotype_draws_lines_where_tones_change():
    half = torch.zeros(1, 9, 9, 3)
    half[:, :, 5:] = 0.7
    drawn = cyanotype(half)[0, 4, :, 1]
    assert drawn[5] < drawn[7] - 0.2  # a line on the light side of the edge
    torch.testing.assert_close(drawn[7], cyanotype(torch.full((1, 9, 9, 3), 0.7))[0, 4, 4, 1])


def test_sepia_has_more_contrast():
    greys = torch.tensor([0.4, 0.6]).view(1, 1, 2, 1).expand(1, 1, 2, 3)
    light, dark = torch.tensor(CREAM), torch.tensor(BROWN)
    share = (sepia(greys) - dark) / (light - dark)
    torch.testing.assert_close(share[0, 0, :, 0], torch.tensor([0.365, 0.635]))


def test_the_files_that_ship_are_small_and_of_their_recipes():
    styles = {style.name: style for style in shipped_styles()}
    assert {path.stem for path in paths.STYLES.iterdir()} == set(SHIPPED) == set(styles)
    for name, style in styles.items():
        path = paths.STYLES / f"{name}.safetensors"
        made = read_adaptation(path)
        assert made.method == style.recipe.name
        assert issubclass(method(made.method), StyleMethod)
        assert path.stat().st_size < 300 * 1024
        assert 0 < int(made.facts["steps"]) <= style.config.steps
        assert photo_name(name, 0) == f"difflora_{name}_1.png"
