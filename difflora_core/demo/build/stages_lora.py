"""The stages that make DiffLoRA models on the demo base, by the commands that users call.

Photos become a dataset by `prepare`, LoRAs of people by `corpus`, models by `train`. Two stages
call the library: no command fits an encoder to a model that is trained already, and the example is
the demo's own.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from ...base_model.precision import autocast
from ...commands import corpus as corpus_command
from ...commands import train
from ...commands.encoders import file_digest, open_encoders
from ...commands.local_base import open_base
from ...commands.main import plain_console
from ...commands.train_data import Encoders, People, load_people
from ...data.lora_store import LoRAStore
from ...data.prepared import PreparedDataset
from ...lora.weights import LoRAWeights
from ...models.difflora import DiffLoRAModel
from ...storage.atomic import replacing
from ...storage.checkpoint import load_model, read_description, save_model
from ...storage.lora_corpus import LoRACorpus
from ...storage.lora_file import write_lora_file
from ...training.difflora import functional as difflora
from ...training.difflora import lae_encoder, latent_dit
from ...training.difflora.lora_corpus import CorpusConfig
from ...training.loop import LoopConfig, Progress
from ...training.lora.dreambooth import DreamBoothConfig
from ...vision.face_choice import FaceOptions
from ...vision.features import ImageFeatures, extract_features
from .. import examples, paths
from ..networks.base import LORA_RANK, load_base
from ..world.pool import PicturePool, cached_pool, portrait_pool
from .features import demo_encoders
from .people import dataset_folder, prepared
from .stages import Figures, drawn_pool, validation_pool

PEOPLE, PICTURES = 1500, 10
"""Of `drawn_pool`: so many people with so many pictures each teach DiffLoRA."""
TRAIN, VALIDATION, CORPUS_SET = "train", "validation", "corpus"
"""The datasets; that of the corpus has the first people of the first."""
PAPER_SET, DOWN_SET = "paper", "down"
"""Of the paper preset: the people of its corpus, and others from whom its `down` comes."""

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
    validate_every=2400,  # at the end alone: the average of the last steps is the best
)
FUNCTIONAL = difflora.FunctionalConfig(batch=64, likeness=2.0)
DISTRIBUTION = latent_dit.LatentDiTConfig(
    loop=LoopConfig(
        steps=2000, learning_rate=1e-3, ema=0.99, weight_decay=0.1, validate_every=250, patience=3
    ),
    weighting="min_snr",
)
PAPER_DISTRIBUTION = replace(DISTRIBUTION, weighting="uniform", mixup=1.0)
"""Its best guess is read from pure noise; each of its people has one latent, and is soon learned by
heart."""
PAPER_PEOPLE, PAPER_HELD_OUT, DOWN_PEOPLE, PAPER_PICTURES = 1000, 40, 16, 32
PROMPT = "photo of a person, smiling, blue background, red shirt"
"""What validation people are drawn with."""
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

PAPER_COURSE = replace(CORPUS.dreambooth, learning_rate=0.12, eps=0.1)
"""Of the paper preset's LoRAs: short steps, by the size of the gradient. After long equal ones
LoRAs differ by the pictures and the noise that they met, and hardly by the person."""
DOWN_COURSE = replace(CORPUS.dreambooth, train_down=True, same_start=True, learning_rate=1e-2)
"""Of LoRAs whose common `down` is taken: both factors learn, from one start for all."""


def dataset(progress: Progress) -> Figures:
    """Photos of people as datasets: faces found, latents and captions encoded."""
    figures: Figures = {}
    people = drawn_pool().head(PEOPLE * PICTURES)
    pools = {TRAIN: people, VALIDATION: validation_pool(), CORPUS_SET: _corpus_pool()}
    for name, pool in pools.items():
        made = prepared(name, pool)
        figures |= {f"{name}_people": made.facts.people, f"{name}_pictures": len(made)}
    return figures


def functional_settings() -> train.Settings:
    """How the demo's model is trained."""
    return train.Settings(
        dataset=str(dataset_folder(TRAIN)),
        folder=str(_run("functional")),
        validation=str(dataset_folder(VALIDATION)),
        held_out=0.0,
        clip_vision=str(paths.CLIP_VISION),
        size="small",
        rank=LORA_RANK,
        targets="transformer",
        likeness=READER_LOOP,
        face_crop=0,  # 16 latent pixels are a face, hair and shoulders
        functional=FUNCTIONAL,
        functional_loop=FUNCTIONAL_LOOP,
        dit=DISTRIBUTION,
        sample_prompt=PROMPT,
        license="Apache-2.0",
        seed=3,
    )


