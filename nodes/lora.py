"""Where and when a LoRA acts: as hooks for masks and keyframes, by part and time, by words."""

import logging

import comfy.hooks
from comfy_api.latest import io

from ..difflora_core.lora.block_groups import GroupStrengths
from ..difflora_core.methods.base import AppliedAdaptation, PreparedAdaptation
from . import sockets
from .host import lora as host_lora
from .host import models
from .host.adapters import with_link
from .host.links import Link
from .host.words import marking

logger = logging.getLogger(__name__)

CATEGORY = "DiffLoRA/placing"


class LoRAToHook(io.ComfyNode):
    """A LoRA as hooks."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DiffLoRA_LoRAToHook",
            display_name="LoRA to Hook",
            category=CATEGORY,
            description="A LoRA that acts only where a conditioning says so: in a mask, for a part "
            "of the steps, with keyframes. Connect the hooks to Cond Set Props or Cond Pair Set "
            "Props; one hook for each person puts several people into one picture.",
            search_aliases=["regional", "mask", "two people", "hook", "schedule", "attention mask"],
            inputs=[
                sockets.lora_socket(),
                io.Float.Input(
                    "strength_model",
                    default=1.0,
                    min=-20.0,
                    max=20.0,
                    step=0.01,
                    tooltip="How strongly the LoRA acts; keyframes multiply it. 0 leaves it out.",
                ),
                io.Hooks.Input(
                    "prev_hooks",
                    optional=True,
                    tooltip="Hooks that act together with this one, for example another LoRA.",
                ),
                io.Model.Input(
                    "base_model",
                    optional=True,
                    tooltip="The model that is sampled with. When connected, every layer of the "
                    "LoRA must be one of its own; else sampling refuses a LoRA for another base.",
                ),
            ],
            outputs=[io.Hooks.Output(display_name="hooks")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, lora, strength_model, prev_hooks=None, base_model=None):
        hooks = prev_hooks or comfy.hooks.HookGroup()
        state = host_lora.check_lora(lora)
        if base_model is not None:
            read = host_lora.read_lora(state, base_model)
            state = read.state
            if read.note:
                logger.warning(read.note)
                models.show_text(cls, read.note)
        if strength_model != 0:
            hooks = hooks.clone_and_combine(host_lora.lora_hook(state, strength_model))
        return io.NodeOutput(hooks)


class ApplyLoRA(io.ComfyNode):
    """A LoRA on a model, by part and time."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DiffLoRA_ApplyLoRA",
            display_name="Apply LoRA by Part and Time",
            category=CATEGORY,
            description="Applies a LoRA with a strength for each part of the model, for a part of "
            "the steps, or for the positive prompt alone. At its defaults it is Load LoRA Model "
            "and costs nothing while sampling.",
            search_aliases=["block weight", "lora strength", "start percent", "load lora"],
            inputs=[
                io.Model.Input("model", tooltip="The model; it stays as it is for other nodes."),
                sockets.lora_socket(),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-20.0,
                    max=20.0,
                    step=0.01,
                    tooltip="How strongly the LoRA acts as a whole.",
                ),
                *sockets.span_widgets(" A later start leaves the layout to the base model."),
                sockets.positive_widget(
                    "Leaves the negative prompt to the base model; guidance then pushes "
                    "the picture further towards the person."
                ),
                *sockets.block_widgets(),
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                io.LoraModel.Output(
                    display_name="lora",
                    tooltip="The LoRA with these strengths in it, to save or for LoRA to Hook. It "
                    "knows nothing of start, end and positive only.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model,
        lora,
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
        groups = GroupStrengths(
            input_blocks, middle_block, output_blocks, self_attention, cross_attention
        )
        read = host_lora.read_lora(host_lora.check_lora(lora), model)
        span = (start_percent, end_percent, positive_only)
        patched = _placed(model, read, strength, groups, span)
        scaled, whole = read.scaled(strength, groups)
        notes = " ".join(filter(None, (read.note, host_lora.whole_note(whole))))
        if notes:
            logger.warning(notes)
            models.show_text(cls, notes)
        licensed = host_lora.LicensedLoRA(scaled, host_lora.license_of(lora))
        return io.NodeOutput(patched, licensed)


OR_ANOTHER = "or that of the node for another person."


class PlaceLoRA(io.ComfyNode):
    """A LoRA on a model, where the picture shows the person of some words."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DiffLoRA_PlaceLoRA",
            display_name="Place LoRA by Words",
            category=CATEGORY,
            description="Several people in one picture, without masks. Each LoRA acts where the "
            "picture shows the person that some words of the prompt name; the first steps find "
            "where that is. Use one of these nodes for each person, one after another.",
            search_aliases=["freefuse", "two people", "regional", "auto mask", "multiple lora"],
            inputs=[
                io.Model.Input("model", tooltip=f"The base model, {OR_ANOTHER}"),
                io.Clip.Input("clip", tooltip=f"The base model's CLIP, {OR_ANOTHER}"),
                sockets.lora_socket(),
                io.String.Input(
                    "words",
                    default="",
                    tooltip="Words of the positive prompt that name this person and nobody else, "
                    "just as they stand there: woman in a red dress.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-20.0,
                    max=20.0,
                    step=0.01,
                    tooltip="How strongly the LoRA acts. 0 leaves this person to the base model "
                    "and still keeps the others out of their place.",
                ),
                io.Float.Input(
                    "find_percent",
                    default=0.15,
                    min=0.0,
                    max=0.9,
                    step=0.01,
                    tooltip="The share of the steps in which the base model lays out the picture "
                    "and the people are found; then the LoRAs act. More finds people better, less "
                    "makes them more like themselves.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="To sample with."),
                io.Clip.Output(
                    display_name="clip",
                    tooltip="For CLIP Text Encode; it tells the model where the words stand.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, clip, lora, words, strength, find_percent):
        words = words.strip()
        marked = marking(clip, words)
        read = host_lora.read_lora(host_lora.check_lora(lora), model)
        if read.note:
            logger.warning(read.note)
            models.show_text(cls, read.note)
        made = read.adaptation(1.0, GroupStrengths(), model)
        if made is None:
            return io.NodeOutput(model.clone(), marked)
        applied = AppliedAdaptation(PreparedAdaptation(made), made.settings, strength)
        node_id = cls.hidden.unique_id
        link = Link(applied, node_id=node_id, place=words, find=find_percent)
        return io.NodeOutput(with_link(model, link), marked)


def _placed(model, read, strength, groups, span):
    """A clone of a model with a LoRA: in its weights, or beside its layers for a part of a run."""
    if span == (0.0, 1.0, False):
        return read.on(model, strength, groups)
    made = read.adaptation(strength, groups, model)
    if made is None:
        return model.clone()
    return with_link(model, Link(AppliedAdaptation(PreparedAdaptation(made), made.settings), *span))


NODES = [LoRAToHook, ApplyLoRA, PlaceLoRA]
