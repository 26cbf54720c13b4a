"""SDXL from files on this machine: one checkpoint file, or a folder as diffusers keeps it.

A part is read at a time, straight into its network; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..base_model.diffusers_base import DiffusersBase
from ..base_model.protocol import TextCondition
from ..errors import CheckpointError, counted, described, shown
from ..lora.layout import SDXL_UNET_CONFIG, unet_name_map
from ..text.clip_pair import ClipPairText, SpecialTokens
from .safetensors_io import TensorFile, open_tensors

KIND = "SDXL checkpoint"
UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT_L, TEXT_G = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
VAE_CONFIG: Mapping[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
}
TEXT_CONFIGS: Sequence[Mapping[str, Any]] = (
    {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    | {"num_hidden_layers": 12, "hidden_act": "quick_gelu", "projection_dim": 768},
    {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20}
    | {"num_hidden_layers": 32, "hidden_act": "gelu", "projection_dim": 1280},
)
"""Of CLIP ViT-L and of OpenCLIP ViT-bigG."""
SCHEDULE: Mapping[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
SPECIAL = SpecialTokens(49406, 49407, (49407, 0))
_OPEN_CLIP = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def load_sdxl(
    path: Path,
    tokenizer: Path | None,
    device: torch.device,
    dtype: torch.dtype = torch.bfloat16,
) -> DiffusersBase:
    """SDXL, or a model fine-tuned from it, frozen.

    Args:
        path: a .safetensors checkpoint, or the folder of a diffusers pipeline.
        tokenizer: folder with CLIP's vocab.json and merges.txt; a pipeline's folder has its own.
        device: where it computes.
        dtype: of UNet and text encoders; the VAE is in float32, in which alone it is exact.

    Raises:
        CheckpointError: a part is missing, damaged, or another model's.
    """
    path = Path(path)
    if path.is_dir():
        parts, words = _from_folder(path, dtype), tokenizer or path / "tokenizer"
    else:
        with open_tensors(path, KIND) as file:
            parts = _from_file(file, dtype)
        if tokenizer is None:
            raise CheckpointError(
                "A checkpoint file holds no tokenizer: name the folder of CLIP's vocab.json and "
                "merges.txt (ComfyUI has one in comfy/sd1_tokenizer)."
            )
        words = tokenizer
    unet, vae, first, second, prediction = parts
    for part, kind in ((unet, dtype), (vae, torch.float32), (first, dtype), (second, dtype)):
        nn.Module.to(part, device, kind).requires_grad_(False).eval()
    text = ClipPairText((first, second), _tokenize(words), SPECIAL)

    def encode(prompts: Sequence[str]) -> TextCondition:
        found = text.encode(prompts, {})
        return TextCondition(found.context, found.pooled)

    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**SCHEDULE, prediction_type=prediction)
    return DiffusersBase(unet, vae, encode, scheduler)


def _from_folder(path: Path, dtype: torch.dtype) -> tuple[Any, Any, Any, Any, str]:
    """UNet, VAE, both text encoders and the prediction type of a diffusers pipeline."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    local = {"local_files_only": True, "use_safetensors": True}
    kinds = {
        "unet": (UNet2DConditionModel, dtype),
        "vae": (AutoencoderKL, torch.float32),
        "text_encoder": (CLIPTextModel, dtype),
        "text_encoder_2": (CLIPTextModelWithProjection, dtype),
    }
    try:
        parts = [
            part.from_pretrained(path / name, torch_dtype=kind, **local)
            for name, (part, kind) in kinds.items()
        ]
        config = DDIMScheduler.load_config(path / "scheduler", local_files_only=True)
    except Exception as error:  # both libraries say in many ways what is missing
        raise CheckpointError(
            f"{shown(str(path), 300)} is no SDXL pipeline of diffusers with safetensors "
            f"({shown(str(error), 200)})."
        ) from error
    return (*parts, str(config.get("prediction_type", "epsilon")))


