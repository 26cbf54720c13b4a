"""HyperLoRA: its numbers by another road, what it cannot do, and its latents as material."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from difflora_core.errors import ConfigError, EncoderError, LayoutError
from difflora_core.lora.formats.state_dict import to_state_dict
from difflora_core.models.hyperlora.config import layout_of_modules
from difflora_core.models.lae.autoencoder import LoRALatent
from difflora_core.models.latent_math import add_difference, blend, interpolate
from difflora_core.storage.hyperlora_folder import load_hyperlora
from difflora_core.vision.features import ImageFeatures

GOLDEN = Path(__file__).parent / "hyperlora_golden"
"""Random weights, and what the authors' own modules made of them; 80 KB."""


@pytest.fixture(scope="module")
def folder(write_hyperlora, tmp_path_factory):
    return write_hyperlora(tmp_path_factory.mktemp("hyperlora"))


@pytest.fixture(scope="module")
def model(folder):
    return load_hyperlora(folder)


def photos(count=1, seed=0, face=12, image=10):
    g = torch.Generator().manual_seed(seed)
    faces = torch.nn.functional.normalize(torch.randn(count, face, generator=g), dim=-1)
    tokens = torch.randn(count, 7, image, generator=g)
    found = torch.ones(count, dtype=torch.bool)
    return ImageFeatures(faces, found, torch.zeros(count, 4), tokens)


def person(model, seed=0, count=1):
    return model.mean_latent(model.condition(photos(count, seed)))


