"""An existing LoRA to a latent: what the decoder can say is found, the rest is reported."""

import pytest
import torch

from difflora_core.errors import ConfigError, LayoutError
from difflora_core.lora.layout import LayerShape, LoRALayout
from difflora_core.lora.weights import LoRALayer, LoRAWeights
from difflora_core.models.difflora import DiffLoRAConfig, DiffLoRAModel
from difflora_core.models.lae.config import LAEConfig
from difflora_core.training.difflora.latent_fit import fit_latent
from difflora_core.vision.features import FeatureSizes

LAYOUT = LoRALayout("tiny", 2, tuple(LayerShape(f"input_blocks.{b}.to_q", 8, 10) for b in range(4)))


def network(seed=0, **changes):
    """A model whose decoder says something and whose encoder knows nothing."""
    g = torch.Generator().manual_seed(seed)
    lae = LAEConfig(
        latent_tokens=3, latent_dim=4, width=16, heads=2, depth=1, basis_size=8, decoder_width=16,
        **changes,
    )  # fmt: skip
    model = DiffLoRAModel(
        DiffLoRAConfig.demo(FeatureSizes(6, 8, 5, 4), lae=lae), LAYOUT, generator=g
    )
    with torch.no_grad():
        for parameter in model.lae.decoder.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=g))
    model.fit_latent_statistics(torch.randn(20, 3, 4, generator=g))
    return model.eval()


def lora_of(model, seed=1):
    z = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model.decode(model.wrap(z)).batch_item(0)


@pytest.mark.parametrize("changes", [{}, {"parts": ("down", "up")}, {"kind": "conv1d"}])
def test_a_lora_of_the_model_is_found_again(changes):
    model = network(**changes)
    fitted = fit_latent(model, lora_of(model), 150)
    assert fitted.agreement > 0.98
    assert fitted.latent.space == model.latent_space
    assert fit_latent(model, lora_of(model), 0).agreement < fitted.agreement


def test_factors_are_a_matter_of_taste():
    """Equal delta W with other factors, rank components and alpha: the same latent."""
    model = network()
    turn = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(3)))[0]
    layers = lora_of(model).layers.items()
    turned = {n: LoRALayer(turn.T @ x.down, 4 * x.up @ turn, x.alpha / 4) for n, x in layers}
    plain, other = (fit_latent(model, w, 20) for w in (lora_of(model), LoRAWeights(turned)))
    torch.testing.assert_close(plain.latent.z, other.latent.z, rtol=1e-3, atol=1e-3)


def test_a_poor_encoder_does_not_spoil_the_latent():
    """Directions that the decoder does not hear stay near the average."""
    model = network()
    with torch.no_grad():
        model.lae.decoder.latent_in.weight[:, 6:] *= 1e-4
    target = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(2))
    target.flatten()[6:] = 0.0
    with torch.no_grad():
        weights = model.decode(model.latent(target)).batch_item(0)
    with torch.no_grad():
        model.lae.encoder.latent_out.bias.fill_(2.0)  # what the encoder makes up
        assert model.encode(weights).z.flatten()[6:].norm() > 2.0
    fitted = fit_latent(model, weights, 150)
    assert fitted.agreement > 0.98
    assert fitted.latent.z.flatten()[6:].norm() < 1.0


def test_a_foreign_lora_keeps_only_a_part():
    model, g = network(), torch.Generator().manual_seed(7)
    foreign = LoRAWeights(
        {
            s.name: LoRALayer(torch.randn(2, 8, generator=g), torch.randn(10, 2, generator=g), 2.0)
            for s in LAYOUT
        }
    )
    kept = [fit_latent(model, foreign, steps).agreement for steps in (0, 100)]
    assert kept[0] < kept[1] < 0.9


def test_a_mirror_encoder_is_believed_about_trained_loras_alone():
    model, g = network(encoder="mirror"), torch.Generator().manual_seed(7)
    with torch.no_grad():
        model.lae.encoder.mean_out.weight.normal_(0, 0.1, generator=g)
    made = fit_latent(model, lora_of(model), 150)
    assert made.agreement > 0.98
    trained = LoRAWeights(
        {
            name: LoRALayer(
                layer.down, layer.up + 9 * torch.randn(layer.up.shape, generator=g), layer.alpha
            )
            for name, layer in lora_of(model).layers.items()
        }
    )
    found = fit_latent(model, trained, 20)
    torch.testing.assert_close(found.latent.z, model.encode(trained).z)


def test_works_in_inference_mode_and_reports_steps():
    """ComfyUI loads and runs everything in it."""
    seen = []
    with torch.inference_mode():
        model = network()
        weights = lora_of(model)
        fitted = fit_latent(
            model, weights, 4, lambda step, total, metrics: seen.append((step, total))
        )
        assert model.decode(fitted.latent).batch_shape == (1,)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert not fitted.latent.z.requires_grad


def test_progress_may_stop_it():
    class Stop(Exception):
        pass

    def stop(step, total, metrics):
        raise Stop

    with pytest.raises(Stop):
        fit_latent(network(), lora_of(network()), 4, stop)


def test_what_holds_no_identity():
    model = network()
    empty = LoRAWeights(
        {n: LoRALayer(x.down, 0 * x.up, x.alpha) for n, x in lora_of(model).layers.items()}
    )
    with pytest.raises(LayoutError, match="changes nothing"):
        fit_latent(model, empty, 2)
    with pytest.raises(ConfigError, match="negative"):
        fit_latent(model, lora_of(model), -1)
    fewer = LoRAWeights(dict(list(lora_of(model).layers.items())[:2]))
    with pytest.raises(LayoutError):
        fit_latent(model, fewer, 2)
