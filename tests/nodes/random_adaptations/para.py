"""Random directions of PaRa."""

import torch


def maker(parts, model):
    """Makes random directions of all target layers of the demo base, at bound 1."""
    para, recipe = parts("difflora_core.methods.para"), parts("difflora_core.training.para")
    methods, layout = parts("difflora_core.methods.base"), parts("difflora_core.lora.layout")
    orthonormal = parts("difflora_core.adapters.para").orthonormal
    base = parts("nodes.host.base")

    def make(seed=1, rank=2):
        generator, layers = torch.Generator().manual_seed(seed), {}
        for shape in base.unet_layout(model, "demo", 1, recipe.TARGETS["no_cross_attention"]):
            module = model.model.diffusion_model.get_submodule(shape.name)
            width, out, *kernel = layout.module_size(module)
            directions = orthonormal(torch.randn(out, rank, generator=generator))
            layers[shape.name] = {"directions": directions, "width": torch.tensor([float(width)])}
            if kernel:
                layers[shape.name]["kernel"] = torch.tensor([float(k) for k in kernel])
        assert {len(tensors) for tensors in layers.values()} == {2, 3}  # linear and convolutions
        made = methods.TrainedAdaptation("para", "demo", para.PaRaConfig(1.0), {}, layers)
        return methods.PreparedAdaptation(made)

    return make
