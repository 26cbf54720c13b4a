"""Train Identity LoRA: photos of a person in, a LoRA out; from nothing, or on from any LoRA."""

import time
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from comfy_api.latest import io

from ..difflora_core.diffusion.objective import LossWeight
from ..difflora_core.errors import LayoutError, LoRAFileError
from ..difflora_core.lora.block_groups import GroupStrengths
from ..difflora_core.lora.formats.state_dict import to_state_dict
from ..difflora_core.lora.layout import TARGETS
from ..difflora_core.methods.lora import lora_weights
from ..difflora_core.storage.lora_file import LoRAInfo, write_lora_file
from ..difflora_core.training.loop_config import Schedule
from ..difflora_core.training.lora.objective import LoRAObjective, LoRATraining
from ..difflora_core.vision.face_choice import FaceOptions
from . import sockets
from .host import lora as host_lora
from .host import training, training_widgets
from .host.base import check_trainable, picture_size, unet_layout
from .host.photo_request import ClassPictures, PhotoRequest
from .host.run_files import run_file
from .host.training_request import Parts

BOTH, UP = "both", "up"
"""Which factors are trained."""


class TrainLoRA(io.ComfyNode):
    """Photos in, LoRA out."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DiffLoRA_TrainLoRA",
            display_name="Train Identity LoRA",
            category="DiffLoRA",
            description="Trains a LoRA of a person on one photo to a few hundred, of any sizes; or "
            "trains one on, for example what Personalize predicts. It is kept in models/loras. "
            "Stopping keeps the best so far; queueing again goes on, also after a restart.",
            search_aliases=["dreambooth", "fine-tune", "kohya", "train lora", "refine lora"],
            is_input_list=True,  # photos of many sizes come as a list
            inputs=[
                *training_widgets.base_sockets()[:3],
                *_photos(),
                *_course(),
                *_method(),
                *_pictures_of(),
                *training_widgets.memory_widgets(optional=False),
                *_optional(),
            ],
            outputs=[
                io.LoraModel.Output(display_name="lora", tooltip="For Load LoRA Model."),
                io.String.Output(
                    display_name="report", tooltip="File, steps, loss, and what became of photos."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        images,
        captions,
        trigger,
        steps,
        rank,
        learning_rate,
        batch_size,
        seed,
        file_name,
        layers,
        factors,
        schedule,
        loss,
        even_steps,
        resolution,
        mirror,
        held_out,
        prior_weight,
        prior_prompt,
        on_missing_face,
        face_order,
        face_index,
        accumulate,
        memory,
        start_lora=None,
        face_analysis=None,
        masks=None,
        prior_images=None,
    ):
        inputs = {name: value for name, value in locals().items() if name != "cls"}
        given = {name: values[0] for name, values in inputs.items() if values}  # all are lists
        check_trainable(given["model"])
        start, note = _start(inputs)
        config = _config(given)
        request = _request(inputs, given)
        parts = Parts(given["model"], given["clip"], given["vae"])
        recipe, began = partial(LoRAObjective, start=start), time.monotonic()
        done = training.run(recipe, config, request, parts, given["memory"])
        seconds = time.monotonic() - began
        weights = lora_weights(done.result.adaptations[0])
        path = _write(done, weights, config, request, parts)
        size = path.stat().st_size / 2**20
        facts = [f"{path.name}: {size:.1f} MiB in {seconds:.0f} s", *filter(None, [note])]
        report = training.finished(done, facts, request.file_name, [path])
        return io.NodeOutput(to_state_dict(weights), report)


def _photos() -> list[io.Input]:
    """Who is learned, and how prompts call the person."""
    return [
        io.Image.Input(
            "images",
            tooltip="Photos of one person: a batch, or a list of any sizes from a folder "
            "loader. They are brought to the size that the model draws.",
        ),
        io.String.Input(
            "captions",
            default="photo of a person",
            multiline=True,
            tooltip="What the photos show, one caption a line. As many as photos: one "
            "each, in their order; fewer: each photo is trained with any of them. A list "
            "of texts from a folder loader fits too.",
        ),
        io.String.Input(
            "trigger",
            default="",
            tooltip="A word that calls the person, for example ohwx; it is put before "
            "every caption that lacks it. Empty: none.",
        ),
    ]


def _course() -> list[io.Input]:
    """How long and how hard to train, and where to keep it."""
    return [
        io.Int.Input("steps", default=1000, min=1, max=100_000, tooltip="Training steps."),
        io.Int.Input(
            "rank",
            default=16,
            min=1,
            max=1024,
            tooltip="Size of the LoRA. Higher: more faithful, a larger file.",
        ),
        io.Float.Input(
            "learning_rate",
            default=0.0001,
            min=0.0000001,
            max=10.0,
            step=0.0001,
            round=0.0000001,
            tooltip="0.0001 for SDXL; to refine a prediction 0.0001 to 0.002.",
        ),
        training_widgets.batch_size_widget(1, "Pictures in each step."),
        training_widgets.seed_widget("start, noise and order of photos"),
        training_widgets.file_name_widget("my_person", PhotoRequest.folder),
    ]


def _method() -> list[io.Input]:
    """What is trained, and by which loss; seldom changed."""
    return [
        io.Combo.Input(
            "layers",
            options=list(TARGETS),
            default=LoRATraining.targets,
            advanced=True,
            tooltip="Where: attention, as most LoRAs; transformer, with feed-forward layers; with "
            "convolutions (LoCon), which also learn texture; all: with both.",
        ),
        io.Combo.Input(
            "factors",
            options=[BOTH, UP],
            default=BOTH,
            advanced=True,
            tooltip="both: the usual; up: half the numbers, only to train on from a LoRA, which "
            "then stays nearer to it.",
        ),
        io.Combo.Input(
            "schedule",
            options=list(get_args(Schedule)),
            default=LoRATraining.schedule,
            advanced=True,
            tooltip="Course of the learning rate after a short rise.",
        ),
        io.Combo.Input(
            "loss",
            options=list(get_args(LossWeight)),
            default=LoRATraining.weighting,
            advanced=True,
            tooltip="Which noise counts most: min_snr, as most trainers; high_noise: likeness and "
            "layout; uniform: detail.",
        ),
        io.Boolean.Input(
            "even_steps",
            default=False,
            advanced=True,
            tooltip="Every step moves the LoRA by the same, however wrong the model was. For a "
            "few dozen steps, as in refining.",
        ),
    ]


def _pictures_of() -> list[io.Input]:
    """What becomes of the photos, and of class pictures; seldom changed."""
    return [
        io.Int.Input(
            "resolution",
            default=0,
            min=0,
            max=4096,
            step=8,
            advanced=True,
            tooltip="Side in pixels of the square whose area training pictures have; their shape "
            "stays nearly as it is. 0: what the model was made for (1024 for SDXL).",
        ),
        training_widgets.mirror_widget(
            "Also train on mirrored photos. Turn it off for a face that is not even."
        ),
        training_widgets.held_out_widget(
            "photos", ". With fewer than 8 photos, or at 0, all are trained on."
        ),
        io.Float.Input(
            "prior_weight",
            default=1.0,
            min=0.01,
            max=10.0,
            step=0.01,
            advanced=True,
            tooltip="How much prior_images count against the photos.",
        ),
        io.String.Input(
            "prior_prompt",
            default="photo of a person",
            advanced=True,
            tooltip="The prompt that prior_images were drawn with.",
        ),
        *sockets.face_widgets(missing="skip")[:3],
    ]


def _optional() -> list[io.Input]:
    """What may be connected."""
    return [
        io.MultiType.Input(
            "start_lora",
            types=sockets.LORA_TYPES,
            optional=True,
            tooltip="A LoRA to train on: from Personalize, Load LoRA File, or another node.",
        ),
        io.MultiType.Input(
            "face_analysis",
            types=sockets.FACE_TYPES,
            optional=True,
            tooltip="Finds the face: photos where it is small are also trained on as a square "
            "around it, and photos without one are left out. Without it whole photos count.",
        ),
        io.Mask.Input(
            "masks",
            optional=True,
            tooltip="Where the person is, one for all photos or one each; the rest does not count. "
            "An empty one marks nothing.",
        ),
        io.Image.Input(
            "prior_images",
            optional=True,
            tooltip="Pictures of other people, best drawn by this model with prior_prompt: they "
            "are to stay what they are (prior preservation). Ten to a few hundred.",
        ),
    ]


def _config(given: dict) -> LoRATraining:
    """The recipe's settings."""
    steps = given["steps"]
    return LoRATraining(
        steps=steps,
        batch=given["batch_size"],
        weighting=given["loss"],
        evaluate_every=max(1, min(LoRATraining.evaluate_every, steps // 2)),
        seed=given["seed"],
        accumulate=given["accumulate"],
        learning_rate=given["learning_rate"],
        schedule=given["schedule"],
        warmup=min(LoRATraining.warmup, steps // 10),
        rank=given["rank"],
        targets=given["layers"],
        train_down=given["factors"] == BOTH,
        normalise_gradient=given["even_steps"],
    )


def _start(inputs: dict):
    """The LoRA to train on, in the library's form, and a note of what it holds beside that."""
    if not inputs.get("start_lora"):
        return None, ""
    state, model = host_lora.check_lora(inputs["start_lora"][0]), inputs["model"][0]
    read = host_lora.read_lora(state, model)
    adaptation = read.adaptation(1.0, GroupStrengths(), model)
    if adaptation is None:
        raise LoRAFileError("start_lora changes no layer of this model. Connect another, or none.")
    try:
        return lora_weights(adaptation), read.note
    except LayoutError as error:
        raise LayoutError(
            f"Only a LoRA of plain factors can be trained on, not LoHa, LoKr or changed norms; "
            f"start from another one, or from none. ({error})"
        ) from error


def _request(inputs: dict, given: dict) -> PhotoRequest:
    """Photos, captions and file."""
    texts = inputs["captions"]
    lines = texts[0].split("\n") if len(texts) == 1 else texts
    captions = tuple(" ".join(line.split()) for line in lines)
    images, prior = _pictures(inputs["images"]), None
    if len(texts) == 1 or len(texts) != len(images):  # they are not one each
        captions = tuple(filter(None, captions))
    if inputs.get("prior_images"):
        others = _pictures(inputs["prior_images"])
        prior = ClassPictures(others, given["prior_prompt"], given["prior_weight"])
    return PhotoRequest(
        images=images,
        masks=_pictures(inputs["masks"]) if inputs.get("masks") else None,
        captions=captions,
        trigger=given["trigger"],
        file_name=given["file_name"],
        resolution=given["resolution"] or picture_size(given["model"]),
        mirror=given["mirror"],
        held_out=given["held_out"],
        faces=given.get("face_analysis"),
        options=FaceOptions(
            given["face_order"], given["face_index"], on_missing=given["on_missing_face"]
        ),
        prior=prior,
    )


def _pictures(batches) -> list:
    """Pictures or masks of several batches, one by one, in tensors that training may keep."""
    with torch.inference_mode(False):
        return [one.clone() for batch in batches for one in batch]


def _write(done, weights, config: LoRATraining, request: PhotoRequest, parts: Parts) -> Path:
    """The LoRA's file, with what it was trained by."""
    path = run_file(done.folder, request.folder, request.file_name)
    layout = unet_layout(parts.model, parts.base_name, config.rank, tuple(weights))
    info = LoRAInfo(
        title=path.stem,
        description="LoRA trained on photos by DiffLoRA.",
        seed=config.seed,
        trigger_words=tuple(filter(None, [request.trigger.strip()])),
        method="DreamBooth",
        train_steps=config.steps,
        train_pictures=len(request.images),
        learning_rate=config.learning_rate,
    )
    with torch.inference_mode(False):
        return write_lora_file(path, weights, layout, info)


NODES = [TrainLoRA]
