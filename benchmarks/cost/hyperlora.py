"""`make bench name=hyperlora`: a HyperLoRA folder of the public size, from disk to the first LoRA.

Random weights unless a folder is given; what is measured does not depend on what they say: seconds,
and memory against the size of the file, so that a second copy of the basis would be seen. The
encoders (insightface, CLIP) are the user's own and are not counted.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from difflora_core.evaluation.report import Report
from difflora_core.lora.layout import LoRALayout, sdxl_layout
from difflora_core.models.hyperlora.config import PARTS, HyperLoRAConfig
from difflora_core.models.hyperlora.model import HyperLoRAModel, basis_shapes
from difflora_core.storage.hyperlora_folder import BASIS, MODULES, PROJECTOR, RESAMPLER
from difflora_core.storage.identity_models import load_identity_model
from difflora_core.storage.safetensors_io import write_atomic
from difflora_core.vision.features import ImageFeatures

from ..command import benchmark_console, command_parser, commit, machine, set_threads, write_report

RANK = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = command_parser("Time and memory of HyperLoRA, from disk to a LoRA.")
    parser.add_argument("--folder", type=Path, help="a variant; random weights without it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--photos", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a twentieth of the size")
    options = parser.parse_args(arguments)
    set_threads(options.threads)
    console = benchmark_console()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or write_random(Path(temporary), options.quick)
        stored = sum(path.stat().st_size for path in folder.iterdir()) / 1e9
        rows, facts = measure(folder, options.device, options.photos)
    facts |= {"stored_gb": stored, "commit": commit(), "machine": machine()}
    report = Report(rows, facts)
    console.print(report.to_markdown({"seconds": 2, "memory_gb": 2, "most_gb": 2}))
    console.print(f"{stored:.2f} GB on disk, {options.photos} photos; {machine()}")
    write_report(report, options.json, console)
    return 0


@torch.no_grad()
def measure(
    folder: Path, device: str, photos: int
) -> tuple[dict[str, dict[str, float]], dict[str, object]]:
    """Rows of each part with its seconds and memory, and facts about the model."""
    rows: dict[str, dict[str, float]] = {"before": memory()}
    model, rows["load"] = timed(lambda: load_identity_model(folder))
    assert isinstance(model, HyperLoRAModel)
    if device != "cpu":
        _, rows[f"to {device}"] = timed(lambda: model.to(device))
    features = random_features(model.config, photos)
    for name in ("first", "second"):
        condition, rows[f"{name} resampler"] = timed(lambda: model.condition(features))
        latent = model.mean_latent(condition)
        _, rows[f"{name} LoRA of the basis"] = timed(lambda z=latent: model.decode(z))
    facts = {
        "latent": list(latent.z.shape[1:]),
        "lora_values": model.layout.numel,
        "device": device,
    }
    return rows, facts


def timed(call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What a call gives, and its seconds and memory as a row."""
    started = time.perf_counter()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, {"seconds": time.perf_counter() - started, **memory()}


def memory() -> dict[str, float]:
    """What the process holds on the CPU now, and the most that it ever held, in GB (Linux)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return {}
    found = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    names = {"memory_gb": "VmRSS", "most_gb": "VmHWM"}
    return {key: int(found[name].split()[0]) * 1024 / 1e9 for key, name in names.items()}


def random_features(config: HyperLoRAConfig, photos: int) -> ImageFeatures:
    """Features of the right sizes, as photos have them."""
    generator = torch.Generator().manual_seed(0)
    face = torch.randn(photos, config.face_dim, generator=generator)
    tokens = torch.randn(photos, 257, config.image_dim, generator=generator)
    found = torch.ones(photos, dtype=torch.bool)
    face = torch.nn.functional.normalize(face, dim=1)
    return ImageFeatures(face, found, torch.zeros(photos, 768), tokens)


def write_random(folder: Path, quick: bool) -> Path:
    """A folder in the public format with random weights in float16; `quick` has fewer matrices."""
    layout = sdxl_layout(RANK)
    config = HyperLoRAConfig(basis_size=6 if quick else 128, depth=1 if quick else 4)
    with torch.device("meta"):
        model = HyperLoRAModel(config, layout)
    modules = modules_of(layout)
    (folder / MODULES).write_text(json.dumps(modules))
    names = [
        f"{module}.{part.removesuffix('.0')}.id_{factor}_basis"
        for module in range(len(modules))
        for part in PARTS
        for factor in ("down", "up")
    ]
    basis = [(config.basis_size, *shape) for shape in basis_shapes(layout)]
    write_atomic(_drawn(dict(zip(names, basis, strict=True))), {}, folder / BASIS)
    for file, network in ((RESAMPLER, model.resampler), (PROJECTOR, model.id_projector)):
        shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
        write_atomic(_drawn(shapes), {}, folder / file)
    return folder


def modules_of(layout: LoRALayout) -> dict[str, dict[str, int | None]]:
    """The table of attention modules, as HyperLoRA has it."""
    sizes = {shape.name: (shape.out_features, shape.in_features) for shape in layout}
    table: dict[str, dict[str, int | None]] = {}
    for shape in layout:
        name, _, part = shape.name.partition(".to_")
        if part == "q":
            width, context = sizes[f"{name}.to_k"]
            entry = {"hidden_size": width, "cross_attention_dim": None}
            if name.endswith("attn2"):
                entry["cross_attention_dim"] = context
            table[f"lora_unet_{name.replace('.', '_')}"] = entry
    return table


def _drawn(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Random numbers of each shape; equal shapes share theirs, so that the CPU holds few."""
    generator = torch.Generator().manual_seed(0)
    drawn = {
        shape: (0.02 * torch.randn(shape, generator=generator)).half() for shape in shapes.values()
    }
    return {name: drawn[shape] for name, shape in shapes.items()}