def functional(progress: Progress) -> Figures:
    """The functional preset: reader of faces, photo to LoRA, and the DiT of its latents.

    The reader is not shipped.
    """
    settings = functional_settings()
    train.run(settings, plain_console())
    _copy(_trained("functional"), paths.DIFFLORA)
    _copy(_run("functional") / train.READER, paths.FACE_READER)
    return _figures("functional") | validation_losses(load_model(paths.DIFFLORA))


def corpus(progress: Progress) -> Figures:
    """DreamBooth LoRAs of training people, all over the functional model's `down`."""
    return {"loras": len(_mirrored())}


def _mirrored() -> LoRACorpus:
    """That corpus; what is missing of it is made, the people's dataset too."""
    return _loras(CORPUS_SET, _corpus_pool(), CORPUS.dreambooth, str(paths.DIFFLORA))


def paper_corpus(progress: Progress) -> Figures:
    """The corpus of the paper preset."""
    return {"loras": len(paper_loras())}


def paper_loras() -> LoRACorpus:
    """That corpus, which owes nothing to the functional model; what is missing of it is made.

    A few people's LoRAs train both factors; the `down` that serves all of them best is that of
    everybody else, who have the same start then.
    """
    pool, apart = _paper_pool(), DOWN_PEOPLE * PAPER_PICTURES
    _loras(DOWN_SET, pool.tail(apart), DOWN_COURSE)
    down = str(_corpus_folder(DOWN_SET))
    return _loras(PAPER_SET, pool.head(len(pool) - apart), PAPER_COURSE, down)


def _loras(name: str, pool: PicturePool, course: DreamBoothConfig, down: str = "") -> LoRACorpus:
    """LoRAs of a pool's people over a `down`, by `prepare` and `corpus`."""
    prepared(name, pool)
    settings = corpus_command.Settings(
        source=str(dataset_folder(name)),
        out=str(_corpus_folder(name)),
        base="demo",
        rank=course.rank,
        group=CORPUS.group,
        training=course,
        down=down,
    )
    corpus_command.run(settings, plain_console())
    store = LoRAStore(_corpus_folder(name))
    names = tuple(int(row.identity) for row in store.rows)
    return LoRACorpus(store.layout, names, store.batch(range(len(store))))


def features_of(name: str, loras: LoRACorpus, progress: Progress) -> ImageFeatures:
    """Features of PICTURES photos of everybody in a dataset's corpus, person by person."""
    people = people_of(name, progress)
    places = {int(name): place for place, name in enumerate(people.names)}
    own = people.some([places[identity] for identity in loras.identities])
    return own.photos(PICTURES)


def encoder(progress: Progress) -> Figures:
    """The LAE encoder of the functional preset: existing LoRAs enter the latent space.

    In closed form, towards the latents of the people's photos, which were themselves learned
    through the base's denoising loss. (Training it on through that loss made it worse.)
    """
    made = _trained("functional")
    model = load_model(made)
    loras = _mirrored()
    features = features_of(CORPUS_SET, loras, progress)
    known = latent_dit.photo_latents(model, features, len(loras)).mean(1)
    train_people, held_out = (
        lae_encoder.EncoderExamples(_rows(loras, rows), known[rows])
        for rows in (slice(0, CORPUS_PEOPLE), slice(CORPUS_PEOPLE, None))
    )
    figures = lae_encoder.fit_mirror(model.lae, train_people, held_out)
    source = {**read_description(made).source, "encoder": figures}
    save_model(model, paths.DIFFLORA, torch.float16, source)
    return dict(figures)


