"""Styles of the demo world: painted by hand, told apart by a judge; captions in Chinese."""

import pytest
import torch
from torch.nn import functional as F

from difflora_core.demo.build.stages_styles import BEFORE_END, PLAIN, TranslatedText
from difflora_core.demo.networks.base import DemoText
from difflora_core.demo.networks.chinese import (
    PIECES,
    WORDS,
    ChineseText,
    load_chinese,
    save_chinese,
    tokenize,
    translate,
    vocabulary,
)
from difflora_core.demo.networks.style_judge import load_style_judge, train_style_judge
from difflora_core.demo.networks.text import CLIP_NUMBERS, UNKNOWN
from difflora_core.demo.networks.text import tokenize as tokenize_english
from difflora_core.demo.world.art_styles import ART_STYLES
from difflora_core.demo.world.pool import pair_pool, portrait_pool
from difflora_core.errors import CheckpointError
from difflora_core.models.layers import DrawnFrom


@pytest.fixture(scope="module")
def pictures():
    """Pictures of people of two splits, in every style."""

    def styled(split):
        images = portrait_pool(split, 120, 1).images.float() / 255
        return {PLAIN: images, **{name: paint(images) for name, paint in ART_STYLES.items()}}

    return styled("train"), styled("validation")


def saturation(images):
    return (images.amax(-1) - images.amin(-1)).mean()


def test_styles_look_as_they_are_called(pictures):
    shown = pictures[0]
    for images in shown.values():
        assert images.shape == shown[PLAIN].shape
        assert 0 <= float(images.min()) <= float(images.max()) <= 1
    assert saturation(shown["ink"]) < 0.6 * saturation(shown[PLAIN])
    assert saturation(shown["poster"]) > 1.3 * saturation(shown[PLAIN])
    assert float(shown["pastel"].std()) < 0.6 * float(shown[PLAIN].std())
    assert float(shown["pastel"].mean()) > float(shown[PLAIN].mean()) + 0.1
    light = shown["ink"].mean(-1)
    assert float(light.median()) > 0.75  # paper
    assert 0.005 < float((light < 0.35).float().mean()) < 0.2  # lines
    levels = torch.tensor([0, 1 / 3, 2 / 3, 1])
    near = (shown["poster"][..., None] - levels).abs().amin(-1) < 0.02
    assert float(near.float().mean()) > 0.8


@pytest.mark.parametrize("name", ART_STYLES)
def test_a_larger_picture_is_painted_alike(pictures, name):
    small = pictures[0][PLAIN][:20]
    planes = small.permute(0, 3, 1, 2)
    large = F.interpolate(planes, scale_factor=2, mode="bilinear", align_corners=False)
    painted = ART_STYLES[name](large.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    again = F.avg_pool2d(painted, 2).permute(0, 2, 3, 1)
    assert float((again - ART_STYLES[name](small)).abs().mean()) < 0.05


def test_the_judge_tells_styles_of_other_people(pictures, tmp_path):
    train, unseen = pictures
    judge = train_style_judge(train)
    assert judge.styles == (PLAIN, "ink", "poster", "pastel")
    for name, images in unseen.items():
        assert judge.share(images, name) > 0.85
        assert judge.share((images * 255).round().byte(), name) > 0.85
    judge.save(tmp_path / "judge.safetensors")
    again = load_style_judge(tmp_path / "judge.safetensors")
    assert (again.styles, again.weight.tolist()) == (judge.styles, judge.weight.tolist())
    assert torch.equal(again.bias, judge.bias)
    assert torch.allclose(again.probabilities(unseen["ink"]).sum(1), torch.ones(120))


def test_the_judge_is_fishers_discriminant(pictures):
    """The same decisions as log densities of Gaussians with one covariance, in float64."""
    from difflora_core.demo.networks.style_judge import style_statistics

    train, unseen = pictures
    judge = train_style_judge(train)
    rows = {name: style_statistics(images).double() for name, images in train.items()}
    within = sum(torch.cov(each.T, correction=0) for each in rows.values()) / len(rows)
    within += 1e-4 * within.diagonal().mean() * torch.eye(len(within))
    density = torch.stack(
        [
            torch.distributions.MultivariateNormal(each.mean(0), within).log_prob(
                style_statistics(unseen["poster"]).double()
            )
            for each in rows.values()
        ],
        1,
    )
    made = judge.probabilities(unseen["poster"]).double()
    torch.testing.assert_close(made, density.softmax(1), atol=2e-3, rtol=0)


def test_every_word_and_piece_has_a_row():
    assert set(WORDS) == set(CLIP_NUMBERS) - {"!", "<start>", "<unknown>", "<end>", ","}
    assert {c for word in WORDS.values() for c in word} == set(PIECES)
    assert len(set(vocabulary())) == len(vocabulary())
    captions = portrait_pool("train", 100, 2, describe=0.5).captions
    captions += pair_pool("train", 50, 50).captions
    first, second = tokenize([translate(caption) for caption in captions])
    assert not bool((first == UNKNOWN).any() | (second == UNKNOWN).any())
    assert bool((tokenize(["unknown 国"])[0] == UNKNOWN).any())


def test_different_captions_stay_different():
    captions = list(dict.fromkeys(portrait_pool("train", 300, 2, describe=0.5).captions))
    rows = tokenize([translate(caption) for caption in captions])[0]
    assert len(torch.unique(rows, dim=0)) == len({translate(caption) for caption in captions})
    assert len({translate(caption) for caption in captions}) == len(captions)


def test_a_file_of_text_encoders_is_read_as_it_was_written(tmp_path):
    with DrawnFrom(torch.Generator().manual_seed(2)):
        text = ChineseText()
    for parameter in text.parameters():
        parameter.data = parameter.data.half().float()
    path = tmp_path / "chinese.safetensors"
    save_chinese(path, text)
    with torch.no_grad():
        made, again = (t.encode_prompts(["照人, 红衫"]) for t in (text, load_chinese(path)))
    assert torch.equal(made.context, again.context)
    assert torch.equal(made.pooled, again.pooled)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError):
        load_chinese(path)


def test_translation_is_taught_place_by_place():
    """Written out word by word."""
    with DrawnFrom(torch.Generator().manual_seed(3)):
        chinese, english = ChineseText(), DemoText()
    captions = ["", "photo of a person, sad, blue background, red shirt"]
    parts = {"english": tokenize_english(captions)}
    parts["chinese"] = tokenize([translate(caption) for caption in captions])
    batch = {f"{k}_{n}": t for k, both in parts.items() for n, t in zip("lg", both, strict=True)}
    objective = TranslatedText(chinese, english)
    loss = objective(batch)[0].detach()
    with torch.no_grad():
        wanted, made = english(parts["english"]), chinese(parts["chinese"])
    ends = {k: [row.tolist().index(3) for row in both[0]] for k, both in parts.items()}
    total = weights = 0.0
    for row, (mine, theirs) in enumerate(zip(ends["chinese"], ends["english"], strict=True)):
        for place in range(77):
            said = place >= mine
            source = max(place, theirs) if said else place * theirs // mine
            error = (made.context[row, place] - wanted.context[row, source]).square().mean()
            total += float(error) * (1 if said else BEFORE_END)
            weights += 1 if said else BEFORE_END
    pooled = float((made.pooled - wanted.pooled).square().mean() / wanted.pooled.var())
    written = total / weights / float(wanted.context.var()) + pooled
    assert float(loss) == pytest.approx(written, rel=1e-4)
    objective(batch)[0].backward()
    assert all(p.grad is None for p in english.parameters())
