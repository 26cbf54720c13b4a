"""`convert`: LoRA files of any family to another naming, rank or precision, with metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console

from ..config import Config, check_range
from ..errors import DiffLoRAError, LoRAFileError, counted, percent, shown
from ..limits import RANK
from ..lora.canonical import truncated_layer
from ..lora.formats.report import ReadResult
from ..lora.formats.state_dict import from_state_dict, to_state_dict
from ..lora.formats.stems import Naming
from ..lora.layout import unet_name_map
from ..lora.weights import LoRAWeights
from ..storage.lora_file import (
    PRECISIONS,
    LoRAFile,
    LoRAInfo,
    base_of,
    read_lora_file,
    write_lora_state,
)
from ..storage.torch_file import SUFFIXES, read_torch_file
from .bases import unet_config

NAMINGS: Mapping[str, Naming] = {
    "kohya": "kohya_ldm",
    "kohya_diffusers": "kohya_diffusers",
    "generic": "generic",
    "peft": "diffusers",
}
COMPUTED_RANK = 16
"""Of layers that are no product of two factors in the file, unless another is asked for."""


@dataclass(frozen=True)
class Settings(Config):
    """Converts a LoRA file, or every one of a folder, to another naming, rank or precision.

    Reads kohya, diffusers, PEFT, LoKr, LoHa and whole changes of weights, convolutions too.

    Args:
        source: a LoRA (.safetensors; .pt and the like, if it holds tensors alone), or a folder.
        target: the .safetensors file to write, or a folder for those of a folder.
        to: how layers are named: kohya (what this pack and ComfyUI write), kohya_diffusers, generic
            (diffusion_model.), peft (what diffusers loads; alpha is folded in).
        base: sdxl, sd15 or demo; auto reads it off the widths of the layers.
        rank: the most components of a layer; 0 keeps those of the file (LoKr, LoHa and whole
            changes then get 16).
        precision: of the numbers.
        title: shown by model browsers; empty keeps that of the file.
        trigger_words: words that a prompt needs; none keeps those of the file.
        license: terms; empty keeps those of the file.
    """

    source: str
    target: str
    to: Literal["kohya", "kohya_diffusers", "generic", "peft"] = "kohya"
    base: Literal["auto", "sdxl", "sd15", "demo"] = "auto"
    rank: int = 0
    precision: Literal["float16", "bfloat16", "float32"] = "float16"
    title: str = ""
    trigger_words: tuple[str, ...] = ()
    license: str = ""

    def __post_init__(self) -> None:
        self.check_choices("convert")
        check_range("convert", "rank", self.rank, 0, RANK)


def run(settings: Settings, console: Console) -> None:
    """Converts, and says of each file what became of it.

    Raises:
        DiffLoRAError: a file cannot be converted; of a folder, some could not.
    """
    source, target = Path(settings.source), Path(settings.target)
    if not source.is_dir():
        console.print(f"{shown(target.name)}: {convert(source, target, settings)}")
        return
    files = [f for f in sorted(source.iterdir()) if f.suffix in (".safetensors", *SUFFIXES)]
    failed = 0
    for file in files:
        try:
            made = convert(file, target / f"{file.stem}.safetensors", settings)
            console.print(f"{shown(file.name)}: {made}")
        except DiffLoRAError as error:
            failed += 1
            console.print(f"{shown(file.name)}: NOT CONVERTED. {error}")
    if failed or not files:
        raise LoRAFileError(
            f"{failed} of {counted(len(files), 'file')} in {shown(source.name)} were not converted."
        )


def convert(source: Path, target: Path, settings: Settings) -> str:
    """Converts one file.

    Returns:
        What was read, in a sentence or two.

    Raises:
        DiffLoRAError: see `storage.lora_file`, or the base cannot be told, or the target is the
            source.
    """
    if target.suffix != ".safetensors":
        raise LoRAFileError(f"A LoRA file must end in .safetensors, not {shown(target.suffix)}.")
    if target.exists() and target.samefile(source):
        raise LoRAFileError("The target is the source itself; name another file.")
    file = _read(source)
    found = base_of(file.tensors)
    base = found if settings.base == "auto" else settings.base
    if found not in (None, base):
        raise LoRAFileError(f"{shown(source.name)} is made for {found}, as its layers say.")
    if base is None:
        raise LoRAFileError(
            f"What {shown(source.name)} is made for cannot be read off its layers: say --base."
        )
    names = unet_name_map(unet_config(base))
    result = from_state_dict(file.tensors, names, settings.rank or COMPUTED_RANK, file.metadata)
    weights, lost = _at_most(result, settings.rank)
    state = to_state_dict(weights, NAMINGS[settings.to], names)
    info = _info(file.metadata, settings, source.stem)
    write_lora_state(target, state, base, info, PRECISIONS[settings.precision])
    cut = (
        f" Cut to rank {settings.rank}: at most {percent(lost, 1)} of a layer lost." if lost else ""
    )
    return f"for {base}. {result.report.summary()}{cut}"


def _read(path: Path) -> LoRAFile:
    """A LoRA file of either form."""
    if path.suffix.lower() in SUFFIXES:
        return LoRAFile(read_torch_file(path), {})
    return read_lora_file(path)


def _at_most(result: ReadResult, rank: int) -> tuple[LoRAWeights, float]:
    """The weights at no more than this rank, and the largest relative error of a layer."""
    if rank == 0:
        return result.weights, 0.0
    layers, worst = dict(result.weights.layers), 0.0
    for name, layer in layers.items():
        if layer.rank > rank:
            layers[name], error = truncated_layer(layer, rank)
            worst = max(worst, float(error))
    return LoRAWeights(layers), worst


def _info(said: Mapping[str, str], settings: Settings, name: str) -> LoRAInfo:
    """What the new file says: the settings where they say something, else the old file."""
    own = [w.strip() for w in said.get("modelspec.trigger_phrase", "").split(",") if w.strip()]
    return LoRAInfo(
        title=settings.title or said.get("modelspec.title", name),
        description=said.get("modelspec.description", ""),
        license=settings.license or said.get("modelspec.license", ""),
        trigger_words=settings.trigger_words or tuple(own),
        method=said.get("ss_training_comment", ""),
    )
