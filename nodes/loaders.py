"""Loaders: a DiffLoRA checkpoint, a face analysis package, and a LoRA file as data."""

from pathlib import Path

import comfy.utils
from comfy_api.latest import io

from ..difflora_core.errors import LoRAFileError, shown
from ..difflora_core.lora.formats.state_dict import with_peft_alphas
from ..difflora_core.storage.identity_models import MODEL_FOLDERS
from ..difflora_core.storage.lora_file import read_lora_file
from ..difflora_core.vision.face_encoder import InsightFaceEncoder
from ..difflora_core.vision.face_providers import PROVIDERS
from . import model_paths, sockets
from .host import models
from .host.lora import LicensedLoRA, check_lora

CATEGORY = "DiffLoRA/loaders"


class LoadModel(io.ComfyNode):
    """A DiffLoRA model from models/difflora, or one of another project from its own folder."""

    @classmethod
    def define_schema(cls):
        folders = ", ".join(f"{k.title} in models/{'/'.join(k.place)}" for k in MODEL_FOLDERS)
        titles = [kind.title.lower() for kind in MODEL_FOLDERS]
        return io.Schema(
            node_id="DiffLoRA_LoadModel",
            display_name="Load DiffLoRA Model",
            category=CATEGORY,
            description="Loads a DiffLoRA model (.safetensors) from models/difflora, or another "
            f"project's folder as it is published: {folders}. Shows the licence where there is one "
            "that binds what the model makes.",
            search_aliases=["difflora checkpoint", "dit", "lae", *titles],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=model_paths.choices(model_paths.difflora_files(), "difflora"),
                    tooltip="A file in models/difflora, or another project's folder as it is "
                    "published; press R after adding one.",
                )
            ],
            outputs=[sockets.DiffLoRAModel.Output(display_name="difflora_model")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, model_name=None):
        return model_paths.problem(model_paths.difflora_file, model_name)

    @classmethod
    def fingerprint_inputs(cls, model_name=None):
        return model_paths.fingerprint(model_paths.difflora_file(model_name))

    @classmethod
    def execute(cls, model_name):
        hosted = models.host_model(model_paths.difflora_file(model_name), model_name)
        if hosted.settings.license:
            models.show_text(cls, hosted.settings.license)
        return io.NodeOutput(hosted)


class LoadFaceAnalysis(io.ComfyNode):
    """An insightface package from models/insightface."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DiffLoRA_LoadFaceAnalysis",
            display_name="Load Face Analysis",
            category=CATEGORY,
            description="Loads an insightface package from models/insightface/models/<name>. "
            "Nothing is downloaded. Mind the licence of the package you use.",
            search_aliases=["insightface", "antelopev2", "buffalo_l", "face detector"],
            inputs=[
                io.Combo.Input(
                    "package",
                    options=model_paths.choices(
                        model_paths.insightface_packages(), "insightface/models"
                    ),
                    tooltip="A folder in models/insightface/models; the one the DiffLoRA model "
                    "was trained with. Press R after adding one.",
                ),
                io.Combo.Input(
                    "provider",
                    options=list(PROVIDERS),
                    default="cpu",
                    tooltip="Where onnxruntime runs it; falls back to the CPU and says so in the "
                    "log. The CPU is fast enough and keeps video memory free.",
                ),
            ],
            outputs=[sockets.FaceAnalysis.Output(display_name="face_analysis")],
        )

    @classmethod
    def validate_inputs(cls, package=None):
        return model_paths.problem(model_paths.insightface_package, package)

    @classmethod
    def fingerprint_inputs(cls, package=None, provider=None):
        return provider, model_paths.fingerprint(model_paths.insightface_package(package))

    @classmethod
    def execute(cls, package, provider):
        folder = model_paths.insightface_package(package)
        return io.NodeOutput(InsightFaceEncoder(folder, package, provider).analysis)


class LoadLoRAFile(io.ComfyNode):
    """A LoRA file as data, not applied to anything."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DiffLoRA_LoadLoRAFile",
            display_name="Load LoRA File",
            category=CATEGORY,
            description="Reads a LoRA file from models/loras without applying it, for the nodes "
            "that take a LoRA: LoRA to Hook, Encode LoRA, Apply LoRA by Part and Time.",
            search_aliases=["load lora", "lora model", "old lora", "import lora"],
            inputs=[
                io.Combo.Input(
                    "lora_name",
                    options=model_paths.choices(model_paths.lora_files(), "loras"),
                    tooltip="A file in models/loras; press R after adding one. The demo's own "
                    "LoRA stands last.",
                )
            ],
            outputs=[io.LoraModel.Output(display_name="lora")],
        )

    @classmethod
    def validate_inputs(cls, lora_name=None):
        return model_paths.problem(model_paths.lora_file, lora_name)

    @classmethod
    def fingerprint_inputs(cls, lora_name=None):
        return model_paths.fingerprint(model_paths.lora_file(lora_name))

    @classmethod
    def execute(cls, lora_name):
        path = Path(model_paths.lora_file(lora_name))
        if path.suffix.lower() in (".safetensors", ".sft"):
            file = read_lora_file(path)
            state = with_peft_alphas(file.tensors, file.metadata)
            return io.NodeOutput(LicensedLoRA(state, file.metadata.get("modelspec.license", "")))
        try:
            state = comfy.utils.load_torch_file(str(path), safe_load=True)
        except Exception as error:  # whatever torch says of a pickle that it does not read
            raise LoRAFileError(f"{path.name} cannot be read: {shown(str(error), 300)}") from error
        return io.NodeOutput(with_peft_alphas(check_lora(state), None))
