"""Every family of LoRA files: random layers, and what each changes, by brute force in float64.

The formulas are written out index by index from the papers and from ComfyUI's reader, and share
nothing with the library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

ATTENTION = "input_blocks.1.1.transformer_blocks.0.attn2.to_k"
CONVOLUTION = "input_blocks.1.0.in_layers.2"
POINTWISE = "output_blocks.1.0.skip_connection"
LAYER_NORM = "input_blocks.1.1.transformer_blocks.0.norm2"
GROUP_NORM = "input_blocks.1.0.in_layers.0"
BIASED = "input_blocks.1.1.transformer_blocks.0.attn1.to_out.0"
RANK = 4
Parts = Mapping[str, Tensor]
Change = Callable[[Parts, Tensor, float, float], Tensor]
"""(tensors in float64, weight, scale, strength) to the change of that weight."""


@dataclass(frozen=True)
class Family:
    """One kind of entry in a LoRA file.

    Args:
        name: what it is called.
        layer: the layer it edits.
        shapes: suffix to shape; ``out``, ``in`` and ``k`` stand for the layer's sizes.
        change: what it changes.
        scales: whether alpha counts, over RANK.
        target: ``weight`` or ``bias`` of the layer.
        constant: whether the change does not depend on the weight.
    """

    name: str
    layer: str
    shapes: Callable[[tuple[int, ...]], Mapping[str, tuple[int, ...]]]
    change: Change
    scales: bool = True
    target: str = "weight"
    constant: bool = True

    def tensors(self, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
        """Random tensors by suffix for a layer's weight of a shape, in a dtype."""
        generator = torch.Generator().manual_seed(seed)
        return {
            suffix: (0.5 * torch.randn(size, generator=generator)).to(dtype)
            for suffix, size in self.shapes(shape).items()
        }


def _lora(p: Parts, w: Tensor, scale: float, strength: float) -> Tensor:
    up, down = p["lora_up.weight"], p["lora_down.weight"]
    total = torch.zeros_like(w)
    for r in range(len(down)):  # a sum of outer products
        column = up[:, r].reshape(-1, *[1] * (w.ndim - 1))
        total += column * down[r].reshape(1, *w.shape[1:])
    return strength * scale * total


def _tucker(p: Parts, w: Tensor, scale: float, strength: float) -> Tensor:
    up, down, mid = (p[f"lora_{name}.weight"] for name in ("up", "down", "mid"))
    total = torch.zeros_like(w)
    for m in range(mid.shape[0]):
        for n in range(mid.shape[1]):
            outer = up[:, m].reshape(-1, 1) * down[n].reshape(1, -1)
            total += outer[:, :, None, None] * mid[m, n]
    return strength * scale * total


def _loha(p: Parts, w: Tensor, scale: float, strength: float) -> Tensor:
    halves = []
    for n in "12":
        first, second = p[f"hada_w{n}_a"], p[f"hada_w{n}_b"]
        halves.append(sum(torch.outer(first[:, r], second[r]) for r in range(len(second))))
    return strength * scale * (halves[0] * halves[1]).reshape(w.shape)


def _loha_tucker(p: Parts, w: Tensor, scale: float, strength: float) -> Tensor:
    halves = []
    for n in "12":
        core, first, second = p[f"hada_t{n}"], p[f"hada_w{n}_a"], p[f"hada_w{n}_b"]
        half = torch.zeros_like(w)
        for i in range(core.shape[0]):
            for j in range(core.shape[1]):
                half += torch.outer(first[i], second[j])[:, :, None, None] * core[i, j]
        halves.append(half)
    return strength * scale * halves[0] * halves[1]


def _lokr(p: Parts, w: Tensor, scale: float, strength: float) -> Tensor:
    first = p["lokr_w1"] if "lokr_w1" in p else p["lokr_w1_a"] @ p["lokr_w1_b"]
    if "lokr_w2" in p:
        second = p["lokr_w2"]
    elif "lokr_t2" in p:
        second = torch.einsum("abhw, ao, bi -> oihw", p["lokr_t2"], p["lokr_w2_a"], p["lokr_w2_b"])
    else:
        second = p["lokr_w2_a"] @ p["lokr_w2_b"]
    total = torch.zeros_like(w)
    rows, columns = second.shape[:2]
    for a in range(first.shape[0]):
        for b in range(first.shape[1]):
            block = total[a * rows : (a + 1) * rows, b * columns : (b + 1) * columns]
            block += first[a, b] * second
    return strength * scale * total


def _difference(suffix: str) -> Change:
    return lambda p, w, scale, strength: strength * p[suffix].reshape(w.shape)


def _replaced(p: Parts, w: Tensor, scale: float, strength: float) -> Tensor:
    return p["set_weight"] - w


def _dora(p: Parts, w: Tensor, scale: float, strength: float) -> Tensor:
    moved = w + _lora(p, w, scale, 1.0)
    norm = w.square().sum(1, keepdim=True).sqrt()  # ComfyUI takes the base weight's
    return strength * (moved * p["dora_scale"] / norm - w)


def _rotation(skew: Tensor) -> Tensor:
    """Cayley's orthogonal matrix of what is not yet skew-symmetric."""
    q, one = skew - skew.mT, torch.eye(len(skew), dtype=skew.dtype)
    return torch.linalg.solve((one - q).mT, (one + q).mT).mT


def _oft(p: Parts, w: Tensor, scale: float, strength: float) -> Tensor:
    size = p["oft_blocks"].shape[-1]
    rotated = [
        _rotation(block).mT @ w[k * size : (k + 1) * size]
        for k, block in enumerate(p["oft_blocks"])
    ]
    return strength**2 * (torch.cat(rotated) - w)  # ComfyUI counts the strength twice


