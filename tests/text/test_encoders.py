"""The fingerprint of a pair of text encoders, and prompts longer than they read at once."""

import pytest
import torch

from difflora_core.errors import ConfigError
from difflora_core.text.encoders import (
    EncodedPrompts,
    check_probe,
    joined_blocks,
    together,
    token_blocks,
)


def test_fingerprints_pass_rounding_and_nothing_else():
    noise = torch.Generator().manual_seed(0)
    own = torch.randn(64, generator=noise)
    check_probe(own, own.half().float(), "It")
    check_probe(own, own + 0.01 * torch.randn(64, generator=noise), "It")
    for other in (-own, torch.randn(64, generator=noise), own[:32], 1.5 * own):
        with pytest.raises(ConfigError, match="other text encoders"):
            check_probe(own, other, "It")


@pytest.mark.parametrize(
    ("count", "wanted"), [(0, [0]), (1, [1]), (75, [75]), (76, [75, 1]), (300, [75, 75, 75, 75])]
)
def test_blocks_are_full_but_for_the_last(count, wanted):
    (blocks,) = token_blocks([list(range(count))], 75)
    assert [len(block) for block in blocks] == wanted
    assert [token for block in blocks for token in block] == list(range(count))


def test_too_long_prompts_are_refused():
    with pytest.raises(ConfigError, match=r"301 tokens; .* up to 300\. Shorten"):
        token_blocks([[1], [1] * 301], 75)
    with pytest.raises(ConfigError, match=r"76 tokens; .* up to 75 of a taught word"):
        token_blocks([[*[1] * 75, "<a>"]], 75, ["<a>"])


def test_blocks_of_a_prompt_lie_behind_each_other():
    g = torch.Generator().manual_seed(1)
    context, pooled = torch.randn(3, 5, 4, generator=g), torch.randn(3, 2, generator=g)
    real = torch.arange(15).reshape(3, 5) % 2 == 0
    made = joined_blocks(context, pooled, real, [1, 2])
    assert torch.equal(made.context[0], torch.cat([context[0], context[0]]))
    assert torch.equal(made.context[1], torch.cat([context[1], context[2]]))
    assert torch.equal(made.pooled, pooled[:2])
    assert torch.equal(made.real[1], torch.cat([real[1], real[2]]))


def test_attention_does_not_notice_that_a_context_is_repeated():
    g = torch.Generator().manual_seed(2)
    rows = []
    for blocks in (1, 2, 3):
        context = torch.randn(1, 7 * blocks, 4, generator=g, dtype=torch.float64)
        rows.append(EncodedPrompts(context, torch.zeros(1, 2), torch.ones(1, 7 * blocks) > 0, {}))
    batch, query = together(rows), torch.randn(5, 4, generator=g, dtype=torch.float64)
    assert batch.context.shape == (3, 42, 4)
    for row, repeated in zip(rows, batch.context, strict=True):
        seen = [(query @ keys.T).softmax(-1) @ keys for keys in (row.context[0], repeated)]
        torch.testing.assert_close(*seen, atol=1e-13, rtol=0)
