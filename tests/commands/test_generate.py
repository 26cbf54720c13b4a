"""`generate`: the LoRA file of a photo is that of the library's own road, and faults are named."""

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from difflora_core.commands.generate import Settings, read_photo, run
from difflora_core.commands.main import plain_console
from difflora_core.demo import paths
from difflora_core.demo.build.features import demo_encoders
from difflora_core.diffusion.sampler import SampleSettings
from difflora_core.errors import DiffLoRAError, EncoderError
from difflora_core.models.layers import DrawnFrom
from difflora_core.storage.checkpoint import load_model
from difflora_core.storage.clip_vision_file import load_clip_vision
from difflora_core.vision.features import extract_features

PHOTO = str(paths.ROOT / "workflows" / "difflora_demo_person.png")
SECOND = str(paths.ROOT / "workflows" / "difflora_demo_person_2.png")
ENCODERS = {"faces": str(paths.FACES), "clip_vision": str(paths.CLIP_VISION)}


def settings(*photos, **given):
    return Settings(str(paths.DIFFLORA), photos or (PHOTO,), **{**ENCODERS, **given})


def changes(file):
    """Change of each layer of a kohya file."""
    state = load_file(file)
    stems = [key.removesuffix(".alpha") for key in state if key.endswith(".alpha")]
    return {
        stem: state[f"{stem}.alpha"].double()
        / len(state[f"{stem}.lora_down.weight"])
        * state[f"{stem}.lora_up.weight"].double()
        @ state[f"{stem}.lora_down.weight"].double()
        for stem in stems
    }


def wanted(*photos, strength=1.0):
    """The changes that the library's road gives, by the same stems."""
    pictures = [read_photo(paths.ROOT / photo) for photo in photos]
    model = load_model(paths.DIFFLORA)
    with torch.no_grad():
        condition = model.condition(extract_features(pictures, *demo_encoders()).features)
        weights = model.decode(model.mean_latent(condition)).batch_item(0)
    return {
        f"lora_unet_{name.replace('.', '_')}": strength * layer.delta().double().detach()
        for name, layer in weights.layers.items()
    }


def close(found, expected, tolerance=2e-3):
    assert found.keys() == expected.keys()
    for stem, change in expected.items():
        assert (found[stem] - change).norm() <= tolerance * change.norm() + 1e-9, stem


def test_as_a_process_with_two_photos(tmp_path, command):
    out = tmp_path / "her.safetensors"
    options = ("--faces", paths.FACES, "--clip-vision", paths.CLIP_VISION)
    ended = command("generate", paths.DIFFLORA, PHOTO, SECOND, "--out", out, *options)
    assert "her.safetensors: 0.2 MB" in ended.stdout
    assert ended.stderr == ""
    close(changes(out), wanted(PHOTO, SECOND))
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.title"] == "her"
    assert metadata["difflora.base"] == "demo"
    assert metadata["difflora.steps"] == "0"
    assert "difflora.seed" not in metadata
    assert not [v for v in metadata.values() if "person" in v]  # no name of a photo


def test_strength_and_rank(tmp_path):
    run(settings(out=str(tmp_path / "a.safetensors"), strength=-0.5), plain_console())
    close(changes(tmp_path / "a.safetensors"), wanted(PHOTO, strength=-0.5))
    run(settings(out=str(tmp_path / "b.safetensors"), rank=1), plain_console())
    small, whole = changes(tmp_path / "b.safetensors"), wanted(PHOTO)
    for stem, change in whole.items():
        rest = torch.linalg.svdvals(change)[1:].norm()
        assert float((small[stem] - change).norm()) == pytest.approx(float(rest), abs=2e-3)


def test_variants_have_seeds_of_their_own(tmp_path):
    steps = SampleSettings(steps=3)
    several = settings(out=str(tmp_path / "v.safetensors"), variants=2, seed=4, sampling=steps)
    run(several, plain_console())
    alone = settings(out=str(tmp_path / "w.safetensors"), variants=1, seed=5, sampling=steps)
    run(alone, plain_console())
    first, second = (changes(tmp_path / f"v_{n}.safetensors") for n in (1, 2))
    close(changes(tmp_path / "w.safetensors"), second)
    stem = next(iter(first))
    assert not torch.allclose(first[stem], second[stem], rtol=0.01)
    with safe_open(tmp_path / "v_2.safetensors", "pt") as file:
        assert file.metadata()["difflora.seed"] == "5"


def test_exif_turns_a_photo(tmp_path):
    picture = Image.new("RGB", (6, 4), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    picture.save(tmp_path / "turned.jpg", exif=exif)
    assert read_photo(tmp_path / "turned.jpg").shape == (6, 4, 3)


def test_faults_are_named(tmp_path):
    Image.new("RGB", (64, 64), "grey").save(tmp_path / "empty.png")
    (tmp_path / "no.png").write_bytes(b"no picture")
    for faulty, said in (
        (settings(str(tmp_path / "no.png")), "cannot be read as a picture"),
        (settings(str(tmp_path / "gone.png")), "cannot be read as a picture"),
        (settings(str(tmp_path / "empty.png")), "no face that could be found"),
        (settings(faces="", clip_vision=""), "Nothing looks at the photos"),
        (settings(clip_vision=""), "also looks at the whole photo"),
        (settings(faces=str(tmp_path)), "no .onnx files"),
        (settings(clip_vision=str(tmp_path)), "is no CLIP vision"),
        (settings(device="cuda:99"), "no device"),
        (settings(out="her.ckpt"), r"must end in \.safetensors"),
        (Settings(str(tmp_path / "gone.safetensors"), (PHOTO,), **ENCODERS), "no DiffLoRA model"),
        (Settings(str(paths.OLD_LORA), (PHOTO,), **ENCODERS), "no DiffLoRA model"),
    ):
        with pytest.raises(DiffLoRAError, match=said):
            run(faulty, plain_console())


@pytest.fixture
def clip_folder(tmp_path):
    """A small ViT of OpenAI's width as transformers keeps it."""
    config = CLIPVisionConfig(
        hidden_size=768,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=12,
        image_size=32,
        patch_size=16,
        projection_dim=8,
    )
    with DrawnFrom(torch.Generator().manual_seed(1)):
        CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def test_clip_vision_of_a_folder_and_of_its_file_are_one(clip_folder):
    pictures = torch.rand(1, 40, 40, 3, generator=torch.Generator().manual_seed(0))
    folder = load_clip_vision(clip_folder)
    file = load_clip_vision(clip_folder / "model.safetensors")
    assert folder.image_size == file.image_size == 32
    for one, other in zip(folder.encode(pictures), file.encode(pictures), strict=True):
        assert torch.allclose(one, other, atol=1e-5)  # attention may be computed in another way


def test_another_network_is_no_clip_vision(tmp_path, clip_folder):
    (clip_folder / "config.json").write_text('{"model_type": "bert"}')
    for path in (paths.OLD_LORA, tmp_path / "gone", clip_folder):
        with pytest.raises(EncoderError):
            load_clip_vision(path)
