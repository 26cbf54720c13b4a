"""ComfyUI's CLIP as the TextEncoders of recipes, and what it says of an adaptation's word."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import torch
from comfy.sd import CLIP
from torch import Tensor, nn

from ...difflora_core.errors import ConfigError, InterruptedTraining
from ...difflora_core.methods.base import PreparedAdaptation, TrainedAdaptation
from ...difflora_core.text.encoders import (
    EncodedPrompts,
    WordEmbedding,
    check_probe,
    joined_blocks,
    text_probe,
    token_blocks,
)
from ...difflora_core.text.new_words import splice, superclass_token, word_encoding

ENCODERS = ("clip_l", "clip_g")
CLIP_LAYERS = (-2, -1, *range(-3, -13, -1))
"""Settings of CLIP Set Last Layer to look for, SDXL's usual one first; CLIP-L has 12 layers."""


def leave_inference(module: nn.Module) -> None:
    """Replaces tensors born in inference mode by equal ones that autograd may keep.

    They share the memory of the old ones: a copy of SDXL would be another 5 GB.
    """
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_inference():
                part._parameters[name] = nn.Parameter(_same(parameter), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_inference():
                part._buffers[name] = _same(buffer)


def _same(tensor: Tensor) -> Tensor:
    """A tensor over the same memory that is none of inference mode's; a copy of quantised ones."""
    plain = tensor.data
    if type(plain) is not Tensor or plain.is_meta:
        return plain.clone()
    made = torch.empty(0, dtype=plain.dtype, device=plain.device)
    place = (plain.storage_offset(), plain.size(), plain.stride())
    return made.set_(plain.untyped_storage(), *place)


@contextmanager
def gradients_kept(encoder: nn.Module) -> Iterator[None]:
    """ComfyUI's CLIP adds to its states in place, which autograd forbids after a norm saw them.

    The norms get copies while gradients are wanted.
    """
    handles = []
    if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        leave_inference(encoder)
        handles = [
            part.register_forward_pre_hook(lambda _, args: (args[0].clone(), *args[1:]))
            for part in encoder.modules()
            if isinstance(part, nn.LayerNorm)
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def stopping() -> Iterator[None]:
    """Turns ComfyUI's interrupt, which any of its layers may raise, into that of a recipe."""
    try:
        yield
    except comfy.model_management.InterruptProcessingException as stop:
        if torch.is_inference_mode_enabled():  # no recipe is running
            raise
        raise InterruptedTraining("stopped inside a step") from stop


class ComfyText:
    """TextEncoders over ComfyUI's SDXL CLIP.

    Raises:
        ConfigError: the CLIP is of another kind.
    """

    def __init__(self, clip: CLIP) -> None:
        if not all(hasattr(clip.tokenizer, name) for name in ENCODERS):
            raise ConfigError("Concepts need the two text encoders of SDXL; connect an SDXL CLIP.")
        self.clip = clip

    @property
    def _first(self) -> Any:
        return self.clip.tokenizer.clip_l

    def tokens(self, text: str) -> list[int]:
        """Token numbers of a text, without start and end tokens."""
        return list(self._first.tokenizer(text)["input_ids"][1:-1])

    def knows(self, word: str) -> bool:
        """True when a word has a token of its own, or was taught to this CLIP before."""
        taught = [own.casefold() for own in learned_words(self.clip)]  # CLIP reads small letters
        return word.casefold() in taught or len(self.tokens(word)) == 1

    def embedding(self, token: int) -> WordEmbedding:
        """Token embedding in each encoder."""
        tables = [table(self.clip, name) for name in ENCODERS]
        return tuple(t.weight[token].detach().float().cpu().clone() for t in tables)

    def encode(
        self, prompts: Sequence[str], words: Mapping[str, WordEmbedding], padded: bool = True
    ) -> EncodedPrompts:
        """Encode prompts, always padded: ComfyUI's encoders read 77 tokens at once, not fewer.

        Raises:
            ConfigError: a prompt is too long, see `token_blocks`.
        """
        del padded
        spliced = [splice(prompt, list(words), self.tokens) for prompt in prompts]
        blocks = token_blocks(spliced, self._first.max_length - 2, list(words))
        pieces = [piece for own in blocks for piece in own]
        layers_read(self.clip)
        self.clip.load_model()
        device = self.clip.patcher.load_device
        self.clip.cond_stage_model.set_clip_options({"execution_device": device})
        states, pooled = [], torch.zeros(0)
        for k, name in enumerate(ENCODERS):
            own = {word: vectors[k] for word, vectors in words.items()}
            rows = [_row(getattr(self.clip.tokenizer, name), piece, own) for piece in pieces]
            encoder = getattr(self.clip.cond_stage_model, name)
            with stopping(), gradients_kept(encoder):
                with comfy.model_management.cuda_device_context(device):
                    state, pooled = encoder(rows)[:2]
            states.append(state)
        context = torch.cat(states, -1)
        index = torch.arange(context.shape[1], device=context.device)[None]
        lengths = torch.tensor([len(piece) for piece in pieces], device=context.device)[:, None]
        real = (index >= 1) & (index <= lengths)
        if len(pieces) > len(prompts):
            return joined_blocks(context, pooled, real, [len(own) for own in blocks])
        places = {
            word: torch.tensor([p.index(word) + 1 if word in p else -1 for p in pieces])
            for word in words
        }
        return EncodedPrompts(context, pooled, real, places)


def layers_read(clip: CLIP) -> tuple[Any, ...]:
    """Sets both encoders to the layer that a CLIP reads them at, and says which: see `layers_set`.

    It is the usual one, or that of CLIP Set Last Layer.
    """
    clip.cond_stage_model.reset_clip_options()
    if clip.layer_idx is not None:
        clip.cond_stage_model.set_clip_options({"layer": clip.layer_idx})
    return layers_set(clip.cond_stage_model)


def layers_set(encoders: Any) -> tuple[Any, ...]:
    """The layer that each encoder is read at now: "last", or the number of a hidden one."""
    own = [getattr(encoders, name) for name in ENCODERS]
    return tuple(part.layer_idx if part.layer == "hidden" else part.layer for part in own)


def learned_words(clip: CLIP) -> tuple[str, ...]:
    """New words that a CLIP knows through `words.teach`."""
    return tuple(getattr(clip.tokenizer, "difflora_words", ()))


def table(clip: CLIP, name: str) -> Any:
    """Token embedding of one of a CLIP's encoders."""
    return getattr(clip.cond_stage_model, name).transformer.get_input_embeddings()


def _row(tokenizer: Any, piece: Sequence[int | str], words: Mapping[str, Tensor]) -> list[Any]:
    """One prompt as an encoder takes it: numbers, and vectors for new words."""
    parts = [words[part] if isinstance(part, str) else part for part in piece]
    row = [tokenizer.start_token, *parts, tokenizer.end_token]
    return row + [tokenizer.pad_token] * (tokenizer.max_length - len(row))


def prepare(adaptation: TrainedAdaptation, clip: CLIP) -> PreparedAdaptation:
    """An adaptation with what this CLIP says of its word's super-class.

    Raises:
        ConfigError: it was trained with other text encoders.
    """
    word = adaptation.word
    if word is None:
        return PreparedAdaptation(adaptation)
    text = ComfyText(clip)
    with torch.no_grad():
        check_made_with(adaptation.title, word.probe, clip)
        embedding = text.embedding(superclass_token(text, word.superclass))
        encoding = word_encoding(text, embedding, word.contexts)
    return PreparedAdaptation(adaptation, encoding.cpu())


@torch.no_grad()
def check_made_with(title: str, probe: Tensor, clip: CLIP) -> None:
    """Refuses a word that was learned with other text encoders, or at another layer of these.

    Raises:
        ConfigError: it names the right setting of CLIP Set Last Layer, where there is one.
    """
    try:
        check_probe(probe, text_probe(ComfyText(clip)), title)
    except ConfigError as refusal:
        for layer in CLIP_LAYERS:
            other = clip.clone()
            other.clip_layer(layer)
            try:
                check_probe(probe, text_probe(ComfyText(other)), title)
            except ConfigError:
                continue
            raise ConfigError(
                f"{title} was learned at another layer of these text encoders. Set CLIP Set Last "
                f"Layer to {layer} before this node."
            ) from refusal
        raise
