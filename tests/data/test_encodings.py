"""Latents and encoded prompts beside a dataset: what they are, and when they are made again."""

import pytest
import torch

from difflora_core.base_model.protocol import TextCondition
from difflora_core.data import encodings
from difflora_core.data.encodings import Latents, Prompts, encode_latents, encode_prompts
from difflora_core.data.prepare import prepare
from difflora_core.demo.networks.base import load_base
from difflora_core.demo.paths import BASE
from difflora_core.errors import DatasetError


@pytest.fixture
def data(people_folder, tmp_path, demo_config):
    """A dataset of 12 pictures with 3 captions."""
    for name, text in (("anna/0", "first"), ("anna/1", "second\nfirst")):
        (people_folder / f"{name}.txt").write_text(text, "utf-8")
    return prepare(people_folder, tmp_path / "set", demo_config)


@pytest.fixture(scope="module")
def base():
    """The demo's base model."""
    return load_base(BASE)


def test_they_are_what_the_base_makes(data, base):
    latents = encode_latents(data, base, "demo", mirrored=True)
    prompts = encode_prompts(data, base, "demo")
    for row, record in enumerate(data):
        image = record.picture[None]
        for mirrored, seen in ((False, image), (True, image.flip(2))):
            expected = base.encode_images(seen)[0]
            read = latents.read(row, mirrored)
            assert read.dtype == torch.float16
            assert torch.allclose(read.float(), expected, atol=4e-3, rtol=1e-3)  # half precision
        numbers = prompts.of_row(row)
        text, direct = prompts.read(numbers), base.encode_prompts(record.captions)
        assert torch.allclose(text.context.float(), direct.context, atol=4e-3, rtol=1e-3)
        assert torch.allclose(text.pooled.float(), direct.pooled, atol=4e-3, rtol=1e-3)
    assert prompts.of_row(0) == [1]
    assert prompts.of_row(1) == [2, 1]
    empty = base.encode_prompts([""]).context
    assert torch.allclose(prompts.read([0]).context.float(), empty, atol=4e-3, rtol=1e-3)


class Counting:
    """A base that counts what it is asked for."""

    def __init__(self, fails_at=-1, value=1.0):
        self.pictures, self.texts = 0, []
        self.fails_at, self.value = fails_at, value

    def encode_images(self, images):
        self.pictures += 1
        if self.pictures == self.fails_at:
            raise KeyboardInterrupt
        return torch.full((1, 4, 8, 8), self.value)

    def encode_prompts(self, prompts):
        self.texts += prompts
        return TextCondition(torch.ones(len(prompts), 3, 2), torch.ones(len(prompts), 2))


def test_only_what_is_missing_is_made(data, monkeypatch):
    """A stopped run goes on; another encoder makes all anew; every prompt is encoded once."""
    monkeypatch.setattr("difflora_core.data.encodings.PROMPTS_EACH", 2)
    base = Counting()
    encode_latents(data, base, "one")
    encode_latents(data, base, "one")
    assert base.pictures == 12
    encode_latents(data, base, "two")
    assert base.pictures == 24
    assert Latents(data).facts.maker == "two"
    prompts = encode_prompts(data, base, "one")
    encode_prompts(data, base, "one")
    assert base.texts == ["", "first", "second", "a photo of a person"]
    assert [prompts.of_row(row) for row in (0, 1, 2)] == [[1], [2, 1], [3]]
    (data.folder / "encoded" / "prompts" / "00001.safetensors").write_bytes(b"half")
    encode_prompts(data, base, "one")
    assert base.texts[4:] == ["second", "a photo of a person"]


def test_a_stop_leaves_nothing_that_reads_as_whole(data):
    with pytest.raises(KeyboardInterrupt):
        encode_latents(data, Counting(fails_at=5), "one")
    with pytest.raises(DatasetError, match="no encoded latents"):
        Latents(data)
    with pytest.raises(DatasetError, match="not finite"):
        encode_latents(data, Counting(value=float("inf")), "one")
    with pytest.raises(DatasetError, match="no encoded prompts"):
        Prompts(data)


def test_damaged_pictures_are_not_encoded(data):
    """One byte of a picture, which its decoder would take for another colour."""
    shard = data.folder / data.facts.files[0].name
    changed = bytearray(shard.read_bytes())
    changed[len(changed) // 2] ^= 1
    shard.write_bytes(changed)
    base = Counting()
    with pytest.raises(DatasetError, match=f"{shard.name} is damaged"):
        encode_latents(data, base, "one")
    assert base.pictures == 0


def test_those_of_another_dataset_are_refused(people_folder, data, demo_config):
    encode_latents(data, Counting(), "one")
    (people_folder / "bodo" / "0.png").unlink()
    changed = prepare(people_folder, data.folder, demo_config, update=True)
    with pytest.raises(DatasetError, match="as it was before"):
        Latents(changed)
    base = Counting()
    encode_latents(changed, base, "one")
    assert base.pictures == 11
    with pytest.raises(DatasetError, match="no latent of row 0 mirrored"):
        Latents(changed).read(0, mirrored=True)
    assert encodings.SHARD_ROWS == 256
