"""Reads a HyperLoRA model as it is published: a folder of four files, read without a conversion.

`hyper_lora_modules.json` names the attention modules in order, `hyper_lora_modules.safetensors`
holds their basis matrices (3 GB), `resampler.safetensors` and `id_projector.safetensors` the
networks. Every tensor is read once, straight into the model; the basis stays in the type in which
it is stored, the networks compute in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import parse_json
from ..errors import CheckpointError, ConfigError, LayoutError, counted, described, shown
from ..limits import JSON_BYTES, LAYERS
from ..lora.layout import LoRALayout
from ..models.hyperlora.config import HyperLoRAConfig, layout_of_modules
from ..models.hyperlora.model import HyperLoRAModel, basis_shapes
from .safetensors_io import TensorFile, open_tensors

MODULES = "hyper_lora_modules.json"
BASIS = "hyper_lora_modules.safetensors"
RESAMPLER = "resampler.safetensors"
PROJECTOR = "id_projector.safetensors"
FILES = (MODULES, BASIS, RESAMPLER, PROJECTOR)
HEAD_DIM = 64
"""Features of an attention head: the weights alone do not tell."""

_KIND = "HyperLoRA file"
_PARTS = ("to_q", "to_k", "to_v", "to_out")


def is_hyperlora_folder(path: Path) -> bool:
    """Whether a folder holds one of the files; a half-empty one counts, so that it is named."""
    return any((path / name).is_file() for name in FILES)


def load_hyperlora(
    path: str | Path, operations: Any = nn, head_dim: int = HEAD_DIM
) -> HyperLoRAModel:
    """Rebuilds a model on the CPU, in evaluation mode.

    Args:
        path: the folder of a variant.
        operations: namespace of layer classes for the networks.
        head_dim: features of an attention head.

    Raises:
        CheckpointError: a file is missing, damaged, or belongs to another variant.
    """
    path = Path(path)
    missing = [name for name in FILES if not (path / name).is_file()]
    if missing:
        raise CheckpointError(
            f"The HyperLoRA model in {shown(str(path), 300)} lacks {', '.join(missing)}. Put all "
            "four files of one variant into that folder, and press R."
        )
    modules = _read_modules(path / MODULES)
    with ExitStack() as stack:
        opened = [stack.enter_context(open_tensors(path / n, _KIND)) for n in FILES[1:]]
        return _load(_Files(*opened), modules, operations, head_dim)


@dataclass(frozen=True)
class _Files:
    """The open files of a folder."""

    basis: TensorFile
    resampler: TensorFile
    projector: TensorFile


def _load(
    files: _Files, modules: Mapping[str, tuple[int, int]], operations: Any, head_dim: int
) -> HyperLoRAModel:
    """The model of open files."""
    basis_size, rank = _basis_sizes(files.basis)
    try:
        config = _config(files, basis_size, head_dim)
        layout = layout_of_modules(modules, rank)
        with torch.device("meta"):
            model = HyperLoRAModel(config, layout, operations)
    except (ConfigError, LayoutError) as error:
        place = shown(str(files.basis.path.parent), 300)
        raise CheckpointError(f"{place} is no HyperLoRA model for SDXL: {error}") from error
    _check_basis(files.basis, layout, basis_size)
    _check_networks(files, model)
    tensors = dict(_tensors(files, layout))
    model.load_state_dict(tensors, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def _read_modules(path: Path) -> dict[str, tuple[int, int]]:
    """Attention modules in order: name to width and context width.

    Raises:
        CheckpointError: it is not such a table.
    """
    place = shown(path.name)
    try:
        with path.open("rb") as file:
            text = file.read(JSON_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{place} cannot be read: {error.strerror}.") from error
    table = parse_json(text, place, CheckpointError)
    if not isinstance(table, dict) or not 0 < len(table) <= LAYERS // len(_PARTS):
        raise CheckpointError(f"{place} is damaged: it is no table of attention modules.")
    modules = {}
    for name, entry in table.items():
        sizes = entry if isinstance(entry, dict) else {}
        width = sizes.get("hidden_size")
        context = sizes.get("cross_attention_dim") or width
        if type(width) is not int or type(context) is not int or min(width, context) < 1:
            raise CheckpointError(f"{place} is damaged: {shown(name)} is {described(entry)}.")
        modules[name] = (width, context)
    return modules


def _shape(file: TensorFile, name: str, dimensions: int) -> tuple[int, ...]:
    """Shape of a tensor that must be there, with so many dimensions."""
    _, shape = file.header.tensors.get(name, ("", ()))
    if len(shape) != dimensions or min(shape) < 1:
        raise CheckpointError(
            f"{shown(file.path.name)} is not the one of a HyperLoRA model: it lacks {name}. "
            "Download it again."
        )
    return shape


def _basis_sizes(file: TensorFile) -> tuple[int, int]:
    """Matrices of a basis, and rank of the LoRA."""
    size, _, rank = _shape(file, "0.to_q.id_down_basis", 3)
    return size, rank


def _config(files: _Files, basis_size: int, head_dim: int) -> HyperLoRAConfig:
    """Sizes from the shapes of the files."""
    resampler = files.resampler
    outputs, face_dim = _shape(files.projector, "0.weight", 2)
    width, image_dim = _shape(resampler, "proj_in_2.weight", 2)
    inner, _ = _shape(resampler, "layers.0.attn1.to_q.weight", 2)
    depth = sum(name.endswith(".attn1.to_q.weight") for name in resampler.header.tensors)
    if outputs % image_dim or inner % head_dim:
        raise CheckpointError(
            f"{RESAMPLER} and {PROJECTOR} do not belong together: {outputs} features are no tokens "
            f"of {image_dim}, or {inner} no heads of {head_dim}. Use the files of one variant."
        )
    return HyperLoRAConfig(
        face_dim=face_dim,
        face_tokens=outputs // image_dim,
        image_dim=image_dim,
        width=width,
        depth=depth,
        heads=inner // head_dim,
        head_dim=head_dim,
        basis_size=basis_size,
    )


def _basis_names(count: int) -> list[str]:
    """Name of each token's basis in the file, in the order of the latent."""
    return [
        f"{module}.{part}.id_{factor}_basis"
        for module in range(count)
        for part in _PARTS
        for factor in ("down", "up")
    ]


