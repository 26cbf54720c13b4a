"""The two targets that every workflow is written for: the shipped demo, and full-size SDXL."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .builder import Graph, Node, Out
from .needs import SDXL_FILES

GRID_SIDE = 192
SDXL_MODEL = "difflora_sdxl.safetensors"
SDXL_FACES = "antelopev2"

DEMO_NOTE = """
This runs with what the node pack ships: a tiny model of drawn faces, 64 x 64 pixels. Its prompts \
know *photo, cartoon, painting; neutral, smiling, surprised, sad; hat, cup, cat, flower; plain and \
striped backgrounds*, and colours."""


@dataclass(frozen=True)
class Target:
    """What differs between the two.

    `name`: demo or sdxl. `width`, `height`: of a portrait. `sampler`: widgets of KSampler.
    `zoom`: how much larger pictures are shown. `about`: the last part of every note, if it has one.
    """

    name: str
    width: int
    height: int
    sampler: Mapping[str, Any]
    zoom: int
    about: str

    def file(self, workflow: str) -> str:
        """Name of a workflow's file for this target, without suffix."""
        return f"{workflow}_demo" if self.name == "demo" else f"sdxl_{workflow}"

    def words(self, text: str) -> str:
        """A text with its parts {demo: ...} and {sdxl: ...} kept or left out."""
        return re.sub(
            r"\{(\w+): ([^}]*)\}", lambda part: part[2] if part[1] == self.name else "", text
        )

    def pick(self, demo: Any, sdxl: Any) -> Any:
        """What fits this target."""
        return demo if self.name == "demo" else sdxl


DEMO = Target(
    "demo",
    64,
    64,
    {"steps": 20, "cfg": 2.0, "sampler_name": "euler", "scheduler": "normal"},
    6,
    DEMO_NOTE,
)
SDXL = Target(
    "sdxl",
    832,
    1216,
    {"steps": 30, "cfg": 5.0, "sampler_name": "dpmpp_2m", "scheduler": "karras"},
    1,
    "",
)


