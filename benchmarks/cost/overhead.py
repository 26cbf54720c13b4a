"""`make bench name=overhead args='--quick --perfusion --json FILE'`: the price in sampling.

Real ComfyUI, one process, the demo world's base on the CPU. The base and a variant, each with a
model of its own, take single steps in turn (interleaving/), so that a machine that gets slower
slows both; half-way they swap their models. `ratio` is wall time and `cpu_ratio` processor time,
each the median of the ratios of neighbouring steps. Only steps are timed; loading and patching come
before them. `base_again` is the base against itself: the noise of the measurement.
--perfusion measures concepts instead, and --styles styles, on a full-size SDXL UNet
(concept_price.py, style_price.py).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from difflora_core.demo.comfyui.server import PACK, ComfyServer
from difflora_core.demo.examples import reference_picture
from difflora_core.demo.workflows.masked_people import PERSONALIZE
from difflora_core.evaluation.report import Report
from difflora_core.storage.image_files import write_image

from ..command import benchmark_console, command_parser, commit, machine, set_threads, write_report
from .concept_price import concept_prices
from .interleaving.pairs import BASE, WARM_UP, mean_price, price
from .style_price import style_prices

NODES = Path(__file__).parent / "interleaving"
BATCH = 2
PAIRS, QUICK_PAIRS = 800, 200
CONCEPT_PAIRS, QUICK_CONCEPT_PAIRS = 24, 6
"""Of --perfusion, whose steps take seconds."""
_PLAIN = (["words", 0], ["nothing", 0])
ROWS: Mapping[str, tuple[str, tuple[Any, Any]]] = {
    "base_again": ("plain", _PLAIN),
    "lora_patch": ("patched", _PLAIN),
    "lora_timed": ("timed", _PLAIN),
    "lora_hook": ("plain", (["hooked", 0], ["hooked", 1])),
    "lora_hook_positive": ("plain", (["hooked", 0], ["nothing", 0])),
    "two_hooks_by_mask": ("plain", (["people", 0], ["people", 1])),
}
"""Name to what is done to its model, and positive and negative prompt."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = command_parser("The price of a LoRA while sampling.", threads=None)
    parser.add_argument("--quick", action="store_true", help="a quarter of the steps")
    parser.add_argument(
        "--perfusion", action="store_true", help="concepts on full-size SDXL instead"
    )
    parser.add_argument("--styles", action="store_true", help="styles on full-size SDXL instead")
    options = parser.parse_args(arguments)
    console, facts = benchmark_console(), {"quick": options.quick}
    if options.perfusion or options.styles:
        set_threads(1)
        pairs = QUICK_CONCEPT_PAIRS if options.quick else CONCEPT_PAIRS
        rows = concept_prices(pairs) if options.perfusion else style_prices(pairs)
    else:
        pairs = QUICK_PAIRS if options.quick else PAIRS
        with tempfile.TemporaryDirectory() as folder:
            with ComfyServer(Path(folder), packs=(PACK, NODES)) as server:
                rows = measure(server, pairs)
        facts |= {"steps": WARM_UP + pairs // 2, "batch": BATCH}
    facts |= {"rounds": pairs, "commit": commit(), "machine": machine()}
    return finish(Report(rows, facts), options.json, console)


def finish(report: Report, path: Path | None, console: Console) -> int:
    """Print the table, and write it where asked to."""
    console.print(
        report.to_markdown({"seconds_per_step": 4, "cpu_seconds_per_step": 4, "projections": 0})
    )
    write_report(report, path, console)
    return 0


def measure(server: ComfyServer, pairs: int) -> dict[str, dict[str, float]]:
    """The price of every row over the base."""
    picture = server.base_directory / "person.png"
    write_image(reference_picture(), picture)
    photo, rows = server.client.upload_picture(picture), {}
    for name in ROWS:
        halves = []
        for swapped in (False, True):
            result = server.client.run(graph(photo, name, pairs // 2, swapped), timeout=3600)
            halves.append(json.loads(result.outputs["interleave"]["text"][0]))
        rows.setdefault(BASE, mean_price([price(base, base) for base, _ in halves]))
        rows[name] = mean_price([price(base, own) for base, own in halves])
    return rows


def graph(photo: str, row: str, pairs: int, swapped: bool = False) -> dict[str, dict[str, Any]]:
    """The base and one row, sampled in turn.

    Args:
        photo: of whom the LoRA is.
        row: of ROWS.
        pairs: of steps.
        swapped: which of two equal models is the base's. Where a model lies in memory can make it
            2 % slower than its copy, as long as the process lives.
    """
    kind, (positive, negative) = ROWS[row]
    base, model = (["first_demo", 0], ["second_demo", 0])[:: -1 if swapped else 1]
    nodes = common_nodes(photo)
    if kind != "plain":
        nodes["applied"] = _node("DiffLoRA_ApplyLoRA", model=model, **_APPLY[kind])
        model = ["applied", 0]
    nodes["interleave"] = _node(
        "Benchmark_Interleave",
        base=base,
        base_positive=["words", 0],
        base_negative=["nothing", 0],
        model=model,
        positive=positive,
        negative=negative,
        latent=["empty", 0],
        pairs=pairs,
    )
    return nodes


def common_nodes(photo: str) -> dict[str, dict[str, Any]]:
    """What the rows share: models, the LoRA, hooks and prompts."""
    half = {"width": 32, "height": 64}
    return {
        "demo": _node("DiffLoRA_LoadDemo"),
        "first_demo": _node("Benchmark_OwnDemo", number=0),
        "second_demo": _node("Benchmark_OwnDemo", number=1),
        "photo": _node("LoadImage", image=photo),
        "lora": _node("DiffLoRA_Personalize", images=["photo", 0], **PERSONALIZE),
        "hook": _node("DiffLoRA_LoRAToHook", lora=["lora", 0], strength_model=1.0),
        "other": _node("DiffLoRA_LoRAToHook", lora=["lora", 0], strength_model=0.5),
        "words": _node("CLIPTextEncode", clip=_CLIP, text="photo of a person"),
        "nothing": _node("CLIPTextEncode", clip=_CLIP, text=""),
        "black": _node("SolidMask", value=0.0, width=64, height=64),
        "white": _node("SolidMask", value=1.0, **half),
        "left": _masked(0),
        "right": _masked(half["width"]),
        "hooked": _node("PairConditioningSetProperties", **_NEW, hooks=["hook", 0]),
        "one": _node("PairConditioningSetProperties", **_NEW, hooks=["hook", 0], mask=["left", 0]),
        "people": _node(
            "PairConditioningSetPropertiesAndCombine",
            **_NEW,
            positive=["one", 0],
            negative=["one", 1],
            hooks=["other", 0],
            mask=["right", 0],
        ),
        "empty": _node("EmptyLatentImage", width=64, height=64, batch_size=BATCH),
    }


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def _masked(x: int) -> dict[str, Any]:
    """Half of the picture, from column x on."""
    where = {"destination": ["black", 0], "source": ["white", 0], "x": x, "y": 0}
    return _node("MaskComposite", **where, operation="add")


_PARTS = ("input_blocks", "middle_block", "output_blocks", "self_attention", "cross_attention")
_WHOLE = {
    "lora": ["lora", 0],
    "strength": 1.0,
    "start_percent": 0.0,
    "end_percent": 1.0,
    "positive_only": False,
    **dict.fromkeys(_PARTS, 1.0),
}
_APPLY = {"patched": _WHOLE, "timed": _WHOLE | {"end_percent": 0.999}}
_CLIP = ["demo", 1]
_NEW = {
    "positive_NEW": ["words", 0],
    "negative_NEW": ["nothing", 0],
    "strength": 1.0,
    "set_cond_area": "default",
}
