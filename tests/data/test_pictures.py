"""Picture files of every kind become RGB, or a reason; never a crash."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from difflora_core.data.pictures import open_picture
from difflora_core.errors import DatasetError


def stored(picture, kind="PNG", **options):
    """The bytes of a picture file."""
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(width=40, height=30):
    """A picture whose corners differ."""
    rows, columns = np.mgrid[:height, :width]
    planes = (columns * 255 // width, rows * 255 // height, np.full((height, width), 40))
    return Image.fromarray(np.stack(planes, -1).astype(np.uint8))


def refusal(data, smallest=1):
    """Why a file is no picture."""
    with pytest.raises(DatasetError) as error:
        open_picture(data, smallest)
    return str(error.value)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns(orientation):
    """As Pillow's transpositions say, and the mark is gone: nobody turns it twice."""
    turns = {
        2: (Image.Transpose.FLIP_LEFT_RIGHT,),
        3: (Image.Transpose.ROTATE_180,),
        4: (Image.Transpose.FLIP_TOP_BOTTOM,),
        5: (Image.Transpose.TRANSPOSE,),
        6: (Image.Transpose.ROTATE_270,),
        7: (Image.Transpose.TRANSVERSE,),
        8: (Image.Transpose.ROTATE_90,),
    }
    expected = gradient()
    for turn in turns.get(orientation, ()):
        expected = expected.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = open_picture(stored(gradient(), exif=exif))
    assert np.array_equal(np.asarray(opened), np.asarray(expected))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "I;16"])
def test_modes_become_rgb(mode):
    """Grey stays grey, colours stay colours."""
    grey = Image.fromarray(np.linspace(0, 255, 64 * 64).reshape(64, 64).astype(np.uint8))
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    else:
        picture = grey if mode == "P" else grey.convert("RGB")
        picture = picture.convert(mode)
    kind = "TIFF" if mode in ("CMYK", "YCbCr", "I;16") else "PNG"
    opened = np.asarray(open_picture(stored(picture, kind))).astype(int)
    assert opened.shape == (64, 64, 3)
    limit = {"1": 255, "CMYK": 8, "YCbCr": 8}.get(mode, 1)
    assert np.abs(opened - np.asarray(grey)[..., None]).max() <= limit


def test_transparent_pixels_are_white():
    """Also those of a palette."""
    clear = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    assert np.asarray(open_picture(stored(clear))).min() == 255
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([10, 20, 30] * 256)
    assert np.asarray(open_picture(stored(palette, transparency=0))).min() == 255


def test_a_60_megapixel_photo():
    """It is opened; its header alone decides about one that is larger than any camera's."""
    opened = open_picture(stored(Image.new("RGB", (9000, 6700), "teal"), "JPEG"))
    assert opened.size == (9000, 6700)
    bomb = bytearray(stored(Image.new("1", (16, 16))))
    bomb[16:24] = struct.pack(">II", 60_000, 60_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bytes(bomb[12:29])))
    assert "3600000000 pixels" in refusal(bytes(bomb))
    bomb[16:24] = struct.pack(">II", 12_000, 12_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bytes(bomb[12:29])))
    assert "12000 x 12000" in refusal(bytes(bomb))


def test_animations_strips_and_small_ones():
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        moving = stored(frames[0], kind, save_all=True, append_images=frames[1:])
        assert "animated" in refusal(moving)
        open_picture(stored(frames[0], kind))
    assert "strip" in refusal(stored(Image.new("RGB", (9, 1))))
    assert "too small: 40 x 30" in refusal(stored(gradient()), 31)
    assert open_picture(stored(gradient()), 30).size == (40, 30)


def test_phones_write_several_pictures_into_one_file():
    """MPO: the first one is the photo."""
    data = stored(gradient(), "MPO", save_all=True, append_images=[gradient()])
    assert open_picture(data).size == (40, 30)


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 1000, b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<svg/>", b"\xff\xd8\xff", b"GIF89a"]
)
def test_what_is_no_picture(data):
    assert "cannot be read" in refusal(data)


def test_float_pixels_are_refused():
    wild = Image.fromarray(np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32))
    assert "8 or 16 bits" in refusal(stored(wild, "TIFF"))


SAMPLES = [stored(gradient(), kind) for kind in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")]


@given(
    st.sampled_from(SAMPLES),
    st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=8),
    st.floats(0.05, 1),
)
def test_damaged_files_are_pictures_or_reasons(data, changes, share):
    """Bytes changed and the end cut off: never another exception."""
    broken = bytearray(data[: max(1, int(len(data) * share))])
    for place, value in changes:
        broken[int(place * len(broken))] = value
    try:
        picture = open_picture(bytes(broken))
    except DatasetError as reason:
        str(reason).encode()
    else:
        assert picture.mode == "RGB"
