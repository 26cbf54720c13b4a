"""Existing LoRAs as identities."""

from comfy_api.latest import io, ui

from ..difflora_core.lora.formats.state_dict import from_state_dict
from ..difflora_core.training.difflora.latent_fit import fit_latent
from . import sockets
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
        report = f"{read.report.summary()}\nAgreement of the weights: {fitted.agreement:.0%}."
        models.show_text(cls, report)
        return io.NodeOutput(fitted.latent, fitted.agreement, report, ui=ui.PreviewText(report))
