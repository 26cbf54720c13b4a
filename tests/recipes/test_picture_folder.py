"""Pictures of a folder: each by itself, with what its text file says, as latents."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from difflora_core.errors import ConfigError, ImageError
from difflora_core.storage.image_files import read_image
from difflora_core.training.picture_examples import picture_examples
from difflora_core.training.picture_folder import folder_examples, joined, pictures_in


class Encoder:
    """A base whose latents are the pixels; it counts how many pictures it is given at once."""

    def __init__(self):
        self.sizes = []

    def encode_images(self, images):
        self.sizes.append(tuple(images.shape))
        return images.permute(0, 3, 1, 2)


def written(folder, count=3, size=(8, 8)):
    """So many noise pictures, their names backwards in time."""
    for k in range(count):
        pixels = torch.randint(
            0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(k)
        )
        Image.fromarray(pixels.byte().numpy()).save(folder / f"{k}.png")
    return pictures_in(folder)


@pytest.mark.parametrize("flip", [False, True])
def test_they_are_what_a_batch_of_them_is(tmp_path, flip):
    paths = written(tmp_path)
    (tmp_path / "1.txt").write_text("a hat\n\n a red hat ", "utf-8")
    (tmp_path / "notes.md").write_text("no picture")
    encoder, seen = Encoder(), []
    made = folder_examples(
        encoder, paths, (8, 8), ["photo", "picture"], flip, lambda *at: seen.append(at)
    )
    images = torch.stack([read_image(path)[0] for path in paths])
    lists = [["photo", "picture"], ["a hat", "a red hat"], ["photo", "picture"]]
    wanted = picture_examples(Encoder(), images, prompts=lists, flip=flip)
    assert torch.equal(made.latents, wanted.latents)
    assert [list(each) for each in made.prompts] == [list(each) for each in wanted.prompts]
    assert encoder.sizes == [(1 + flip, 8, 8, 3)] * 3  # never two pictures at once
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_other_shapes_are_scaled_and_cut_evenly(tmp_path):
    paths = written(tmp_path, 1, (24, 8))  # three times as wide as high
    made = folder_examples(Encoder(), paths, (8, 8), ["photo"], flip=False)
    middle = read_image(paths[0])[0][:, 8:16]
    assert torch.equal(made.latents[0], middle.permute(2, 0, 1))
    assert folder_examples(Encoder(), paths, (16, 12), ["photo"]).latents.shape == (2, 3, 16, 12)


def test_parts_stand_one_after_another(tmp_path):
    one, other = (
        folder_examples(Encoder(), [path], (8, 8), [path.stem], False)
        for path in written(tmp_path, 2)
    )
    both = joined([other, one])
    assert torch.equal(both.latents, torch.cat([other.latents, one.latents]))
    assert [list(each) for each in both.prompts] == [["1"], ["0"]]
    assert both.masks is None
    half = torch.arange(64.0).view(1, 8, 8) / 63
    masked = joined([one, replace(other, masks=half)])  # the one without counts wholly
    assert torch.equal(masked.masks, torch.cat([torch.ones(1, 8, 8), half]))


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no pictures in the folder .*put some into it"):
        pictures_in(tmp_path)
    with pytest.raises(ConfigError, match="folder nowhere cannot be read"):
        pictures_in(tmp_path / "nowhere")
    paths = written(tmp_path, 2)
    (tmp_path / "0.txt").write_bytes(b"\xff\xfe caption")
    with pytest.raises(ConfigError, match=r"0\.txt is not in UTF-8"):
        folder_examples(Encoder(), paths, (8, 8), ["photo"])
    (tmp_path / "0.txt").unlink()
    paths[1].write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"1\.png"):
        folder_examples(Encoder(), paths, (8, 8), ["photo"])
