"""The networks that judge, small and random, against the same numbers by another road."""

import hashlib
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from difflora_core.errors import EncoderError
from difflora_core.evaluation.backbones import CLIP, DINO, DINOv2, Faces, PickScore, weight_files
from difflora_core.evaluation.image_reward import MEAN, STD, ImageReward
from difflora_core.evaluation.inception import InceptionFeatures, fid_network
from difflora_core.models.layers import DrawnFrom
from difflora_core.vision.face_encoder import DetectedFace
from difflora_core.vision.preprocess import CLIP_MEAN, CLIP_STD

CPU = torch.device("cpu")
SIDE = 32
SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
PROMPTS = ["a photo of a person", "a drawing"]


def pictures(count=2, side=SIDE):
    generator = torch.Generator().manual_seed(3)
    return list((torch.rand(count, side, side, 3, generator=generator) * 255).round() / 255)


def normal(images, mean, std):
    """(N, 3, h, w) float64, by hand."""
    planes = torch.stack(images).double().permute(0, 3, 1, 2)
    return (planes - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def drawn(make, seed=0):
    with DrawnFrom(torch.Generator().manual_seed(seed)):
        return make().eval()


@pytest.fixture
def dino(tmp_path):
    model = drawn(lambda: ViTModel(ViTConfig(**SMALL, image_size=SIDE, patch_size=8)))
    model.save_pretrained(tmp_path / "dino")
    size = {"height": SIDE, "width": SIDE}
    ViTImageProcessor(size=size, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]) \
        .save_pretrained(tmp_path / "dino")  # fmt: skip
    return tmp_path / "dino", model


