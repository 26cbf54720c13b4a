import numpy as np
import pytest
import torch
from PIL import Image

from difflora_core.errors import ImageError
from difflora_core.storage.image_files import write_image


@pytest.mark.parametrize("suffix", ["png", "tif", "BMP"])
def test_eight_bits_are_written_exactly(tmp_path, suffix):
    pixels = torch.randint(0, 256, (7, 5, 3), generator=torch.Generator().manual_seed(1))
    write_image(pixels.float() / 255, tmp_path / "sub" / f"a.{suffix}")
    with Image.open(tmp_path / "sub" / f"a.{suffix}") as opened:
        np.testing.assert_array_equal(np.asarray(opened), pixels.numpy())


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(ImageError, match="use one of"):
        write_image(torch.rand(2, 2, 3), tmp_path / "a.gif2")
    with pytest.raises(ImageError, match="0 to 1"):
        write_image(torch.full((2, 2, 3), 7.0), tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
