"""The one wrapper that applies adaptations of any method to a model, in the order of the chain.

Weight patches cannot change while a model samples, and most methods are no weights at all. So the
adapters are hooked onto the network for one call and taken off again: other clones of the model
never see them, and nothing of this is left on the network between two calls.
"""

import logging
import sys
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
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
from ...difflora_core.adapters.regions import attach_in_regions
from ...difflora_core.errors import ConfigError
from ...difflora_core.methods.base import AppliedAdaptation
from ...difflora_core.methods.registry import method
from .base import check_fits
from .browser import show, show_here
from .left_out import tell_when_left_out
from .links import Link
from .regions import RegionFinder, own_tokens
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
SAME = "Two people are placed by the same words, %s. Give each words of their own in the prompt."
KEPT = 16  # sets of adapters: of the steps of a run, with and without the negative prompt


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
        self.placed = tuple(link for link in self.links if link.place is not None)
        self.finder = RegionFinder([link.place for link in self.placed if link.place is not None])
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
        tell_when_left_out(clone, KEY, self.titles)
        return clone

    @property
    def titles(self) -> str:
        """Of what is on the model."""
        return ", ".join(link.applied.adaptation.title for link in self.links)

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
        marks = [link.term for link in self.links if link.term is not None]
        spoken: set[tuple[str, bool]] = set()
        for name, own in conds.items():
            negative = "negative" in name
            flag = comfy.conds.CONDRegular(torch.full((1,), float(negative)))
            for cond in own or ():
                added = {NEGATIVE: flag}
                if marks:
                    where = heard(cond, marks)
                    added[HEARD] = comfy.conds.CONDCrossAttn(where)
                    here = zip(marks, where.unbind(-1), strict=True)
                    spoken |= {(m, negative) for m, distances in here if 0 in distances}
                cond["model_conds"] = {**cond["model_conds"], **added}
        self._check_spoken(spoken)
        if self.placed:
            self.finder.begin(noise_shape)
        self.prepared = True
        return executor(model, noise_shape, conds, *args, **kwargs)

    def _check_spoken(self, spoken: Collection[tuple[str, bool]]) -> None:
        """Tells of words in no prompt; `spoken` are marks, and whether of a negative prompt.

        Raises:
            ConfigError: they would say where somebody is, in a positive prompt.
        """
        for link in self.links:
            if link.term is None or (link.term, False) in spoken:
                continue
            if link.place is not None:
                raise ConfigError(link.unspoken)
            if (link.term, True) not in spoken:
                logger.warning(link.unspoken)
                show(link.node_id, link.unspoken)

    def begin(self, patcher: ModelPatcher) -> None:
        """ComfyUI starts to sample with a model.

        Raises:
            ConfigError: it did not ask what is on this model, so that would have no effect.
        """
        if any(link.of_base for link in self.links) and has_additions(patcher):
            logger.warning(FROM_LORAS, self.titles)
        if not self.prepared:
            raise ConfigError(
                f"{self.titles} would have no effect on this model: the sampler or guider does not "
                "run what is on it (Dual Model Guider runs its second model so). Apply it to the "
                "model that is sampled with, or as a plain LoRA with Load LoRA Model."
            )

    def end(self, patcher: ModelPatcher) -> None:
        """The run is over: what was moved to its device may go."""
        del patcher
        self.prepared = False
        self._moved.clear()
        self._built.clear()
        for number, link in enumerate(self.placed):
            if told := self.finder.described(number):
                show(link.node_id, told)
        self.finder.end()

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
        whole = tuple(own for own in shares if own[0].place is None)
        with ExitStack() as stack:
            if shares or self.placed:
                stack.enter_context(_eager())
            network = base.diffusion_model
            if whole:
                stack.enter_context(attach(network, self.adapters(whole, x.device)))
            if self.placed and self._finding(sigma, percent):
                stack.enter_context(self.finder.watched(network, x, self._tokens(rows, where)))
            elif self.placed:
                regions = zip(self.placed, self.finder.regions(x), strict=True)
                parts = [
                    (self.adapters((own,), x.device), region)
                    for link, region in regions
                    for own in shares
                    if own[0] is link
                ]
                stack.enter_context(attach_in_regions(network, parts))
            return executor(x, t, *args, **kwargs)

    def _finding(self, sigma: float, percent: Callable[[float], float]) -> bool:
        """Whether people are still being found in a call at this noise."""
        return self.finder.looking or sigma > min(percent(link.find) for link in self.placed)

    def _tokens(self, rows: Sequence[bool], where: Tensor | None) -> Tensor:
        """Tokens of the words of those placed, in positive prompts: (R, L, J)."""
        if where is None:
            return torch.zeros(len(rows), 1, len(self.placed))
        marks = [link.term for link in self.links if link.term is not None]
        columns = [marks.index(link.term) for link in self.placed if link.term is not None]
        positive = torch.tensor(rows, dtype=torch.float32)[:, None, None]
        return own_tokens(where[..., columns].float().cpu()) * positive

    def _samples(self, link: Link, rows: Sequence[bool], where: Tensor | None) -> Samples:
        """Of samples of which `rows` are positive those that a link acts on."""
        own = [positive or not link.positive_only for positive in rows]
        marks = [one.term for one in self.links if one.term is not None]
        if link.word is None or where is None:
            return Samples(tuple(own))
        since = where[..., marks.index(link.word)].float().cpu()
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
    if link.term is not None and link.term in [before.term for before in links]:
        title = link.applied.adaptation.title
        raise ConfigError(f"{title} is on this model already." if link.word else SAME % link.place)
    check_fits(model, link.applied.adaptation)
    if link.never:
        show_here(link.never)
    chain = [*links, link]
    everything = [*weights_of(model), *(one.applied for one in chain)]
    for acting in (everything, [link.applied]):  # refuse before sampling
        adapter_set(acting)
    if link.always and method(link.applied.adaptation.method).weight_edits(link.applied):
        return with_weights(model, link.applied)
    return AdapterChain(chain).on(model)
