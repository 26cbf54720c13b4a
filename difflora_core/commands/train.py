"""`train`: a prepared dataset to a DiffLoRA model for a base model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import torch
from rich.console import Console

from .. import __version__
from ..config import Config, check_range
from ..data.lora_rows import LoRARows
from ..data.lora_store import LoRAStore
from ..data.prepared import PreparedDataset
from ..diffusion.sampler import SampleSettings
from ..errors import ConfigError, counted, shown
from ..lora.layout import TARGETS, edited_layers
from ..models.difflora import DiffLoRAModel
from ..models.face_reader import FaceReader, FaceReaderConfig
from ..models.layers import DrawnFrom
from ..storage.checkpoint import save_model
from ..storage.image_files import write_image
from ..storage.safetensors_io import write_atomic
from ..training.difflora import face_reader, functional, lae, latent_dit
from ..training.difflora.preview import draw_people
from ..training.fingerprint import weights_digest
from ..training.hooks import Progress
from ..training.loop import LoopConfig
from ..training.processes import launched
from .encoders import chosen_device, file_digest, open_encoders
from .local_base import open_base
from .model_card import write_card
from .networks import network_config
from .run_folder import RunFolder, run_folder
from .trackers import tracked
from .train_data import Encoders, People, encode_all, load_people, split_people

T = TypeVar("T")
SAMPLE_STEPS, SAMPLE_GUIDANCE = 20, 4.0
"""Of the pictures of validation people."""
MODEL, READER = "difflora-{}.safetensors", "likeness/face-reader.safetensors"
"""Files of a run."""


@dataclass(frozen=True)
class Settings(Config):
    """Trains a model that makes LoRAs of photos.

    functional needs no LoRAs: it learns photo to LoRA through the base, then the DiT for variants.
    paper needs a corpus of LoRAs of the dataset's people: it learns their autoencoder, then the
    DiT. Stopped and called again, a run goes on from its last checkpoint.

    Args:
        dataset: what prepare wrote.
        folder: of the run; the model lands there as difflora-NAME.safetensors.
        method: functional, paper, or both, which leaves two models.
        base: the base model: demo, or a checkpoint file or a diffusers folder of SDXL.
        tokenizer: folder of CLIP's vocab.json and merges.txt, for a checkpoint file; empty takes
            that of ComfyUI (COMFYUI_PATH).
        clip_vision: folder or file of the CLIP vision that photos will be shown to.
        corpus: what corpus wrote; its LoRAs have the names of the dataset's people (paper and
            both).
        name: of the model.
        size: of the network: full (822 M numbers), small, or auto by the base.
        rank: of the LoRAs.
        targets: layers that the LoRAs of functional edit: attention, or transformer, which adds
            feed-forward layers, as kohya's trainer has them. Those of paper edit what the corpus's
            do.
        held_out: share of the people that only judge.
        validation: what prepare wrote of other people, who only judge; in place of held_out.
        likeness: settings of the face reader, which the likeness loss of functional needs.
        face_crop: side at most, in latent pixels, of the square around a face that it reads (64 are
            512 pixels of SDXL); 0 reads whole pictures.
        functional: settings of the functional recipe.
        functional_loop: its course.
        autoencoder: kind of the autoencoder of paper; linear is fitted in closed form, for LoRAs
            of small bases alone.
        condition_rank: rank of the linear maps whose factors the condition makes, in every block of
            the DiT; 0 leaves the condition to adaptive layer norm.
        lae: training of that autoencoder.
        dit: the DiT of both.
        sample_prompt: what the validation people are drawn with.
        samples: how many of them are drawn.
        license: terms of the model, in words.
        trackers: of accelerate, such as tensorboard.
        device: auto, cpu, or cuda.
        seed: of the networks' first weights, and of who is held out.
    """

    dataset: str
    folder: str
    method: Literal["functional", "paper", "both"] = "functional"
    base: str = "demo"
    tokenizer: str = ""
    clip_vision: str = ""
    corpus: str = ""
    name: str = "model"
    size: Literal["auto", "small", "full"] = "auto"
    rank: int = 8
    targets: Literal["attention", "transformer"] = "attention"
    held_out: float = 0.05
    validation: str = ""
    likeness: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=3000, learning_rate=2e-3, decay=0.6, seed=5)
    )
    face_crop: int = 64
    functional: functional.FunctionalConfig = field(
        default_factory=lambda: functional.FunctionalConfig(batch=8)
    )
    functional_loop: LoopConfig = field(
        default_factory=lambda: LoopConfig(steps=20_000, ema=0.999, learning_rate=2e-4)
    )
    autoencoder: Literal["structured", "conv1d", "linear"] = "structured"
    condition_rank: int = 0
    lae: lae.LAETrainConfig = field(default_factory=lae.LAETrainConfig)
    dit: latent_dit.LatentDiTConfig = field(default_factory=latent_dit.LatentDiTConfig)
    sample_prompt: str = "a photo of a person"
    samples: int = 4
    license: str = ""
    trackers: tuple[str, ...] = ()
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        self.check_choices("train")
        check_range("train", "rank", self.rank, 1, 256)
        check_range("train", "held_out", self.held_out, 0, 0.9)
        check_range("train", "face_crop", self.face_crop, 0, 1024)
        check_range("train", "condition_rank", self.condition_rank, 0, 256)
        check_range("train", "samples", self.samples, 0, 1000)
        check_range("train", "seed", self.seed, 0, 2**31 - 1)
        if self.method != "functional" and not self.corpus:
            raise ConfigError(f"The method {self.method} needs a corpus of LoRAs: name --corpus.")
        if not self.name or set(self.name) & set("/\\\0"):
            raise ConfigError(f"{shown(self.name)!r} cannot be the name of a model.")


def run(settings: Settings, console: Console) -> None:
    """Trains, draws validation people, and writes model and card.

    Raises:
        InterruptedTraining: stopped; the same call goes on.
        DiffLoRAError: data, base or corpus do not suit, or a loss is no finite number.
    """
    with run_folder(Path(settings.folder), settings, console) as folder:
        work = _Work(settings, folder)
        if settings.method != "paper":
            work.functional()
        if settings.method != "functional":
            work.paper()


class _Work:
    """What the stages of a run share."""

    def __init__(self, settings: Settings, folder: RunFolder) -> None:
        self.settings, self.run = settings, folder
        self.device = launched().device or chosen_device(settings.device)
        self.dataset = PreparedDataset(settings.dataset)
        self.base = open_base(settings.base, self.device, settings.tokenizer)
        if not settings.clip_vision:
            raise ConfigError("Name the CLIP vision that photos will be shown to: --clip-vision.")
        _, image = open_encoders("", settings.clip_vision, self.device)
        self.clip_digest = file_digest(Path(settings.clip_vision))
        encoders = Encoders(self.base.model, image, self.clip_digest)
        with self.stage("encode") as progress:
            sets = [
                load_people(data, encoders, folder.path / "encoded", progress, self.fewest)
                for data in (self.dataset, *self._judging())
            ]
        self.prompts = encode_all(self.base.model, [settings.sample_prompt, ""])
        self.base = self.base.without_encoders()
        self.people, self.others = sets[0], _second(sets)
        if self.others is None:
            self.people, self.others = split_people(sets[0], settings.held_out, settings.seed)
        judges = 0 if self.others is None else len(self.others)
        folder.say(f"{counted(len(self.people), 'identity')} to learn, {judges} to judge by")

    @property
    def fewest(self) -> int:
        """Pictures that a person needs: functional sees one and draws another."""
        return 1 if self.settings.method == "paper" else 2

    def _judging(self) -> list[PreparedDataset]:
        """The dataset of those who only judge, if one is named.

        Raises:
            ConfigError: its faces were found by another recogniser.
        """
        if not self.settings.validation:
            return []
        judging = PreparedDataset(self.settings.validation)
        both = self.dataset, judging
        ours, theirs = (data.facts.face_encoder or "nobody" for data in both)
        if ours != theirs:
            raise ConfigError(
                f"The faces of the dataset were found by {shown(ours)}, those of the people to "
                f"judge by by {shown(theirs)}: prepare both with one face analysis."
            )
        return [judging]

    def functional(self) -> None:
        """Photo to LoRA through the base's denoising loss, then the DiT of its latents."""
        s, path = self.settings, self.run.path / "functional"
        model = self._model("functional")
        judge, reached = self._reader() if s.functional.likeness else (None, {})
        objective = functional.FunctionalObjective(model, self.base.model, s.functional, judge)
        other = None if self.others is None else self.others.pictures
        with self.stage("functional") as progress:
            figures = functional.fit(
                objective, self.people.pictures, s.functional_loop, path, progress, other
            )
        sets = [self._own_latents(model, own) for own in self.sets]
        drawn = self._distribution(model, sets, path)
        figures |= reached | {f"dit_{name}": value for name, value in drawn.items()}
        self._export(model, s.name, figures)

    def paper(self) -> None:
        """The autoencoder of LoRAs, then MIF and DiT on its latents (arXiv:2408.06740)."""
        s, path = self.settings, self.run.path / "paper"
        model = self._model("paper")
        corpus = LoRAStore(s.corpus, model.layout)
        rows = {row.identity: place for place, row in enumerate(corpus.rows)}
        sets = [_with_loras(own, rows) for own in self.sets]
        weights = [LoRARows(corpus, [rows[name] for name in own.names]) for own in sets]
        with self.stage("autoencoder") as progress:
            figures = lae.fit(
                model.lae, weights[0], s.lae, path / "lae", _second(weights), progress
            )
        examples = [
            latent_dit.LatentExamples(own.photos(), latent_dit.corpus_latents(model, loras))
            for own, loras in zip(sets, weights, strict=True)
        ]
        figures |= self._distribution(model, examples, path)
        self._export(model, s.name if s.method == "paper" else f"{s.name}-paper", figures)

    @property
    def sets(self) -> list[People]:
        """The people to learn, and those to judge by if there are any."""
        return [own for own in (self.people, self.others) if own is not None]

    def _distribution(
        self, model: DiffLoRAModel, sets: list[latent_dit.LatentExamples], path: Path
    ) -> dict[str, float]:
        """The DiT of people's latents."""
        with self.stage("DiT") as progress:
            config = self.settings.dit
            return latent_dit.fit(model, sets[0], config, path / "dit", _second(sets), progress)

    def _own_latents(self, model: DiffLoRAModel, people: People) -> latent_dit.LatentExamples:
        """Latents that a model makes of the same number of photos of everybody."""
        photos = people.photos(people.fewest)
        return latent_dit.LatentExamples(
            photos, latent_dit.photo_latents(model, photos, len(people))
        )

    def _reader(self) -> tuple[FaceReader, dict[str, float]]:
        """The reader of faces in latents, for the likeness loss; and how well it reads."""
        data, path = self.people.pictures, self.run.path / "likeness"
        channels, *sides = data.latents[data.people[0, :1]].shape[1:]
        config = FaceReaderConfig(
            channels, data.features.sizes.face, crop=min(self.settings.face_crop, *sides)
        )
        with DrawnFrom(torch.Generator().manual_seed(self.settings.seed)):
            reader = FaceReader(config).to(self.device)
        with self.stage("likeness") as progress:
            face_reader.fit(reader, data, self.settings.likeness, path, progress)
        made = {name: part.cpu() for name, part in reader.state_dict().items()}
        facts = {"config": config.to_json()}
        launched().on_main(lambda: write_atomic(made, facts, self.run.path / READER))
        if self.others is None:
            return reader, {}
        reached = face_reader.mean_likeness(reader, self.others.pictures)
        self.run.say(
            f"faces read from latents of people to judge by: cosine {reached:.3f} with theirs"
        )
        return reader, {"reader_cosine": reached}

    def _export(self, model: DiffLoRAModel, name: str, figures: Mapping[str, float]) -> None:
        """Writes model, card and samples, on the main process."""
        if not launched().is_main:
            return
        s, facts = self.settings, self.dataset.facts
        source = {
            "license": s.license or facts.settings.get("licence", ""),
            "people": len(self.people),
            "pictures": int((self.people.pictures.people >= 0).sum()),
            "dataset": facts.digest,
            "base_model": f"{Path(s.base).name} {weights_digest(self.base.model.unet)[:16]}",
            "face_encoder": facts.face_encoder,
            "clip_vision": f"{Path(s.clip_vision).name} sha256 {self.clip_digest}",
            "difflora": __version__,
            "figures": {key: round(float(value), 6) for key, value in figures.items()},
        }
        file = self.run.path / MODEL.format(name)
        save_model(model.eval(), file, torch.float16, source)
        write_card(file, model, source, json.dumps(s.to_dict(), indent=1))
        self._draw(model, name)
        self.run.say(f"{shown(str(file), 300)}: {file.stat().st_size / 1e6:.0f} MB")

    def _draw(self, model: DiffLoRAModel, name: str) -> None:
        """Pictures of validation people, each from its first photo."""
        shown_people = self.others or self.people
        count = min(self.settings.samples, len(shown_people))
        if not count:
            return
        pictures, base = shown_people.pictures, self.base.model
        first = [pictures.features.select(int(row[0])) for row in pictures.people[:count]]
        settings = SampleSettings(SAMPLE_STEPS, SAMPLE_GUIDANCE)
        shape = pictures.latents[pictures.people[0, :1]].shape[1:]  # of the first one's picture
        latents = draw_people(model, base, first, self.prompts, settings, shape)
        base.vae.to(self.device)
        for number, image in enumerate(base.decode_latents(latents)):
            write_image(image.cpu(), self.run.samples / f"{name}-{number:03d}.png")

    @contextmanager
    def stage(self, name: str) -> Iterator[Progress]:
        """Progress of a stage, also told to the trackers."""
        place = self.run.path / "trackers" / name
        with self.run.watch(name) as watch:
            with tracked(self.settings.trackers, place, self.settings, watch) as progress:
                yield progress

    def _model(self, preset: str) -> DiffLoRAModel:
        """An untrained network of the size asked for, for the encoders and base at hand."""
        s, base = self.settings, self.base
        full = base.full_size if s.size == "auto" else s.size == "full"
        config = network_config(
            self.people.pictures.features.sizes,
            full,
            preset=preset,
            autoencoder=s.autoencoder,
            condition_rank=s.condition_rank,
            face_encoder=self.dataset.facts.face_encoder,
            image_encoder=f"{Path(s.clip_vision).name} {self.clip_digest[:12]}",
        )
        targets = TARGETS[s.targets]
        if preset == "paper":
            targets = edited_layers("attention", LoRAStore(s.corpus).layout.module_names)
        layout = base.model.layout(base.family, s.rank, targets)
        generator = torch.Generator().manual_seed(s.seed)
        return DiffLoRAModel(config, layout, generator=generator).to(self.device)


def _with_loras(people: People, rows: Mapping[str, int]) -> People:
    """Those of whom the corpus holds a LoRA, by their names.

    Raises:
        ConfigError: it holds none of them.
    """
    chosen = [place for place, name in enumerate(people.names) if name in rows]
    if not chosen:
        raise ConfigError(
            "The corpus holds a LoRA of none of these people: its names are not those of the "
            "dataset, or it has too few people for the share that is held out."
        )
    return people.some(chosen)


def _second(values: Sequence[T]) -> T | None:
    """The second of one or two."""
    return values[1] if len(values) > 1 else None
