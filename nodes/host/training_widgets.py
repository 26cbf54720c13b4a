"""Inputs and outputs that the training nodes share, each widget in one place."""

from comfy_api.latest import io

from ...difflora_core.training.loop_config import MAX_TRAINING_SEED
from .. import model_paths, sockets
from .memory import AUTO, CHOICES
from .picture_folders import picture_folders

MASKS = (
    "Where the concept is: one mask for all pictures or one each, for example from a segmentation "
    "node. Without masks, or with none painted, the whole pictures count; an empty one among "
    "others is refused."
)


def picture_sockets() -> list[io.Input]:
    """Base model, pictures and what a new word needs."""
    return [
        *base_sockets(),
        sockets.Covariance.Input("covariance", tooltip="From Build Covariance, with this CLIP."),
    ]


def base_sockets() -> list[io.Input]:
    """Base model and pictures."""
    return [
        io.Model.Input("model", tooltip="The base model; it stays as it is."),
        io.Clip.Input("clip", tooltip="Its CLIP, not one that knows the word already."),
        io.Vae.Input("vae", tooltip="Its VAE."),
        io.Image.Input(
            "images",
            tooltip="One to about ten pictures of the same thing, in the size that the model "
            "draws (1024 for SDXL). Different backgrounds help.",
        ),
    ]


def word_widgets() -> list[io.Input]:
    """The word, its kind, and the prompts to train in."""
    return [
        io.String.Input(
            "word",
            default="<my-hat>",
            tooltip="The new word for prompts: letters, digits, - _ < >, and unknown so far.",
        ),
        io.String.Input(
            "superclass",
            default="hat",
            tooltip="One plain word for its kind, as the model knows it: cat, hat, cup, person.",
        ),
        io.String.Input(
            "prompts",
            default="",
            multiline=True,
            tooltip="Prompts to train in, one a line, each with the new word in it; they should "
            "say what else is in the pictures. Empty: a photo of it, and the like.",
        ),
    ]


def training_widgets(
    batch_size: int = 4, file_name: str = "my_concept", folder: str = model_paths.CONCEPTS
) -> list[io.Input]:
    """How to train and what to keep, with these defaults, in a folder of models/."""
    return [
        batch_size_widget(batch_size),
        seed_widget("noise and order of pictures"),
        file_name_widget(file_name, folder),
        mirror_widget("Also train on mirrored pictures. Turn it off for writing and logos."),
        small_file_widget("look"),
    ]


def batch_size_widget(
    default: int, tooltip: str = "Pictures in each step. Fewer need less memory."
) -> io.Input:
    """Pictures of a step."""
    return io.Int.Input("batch_size", default=default, min=1, max=64, tooltip=tooltip)


def seed_widget(of: str) -> io.Input:
    """The seed of a training: of what it is, in words."""
    return io.Int.Input("seed", default=0, min=0, max=MAX_TRAINING_SEED, tooltip=f"Of {of}.")


def file_name_widget(default: str, folder: str) -> io.Input:
    """The file that is made, in a folder of models/."""
    return io.String.Input(
        "file_name",
        default=default,
        tooltip=f"Name of the file in models/{folder}; a number is added rather than a file "
        "replaced.",
    )


def mirror_widget(tooltip: str) -> io.Input:
    """Whether to train on mirrored pictures too."""
    return io.Boolean.Input("mirror", default=True, advanced=True, tooltip=tooltip)


def small_file_widget(what: str) -> io.Input:
    """Whether to keep what was learned, in a word, in fewer bits."""
    return io.Boolean.Input(
        "small_file",
        default=False,
        advanced=True,
        tooltip=f"Keep the {what} as 8-bit numbers: half the size, with an error of under 1 %.",
    )


def style_rate_widget(tooltip: str, largest: float = 1.0) -> io.Input:
    """The learning rate of a style, up to the largest."""
    return io.Float.Input(
        "learning_rate",
        default=0.0001,
        min=0.000001,
        max=largest,
        step=0.0001,
        round=0.000001,
        advanced=True,
        tooltip=tooltip,
    )


def held_out_widget(
    of: str, then: str = ", and training stops when they gain nothing more."
) -> io.Input:
    """How many of these, in percent, only choose the best state; then what else becomes of it."""
    return io.Int.Input(
        "held_out",
        default=10,
        min=0,
        max=50,
        advanced=True,
        tooltip=f"Percent of the {of} that are not trained on: the state that is best on them is "
        f"kept{then}",
    )


def training_guidance() -> io.Input:
    """How guided the loss is; optional, since old workflows lack it."""
    return io.Float.Input(
        "guidance",
        default=1.0,
        min=1.0,
        max=20.0,
        step=0.1,
        optional=True,
        advanced=True,
        tooltip="Learns the look as a sampler with this cfg draws it, in a third more time. "
        "Raise it, to less than the cfg, where colours come out too strong; 1 is off.",
    )


def folder_widget() -> io.Input:
    """More pictures than fit into a batch; optional, since old workflows lack it."""
    return io.Combo.Input(
        "folder",
        options=picture_folders(),
        default=model_paths.NO_FILE,
        optional=True,
        advanced=True,
        tooltip="More pictures, thousands if you like: a folder in the input folder. Each is cut "
        "to the size of those connected; a .txt file of its name says what it shows.",
    )


def memory_widgets(optional: bool = True) -> list[io.Input]:
    """How to save memory; neither changes what is learned."""
    return [
        io.Int.Input(
            "accumulate",
            default=1,
            min=1,
            max=64,
            optional=optional,
            advanced=True,
            tooltip="Computes a batch in so many parts, one after the other: less memory, the same "
            "result. batch_size must be a multiple of it.",
        ),
        io.Combo.Input(
            "memory",
            options=list(CHOICES),
            default=AUTO,
            optional=optional,
            advanced=True,
            tooltip="saving: computes layers twice instead of remembering them, in a third more "
            "time; fast: remembers all; auto: saving where the card is too small. The same result.",
        ),
    ]


def training_outputs() -> list[io.Output]:
    """The concept, the CLIP that knows it, and a report."""
    return [
        sockets.Concept.Output(display_name="concept", tooltip="For Apply Concept."),
        io.Clip.Output(display_name="clip", tooltip="Knows the new word."),
        io.String.Output(display_name="report", tooltip="File, size, steps and loss."),
    ]


def style_outputs() -> list[io.Output]:
    """The style, and a report."""
    return [
        sockets.Style.Output(display_name="style", tooltip="For Apply Style."),
        io.String.Output(display_name="report", tooltip="File, size, steps and loss."),
    ]
