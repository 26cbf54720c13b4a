"""What a style is distilled on: prompts as they are read, latents as the teacher draws them."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import save_file

from difflora_core.base_model.diffusers_base import time_ids
from difflora_core.errors import CheckpointError, ConfigError, InterruptedTraining
from difflora_core.training.distillation_data import (
    DistillationPictures,
    PromptPair,
    distillation_examples,
    held_out_prompts,
    read_prompts,
)
from difflora_core.training.picture_task import PictureTask

PAIRS = [PromptPair(p, p) for p in ("photo of a hat", "the red hat", "a blue cup", "a cat")]
QUICK = DistillationPictures(count=8, steps=3, guidance=2.0)


@pytest.fixture
def teacher(base, text):
    """Any base can be one."""
    return PictureTask(base, text, "tiny")


def test_latents_are_what_ddim_draws_and_are_drawn_once(teacher, tmp_path):
    """Against diffusers' own loop, one picture by one."""
    data = distillation_examples(teacher, PAIRS[:2], (4, 4), replace(QUICK, count=3), tmp_path)
    assert data.prompts == [[PAIRS[0].student], [PAIRS[1].student], [PAIRS[0].student]]
    scheduler = DDIMScheduler.from_config(
        teacher.base.scheduler.config,
        timestep_spacing="trailing",
        set_alpha_to_one=False,
        clip_sample=False,
    )
    for number, prompt in enumerate((PAIRS[0], PAIRS[1], PAIRS[0])):
        z = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(number))
        both = teacher.text.encode(["", prompt.teacher], {})
        scheduler.set_timesteps(3)
        for step in scheduler.timesteps:
            added = {"text_embeds": both.pooled, "time_ids": time_ids(z.expand(2, -1, -1, -1))}
            with torch.no_grad():
                null, made = teacher.base.unet(
                    z.expand(2, -1, -1, -1), step, both.context, added_cond_kwargs=added
                ).sample.chunk(2)
            z = scheduler.step(null + 2.0 * (made - null), step, z).prev_sample
        torch.testing.assert_close(data.latents[number], z[0], rtol=1e-3, atol=1e-4)

    def forbidden(*_):
        raise AssertionError("drawn again")

    again = distillation_examples(
        teacher, PAIRS[:2], (4, 4), replace(QUICK, count=3), tmp_path, forbidden
    )
    assert torch.equal(again.latents, data.latents)


def test_drawing_goes_on_where_it_was_stopped(teacher, tmp_path):
    def stop(done, count, latent):
        assert latent.shape == (1, 4, 4, 4)
        if done == 2:
            raise InterruptedTraining(f"stopped at {done} of {count}")

    settings = (teacher, PAIRS, (4, 4), replace(QUICK, count=4), tmp_path)
    with pytest.raises(InterruptedTraining):
        distillation_examples(*settings, stop)
    seen = []
    made = distillation_examples(*settings, lambda done, *_: seen.append(done))
    assert seen == [3, 4]
    assert torch.equal(made.latents, distillation_examples(*settings[:-1]).latents)
    (folder,) = tmp_path.iterdir()
    file = max(folder.iterdir())
    file.write_bytes(b"no file of ours")
    with pytest.raises(CheckpointError):
        distillation_examples(*settings)
    save_file({"latents": torch.zeros(1, 4, 2, 2)}, file)
    with pytest.raises(CheckpointError, match=r"000003.safetensors is damaged; delete it"):
        distillation_examples(*settings)


def test_more_pictures_are_drawn_beside_those_that_are_there(teacher, tmp_path):
    """Each picture is written once, and nothing that is there is written again."""
    seen, times = [], []
    for count in (2, 5, 3):
        config = replace(QUICK, count=count)
        made = distillation_examples(
            teacher, PAIRS[:3], (4, 4), config, tmp_path, lambda *told: seen.append(told[:2])
        )
        assert torch.equal(
            made.latents, distillation_examples(teacher, PAIRS[:3], (4, 4), config).latents
        )
        (folder,) = tmp_path.iterdir()
        times.append({file.name: file.stat().st_mtime_ns for file in folder.iterdir()})
    assert seen == [(1, 2), (2, 2), (3, 5), (4, 5), (5, 5)]
    assert [len(files) for files in times] == [2, 5, 5]
    assert times[0].items() <= times[1].items()
    assert times[1] == times[2]
    for other in ({"seed": 1}, {"steps": 2}, {"guidance": 3.0}):
        distillation_examples(teacher, PAIRS[:3], (4, 4), replace(QUICK, **other), tmp_path)
    distillation_examples(teacher, PAIRS[1:], (4, 4), replace(QUICK, count=1), tmp_path)
    assert len(list(tmp_path.iterdir())) == 5  # other pictures lie apart


def test_noise_in_place_of_pictures(teacher):
    config = replace(QUICK, source="noise", count=64)
    data = distillation_examples(teacher, PAIRS, (4, 4), config)
    assert float(data.latents.std()) == pytest.approx(1, abs=0.05)


def test_prompts_are_read_line_by_line():
    text = "\ufeff# styles\n a hat \n\n红帽 => a red hat\na hat\nb=>c\r\n"
    assert read_prompts(text) == [
        PromptPair("a hat", "a hat"), PromptPair("红帽", "a red hat"), PromptPair("b", "c"),
    ]  # fmt: skip
    for bad, match in (
        ("", "no prompts"),
        ("\n # only this\n", "no prompts"),
        ("a hat\n => b", "Line 2"),
        ("a =>", "Line 1"),
    ):
        with pytest.raises(ConfigError, match=match):
            read_prompts(bad)
    with pytest.raises(ConfigError, match="at most 100000"):
        read_prompts("\n".join(map(str, range(100_001))))


def test_held_out_prompts_are_evenly_apart_and_never_all():
    pairs = [PromptPair(str(k), str(k)) for k in range(20)]
    trained, apart = held_out_prompts(pairs, 10)
    assert [pair.student for pair in apart] == ["0", "10"]
    assert [pair for pair in pairs if pair not in apart] == trained
    assert held_out_prompts(pairs[:1], 50) == (pairs[:1], [])
    assert held_out_prompts(pairs, 0) == (pairs, [])
    two = held_out_prompts(pairs[:2], 1)
    assert (len(two[0]), len(two[1])) == (1, 1)
