import numpy as np
import pytest
import torch
from PIL import Image

from difflora_core.errors import ImageError
from difflora_core.storage.image_files import read_image, write_image


def test_eight_bit_round_trip(tmp_path):
    picture = torch.randint(0, 256, (7, 5, 3)).float() / 255
    write_image(picture, tmp_path / "sub" / "a.png")
    assert torch.equal(read_image(tmp_path / "sub" / "a.png"), picture)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "1", "CMYK", "I;16"])
def test_every_mode_becomes_three_channels(tmp_path, mode):
    if mode == "I;16":
        image = Image.fromarray(np.full((4, 6), 65535 // 2, dtype=np.uint16))
    else:
        image = Image.new("RGB", (6, 4), (128, 128, 128)).convert(mode)
    file = tmp_path / ("a.tif" if mode in ("CMYK", "I;16") else "a.png")
    image.save(file)
    picture = read_image(file)
    assert picture.shape == (4, 6, 3)
    assert picture.dtype == torch.float32
    if mode not in ("1", "P"):  # those two are dithered
        assert torch.allclose(picture, torch.full_like(picture, 0.5), atol=0.01)


def test_transparency_lies_over_white(tmp_path):
    Image.new("RGBA", (3, 3), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert torch.equal(read_image(tmp_path / "clear.png"), torch.ones(3, 3, 3))
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([255, 0, 0] + [0, 255, 0] * 255)
    palette.save(tmp_path / "palette.png", transparency=0)
    assert torch.equal(read_image(tmp_path / "palette.png"), torch.ones(2, 2, 3))


def test_rotation_mark_is_applied(tmp_path):
    image = Image.new("RGB", (6, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (6, 4, 3)


def test_bad_files(tmp_path):
    with pytest.raises(ImageError, match="does not exist"):
        read_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(ImageError, match=r"text\.png cannot be read"):
        read_image(tmp_path / "text.png")
    Image.effect_noise((64, 64), 50).save(tmp_path / "cut.png")
    content = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ImageError, match=r"cut\.png cannot be read"):
        read_image(tmp_path / "cut.png")
    with pytest.raises(ImageError, match="use one of"):
        write_image(torch.rand(2, 2, 3), tmp_path / "a.gif2")


def test_absurdly_large_pictures_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    Image.new("L", (10, 10)).save(tmp_path / "big.png")
    with pytest.raises(ImageError, match="too large"):
        read_image(tmp_path / "big.png")
