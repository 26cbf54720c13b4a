"""Configuration records: exact round trip, strict about everything else."""

import json
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, dataclass, field, replace
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from difflora_core.config import Config
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


@dataclass(frozen=True)
class Kinds(Config):
    """One field of every kind."""

    choice: Literal["a", "b", 3] = "a"
    pair: tuple[int, float] = (1, 2.0)
    many: tuple[int, ...] = ()
    table: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    maybe: Literal["x"] | None = None


def test_every_kind_of_field_goes_both_ways() -> None:
    kinds = Kinds("b", (3, 0.5), (1, 2, 3), {"left": (1,), "right": ()}, "x")
    assert Kinds.from_json(kinds.to_json()) == kinds
    assert Kinds.from_json(Kinds().to_json()) == Kinds()
    assert Kinds.from_dict({"choice": 3, "pair": [1, 2]}) == Kinds(choice=3)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"choice": "c"}, "unknown value 'c'; use one of a, b, 3"),
        ({"choice": 3.0}, "unknown value"),
        ({"choice": None}, "unknown value"),
        ({"pair": [1]}, "expected 2 values, got 1"),
        ({"pair": [1, 2, 3]}, "expected 2 values, got 3"),
        ({"pair": [1.5, 2]}, "expected int"),
        ({"many": [1, "2"]}, "expected int"),
        ({"many": 3}, "expected a list"),
        ({"table": [1]}, "expected a table"),
        ({"table": {"left": ["1"]}}, "expected int"),
        ({"maybe": "y"}, "unknown value"),
    ],
)
def test_other_values_are_refused(data, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Kinds.from_dict(data)


def test_choices_are_checked_where_a_record_asks() -> None:
    Kinds(choice=3).check_choices("Kinds")
    with pytest.raises(ConfigError, match="Kinds: choice: unknown value 'c'"):
        Kinds(choice="c").check_choices("Kinds")


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
