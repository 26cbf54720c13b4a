"""DiT: what it computes before training, its condition, its sizes."""

from dataclasses import replace

import pytest
import torch

from difflora_core.errors import ConfigError
from difflora_core.models.dit import DiT, DiTBlock, DiTConfig
from difflora_core.models.layers import timestep_embedding
from difflora_core.models.mif import IdentityCondition

CONFIG = DiTConfig(
    latent_tokens=4, latent_dim=6, condition_dim=10, condition_tokens=2, width=16, depth=2, heads=2
)


def network(config: DiTConfig = CONFIG) -> DiT:
    return DiT(config, generator=torch.Generator().manual_seed(2))


def awake(config: DiTConfig = CONFIG) -> DiT:
    """A network whose zeroed layers have been filled, as after training."""
    dit, g = network(config), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in dit.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    return dit


def identities(batch: int, config: DiTConfig = CONFIG, seed: int = 4) -> IdentityCondition:
    g = torch.Generator().manual_seed(seed)
    d, s = config.condition_dim, config.condition_tokens
    return IdentityCondition(
        torch.randn(batch, d, generator=g),
        torch.randn(batch, s, d, generator=g),
        torch.full((batch, 2), 0.5),
    )


def latents(batch: int, config: DiTConfig = CONFIG) -> torch.Tensor:
    shape = (batch, config.latent_tokens, config.latent_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


KINDS = pytest.mark.parametrize("config", [CONFIG, replace(CONFIG, condition_rank=3)])


@KINDS
def test_before_training_blocks_are_the_identity_and_the_output_is_zero(config) -> None:
    dit = network(config)
    block = dit.blocks[0]
    assert isinstance(block, DiTBlock)
    h = torch.randn(2, 6, 16)
    assert torch.equal(block(h, torch.randn(2, 16)), h)
    assert dit(latents(2), torch.tensor([10, 900]), identities(2)).eq(0).all()


@KINDS
def test_gradients_reach_every_weight_after_the_first_step(config) -> None:
    dit = network(config)
    target = latents(3) + 1
    optimiser = torch.optim.SGD(dit.parameters(), lr=0.5)
    for _ in range(3):
        optimiser.zero_grad()
        drop = torch.tensor([True, False, False])
        out = dit(latents(3), torch.tensor([1, 500, 900]), identities(3), drop)
        (out - target).square().mean().backward()
        optimiser.step()
    silent = [n for n, p in dit.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


def test_the_condition_makes_the_factors_of_a_low_rank_map() -> None:
    part = awake(replace(CONFIG, condition_rank=3)).blocks[0].low_rank
    g = torch.Generator().manual_seed(6)
    h, c = torch.randn(2, 5, 16, generator=g), torch.randn(2, 16, generator=g)
    added = part(h, c)
    for row in range(2):
        down = (part.down.weight.double() @ c[row].double() + part.down.bias).view(3, 16)
        up = (part.up.weight.double() @ c[row].double() + part.up.bias).view(3, 16)
        matrix = up.T @ down / 4  # the root of 16 features
        assert torch.linalg.matrix_rank(matrix) == 3
        expected = torch.stack([matrix @ token for token in h[row].double()])
        torch.testing.assert_close(added[row].double(), expected, atol=1e-5, rtol=1e-4)


def test_condition_and_timestep_matter_after_training() -> None:
    dit, z, t = awake(), latents(2), torch.tensor([100, 100])
    out = dit(z, t, identities(2))
    assert not torch.allclose(out, dit(z, t, identities(2, seed=9)), atol=1e-4)
    assert not torch.allclose(out, dit(z, t + 300, identities(2)), atol=1e-4)
    full = identities(2)
    other = IdentityCondition(full.pooled, identities(2, seed=9).tokens, full.gate)
    assert not torch.allclose(out, dit(z, t, other), atol=1e-5)


def test_dropped_rows_equal_the_null_condition() -> None:
    dit, z, t = awake(), latents(2), torch.tensor([100, 100])
    out = dit(z, t, identities(2), torch.tensor([True, False]))
    torch.testing.assert_close(out[0], dit(z, t, None)[0])
    torch.testing.assert_close(out[1], dit(z, t, identities(2))[1])


def test_rows_of_a_batch_are_independent() -> None:
    dit, z, t, c = awake(), latents(3), torch.tensor([5, 500, 950]), identities(3)
    out = dit(z, t, c)
    for row in range(3):
        alone = dit(z[row : row + 1], t[row : row + 1], c.select([row]))
        torch.testing.assert_close(alone[0], out[row])


def test_without_condition_tokens() -> None:
    config = replace(CONFIG, condition_tokens=0)
    assert awake(config)(latents(2), torch.zeros(2), identities(2, config)).shape == (2, 4, 6)


def test_wrong_condition_is_refused() -> None:
    with pytest.raises(ConfigError, match="expects"):
        network()(latents(2), torch.zeros(2), identities(2, replace(CONFIG, condition_tokens=1)))


def test_full_size_and_the_papers_1454() -> None:
    """The paper's number as the model's width: heads of 64 through 1536 inner features."""
    paper = replace(DiTConfig.full_size(), width=1454, heads=24, inner_dim=1536)
    with torch.device("meta"):
        full, literal = DiT(DiTConfig.full_size()), DiT(paper)
    assert len(full.blocks) == len(literal.blocks) == 16
    count = sum(p.numel() for p in literal.parameters())
    # difflora.md section 5: about 609 M with 6-way modulation at equal inner width
    assert 590e6 < count < 660e6
    z = torch.empty(1, 64, 64, device="meta")
    assert literal(z, torch.empty(1, device="meta")).shape == (1, 64, 64)


def test_heads_must_divide() -> None:
    with pytest.raises(ConfigError, match="heads"):
        DiTConfig(width=1454, heads=24)


def test_timestep_embedding_matches_diffusers() -> None:
    from diffusers.models.embeddings import get_timestep_embedding

    t = torch.tensor([0.0, 1.0, 37.5, 999.0])
    theirs = get_timestep_embedding(t, 64, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(timestep_embedding(t, 64), theirs, rtol=1e-4, atol=1e-4)
