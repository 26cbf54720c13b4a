"""onnxruntime providers: what was asked for, what exists, what really runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import ConfigError

CPU_PROVIDER = "CPUExecutionProvider"
PROVIDERS = {
    "cpu": CPU_PROVIDER,
    "cuda": "CUDAExecutionProvider",
    "rocm": "ROCMExecutionProvider",
    "migraphx": "MIGraphXExecutionProvider",
    "directml": "DmlExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
}


@dataclass(frozen=True)
class ProviderReport:
    """Which onnxruntime provider was asked for, and which one really runs each model.

    Attributes:
        asked: A key of `PROVIDERS`, or None when the analysis was loaded elsewhere.
        available: What this onnxruntime was built with.
        used: Task (detection, recognition) to the provider that onnxruntime says it runs.
    """

    asked: str | None
    available: tuple[str, ...]
    used: Mapping[str, str]

    @property
    def honoured(self) -> bool:
        """True when every model runs on the provider that was asked for."""
        if self.asked is None:
            return True
        return all(used == PROVIDERS[self.asked] for used in self.used.values())

    def sentence(self) -> str:
        """One line for the artist."""
        names = {provider: key for key, provider in PROVIDERS.items()}
        used = sorted({names.get(provider, provider) for provider in self.used.values()})
        text = f"Face analysis runs on {' and '.join(used) or 'an unknown provider'}"
        if self.asked is None or self.honoured:
            return text + "."
        if PROVIDERS[self.asked] not in self.available:
            return (
                f"{text}: this onnxruntime has no {self.asked} provider. For NVIDIA cards "
                "uninstall onnxruntime, then install onnxruntime-gpu."
            )
        return f"{text}: the {self.asked} provider could not start (see onnxruntime's log)."


def choose_providers(provider: str, available: tuple[str, ...]) -> list[str]:
    """The provider asked for if onnxruntime has it, and the CPU as the fallback.

    Raises:
        ConfigError: Unknown provider name.
    """
    if provider not in PROVIDERS:
        raise ConfigError(
            f"Unknown face analysis provider '{provider}'. Choose one of {', '.join(PROVIDERS)}."
        )
    wanted = PROVIDERS[provider]
    return [wanted, CPU_PROVIDER] if wanted in available and provider != "cpu" else [CPU_PROVIDER]
