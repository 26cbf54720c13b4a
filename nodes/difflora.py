"""DiffLoRA itself: mix features, sample a LoRA latent, decode it; and all of it in one node."""

import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image, ImageDraw

from ..difflora_core.diffusion.sampler import SampleSettings
from ..difflora_core.models import latent_math
from ..difflora_core.vision.face_choice import FaceOptions
from ..difflora_core.vision.photo_weights import read_weights, weighted
from . import sockets
from .host import encoders, models

CATEGORY = "DiffLoRA/steps"


def base_model_socket() -> io.Input:
    """The model that the LoRA is meant for."""
    return io.Model.Input(
        "base_model",
        optional=True,
        tooltip="The model that will get the LoRA. When connected, a LoRA that does not fit it is "
        "an error instead of a LoRA without effect.",
    )


class MixFeatures(io.ComfyNode):
    """The MIF gate."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DiffLoRA_MixFeatures",
            display_name="Mix Image Features",
            category=CATEGORY,
            description="Weighs face against image features and makes the condition for the LoRA.",
            search_aliases=["mif", "gate", "identity condition"],
            inputs=[
                sockets.difflora_model(),
                sockets.Features.Input(
                    "features",
                    tooltip="The person's features, from Extract Identity Features.",
                ),
                *sockets.gate_widgets(),
                *(
                    io.Float.Input(
                        f"{source}_weight",
                        default=-1.0,
                        min=-1.0,
                        max=2.0,
                        step=0.01,
                        advanced=True,
                        tooltip=f"Weight of the {source} features alone; below 0 it is not set.",
                    )
                    for source in ("face", "image")
                ),
            ],
            outputs=[
                sockets.Condition.Output(display_name="condition"),
                io.Image.Output(display_name="gate", tooltip="A picture of the weights in use."),
            ],
        )

    @classmethod
    def execute(cls, difflora_model, features, gate, face_share, face_weight, image_weight):
        override = models.gate_override(gate, face_share, face_weight, image_weight)
        condition = models.mix(difflora_model, features, override)
        picture = _gate_picture(condition.gate)
        return io.NodeOutput(condition, picture, ui=ui.PreviewImage(picture, cls=cls))


class SampleLatent(io.ComfyNode):
    """A latent of the LoRA autoencoder for one person."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DiffLoRA_SampleLatent",
            display_name="Sample LoRA Latent",
            category=CATEGORY,
            description="The best guess for the person, or a variant sampled by the DiT. Without "
            "a condition, sampled invents a person.",
            search_aliases=["dit", "lora diffusion", "invent person"],
            inputs=[
                sockets.difflora_model(),
                sockets.Condition.Input(
                    "condition",
                    optional=True,
                    tooltip="The person, from Mix Image Features. Without it, mode sampled "
                    "invents a person.",
                ),
                *sockets.sampling_widgets(),
            ],
            outputs=[sockets.Latent.Output(display_name="lora_latent")],
        )

    @classmethod
    def execute(cls, difflora_model, mode, seed, steps, guidance, condition=None):
        settings = SampleSettings(steps, guidance)
        return io.NodeOutput(models.draw_latent(difflora_model, condition, mode, seed, settings))


class DecodeLoRA(io.ComfyNode):
    """A latent to a LoRA."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DiffLoRA_DecodeLoRA",
            display_name="Decode LoRA",
            category=CATEGORY,
            description="Turns a LoRA latent into a LoRA for Load LoRA Model and Save LoRA "
            "Weights.",
            search_aliases=["lae", "lora autoencoder"],
            inputs=[
                sockets.difflora_model(),
                sockets.Latent.Input(
                    "lora_latent", tooltip="A person as a LoRA latent, from Sample LoRA Latent."
                ),
                base_model_socket(),
                io.Int.Input(
                    "index",
                    default=0,
                    min=-1,
                    max=99_999,
                    optional=True,
                    tooltip="Which identity of a batch, counted from 0; -1 makes a LoRA of each, "
                    "and the nodes after this one run once for every LoRA.",
                ),
            ],
            outputs=[io.LoraModel.Output(display_name="lora", is_output_list=True)],
        )

    @classmethod
    def execute(cls, difflora_model, lora_latent, base_model=None, index=0):
        wanted = range(len(lora_latent)) if index < 0 else (index,)
        chosen = [latent_math.select(lora_latent, number) for number in wanted]
        loras, step = [], models.progress(len(chosen))
        for latent in chosen:
            loras.append(models.decode(difflora_model, latent, base_model))
            step(len(loras), len(chosen))
        return io.NodeOutput(loras)


class Personalize(io.ComfyNode):
    """Photos in, LoRA out."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DiffLoRA_Personalize",
            display_name="Personalize",
            category="DiffLoRA",
            description="Photos of a person in, that person's LoRA out. Apply it with Load LoRA "
            "Model, keep it with Save LoRA Weights.",
            search_aliases=[
                *("difflora", "hyperlora", "faceid", "instantid", "photomaker", "pulid"),
                *("face", "lora", "portrait", "ip adapter", "ipadapter", "face to lora"),
                *("same person", "reference photo", "consistent character"),
            ],
            inputs=[
                io.Image.Input("images", tooltip="One photo or a batch of photos of one person."),
                sockets.difflora_model(),
                *sockets.photo_sockets(),
                base_model_socket(),
                *sockets.sampling_widgets(),
                *sockets.face_widgets(),
                *sockets.gate_widgets(advanced=True),
                sockets.weights_widget(),
            ],
            outputs=[
                io.LoraModel.Output(display_name="lora"),
                io.Image.Output(display_name="crops", tooltip="What CLIP vision saw."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        images,
        difflora_model,
        mode,
        seed,
        steps,
        guidance,
        on_missing_face,
        face_order,
        face_index,
        image_region,
        gate,
        face_share,
        clip_vision=None,
        face_analysis=None,
        mask=None,
        base_model=None,
        weights="",
    ):
        shares = read_weights(weights)
        region = models.image_region(difflora_model, image_region)
        options = FaceOptions(face_order, face_index, on_missing_face, region)
        found = encoders.read_photos(cls, images, clip_vision, face_analysis, mask, options, shares)
        override = models.gate_override(gate, face_share)
        features = weighted(found.features, found.of_photos(shares, len(images)))
        condition = models.mix(difflora_model, features, override)
        settings = SampleSettings(steps, guidance)
        latent = models.draw_latent(difflora_model, condition, mode, seed, settings)
        lora = models.decode(difflora_model, latent, base_model)
        return io.NodeOutput(lora, found.crops, ui=ui.PreviewImage(found.crops, cls=cls))


def _gate_picture(gate: torch.Tensor) -> torch.Tensor:
    """Two labelled bars (1, 96, 320, 3) for the weights (1, 2) of face and image."""
    canvas = Image.new("RGB", (320, 96), (32, 32, 36))
    pen = ImageDraw.Draw(canvas)
    for row, (label, weight) in enumerate(zip(("face", "image"), gate[0].tolist(), strict=True)):
        top = 14 + 40 * row
        pen.rectangle((90, top, 300, top + 26), fill=(60, 60, 66))
        if weight > 0:
            colour = ((226, 150, 74), (86, 156, 214))[row]
            pen.rectangle((90, top, 90 + 210 * min(weight, 1.0), top + 26), fill=colour)
        pen.text((10, top + 8), f"{label}  {weight:.2f}", fill=(235, 235, 235))
    return torch.from_numpy(np.array(canvas)).float()[None] / 255
