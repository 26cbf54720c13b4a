"""Socket types of our records, and the inputs that several nodes share.

A finished LoRA travels as ComfyUI's own `LORA_MODEL`, so core nodes apply and save it.
"""

from comfy_api.latest import io

from ..difflora_core.diffusion.sampler import MAX_SEED
from ..difflora_core.vision.face_choice import IMAGE_REGIONS, MISSING_POLICIES, ORDERS

BEST_GUESS, SAMPLED = "best_guess", "sampled"
LEARNED, MANUAL = "learned", "manual"

DiffLoRAModel = io.Custom("DIFFLORA_MODEL")
"""host.models.HostedModel"""
Features = io.Custom("DIFFLORA_FEATURES")
"""vision.features.ImageFeatures"""
Condition = io.Custom("DIFFLORA_CONDITION")
"""models.mif.IdentityCondition"""
Latent = io.Custom("DIFFLORA_LATENT")
"""models.lae.autoencoder.LoRALatent"""
Concept = io.Custom("DIFFLORA_CONCEPT")
"""methods.base.PreparedAdaptation"""
Style = io.Custom("DIFFLORA_STYLE")
"""methods.base.PreparedAdaptation of what has no word"""
Covariance = io.Custom("DIFFLORA_COVARIANCE")
"""text.covariance.Covariance"""
FaceAnalysis = io.Custom("FACEANALYSIS")
"""An insightface FaceAnalysis, as the InstantID and PuLID packs pass it."""

BLOCKS = {
    "input_blocks": "the blocks on the way in: layout and pose",
    "middle_block": "the innermost block",
    "output_blocks": "the blocks on the way out: looks and texture",
    "self_attention": "self-attention: how the parts of the picture go together",
    "cross_attention": "cross-attention: how the prompt is read",
}

# Packs disagree on the name of this socket; the object behind it is the same.
FACE_TYPES = [FaceAnalysis, io.Custom("INSIGHTFACE"), io.FaceAnalysis]
# HyperLoRA passes the same kind of dict under a name of its own.
LORA_TYPES = [io.LoraModel, io.Custom("LORA")]


def lora_socket(name: str = "lora") -> io.Input:
    """A finished LoRA."""
    return io.MultiType.Input(
        name,
        types=LORA_TYPES,
        tooltip="From Personalize, Decode LoRA, or another pack's node that makes a LoRA.",
    )


def identity(name: str, tooltip: str, optional: bool = False) -> io.Input:
    """A person, or a batch of people, as LoRA latents."""
    return Latent.Input(name, tooltip=tooltip, optional=optional)


def difflora_model() -> io.Input:
    """The DiffLoRA model."""
    return DiffLoRAModel.Input(
        "difflora_model", tooltip="From Load DiffLoRA Model or Load DiffLoRA Demo."
    )


def face_analysis() -> io.Input:
    """A face analysis that a node cannot do without."""
    return io.MultiType.Input(
        "face_analysis",
        types=FACE_TYPES,
        tooltip="insightface, from Load Face Analysis or another pack's loader.",
    )


def photo_sockets() -> list[io.Input]:
    """What looks at the photos: CLIP vision, face analysis, and a mask of the person."""
    return [
        io.ClipVision.Input(
            "clip_vision",
            optional=True,
            tooltip="The CLIP vision that the DiffLoRA model was trained with.",
        ),
        io.MultiType.Input(
            "face_analysis",
            types=FACE_TYPES,
            optional=True,
            tooltip="insightface, from Load Face Analysis or another pack's loader. Without it "
            "only CLIP vision looks at the photos.",
        ),
        io.Mask.Input(
            "mask",
            optional=True,
            tooltip="Marks the person meant, one for all photos or one each; the face with the "
            "largest marked share is taken. An empty mask is no mask.",
        ),
    ]


def face_order_widget() -> io.Input:
    """How faces are counted."""
    return io.Combo.Input(
        "face_order",
        options=list(ORDERS),
        default="largest",
        advanced=True,
        tooltip="How the faces of a photo are numbered.",
    )


def region_factor_widget() -> io.Input:
    """How much around a face is shown."""
    return io.Float.Input(
        "region_factor",
        default=2.2,
        min=1.0,
        max=10.0,
        step=0.1,
        advanced=True,
        tooltip="Side of the crop over the side of the face; 2.2 holds hair and neck.",
    )


