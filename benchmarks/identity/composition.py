"""`make bench name=composition args='--quick --json FILE'`: identities as material, judged.

- `two_people`: real ComfyUI puts two people side by side: with masks, without, and by words of the
  prompt without masks, once in the order of the prompt and once in the other one; each half is read
  by the judge that conditions nothing.
- `blend`: along the slerp from A to B likeness to A falls and likeness to B rises.
- `invented`: people without a photo are distinct from each other and from the training people, and
  the same in every picture; real people give the scale.

People of a split that no trained part has met; every picture of a comparison has the same noise.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from difflora_core.config import Config
from difflora_core.demo.comfyui.server import ComfyServer
from difflora_core.demo.networks.judges import PLAIN_LOOKS, Judges
from difflora_core.demo.workflows.masked_people import (
    PICTURE,
    MaskedScene,
    masked_people,
    people_by_words,
)
from difflora_core.demo.world.identities import split_seeds
from difflora_core.demo.world.scenes import PICTURE_SIZE, Scene, render_portraits
from difflora_core.evaluation.metrics import centroid
from difflora_core.evaluation.report import Report
from difflora_core.models.difflora import DiffLoRAModel
from difflora_core.models.lae.autoencoder import LoRALatent
from difflora_core.models.latent_math import blend
from difflora_core.storage.image_files import write_image

from ..command import benchmark_console, command_parser, commit, machine, set_threads, write_report
from ..prompts import PROMPTS
from .artefacts import Artefacts, load_artefacts
from .drawing import PictureSampler, Plan
from .likeness import rank_correlation, three_distributions

PLAIN_PROMPTS = tuple(scene for scene in PROMPTS if scene.look in PLAIN_LOOKS)
PARTS = ("blend", "invented", "two_people")
INVENTED_PROMPTS = 8
KNOWN_PICTURES = range(40, 56)
"""Rendered pictures by which the judge knows a person; the photo has number 0."""


@dataclass(frozen=True)
class Size(Config):
    """How much is drawn.

    `pairs`: pairs of people; `ways`: points from A to B; `prompts`: pictures at each point;
    `invented`: people without a photo; `training`: training people to compare them with, and
    `training_pictures` of each.
    """

    pairs: int = 20
    ways: int = 9
    prompts: int = 6
    invented: int = 32
    training: int = 5000
    training_pictures: int = 4


QUICK = Size(pairs=5, ways=5, prompts=2, invented=8, training=500)


@dataclass(frozen=True)
class Cast:
    """Pairs of people: `seeds` (2 P,), `photos` (2 P, H, W, 3), `centroids` (2 P, E); the people
    of pair k are number k and k + P."""

    seeds: tuple[int, ...]
    photos: Tensor
    centroids: Tensor

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Numbers of the two people of every pair."""
        half = len(self.seeds) // 2
        return [(k, k + half) for k in range(half)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = command_parser("Blended, invented and placed people, judged.")
    parser.add_argument("--quick", action="store_true", help="5 pairs, 8 invented people")
    parser.add_argument("--split", choices=("validation", "test"), default="test")
    parser.add_argument("--model", type=Path, help="another model than the shipped one")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="only these parts")
    options = parser.parse_args(arguments)
    set_threads(options.threads)
    console, started = benchmark_console(), time.perf_counter()
    size = QUICK if options.quick else Size()
    models = {"functional": options.model} if options.model else None
    artefacts = load_artefacts(models, console.print)
    cast = make_cast(artefacts.judges, options.split, size.pairs)
    results: dict[str, Mapping[str, object]] = {}
    if "blend" in options.only:
        results["blend"] = measure_blend(artefacts, cast, size)
    if "invented" in options.only:
        results["invented"] = measure_invented(artefacts, cast, size)
    if "two_people" in options.only:
        with tempfile.TemporaryDirectory() as folder, ComfyServer(Path(folder)) as server:
            results["two_people"] = measure_two_people(server, artefacts.judges, cast)
    print_results(results, console)
    facts = {
        **results,
        "split": options.split,
        "quick": options.quick,
        "size": asdict(size),
        "commit": commit(),
        "machine": machine(),
        "minutes": (time.perf_counter() - started) / 60,
    }
    write_report(Report({}, facts), options.json, console)
    return 0


