"""Around styles, which have no word, of any method: load and apply one, export a LoRA."""

import comfy.samplers
import torch
from comfy_api.latest import io, ui

from ..difflora_core.errors import ConfigError, counted
from ..difflora_core.evaluation.routing import routing_picture, routing_report
from ..difflora_core.evaluation.routing_map import routing_map
from ..difflora_core.lora.block_groups import GroupStrengths
from ..difflora_core.lora.formats.state_dict import to_state_dict
from ..difflora_core.methods.base import (
    AppliedAdaptation,
    PreparedAdaptation,
    TrainedAdaptation,
)
from ..difflora_core.methods.registry import METHODS, method
from ..difflora_core.storage.adapter_file import read_adaptation
from . import model_paths, sockets
from .host.adapters import with_link
from .host.base import ModelLayers
from .host.links import Link
from .host.routing import RoutingWatcher, draw

CATEGORY = "DiffLoRA/styles"


class LoadStyle(io.ComfyNode):
    """A style file."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DiffLoRA_LoadStyle",
            display_name="Load Style",
            category=CATEGORY,
            description="Loads a style from models/difflora_styles, whatever it was trained by. It "
            "needs no word in the prompt: Apply Style gives its look to every picture.",
            search_aliases=[*METHODS, "load style", "style lora"],
            inputs=[
                io.Combo.Input(
                    "style_name",
                    options=model_paths.choices(model_paths.style_files(), "difflora_styles"),
                    tooltip="A file in models/difflora_styles; press R after training one.",
                ),
            ],
            outputs=[
                sockets.Style.Output(display_name="style", tooltip="For Apply Style."),
                io.String.Output(
                    display_name="report", tooltip="Its method, base model and what made it."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, style_name=None):
        return model_paths.problem(model_paths.style_file, style_name)

    @classmethod
    def fingerprint_inputs(cls, style_name=None):
        return model_paths.fingerprint(model_paths.style_file(style_name))

    @classmethod
    def execute(cls, style_name):
        style = _style(read_adaptation(model_paths.style_file(style_name)))
        facts = [
            f"{name.replace('_', ' ')} {value}" for name, value in style.adaptation.facts.items()
        ]
        made = (style.adaptation.method, f"for {style.adaptation.base}")
        layers = counted(len(style.adaptation.layers), "layer")
        return io.NodeOutput(style, ", ".join([*made, layers, *facts]))


class ApplyStyle(io.ComfyNode):
    """A style on a model."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DiffLoRA_ApplyStyle",
            display_name="Apply Style",
            category=CATEGORY,
            description="Gives a style to the pictures of a model. Chain several for several "
            "styles, which act in their order. The model itself stays as it is, so it works with "
            "LoRA, concepts, ControlNet and fp8.",
            search_aliases=[*METHODS, "style strength", "style transfer", "adain"],
            inputs=[
                io.Model.Input("model", tooltip="The model; it stays as it is for other nodes."),
                sockets.Style.Input("style", tooltip="From Load Style or a training node."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-5.0,
                    max=5.0,
                    step=0.01,
                    tooltip="0 leaves the model alone, 1 is as trained, below 0 leads away from "
                    "the style.",
                ),
                *sockets.span_widgets(" A later start leaves the layout to the base model."),
                sockets.positive_widget("Leaves the negative prompt to the base model."),
                *sockets.block_widgets(),
            ],
            outputs=[io.Model.Output(display_name="model")],
        )

    @classmethod
    def execute(
        cls,
        model,
        style,
        strength,
        start_percent,
        end_percent,
        positive_only,
        input_blocks,
        middle_block,
        output_blocks,
        self_attention,
        cross_attention,
    ):
        blocks = GroupStrengths(
            input_blocks, middle_block, output_blocks, self_attention, cross_attention
        )
        applied = AppliedAdaptation(style, style.adaptation.settings, strength, blocks=blocks)
        link = Link(applied, start_percent, end_percent, positive_only)
        return io.NodeOutput(with_link(model, link))


