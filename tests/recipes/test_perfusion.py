"""The concept recipes on a tiny base with its own text encoders: 20 CPU steps each."""

from dataclasses import replace

import pytest
import torch

from difflora_core.adapters.attach import attach
from difflora_core.base_model.protocol import TextCondition
from difflora_core.errors import CheckpointError, ConfigError, InterruptedTraining
from difflora_core.methods.base import AppliedAdaptation, PreparedAdaptation
from difflora_core.methods.perfusion import Perfusion, PerfusionConfig
from difflora_core.text.covariance import Covariance
from difflora_core.text.encoders import text_probe
from difflora_core.text.new_words import TEMPLATES, superclass_token, word_encoding
from difflora_core.training.adaptation_run import run_adaptation
from difflora_core.training.concept_task import NewWord, prepare_task
from difflora_core.training.perfusion import PerfusionObjective, PerfusionTraining
from difflora_core.training.picture_examples import PictureExamples, picture_examples

WORD = NewWord("<h1>", "hat")
PROMPTS = ["photo of a <h1>", "a person wearing a <h1>, blue background", "the red <h1>"]
QUICK = PerfusionTraining(
    steps=20, batch=4, evaluate_every=5, value_rate=0.3, word_rate=0.06, weighting="high_noise",
    preservation=0.0,
)  # fmt: skip


def train_perfusion(task, examples, config, folder, watch=None):
    objective = PerfusionObjective(task, config)
    return run_adaptation(objective, examples, folder, watch)


def test_training_lowers_the_loss_and_leaves_the_base_alone(
    task, tmp_path, pictures, evaluation_loss
):
    before = {k: v.clone() for k, v in task.base.unet.state_dict().items()}
    seen = []
    result = train_perfusion(
        task, pictures(), QUICK, tmp_path, lambda s, n, m, preview: seen.append((s, n, m))
    )
    losses = [metrics["evaluation"] for _, _, metrics in seen]
    first = evaluation_loss(PerfusionObjective(task, QUICK), QUICK.batch)
    assert result.loss == pytest.approx(min([first, *losses]), rel=1e-5)
    assert result.loss < 0.98 * first
    assert [s for s, _, _ in seen] == [5, 10, 15, 20]
    assert result.finished
    assert result.loss == pytest.approx(BEST, rel=2e-2)
    assert all(torch.equal(v, before[k]) for k, v in task.base.unet.state_dict().items())
    assert not any(m._forward_hooks for m in task.base.unet.modules())
    (concept,) = result.adaptations
    assert len(concept.layers) == 4
    assert all("attn2.to_v" in layer for layer in concept.layers)
    assert (concept.word.contexts,) == task.contexts


BEST = 0.4373  # evaluation loss over six batches, as first measured


def test_stopped_and_resumed_equals_straight(task, tmp_path, pictures, numbers):
    straight = train_perfusion(task, pictures(), QUICK, tmp_path / "a")

    def stop(step, total, metrics, preview):
        if step == 10:
            raise InterruptedTraining("stop")

    half = train_perfusion(task, pictures(), QUICK, tmp_path / "b", stop)
    assert not half.finished
    assert half.step <= 10
    resumed = train_perfusion(task, pictures(), QUICK, tmp_path / "b")
    assert resumed.finished
    assert torch.equal(numbers(resumed), numbers(straight))
    other = PerfusionTraining(steps=20, batch=4, evaluate_every=5, bias=0.5)
    with pytest.raises(CheckpointError, match="another training"):
        train_perfusion(task, pictures(), other, tmp_path / "b")


@pytest.mark.parametrize("more", [{}, {"preservation": 0.5, "guidance": 1.5}])
def test_parts_of_a_batch_give_the_weights_of_the_whole(task, tmp_path, pictures, numbers, more):
    """The direction is a mean over the whole batch, also where a part sees half of it."""
    config = replace(QUICK, steps=8, **more)
    whole = train_perfusion(task, pictures(), config, tmp_path / "whole")
    parts = train_perfusion(task, pictures(), replace(config, accumulate=2), tmp_path / "parts")
    apart = float((numbers(whole) - numbers(parts)).abs().max() / numbers(whole).abs().max())
    assert apart < 1e-4


