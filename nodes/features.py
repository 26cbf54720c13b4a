"""Photos to identity features."""

import torch
from comfy_api.latest import io, ui

from ..difflora_core.errors import counted
from ..difflora_core.evaluation.face_list import face_sheet, list_faces
from ..difflora_core.storage.features_file import read_features, write_features
from ..difflora_core.vision.face_choice import FaceOptions
from ..difflora_core.vision.features import ImageFeatures
from ..difflora_core.vision.photo_weights import read_weights, weighted
from . import model_paths, sockets
from .host import encoders, models

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
                sockets.region_factor_widget(),
                io.Combo.Input(
                    "faces",
                    options=[CHOSEN, EVERY],
                    default=CHOSEN,
                    optional=True,
                    advanced=True,
                    tooltip="chosen: the one face of each photo; all: every face, in that order, "
                    "as a batch. For a LoRA of one of several people leave it at chosen.",
                ),
                sockets.weights_widget(),
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
        weights="",
    ):
        shares = read_weights(weights)
        choice = (face_order, face_index, on_missing_face, image_region, region_factor)
        options = FaceOptions(*choice, every=faces == EVERY)
        found = encoders.read_photos(cls, images, clip_vision, face_analysis, mask, options, shares)
        record = weighted(found.features, found.of_photos(shares, len(images)))
        if features is not None:
            record = ImageFeatures.cat([features, record])
        masks, points = torch.stack(found.face_masks), torch.stack(found.keypoint_pictures())
        shown = ui.PreviewImage(found.crops, cls=cls)
        return io.NodeOutput(record, found.crops, masks, points, ui=shown)


class FindFaces(io.ComfyNode):
    """Who is on the photos, with numbers to choose by."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DiffLoRA_FindFaces",
            display_name="Find Faces",
            category=CATEGORY,
            description="Shows every face of the photos with its number: set that as face_index "
            "in Personalize, Extract Identity Features or Train Identity LoRA.",
            search_aliases=["face picker", "choose face", "face detector", "face index", "crop"],
            inputs=[
                io.Image.Input("images", tooltip="One photo or a batch of photos."),
                sockets.face_analysis(),
                sockets.face_order_widget(),
                sockets.region_factor_widget(),
            ],
            outputs=[
                io.Image.Output(display_name="sheet", tooltip="The faces with their numbers."),
                io.Image.Output(display_name="crops", tooltip="One picture for each face."),
                io.String.Output(display_name="report", tooltip="One line for each face."),
                io.Int.Output(display_name="count", tooltip="How many faces were found."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, images, face_analysis, face_order, region_factor):
        faces = encoders.watched_faces(face_analysis, len(images))
        found = list_faces(images, faces, face_order, region_factor)
        sheet = face_sheet(found)[None]
        crops = torch.stack([face.crop for face in found]) if found else sheet
        report = "\n".join(face.line for face in found) or "No face was found."
        return io.NodeOutput(sheet, crops, report, len(found), ui=ui.PreviewImage(sheet, cls=cls))


class SaveFeatures(io.ComfyNode):
    """Features for later."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DiffLoRA_SaveFeatures",
            display_name="Save Identity Features",
            category=CATEGORY,
            description="Keeps what the encoders saw of a person in models/difflora_features, to "
            "be used again without photos and encoders. The file identifies the person: keep it "
            "like a photo.",
            search_aliases=["save embeds", "faceid embeds", "store features"],
            is_output_node=True,
            inputs=[
                sockets.Features.Input(
                    "features", tooltip="From Extract Identity Features, or of several of them."
                ),
                io.String.Input(
                    "file_name",
                    default="person",
                    tooltip="Name of the file in models/difflora_features; a number is added "
                    "rather than a file replaced.",
                ),
            ],
            outputs=[io.String.Output(display_name="name", tooltip="Of the file.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, features, file_name):
        path = model_paths.unused_file(model_paths.FEATURES, file_name)
        write_features(path, features)
        report = f"{path.name}: {counted(len(features), 'photo')}. Press R to see it in the list."
        models.show_text(cls, report)
        return io.NodeOutput(path.name, ui=ui.PreviewText(report))


class LoadFeatures(io.ComfyNode):
    """Features of before."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DiffLoRA_LoadFeatures",
            display_name="Load Identity Features",
            category=CATEGORY,
            description="What Save Identity Features kept of a person: no photo and no encoder is "
            "needed.",
            search_aliases=["load embeds", "faceid embeds", "features from file"],
            inputs=[
                io.Combo.Input(
                    "features_name",
                    options=model_paths.choices(model_paths.feature_files(), model_paths.FEATURES),
                    tooltip="A file in models/difflora_features; press R after saving one.",
                )
            ],
            outputs=[sockets.Features.Output(display_name="features")],
        )

    @classmethod
    def validate_inputs(cls, features_name=None):
        return model_paths.problem(model_paths.feature_file, features_name)

    @classmethod
    def fingerprint_inputs(cls, features_name=None):
        return model_paths.fingerprint(model_paths.feature_file(features_name))

    @classmethod
    def execute(cls, features_name):
        return io.NodeOutput(read_features(model_paths.feature_file(features_name)))