def make_cast(judges: Judges, split: str, pairs: int) -> Cast:
    """People of a split, their photo, and what the judge knows of them."""
    seeds = split_seeds(split, 2 * pairs)
    photos = render_portraits(seeds, [0] * len(seeds), looks=("photo",)).images
    return Cast(tuple(seeds), photos, known(judges, seeds, KNOWN_PICTURES))


def known(judges: Judges, seeds: Sequence[int], numbers: Sequence[int]) -> Tensor:
    """Mean directions (I, E) of rendered pictures of people."""
    rows = []
    for group in torch.tensor(list(seeds)).split(64):
        who = group.repeat_interleave(len(numbers)).tolist()
        pictures = render_portraits(who, [*numbers] * len(group), looks=PLAIN_LOOKS).images
        rows.append(centroid(judges.embed(pictures).unflatten(0, (len(group), len(numbers)))))
    return torch.cat(rows)


def measure_blend(artefacts: Artefacts, cast: Cast, size: Size) -> dict[str, object]:
    """Likeness to both ends along the way of every pair."""
    model = artefacts.models["functional"]
    ends = photo_latents(artefacts, model, cast)
    ways = [k / (size.ways - 1) for k in range(size.ways)]
    first, second = (LoRALatent(part, ends.layout_hash, ends.space) for part in ends.z.chunk(2))
    to_a, to_b = [], []
    draw = person_sampler(artefacts, cast.seeds[: size.pairs], PLAIN_PROMPTS[: size.prompts])
    for way in ways:
        pictures = draw(model, blend([first, second], [1 - way, way]))
        faces = artefacts.judges.embed(pictures.flatten(0, 1)).unflatten(0, (size.pairs, -1))
        for likeness, known_people in zip((to_a, to_b), cast.centroids.chunk(2), strict=True):
            likeness.append(torch.einsum("pce,pe->pc", faces, known_people).mean(1))
    a, b = torch.stack(to_a, 1), torch.stack(to_b, 1)  # pairs, ways
    falls, rises = -rank_correlation(a), rank_correlation(b)
    return {
        "spearman": float(torch.cat([falls, rises]).mean()),
        "spearman_falls": falls.tolist(),
        "spearman_rises": rises.tolist(),
        "ways": ways,
        "likeness_to_a": a.mean(0).tolist(),
        "likeness_to_b": b.mean(0).tolist(),
        "pairs": size.pairs,
    }


def measure_invented(artefacts: Artefacts, cast: Cast, size: Size) -> dict[str, object]:
    """How much invented people are themselves, each other, and somebody of the training."""
    model = artefacts.models["functional"]
    scenes = PLAIN_PROMPTS[:INVENTED_PROMPTS]
    people = model.sample_latent(None, range(size.invented))
    draw = person_sampler(artefacts, range(size.invented), scenes)
    faces = artefacts.judges.embed(draw(model, people).flatten(0, 1))
    own = faces.unflatten(0, (size.invented, len(scenes)))
    predicted = photo_latents(artefacts, model, cast)
    drawn = person_sampler(artefacts, cast.seeds, scenes)(model, predicted)
    real = artefacts.judges.embed(drawn.flatten(0, 1)).unflatten(0, (len(cast.seeds), len(scenes)))
    training = known(
        artefacts.judges, split_seeds("train", size.training), range(size.training_pictures)
    )
    return {
        **three_distributions(own, training, ""),
        **three_distributions(real, training, "photo_"),
        "people": size.invented,
        "prompts": len(scenes),
        "training_people": size.training,
    }


def measure_two_people(server: ComfyServer, judges: Judges, cast: Cast) -> dict[str, object]:
    """Share of pairs in which each half of the picture is nearest to its own person."""
    names = []
    for seed, photo in zip(cast.seeds, cast.photos, strict=True):
        path = server.base_directory / f"person{seed}.png"
        write_image(photo, path)
        names.append(server.client.upload_picture(path))
    result: dict[str, object] = {"pairs": len(cast.pairs)}
    for word, draw in WAYS.items():
        halves = [
            two_halves(server, draw([names[a], names[b]], number))
            for number, (a, b) in enumerate(cast.pairs)
        ]
        faces = judges.embed(torch.cat(halves)).unflatten(0, (-1, 2))  # pair, half, E
        if word == SWAPPED:
            faces = faces.flip(1)
        right = placed_right(faces, cast)
        result |= {f"{word}_{name}": float(share.float().mean()) for name, share in right.items()}
    return result