def test_another_covariance_base_or_mask_is_another_run(task, base, tmp_path, pictures):
    """Else a queue with another checkpoint would hand over what the first one learned."""
    train_perfusion(task, pictures(), QUICK, tmp_path)
    other = Covariance(2 * task.covariance.matrix + torch.eye(8), 10, probe=task.covariance.probe)
    changed = [(replace(task, covariance=other), pictures()), (task, pictures(masked=False))]
    for setting, examples in changed:
        with pytest.raises(CheckpointError, match="another training"):
            train_perfusion(setting, examples, QUICK, tmp_path)
    with torch.no_grad():
        for parameter in task.base.unet.parameters():
            parameter.mul_(1.01)
    with pytest.raises(CheckpointError, match="another training"):
        train_perfusion(task, pictures(), QUICK, tmp_path)


def test_trained_record_gives_the_training_adapters(task, tmp_path, pictures):
    """Method and recipe compute the same thing from a prompt on."""
    result = train_perfusion(task, pictures(), QUICK, tmp_path)
    (concept,) = result.adaptations
    superclass = word_encoding(
        task.text,
        task.text.embedding(superclass_token(task.text, concept.word.superclass)),
        concept.word.contexts,
    )
    torch.testing.assert_close(superclass, task.superclasses[0])
    config = PerfusionConfig(bias=QUICK.bias, temperature=QUICK.temperature)
    adapters = Perfusion.adapters(
        [AppliedAdaptation(PreparedAdaptation(concept, superclass), config)]
    )
    encoded = task.text.encode(PROMPTS, {concept.word.word: concept.word.embeddings})
    condition = TextCondition(encoded.context, encoded.pooled)
    noisy, steps = torch.randn(3, 4, 4, 4), torch.tensor([400, 500, 600])
    objective = PerfusionObjective(task, QUICK)
    names = objective.module_names
    with torch.no_grad():
        for value, layer in zip(objective.values, task.layers, strict=True):
            value.copy_(concept.layers[layer]["values"][None] - objective.starts[layer])
        with attach(task.base.unet, adapters, names=names):
            got = task.base.predict(noisy, steps, condition)
        with attach(
            task.base.unet, objective.adapters(concept.shared["direction"][None]), names=names
        ):
            wanted = task.base.predict(noisy, steps, condition)
        plain = task.base.predict(noisy, steps, condition)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert float((got - plain).abs().max()) > 1e-3


def test_before_training_it_is_the_super_class_behind_a_gate(task):
    objective = PerfusionObjective(task, QUICK).eval()
    embedding = objective.embeddings()["<h1>"]
    wanted = task.text.embedding(superclass_token(task.text, "hat"))
    assert all(torch.equal(a, b) for a, b in zip(embedding, wanted, strict=True))
    for layer, path in task.layers.items():
        weight = task.base.unet.get_submodule(path).weight
        torch.testing.assert_close(objective.starts[layer], task.superclasses @ weight.mT)


def test_gradients_reach_words_values_and_pass_the_average(task, pictures):
    objective = PerfusionObjective(task, QUICK).train()
    loss, _ = objective(pictures().draw(4, 1000)(torch.Generator().manual_seed(0)))
    loss.backward()
    assert all(float(p.grad.abs().max()) > 0 for p in [*objective.values, *objective.shifts])
    assert objective.direction.grad is None
    moved = objective.direction.detach() - task.superclasses
    assert 0 < float(moved.abs().max()) < 0.1 * float(task.superclasses.abs().max())


