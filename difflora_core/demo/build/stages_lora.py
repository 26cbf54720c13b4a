"""The stages that make DiffLoRA models on the demo base (see stages.py)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ...base_model.diffusers_base import DiffusersBase
from ...lora.weights import LoRAWeights
from ...models.difflora import DiffLoRAConfig, DiffLoRAModel
from ...models.dit import DiTConfig
from ...models.face_reader import FaceReader, FaceReaderConfig
from ...models.lae.config import LAEConfig
from ...models.predictor import PredictorConfig
from ...storage.checkpoint import load_model, save_model
from ...storage.lora_corpus import LoRACorpus
from ...storage.lora_file import write_lora_file
from ...storage.safetensors_io import read_file, write_atomic
from ...training.difflora import face_reader, lae, lae_encoder, latent_dit
from ...training.difflora import functional as difflora
from ...training.difflora.lora_corpus import CorpusConfig, build_corpus
from ...training.loop import LoopConfig, Progress
from ...training.lora.dreambooth import DreamBoothConfig, DreamBoothExamples
from ...vision.face_choice import FaceOptions
from ...vision.features import FeatureSizes, extract_features
from .. import examples, paths
from ..networks.base import LORA_RANK, demo_layout
from ..networks.vae import VAE_CONFIG
from ..world.pool import PicturePool
from .features import demo_encoders, person_pictures, pool_features
from .stages import Figures, base_and_latents, drawn_pool, pool_latents, validation_pool

PICTURES = 10
"""Pictures of each person in `drawn_pool`."""
VALIDATION_PICTURES = 12

SIZES = FeatureSizes(face=128, image=64, tokens=65, token_dim=128)
LAE = LAEConfig(latent_tokens=8, latent_dim=16, basis_size=40, learn_down=True, encoder="mirror")
PAPER_LAE = replace(LAE, basis_size=32, learn_down=False, encoder="own")
READER = FaceReaderConfig(channels=VAE_CONFIG["latent_channels"], face=SIZES.face)
READER_LOOP = LoopConfig(steps=700, learning_rate=2e-3, decay=0.6, precision="bf16", seed=5)
FUNCTIONAL_LOOP = LoopConfig(
    steps=2400,
    learning_rate=2e-3,
    matrix_rate=0.01,
    warmup=50,
    decay=0.4,
    ema=0.99,
    precision="bf16",
    checkpoint_every=200,
    log_every=25,
    seed=2,
)
FUNCTIONAL = difflora.FunctionalConfig(batch=64, likeness=2.0)
DISTRIBUTION = latent_dit.LatentDiTConfig(
    loop=LoopConfig(
        steps=2000, learning_rate=1e-3, ema=0.99, weight_decay=0.1, validate_every=250, patience=3
    ),
)
CORPUS_PEOPLE, CORPUS_HELD_OUT = 192, 32
CORPUS = CorpusConfig(
    group=16,
    dreambooth=DreamBoothConfig(
        rank=LORA_RANK,
        steps=60,
        learning_rate=2e-2,
        decay="linear",
        train_down=False,
        loss_weighting="uniform",
        precision="bf16",
    ),
)


def new_model(seed: int, preset: str = "functional", **parts: object) -> DiffLoRAModel:
    """An untrained demo model."""
    small = {"lae": LAE, "dit": DiTConfig(width=96, depth=4, mlp_ratio=2.0)}
    config = DiffLoRAConfig.demo(
        SIZES,
        **{**small, **parts},
        preset=preset,
        face_encoder="demo_faces/rec_demo.onnx",
        image_encoder="demo CLIP vision",
    )
    generator = torch.Generator().manual_seed(seed)
    return DiffLoRAModel(config, demo_layout(), generator=generator)


def features(progress: Progress) -> Figures:
    """Features of every picture, by the calls that a user's photo goes through."""
    figures: Figures = {}
    for name, pool in (("validation", validation_pool()), ("train", drawn_pool())):
        found = pool_features(name, pool, progress).face_found
        figures[f"{name}_faces_found"] = float(found.float().mean())
    return figures