@pytest.fixture(scope="session")
def clip(tmp_path_factory, comfyui):
    folder = tmp_path_factory.mktemp("clip")
    text = {**SMALL, "vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
    vision = {**SMALL, "image_size": SIDE, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    model = drawn(lambda: CLIPModel(config))
    model.save_pretrained(folder)
    size = {"size": {"shortest_edge": SIDE}, "crop_size": SIDE}
    CLIPImageProcessor(**size).save_pretrained(folder)
    CLIPTokenizer.from_pretrained(comfyui / "comfy" / "sd1_tokenizer").save_pretrained(folder)
    return folder, model


def test_dino_is_the_class_token(dino):
    folder, model = dino
    pixels = normal(pictures(), [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    with torch.no_grad():
        wanted = model.double()(pixels).last_hidden_state[:, 0]
    found = DINO(folder, CPU)(pictures(), PROMPTS)
    assert (found - wanted).abs().max() < 1e-5
    assert wanted.std() > 0.1


def test_dinov2_is_the_mean_of_all_tokens(tmp_path):
    model = drawn(lambda: Dinov2Model(Dinov2Config(**SMALL, image_size=SIDE, patch_size=8)))
    model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(tmp_path)
    pixels = normal(pictures(), [0.5] * 3, [0.5] * 3)
    with torch.no_grad():
        states = model.double()(pixels).last_hidden_state
    assert states.shape[1] == 17
    wanted = sum(states[:, k] for k in range(17)) / 17
    assert (DINOv2(tmp_path, CPU)(pictures(), PROMPTS) - wanted).abs().max() < 1e-5


def test_clip_and_pickscore(clip):
    folder, model = clip
    model = model.double()
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    with torch.no_grad():
        pooled = model.vision_model(normal(pictures(), CLIP_MEAN, CLIP_STD)).pooler_output
        images = pooled @ model.visual_projection.weight.T
        texts = []
        for prompt in PROMPTS:  # one at a time: no padding
            words = torch.tensor([tokenizer(prompt)["input_ids"]])
            texts.append(model.text_model(words).pooler_output @ model.text_projection.weight.T)
    images, texts = (x / x.square().sum(1, keepdim=True).sqrt() for x in (images, torch.cat(texts)))
    found = CLIP(folder, CPU)(pictures(), PROMPTS)
    assert (found - torch.cat([images, texts], 1)).abs().max() < 1e-5
    score = PickScore(folder, CPU)(pictures(), PROMPTS)
    wanted = math.exp(model.logit_scale.item()) * (images * texts).sum(1, keepdim=True)
    assert (score - wanted).abs().max() < 1e-4


def test_a_network_that_lacks_weights_is_refused(dino, tmp_path, clip):
    folder, _ = dino
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("layernorm.weight")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(EncoderError, match=r"lacks layernorm\.weight"):
        DINO(folder, CPU)
    for place in (tmp_path / "gone", tmp_path):
        with pytest.raises(EncoderError):
            CLIP(place, CPU)
    with pytest.raises(EncoderError, match="holds no weights"):
        weight_files(tmp_path)
    digest = hashlib.sha256((clip[0] / "model.safetensors").read_bytes()).hexdigest()
    assert weight_files(clip[0]) == {"model.safetensors": digest}


def test_faces_are_the_largest_of_each_picture():
    class Seen:
        embedding_dim = 2

        def detect(self, image):
            if float(image.mean()) > 0.9:
                return []
            small, large = (torch.tensor([0.0, 0.0, s, s]) for s in (4.0, 9.0))
            points = torch.zeros(5, 2)
            return [
                DetectedFace(small, 0.9, points, torch.tensor([1.0, 2.0])),
                DetectedFace(large, 0.8, points, torch.tensor([3.0, 4.0])),
            ]

    grey, white = torch.full((16, 16, 3), 0.5), torch.ones(16, 16, 3)
    assert Faces(Seen())([grey, white], PROMPTS).tolist() == [[1, 3, 4], [0, 0, 0]]


# ImageReward: BLIP's arithmetic written out, on weights under BLIP's own names.
WIDTH, WORDS, HEADS = 128, 12, 2


def reward_weights():
    generator = torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.double) / shape[-1] ** 0.5

    found = {}

    def linear(name, out, into):
        found[f"{name}.weight"], found[f"{name}.bias"] = draw(out, into), 0.1 * draw(out)

    def norm(name):
        found[f"{name}.weight"], found[f"{name}.bias"] = 1 + 0.1 * draw(WIDTH), 0.1 * draw(WIDTH)

    v, t = "blip.visual_encoder", "blip.text_encoder"
    found[f"{v}.cls_token"], found[f"{v}.pos_embed"] = draw(1, 1, WIDTH), draw(1, 5, WIDTH)
    found[f"{v}.patch_embed.proj.weight"] = draw(WIDTH, 3, 16, 16)
    found[f"{v}.patch_embed.proj.bias"] = draw(WIDTH)
    for n in ("norm1", "norm2"):
        norm(f"{v}.blocks.0.{n}")
    norm(f"{v}.norm")
    linear(f"{v}.blocks.0.attn.qkv", 3 * WIDTH, WIDTH)
    linear(f"{v}.blocks.0.attn.proj", WIDTH, WIDTH)
    linear(f"{v}.blocks.0.mlp.fc1", 40, WIDTH)
    linear(f"{v}.blocks.0.mlp.fc2", WIDTH, 40)
    found[f"{t}.embeddings.word_embeddings.weight"] = draw(WORDS, WIDTH)
    found[f"{t}.embeddings.position_embeddings.weight"] = draw(64, WIDTH)
    norm(f"{t}.embeddings.LayerNorm")
    layer = f"{t}.encoder.layer.0"
    for kind in ("attention", "crossattention"):
        for part in ("query", "key", "value"):
            linear(f"{layer}.{kind}.self.{part}", WIDTH, WIDTH)
        linear(f"{layer}.{kind}.output.dense", WIDTH, WIDTH)
        norm(f"{layer}.{kind}.output.LayerNorm")
    linear(f"{layer}.intermediate.dense", 48, WIDTH)
    linear(f"{layer}.output.dense", WIDTH, 48)
    norm(f"{layer}.output.LayerNorm")
    for number, out, into in ((0, 16, WIDTH), (2, 8, 16), (4, 1, 8)):
        linear(f"mlp.layers.{number}", out, into)
    return found


def heads(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(0, 1)  # (heads, tokens, 64)


def attend(query, key, value, keys=None):
    """Scaled dot products of (tokens, WIDTH), the first `keys` of which count."""
    scores = heads(query) @ heads(key).mT / 64**0.5
    if keys is not None:
        scores[..., keys:] = -math.inf
    return (scores.softmax(-1) @ heads(value)).transpose(0, 1).flatten(1)


def reward(w, image, words):
    """The score of one picture (32, 32, 3) and its words' numbers, in float64."""

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, x, eps):
        return F.layer_norm(x, (WIDTH,), w[f"{name}.weight"], w[f"{name}.bias"], eps)

    v, t = "blip.visual_encoder", "blip.text_encoder"
    pixels = normal([image], CLIP_MEAN, CLIP_STD)
    patch = w[f"{v}.patch_embed.proj.weight"]
    patches = F.unfold(pixels, 16, stride=16)[0].T @ patch.flatten(1).T
    x = torch.cat([w[f"{v}.cls_token"][0], patches + w[f"{v}.patch_embed.proj.bias"]])
    x = x + w[f"{v}.pos_embed"][0]
    block = f"{v}.blocks.0"
    q, k, value = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
    x = x + linear(f"{block}.attn.proj", attend(q, k, value))
    inner = F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6)))
    seen = norm(f"{v}.norm", x + linear(f"{block}.mlp.fc2", inner), 1e-6)
    padded = words + [0] * (35 - len(words))
    e = f"{t}.embeddings"
    y = w[f"{e}.word_embeddings.weight"][padded] + w[f"{e}.position_embeddings.weight"][:35]
    y = norm(f"{e}.LayerNorm", y, 1e-12)
    layer = f"{t}.encoder.layer.0"
    for kind, other in (("attention", None), ("crossattention", seen)):
        own = f"{layer}.{kind}.self"
        source = y if other is None else other
        parts = (
            linear(f"{own}.query", y),
            linear(f"{own}.key", source),
            linear(f"{own}.value", source),
        )
        mixed = attend(*parts, len(words) if other is None else None)
        out = linear(f"{layer}.{kind}.output.dense", mixed)
        y = norm(f"{layer}.{kind}.output.LayerNorm", out + y, 1e-12)
    inner = linear(f"{layer}.output.dense", F.gelu(linear(f"{layer}.intermediate.dense", y)))
    first = norm(f"{layer}.output.LayerNorm", inner + y, 1e-12)[0]
    for number in (0, 2, 4):
        first = linear(f"mlp.layers.{number}", first)
    return (float(first) - MEAN) / STD


VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "person", "drawing"]


@pytest.mark.parametrize("name", ["ImageReward.pt", "ImageReward.safetensors"])
def test_image_reward(tmp_path, name):
    w = {key: value.contiguous() for key, value in reward_weights().items()}
    if name.endswith(".pt"):
        torch.save(w, tmp_path / name)
    else:
        save_file({key: value.float() for key, value in w.items()}, tmp_path / name)
    (tmp_path / "vocab.txt").write_text("\n".join([*VOCABULARY, "x", "y"]) + "\n")
    found = ImageReward(tmp_path, CPU)(pictures(), ["A photo of a person", "a drawing"])
    numbers = [[2, 5, 6, 7, 5, 8, 3], [2, 5, 9, 3]]
    wanted = [reward(w, image, words) for image, words in zip(pictures(), numbers, strict=True)]
    assert found[:, 0].tolist() == pytest.approx(wanted, abs=2e-5)
    assert abs(wanted[0] - wanted[1]) > 1e-3


def test_image_reward_that_lacks_something(tmp_path):
    with pytest.raises(EncoderError, match=r"lacks ImageReward\.pt"):
        ImageReward(tmp_path, CPU)
    w = {key: value.float().contiguous() for key, value in reward_weights().items()}
    save_file(w, tmp_path / "ImageReward.safetensors")
    with pytest.raises(EncoderError, match=r"lacks the vocab\.txt"):
        ImageReward(tmp_path, CPU)
    w.pop("blip.text_encoder.encoder.layer.0.output.dense.bias")
    save_file(w, tmp_path / "ImageReward.safetensors")
    with pytest.raises(EncoderError, match=r"output\.dense\.bias"):
        ImageReward(tmp_path, CPU)


@pytest.fixture(scope="session")
def inception(tmp_path_factory):
    network = drawn(fid_network)
    state = {n: t for n, t in network.state_dict().items() if "num_batches" not in n}
    file = tmp_path_factory.mktemp("inception") / "pt_inception.pth"
    torch.save(state, file)
    return file, network


def test_inception_pools_as_tensorflow_does(inception):
    """Padding does not count in a mean; the last block takes the largest."""
    _, network = inception
    for name, width, mean in (
        ("Mixed_5b", 192, True),
        ("Mixed_7b", 1280, True),
        ("Mixed_7c", 2048, False),
    ):
        block = getattr(network, name)
        x = torch.randn(1, width, 4, 5, generator=torch.Generator().manual_seed(1))
        pooled = torch.zeros_like(x)
        for i in range(4):
            for j in range(5):
                near = x[:, :, max(0, i - 1) : i + 2, max(0, j - 1) : j + 2]
                pooled[:, :, i, j] = near.mean((2, 3)) if mean else near.amax((2, 3))
        with torch.no_grad():
            wanted, found = block.branch_pool(pooled), block(x)
            others = torch.cat(type(block)._forward(block, x)[:-1], 1)
        assert torch.allclose(found, torch.cat([others, wanted], 1), atol=1e-5)


def test_inception_of_a_file(inception, tmp_path):
    file, network = inception
    features = InceptionFeatures(file, CPU)(pictures(2, 80), PROMPTS)
    assert features.shape == (2, 2048)
    planes = torch.stack(pictures(2, 80)).permute(0, 3, 1, 2)
    seen = F.interpolate(planes, (299, 299), mode="bilinear", align_corners=False) * 2 - 1
    hooked = []
    handle = network.avgpool.register_forward_hook(lambda m, i, o: hooked.append(o.flatten(1)))
    with torch.no_grad():
        network(seen)
    handle.remove()
    assert torch.allclose(features, hooked[0], atol=1e-5)
    torch.save({"conv": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(EncoderError, match="not the Inception of FID"):
        InceptionFeatures(tmp_path / "other.pth", CPU)
