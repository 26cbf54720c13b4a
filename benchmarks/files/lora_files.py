"""`make bench name=lora_files args='--json FILE'`: what of a LoRA file comes through our nodes.

Family by dtype by names by alpha by node: the change of a layer's weight is compared with brute
force in float64 (`families.py`). A cell is right (to 1e-5 of the largest change), refused by a
sentence of the list below, or silent: neither. Real nodes on the demo world's base, in this
process.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from difflora_core.adapters.attach import attach
from difflora_core.demo import paths
from difflora_core.lora.formats.state_dict import from_state_dict, with_peft_alphas
from difflora_core.lora.layout import LayerShape, LoRALayout
from difflora_core.storage.atomic import write_text

from ..command import benchmark_console, command_parser, commit, machine
from .families import ATTENTION, FAMILIES, RANK, Family

TOLERANCE = 1e-5  # of the largest change; float32 rounds to 6e-8
ALPHA, PART = 6.0, 0.5
DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp8 e4m3": torch.float8_e4m3fn,
    "fp8 e5m2": torch.float8_e5m2,
}
NAMES = ("kohya", "kohya diffusers", "generic", "OMI", "LyCORIS", "PEFT", "PEFT model")
ALPHAS = ("none", "tensor", "metadata")
WHOLE = (1.0, 0.0, 1.0, False, 1.0, 1.0, 1.0, 1.0, 1.0)
TEXT = {
    "PEFT": "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
    "generic": "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj",
    "OMI": "clip_l.text_model.encoder.layers.0.self_attn.q_proj",
}
"""Names of a text-encoder layer; the others take kohya's."""
TURNING, LEFT_OUT = ("DoRA", "OFT", "BOFT", "GLoRA", "new weight"), "left out of the latent"
REFUSALS: Mapping[tuple[str, str], str] = {
    **{(family, "timed"): "what such layers change depends on the weight" for family in TURNING},
    ("new weight", "by part"): "acts whole or not at all",
    **{("IA3", node): "is an IA3" for node in ("Apply", "by part", "timed", "Hook", "Encode")},
    **{
        ("text encoder", node): "edits text encoders only"
        for node in ("Apply", "by part", "timed", "Hook", "Encode")
    },
    ("DoRA", "Encode"): "this is a DoRA",
    **{(f.name, "Encode"): LEFT_OUT for f in FAMILIES if f.layer not in (ATTENTION, "text")},
    **{(family, "Encode"): LEFT_OUT for family in TURNING[1:]},
}
"""(family, node) to a part of the sentence that refuses it; the help page has the same table."""


@dataclass(frozen=True)
class Cell:
    """One file at one node."""

    family: Family
    dtype: str
    names: str
    alpha: str
    node: str

    @property
    def scale(self) -> float:
        """What the change is multiplied by for its alpha."""
        return ALPHA / RANK if self.family.scales and self.alpha != "none" else 1.0


def cells(quick: bool = False) -> Iterator[Cell]:
    """Every file that can be, at every node; quick takes two dtypes and three namings."""
    for family in FAMILIES:
        for dtype in list(DTYPES)[:: 3 if quick else 1]:
            for names in NAMES[:: 3 if quick else 1]:
                for alpha in ALPHAS:
                    if alpha != "none" and not family.scales:
                        continue
                    if alpha == "metadata" and not _peft(family, names):
                        continue
                    for node in ("Apply", "by part", "timed", "Hook", "Encode"):
                        yield Cell(family, dtype, names, alpha, node)


def _peft(family: Family, names: str) -> bool:
    """Whether the file is one that PEFT writes, with its settings in the metadata."""
    plain = "lora_up.weight" in family.shapes((8, 8)) and "Tucker" not in family.name
    return names.startswith("PEFT") and plain and family.constant


