"""The one wrapper that applies adaptations of any method to a model, in the order of the chain.

Weight patches cannot change while a model samples, and most methods are no weights at all. So the
adapters are hooked onto the network for one call and taken off again: other clones of the model
never see them, and nothing of this is left on the network between two calls.
"""

import logging
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import comfy.conds
import comfy.patcher_extension
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...difflora_core.adapters.attach import attach
from ...difflora_core.adapters.base import AdapterSet
from ...difflora_core.errors import ConfigError, percent
from ...difflora_core.lora.block_groups import GroupStrengths
from ...difflora_core.methods.base import AppliedAdaptation
from ...difflora_core.methods.registry import method
from .base import check_fits
from .browser import show
from .weights import has_additions, weights_of, with_weights
from .words import heard

logger = logging.getLogger(__name__)

KEY = "difflora"
NEGATIVE = "difflora_negative"
"""Condition that says of every sample whether its prompt is a negative one: 1, else 0."""
HEARD = "difflora_heard"
"""Condition that says where the words of a chain stand, (B, L, J), see `words.heard`."""
CALL = comfy.patcher_extension.WrappersMP.APPLY_MODEL
PREPARE = comfy.patcher_extension.WrappersMP.PREPARE_SAMPLING
BEGIN = comfy.patcher_extension.CallbacksMP.ON_PRE_RUN
END = comfy.patcher_extension.CallbacksMP.ON_CLEANUP
FROM_LORAS = (
    "%s: what acts on a part of the steps or prompts takes something out of loaded LoRAs, too. "
    "Let it act on all of them to leave them whole."
)
UNSPOKEN = (
    "The word %s stands in no prompt of this run, so its concept changes nothing. Write it in CLIP "
    "Text Encode, with the CLIP of Load Concept or of the training node connected there."
)
KEPT = 8  # sets of adapters: of the steps of a run, with and without the negative prompt


@dataclass(frozen=True, eq=False)
class Link:
    """An adaptation in a chain: from and up to which share of the steps it acts, and on what.

    `node_id`: of the node that put it there, which shows what there is to say of it.

    Raises:
        ConfigError: it would end before it starts.
    """

    applied: AppliedAdaptation
    start: float = 0.0
    end: float = 1.0
    positive_only: bool = False
    node_id: str | None = None

    def __post_init__(self) -> None:
        if self.start > self.end:
            raise ConfigError(
                f"{self.applied.adaptation.title} would never act: it starts at "
                f"{percent(self.start)} of the steps, after its end at {percent(self.end)}. "
                "Choose a start before the end."
            )

    @property
    def always(self) -> bool:
        """Whether it acts in every step, on every prompt, and equally in every part."""
        everywhere = self.applied.blocks == GroupStrengths()
        return everywhere and (self.start, self.end, self.positive_only) == (0.0, 1.0, False)

    @property
    def of_base(self) -> bool:
        """Whether it takes something from the base model's output, see `Method`."""
        return method(self.applied.adaptation.method).of_base

    @property
    def word(self) -> str | None:
        """The word that it is called by."""
        word = self.applied.adaptation.word
        return word.word if word else None


