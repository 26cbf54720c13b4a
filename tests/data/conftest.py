"""Folders of drawn people, as somebody might have them."""

from pathlib import Path

import pytest
from PIL import Image

from difflora_core.data.choices import ChoiceSettings
from difflora_core.data.prepare import PrepareConfig
from difflora_core.demo.paths import FACES
from difflora_core.demo.world.identities import split_seeds
from difflora_core.demo.world.scenes import render_portraits

PEOPLE, PICTURES = 3, 4
NAMES = ("anna", "bodo", "Žofie 🙂")


def images(seeds, numbers):
    """Drawn portraits as 8-bit pictures of 64 x 64."""
    drawn = (render_portraits(seeds, numbers).images * 255).round().byte().numpy()
    return [Image.fromarray(pixels) for pixels in drawn]


@pytest.fixture(scope="session")
def portraits():
    """Pictures of three people, four of each."""
    seeds = split_seeds("test", PEOPLE)
    flat = images([seed for seed in seeds for _ in range(PICTURES)], list(range(PICTURES)) * PEOPLE)
    return [flat[k * PICTURES : (k + 1) * PICTURES] for k in range(PEOPLE)]


@pytest.fixture
def people_folder(tmp_path, portraits) -> Path:
    """One folder a person."""
    folder = tmp_path / "photos"
    for name, own in zip(NAMES, portraits, strict=True):
        (folder / name).mkdir(parents=True)
        for number, picture in enumerate(own):
            picture.save(folder / name / f"{number}.png")
    return folder


def demo_settings() -> PrepareConfig:
    """Settings for the demo's pictures and face package."""
    return PrepareConfig(
        resolution=64,
        faces=str(FACES),
        smallest_face=12,
        encoding="png",
        choices=ChoiceSettings(same_person=0.5),
    )


@pytest.fixture(scope="session")
def demo_config() -> PrepareConfig:
    """See `demo_settings`."""
    return demo_settings()