class ExportStyleLoRA(io.ComfyNode):
    """A style as a plain LoRA."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DiffLoRA_ExportStyleLoRA",
            display_name="Export Style as LoRA",
            category=CATEGORY,
            description="What of a style fits into a plain LoRA, for other programs and for nodes "
            "that take LoRAs. The report says what is left out; compare both before you share it.",
            search_aliases=[*METHODS, "convert style", "style to lora"],
            inputs=[
                io.Model.Input("model", tooltip="The base model that the LoRA is for."),
                sockets.Style.Input("style", tooltip="From Load Style or a training node."),
            ],
            outputs=[
                io.LoraModel.Output(display_name="lora", tooltip="For Save LoRA Weights."),
                io.String.Output(display_name="report", tooltip="What is left out."),
            ],
        )

    @classmethod
    def execute(cls, model, style):
        kind = method(style.adaptation.method)
        with torch.no_grad():
            weights = kind.as_lora(style, ModelLayers(model, style.adaptation))
        lost = kind.lost_as_lora(style.adaptation)
        report = f"As a LoRA, {', and '.join(lost)}." if lost else "The LoRA is the whole style."
        return io.NodeOutput(to_state_dict(weights, "kohya_ldm"), report, ui=ui.PreviewText(report))


class StyleRouter(io.ComfyNode):
    """Which style acts where."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DiffLoRA_StyleRouter",
            display_name="Style Router Picture",
            category=CATEGORY,
            description="Draws as KSampler does and shows which of a style's own styles acted in "
            "which part of the model, from the first step to the last. For styles that mix several "
            "by a router.",
            search_aliases=["router", "mixture of styles", "which style fires", "style weights"],
            inputs=_sampler_inputs(),
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="What KSampler would give."),
                io.Image.Output(
                    display_name="picture",
                    tooltip="A panel for each part of the model: shares of the styles over time.",
                ),
                io.String.Output(display_name="report", tooltip="The shares on the whole."),
                io.Image.Output(
                    display_name="map",
                    tooltip="A line for each picture of the batch, from the first step to the "
                    "last: those that go apart get other mixtures.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        latent_image,
        seed,
        steps,
        cfg,
        sampler_name,
        scheduler,
        denoise,
    ):
        watcher = RoutingWatcher()
        settings = (steps, cfg, sampler_name, scheduler, denoise)
        drawn = draw(watcher.on(model), positive, negative, latent_image, seed, settings)
        shares = watcher.table.shares()
        picture = routing_picture(shares)[None]
        places = routing_map(watcher.table.by_picture())[None]
        shown = ui.PreviewImage(picture, cls=cls)
        return io.NodeOutput(drawn, picture, routing_report(shares), places, ui=shown)


def _sampler_inputs() -> list[io.Input]:
    """Those of KSampler, on a model with a style."""
    samplers = comfy.samplers.KSampler
    return [
        io.Model.Input("model", tooltip="A model with a style on it, from Apply Style."),
        io.Conditioning.Input("positive", tooltip="What the picture shows."),
        io.Conditioning.Input("negative", tooltip="What it does not show."),
        io.Latent.Input("latent_image", tooltip="An empty picture, or one to draw again."),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=True,
            tooltip="Of the noise.",
        ),
        io.Int.Input("steps", default=20, min=1, max=10_000, tooltip="As in KSampler."),
        io.Float.Input("cfg", default=5.0, min=0.0, max=100.0, step=0.1, tooltip="As in KSampler."),
        io.Combo.Input("sampler_name", options=samplers.SAMPLERS, tooltip="As in KSampler."),
        io.Combo.Input("scheduler", options=samplers.SCHEDULERS, tooltip="As in KSampler."),
        io.Float.Input(
            "denoise",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="How much of the picture is drawn again.",
        ),
    ]


def _style(adaptation: TrainedAdaptation) -> PreparedAdaptation:
    """What a style file holds.

    Raises:
        ConfigError: it has a word.
    """
    if adaptation.word is not None:
        raise ConfigError(
            f"{adaptation.title} is a concept, which needs its word in the prompt. Put its file "
            f"into models/{model_paths.CONCEPTS} and use Load Concept."
        )
    return PreparedAdaptation(adaptation)
