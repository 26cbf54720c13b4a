"""Likeness in numbers, and pictures side by side."""

from comfy_api.latest import io, ui

from ..difflora_core.evaluation.grid import compare_grid
from ..difflora_core.evaluation.likeness import compare_people, likeness_picture
from . import sockets
from .host import encoders

CATEGORY = "DiffLoRA/compare"


class CompareIdentities(io.ComfyNode):
    """Are these pictures of that person?"""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DiffLoRA_CompareIdentities",
            display_name="Compare Identities",
            category=CATEGORY,
            description="Says how much the face of each picture looks like the person of the "
            "references: about 1 is the same face, about 0 a stranger. The face analysis that the "
            "LoRA was made with is a lenient judge; another one is a fairer judge.",
            search_aliases=["face similarity", "likeness", "identity score", "face distance"],
            inputs=[
                io.Image.Input("references", tooltip="Pictures of one person."),
                io.Image.Input("pictures", tooltip="Pictures to compare with that person."),
                sockets.face_analysis(),
                io.Image.Input(
                    "other_photos",
                    optional=True,
                    tooltip="Photos of the same person that the LoRA was not made from: then the "
                    "report also says whether the pictures repeat the references (copy-paste) "
                    "rather than show the person.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="picture", tooltip="References and labelled pictures."
                ),
                io.Float.Output(
                    display_name="similarity", tooltip="Mean over the pictures that show a face."
                ),
                io.String.Output(display_name="report", tooltip="One line for each picture."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, references, pictures, face_analysis, other_photos=None):
        more = 0 if other_photos is None else len(other_photos)
        faces = encoders.watched_faces(face_analysis, len(references) + len(pictures) + more)
        likeness = compare_people(references, pictures, faces, other_photos)
        picture = likeness_picture(references, pictures, likeness)[None]
        shown = ui.PreviewImage(picture, cls=cls)
        return io.NodeOutput(picture, likeness.mean, likeness.report(), ui=shown)


class CompareGrid(io.ComfyNode):
    """A reference and its variants."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DiffLoRA_CompareGrid",
            display_name="Compare Grid",
            category=CATEGORY,
            description="One picture that shows a reference at the left and variants beside it, "
            "each with a label. Join batches with core's image batch nodes.",
            search_aliases=["xy plot", "contact sheet", "side by side", "image grid"],
            inputs=[
                io.Image.Input("variants", tooltip="The pictures, in their order."),
                io.Image.Input(
                    "reference",
                    optional=True,
                    tooltip="What they are compared with; the first picture of a batch is shown.",
                ),
                io.String.Input(
                    "labels",
                    default="",
                    multiline=True,
                    tooltip="One line for each variant; missing ones are numbered.",
                ),
                io.Int.Input(
                    "columns",
                    default=4,
                    min=1,
                    max=32,
                    tooltip="Variants beside each other.",
                ),
                io.Int.Input(
                    "side",
                    default=192,
                    min=32,
                    max=2048,
                    step=8,
                    tooltip="Height of each picture in pixels.",
                ),
            ],
            outputs=[io.Image.Output(display_name="grid")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, variants, labels, columns, side, reference=None):
        grid = compare_grid(variants, reference, labels.splitlines(), columns, side)[None]
        return io.NodeOutput(grid, ui=ui.PreviewImage(grid, cls=cls))
