"""From pictures to columns: every judge, averaged over prompts, one number per person."""

from __future__ import annotations

import torch
from safetensors.torch import save
from torch import Tensor

from difflora_core.demo.networks.judges import PLAIN_LOOKS, Judges
from difflora_core.evaluation.distribution import frechet_distance, kernel_distance
from difflora_core.evaluation.metrics import (
    attribute_agreement,
    centroid,
    copy_paste,
    face_similarity,
    parameter_error,
    recognition_rate,
    seed_diversity,
)
from difflora_core.lora.formats.state_dict import to_state_dict
from difflora_core.lora.weights import LoRAWeights

from ..prompts import asked
from .drawing import Plan
from .people import People

COLUMNS = (
    "strength",
    "denoising_loss",
    "face_similarity",
    "parameter_error",
    "parameter_error_read",
    "rank1",
    "copy_paste",
    "prompt_agreement",
    "seed_diversity",
    "fid",
    "kid",
    "seconds",
    "step_ms",
    "file_kb",
    "model_mb",
)
"""Columns of the table.

`parameter_error` is against the true parameters, `parameter_error_read` against what the same
regressor reads off other real pictures of the person. Likeness is judged on photo and cartoon
prompts alone, because a painting veils the hues. `copy_paste` compares with the first photo, which
every row is made from, and with the real pictures that no row has seen. `fid` and `kid` are of the
first seeds of all people and prompts against as many real pictures, by features of the judge of
prompts; with so few pictures FID is far too large, so it compares rows of one table alone. KID is
unbiased. `seconds`: from photos to what is drawn with; `step_ms`: of the UNet for one picture;
`file_kb`: what is kept for each person; `model_mb`: what is kept for all of them.
"""


class Evaluator:
    """The judges and what they know of the people.

    Args:
        judges: the three judges.
        people: the people.
        plan: which prompt each picture shows.
    """

    def __init__(self, judges: Judges, people: People, plan: Plan) -> None:
        self.judges, self.people, self.plan = judges, people, plan
        others = people.others.images
        count = others.shape[1]
        flat = others.flatten(0, 1)
        self.others = judges.embed(flat).unflatten(0, (-1, count))
        self.centroids = centroid(self.others)
        self.photo = judges.embed(people.photos.images[:, 0])[:, None]
        self.real = judges.features(people.again.images.flatten(0, 1))
        self.read = judges.parameters(flat).unflatten(0, (-1, count)).mean(1)
        plain = [k for k, scene in enumerate(plan.scenes) if scene.look in PLAIN_LOOKS]
        self.plain = torch.tensor(plain or range(len(plan.scenes)))

    def columns(self, images: Tensor) -> dict[str, Tensor]:
        """Columns of pictures (I, cells, H, W, 3); a second seed counts for diversity only.

        One number per person (I,), but `fid` and `kid` (), which are of all pictures together.
        """
        prompts = len(self.plan.scenes)
        first = images[:, :prompts]
        plain = first[:, self.plain]
        people, count = plain.shape[:2]
        embeddings = self.judges.embed(plain.flatten(0, 1)).unflatten(0, (people, count))
        parameters = self._parameters(plain)
        owner = torch.arange(people).repeat_interleave(count)
        hits = recognition_rate(embeddings.flatten(0, 1), self.centroids, owner)
        answers = self.judges.attributes(first.flatten(0, 1))
        wanted = [asked(scene) for scene in self.plan.scenes] * people
        truth = self.people.parameters[:, None]
        features = self.judges.features(first.flatten(0, 1))
        columns = {
            "fid": torch.tensor(frechet_distance(features, self.real)),
            "kid": torch.tensor(kernel_distance(features, self.real)),
            "face_similarity": face_similarity(embeddings, self.centroids[:, None]).mean(1),
            "parameter_error": parameter_error(parameters, truth).mean(1),
            "parameter_error_read": parameter_error(parameters, self.read[:, None]).mean(1),
            "rank1": hits.unflatten(0, (people, count)).mean(1),
            "copy_paste": copy_paste(embeddings, self.photo[:, None], self.others[:, None]).mean(1),
            "prompt_agreement": attribute_agreement(answers, wanted)
            .unflatten(0, (people, prompts))
            .mean(1),
        }
        if images.shape[1] > prompts:
            again = images.shape[1] - prompts
            pairs = torch.stack([images[:, :again], images[:, prompts:]], 2)
            columns["seed_diversity"] = seed_diversity(pairs).mean(1)
        return columns

    def parameter_errors(self, images: Tensor) -> Tensor:
        """Mean error (P,) of each parameter, read from pictures (I, cells, H, W, 3) of the people.

        Of the pictures on which `parameter_error` is judged, whose mean over people this splits.
        """
        read = self._parameters(images[:, : len(self.plan.scenes)][:, self.plain])
        return (read - self.people.parameters[:, None]).abs().mean((0, 1))

    def _parameters(self, images: Tensor) -> Tensor:
        """What the judge reads (I, N, P) from pictures (I, N, H, W, 3)."""
        return self.judges.parameters(images.flatten(0, 1)).unflatten(0, images.shape[:2])


def file_kilobytes(weights: LoRAWeights) -> float:
    """Size of one LoRA's file in float16, from a batch."""
    state = to_state_dict(weights.batch_item(0), dtype=torch.float16)
    return len(save(state)) / 1024
