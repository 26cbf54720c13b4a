"""Two people in one picture by mask: core's nodes and our hooks, judged by who is where."""

import numpy as np
import pytest
import torch
from PIL import Image

from difflora_core.demo import paths
from difflora_core.demo.networks.judges import PLAIN_LOOKS, load_judges
from difflora_core.demo.workflows.masked_people import PICTURE, MaskedScene, masked_people
from difflora_core.demo.world.identities import split_seeds
from difflora_core.demo.world.scenes import PICTURE_SIZE, render_portraits
from difflora_core.evaluation.metrics import centroid


@pytest.fixture(scope="module")
def people(is_shipped):
    """Three people that no trained part has met."""
    if not is_shipped:
        pytest.skip("the demo world is not trained")
    return split_seeds("validation", 3)


@pytest.fixture(scope="module")
def photos(comfy, people, tmp_path_factory):
    folder, names = tmp_path_factory.mktemp("people"), []
    for seed in people:
        pixels = render_portraits([seed], [0], looks=("photo",)).images[0]
        path = folder / f"person{seed}.png"
        Image.fromarray((pixels * 255).round().byte().numpy()).save(path)
        names.append(comfy.upload_picture(path))
    return names


@pytest.fixture(scope="module")
def shown(comfy, photos):
    """The picture with masks of two people."""
    return comfy.run(masked_people(photos[:2], MaskedScene(steps=8))).picture(PICTURE)


@pytest.fixture(scope="module")
def likeness(people):
    """Cosines (columns, people) of a picture's columns to the people, by a judge network."""
    judges = load_judges(paths.JUDGES)
    known = [
        centroid(judges.embed(render_portraits([s] * 8, range(40, 48), looks=PLAIN_LOOKS).images))
        for s in people
    ]

    def measure(picture):
        columns = torch.from_numpy(picture.copy()).float().split(PICTURE_SIZE, 1)
        found = torch.nn.functional.normalize(judges.embed(torch.stack(columns) / 255), dim=-1)
        return found @ torch.stack(known).T

    return measure


def test_each_mask_holds_its_own_person(likeness, shown):
    found = likeness(shown)
    assert found.argmax(1).tolist() == [0, 1]
    assert found.diagonal().min() > 0.4


def test_three_people(comfy, photos, likeness):
    """The base model never saw three people; each mask is drawn as a picture of its own."""
    scene = MaskedScene("photo of a person, blue background", steps=8, area="mask bounds")
    found = likeness(comfy.run(masked_people(photos, scene)).picture(PICTURE))
    assert found.argmax(1).tolist() == [0, 1, 2]
    assert found.diagonal().min() > 0.4


def test_masks_of_other_sizes_are_scaled(comfy, photos, shown):
    nodes = masked_people(photos[:2], MaskedScene(steps=8))
    nodes["outside"]["inputs"] |= {"width": 512, "height": 200}
    nodes["column"]["inputs"] |= {"width": 256, "height": 200}
    nodes["mask1"]["inputs"]["x"] = 256
    np.testing.assert_array_equal(comfy.run(nodes).picture(PICTURE), shown)


def test_order_of_the_people_is_free(comfy, photos, shown):
    """Both hooks count at every step, whichever comes first."""
    nodes = masked_people(photos[1::-1], MaskedScene(steps=8))
    for number, x in ((0, PICTURE_SIZE), (1, 0)):
        nodes[f"mask{number}"]["inputs"]["x"] = x
    other = comfy.run(nodes).picture(PICTURE)
    assert np.abs(other.astype(int) - shown).max() <= 3


def test_empty_mask_leaves_the_picture_to_the_others(comfy, photos, shown):
    nodes = masked_people(photos[:2], MaskedScene(steps=8))
    nodes["mask1"]["inputs"]["operation"] = "multiply"  # with the black behind it
    nodes["mask0"] = {
        "class_type": "SolidMask",
        "inputs": {"value": 1.0, "width": 2 * PICTURE_SIZE, "height": PICTURE_SIZE},
    }
    first_alone = masked_people(photos[:1], MaskedScene(steps=8))
    first_alone["empty"]["inputs"]["width"] = 2 * PICTURE_SIZE
    del first_alone["placed0"]["inputs"]["mask"]
    alone, both = (comfy.run(n).picture(PICTURE) for n in (first_alone, nodes))
    assert np.abs(both.astype(int) - alone).max() <= 3
    assert np.abs(both.astype(int) - shown).max() > 30
