"""What other packs do to models, as they do it."""

import comfy.model_management
import comfy.patcher_extension
import torch


class ModelPatch:
    """A node from a model to a model."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "patch", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"model": ("MODEL",)}}


class OneByOne(ModelPatch):
    """As on a card whose memory holds one prompt: ComfyUI then asks for one after another."""

    def patch(self, model):
        calls, clone = comfy.patcher_extension.CallbacksMP, model.clone()

        def begin(patcher):
            patcher.get_free_memory = lambda device: 0

        clone.add_callback(calls.ON_PRE_RUN, begin)
        clone.add_callback(calls.ON_CLEANUP, lambda patcher: vars(patcher).pop("get_free_memory"))
        return (clone,)


class Seamless(ModelPatch):
    """Convolutions whose edges meet, as packs of seamless tiles make them."""

    def patch(self, model):
        clone = model.clone()
        for name, layer in model.model.diffusion_model.named_modules():
            if isinstance(layer, torch.nn.Conv2d):
                clone.add_object_patch(f"diffusion_model.{name}._conv_forward", _circular(layer))
        return (clone,)


def _circular(layer):
    """The convolution of a layer, around the edges."""

    def forward(x, weight, bias, *_, **__):
        y, z = layer.padding
        x = torch.nn.functional.pad(x, (z, z, y, y), mode="circular")
        return torch.nn.functional.conv2d(
            x, weight, bias, layer.stride, 0, layer.dilation, layer.groups
        )

    return forward


class TwoTiles(ModelPatch):
    """The left and the right half of a latent in one call, as packs of tiled diffusion ask."""

    def patch(self, model):
        clone = model.clone()
        clone.set_model_unet_function_wrapper(_by_halves)
        return (clone,)


def _by_halves(function, given):
    """Halves behind each other in the batch, with everything that each sample has."""
    x, count = given["input"], len(given["input"])
    halves = torch.cat(x.chunk(2, dim=-1))
    own = {
        name: torch.cat([value] * 2) if torch.is_tensor(value) and len(value) == count else value
        for name, value in given["c"].items()
    }
    drawn = function(halves, torch.cat([given["timestep"]] * 2), **own)
    return torch.cat(drawn.chunk(2), dim=-1)


class Compiled(ModelPatch):
    """core's Torch Compile Model with a backend that needs no compiler."""

    def patch(self, model):
        from comfy_api.torch_helpers import set_torch_compile_wrapper

        clone = model.clone(disable_dynamic=True)
        set_torch_compile_wrapper(clone, backend="eager")
        return (clone,)


TYPES = {"fp8 e4m3": torch.float8_e4m3fn, "fp16": torch.float16}


class Stored:
    """The same model with its weights in another type, or rounded to that type's numbers."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "load", ("MODEL", "MODEL")

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"model": ("MODEL",), "kind": (list(TYPES),)}}

    def load(self, model, kind):
        load, given = model.cached_patcher_init
        dtype, management = TYPES[kind], comfy.model_management
        usual = management.unet_dtype
        management.unet_dtype = lambda *_, **__: dtype
        try:
            stored = load(*given)
        finally:
            management.unet_dtype = usual
        rounded = load(*given, disable_dynamic=True)
        for parameter in rounded.model.diffusion_model.parameters():
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)
        weight = next(stored.model.diffusion_model.parameters())
        if weight.dtype != dtype:
            raise ValueError(f"the model holds {weight.dtype}")
        return stored, rounded


NODES = {
    "TestOneByOne": OneByOne,
    "TestSeamless": Seamless,
    "TestTwoTiles": TwoTiles,
    "TestCompiled": Compiled,
    "TestStored": Stored,
}