def _by_words(photos: Sequence[str], seed: int, swapped: bool = False) -> dict[str, Any]:
    """Without masks; swapped, the first person has the words that stand on the right."""
    scene = MaskedScene(seed=seed)
    words = scene.words[::-1] if swapped else scene.words
    return people_by_words(photos, replace(scene, words=words))


SWAPPED = "maskless_swapped"
WAYS: dict[str, Callable[[Sequence[str], int], dict[str, Any]]] = {
    "masked": lambda photos, seed: masked_people(photos, MaskedScene(seed=seed)),
    "unmasked": lambda photos, seed: masked_people(photos, MaskedScene(seed=seed, masks=False)),
    "maskless": _by_words,
    SWAPPED: lambda photos, seed: _by_words(photos, seed, swapped=True),
}
"""Ways to put two people into a picture, by photos and seed; the first person left, but where they
are swapped."""


def two_halves(server: ComfyServer, prompt: dict[str, Any]) -> Tensor:
    """The left and the right half (2, H, W, 3) of a picture of two people."""
    picture = server.client.run(prompt).picture(PICTURE)
    return torch.stack(torch.from_numpy(picture.copy()).float().div(255).split(PICTURE_SIZE, 1))


def placed_right(faces: Tensor, cast: Cast) -> dict[str, Tensor]:
    """Judges halves (P, 2, E).

    `correct` (P,): both halves are nearer to their own person than to the other; `regions` (P, 2):
    each half alone; `rank1` (P, 2): nearest to its own person among all people of the cast.
    """
    pairs = torch.tensor(cast.pairs)  # P 2
    likeness = faces @ cast.centroids.T  # P 2 people
    own = likeness.gather(2, pairs[:, :, None])[..., 0]
    other = likeness.gather(2, pairs.flip(1)[:, :, None])[..., 0]
    regions = own > other
    return {
        "correct": regions.all(1),
        "regions": regions,
        "rank1": likeness.argmax(2) == pairs,
    }


@torch.no_grad()
def photo_latents(artefacts: Artefacts, model: DiffLoRAModel, cast: Cast) -> LoRALatent:
    """The best guess for everybody from one photo."""
    return model.mean_latent(model.condition(artefacts.features(cast.photos[:, None])))


def person_sampler(artefacts: Artefacts, seeds: Sequence[int], scenes: Sequence[Scene]):
    """Draws people (model, latents) in fixed scenes under fixed noise: (I, scenes, H, W, 3)."""
    plan = Plan(tuple(scenes), repeats=0)
    sampler = PictureSampler(artefacts.base, plan, list(seeds))

    def draw(model: DiffLoRAModel, latents: LoRALatent) -> Tensor:
        with torch.no_grad():
            return sampler.pictures(model.decode(latents))

    return draw


def print_results(results: Mapping[str, Mapping[str, object]], console: Console) -> None:
    """Print what was found."""
    if blended := results.get("blend"):
        for end in ("a", "b"):
            curve = "  ".join(f"{value:.3f}" for value in blended[f"likeness_to_{end}"])
            console.print(f"blend: likeness to {end.upper()} along the way: {curve}")
        console.print(f"blend: Spearman {blended['spearman']:.3f} over {blended['pairs']} pairs")
    if invented := results.get("invented"):
        rows = {name: value for name, value in invented.items() if isinstance(value, dict)}
        console.print(Report(rows).to_markdown())
        console.print(
            f"invented: {invented['distinct']:.0%} of {invented['people']} people are nearer to "
            f"themselves than to any of {invented['training_people']} training people (people with "
            f"a photo: {invented['photo_distinct']:.0%})"
        )
    if two := results.get("two_people"):
        for word in WAYS:
            console.print(
                f"two people, {word}: {two[f'{word}_correct']:.0%} of {two['pairs']} pairs right, "
                f"{two[f'{word}_regions']:.0%} of the halves, {two[f'{word}_rank1']:.0%} nearest "
                "among everybody"
            )
