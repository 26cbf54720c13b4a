"""LoRA files of every family, read for a layout, for every layer of a model, and as a node does."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from difflora_core.lora.formats.report import ReadResult
from difflora_core.lora.formats.state_dict import from_state_dict, to_state_dict, with_peft_alphas
from difflora_core.lora.layout import LayerShape, LoRALayout
from difflora_core.storage.lora_file import load_lora, read_lora_file, write_lora_file

from .reader import Reader, same, sound

STEM = "input_blocks.4.1.transformer_blocks.0"
DIFFUSERS = "down_blocks.1.attentions.0.transformer_blocks.0"
PARTS = ("attn1.to_q", "attn2.to_k", "attn2.to_v")
IN, OUT = 12, 8
LAYOUT = LoRALayout(
    "tiny", 2, tuple(LayerShape(f"{STEM}.{p}", IN, OUT, f"{DIFFUSERS}.{p}") for p in PARTS)
)
NAMES = {f"{DIFFUSERS}.{part}": f"{STEM}.{part}" for part in PARTS}
RANK = 4
LARGEST_CHANGE = 10**6
"""Numbers of a weight's change that are looked at; hostile files have far larger ones."""
KOHYA = [f"lora_unet_{STEM.replace('.', '_')}_{part.replace('.', '_')}" for part in PARTS]
PEFT = [f"unet.{DIFFUSERS}.{part}" for part in PARTS]


def _file(
    stems: list[str],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype = torch.float16,
    metadata: dict[str, str] | None = None,
    alpha: bool = True,
) -> Callable[[], bytes]:
    """A file with these tensors under every stem."""

    def make() -> bytes:
        g = torch.Generator().manual_seed(len(stems) + len(shapes))
        tensors = {}
        for stem in stems:
            for suffix, shape in shapes.items():
                tensors[f"{stem}.{suffix}"] = torch.randn(shape, generator=g).to(dtype)
            if alpha:
                tensors[f"{stem}.alpha"] = torch.tensor(1.0)
        return save(tensors, metadata)

    return make


def _factors(
    rank: int = 2, names: tuple[str, str] = ("lora_down", "lora_up")
) -> dict[str, tuple[int, ...]]:
    return {f"{names[0]}.weight": (rank, IN), f"{names[1]}.weight": (OUT, rank)}


PEFT_FACTS = {
    "format": "pt",
    "lora_adapter_metadata": json.dumps(
        {
            "unet.lora_alpha": 4,
            "unet.r": 2,
            "unet.use_rslora": True,
            "unet.alpha_pattern": {"to_k": 1.5},
        }
    ),
}
LOHA = {"hada_w1_a": (OUT, 2), "hada_w1_b": (2, IN), "hada_w2_a": (OUT, 2), "hada_w2_b": (2, IN)}
LOKR_FIRST = {"lokr_w1_a": (2, 2), "lokr_w1_b": (2, 3)}
LOKR_SECOND = {"lokr_w2_a": (4, 2), "lokr_w2_b": (2, 4)}
LOKR = {"lokr_w1": (2, 3), **LOKR_SECOND}
DOTTED = [f"lora_unet_{DIFFUSERS}.{part}".replace(".", "_") for part in PARTS]
GENERIC = [f"diffusion_model.{STEM}.{part}" for part in PARTS]
CONVOLUTION = {"lora_down.weight": (2, IN, 1, 1), "lora_up.weight": (OUT, 2, 1, 1)}
PAIR = ("lora_A", "lora_B")
NAMED_PAIR = ("lora_A.default", "lora_B.default")
FAMILIES = {
    "kohya": _file(KOHYA, _factors()),
    "kohya float32": _file(KOHYA, _factors(), torch.float32),
    "kohya bfloat16": _file(KOHYA, _factors(), torch.bfloat16),
    "kohya float64": _file(KOHYA, _factors(), torch.float64),
    "kohya fp8": _file(KOHYA, _factors(), torch.float8_e4m3fn),
    "rank 6": _file(KOHYA, _factors(6)),
    "rank 1, no alpha": _file(KOHYA, _factors(1), alpha=False),
    "diffusers names": _file(DOTTED, _factors()),
    "generic": _file(GENERIC, _factors()),
    "1 x 1 convolution": _file(KOHYA, CONVOLUTION),
    "PEFT": _file(PEFT, _factors(2, PAIR), metadata=PEFT_FACTS, alpha=False),
    "PEFT adapter": _file(PEFT, _factors(2, NAMED_PAIR), alpha=False),
    "PEFT alpha": _file(PEFT, _factors(2, PAIR), torch.float32),
    "LoHa": _file(KOHYA, LOHA),
    "LoKr": _file(KOHYA, LOKR),
    "LoKr, full": _file(KOHYA, {"lokr_w1": (2, 3), "lokr_w2": (4, 4)}, torch.float32),
    "LoKr, factored": _file(KOHYA, {**LOKR_FIRST, **LOKR_SECOND}),
    "whole change": _file(KOHYA, {"diff": (OUT, IN)}, alpha=False),
    "DoRA": _file(KOHYA, {**_factors(), "dora_scale": (OUT, 1)}),
    "OFT": _file(KOHYA, {"oft_blocks": (2, 4, 4)}),
}
WITHOUT_LAYERS = frozenset({"DoRA", "OFT"})


