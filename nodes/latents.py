"""Identities as material: blend, vary, invent, carry over, interpolate, choose."""

from comfy_api.latest import io

from ..difflora_core.diffusion.sampler import MAX_SEED, SampleSettings
from ..difflora_core.models import latent_math
from . import sockets
from .host import models

CATEGORY = "DiffLoRA/identities"
MAX_BATCH = 256


def identity_output() -> io.Output:
    """An identity, or a batch of them."""
    return sockets.Latent.Output(
        display_name="identity", tooltip="For Decode LoRA and every node that takes an identity."
    )


def method_widget() -> io.Input:
    """Along the sphere or straight."""
    return io.Combo.Input(
        "method",
        options=list(latent_math.METHODS),
        default=latent_math.SLERP,
        tooltip="slerp keeps people as distinct halfway as at the ends; linear passes closer to "
        "the average person.",
    )


def seed_widget() -> io.Input:
    """The first seed of a batch."""
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=MAX_SEED,
        control_after_generate=True,
        tooltip="The same seed gives the same result everywhere; a batch takes the seeds after it.",
    )


def number_widget(name: str, spread: tuple[float, float, float, float], tooltip: str) -> io.Input:
    """A number: its default, smallest, largest and step."""
    default, low, high, step = spread
    return io.Float.Input(name, default=default, min=low, max=high, step=step, tooltip=tooltip)


def count_widget(name: str, default: int, tooltip: str) -> io.Input:
    """How many, or from which on when the default is 0."""
    low = min(default, 1)
    return io.Int.Input(name, default=default, min=low, max=MAX_BATCH, tooltip=tooltip)


def steps_widget() -> io.Input:
    """Sampling steps."""
    return io.Int.Input(
        "steps", default=20, min=1, max=1000, advanced=True, tooltip="Sampling steps of the DiT."
    )


class BlendIdentities(io.ComfyNode):
    """Several people become one."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DiffLoRA_BlendIdentities",
            display_name="Blend Identities",
            category=CATEGORY,
            description="Mixes two to four people into one, by weights. Chain it for more people.",
            search_aliases=["mix faces", "merge people", "slerp", "average identity", "child"],
            inputs=[
                *(
                    sockets.identity(f"identity_{n}", f"Person {n}.", optional=n > 2)
                    for n in range(1, 5)
                ),
                *(
                    number_widget(
                        f"weight_{n}",
                        (1.0, 0.0, 10.0, 0.01),
                        f"Share of person {n}; only the proportions of the weights count.",
                    )
                    for n in range(1, 5)
                ),
                method_widget(),
            ],
            outputs=[identity_output()],
        )

    @classmethod
    def execute(
        cls,
        identity_1,
        identity_2,
        weight_1,
        weight_2,
        weight_3,
        weight_4,
        method,
        identity_3=None,
        identity_4=None,
    ):
        people = (identity_1, identity_2, identity_3, identity_4)
        weights = (weight_1, weight_2, weight_3, weight_4)
        there = [k for k, person in enumerate(people) if person is not None]
        shares = [weights[k] for k in there]
        return io.NodeOutput(latent_math.blend([people[k] for k in there], shares, method))


class VaryIdentity(io.ComfyNode):
    """Relatives of a person."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DiffLoRA_VaryIdentity",
            display_name="Vary Identity",
            category=CATEGORY,
            description="People who resemble a person: fresh noise around the identity, drawn "
            "back by the DiT to somebody plausible.",
            search_aliases=["variation", "sibling", "relative", "lookalike", "noise"],
            inputs=[
                sockets.difflora_model(),
                sockets.identity("identity", "One person, or a batch of as many as count."),
                number_widget(
                    "strength",
                    (0.3, 0.0, 1.0, 0.01),
                    "How much fresh noise: 0 changes nothing, 1 is somebody else.",
                ),
                seed_widget(),
                count_widget("count", 1, "How many variations."),
                steps_widget(),
            ],
            outputs=[identity_output()],
        )

    @classmethod
    def execute(cls, difflora_model, identity, strength, seed, count, steps):
        settings = SampleSettings(steps, strength=strength)
        seeds = range(seed, seed + count)
        return io.NodeOutput(models.sample_batch(difflora_model, None, seeds, settings, identity))