class Host:
    """Real ComfyUI in this process, its demo base, and our nodes."""

    def __init__(self) -> None:
        sys.path.insert(0, str(paths.ROOT / ".comfyui"))
        cli = importlib.import_module("comfy.cli_args")
        cli.args.cpu = not torch.cuda.is_available()
        name = str(paths.ROOT).replace(".", "_x_")
        self.pack = sys.modules.get(name) or _load_pack(name)
        demo = self.part("nodes.host.demo")
        self.model = demo.load_demo_unet(paths.BASE, disable_dynamic=True)
        self.state = self.model.model.state_dict()
        self.lora, self.hooks = importlib.import_module("comfy.lora"), self.part("nodes.host.lora")
        nodes = self.part("nodes.lora")
        self.apply = type("Apply", (nodes.ApplyLoRA,), {"hidden": SimpleNamespace(unique_id=None)})
        self.to_hook = nodes.LoRAToHook
        pairs = importlib.import_module("comfy.utils").unet_to_diffusers(
            self.model.model.model_config.unet_config
        )
        self.diffusers = {
            ldm.removesuffix(".weight"): ours.removesuffix(".weight") for ours, ldm in pairs.items()
        }

    def part(self, name: str) -> Any:
        """A module of this pack as ComfyUI names it."""
        return importlib.import_module(f".{name}", self.pack.__name__)

    def stem(self, layer: str, names: str) -> str:
        """A layer's name in a file."""
        if layer == "text":
            return TEXT.get(names, "lora_te1_text_model_encoder_layers_0_self_attn_q_proj")
        diffusers = self.diffusers[layer]
        return {
            "kohya": f"lora_unet_{layer.replace('.', '_')}",
            "kohya diffusers": f"lora_unet_{diffusers.replace('.', '_')}",
            "generic": f"diffusion_model.{layer}",
            "OMI": f"unet.{layer}",
            "LyCORIS": f"lycoris_{diffusers.replace('.', '_')}",
            "PEFT": f"unet.{diffusers}",
            "PEFT model": f"base_model.model.{diffusers}",
        }[names]

    def weight(self, family: Family) -> Tensor:
        """The weight or bias that a family edits, in float64."""
        key = f"diffusion_model.{family.layer}.{family.target}"
        return self.state[key].double() if family.layer != "text" else torch.zeros(32, 32).double()

    def changed(self, patches: Mapping[str, Any], family: Family) -> Tensor:
        """What ComfyUI's patches make of a weight."""
        key = f"diffusion_model.{family.layer}.{family.target}"
        weight = self.state[key].float()
        made = self.lora.calculate_weight(patches.get(key, []), weight.clone(), key)
        return made.double() - weight.double()


def _load_pack(name: str) -> Any:
    """This pack as ComfyUI loads it, under a name made from its path."""
    spec = importlib.util.spec_from_file_location(name, paths.ROOT / "__init__.py")
    if spec is None or spec.loader is None:
        raise SystemExit(f"There is no pack in {paths.ROOT}.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    asyncio.run(asyncio.run(module.comfy_entrypoint()).on_load())
    return module


def file_of(host: Host, cell: Cell) -> tuple[dict[str, Tensor], Tensor]:
    """A file's tensors as Load LoRA File gives them, and the true change at strength 1."""
    dtype, family = DTYPES[cell.dtype], cell.family
    weight = host.weight(family)
    tensors = family.tensors(tuple(weight.shape), dtype, seed=FAMILIES.index(family))
    stem = host.stem(family.layer, cell.names)
    state = {f"{stem}.{suffix}": tensor for suffix, tensor in tensors.items()}
    if _peft(family, cell.names):
        swap = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
        state = {f"{stem}.{swap[suffix]}": tensor for suffix, tensor in tensors.items()}
    metadata = None
    if cell.alpha == "tensor":
        state[f"{stem}.alpha"] = torch.tensor(ALPHA).to(dtype)
    elif cell.alpha == "metadata":
        prefix = "unet." if cell.names == "PEFT" else ""
        settings = {f"{prefix}r": 2 * RANK, f"{prefix}lora_alpha": ALPHA}
        metadata = {"lora_adapter_metadata": json.dumps(settings)}
    return with_peft_alphas(state, metadata), weight


def run(host: Host, cell: Cell) -> tuple[str, float]:
    """What became of a cell: right, refused or silent, and its error."""
    state, weight = file_of(host, cell)
    stem = host.stem(cell.family.layer, cell.names) + "."
    fine = {k[len(stem) :]: t.double() for k, t in state.items()}
    back = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}
    fine = {back.get(suffix, suffix): tensor for suffix, tensor in fine.items()}
    strength = PART if cell.node == "by part" else 1.0
    true = cell.family.change(fine, weight, cell.scale, strength)
    listed = REFUSALS.get((cell.family.name, cell.node))
    try:
        error = _NODES[cell.node](host, cell, state, true)
    except Exception as refusal:
        told = type(refusal).__name__ in ("LoRAFileError", "LayoutError", "LeftOutError")
        sentence = listed is not None and re.search(listed, str(refusal)) is not None
        if not (told and sentence):
            logging.getLogger(__name__).warning("%s: %s", cell, refusal)
        return ("refused" if told and sentence else "silent"), float("nan")
    return ("right" if error <= TOLERANCE else "silent"), error


