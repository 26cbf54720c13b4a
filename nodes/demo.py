"""The demo world in one node."""

from comfy_api.latest import io

from ..difflora_core.demo import paths
from ..difflora_core.vision.face_encoder import InsightFaceEncoder
from . import model_paths, sockets
from .host import demo as host_demo
from .host import models


class LoadDemo(io.ComfyNode):
    """The whole demo world in one node."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DiffLoRA_LoadDemo",
            display_name="Load DiffLoRA Demo",
            category="DiffLoRA",
            description="A tiny base model of drawn faces (64 x 64 pixels) with its encoders and "
            "DiffLoRA model. It comes with the node pack and runs on any computer in seconds.",
            search_aliases=["difflora", "example", "tiny sdxl"],
            inputs=[
                io.Boolean.Input(
                    "word_by_word",
                    default=False,
                    optional=True,
                    tooltip="Without effect: the base reads every prompt word by word. It stays so "
                    "that older workflows open.",
                ),
                io.Combo.Input(
                    "preset",
                    options=list(paths.MODELS),
                    default="functional",
                    optional=True,
                    tooltip="How the DiffLoRA model was trained. functional: through the base "
                    "model, on people's photos; the best likeness. paper: as the DiffLoRA paper "
                    "has it, on the weights of a thousand people's LoRAs.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                io.Clip.Output(display_name="clip"),
                io.Vae.Output(display_name="vae"),
                io.ClipVision.Output(display_name="clip_vision"),
                sockets.FaceAnalysis.Output(display_name="face_analysis"),
                sockets.DiffLoRAModel.Output(display_name="difflora_model"),
                io.ControlNet.Output(
                    display_name="control_net",
                    tooltip="Puts a face where key points from Extract Identity Features are.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, word_by_word=False, preset="functional"):
        files, faces = model_paths.demo_paths(preset)
        return model_paths.fingerprint(*files, faces)

    @classmethod
    def execute(cls, word_by_word=False, preset="functional"):
        (base, vision, difflora, control), faces = model_paths.demo_paths(preset)
        return io.NodeOutput(
            host_demo.load_demo_unet(base),
            host_demo.load_demo_clip(base),
            host_demo.load_demo_vae(base),
            host_demo.load_demo_clip_vision(vision),
            InsightFaceEncoder(faces).analysis,
            models.host_model(str(difflora), difflora.name),
            host_demo.load_demo_controlnet(control),
        )
