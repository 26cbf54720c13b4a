"""Configuration records: exact round trip, strict about everything else."""

import json
from dataclasses import FrozenInstanceError, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from difflora_core.errors import ConfigError
from difflora_core.models.difflora_config import DiffLoRAConfig
from difflora_core.models.dit import DiTConfig
from difflora_core.models.lae.config import LAEConfig
from difflora_core.models.mif import MIFConfig
from difflora_core.models.predictor import PredictorConfig
from difflora_core.vision.features import FeatureSizes

DEMO = DiffLoRAConfig.demo(FeatureSizes(64, 48, 17, 32))


@pytest.mark.parametrize(
    "config",
    [
        DEMO,
        DiffLoRAConfig.sdxl(),
        DiffLoRAConfig.sdxl(preset="paper"),
        DiTConfig(width=30, heads=4, inner_dim=32),
    ],
)
def test_round_trip(config) -> None:
    assert type(config).from_json(config.to_json()) == config


@given(st.sampled_from(["mif", "dit", "lae", "predictor", "schedule"]), st.text(min_size=1))
def test_unknown_fields_are_refused(part: str, name: str) -> None:
    data = json.loads(DEMO.to_json())
    if name not in data[part]:
        data[part][name] = 1
        with pytest.raises(ConfigError, match="unknown settings"):
            DiffLoRAConfig.from_dict(data)


@given(
    st.sampled_from(["width", "depth", "heads", "latent_dim", "mlp_ratio", "inner_dim"]),
    st.one_of(
        st.text(), st.none(), st.booleans(), st.floats(), st.integers(), st.lists(st.integers())
    ),
)
def test_hostile_values_raise_only_our_error(name: str, value) -> None:
    data = DiTConfig().to_dict() | {name: value}
    try:
        built = DiTConfig.from_dict(data)
    except ConfigError:
        return
    assert getattr(built, name) == value


@pytest.mark.parametrize("text", ["", "[]", "3", "null", "{", "[" * 100_000, '{"mif": 3}'])
def test_text_that_is_no_configuration(text: str) -> None:
    with pytest.raises(ConfigError):
        DiffLoRAConfig.from_json(text)


def test_networks_must_meet() -> None:
    with pytest.raises(ConfigError, match="predictor expects a condition"):
        replace(DEMO, predictor=PredictorConfig(condition_dim=7))
    with pytest.raises(ConfigError, match="dit makes latents"):
        replace(DEMO, dit=replace(DEMO.dit, latent_dim=3))
    with pytest.raises(ConfigError, match="preset"):
        replace(DEMO, preset="magic")
    with pytest.raises(FrozenInstanceError):
        DEMO.preset = "paper"


def test_build_fills_the_shared_sizes() -> None:
    mif = MIFConfig(width=32, heads=4, sources=("face", "image"))
    config = DiffLoRAConfig.build(mif, PredictorConfig(), DiTConfig(), LAEConfig(latent_dim=5))
    assert (config.dit.condition_dim, config.dit.condition_tokens) == (32, 0)
    assert config.predictor.latent_dim == config.dit.latent_dim == 5