class LeftOutError(Exception):
    """The report says that a layer was left out."""


def _error(got: Tensor, true: Tensor) -> float:
    return float((got - true).abs().max() / true.abs().max().clamp_min(1e-30))


def _applied(host: Host, cell: Cell, state: dict[str, Tensor], true: Tensor) -> float:
    """Apply LoRA by Part and Time at its defaults."""
    patched, _ = host.apply.execute(host.model, state, *WHOLE).args
    return _error(host.changed(patched.patches, cell.family), true)


def _by_part(host: Host, cell: Cell, state: dict[str, Tensor], true: Tensor) -> float:
    """The same with a factor on the blocks that the layer is in, and what comes out again."""
    way_in = cell.family.layer.startswith("input")
    factors = (PART, 1.0, 1.0) if way_in else (1.0, 1.0, PART)
    patched, out = host.apply.execute(host.model, state, *WHOLE[:4], *factors, 1.0, 1.0).args
    error = _error(host.changed(patched.patches, cell.family), true)
    if not cell.family.constant:  # no file can say a strength of these: the node tells it
        return error
    again, _ = host.apply.execute(host.model, out, *WHOLE).args
    return max(error, _error(host.changed(again.patches, cell.family), true))


@torch.no_grad()
def _timed(host: Host, cell: Cell, state: dict[str, Tensor], true: Tensor) -> float:
    """The same for a part of the steps: what it adds to the layer's output, against float64."""
    patched, _ = host.apply.execute(host.model, state, 1.0, 0.0, 0.5, *WHOLE[3:]).args
    (chain,) = patched.get_wrappers("apply_model", "difflora")
    host_adapters = sys.modules[type(chain).__module__]
    adapters = host_adapters.adapter_set([link.applied for link in chain.links])
    network = patched.model.diffusion_model
    layer = network.get_submodule(cell.family.layer)
    x, wanted = _through(layer, true, cell.family)
    plain = layer(x)
    with attach(network, adapters):
        got = layer(x)
    return _error(got.double() - plain.double(), wanted)