def _check_basis(file: TensorFile, layout: LoRALayout, basis_size: int) -> None:
    """Refuses a basis that does not have the modules of the JSON.

    Raises:
        CheckpointError: another variant's, or damaged.
    """
    names = _basis_names(len(layout) // len(_PARTS))
    expected = dict(zip(names, basis_shapes(layout), strict=True))
    # Training checkpoints also hold the basis of the base LoRA, which is dropped at inference.
    found = {n: e for n, e in file.header.tensors.items() if ".base_" not in n}
    if set(found) != set(names):
        raise CheckpointError(
            f"{BASIS} and {MODULES} do not belong together: the one holds {len(found)} basis "
            f"tensors, the other names {len(names)}. Use the files of one variant."
        )
    for name, shape in expected.items():
        if found[name][1] != (basis_size, *shape):
            raise CheckpointError(
                f"{BASIS} and {MODULES} do not belong together: {name} has shape {found[name][1]}, "
                f"expected {(basis_size, *shape)}. Use the files of one variant."
            )
        _check_type(file, name)


def _check_networks(files: _Files, model: HyperLoRAModel) -> None:
    """Refuses networks whose tensors are not those that their sizes ask for.

    Raises:
        CheckpointError: another variant's, or damaged.
    """
    networks = ((files.resampler, model.resampler), (files.projector, model.id_projector))
    for file, network in networks:
        wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
        found = {name: shape for name, (_, shape) in file.header.tensors.items()}
        wrong = sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
        if wrong:
            raise CheckpointError(
                f"{file.path.name} does not fit the other files: {counted(len(wrong), 'tensor')} "
                f"differ ({shown(wrong[0])} is {found.get(wrong[0], 'missing')}, expected "
                f"{wanted.get(wrong[0], 'none')}). Use the files of one variant."
            )
        for name in found:
            _check_type(file, name)


def _check_type(file: TensorFile, name: str) -> None:
    kind = file.header.tensors[name][0]
    if kind not in ("F32", "F16", "BF16"):
        raise CheckpointError(f"{file.path.name}: {name} is stored as {kind}, not as a float.")


def _tensors(files: _Files, layout: LoRALayout) -> Iterator[tuple[str, Tensor]]:
    """The tensors under the model's names, read one by one."""
    for number, name in enumerate(_basis_names(len(layout) // len(_PARTS))):
        yield f"basis.{number}", files.basis.read(name)
    for prefix, file in (("resampler", files.resampler), ("id_projector", files.projector)):
        for name in file.header.tensors:
            yield f"{prefix}.{name}", file.read(name).float()
