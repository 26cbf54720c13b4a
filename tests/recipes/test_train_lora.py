"""The LoRA recipe on a tiny base: against a plain implementation, from a start, and refusals."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

from difflora_core.adapters.attach import attach
from difflora_core.adapters.lora import lora_adapter_set
from difflora_core.base_model.protocol import TextCondition
from difflora_core.errors import ConfigError, LayoutError
from difflora_core.lora.layout import SDXL_UNET_CONFIG, TARGETS, layout_from_unet_config
from difflora_core.lora.weights import LoRALayer, LoRAWeights
from difflora_core.methods.base import AppliedAdaptation, PreparedAdaptation
from difflora_core.methods.lora import LoRA, lora_weights
from difflora_core.storage.adapter_file import read_adaptation, write_adaptation
from difflora_core.training.adaptation_run import run_adaptation
from difflora_core.training.difflora.refine import refinement_config
from difflora_core.training.lora.dreambooth import DreamBoothObjective
from difflora_core.training.lora.objective import LoRAObjective, LoRATraining, check_start
from difflora_core.training.losses import denoising_error
from difflora_core.training.picture_buckets import BucketedExamples, bucketed
from difflora_core.training.picture_examples import PictureExamples
from difflora_core.training.picture_task import PictureTask
from difflora_core.vision.training_pictures import training_pictures

SETTINGS = {"rank": 2, "batch": 4, "evaluate_every": 20, "learning_rate": 0.01, "warmup": 0}
PROMPTS = ["photo of a hat", "the red hat"]
SIDE = 64


@pytest.fixture
def setting(base, text):
    return PictureTask(base, text, "tiny")


@pytest.fixture
def examples(pictures):
    return PictureExamples(pictures().latents, [PROMPTS] * 3)


@pytest.fixture
def batch(examples):
    return examples.draw(4, 1000)(torch.Generator().manual_seed(3))


def written_out(setting, weights, batch):
    """The loss with the LoRA merged into the weights, in float64 and by the formulas alone."""
    base, plain = setting.base, {}
    paths = base.layout("tiny", 1, TARGETS["all"]).module_names
    unet = base.unet.double()
    for name, layer in weights.layers.items():
        part = unet.get_submodule(paths[name])
        plain[name] = part.weight.data
        change = layer.alpha / layer.rank * layer.up.double() @ layer.down.double()
        part.weight.data = part.weight.data + change.reshape(part.weight.shape)
    abar = base.alphas_cumprod.double()[batch["timesteps"]][:, None, None, None]
    clean, noise = batch["latents"].double(), batch["noise"].double()
    encoded = setting.text.encode(batch["prompts"], {})
    condition = setting.noised(batch, encoded).text
    double = type(condition)(condition.context.double(), condition.pooled.double())
    noisy = abar.sqrt() * clean + (1 - abar).sqrt() * noise
    with torch.no_grad():
        v = base.predict(noisy, batch["timesteps"], double)
    error = (v - (abar.sqrt() * noise - (1 - abar).sqrt() * clean)).square().mean((1, 2, 3))
    snr = (abar / (1 - abar)).flatten()
    loss = (error * snr.clamp(max=5) / (snr + 1)).mean()  # min-SNR for v, arXiv 2303.09556
    for name, weight in plain.items():
        unet.get_submodule(paths[name]).weight.data = weight
    unet.float()
    return float(loss)


def random_up(objective, scale=3.0):
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for up in list(objective.factors)[1::2]:
            up.copy_(scale * torch.randn(up.shape, generator=g))


@pytest.mark.parametrize("targets", list(TARGETS))
def test_its_loss_is_the_formula_with_merged_weights(setting, batch, targets):
    objective = LoRAObjective(setting, LoRATraining(targets=targets, **SETTINGS))
    loss, _ = objective(batch)
    bare = written_out(setting, LoRAWeights({}), batch)
    assert float(loss.detach()) == pytest.approx(bare, rel=1e-4)  # from nothing: the base
    random_up(objective)
    loss, _ = objective(batch)
    loss.backward()
    wanted = written_out(setting, objective.weights.detach(), batch)
    assert abs(wanted - bare) > 0.02 * bare
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-4)
    assert all(float(p.grad.abs().max()) > 0 for p in objective.factors)
    kinds = {type(setting.base.unet.get_submodule(p)) for p in objective.module_names.values()}
    linear = targets in ("attention", "transformer")
    assert kinds == ({nn.Linear} if linear else {nn.Linear, nn.Conv2d})


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_it_learns_whatever_the_base_predicts(setting, examples, tmp_path, kind):
    base = setting.base
    base.prediction_type = kind
    base.scheduler = DDIMScheduler(prediction_type=kind, beta_schedule="scaled_linear")
    config = LoRATraining(steps=60, weighting="uniform", **SETTINGS | {"learning_rate": 0.1})
    untrained = replace(config, steps=1, learning_rate=1e-9, evaluate_every=1)
    before = run_adaptation(LoRAObjective(setting, untrained), examples, tmp_path / "untrained")
    after = run_adaptation(LoRAObjective(setting, config), examples, tmp_path / "trained")
    assert after.finished
    assert after.loss < 0.98 * before.loss


def test_what_it_leaves_goes_through_a_file(setting, examples, tmp_path):
    config = LoRATraining(steps=10, targets="all", **SETTINGS)
    objective = LoRAObjective(setting, config)
    (made,) = run_adaptation(objective, examples, tmp_path).adaptations
    assert made.facts["rank"] == 2
    assert {len(layer.kernel) for layer in lora_weights(made).layers.values()} == {0, 2}
    again = read_adaptation(write_adaptation(tmp_path / "lora.safetensors", made).path)
    sizes = LoRA.layer_sizes(again)
    assert sizes == LoRA.layer_sizes(made)
    noisy = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    text = setting.noised(examples.draw(2, 9)(torch.Generator()), setting.encode(PROMPTS)).text
    outputs = []
    for adapters in (
        lora_adapter_set(objective.weights.detach()),
        LoRA.adapters([AppliedAdaptation(PreparedAdaptation(again), again.settings)]),
        LoRA.adapters([]),
    ):
        with torch.no_grad(), attach(setting.base.unet, adapters, names=objective.module_names):
            outputs.append(setting.base.predict(noisy, torch.tensor([400, 600]), text))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=2e-2, atol=2e-3)
    assert float((outputs[0] - outputs[2]).abs().max()) > 0.01


def test_a_stopped_run_goes_on_and_the_same_seed_learns_the_same(setting, examples, tmp_path):
    config = LoRATraining(steps=30, seed=4, **SETTINGS | {"evaluate_every": 5})
    once = run_adaptation(LoRAObjective(setting, config), examples, tmp_path / "once")
    calls = iter([False] * 12 + [True] * 9)
    stopped = run_adaptation(
        LoRAObjective(setting, config), examples, tmp_path / "two", stop=lambda: next(calls)
    )
    assert not stopped.finished
    resumed = run_adaptation(LoRAObjective(setting, config), examples, tmp_path / "two")
    assert (resumed.finished, resumed.loss) == (True, once.loss)
    a, b = (lora_weights(r.adaptations[0]) for r in (once, resumed))
    assert all(torch.equal(a[n].up, b[n].up) and torch.equal(a[n].down, b[n].down) for n in a)


@pytest.mark.parametrize("up_alone", [True, False])
def test_a_start_is_where_it_starts(setting, examples, batch, tmp_path, up_alone):
    """Rank 1 of another alpha in a run of rank 2: the same model, and then another."""
    layout = setting.base.layout("tiny", 1, TARGETS["attention"])
    g = torch.Generator().manual_seed(8)
    layers = {
        s.name: LoRALayer(
            torch.randn(1, s.in_features, generator=g),
            3.0 * torch.randn(s.out_features, 1, generator=g),
            0.5,
        )
        for s in list(layout)[::2]
    }  # layers that it lacks start at nothing
    start = LoRAWeights(layers)
    config = LoRATraining(train_down=not up_alone, steps=10, **SETTINGS)
    objective = LoRAObjective(setting, config, start)
    loss = float(objective(batch)[0].detach())
    assert loss == pytest.approx(written_out(setting, start, batch), rel=1e-4)
    nothing = LoRAObjective(setting, LoRATraining(steps=10, **SETTINGS))
    assert abs(loss - float(nothing(batch)[0].detach())) > 0.01 * loss
    made = lora_weights(run_adaptation(objective, examples, tmp_path).adaptations[0])
    for name, layer in layers.items():
        assert torch.equal(made[name].down[:1], layer.down) == up_alone
        assert not torch.equal(made[name].up[:, :1], layer.up * 0.5)
    with pytest.raises(ConfigError, match="connect one, or train both"):
        LoRAObjective(setting, replace(config, train_down=False))


def refinement(rank: int) -> LoRATraining:
    """Settings of a refinement on one to a few photos: those of `difflora.refine`."""
    config = refinement_config(rank)
    return LoRATraining(
        steps=config.steps,
        batch=config.samples_per_step,
        weighting=config.loss_weighting,
        evaluate_every=config.steps,
        learning_rate=config.learning_rate,
        schedule=config.decay,
        warmup=config.warmup,
        rank=rank,
        train_down=config.train_down,
        normalise_gradient=config.normalise_gradient,
    )


def test_refinement_is_the_librarys_refine(base, text, setting, batch):
    """Loss, gradients, what is trained, and rates of `difflora.refine` on the same photos."""
    layout, g = base.layout("tiny", 2), torch.Generator().manual_seed(8)
    start = LoRAWeights(
        {
            s.name: LoRALayer(
                torch.randn(2, s.in_features, generator=g),
                torch.randn(s.out_features, 2, generator=g),
                2.0,
            )
            for s in layout
        }
    )
    base.unet.double()  # or the order of sums, which processors choose, decides
    config, alone = refinement_config(2), LoRAObjective(setting, refinement(2), start)
    encoded = text.encode(PROMPTS, {})
    both = TextCondition(encoded.context, encoded.pooled)
    one = LoRAWeights(
        {n: LoRALayer(x.down[None], x.up[None], x.alpha) for n, x in start.layers.items()}
    )
    group = DreamBoothObjective(base, one, both, config)
    rows = {name: batch[name][:, None] for name in ("latents", "noise", "timesteps")}
    rows["captions"] = torch.tensor([[PROMPTS.index(p)] for p in batch["prompts"]])
    with attach(base.unet, lora_adapter_set(group.weights), names=layout.module_names):
        wanted, _ = group(rows)
        wanted.backward()
    group.scale_gradients()
    loss, _ = alone(batch)
    loss.backward()
    alone.scale_gradients()
    torch.testing.assert_close(loss, wanted)
    pairs = list(zip(alone.factors, group.factors, strict=True))
    assert [p.requires_grad for p, _ in pairs] == [p.requires_grad for _, p in pairs]
    for a, b in pairs:
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad[0], rtol=1e-4, atol=2e-6)
    assert sum(float(p.grad.square().sum()) for p, _ in pairs[1::2]) == pytest.approx(1, rel=1e-4)
    peak = config.learning_rate
    assert [refinement(2).loop.rate(peak, k) for k in range(config.steps)] == [
        config.loop.rate(peak, k) for k in range(config.steps)
    ]


def test_buckets_are_drawn_as_their_shares_say(examples):
    wide = PictureExamples(torch.randn(1, 4, 2, 8), [["a prompt"]])
    one, two = BucketedExamples((examples,), (1.0,)), BucketedExamples((wide,), (1.0,))
    draw = one.beside(two, 0.25).draw(2, 1000)
    count = 2000
    g = torch.Generator().manual_seed(1)
    shapes = [tuple(draw(g)["latents"].shape) for _ in range(count)]
    share, spread = 0.2, math.sqrt(0.2 * 0.8 / count)
    assert set(shapes) == {(2, 4, 4, 4), (2, 4, 2, 8)}
    assert abs(shapes.count((2, 4, 2, 8)) / count - share) < 4 * spread
    assert one.beside(two, 1).prompts == [*PROMPTS, "a prompt"]
    assert len(one.beside(two, 1)) == 4
    with pytest.raises(ConfigError, match="need a positive share"):
        BucketedExamples((examples,), (0.0,))


def test_prior_preservation_holds_the_class(setting, examples, tmp_path):
    """Trained beside class pictures, the LoRA does less harm to them than without."""
    g = torch.Generator().manual_seed(9)
    others = PictureExamples(torch.randn(6, 4, 4, 4, generator=g), [["a cup"]] * 6)
    config = LoRATraining(steps=80, **SETTINGS | {"rank": 1})
    harm = []
    for weight in (0.0, 4.0):
        own = BucketedExamples((examples,), (1.0,))
        own = own.beside(BucketedExamples((others,), (1.0,)), weight) if weight else own
        objective = LoRAObjective(setting, config)
        run_adaptation(objective, own, tmp_path / str(weight), held_out=None)
        seen = others.draw(24, 1000)(torch.Generator().manual_seed(2))
        with torch.no_grad():
            harm.append(float(objective.eval()(seen)[0]))
    assert harm[1] < harm[0]


def test_a_start_on_more_layers_is_trained_on_all_of_them(setting, batch):
    shape = next(iter(setting.base.layout("tiny", 1, ("ff.net.2",))))
    g = torch.Generator().manual_seed(6)
    factors = torch.randn(1, shape.in_features, generator=g), torch.zeros(shape.out_features, 1)
    start = LoRAWeights({shape.name: LoRALayer(*factors, 1.0)})
    objective = LoRAObjective(setting, LoRATraining(**SETTINGS), start)
    attention = setting.base.layout("tiny", 1, TARGETS["attention"])
    assert set(objective.weights) == {*attention.module_names, shape.name}
    random_up(objective)
    loss, _ = objective(batch)
    loss.backward()
    assert float(objective.weights[shape.name].up.grad.abs().max()) > 0
    wanted = written_out(setting, objective.weights.detach(), batch)
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-4)


def test_sdxls_layers():
    counts = {
        name: len(layout_from_unet_config("sdxl", SDXL_UNET_CONFIG, 4, targets))
        for name, targets in TARGETS.items()
    }
    residual, shortcuts, samplers, transformers, blocks = 17, 11, 4, 11, 70
    convolutions = 2 * residual + shortcuts + samplers
    assert counts == {
        "attention": 560,
        "transformer": 560 + 2 * transformers + 2 * blocks,
        "attention_and_convolutions": 560 + convolutions,
        "all": 560 + convolutions + 2 * transformers + 2 * blocks,
    }


def test_what_is_refused(setting, base):
    def lora(target, rank=1):
        shape = next(iter(base.layout("tiny", 1, (target,))))
        down = torch.zeros(rank, shape.in_features)
        return LoRAWeights({shape.name: LoRALayer(down, torch.zeros(shape.out_features, rank), 1)})

    layout = base.layout("tiny", 2, TARGETS["attention"])
    check_start(lora("attn1.to_q"), layout)
    (own,) = lora("attn1.to_q").layers.values()
    words = r"edits 1 layer that this model lacks .*: start from another LoRA"
    with pytest.raises(LayoutError, match=words):
        check_start(LoRAWeights({"input_blocks.99": own}), layout)
    with pytest.raises(LayoutError, match="has rank 3: set rank to 3 or more"):
        check_start(lora("attn1.to_q", 3), layout)
    wrong = LoRAWeights(
        {next(iter(layout)).name: LoRALayer(torch.zeros(1, 3), torch.zeros(8, 1), 1)}
    )
    with pytest.raises(LayoutError, match="use one made for this model"):
        LoRAObjective(setting, LoRATraining(**SETTINGS), wrong)
    for bad in ({"rank": 0}, {"targets": "some"}, {"learning_rate": 0.0}, {"schedule": "odd"}):
        with pytest.raises(ConfigError):
            LoRATraining(**bad)


def test_every_picture_is_trained_with_its_own_size(setting, monkeypatch):
    """What reaches the UNet: sizes before scaling and cuts, in the pixels that hosts count."""
    tall = torch.rand(3 * SIDE, SIDE, 3, generator=torch.Generator().manual_seed(1))
    mark = torch.zeros(SIDE, 3 * SIDE)
    mark[:, 2 * SIDE :] = 1.0  # what is cut out lies at an edge, which mirroring changes
    photos = training_pictures([tall, tall.movedim(0, 1)], [mark.T, mark])
    channels, seen = setting.base.unet.config.in_channels, []

    def encode_images(images):  # a latent pixel for 4 of the picture, where hosts count 8
        small = torch.nn.functional.avg_pool2d(images.movedim(-1, 1), 4)
        return small.mean(1, keepdim=True).expand(-1, channels, -1, -1)

    def forward(noisy, *args, added_cond_kwargs, **kwargs):
        seen.append((noisy, added_cond_kwargs["time_ids"]))
        return SimpleNamespace(sample=noisy)

    monkeypatch.setattr(setting.base, "encode_images", encode_images)
    monkeypatch.setattr(setting.base.unet, "forward", forward)
    made = bucketed(setting.base, photos, {0: PROMPTS, 1: PROMPTS}, SIDE)
    objective = LoRAObjective(setting, LoRATraining(**SETTINGS))
    for seed in range(8):
        objective(made.draw(4, 1000)(torch.Generator().manual_seed(seed)))
    found = {tuple(row) for _, ids in seen for row in ids.tolist()}
    for noisy, ids in seen:
        height, width = (8 * n for n in noisy.shape[2:])
        assert ids.shape == (4, 6)
        assert (ids[:, 4:] == torch.tensor([height, width])).all()
    # 64 x 192 pixels scaled to 48 x 144, of which 80 are kept; the other way round, and mirrored.
    wanted = {(384, 128, 128, 0, 160, 96), (128, 384, 0, 128, 96, 160), (128, 384, 0, 0, 96, 160)}
    assert found == wanted


def test_a_size_of_its_own_is_another_condition(setting, batch):
    """Guided losses too; without a size the picture counts as whole, as ComfyUI has it."""
    height, width = (8 * n for n in batch["latents"].shape[2:])
    whole = torch.tensor([[height, width, 0, 0, height, width]] * 4, dtype=torch.float32)
    other = whole * torch.tensor([4, 4, 1, 1, 1, 1])
    encoded = setting.encode(batch["prompts"])
    for guidance in (1.0, 3.0):
        losses = [
            denoising_error(
                setting.base, setting.noised({**batch, **own}, encoded, guidance), "uniform"
            )
            for own in ({}, {"time_ids": whole}, {"time_ids": other})
        ]
        assert torch.equal(losses[0], losses[1])
        assert not torch.allclose(losses[0], losses[2])