def reader(progress: Progress) -> Figures:
    """The reader of faces in latents, for the likeness loss; it is not shipped."""
    base, data = people("train", drawn_pool())
    made = FaceReader(READER)
    folder = paths.BUILD / "reader"
    face_reader.fit(made, data, READER_LOOP, folder, progress)
    write_atomic(made.state_dict(), {}, paths.FACE_READER)
    held_out = person_data(base, "validation", validation_pool())
    return {"validation_cosine": face_reader.mean_likeness(made, held_out)}


def functional(progress: Progress) -> Figures:
    """The functional preset: photo to LoRA through the base's denoising loss."""
    model = new_model(3)
    base = train_functional(model, FUNCTIONAL_LOOP, paths.BUILD / "functional", progress)
    save_model(model, paths.DIFFLORA, torch.float16, {"stage": "functional"})
    return validation_losses(model, base)


def train_functional(
    model: DiffLoRAModel, loop: LoopConfig, folder: Path, progress: Progress
) -> DiffusersBase:
    """Train MIF, predictor and decoder on the people of the `train` pool; gives back the base."""
    base, data = people("train", drawn_pool())
    judge = FaceReader(READER)
    judge.load_state_dict(read_file(paths.FACE_READER, "face reader")[0])
    objective = difflora.FunctionalObjective(model, base, FUNCTIONAL, judge)
    difflora.fit(objective, data, loop, folder, progress)
    return base


def distribution(progress: Progress) -> Figures:
    """The DiT of the functional preset: how latents of a person's photos are distributed."""
    model = load_model(paths.DIFFLORA)
    train = _latent_examples(model, "train", drawn_pool(), 1500, PICTURES)
    held_out = _latent_examples(model, "validation", validation_pool(), 100, VALIDATION_PICTURES)
    folder = paths.BUILD / "distribution"
    figures = latent_dit.fit(model, train, DISTRIBUTION, folder, held_out, progress)
    save_model(model, paths.DIFFLORA, torch.float16, {"stage": "distribution"})
    return dict(figures)


def encoder(progress: Progress) -> Figures:
    """The LAE encoder of the functional preset: existing LoRAs enter the latent space.

    In closed form, towards the latents of the people's photos, which were themselves learned
    through the base's denoising loss. (Training it on through that loss made it worse.)
    """
    model = load_model(paths.DIFFLORA)
    base, _ = base_and_latents("validation")
    corpus = corpus_of_loras(base, progress)
    count = CORPUS_PEOPLE + CORPUS_HELD_OUT
    photos = _latent_examples(model, "train", drawn_pool(), count, PICTURES)
    known = photos.latents.mean(1)
    train, held_out = (
        lae_encoder.EncoderExamples(_rows(corpus, rows), known[rows])
        for rows in (slice(0, CORPUS_PEOPLE), slice(CORPUS_PEOPLE, None))
    )
    figures = lae_encoder.fit_mirror(model.lae, train, held_out)
    save_model(model, paths.DIFFLORA, torch.float16, {"stage": "encoder"})
    return dict(figures)


def paper(progress: Progress) -> Figures:
    """The paper preset: LAE on a corpus of DreamBooth LoRAs, then MIF and DiT on its latents."""
    base, _ = base_and_latents("validation")
    corpus = corpus_of_loras(base, progress)
    model = new_model(4, "paper", predictor=PredictorConfig(width=32, depth=1), lae=PAPER_LAE)
    train, held_out = slice(0, CORPUS_PEOPLE), slice(CORPUS_PEOPLE, None)
    loop = LoopConfig(steps=1500, learning_rate=2e-3, ema=0.99, validate_every=250, patience=3)
    settings = lae.LAETrainConfig(loop=loop)
    folder = paths.BUILD / "paper"
    learned = lae.fit(
        model.lae, _rows(corpus, train), settings, folder / "lae", _rows(corpus, held_out), progress
    )
    feats = pool_features("train", drawn_pool().head(PICTURES * len(corpus.identities)))
    sets = []
    for rows in (train, held_out):
        chosen = range(*rows.indices(len(corpus.identities)))
        photos = [k * PICTURES + j for k in chosen for j in range(PICTURES)]
        latents = latent_dit.corpus_latents(model, _rows(corpus, rows))
        sets.append(latent_dit.LatentExamples(feats.select(photos), latents))
    figures = latent_dit.fit(model, sets[0], DISTRIBUTION, folder / "dit", sets[1], progress)
    save_model(model, paths.DIFFLORA_PAPER, torch.float16, {"stage": "paper"})
    return {**learned, **figures}