def weights_widget() -> io.Input:
    """How much each photo counts; optional, since old workflows lack it."""
    return io.String.Input(
        "weights",
        default="",
        optional=True,
        advanced=True,
        tooltip="How much each photo counts, one number each in their order: 1, 0.5, 2. 0 leaves "
        "a photo out. Empty: all the same.",
    )


def face_widgets(missing: str = "error") -> list[io.Input]:
    """Which face is meant, and what happens without one unless asked otherwise."""
    return [
        io.Combo.Input(
            "on_missing_face",
            options=list(MISSING_POLICIES),
            default=missing,
            tooltip="A photo without a usable face: stop with an error, skip the photo, or use "
            "it with image features only.",
        ),
        face_order_widget(),
        io.Int.Input(
            "face_index",
            default=0,
            min=0,
            max=99,
            advanced=True,
            tooltip="Which face, counted from 0 in that order.",
        ),
        io.Combo.Input(
            "image_region",
            options=list(IMAGE_REGIONS),
            default="crop",
            advanced=True,
            tooltip="What CLIP vision sees. crop: the square around the face (in Personalize, the "
            "way the model was trained); picture: the whole photo; face_on_grey: the face alone, "
            "cut out along its outline, for models that were trained so.",
        ),
    ]


def gate_widgets(advanced: bool = False) -> list[io.Input]:
    """The gate between face and image features as one slider, and a weight for each."""
    return [
        io.Combo.Input(
            "gate",
            options=[LEARNED, MANUAL],
            default=LEARNED,
            advanced=advanced,
            tooltip="learned: the model weighs face against image features for this person; "
            "manual: the slider does.",
        ),
        io.Float.Input(
            "face_share",
            default=0.5,
            min=0.0,
            max=1.0,
            step=0.01,
            display_mode=io.NumberDisplay.slider,
            advanced=advanced,
            tooltip="With gate manual: 0 uses image features only, 1 face features only.",
        ),
    ]


def sampling_widgets() -> list[io.Input]:
    """Best guess or a sampled variant, and the settings of sampling."""
    return [
        io.Combo.Input(
            "mode",
            options=[BEST_GUESS, SAMPLED],
            default=BEST_GUESS,
            tooltip="best_guess: the one LoRA that fits the photos best; sampled: a variant drawn "
            "by the DiT, another one for every seed.",
        ),
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=MAX_SEED,
            control_after_generate=io.ControlAfterGenerate.fixed,  # the best guess has no seed
            tooltip="Which variant (sampled only). The same seed gives the same LoRA everywhere.",
        ),
        io.Int.Input(
            "steps",
            default=20,
            min=1,
            max=1000,
            advanced=True,
            tooltip="Sampling steps (sampled only).",
        ),
        guidance_widget(" (sampled only)"),
    ]


def guidance_widget(when: str = "") -> io.Input:
    """How strictly a sample follows the photos."""
    return io.Float.Input(
        "guidance",
        default=1.0,
        min=0.0,
        max=20.0,
        step=0.1,
        advanced=True,
        tooltip=f"1 follows the photos, above 1 exaggerates, 0 ignores them{when}.",
    )


def span_widgets(hint: str = "") -> list[io.Input]:
    """From which share of the steps something acts to which; `hint` says more of the start."""
    start = f"From which share of the steps on it acts.{hint}"
    end = "Up to which share of the steps it acts."
    return [
        io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.01, tooltip=tooltip)
        for name, default, tooltip in (("start_percent", 0.0, start), ("end_percent", 1.0, end))
    ]


def reach_widget(tooltip: str, optional: bool = False) -> io.Input:
    """How many tokens around its word a concept acts on; -1 all of them."""
    return io.Int.Input(
        "reach", default=-1, min=-1, max=512, optional=optional, advanced=True, tooltip=tooltip
    )


def positive_widget(tooltip: str) -> io.Input:
    """Whether something acts on the positive prompt alone."""
    return io.Boolean.Input("positive_only", default=False, tooltip=tooltip)


def block_widgets() -> list[io.Input]:
    """Factors on the strength in parts of the model."""
    return [
        io.Float.Input(
            name,
            default=1.0,
            min=-10.0,
            max=10.0,
            step=0.01,
            advanced=True,
            tooltip=f"Multiplies the strength in {where}.",
        )
        for name, where in BLOCKS.items()
    ]
