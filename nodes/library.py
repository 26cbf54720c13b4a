"""The identity library: add, list, pick."""

from comfy_api.latest import io, ui

from ..difflora_core.evaluation.grid import contact_sheet
from ..difflora_core.storage.identity_library import SAME_NAME, add_people, numbered
from ..difflora_core.storage.library_file import read_library
from ..difflora_core.storage.thumbnail import make_thumbnails, read_thumbnail
from . import model_paths, sockets
from .host import models

CATEGORY = "DiffLoRA/library"


def library_widget() -> io.Input:
    """The library by name; a text, so that a file made a moment ago needs no refresh."""
    return io.String.Input(
        "library",
        default="people",
        tooltip="Name of a library in models/difflora_library, without the ending .safetensors.",
    )


class AddToLibrary(io.ComfyNode):
    """Keeps identities."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DiffLoRA_AddToLibrary",
            display_name="Add to Identity Library",
            category=CATEGORY,
            description="Keeps a person, or a batch of them, under a name in one small file with "
            "many others. The file is made when it is not there.",
            search_aliases=["save identity", "save latent", "store person", "collection", "cast"],
            is_output_node=True,
            inputs=[
                sockets.difflora_model(),
                sockets.identity("identity", "The person to keep, or a batch of people."),
                library_widget(),
                io.String.Input(
                    "name", default="person", tooltip="The person's name. A batch is numbered."
                ),
                io.Combo.Input(
                    "same_name",
                    options=list(SAME_NAME),
                    default=SAME_NAME[0],
                    tooltip="When the name is taken: put a number after it, replace the old one, "
                    "or refuse.",
                ),
                io.Image.Input(
                    "thumbnail",
                    optional=True,
                    tooltip="A picture of the person for the contact sheet, or one for each of a "
                    "batch. Its middle square is kept, 96 pixels wide.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="library"),
                io.String.Output(
                    display_name="name", tooltip="The name given; one line for each of a batch."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, difflora_model, identity, library, name, same_name, thumbnail=None):
        difflora_model.settings.check_latent(identity)
        given = add_people(
            model_paths.new_library_file(library),
            identity,
            numbered(name, len(identity)),
            make_thumbnails(thumbnail, len(identity)),
            model_name=difflora_model.name,
            same_name=same_name,
        )
        names = "\n".join(given)
        report = f"Added to {library}:\n{names}"
        models.show_text(cls, report)
        return io.NodeOutput(library, names, ui=ui.PreviewText(report))


class ListLibrary(io.ComfyNode):
    """Shows who is there."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DiffLoRA_ListLibrary",
            display_name="List Identity Library",
            category=CATEGORY,
            description="The names in an identity library and a contact sheet of its pictures.",
            search_aliases=["contact sheet", "browse identities", "show library", "gallery"],
            is_output_node=True,
            inputs=[
                library_widget(),
                io.Int.Input(
                    "first", default=1, min=1, max=100_000, tooltip="Number of the first person."
                ),
                io.Int.Input(
                    "count", default=48, min=1, max=200, tooltip="How many people to show."
                ),
                io.Int.Input(
                    "columns",
                    default=8,
                    min=1,
                    max=20,
                    advanced=True,
                    tooltip="How many pictures stand side by side.",
                ),
            ],
            outputs=[
                io.String.Output(
                    display_name="names", tooltip="All names of the library, one in each line."
                ),
                io.Image.Output(display_name="contact_sheet"),
                io.Int.Output(display_name="count", tooltip="How many people the library holds."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, library, first, count, columns):
        return first, count, columns, model_paths.library_state(library)

    @classmethod
    def execute(cls, library, first, count, columns):
        found = read_library(model_paths.library_file(library))
        sheet = contact_sheet(found, first, count, columns)[None]
        names = "\n".join(found.names)
        return io.NodeOutput(names, sheet, len(found), ui=ui.PreviewImage(sheet, cls=cls))


class PickFromLibrary(io.ComfyNode):
    """Takes a person out for use."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DiffLoRA_PickFromLibrary",
            display_name="Pick from Identity Library",
            category=CATEGORY,
            description="Takes a person from an identity library by name or number.",
            search_aliases=["load identity", "load latent", "choose person", "cast"],
            inputs=[
                library_widget(),
                io.String.Input(
                    "name", default="", tooltip="The person's name; leave it empty to go by number."
                ),
                io.Int.Input(
                    "number",
                    default=1,
                    min=1,
                    max=100_000,
                    tooltip="The person's number in the library, from 1, when the name is empty.",
                ),
            ],
            outputs=[
                sockets.Latent.Output(display_name="identity"),
                io.String.Output(display_name="name"),
                io.Image.Output(
                    display_name="thumbnail", tooltip="The person's small picture; grey if none."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, library, name, number):
        return name, number, model_paths.library_state(library)

    @classmethod
    def execute(cls, library, name, number):
        found = read_library(model_paths.library_file(library))
        row = found.find(name, number)
        picture = read_thumbnail(found.people[row].picture)[None]
        shown = ui.PreviewImage(picture, cls=cls)
        return io.NodeOutput(found.latent(row), found.names[row], picture, ui=shown)