def paper(progress: Progress) -> Figures:
    """The paper preset: LAE on a corpus of DreamBooth LoRAs, then MIF and DiT on its latents."""
    settings = train.Settings(
        dataset=str(dataset_folder(PAPER_SET)),
        folder=str(_run("paper")),
        method="paper",
        corpus=str(_corpus_folder(PAPER_SET)),
        held_out=PAPER_HELD_OUT / (PAPER_PEOPLE + PAPER_HELD_OUT),
        clip_vision=str(paths.CLIP_VISION),
        size="small",
        rank=LORA_RANK,
        autoencoder="linear",
        dit=PAPER_DISTRIBUTION,
        sample_prompt=PROMPT,
        license="Apache-2.0",
        seed=4,
    )
    train.run(settings, plain_console())
    _copy(_trained("paper"), paths.DIFFLORA_PAPER)
    return _figures("paper")


def example(progress: Progress) -> Figures:
    """The photos that the workflows load, and a LoRA file that the model made of other photos."""
    examples.write_photos(paths.ROOT / "workflows")
    model = load_model(paths.DIFFLORA)
    photos = examples.other_pictures(4, examples.SITTER).images
    found = extract_features(photos, *demo_encoders(), FaceOptions(on_missing="skip"))
    with torch.no_grad():
        latent = model.mean_latent(model.condition(found.features))
        write_lora_file(paths.OLD_LORA, model.decode(latent).batch_item(0), model.layout)
    progress(1, 1, {})
    return {"person": examples.PERSON, "old_lora": examples.SITTER}


def people_of(name: str, progress: Progress) -> People:
    """The people of a dataset as `train` sees them."""
    device = torch.device("cpu")
    _, image = open_encoders("", str(paths.CLIP_VISION), device)
    encoders = Encoders(open_base("demo", device).model, image, file_digest(paths.CLIP_VISION))
    place = paths.BUILD / "encoded"
    return load_people(PreparedDataset(dataset_folder(name)), encoders, place, progress)


@torch.no_grad()
def validation_losses(model: DiffLoRAModel, batches: int = 12) -> Figures:
    """Denoising loss on other pictures of validation people, for one photo; and without a LoRA."""
    data, base = people_of(VALIDATION, _quiet).pictures, load_base(paths.BASE)
    config = difflora.FunctionalConfig(batch=64, photos=1, feature_noise=0, latent_noise=0)
    objective = difflora.FunctionalObjective(model, base, config)
    draw = difflora.person_batches(data, model, config, len(base.alphas_cumprod))
    totals = torch.zeros(2)
    for k in range(batches):
        batch = draw(torch.Generator().manual_seed(5000 + k))
        with autocast(torch.device("cpu"), "bf16"):
            totals[0] += objective(batch)[1]["denoising"]
            totals[1] += objective.without_lora(batch)
    with_lora, without = (totals / batches).tolist()
    return {"validation_denoising": with_lora, "validation_denoising_base": without}


def _corpus_pool() -> PicturePool:
    """Portraits of the people of the corpus."""
    return drawn_pool().head((CORPUS_PEOPLE + CORPUS_HELD_OUT) * PICTURES)


def _paper_pool() -> PicturePool:
    """Portraits of the people of the paper preset, more of each than the base has seen."""
    people = PAPER_PEOPLE + PAPER_HELD_OUT + DOWN_PEOPLE
    return cached_pool(
        paths.POOLS / "paper.safetensors", lambda: portrait_pool("train", people, PAPER_PICTURES)
    )


def _run(name: str) -> Path:
    """Folder of a command's run."""
    return paths.BUILD / "runs" / name


def _corpus_folder(name: str) -> Path:
    """Where the LoRAs of a dataset's people are kept."""
    return _run(f"corpus_{name}")


def _trained(run: str) -> Path:
    """The model of a run of `train`."""
    return _run(run) / train.MODEL.format("model")


def _figures(run: str) -> Figures:
    """What a run of `train` measured."""
    return dict(read_description(_trained(run)).source["figures"])


def _copy(made: Path, to: Path) -> None:
    """A file of a run to where it is kept, whole or not at all."""
    with replacing(to) as temporary:
        shutil.copyfile(made, temporary)


def _rows(loras: LoRACorpus, rows: slice) -> LoRAWeights:
    return loras.select(loras.identities[rows]).weights


def _quiet(done: int, total: int, metrics: object) -> None:
    """Tells nobody."""
