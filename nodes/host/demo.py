"""The demo world inside ComfyUI: a tiny SDXL built from ComfyUI's own classes.

Everything is read from the files: sizes of the UNet from its weights, the rest from the diffusers
configuration in the metadata. Nothing is registered with ComfyUI's loaders.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.controlnet
import comfy.latent_formats
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sdxl_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...difflora_core.config import parse_json
from ...difflora_core.demo.networks.stored import REMEDY, check_names
from ...difflora_core.demo.networks.text import text_config
from ...difflora_core.errors import CheckpointError
from ...difflora_core.storage.safetensors_io import read_file
from .browser import show_here

UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT = {
    "clip_l": "conditioner.embedders.0.transformer.",
    "clip_g": "conditioner.embedders.1.transformer.",
}
CLIP_VOCABULARY = 49_408
UNREAD = (
    "clip_l.logit_scale",
    "clip_g.logit_scale",
    "clip_l.transformer.text_projection.weight",
)
"""What ComfyUI's text encoders have and SDXL's files need not hold."""
PREVIEW_COLOURS = (
    (0.045, 0.031, -0.304),
    (0.031, 0.182, -0.160),
    (-0.380, 0.355, 0.089),
    (0.060, 0.039, 0.119),
    (0.001, 0.130, -0.052),
    (-0.190, 0.257, 0.161),
    (-0.203, 0.886, 0.554),
    (0.128, -0.262, 0.081),
)
PREVIEW_GREY = (0.201, 0.113, 0.025)
"""What each latent channel adds to red, green and blue in [-1, 1], and what is there without any:
least squares over drawn portraits, as a test fits it again."""

FAR = 4
"""Times the demo's own area from which on a picture is too large for it."""

# AutoencoderKL's names in diffusers and in LDM; `up` counts from the other end there.
VAE_NAMES = (
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
    (r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block."),
    (r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample."),
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"mid_block\.attentions\.0\.group_norm\.", "mid.attn_1.norm."),
    (r"mid_block\.attentions\.0\.to_([qkv])\.", r"mid.attn_1.\1."),
    (r"mid_block\.attentions\.0\.to_out\.0\.", "mid.attn_1.proj_out."),
)


def read_demo_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and configuration.

    Raises:
        CheckpointError: there is no configuration, so the file is something else.
    """
    tensors, metadata = read_file(path, "file of the demo world")
    if not metadata or "config" not in metadata:
        raise CheckpointError(f"{path} is no file of the demo world: it holds no configuration.")
    return tensors, parse_json(metadata["config"], f"{path}: the configuration", CheckpointError)


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """A block that fills a network from a file.

    Raises:
        CheckpointError: a tensor that it asks for by name is missing, or one has another shape.
    """
    try:
        yield
    except KeyError as error:
        check_names([str(error.args[0])], (), path)
        raise
    except RuntimeError as error:
        if "size mismatch" not in str(error):  # want of memory, say
            raise
        raise CheckpointError(f"{path} does not fit its own configuration: {error} {REMEDY}") from (
            error
        )


def check_loaded(module: Any, names: Iterable[str], path: Path) -> None:
    """Raises CheckpointError unless a filled network has exactly the tensors of these names.

    ComfyUI only logs what was missing or left over.
    """
    own, given = module.state_dict().keys(), set(names)
    check_names(own - given, given - own, path)


def demo_model_config(state: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Any:
    """ComfyUI's SDXL configuration at the size of a base with this state dict."""
    unet, vae = facts["unet"], facts["vae"]
    head = unet["block_out_channels"][0] // unet["attention_head_dim"][0]

    class DemoLatents(comfy.latent_formats.LatentFormat):
        """Latents of the demo VAE."""

        scale_factor = vae["scaling_factor"]
        latent_channels = vae["latent_channels"]
        latent_rgb_factors = PREVIEW_COLOURS
        latent_rgb_factors_bias = PREVIEW_GREY
        spacial_downscale_ratio = vae_ratio(vae)

    class DemoSDXL(comfy.supported_models.SDXL):
        """SDXL's classes; eight latent channels do not make it an inpainting model."""

        unet_extra_config = {"num_heads": -1, "num_head_channels": head}  # noqa: RUF012
        latent_format = DemoLatents
        picture_size = unet["sample_size"] * vae_ratio(vae)

        def inpaint_model(self) -> bool:
            return False

    return DemoSDXL(comfy.model_detection.detect_unet_config(state, UNET))


def vae_ratio(config: Mapping[str, Any]) -> int:
    """Pixels per latent along one side."""
    return 2 ** (len(config["block_out_channels"]) - 1)


def load_demo_unet(path: Path, disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """The UNet in a ModelPatcher, as ComfyUI's checkpoint loader makes one.

    Raises:
        CheckpointError: the file's tensors are not those of the UNet.
    """
    state, facts = read_demo_file(path)
    config = demo_model_config(state, facts)
    device = comfy.model_management.get_torch_device()
    dtype = comfy.model_management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(state, UNET),
        supported_dtypes=list(config.supported_inference_dtypes),
        weight_dtype=comfy.utils.weight_dtype(state, UNET),
    )
    cast = comfy.model_management.unet_manual_cast(dtype, device, config.supported_inference_dtypes)
    config.set_inference_dtype(dtype, cast)
    patchers = comfy.model_patcher
    kind = patchers.ModelPatcher if disable_dynamic else patchers.CoreModelPatcher
    offload = comfy.model_management.unet_offload_device()
    model = config.get_model(state, UNET, device=offload)
    patcher = kind(model, load_device=device, offload_device=offload)
    names = [name.removeprefix(UNET) for name in state if name.startswith(UNET)]
    with fitting(path):
        model.load_model_weights(state, UNET, assign=patcher.is_dynamic())
    check_loaded(model.diffusion_model, names, path)
    tell = partial(tell_far_size, config.picture_size, config.latent_format)
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "difflora_demo_size", tell)
    # Hooks and copies for other devices reload the model from its file.
    patcher.cached_patcher_init = (load_demo_unet, (path,))
    return patcher