def _from_file(file: TensorFile, dtype: torch.dtype) -> tuple[Any, Any, Any, Any, str]:
    """The same of a checkpoint file."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    shape = {"vocab_size": 49408, "max_position_embeddings": 77}
    configs = [CLIPTextConfig(**shape, **config) for config in TEXT_CONFIGS]
    unet = _filled(file, lambda: UNet2DConditionModel(**SDXL_UNET_CONFIG), unet_tensors, dtype)
    vae = _filled(file, lambda: AutoencoderKL(**VAE_CONFIG), vae_tensors, torch.float32)
    first = _filled(file, lambda: CLIPTextModel(configs[0]), clip_tensors, dtype)
    second = _filled(
        file, lambda: CLIPTextModelWithProjection(configs[1]), open_clip_tensors, dtype
    )
    predicted = "v_prediction" if "v_pred" in file.header.tensors else "epsilon"
    return unet, vae, first, second, predicted


Reader = Callable[[TensorFile, torch.dtype], dict[str, Tensor]]
"""Gives weights in a type; converts each when it is read, so that no network is held twice."""


def _filled(
    file: TensorFile, make: Callable[[], nn.Module], read: Reader, dtype: torch.dtype
) -> nn.Module:
    """A network with a file's tensors in place of its own.

    Raises:
        CheckpointError: one is missing, or of another shape.
    """
    with torch.device("meta"):
        module = make()
    place = shown(file.path.name)
    try:
        tensors = read(file, dtype)
    except KeyError as missing:
        raise CheckpointError(
            f"{place} lacks {shown(str(missing))}: it is no SDXL checkpoint."
        ) from missing
    own = module.state_dict()
    tensors = {_as_here(name, own): tensor for name, tensor in tensors.items()}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    wrong = [name for name, tensor in own.items() if shapes.get(name) != tensor.shape]
    if wrong:
        raise CheckpointError(
            f"{place} is no SDXL checkpoint: {counted(len(wrong), 'weight')} of its "
            f"{type(module).__name__} missing or of another shape (for example "
            f"{described(wrong[0])})."
        )
    module.load_state_dict({name: tensors[name] for name in own}, assign=True)
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta and name.endswith("position_ids"):
            owner = module.get_submodule(name.rpartition(".")[0])
            numbers = torch.arange(buffer.shape[-1])[None]
            owner.register_buffer("position_ids", numbers, persistent=False)
    return module


def _as_here(name: str, own: Mapping[str, Tensor]) -> str:
    """A text encoder's name as this version of transformers has it."""
    return name if name in own else name.removeprefix("text_model.")


def unet_tensors(file: TensorFile, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """UNet weights by diffusers' names, of the LDM names of a file.

    Raises:
        KeyError: one is not there.
    """
    modules, found = unet_name_map(SDXL_UNET_CONFIG), {}
    for diffusers, ldm in modules.items():
        for leaf in ("weight", "bias"):
            stored = f"{UNET}{ldm}.{leaf}"
            if leaf == "weight" or stored in file.header.tensors:
                found[f"{diffusers}.{leaf}"] = file.read(stored).to(dtype)
    return found


def vae_tensors(file: TensorFile, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """VAE weights by diffusers' names."""
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    names = [name for name in file.header.tensors if name.startswith(VAE)]
    stored = {name: file.read(name).to(dtype) for name in names}
    converted: dict[str, Tensor] = convert_ldm_vae_checkpoint(stored, dict(VAE_CONFIG))
    return converted


def clip_tensors(file: TensorFile, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Weights of CLIP ViT-L by transformers' names, which the file has too."""
    names = [name for name in file.header.tensors if name.startswith(TEXT_L)]
    return {name.removeprefix(TEXT_L): file.read(name).to(dtype) for name in names}


def open_clip_tensors(file: TensorFile, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Weights of OpenCLIP ViT-bigG by transformers' names.

    Raises:
        KeyError: one is not there.
    """

    def read(name: str) -> Tensor:
        return file.read(TEXT_G + name).to(dtype)

    found = {
        "text_model.embeddings.position_embedding.weight": read("positional_embedding"),
        "text_model.embeddings.token_embedding.weight": read("token_embedding.weight"),
        "text_projection.weight": read("text_projection").mT.contiguous(),
    }
    for leaf in ("weight", "bias"):
        found[f"text_model.final_layer_norm.{leaf}"] = read(f"ln_final.{leaf}")
        for layer in range(int(TEXT_CONFIGS[1]["num_hidden_layers"])):
            theirs, ours = f"transformer.resblocks.{layer}", f"text_model.encoder.layers.{layer}"
            for old, new in _OPEN_CLIP.items():
                found[f"{ours}.{new}.{leaf}"] = read(f"{theirs}.{old}.{leaf}")
            joined = read(f"{theirs}.attn.in_proj_{leaf}").chunk(3)
            for part, tensor in zip("qkv", joined, strict=True):
                found[f"{ours}.self_attn.{part}_proj.{leaf}"] = tensor.clone()
    return found


def _tokenize(folder: Path) -> Callable[[str], list[int]]:
    """CLIP's tokenizer of a folder: text to token numbers without special ones.

    Raises:
        CheckpointError: it is not there.
    """
    from transformers import CLIPTokenizer

    pair = all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))
    if not pair and not (folder / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{shown(str(folder), 300)} lacks CLIP's tokenizer: vocab.json and merges.txt, or "
            "tokenizer.json."
        )
    try:
        tokenizer: Any = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        place = shown(str(folder), 300)
        raise CheckpointError(f"The tokenizer in {place} is damaged: {error}") from error
    return lambda text: list(tokenizer(text)["input_ids"][1:-1])