def _boft(p: Parts, w: Tensor, scale: float, strength: float) -> Tensor:
    blocks, x = p["oft_blocks"], w
    size, one = blocks.shape[-1], torch.eye(blocks.shape[-1], dtype=w.dtype)
    for i, stage in enumerate(blocks):
        k = 2**i * size // 2  # rows that lie 2 k apart are turned together
        place = torch.arange(len(w)).reshape(-1, 2, k).transpose(1, 2).reshape(-1)
        turned = torch.zeros_like(x)
        for b, block in enumerate(stage):
            rows = place[b * size : (b + 1) * size]
            turned[rows] = (strength * _rotation(block) + (1 - strength) * one) @ x[rows]
        x = turned
    return strength * (x * p["rescale"] - w)


def _glora(p: Parts, w: Tensor, scale: float, strength: float) -> Tensor:
    a1, a2, b1, b2 = (p[f"{name}.weight"] for name in ("a1", "a2", "b1", "b2"))
    return strength * scale * (w @ a1 @ a2 + b1 @ b2)


def _nothing(p: Parts, w: Tensor, scale: float, strength: float) -> Tensor:
    return torch.zeros_like(w)


def _pair(s: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    up = (s[0], RANK, *[1] * (len(s) - 2))
    return {"lora_down.weight": (RANK, *s[1:]), "lora_up.weight": up}


def _matrix_pair(s: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {"lora_down.weight": (RANK, s[1]), "lora_up.weight": (s[0], RANK)}


def _flat(s: tuple[int, ...]) -> int:
    return torch.Size(s[1:]).numel()


def _hada(s: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {
        f"hada_w{n}_{part}": size
        for n in "12"
        for part, size in (("a", (s[0], RANK)), ("b", (RANK, _flat(s))))
    }


def _hada_tucker(s: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    sizes = {"w{}_a": (RANK, s[0]), "w{}_b": (RANK, s[1]), "t{}": (RANK, RANK, *s[2:])}
    return {f"hada_{name.format(n)}": size for n in "12" for name, size in sizes.items()}


def _kron_halves(s: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {
        "lokr_w1": (4, 4), "lokr_w2_a": (s[0] // 4, RANK), "lokr_w2_b": (RANK, s[1] // 4),
    }  # fmt: skip


def _kron_tucker(s: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {
        "lokr_w1": (4, 4), "lokr_t2": (RANK, RANK, *s[2:]), "lokr_w2_a": (RANK, s[0] // 4),
        "lokr_w2_b": (RANK, s[1] // 4),
    }  # fmt: skip


FAMILIES = (
    Family("LoRA", ATTENTION, _pair, _lora),
    Family("LoRA on a 1 x 1 convolution", POINTWISE, _pair, _lora),
    Family("LoRA on a 3 x 3 convolution", CONVOLUTION, _pair, _lora),
    Family(
        "LoRA, Tucker convolution",
        CONVOLUTION,
        lambda s: {
            "lora_down.weight": (RANK, s[1], 1, 1),
            "lora_up.weight": (s[0], RANK, 1, 1),
            "lora_mid.weight": (RANK, RANK, *s[2:]),
        },
        _tucker,
    ),
    Family("LoHa", ATTENTION, _hada, _loha),
    Family("LoHa on a convolution", CONVOLUTION, _hada, _loha),
    Family("LoHa, Tucker convolution", CONVOLUTION, _hada_tucker, _loha_tucker),
    Family(
        "LoKr, whole factors",
        ATTENTION,
        lambda s: {"lokr_w1": (4, 4), "lokr_w2": (s[0] // 4, s[1] // 4)},
        _lokr,
        scales=False,
    ),
    Family("LoKr, factored", ATTENTION, _kron_halves, _lokr),
    Family("LoKr, Tucker convolution", CONVOLUTION, _kron_tucker, _lokr),
    Family("difference of a weight", ATTENTION, lambda s: {"diff": s}, _difference("diff"), False),
    Family(
        "difference of a kernel", CONVOLUTION, lambda s: {"diff": s}, _difference("diff"), False
    ),
    Family("layer norm", LAYER_NORM, lambda s: {"diff": s}, _difference("diff"), False),
    Family("group norm", GROUP_NORM, lambda s: {"w_norm": s}, _difference("w_norm"), False),
    Family("bias", BIASED, lambda s: {"diff_b": s[:1]}, _difference("diff_b"), False, "bias"),
    Family(
        "DoRA",
        ATTENTION,
        lambda s: _matrix_pair(s) | {"dora_scale": (s[0], 1)},
        _dora,
        constant=False,
    ),
    Family(
        "OFT", ATTENTION, lambda s: {"oft_blocks": (s[0] // 8, 8, 8)}, _oft, False, constant=False
    ),
    Family(
        "BOFT",
        ATTENTION,
        lambda s: {"oft_blocks": (2, s[0] // 8, 8, 8), "rescale": (s[0], 1)},
        _boft,
        False,
        constant=False,
    ),
    Family(
        "GLoRA",
        ATTENTION,
        lambda s: {
            "a1.weight": (s[1], RANK),
            "a2.weight": (RANK, s[1]),
            "b1.weight": (s[0], RANK),
            "b2.weight": (RANK, s[1]),
        },
        _glora,
        constant=False,
    ),
    Family("new weight", ATTENTION, lambda s: {"set_weight": s}, _replaced, False, constant=False),
    Family("IA3", ATTENTION, lambda s: {"weight": (s[0],), "on_input": ()}, _nothing, False),
    Family("text encoder", "text", lambda s: _pair((32, 32)), _nothing),
)