@dataclass(frozen=True, eq=False)
class Samples:
    """The samples of a call that a link acts on, and where its word stands in their prompts (B, L).

    `since`: None where it has no word.
    """

    rows: tuple[bool, ...]
    since: Tensor | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for equal samples."""
        return self.rows, None if self.since is None else self.since.numpy().tobytes()


class AdapterChain:
    """The links of one model clone; puts the adapters of those that act on for every call.

    A sampling run is `prepare`, `begin`, calls, `end`; nothing is left on the device after it.
    """

    def __init__(self, links: Sequence[Link]) -> None:
        self.links, self.prepared = tuple(links), False
        self._moved: dict[tuple[int, str], AppliedAdaptation] = {}
        self._built: dict[Any, AdapterSet] = {}

    def on(self, model: ModelPatcher) -> ModelPatcher:
        """A clone of a model with this chain instead of the one that it may have."""
        clone = model.clone()
        for kind, wrapper in ((PREPARE, self.prepare), (CALL, self)):
            clone.remove_wrappers_with_key(kind, KEY)
            clone.add_wrapper_with_key(kind, KEY, wrapper)
        for kind, callback in ((BEGIN, self.begin), (END, self.end)):
            clone.remove_callbacks_with_key(kind, KEY)
            clone.add_callback_with_key(kind, KEY, callback)
        return clone

    def prepare(
        self,
        executor: Any,
        model: ModelPatcher,
        noise_shape: Any,
        conds: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Marks every prompt of a sampling run by the name that its guider gave it.

        The mark travels with the prompt, so that it is known whatever its place in a batch: guiders
        with three prompts, and those that ask for one at a time, number them in other ways.
        """
        words = [link.word for link in self.links if link.word is not None]
        spoken: set[str] = set()
        for name, own in conds.items():
            flag = comfy.conds.CONDRegular(torch.full((1,), float("negative" in name)))
            for cond in own or ():
                marks = {NEGATIVE: flag}
                if words:
                    where = heard(cond, words)
                    marks[HEARD] = comfy.conds.CONDCrossAttn(where)
                    spoken |= {
                        w for w, own in zip(words, where.unbind(-1), strict=True) if 0 in own
                    }
                cond["model_conds"] = {**cond["model_conds"], **marks}
        for link in self.links:
            if link.word is not None and link.word not in spoken:
                logger.warning(UNSPOKEN, link.word)
                show(link.node_id, UNSPOKEN % link.word)
        self.prepared = True
        return executor(model, noise_shape, conds, *args, **kwargs)

    def begin(self, patcher: ModelPatcher) -> None:
        """ComfyUI starts to sample with a model.

        Raises:
            ConfigError: it did not ask what is on this model, so that would have no effect.
        """
        titles = ", ".join(link.applied.adaptation.title for link in self.links)
        if any(link.of_base for link in self.links) and has_additions(patcher):
            logger.warning(FROM_LORAS, titles)
        if not self.prepared:
            raise ConfigError(
                f"{titles} would have no effect on this model: the sampler or guider does not run "
                "what is on it (Dual Model Guider runs its second model so). Apply it to the model "
                "that is sampled with, or as a plain LoRA with Load LoRA Model."
            )

    def end(self, patcher: ModelPatcher) -> None:
        """The run is over: what was moved to its device may go."""
        del patcher
        self.prepared = False
        self._moved.clear()
        self._built.clear()

    def __call__(self, executor: Any, x: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Any:
        """One call of the network on x (B, ...) at noise t.

        Raises:
            ConfigError: nobody prepared this run.
        """
        negative, where = kwargs.pop(NEGATIVE, None), kwargs.pop(HEARD, None)
        if negative is None:
            if not self.prepared:
                raise ConfigError(
                    "This sampler does not prepare its prompts as ComfyUI's own do, so nobody can "
                    "say which of them are negative. Use KSampler or a guider of ComfyUI, or a "
                    "plain LoRA with Load LoRA Model."
                )
            return executor(x, t, *args, **kwargs)  # the other model of Dual Model Guider
        base = executor.class_obj
        percent, sigma = base.model_sampling.percent_to_sigma, float(t.max())
        acting = tuple(
            link for link in self.links if percent(link.end) <= sigma <= percent(link.start)
        )
        rows = tuple(bool(flag == 0) for flag in negative.flatten().tolist())
        samples = [self._samples(link, rows, where) for link in acting]
        shares = tuple(own for own in zip(acting, samples, strict=True) if any(own[1].rows))
        if not shares:
            return executor(x, t, *args, **kwargs)
        with _eager(), attach(base.diffusion_model, self.adapters(shares, x.device)):
            return executor(x, t, *args, **kwargs)

    def _samples(self, link: Link, rows: Sequence[bool], where: Tensor | None) -> Samples:
        """Of samples of which `rows` are positive those that a link acts on."""
        own = [positive or not link.positive_only for positive in rows]
        words = [one.word for one in self.links if one.word is not None]
        if link.word is None or where is None:
            return Samples(tuple(own))
        since = where[..., words.index(link.word)].float().cpu()
        there = since.isfinite().any(-1).tolist()
        return Samples(tuple(a and b for a, b in zip(own, there, strict=True)), since)

    def adapters(self, shares: Sequence[tuple[Link, Samples]], device: torch.device) -> AdapterSet:
        """Adapters of links that act, each on its samples, on a device."""
        key = (str(device), *((id(link), samples.key) for link, samples in shares))
        if key not in self._built:
            while len(self._built) >= KEPT:
                self._built.pop(next(iter(self._built)))
            parts = [self._for_samples(link, samples, device) for link, samples in shares]
            self._built[key] = adapter_set(parts)
        return self._built[key]

    def _for_samples(self, link: Link, samples: Samples, device: torch.device) -> AppliedAdaptation:
        """What a link does to the samples of a call; moved to a device once."""
        key = (id(link), str(device))
        if key not in self._moved:
            self._moved[key] = link.applied.to(device)
        applied = self._moved[key]
        if samples.since is not None:
            applied = applied.spoken(samples.since.to(device))
        if all(samples.rows):
            return applied
        flags = torch.tensor(samples.rows, dtype=torch.float32, device=device)
        return replace(applied, strength=applied.strength * flags)


def adapter_set(applied: Sequence[AppliedAdaptation]) -> AdapterSet:
    """Adapters in the order of a chain, those of the base model first.

    Neighbours of one method and of equal factors by part are made together.

    Raises:
        ConfigError, LayoutError: they cannot be together.
    """
    entries = AdapterSet(())
    ordered = sorted(applied, key=lambda part: not method(part.adaptation.method).of_base)
    for (name, blocks), own in groupby(ordered, key=lambda p: (p.adaptation.method, p.blocks)):
        entries += method(name).adapters(list(own)).by_layer(blocks.of)
    return entries


def _eager() -> AbstractContextManager[None]:
    """Rests torch.compile for one call: a compiled network does not see hooks put on after it."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def chain_of(model: ModelPatcher) -> tuple[Link, ...]:
    """The links that a model has."""
    chains = [c for c in model.get_wrappers(CALL, KEY) if isinstance(c, AdapterChain)]
    return tuple(link for chain in chains for link in chain.links)


def check_bare(model: ModelPatcher, role: str) -> None:
    """Refuses a model for training that draws through styles or concepts.

    Raises:
        ConfigError: it has links, which a training would leave out.
    """
    if chain := chain_of(model):
        titles = ", ".join(link.applied.adaptation.title for link in chain)
        raise ConfigError(
            f"The {role} has {titles} on it, which act while a sampler runs and would not be "
            "learned with. Put them on as plain LoRAs (Export Style as LoRA), or leave them off."
        )


def with_link(model: ModelPatcher, link: Link) -> ModelPatcher:
    """A clone of a model with one link more.

    What always acts and is a new weight is put into the weights; else it acts on outputs.

    Raises:
        ConfigError, LayoutError: it cannot be on this model, or not beside the links there.
    """
    links = chain_of(model)
    if link.word is not None and link.word in [before.word for before in links]:
        raise ConfigError(f"{link.applied.adaptation.title} is on this model already.")
    check_fits(model, link.applied.adaptation)
    chain = [*links, link]
    everything = [*weights_of(model), *(one.applied for one in chain)]
    for acting in (everything, [link.applied]):  # refuse before sampling
        adapter_set(acting)
    if link.always and method(link.applied.adaptation.method).weight_edits(link.applied):
        return with_weights(model, link.applied)
    return AdapterChain(chain).on(model)