def test_the_direction_keeps_up_with_a_word_that_moves(task, pictures):
    """Far behind it, the word would match its own edit badly, and other tokens better."""
    lag = {}
    for average in (0.9, 0.99):
        objective = PerfusionObjective(task, replace(QUICK, average=average)).train()
        optimizer = torch.optim.AdamW(objective.parameters(), QUICK.value_rate, weight_decay=0.0)
        draw = pictures().draw(4, 1000)
        for step in range(20):
            loss, _ = objective(draw(torch.Generator().manual_seed(step)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            encoded = task.text.encode(PROMPTS, objective.embeddings()).at("<h1>").mean(0)
        direction = objective.direction[0].detach()
        dual = task.covariance.inverse.to(direction) @ direction
        lag[average] = abs(float((encoded @ dual) / (direction @ dual)) - 1)
    assert lag[0.9] < 0.6 * lag[0.99]


def test_two_learning_rates(task, tmp_path, pictures):
    """One AdamW step moves a value by its rate and an embedding by its own."""
    config = PerfusionTraining(steps=1, batch=4, evaluate_every=1, value_rate=0.02, word_rate=0.004)
    objective = PerfusionObjective(task, config)
    from difflora_core.training.loop import train

    train(objective, pictures().draw(4, 1000), config.loop, tmp_path)
    assert float(objective.values[0].detach().abs().max()) == pytest.approx(0.02, rel=1e-2)
    start = task.embeddings[0]
    moved = [
        float((e.detach() - s).abs().max())
        for e, s in zip(objective.embeddings()["<h1>"], start, strict=True)
    ]
    assert max(moved) == pytest.approx(0.004, rel=1e-2)


def test_masks_choose_what_is_learned(task, pictures):
    """Where the mask is zero, the picture cannot matter."""
    objective = PerfusionObjective(task, QUICK).eval()
    batch = pictures().draw(4, 1000)(torch.Generator().manual_seed(0))
    changed = {**batch, "masks": batch["masks"].clone()}
    loss = float(objective(batch)[0].detach())
    whole = {k: v for k, v in batch.items() if k != "masks"}
    changed["masks"][:] = 1
    with torch.no_grad():
        without = float(objective(whole)[0])
        assert without > loss
        assert float(objective(changed)[0]) == pytest.approx(without, rel=1e-6)


def test_outside_the_mask_it_stays_what_it_was(task, tmp_path, pictures):
    """Against a run without the preservation loss: less drift."""
    drifts = []
    for preservation in (0.0, 3.0):
        config = replace(QUICK, preservation=preservation)
        folder = tmp_path / str(preservation)
        (concept,) = train_perfusion(task, pictures(), config, folder).adaptations
        objective = PerfusionObjective(task, replace(QUICK, preservation=1.0)).eval()
        with torch.no_grad():
            for value, layer, start in zip(
                objective.values, concept.layers, objective.starts.values(), strict=True
            ):
                value.copy_(concept.layers[layer]["values"][None] - start)
            batch = pictures().draw(8, 1000)(torch.Generator().manual_seed(3))
            drifts.append(float(objective(batch)[1]["drift"]))
    assert 0 < drifts[1] < 0.9 * drifts[0]
    whole = pictures(masked=False).draw(4, 1000)(torch.Generator().manual_seed(3))
    assert "drift" not in PerfusionObjective(task, replace(QUICK, preservation=1.0))(whole)[1]


def test_guidance_while_training(task, pictures):
    """A guided prediction goes as many times as far from the base's as the guidance says."""
    batch, seen = pictures().draw(8, 1000)(torch.Generator().manual_seed(3)), {}
    for scale in (1.0, 2.0):
        config = replace(QUICK, preservation=1.0, guidance=scale)
        objective = PerfusionObjective(task, config)
        with torch.no_grad():
            for value in objective.values:
                value.copy_(torch.linspace(-4, 4, value.numel()).view_as(value))
            seen[scale] = objective.eval()(batch)
    drift = {scale: float(metrics["drift"]) for scale, (_, metrics) in seen.items()}
    assert drift[2.0] == pytest.approx(4 * drift[1.0], rel=1e-3)
    assert abs(float(seen[2.0][0]) / float(seen[1.0][0]) - 1) > 1e-3
    with pytest.raises(ConfigError, match=r"is 1 \(off\) to 20"):
        PerfusionTraining(guidance=0.5)


def test_disendiff_losses_take_part(base, text, covariance, tmp_path, pictures):
    words = [WORD, NewWord("<c1>", "cup")]
    prompts = ["photo of a <h1> hat and a <c1> cup", "the <h1> hat and the <c1> cup"]
    contexts = ["photo of a {}", "photo of a hat and a {}"]
    task = prepare_task(base, text, covariance, words, contexts, "tiny")
    g = torch.Generator().manual_seed(1)
    examples = PictureExamples(torch.randn(1, 4, 4, 4, generator=g), [prompts])
    config = PerfusionTraining(steps=3, batch=2, evaluate_every=1, binding=0.01, separation=0.01)
    seen = []
    result = train_perfusion(
        task, examples, config, tmp_path, lambda s, n, m, preview: seen.append(m)
    )
    assert len(result.adaptations) == 2
    assert all(0 < metrics["separation"] <= 1 for metrics in seen)
    assert all(0 < metrics["binding"] < 2 for metrics in seen)
    batch = examples.draw(2, 1000)(torch.Generator().manual_seed(0))
    plain, both = (
        PerfusionObjective(task, replace(config, binding=b, separation=s)).eval()(batch)
        for b, s in ((0.0, 0.0), (0.1, 0.2))
    )
    extra = 0.1 * both[1]["binding"] + 0.2 * both[1]["separation"]
    assert float(extra) > 1e-3
    torch.testing.assert_close(both[0], plain[0] + extra)
    assert "binding" not in plain[1]
    lone = prepare_task(base, text, covariance, [WORD])
    with pytest.raises(ConfigError, match="two words"):
        train_perfusion(lone, pictures(), config, tmp_path / "one")


def test_words_that_cannot_be_taught(base, text, covariance, make_text):
    def bad(word, superclass):
        return prepare_task(base, text, covariance, [NewWord(word, superclass)])

    with pytest.raises(ConfigError, match="already means"):
        bad("cat", "hat")
    with pytest.raises(ConfigError, match="2 tokens"):
        bad("<x>", "red hat")
    with pytest.raises(ConfigError, match="one word that the model knows"):
        bad("<x>", "zeppelin")
    with pytest.raises(ConfigError, match="cannot be taught"):
        bad("a b", "hat")
    with pytest.raises(ConfigError, match="different ones"):
        prepare_task(base, text, covariance, [WORD, WORD])
    with pytest.raises(ConfigError, match="other text encoders"):
        prepare_task(base, make_text(2), covariance, [WORD])
    narrow = Covariance(torch.eye(5), 10)
    with pytest.raises(ConfigError, match="width 5"):
        prepare_task(base, text, narrow, [WORD])
    with pytest.raises(ConfigError, match="once"):
        prepare_task(base, text, covariance, [WORD], ["no slot here"])


class Flat:
    """Encodes pictures to their small selves."""

    def encode_images(self, images):
        return torch.nn.functional.avg_pool2d(images.permute(0, 3, 1, 2), 4)


def test_examples_from_pictures():
    images = torch.rand(2, 16, 16, 3)
    masks = torch.ones(2, 32, 32)  # another size than the pictures, and the first one is full
    masks[1, :, 16:], masks[1, :, :16] = 0.0, 0.5
    examples = picture_examples(Flat(), images, [WORD.word], masks)
    assert len(examples) == 4  # mirrored too
    torch.testing.assert_close(examples.latents[2], examples.latents[0].flip(-1))
    torch.testing.assert_close(examples.masks[3], examples.masks[1].flip(-1))
    assert bool((examples.masks[0] == 1).all())
    assert float(examples.masks[1].max()) == 1.0  # normalised over the picture, not a row
    assert float(examples.masks[1][:, 3].max()) < 0.05
    assert all("<h1>" in prompt for prompt in examples.prompts[0])
    single = picture_examples(Flat(), images[:1], [WORD.word], flip=False)
    assert len(single) == 1
    assert single.masks is None
    both = picture_examples(Flat(), images, [WORD.word, "<c1>"])
    assert "<h1> and a <c1>" in both.prompts[0][0]


def test_bad_pictures():
    images = torch.rand(2, 16, 16, 3)
    with pytest.raises(ConfigError, match="pictures"):
        picture_examples(Flat(), images[:0], [WORD.word])
    with pytest.raises(ConfigError, match="one mask for all"):
        picture_examples(Flat(), images, [WORD.word], torch.ones(3, 16, 16))
    masks = torch.ones(2, 16, 16)
    masks[1] = 0.0005  # what a resized black picture may hold
    with pytest.raises(ConfigError, match=r"Mask 2 of 2 is empty.* connect no masks"):
        picture_examples(Flat(), images, [WORD.word], masks)
    assert picture_examples(Flat(), images, [WORD.word], masks[1]).masks is None  # nobody painted
    masks[1, 3, 4] = 0.01  # faint, but somewhere
    assert float(picture_examples(Flat(), images, [WORD.word], masks).masks[1].max()) == 1.0
    with pytest.raises(ConfigError, match="not finite"):
        picture_examples(Flat(), images, [WORD.word], torch.full((2, 16, 16), torch.nan))
    with pytest.raises(ConfigError, match="does not name"):
        picture_examples(Flat(), images, [WORD.word], prompts=[["a hat"], ["a <h1>"]])
    with pytest.raises(ConfigError, match="at least one picture"):
        PictureExamples(torch.zeros(0, 4, 4, 4), [])


def test_bad_settings():
    rates = {"value_rate": 0.0}, {"average": 1.0}, {"temperature": 0.0}
    for bad in ({"steps": 0}, *rates):
        with pytest.raises(ConfigError):
            PerfusionTraining(**bad)
    with pytest.raises(ConfigError, match="unknown settings stepz"):
        PerfusionTraining.from_dict({"stepz": 3})


def test_text_with_a_new_word(text):
    """The super-class embedding under a new name changes nothing; places and masks are right."""
    own = text.embedding(superclass_token(text, "hat"))
    plain = text.encode(["photo of a hat, smiling", "a hat"], {})
    renamed = text.encode(["photo of a <h1>, smiling", "a <h1>"], {"<h1>": own})
    torch.testing.assert_close(renamed.context, plain.context)
    torch.testing.assert_close(renamed.pooled, plain.pooled)
    assert renamed.positions["<h1>"].tolist() == [4, 2]
    assert plain.real.sum(1).tolist() == [6, 2]
    assert renamed.at("<h1>").shape == (2, 8)
    short = text.encode(["a <h1>"], {"<h1>": own}, padded=False)
    assert short.context.shape[1] == 4
    torch.testing.assert_close(short.context[0], plain.context[1, :4])
    other = text.encode(["a cat", "a <h1>s"], {"<h1>": own})
    assert other.positions["<h1>"].tolist() == [-1, 2]  # its bracket ends it
    absent = text.encode(["a cat", "a blorpx"], {"blorp": own})
    assert absent.positions["blorp"].tolist() == [-1, -1]  # whole words only
    assert text_probe(text).shape == (64,)
    with pytest.raises(ConfigError, match="75"):
        text.encode(["a <h1> " + "hat " * 80], {"<h1>": own})
    with pytest.raises(ConfigError, match="300"):
        text.encode(["hat " * 301], {})
    assert len(TEMPLATES) == len(set(TEMPLATES))