def example(progress: Progress) -> Figures:
    """The photos that the workflows load, and a LoRA file that the model made of other photos."""
    examples.write_photos(paths.ROOT / "workflows")
    model = load_model(paths.DIFFLORA)
    photos = examples.other_pictures(4, examples.SITTER).images
    found = extract_features(photos, *demo_encoders(), FaceOptions(on_missing="skip"))
    with torch.no_grad():
        latent = model.mean_latent(model.condition(found.features))
        write_lora_file(paths.OLD_LORA, model.decode(latent).batch_item(0), demo_layout())
    progress(1, 1, {})
    return {"person": examples.PERSON, "old_lora": examples.SITTER}


def people(name: str, pool: PicturePool) -> tuple[DiffusersBase, difflora.PersonPictures]:
    """The base, and a pool's pictures ready for the functional recipe."""
    base, _ = base_and_latents(name)
    return base, person_data(base, name, pool)


def person_data(base: DiffusersBase, name: str, pool: PicturePool) -> difflora.PersonPictures:
    """A pool's pictures ready for the functional recipe."""
    latents = pool_latents(base.vae, name, pool)
    return person_pictures(base, latents, pool, pool_features(name, pool))


@torch.no_grad()
def validation_losses(model: DiffLoRAModel, base: DiffusersBase, batches: int = 12) -> Figures:
    """Denoising loss on other pictures of validation people, for one photo; and without a LoRA."""
    data = person_data(base, "validation", validation_pool())
    config = difflora.FunctionalConfig(batch=64, photos=1, feature_noise=0, latent_noise=0)
    objective = difflora.FunctionalObjective(model, base, config)
    draw = difflora.person_batches(data, model, config, len(base.alphas_cumprod))
    totals = torch.zeros(2)
    for k in range(batches):
        batch = draw(torch.Generator().manual_seed(5000 + k))
        with torch.autocast("cpu", torch.bfloat16):
            totals[0] += objective(batch)[1]["denoising"]
            totals[1] += objective.without_lora(batch)
    with_lora, without = (totals / batches).tolist()
    return {"validation_denoising": with_lora, "validation_denoising_base": without}


def corpus_of_loras(base: DiffusersBase, progress: Progress) -> LoRACorpus:
    """DreamBooth LoRAs of training people with one shared `down`, kept on disk."""
    path = paths.BUILD / "corpus.safetensors"
    shared = load_model(paths.DIFFLORA).lae.down_factors()
    count = CORPUS_PEOPLE + CORPUS_HELD_OUT
    data = _dreambooth_examples(base, count)

    def pictures(numbers: Sequence[int]) -> DreamBoothExamples:
        rows = list(numbers)
        return DreamBoothExamples(data.latents[rows], [data.prompts[k] for k in rows], rows)

    down = {name: factor.detach() for name, factor in shared.items()}
    return build_corpus(base, range(count), pictures, CORPUS, path, down, progress)


def _dreambooth_examples(base: DiffusersBase, count: int) -> DreamBoothExamples:
    drawn = drawn_pool()
    latents = pool_latents(base.vae, "train", drawn)
    pool = drawn.head(count * PICTURES)
    captions = [scene.caption() for scene in pool.scenes]
    grouped_captions = [captions[k : k + PICTURES] for k in range(0, len(captions), PICTURES)]
    grouped = latents[: len(pool)].float().reshape(count, PICTURES, *latents.shape[1:])
    return DreamBoothExamples(grouped, grouped_captions)


def _latent_examples(
    model: DiffLoRAModel, name: str, pool: PicturePool, count: int, pictures: int
) -> latent_dit.LatentExamples:
    feats = pool_features(name, pool).select(range(count * pictures))
    return latent_dit.LatentExamples(feats, latent_dit.photo_latents(model, feats, count))


def _rows(corpus: LoRACorpus, rows: slice) -> LoRAWeights:
    return corpus.select(corpus.identities[rows]).weights