def _through(layer: Any, true: Tensor, family: Family) -> tuple[Tensor, Tensor]:
    """Inputs of a layer, and what a change of its weight or bias adds to its outputs."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(layer, torch.nn.Conv2d):
        x = torch.randn(1, layer.in_channels, 5, 5, generator=generator)
        return x, F.conv2d(x.double(), true, None, layer.stride, layer.padding)
    if isinstance(layer, torch.nn.GroupNorm):
        x = torch.randn(1, layer.num_channels, 4, 4, generator=generator)
        rows = x.double().reshape(layer.num_groups, -1)
        rows = (rows - rows.mean(1, keepdim=True)) / (rows.var(1, keepdim=True, correction=0)
                                                      + layer.eps).sqrt()  # fmt: skip
        return x, rows.reshape(x.shape) * true[:, None, None]
    if isinstance(layer, torch.nn.LayerNorm):
        x = torch.randn(1, 3, layer.normalized_shape[0], generator=generator)
        fine = x.double()
        spread = fine.var(-1, keepdim=True, correction=0) + layer.eps
        return x, (fine - fine.mean(-1, keepdim=True)) / spread.sqrt() * true
    x = torch.randn(1, 3, layer.in_features, generator=generator)
    return x, true.expand(1, 3, -1) if family.target == "bias" else x.double() @ true.mT


def _hooked(host: Host, cell: Cell, state: dict[str, Tensor], true: Tensor) -> float:
    """LoRA to Hook without base_model, as sampling registers its hook."""
    hooks = importlib.import_module("comfy.hooks")
    (group,) = host.to_hook.execute(state, 1.0).args
    model = host.model.clone()
    target = hooks.create_target_dict(hooks.EnumWeightTarget.Model)
    for hook in group.hooks:
        hook.add_hook_patches(model, {}, target, hooks.HookGroup())
    return _error(host.changed(model.get_combined_hook_patches(group), cell.family), true)


def _encoded(host: Host, cell: Cell, state: dict[str, Tensor], true: Tensor) -> float:
    """What Encode LoRA reads, before the model: the nearest LoRA of the layout's rank."""
    width = {"rank": RANK * RANK}
    layer = LayerShape(ATTENTION, 128, 64, host.diffusers[ATTENTION])
    extra = LayerShape(BESIDE, 64, 64, host.diffusers[BESIDE])
    layout = LoRALayout("demo", width["rank"], (layer, extra))
    beside = {}
    if (cell.family.name, cell.node) in REFUSALS and cell.family.layer != "text":
        if REFUSALS[cell.family.name, cell.node] == LEFT_OUT:  # good layers stand beside it
            stem = f"lora_unet_{BESIDE.replace('.', '_')}."
            beside = {f"{stem}lora_down.weight": torch.ones(1, 64),
                      f"{stem}lora_up.weight": torch.ones(64, 1)}  # fmt: skip
    read = from_state_dict(host.hooks.check_lora({**beside, **state}), layout)
    if beside:
        gone = [*read.report.skipped, *read.report.unused]
        if read.report.layers == 1 and gone and "left out" in read.report.summary():
            raise LeftOutError(LEFT_OUT)
    u, s, v = torch.linalg.svd(true, full_matrices=False)
    best = (u[:, : layout.rank] * s[: layout.rank]) @ v[: layout.rank]
    return _error(read.weights[ATTENTION].delta().double(), best)


BESIDE = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
_NODES: Mapping[str, Callable[[Host, Cell, dict[str, Tensor], Tensor], float]] = {
    "Apply": _applied,
    "by part": _by_part,
    "timed": _timed,
    "Hook": _hooked,
    "Encode": _encoded,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the answer is 0 when no cell is silent."""
    parser = command_parser("Fidelity of LoRA files.", threads=None)
    parser.add_argument("--quick", action="store_true", help="fewer dtypes and namings")
    options = parser.parse_args(arguments)
    console, host = benchmark_console(), Host()
    logging.getLogger().setLevel(logging.ERROR)
    results = {cell: run(host, cell) for cell in cells(options.quick)}
    for line in table(results):
        console.print(line)
    counts = Counter(outcome for outcome, _ in results.values())
    facts: dict[str, Any] = {"cells": len(results)}
    facts |= {name: counts[name] for name in ("right", "refused", "silent")}
    facts["largest error"] = max(error for _, error in results.values() if error == error)
    console.print(f"{facts}; {machine()}")
    if options.json:
        facts |= {"commit": commit(), "machine": machine(), "rows": _rows(results)}
        write_text(Path(options.json), json.dumps(facts, indent=1) + "\n")
        console.print(f"wrote {options.json}")
    return int(counts["silent"] > 0)


def _rows(results: Mapping[Cell, tuple[str, float]]) -> dict[str, dict[str, Any]]:
    """Family and node to how many cells were what, and their largest error."""
    rows: dict[str, dict[str, Any]] = {}
    for cell, (outcome, error) in results.items():
        row = rows.setdefault(f"{cell.family.name}, {cell.node}", Counter())
        row[outcome] += 1
        if error == error:
            row["largest error"] = max(row.get("largest error", 0.0), error)
    return rows


def table(results: Mapping[Cell, tuple[str, float]]) -> Iterator[str]:
    """A row for each family, a column for each node: the largest error, or refused."""
    rows = _rows(results)
    yield "| | " + " | ".join(_NODES) + " |"
    yield "|---" * (len(_NODES) + 1) + "|"
    for family in FAMILIES:
        shown = []
        for node in _NODES:
            row = rows[f"{family.name}, {node}"]
            text = "refused" if row["refused"] else f"{row.get('largest error', float('nan')):.0e}"
            shown.append(f"SILENT {row['silent']}" if row["silent"] else text)
        yield f"| {family.name} | " + " | ".join(shown) + " |"