class WorkflowBuilder:
    """The steps that most workflows share, on one graph for one target."""

    def __init__(self, graph: Graph, target: Target, about: str) -> None:
        self.graph, self.target = graph, target
        graph.note(f"{target.words(about.strip())}\n{target.about}".strip())

    def load(self, column: int = 0, control: bool = False, model: str = SDXL_MODEL) -> None:
        """The loaders; afterwards `model`, `clip`, `vae` and the rest are outputs.

        `model` is the DiffLoRA model at full size.
        """
        add, demo = self.graph.add, self.load_base(column)
        if self.target.name == "demo":
            self.clip_vision, self.faces = demo["CLIP_VISION"], demo["FACEANALYSIS"]
            self.difflora = demo["DIFFLORA_MODEL"]
            if control:
                self.control_net = demo["CONTROL_NET"]
            return
        file = self._file("clip_vision")
        vision = add("CLIPVisionLoader", column, clip_name=file["name"], models=[file])
        self.clip_vision = vision["CLIP_VISION"]
        faces = add("DiffLoRA_LoadFaceAnalysis", column, package=SDXL_FACES, provider="cpu")
        self.faces = faces["FACEANALYSIS"]
        self.difflora = add("DiffLoRA_LoadModel", column, model_name=model)["DIFFLORA_MODEL"]
        if control:
            file = self._file("controlnet")
            loader = add("ControlNetLoader", column, control_net_name=file["name"], models=[file])
            self.control_net = loader["CONTROL_NET"]

    def load_base(self, column: int = 0) -> Node:
        """The base model alone: `model`, `clip` and `vae`."""
        if self.target.name == "demo":
            base = self.graph.add("DiffLoRA_LoadDemo", column)
        else:
            file = self._file("checkpoints")
            base = self.graph.add(
                "CheckpointLoaderSimple", column, ckpt_name=file["name"], models=[file]
            )
        self.model, self.clip, self.vae = (base[kind] for kind in ("MODEL", "CLIP", "VAE"))
        return base

    def photo(self, picture: str, title: str, column: int = 1) -> Out:
        """A photo from the input folder, beside the loaders."""
        return self.graph.add("LoadImage", column, title=title, image=picture)["IMAGE"]

    def personalize(self, photos: Out, column: int = 0, title: str = "", **widgets: Any) -> Node:
        """Photos to LoRA, all in one."""
        return self.graph.add(
            "DiffLoRA_Personalize",
            column,
            title=title,
            images=photos,
            difflora_model=self.difflora,
            clip_vision=self.clip_vision,
            face_analysis=self.faces,
            base_model=self.model,
            **widgets,
        )

    def latent(self, photo: Out, who: str, column: int = 0, folded: bool = False) -> Node:
        """Photo to LoRA latent by the single steps; `folded`: those after the first."""
        add = self.graph.add
        features = add(
            "DiffLoRA_ExtractFeatures",
            column,
            title=f"Features of {who}",
            images=photo,
            clip_vision=self.clip_vision,
            face_analysis=self.faces,
        )
        condition = add(
            "DiffLoRA_MixFeatures",
            column,
            folded=folded,
            difflora_model=self.difflora,
            features=features["DIFFLORA_FEATURES"],
        )
        return add(
            "DiffLoRA_SampleLatent",
            column,
            folded=folded,
            title=f"Latent of {who}",
            difflora_model=self.difflora,
            condition=condition["DIFFLORA_CONDITION"],
            mode="best_guess",
        )

    def decode(self, latent: Out, column: int = 0, title: str = "") -> Node:
        """Latent to LoRA."""
        return self.graph.add(
            "DiffLoRA_DecodeLoRA",
            column,
            title=title,
            difflora_model=self.difflora,
            lora_latent=latent,
            base_model=self.model,
        )

    def apply_lora(self, lora: Out, column: int = 0, strength: float = 1.0, title: str = "") -> Out:
        """The model with a LoRA on it."""
        loader = self.graph.add(
            "LoraModelLoader",
            column,
            title=title or "Apply the LoRA",
            model=self.model,
            lora=lora,
            strength_model=strength,
            bypass=False,
        )
        return loader["MODEL"]

    def prompts(self, column: int, demo: str, sdxl: str) -> tuple[Out, Out]:
        """The positive and the negative prompt, encoded."""
        add, negative = self.graph.add, self.target.pick("", "blurry, deformed, watermark")
        text = self.target.pick(demo, sdxl)
        first = add("CLIPTextEncode", column, title="Prompt", clip=self.clip, text=text)
        second = add(
            "CLIPTextEncode",
            column,
            title="Negative prompt",
            folded=not negative,
            clip=self.clip,
            text=negative,
        )
        return first["CONDITIONING"], second["CONDITIONING"]

    def canvas(self, column: int, batch: int = 1, wide: int = 1) -> Out:
        """An empty picture, `wide` times as wide as high when it is not 1."""
        height = self.target.pick(64, 832 if wide > 1 else self.target.height)
        width = height * wide if wide > 1 else self.target.width
        empty = self.graph.add(
            "EmptyLatentImage", column, width=width, height=height, batch_size=batch
        )
        return empty["LATENT"]

    def draw(
        self,
        column: int,
        title: str,
        model: Out,
        prompts: tuple[Out, Out],
        latent: Out,
        seed: int = 3,
        **rest: Any,
    ) -> Out:
        """KSampler and VAE Decode; gives the pictures. `rest`: `denoise` below 1, or `folded`."""
        sampler = self.graph.add(
            "KSampler",
            column,
            title=title,
            model=model,
            positive=prompts[0],
            negative=prompts[1],
            latent_image=latent,
            seed=seed,
            **{"denoise": 1.0, **self.target.sampler, **rest},
        )
        decoded = self.graph.add("VAEDecode", column, samples=sampler["LATENT"], vae=self.vae)
        return decoded["IMAGE"]

    def save(
        self, column: int, pictures: Out, name: str, title: str = "", folded: bool = False
    ) -> None:
        """Save pictures, small ones enlarged; `folded` where a grid shows them too."""
        add, zoom = self.graph.add, self.target.zoom
        if zoom > 1:
            larger = add(
                "ImageScaleBy",
                column,
                title="Enlarge to look at",
                image=pictures,
                upscale_method="lanczos",
                scale_by=float(zoom),
            )
            pictures = larger["IMAGE"]
        prefix = f"DiffLoRA/{name}"
        add(
            "SaveImage",
            column,
            title=title or "Result",
            folded=folded,
            images=pictures,
            filename_prefix=prefix,
        )

    def batch(self, column: int, pictures: Sequence[Out], title: str = "") -> Out:
        """Several pictures as one batch; with a title the artist may add some."""
        node = self.graph.add(
            "BatchImagesNode", column, title=title, folded=not title, images=list(pictures)
        )
        return node["IMAGE"]

    def grid(
        self, column: int, variants: Out, labels: Sequence[str], columns: int, **rest: Any
    ) -> Out:
        """A labelled grid of variants."""
        node = self.graph.add(
            "DiffLoRA_CompareGrid",
            column,
            variants=variants,
            labels="\n".join(labels),
            columns=columns,
            side=self.target.pick(GRID_SIDE, 512),
            **rest,
        )
        return node["IMAGE"]

    def _file(self, folder: str) -> dict[str, str]:
        name, address = SDXL_FILES[folder]
        return {"name": name, "url": address, "directory": folder}
