"""What other packs put on our sockets, good and bad."""

import torch

from .model_patches import NODES


class HyperLoRA:
    """HyperLoRA's `LORA`: the same kind of dict under another socket name."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "both", ("LORA", "LORA_MODEL")

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        kinds = ["same", "empty", "peft", "another base", "half of another base", "text"]
        kinds += ["text encoder", "with text", "convolution", "more layers"]
        return {"required": {"lora": ("LORA_MODEL",), "kind": (kinds,)}}

    def both(self, lora, kind):
        """The same under core's socket name, too."""
        return self.run(lora, kind) * 2

    def run(self, lora, kind):
        if kind == "empty":
            return ({},)
        if kind == "text":
            return ("loras/person.safetensors",)
        factors = {"lora_down.weight": torch.ones(2, 64), "lora_up.weight": torch.ones(64, 2)}
        if kind in ("text encoder", "with text"):
            stem = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
            kept = lora if kind == "with text" else {}
            return ({**kept, **{f"{stem}.{part}": value for part, value in factors.items()}},)
        if kind == "convolution":
            generator = torch.Generator().manual_seed(0)
            kernel = 0.05 * torch.randn(2, 64, 3, 3, generator=generator)
            up = torch.randn(64, 2, 1, 1, generator=generator)
            stem = "lora_unet_input_blocks_1_0_in_layers_2"
            parts = {"lora_down.weight": kernel, "lora_up.weight": up}
            return ({**lora, **{f"{stem}.{part}": value for part, value in parts.items()}},)
        if kind == "more layers":
            stem = "lora_unet_input_blocks_99_1_proj_in"
            return ({**lora, **{f"{stem}.{part}": value for part, value in factors.items()}},)
        stems = {key.split(".")[0] for key in lora}
        if kind == "same":
            return (dict(lora),)
        if kind == "peft":  # alpha is folded, names are those of diffusers' export
            first = "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k"
            path = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
            down, up = lora[f"{first}.lora_down.weight"], lora[f"{first}.lora_up.weight"]
            up = up * lora[f"{first}.alpha"] / len(down)
            return ({f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up},)
        wrong = sorted(stems) if kind == "another base" else sorted(stems)[::2]
        grown = {
            key: torch.cat([value, value], 1) if "down" in key else value
            for key, value in lora.items()
            if key.split(".")[0] in wrong
        }
        return ({**lora, **grown},)


class FaceSockets:
    """A face analysis under the names that other packs give it."""

    CATEGORY, FUNCTION = "tests", "run"
    RETURN_TYPES = ("INSIGHTFACE", "FACE_ANALYSIS", "FACE_ANALYSIS")

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"face_analysis": ("FACEANALYSIS",)}}

    def run(self, face_analysis):
        class Wrapped:
            """Nothing but `.get`."""

            get = staticmethod(face_analysis.get)

        return face_analysis, Wrapped(), "antelopev2"


class NoPictures:
    """An empty batch."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "run", ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {}}

    def run(self):
        return (torch.zeros(0, 64, 64, 3),)


class TwoMasks:
    """A batch of two masks."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "run", ("MASK",)

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {}}

    def run(self):
        return (torch.ones(2, 64, 64),)


NODE_CLASS_MAPPINGS = {
    "TestHyperLoRA": HyperLoRA,
    "TestFaceSockets": FaceSockets,
    "TestNoPictures": NoPictures,
    "TestTwoMasks": TwoMasks,
    **NODES,
}