def _finite(result: ReadResult) -> None:
    """Every layer's change of its weight is a finite number, and the report is made of such."""
    for name, layer in result.weights.layers.items():
        sound(name)
        assert layer.down.is_floating_point(), f"down of {name} is no float"
        assert layer.up.is_floating_point(), f"up of {name} is no float"
        sound([layer.down, layer.up, layer.alpha])
        if layer.out_features * layer.in_features < LARGEST_CHANGE:
            assert bool(torch.isfinite(layer.delta()).all()), f"the change of {name} is not finite"
    sound(result.report)
    assert 0 <= result.report.total_error <= 1.001, "error"
    assert all(0 <= error <= 1.001 for error in result.report.errors.values()), "error of a layer"
    assert len(result.report.summary().encode()) < 10_000, "summary"


def _check_layout(result: ReadResult, path: Path) -> None:
    _finite(result)
    LAYOUT.check(result.weights)
    copy = path.with_name("copy.safetensors")
    write_lora_file(copy, result.weights, LAYOUT, dtype=torch.float32)
    again = load_lora(copy, LAYOUT)
    for name, layer in result.weights.layers.items():
        kept = again.weights[name]
        assert torch.equal(kept.up, layer.up.float()), f"{name} comes back changed"
        assert torch.equal(kept.down, layer.down.float()), f"{name} comes back changed"


def _check_names(result: ReadResult, path: Path) -> None:
    _finite(result)
    state = to_state_dict(result.weights, "kohya_ldm", NAMES)
    again = from_state_dict(state, NAMES, RANK)
    assert again.weights.layers.keys() == result.weights.layers.keys(), "other layers"
    assert all(same(again.weights[n].up, v.up) for n, v in result.weights.layers.items()), "factors"


def _node(path: Path, family: str) -> Mapping[str, Tensor]:
    file = read_lora_file(path)
    return with_peft_alphas(file.tensors, file.metadata)


def _check_node(state: Mapping[str, Tensor], path: Path) -> None:
    alphas = {name: t for name, t in state.items() if name.endswith(".alpha")}
    read = read_lora_file(path).tensors
    sound({name: alpha for name, alpha in alphas.items() if name not in read})


READERS = (
    Reader(
        "LoRA for a layout",
        FAMILIES,
        lambda path, _: load_lora(path, LAYOUT),
        _check_layout,
        refused=WITHOUT_LAYERS,
        share=5,
    ),
    Reader(
        "LoRA, every layer",
        FAMILIES,
        lambda path, _: load_lora(path, NAMES, RANK),
        _check_names,
        refused=WITHOUT_LAYERS,
        share=4,
    ),
    Reader("LoRA as it is", FAMILIES, _node, _check_node),
)
