"""Attention in a training on the CPU in bfloat16: without the fused kernel, and off again."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0

from difflora_core.base_model import attention
from difflora_core.base_model.attention import training_attention
from difflora_core.training.lora.dreambooth import DreamBoothConfig, train_dreambooth


@pytest.fixture
def fused(monkeypatch):
    """A list that grows by one for each call of torch's fused kernel."""
    calls, kernel = [], F.scaled_dot_product_attention

    def counted(*args, **settings):
        calls.append(args)
        return kernel(*args, **settings)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    return calls


def run(base, people, precision):
    """Two steps."""
    config = DreamBoothConfig(rank=2, steps=2, precision=precision)
    return train_dreambooth(base, people(), config)[2]


def test_small_attention_trains_without_the_fused_kernel_in_bf16_alone(base, people, fused):
    before = base.unet.attn_processors
    run(base, people, "bf16")
    assert not fused
    assert base.unet.attn_processors == before
    run(base, people, "no")
    assert fused


def test_large_attention_keeps_the_fused_kernel(base, people, fused, monkeypatch):
    monkeypatch.setattr(attention, "_SMALL", 16 * 3)  # 16 places look at 3 tokens of text
    run(base, people, "bf16")
    assert {key.shape[2] for _, key, *_ in fused} == {16}


def test_what_somebody_else_put_in_stays(base, people):
    called = []

    class Own(AttnProcessor2_0):
        def __call__(self, *args, **settings):
            called.append(args)
            return super().__call__(*args, **settings)

    own = Own()
    base.unet.set_attn_processor(own)
    run(base, people, "bf16")
    assert called
    assert set(base.unet.attn_processors.values()) == {own}


def test_gradients_are_as_precise_as_the_fused_kernels(base):
    seen = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    times, text = torch.arange(8) * 100, base.encode_prompts(["a b c d"] * 8)

    def gradient(precision, small):
        x = seen.clone().requires_grad_()
        inside = training_attention(base if small else None, precision)
        with inside, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = base.predict(x, times, text).float().square().sum()
        return torch.autograd.grad(loss, x)[0]

    exact = gradient("no", False)
    plain, usual = ((gradient("bf16", small) - exact).norm() for small in (True, False))
    assert 0 < plain < 1.3 * usual < 0.1 * exact.norm()


def test_nothing_to_do_without_a_base_model_or_its_attention(base):
    with training_attention(None, "bf16"):
        pass
    base.unet = torch.nn.Linear(2, 2)
    with training_attention(base, "bf16"):
        pass
