"""Photos to identity features."""

import torch
from comfy_api.latest import io, ui

from ..difflora_core.vision.face_choice import FaceOptions
from ..difflora_core.vision.features import ImageFeatures
from . import sockets
from .host import encoders

CATEGORY = "DiffLoRA/steps"
CHOSEN, EVERY = "chosen", "all"


class ExtractFeatures(io.ComfyNode):
    """Face and image features of the photos of one person."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DiffLoRA_ExtractFeatures",
            display_name="Extract Identity Features",
            category=CATEGORY,
            description="Finds the person in every photo and describes face and look. All photos "
            "must show the same person; chain two of these for photos of different sizes.",
            search_aliases=["faceid", "embeds", "insightface", "reference", "identity"],
            inputs=[
                io.Image.Input("images", tooltip="One photo or a batch of photos of one person."),
                *sockets.photo_sockets(),
                sockets.Features.Input(
                    "features",
                    optional=True,
                    tooltip="More photos of the same person, from another of these nodes.",
                ),
                *sockets.face_widgets(),
                io.Float.Input(
                    "region_factor",
                    default=2.2,
                    min=1.0,
                    max=10.0,
                    step=0.1,
                    advanced=True,
                    tooltip="Side of the crop over the side of the face; 2.2 holds hair and neck.",
                ),
                io.Combo.Input(
                    "faces",
                    options=[CHOSEN, EVERY],
                    default=CHOSEN,
                    optional=True,
                    advanced=True,
                    tooltip="chosen: the one face of each photo; all: every face, in that order, "
                    "as a batch. For a LoRA of one of several people leave it at chosen.",
                ),
            ],
            outputs=[
                sockets.Features.Output(display_name="features"),
                io.Image.Output(display_name="crops", tooltip="What CLIP vision saw."),
                io.Mask.Output(
                    display_name="face_masks", tooltip="The box of each face, in the whole photo."
                ),
                io.Image.Output(
                    display_name="keypoints",
                    tooltip="Eyes, nose and mouth corners of each photo as coloured points on "
                    "black, for a face ControlNet such as InstantID's.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        images,
        on_missing_face,
        face_order,
        face_index,
        image_region,
        region_factor,
        clip_vision=None,
        face_analysis=None,
        mask=None,
        features=None,
        faces=CHOSEN,
    ):
        choice = (face_order, face_index, on_missing_face, image_region, region_factor)
        options = FaceOptions(*choice, every=faces == EVERY)
        found = encoders.read_photos(cls, images, clip_vision, face_analysis, mask, options)
        record = found.features
        if features is not None:
            record = ImageFeatures.cat([features, record])
        masks, points = torch.stack(found.face_masks), torch.stack(found.keypoint_pictures())
        shown = ui.PreviewImage(found.crops, cls=cls)
        return io.NodeOutput(record, found.crops, masks, points, ui=shown)