def tell_far_size(
    side: int, latents: Any, executor: Any, noise: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Says on the sampler that a picture is far from the side that the demo learned.

    ComfyUI's default of 512 x 512 takes minutes and shows nothing that anybody learned.
    """
    height, width = (latents.spacial_downscale_ratio * length for length in noise.shape[-2:])
    if height * width > FAR * side**2:
        show_here(
            f"The demo learned pictures of {side} x {side}; {width} x {height} takes long and "
            f"shows nothing it knows. Set Empty Latent Image to {side} x {side}, or to "
            f"{2 * side} x {side} for two people."
        )
    return executor(noise, *args, **kwargs)


def load_demo_vae(path: Path) -> comfy.sd.VAE:
    """The VAE.

    Raises:
        CheckpointError: the file's tensors are not those of the VAE.
    """
    state, facts = read_demo_file(path)
    config = facts["vae"]
    widths = config["block_out_channels"]
    sizes = {
        "double_z": True,
        "z_channels": config["latent_channels"],
        "resolution": config["sample_size"],
        "in_channels": config["in_channels"],
        "out_ch": config["out_channels"],
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    parameters = {"ddconfig": sizes, "embed_dim": config["latent_channels"]}
    weights = vae_state(state, len(widths))
    names = list(weights)
    with fitting(path):
        vae = comfy.sd.VAE(sd=weights, config={"params": parameters})
    check_loaded(vae.first_stage_model, names, path)
    vae.downscale_ratio = vae.upscale_ratio = vae_ratio(config)
    vae.latent_channels = config["latent_channels"]
    return vae


def vae_state(state: Mapping[str, Tensor], levels: int) -> dict[str, Tensor]:
    """State dict of the VAE under LDM names.

    Attention projections (out, in) are 1 x 1 convolutions (out, in, 1, 1) there.
    """
    renamed = {}
    for key, tensor in state.items():
        if not key.startswith(VAE):
            continue
        name = key.removeprefix(VAE)
        for pattern, ldm in VAE_NAMES:
            name = re.sub(pattern, ldm, name)
        for level in range(levels):
            for part, ldm in (("resnets", "block"), ("upsamplers.0", "upsample")):
                up = f"up.{levels - 1 - level}.{ldm}."
                name = name.replace(f"up_blocks.{level}.{part}.", up)
        projection = ".mid.attn_1." in name and tensor.ndim == 2
        renamed[name] = tensor[..., None, None] if projection else tensor
    return renamed


def load_demo_clip(path: Path) -> comfy.sd.CLIP:
    """Both text encoders behind ComfyUI's SDXL tokenizer and CLIP class.

    Raises:
        CheckpointError: the file's tensors are not those of the text encoders.
    """
    state, _ = read_demo_file(path)
    weights: dict[str, Tensor] = {}
    options = {}
    for part, prefix in TEXT.items():
        with fitting(path):
            texts = clip_state(state, prefix)
        hidden = texts["text_model.embeddings.token_embedding.weight"].shape[1]
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        config = text_config(hidden)
        options[f"{part}_model_config"] = {name: config[name] for name in names}
        weights |= {f"{part}.transformer.{key}": tensor for key, tensor in texts.items()}
    target = comfy.supported_models_base.ClipTarget(
        comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel
    )
    parameters = comfy.utils.calculate_parameters(weights)
    expected = [*weights, *UNREAD]
    with fitting(path):
        clip = comfy.sd.CLIP(
            target, parameters=parameters, state_dict=weights, model_options=options
        )
    check_loaded(clip.cond_stage_model, expected, path)
    return clip


def clip_state(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """State dict of one text encoder, its small vocabulary spread over CLIP's table (49408, d).

    Some versions of transformers leave `text_model.` out of the names.
    """
    weights = {}
    for key, tensor in state.items():
        if key.startswith(prefix):
            name = key.removeprefix(prefix).removeprefix("text_model.")
            projection = name.startswith("text_projection")
            weights[name if projection else f"text_model.{name}"] = tensor
    numbers, key = state["vocabulary"], "text_model.embeddings.token_embedding.weight"
    rows = weights[key]
    table = rows[numbers == -1].expand(CLIP_VOCABULARY, -1).clone()
    known = numbers >= 0
    table[numbers[known]] = rows[known]
    weights[key] = table
    return weights


def load_demo_clip_vision(path: Path) -> comfy.clip_vision.ClipVisionModel:
    """CLIP vision, which ComfyUI's loader would not recognise by its size.

    Raises:
        CheckpointError: weights and configuration do not fit each other.
    """
    tensors, config = read_demo_file(path)
    vision = comfy.clip_vision.ClipVisionModel(config)
    missing, unexpected = vision.load_sd(tensors)
    if missing or any(not name.endswith("position_ids") for name in unexpected):
        raise CheckpointError(f"{path} does not fit its own configuration; make it again.")
    return vision


def load_demo_controlnet(path: Path) -> comfy.controlnet.ControlBase:
    """The ControlNet of five face points, read by core's own loader.

    It is a Control-LoRA: core builds the network from the base model that is sampled with.
    """
    return comfy.controlnet.load_controlnet(str(path))