class Plain:
    """The network from the tensors of its files in float64, without any module of ours."""

    def __init__(self, folder, heads):
        self.heads = heads
        self.modules = load_file(folder / "hyper_lora_modules.safetensors")
        self.net = load_file(folder / "resampler.safetensors")
        self.face = load_file(folder / "id_projector.safetensors")
        for table in (self.modules, self.net, self.face):
            table.update({name: value.double() for name, value in table.items()})

    def linear(self, x, name, table=None):
        table = table or self.net
        return x @ table[f"{name}.weight"].T + table.get(f"{name}.bias", 0.0)

    def norm(self, x, name, table=None):
        table = table or self.net
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * table[f"{name}.weight"] + table[f"{name}.bias"]

    def attention(self, x, context, name):
        q, k, v = (
            self.linear(s, f"{name}.{p}").reshape(len(s), self.heads, -1).movedim(1, 0)
            for s, p in ((x, "to_q"), (context, "to_k"), (context, "to_v"))
        )
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        return self.linear((weights @ v).movedim(0, 1).flatten(1), f"{name}.to_out.0")

    def photo(self, face, image, gate=(1.0, 1.0)):
        tokens = self.linear(face.double(), "0", self.face).reshape(-1, image.shape[-1])
        face = self.linear(self.norm(tokens, "2", self.face), "proj_in")
        image = self.linear(image.double(), "proj_in_2")
        x = self.net["latents"][0]
        for k in range(sum(name.endswith("norm_ff.bias") for name in self.net)):
            at = f"layers.{k}"
            own = self.norm(x, f"{at}.norm_attn1")
            x = x + self.attention(own, own, f"{at}.attn1")
            sources = ((face, "attn2", "x", gate[0]), (image, "attn3", "y", gate[1]))
            for context, name, letter, weight in sources:
                seen = self.norm(context, f"{at}.norm_{name}_{letter}")
                read = self.attention(self.norm(x, f"{at}.norm_{name}_l"), seen, f"{at}.{name}")
                x = x + weight * read
            h = self.linear(self.norm(x, f"{at}.norm_ff"), f"{at}.ff.net.0.proj")
            h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
            x = x + self.linear(h, f"{at}.ff.net.2")
        return self.linear(x, "proj_out")

    def tokens(self, features, gate=(1.0, 1.0)):
        rows = [
            self.photo(f, i, gate)
            for f, i in zip(features.face, features.image_tokens, strict=True)
        ]
        mean = torch.stack(rows).mean(0)
        return mean / mean.norm(dim=-1, keepdim=True)

    def factors(self, tokens):
        """(out, in) weight changes without their scale, in the order of the layers."""
        for i in range(len(tokens) // 8):
            for p, part in enumerate(("to_q", "to_k", "to_v", "to_out")):
                down, up = (
                    sum(
                        c * m
                        for c, m in zip(
                            tokens[8 * i + 2 * p + f],
                            self.modules[f"{i}.{part}.id_{factor}_basis"],
                            strict=True,
                        )
                    )
                    for f, factor in enumerate(("down", "up"))
                )
                yield (down @ up).T


def test_what_the_authors_modules_make():
    model, expected = load_hyperlora(GOLDEN), load_file(GOLDEN / "expected.safetensors")
    face, found = expected.pop("face"), torch.ones(2, dtype=torch.bool)
    features = ImageFeatures(face, found, torch.zeros(2, 4), expected.pop("clip"))
    latent = model.mean_latent(model.condition(features))
    torch.testing.assert_close(latent.z, expected.pop("tokens"), rtol=0, atol=1e-5)
    made = to_state_dict(model.decode(latent).batch_item(0))
    assert {f"lora.{key}" for key in made} == set(expected)
    for key, value in made.items():
        torch.testing.assert_close(value, expected[f"lora.{key}"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("region", ["face_on_grey", "picture", ""])
def test_features_of_a_known_region_are_taken(model, region):
    assert model.complete(replace(photos(2), image_region=region)).image_region == region


def test_the_square_around_the_face_is_not_what_it_was_trained_on(model):
    crop, grey = (replace(photos(), image_region=r) for r in ("crop", "face_on_grey"))
    for wrong in (crop, ImageFeatures.cat([crop, grey]), crop.select(0).to("cpu")):
        with pytest.raises(EncoderError, match="set image_region to face_on_grey in Extract"):
            model.condition(wrong)
    assert ImageFeatures.cat([grey, grey.select([0])]).image_region == "face_on_grey"


@pytest.mark.parametrize("count", [1, 3])
def test_from_embeddings_to_weights_as_in_float64(model, folder, count):
    plain, features = Plain(folder, heads=2), photos(count, seed=count)
    latent = model.mean_latent(model.condition(features))
    tokens = plain.tokens(features)
    torch.testing.assert_close(latent.z[0].double(), tokens, rtol=0, atol=1e-5)
    weights = model.decode(latent).batch_item(0)
    for layer, delta in zip(weights.layers.values(), plain.factors(tokens), strict=True):
        assert layer.scaling == 0.5
        torch.testing.assert_close(layer.delta().double(), 0.5 * delta, rtol=0, atol=1e-4)


@pytest.mark.parametrize("gate", [(0.0, 1.0), (1.0, 0.0), (0.5, 2.0)])
def test_the_gate_weighs_what_is_read_of_each_source(model, folder, gate):
    features = photos(2)
    condition = model.condition(features, torch.tensor(gate))
    assert condition.gate.tolist() == [list(gate)]
    tokens = Plain(folder, heads=2).tokens(features, gate)
    z = model.mean_latent(condition).z[0]
    torch.testing.assert_close(z.double(), tokens, rtol=0, atol=1e-5)
    asked = torch.tensor([torch.nan, gate[1]])
    assert model.condition(features, asked).gate.tolist() == [[1.0, gate[1]]]
    with pytest.raises(ConfigError, match="0 or more"):
        model.condition(features, torch.tensor([-1.0, 1.0]))


def test_a_photo_without_a_face_counts_by_its_image(model):
    two = photos(2)
    faceless = replace(two, face=two.face * 0, face_found=torch.zeros(2, dtype=torch.bool))
    by_image = model.condition(faceless)
    assert by_image.gate.tolist() == [[0.0, 1.0]]
    chosen = model.condition(two, torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(by_image.tokens, chosen.tokens)
    mixed = replace(two, face_found=torch.tensor([True, False]))
    parts = [model.condition(two.select(0)).tokens, model.condition(faceless.select(1)).tokens]
    torch.testing.assert_close(model.condition(mixed).tokens, sum(parts) / 2)


def test_order_and_company_of_people_do_not_matter(model):
    three = photos(3)
    z = person(model, 0, 3).z
    turned = model.mean_latent(model.condition(three.select([2, 0, 1]))).z
    torch.testing.assert_close(turned, z, rtol=0, atol=1e-6)
    together = model.condition([photos(1, 5), three])
    assert torch.equal(together.tokens[1:], model.condition(three).tokens)


def test_both_encoders_are_needed_and_the_right_ones(model):
    one = photos()
    with pytest.raises(EncoderError, match="connect a face analysis too"):
        model.condition(replace(one, face=one.face[:, :0]))
    with pytest.raises(EncoderError, match=r"connect a CLIP vision \(ViT-L/14\) too"):
        model.condition(replace(one, image_tokens=torch.zeros(1, 0, 0), image=torch.zeros(1, 0)))
    with pytest.raises(EncoderError, match="Wrong CLIP vision"):
        model.condition(replace(one, image_tokens=torch.zeros(1, 7, 9)))
    with pytest.raises(EncoderError, match="Wrong face recogniser"):
        model.condition(replace(one, face=torch.zeros(1, 11)))
    with pytest.raises(ConfigError, match="no photo"):
        model.condition([])


@pytest.mark.parametrize(
    ("shape", "name"), [((768, 577, 1024), "at 336 px"), ((1024, 257, 1280), "ViT-H/14")]
)
def test_the_public_weights_want_vit_l_14_at_224(write_hyperlora, tmp_path, shape, name):
    model = load_hyperlora(write_hyperlora(tmp_path, image=1024, depth=1))
    image, count, width = shape
    features = replace(
        photos(), image=torch.zeros(1, image), image_tokens=torch.zeros(1, count, width)
    )
    with pytest.raises(EncoderError, match=f"{name}.*trained with CLIP ViT-L/14 \\(768; 257"):
        model.complete(features)
    right = replace(features, image=torch.zeros(1, 768), image_tokens=torch.zeros(1, 257, 1024))
    assert model.complete(right) is right


def test_what_it_cannot_do_it_says(model):
    latent = person(model)
    for refused, words in (
        (lambda: model.sample_latent(None, [1]), "cannot draw variants or invent people"),
        (lambda: model.agreement(latent, model.condition(photos())), "has no DiT"),
        (lambda: model.autoencoder, "has no encoder"),
    ):
        with pytest.raises(ConfigError, match=words):
            refused()


def test_latents_of_others_are_refused(model, write_hyperlora, tmp_path):
    latent = person(model)
    other = load_hyperlora(write_hyperlora(tmp_path, seed=1))
    with pytest.raises(LayoutError, match="another identity model"):
        other.decode(latent)
    with pytest.raises(LayoutError, match="this model decodes"):
        model.decode(LoRALatent(torch.zeros(1, 3, 4), model.layout.hash))
    condition = replace(model.condition(photos()), tokens=torch.zeros(1, 4, 192))
    with pytest.raises(ConfigError, match="mix the features with the model"):
        model.mean_latent(condition)


def test_names_of_modules_become_layers():
    layout = layout_of_modules(
        {"lora_unet_output_blocks_11_1_transformer_blocks_9_attn2": (4, 6)}, 2
    )
    place = "output_blocks.11.1.transformer_blocks.9.attn2"
    assert [layer.name for layer in layout] == [
        f"{place}.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0")
    ]
    assert [layer.in_features for layer in layout] == [4, 6, 6, 4]
    with pytest.raises(LayoutError, match="no attention module"):
        layout_of_modules({"lora_unet_input_blocks_4_1_proj_in": (4, 4)}, 2)


def lengths(latent):
    return latent.z.norm(dim=-1)


def test_people_blend_token_by_token_on_their_spheres(model):
    a, b = person(model, 1), person(model, 2)
    mixed = blend([a, b], [0.7, 0.3])
    first, second = a.z[0].double(), b.z[0].double()
    angle = torch.acos((first * second).sum(-1, keepdim=True))
    way = torch.sin(0.7 * angle) * first + torch.sin(0.3 * angle) * second
    expected = (way / torch.sin(angle)).float()
    torch.testing.assert_close(mixed.z[0], expected, rtol=0, atol=1e-5)
    assert (mixed.unit_tokens, mixed.license) == (True, model.license)
    assert "CC-BY-NC" in mixed.license


@pytest.mark.parametrize(
    "make",
    [
        lambda a, b, c: blend([a, b, c], [1, 2, 3], "linear"),
        lambda a, b, c: add_difference(a, b, c, 1.5),
        lambda a, b, c: interpolate(a, b, 4),
    ],
)
def test_whatever_is_made_of_people_stays_on_the_spheres(model, make):
    made = make(*(person(model, seed) for seed in range(3)))
    torch.testing.assert_close(lengths(made), torch.ones_like(lengths(made)))
    assert torch.isfinite(
        model.decode(made).layers["middle_block.1.transformer_blocks.0.attn1.to_q"].up
    ).all()


def test_adding_no_difference_changes_nothing(model):
    a, b = person(model, 1), person(model, 2)
    torch.testing.assert_close(add_difference(a, b, b, 3.0).z, a.z)


def test_the_way_back_through_the_basis_is_exact(model):
    """Gradients of all layers, though the way there shares memory between them."""
    latent = person(model)
    z = latent.z.clone().requires_grad_(True)
    weights = model.decode(replace(latent, z=z))
    plain = model.decode(latent)
    total = sum(layer.down.square().sum() + layer.up.sum() for layer in weights.layers.values())
    total.backward()
    for k, name in enumerate(plain):
        assert torch.equal(plain[name].up, weights[name].up)
        expected = torch.einsum("brx,kxr->bk", 2 * plain[name].down, model.basis[2 * k])
        torch.testing.assert_close(z.grad[:, 2 * k], expected)
        torch.testing.assert_close(z.grad[0, 2 * k + 1], model.basis[2 * k + 1].sum((1, 2)))