class InventIdentity(io.ComfyNode):
    """A person who does not exist."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DiffLoRA_InventIdentity",
            display_name="Invent Identity",
            category=CATEGORY,
            description="A person who does not exist, without any photo: the same in every "
            "picture that is drawn with the LoRA.",
            search_aliases=["fictional person", "random face", "consistent character", "nobody"],
            inputs=[
                sockets.difflora_model(),
                seed_widget(),
                count_widget("count", 1, "How many people, one for every seed."),
                steps_widget(),
            ],
            outputs=[identity_output()],
        )

    @classmethod
    def execute(cls, difflora_model, seed, count, steps):
        seeds = range(seed, seed + count)
        return io.NodeOutput(
            models.sample_batch(difflora_model, None, seeds, SampleSettings(steps))
        )


class AddDifference(io.ComfyNode):
    """A + k (B - C)."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DiffLoRA_AddDifference",
            display_name="Add Identity Difference",
            category=CATEGORY,
            description="identity + amount x (plus - minus): gives a person what distinguishes "
            "one person from another, for example glasses or a beard.",
            search_aliases=["arithmetic", "attribute", "a + b - c", "subtract", "edit direction"],
            inputs=[
                sockets.identity("identity", "The person to change."),
                sockets.identity("plus", "Somebody who has it."),
                sockets.identity("minus", "Somebody alike who lacks it."),
                number_widget(
                    "amount",
                    (1.0, -10.0, 10.0, 0.05),
                    "How much of the difference is added; below 0 it is taken away.",
                ),
            ],
            outputs=[identity_output()],
        )

    @classmethod
    def execute(cls, identity, plus, minus, amount):
        return io.NodeOutput(latent_math.add_difference(identity, plus, minus, amount))


class InterpolateIdentities(io.ComfyNode):
    """The way from A to B."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DiffLoRA_InterpolateIdentities",
            display_name="Interpolate Identities",
            category=CATEGORY,
            description="A batch of people on the way from A to B, both included. Set the index "
            "of Decode LoRA to -1 to draw all of them.",
            search_aliases=["morph", "transition", "tween", "steps between", "slerp"],
            inputs=[
                sockets.identity("identity_a", "Where the way begins."),
                sockets.identity("identity_b", "Where it ends."),
                io.Int.Input("steps", default=5, min=2, max=256, tooltip="People, A and B too."),
                method_widget(),
            ],
            outputs=[identity_output()],
        )

    @classmethod
    def execute(cls, identity_a, identity_b, steps, method):
        return io.NodeOutput(latent_math.interpolate(identity_a, identity_b, steps, method))


class BestOfN(io.ComfyNode):
    """The most fitting of several samples."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DiffLoRA_BestOfN",
            display_name="Best of N Identities",
            category=CATEGORY,
            description="Samples several LoRA latents for the photos and keeps the one that "
            "agrees best with their features. No picture is drawn for it.",
            search_aliases=["best of n", "rerank", "select sample", "most similar"],
            inputs=[
                sockets.difflora_model(),
                sockets.Condition.Input(
                    "condition", tooltip="The photos' features, from Mix Image Features."
                ),
                count_widget("count", 8, "How many samples to choose from."),
                seed_widget(),
                steps_widget(),
                sockets.guidance_widget(),
            ],
            outputs=[
                identity_output(),
                io.Float.Output(
                    display_name="agreement", tooltip="How well it agrees with the features."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, difflora_model, condition, count, seed, steps, guidance):
        settings = SampleSettings(steps, guidance)
        seeds = range(seed, seed + count)
        samples = models.sample_batch(difflora_model, condition, seeds, settings)
        agreement = difflora_model.ready().agreement(samples, condition)
        best = int(agreement.argmax())
        models.show_text(
            cls, f"number {best + 1} of {count}, agreement {float(agreement[best]):.3g}"
        )
        return io.NodeOutput(latent_math.select(samples, best), float(agreement[best]))


class SelectIdentity(io.ComfyNode):
    """One of a batch."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DiffLoRA_SelectIdentity",
            display_name="Select Identity",
            category=CATEGORY,
            description="Takes one person, or several in a row, out of a batch of identities.",
            search_aliases=["from batch", "index", "slice", "choose identity"],
            inputs=[
                sockets.identity("identity", "A batch of people."),
                count_widget("index", 0, "Which person, counted from 0."),
                count_widget("count", 1, "How many people from there on."),
            ],
            outputs=[identity_output()],
        )

    @classmethod
    def execute(cls, identity, index, count):
        return io.NodeOutput(latent_math.select(identity, index, count))
