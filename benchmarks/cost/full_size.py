"""`make bench name=full_size args='--device cuda'`: photo features to LoRA file at SDXL's size.

The full-size preset with random weights: 560 attention projections at rank 8, a DiT of 16 layers.
What is measured does not depend on what the weights say: seconds, memory and the file's size. The
encoders (insightface, CLIP) are the user's own and are not counted.
"""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from difflora_core.diffusion.sampler import SampleSettings
from difflora_core.evaluation.report import Report
from difflora_core.lora.layout import sdxl_layout
from difflora_core.models.difflora import DiffLoRAConfig, DiffLoRAModel
from difflora_core.storage.lora_file import write_lora_file
from difflora_core.vision.features import ImageFeatures

from ..command import benchmark_console, command_parser, commit, machine, set_threads, write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = command_parser("Time and memory of the full-size model.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--steps", type=int, default=20, help="of the DiT sampler")
    options = parser.parse_args(arguments)
    set_threads(options.threads)
    console = benchmark_console()
    model = DiffLoRAModel(DiffLoRAConfig.sdxl(), sdxl_layout(8)).eval().requires_grad_(False)
    model.to(options.device, getattr(torch, options.dtype))
    with torch.autocast(model.device.type, torch.bfloat16, enabled=options.dtype == "bfloat16"):
        rows = measure(model, options.steps)
    numbers = sum(p.numel() for p in model.parameters())
    facts = {
        "parameters": numbers,
        "lora_values": model.layout.numel,
        "peak_memory_gb": peak_gigabytes(options.device),
        "weights_gb": weight_gigabytes(model),
        "dtype": options.dtype,
        "commit": commit(),
        "machine": machine(),
    }
    report = Report(rows, facts)
    console.print(report.to_markdown({"seconds": 3, "megabytes": 1}))
    console.print(
        f"{numbers / 1e6:.0f} M parameters in {options.dtype}, {model.layout.numel:,} LoRA values, "
        f"peak memory of the process {facts['peak_memory_gb']:.1f} GB, of which the weights are "
        f"{facts['weights_gb']:.1f} GB; {facts['machine']}"
    )
    write_report(report, options.json, console)
    return 0


@torch.no_grad()
def measure(model: DiffLoRAModel, steps: int) -> dict[str, dict[str, float]]:
    """Every part of the way from features to a file, warm."""
    photo = random_photo(model)
    condition = model.condition(photo)
    latent = model.mean_latent(condition)
    weights = model.decode(latent).batch_item(0)
    settings = SampleSettings(steps=steps)
    rows = {
        "features to condition (MIF)": {"seconds": seconds(lambda: model.condition(photo))},
        "best guess of the latent": {"seconds": seconds(lambda: model.mean_latent(condition))},
        f"DiT sample of the latent, {steps} steps": {
            "seconds": seconds(lambda: model.sample_latent(condition, [0], settings))
        },
        "latent to LoRA (LAE)": {"seconds": seconds(lambda: model.decode(latent))},
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "person.safetensors"
        spent = seconds(lambda: write_lora_file(path, weights, model.layout))
        rows["LoRA file, float16"] = {"seconds": spent, "megabytes": path.stat().st_size / 1e6}
    return rows


def random_photo(model: DiffLoRAModel) -> ImageFeatures:
    """Features of the right sizes, as one photo has them."""
    sizes, generator = model.config.feature_sizes, torch.Generator().manual_seed(0)
    like = next(model.parameters())

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, generator=generator).to(like)

    face = torch.nn.functional.normalize(draw(sizes.face), dim=1)
    found = torch.ones(1, dtype=torch.bool, device=like.device)
    return ImageFeatures(face, found, draw(sizes.image), draw(sizes.tokens, sizes.token_dim))


def seconds(call: Callable[[], object]) -> float:
    """Seconds of the second call."""
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_gigabytes(device: str) -> float:
    """Most memory that the device, or on the CPU the process, has held."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss of Linux starts at what the parent process held
        (line,) = [line for line in status.read_text().split("\n") if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # in bytes on macOS


def weight_gigabytes(model: torch.nn.Module) -> float:
    """What parameters and buffers take, counted from their shapes."""
    tensors = (*model.parameters(), *model.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e9
