"""LoRAs as files and as identities: to keep one for other programs, and to encode one."""

from comfy_api.latest import io, ui

from ..difflora_core.errors import LoRAFileError, percent
from ..difflora_core.lora.formats.state_dict import from_state_dict
from ..difflora_core.storage.lora_file import PRECISIONS, LoRAInfo, base_of, write_lora_state
from ..difflora_core.training.difflora.latent_fit import NATIVE, fit_latent
from . import model_paths, sockets
from .host import lora as host_lora
from .host import models


class EncodeLoRA(io.ComfyNode):
    """A LoRA to a latent."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DiffLoRA_EncodeLoRA",
            display_name="Encode LoRA",
            category="DiffLoRA/identities",
            description="Turns an existing LoRA of a person into an identity of a few hundred "
            "numbers, to blend, vary or keep it; says how much of the LoRA is left.",
            search_aliases=["lae", "lora to latent", "compress lora", "import lora", "invert"],
            inputs=[
                sockets.difflora_model(),
                sockets.lora_socket(),
                io.Int.Input(
                    "refine_steps",
                    default=100,
                    min=0,
                    max=2000,
                    tooltip="Steps that look for the nearest LoRA that the model can make; a LoRA "
                    "that was trained elsewhere keeps the encoder's answer, and so does 0.",
                ),
            ],
            outputs=[
                sockets.Latent.Output(display_name="identity"),
                io.Float.Output(
                    display_name="kept",
                    tooltip="Agreement of the weights, 1 the same, 0 nothing in common. A trained "
                    "LoRA agrees little even where the person is kept.",
                ),
                io.String.Output(
                    display_name="report", tooltip="What was read, what was lost, in words."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, difflora_model, lora, refine_steps):
        network = difflora_model.ready()
        read = from_state_dict(host_lora.check_lora(lora), network.layout)
        fitted = fit_latent(network, read.weights, refine_steps, models.progress(refine_steps))
        report = f"{read.report.summary()}\nAgreement of the weights: {percent(fitted.agreement)}."
        if fitted.agreement < NATIVE:
            report += f" {LOST} {MORE_STEPS if refine_steps < ENOUGH else TRAINED}"
        models.show_text(cls, report)
        return io.NodeOutput(fitted.latent, fitted.agreement, report, ui=ui.PreviewText(report))


ENOUGH = 100  # refinement steps after which more change little
LOST = "The person may be lost: draw a picture before you keep the identity."
MORE_STEPS = f"Set refine_steps to {ENOUGH} if DiffLoRA made this LoRA."
TRAINED = "A LoRA that was trained elsewhere agrees little."
ABOUT = "One or two sentences on who or what it shows."
TRIGGERS = "Words that a prompt needs for it, with commas between. A DiffLoRA identity needs none."
AUTO, BASES = "auto", ("sdxl", "sd15", "sd21", "demo")


class SaveLoRA(io.ComfyNode):
    """A LoRA in a file that says what it is."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DiffLoRA_SaveLoRA",
            display_name="Save LoRA with Details",
            category="DiffLoRA/placing",
            description="Keeps a LoRA in models/loras, in half precision, with what LoRA managers "
            "show: title, base model, trigger words, tags, strength. No face, no photo and no "
            "file name of one is in it.",
            search_aliases=["export lora", "metadata", "trigger words", "fp16 lora"],
            is_output_node=True,
            inputs=[
                sockets.lora_socket(),
                io.String.Input(
                    "file_name",
                    default="person",
                    tooltip="Name of the file in models/loras; a number follows when it is taken.",
                ),
                io.String.Input("title", default="", tooltip="Empty: the name of the file."),
                io.String.Input("trigger_words", default="", tooltip=TRIGGERS),
                io.String.Input("tags", default="", tooltip="With commas between."),
                io.Float.Input(
                    "advised_strength",
                    default=1.0,
                    min=-20.0,
                    max=20.0,
                    step=0.01,
                    tooltip="What others should set; it does not change the LoRA.",
                ),
                io.String.Input(
                    "description", default="", multiline=True, advanced=True, tooltip=ABOUT
                ),
                io.String.Input(
                    "method", default="DiffLoRA", advanced=True, tooltip="How it was made."
                ),
                io.Combo.Input(
                    "base_model",
                    options=[AUTO, *BASES],
                    default=AUTO,
                    advanced=True,
                    tooltip="What it is made for; auto reads it off the width of its layers.",
                ),
                precision_widget(),
            ],
            outputs=[io.String.Output(display_name="lora_name", tooltip="As it stands in lists.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        lora,
        file_name,
        title,
        trigger_words,
        tags,
        advised_strength,
        description,
        method,
        base_model,
        precision,
    ):
        state = host_lora.check_lora(lora)
        base = base_of(state) if base_model == AUTO else base_model
        if base is None:
            raise LoRAFileError(
                "What this LoRA is made for cannot be read off its layers: choose the base model."
            )
        info = LoRAInfo(
            *(title.strip() or file_name, description.strip()),
            trigger_words=_words(trigger_words),
            tags=_words(tags),
            method=method.strip(),
            strength=advised_strength,
            license=host_lora.license_of(lora),
        )
        path = model_paths.unused_file("loras", file_name)
        write_lora_state(path, state, base, info, PRECISIONS[precision])
        text = f"Saved as {path.name}, {path.stat().st_size / 2**20:.1f} MB. Press R to list it."
        text = "\n".join(filter(None, (text, info.license)))
        models.show_text(cls, text)
        return io.NodeOutput(path.name, ui=ui.PreviewText(text))


def precision_widget():
    """How finely the numbers of a file are written."""
    return io.Combo.Input(
        "precision",
        options=list(PRECISIONS),
        default="float16",
        advanced=True,
        tooltip="float16 is usual; bfloat16 and float32 hold larger numbers.",
    )


def _words(text):
    """Words with commas between, without empty ones."""
    return tuple(word.strip() for word in text.split(",") if word.strip())
