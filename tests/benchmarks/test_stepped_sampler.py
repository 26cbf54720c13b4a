"""The sampler of the overhead benchmark, in ComfyUI: KSampler's own steps, one at a time."""

import importlib.util
import sys
from importlib import import_module

import pytest
import torch

from benchmarks.cost.overhead import NODES
from difflora_core.demo import paths

STEPS = 3


@pytest.fixture(scope="module")
def stepped(pack):
    """The benchmark's nodes, loaded as ComfyUI loads a pack."""
    name, entry = "interleaving_pack", NODES / "__init__.py"
    spec = importlib.util.spec_from_file_location(
        name, entry, submodule_search_locations=[str(NODES)]
    )
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return import_module(f"{name}.nodes")


@pytest.fixture(scope="module")
def sampling(pack):
    """Model, both conditions and an empty latent, as the nodes of a graph give them."""
    import nodes

    demo = import_module(".nodes.host.demo", pack.__name__)
    clip = demo.load_demo_clip(paths.BASE)
    conditions = tuple(
        clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("photo of a person", "")
    )
    (latent,) = nodes.EmptyLatentImage().generate(64, 64, 2)
    return demo.load_demo_unet(paths.BASE), conditions, latent


def test_steps_are_those_of_ksampler(stepped, sampling):
    import nodes

    class Watched(stepped.SteppedSampler):
        def _end_of_step(self, step, denoised, latent, total):
            seen.append(denoised.clone())
            super()._end_of_step(step, denoised, latent, total)

    seen, (model, conditions, latent) = [], sampling
    with torch.inference_mode():
        (expected,) = nodes.common_ksampler(
            model, 0, STEPS, 2.0, "euler", "normal", *conditions, latent
        )
    sampler = Watched(model, conditions, latent, STEPS)
    for number in range(STEPS):
        assert len(seen) == number  # nothing is computed while it is not its turn
        wall, processor = sampler.step()
        assert wall > 0
        assert processor > 0
    sampler.stop()
    assert len(seen) == STEPS
    assert expected["samples"].shape == (2, 8, 16, 16)
    torch.testing.assert_close(model.model.process_latent_out(seen[-1]), expected["samples"])


def test_two_samplers_take_turns_and_end_where_they_are(stepped, sampling):
    samplers = [stepped.SteppedSampler(*sampling, 100) for _ in range(2)]
    for _ in range(2):
        for sampler in samplers:
            sampler.step()
    for sampler in samplers:
        sampler.stop()
        assert not sampler._thread.is_alive()


def test_an_error_of_the_sampler_comes_out(stepped, sampling):
    model, _, latent = sampling
    sampler = stepped.SteppedSampler(model, (None, None), latent, 2)
    with pytest.raises(TypeError):
        sampler.step()
    sampler.stop()
