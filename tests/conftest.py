"""Shared fixtures: where ComfyUI is, and this pack loaded the way ComfyUI loads it."""

import asyncio
import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import settings
from safetensors.torch import save_file

from difflora_core.adapters.base import AdapterSet
from difflora_core.training.sharding import LAUNCHED

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

ROOT = Path(__file__).resolve().parents[1]
COMFYUI = Path(os.environ.get("COMFYUI_PATH", ROOT / ".comfyui")).resolve()

HYPERLORA_MODULES = {
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2": (6, 10),
    "lora_unet_middle_block_1_transformer_blocks_0_attn1": (8, None),
    "lora_unet_output_blocks_2_1_transformer_blocks_1_attn2": (6, 10),
}
HYPERLORA_SIZES = {
    "face": 12, "face_tokens": 3, "image": 10, "width": 16, "depth": 2, "heads": 2, "basis": 5,
    "rank": 2,
}  # fmt: skip

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach the network
if COMFYUI.is_dir():
    # First on the path, or our folder `nodes/` hides ComfyUI's module of that name.
    sys.path.insert(0, str(COMFYUI))
settings.register_profile("difflora", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("difflora")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests for a GPU say why they do not run."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """ComfyUI's folder; its modules can be imported here, on the CPU where there is no GPU."""
    if not (COMFYUI / "main.py").exists():
        pytest.skip(f"no ComfyUI in {COMFYUI}: run make setup, or set COMFYUI_PATH")
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    return COMFYUI


@pytest.fixture(scope="session")
def pack(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """This pack as load_custom_node loads it: named after its path, its entry point called.

    `importlib.import_module(".nodes.features", pack.__name__)` gives one of its modules.
    """
    import folder_paths

    folder_paths.set_input_directory(str(tmp_path_factory.mktemp("input")))  # photos are put there
    name = str(ROOT).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    extension = asyncio.run(module.comfy_entrypoint())
    asyncio.run(extension.on_load())
    return module


@pytest.fixture(scope="session")
def merged_weights() -> Callable[..., dict[str, torch.Tensor]]:
    """Makes weights with linear adapters merged in, by layer: what becomes of the rows of 1."""

    def merged(
        module: torch.nn.Module, adapters: AdapterSet, strength: float = 1.0
    ) -> dict[str, torch.Tensor]:
        result: dict[str, torch.Tensor] = {}
        for entry in adapters:
            path = f"{entry.layer}.weight"
            weight = result.get(entry.layer, module.get_parameter(path).detach())
            rows = torch.eye(weight.shape[1], dtype=weight.dtype)
            change = entry.adapter.edit(rows, rows @ weight.mT).mT - weight
            result[entry.layer] = weight + entry.strength * strength * change
        return result

    return merged


@pytest.fixture(scope="session")
def launch_processes() -> Callable[[Path, Path, int, str], list[Any]]:
    """Runs `PROGRAM FOLDER` in so many processes over gloo; what each wrote to rank-N.json.

    The kind is `plain`, or `FSDP` where each keeps a part of the weights.
    """

    def launch(program: Path, folder: Path, count: int, kind: str) -> list[Any]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        common = {
            **os.environ,
            "WORLD_SIZE": str(count),
            LAUNCHED: str(kind == "FSDP").lower(),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        started = [
            subprocess.Popen(
                [sys.executable, str(program), str(folder)],
                cwd=ROOT,
                env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(count)
        ]
        try:
            told = [process.communicate(timeout=600)[0] for process in started]
        finally:
            for process in started:
                process.kill()  # those that wait for one that failed
        assert [process.returncode for process in started] == [0] * count, told
        return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(count)]

    return launch


@pytest.fixture(scope="session")
def sd15_config() -> dict[str, object]:
    """Stable Diffusion 1.5's UNet, as far as it differs from diffusers' defaults."""
    return {
        "sample_size": 64,
        "block_out_channels": [320, 640, 1280, 1280],
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    }


def basis_shapes(
    modules: dict[str, tuple[int, int | None]], s: dict[str, int]
) -> dict[str, tuple[int, ...]]:
    """Tensors of a HyperLoRA's basis."""
    basis: dict[str, tuple[int, ...]] = {}
    for i, (width, context) in enumerate(modules.values()):
        for part in ("to_q", "to_k", "to_v", "to_out"):
            inner = (context or width) if part in ("to_k", "to_v") else width
            basis[f"{i}.{part}.id_down_basis"] = (s["basis"], inner, s["rank"])
            basis[f"{i}.{part}.id_up_basis"] = (s["basis"], s["rank"], width)
    return basis


def resampler_shapes(modules: int, s: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Tensors of a HyperLoRA's resampler for so many modules."""
    d, inner, tokens = s["width"], s["heads"] * 64, 8 * modules
    resampler: dict[str, tuple[int, ...]] = {"latents": (1, tokens, d)}
    ends = {"proj_in": (d, s["image"]), "proj_in_2": (d, s["image"]), "proj_out": (s["basis"], d)}
    for name, (out, width) in ends.items():
        resampler |= {f"{name}.weight": (out, width), f"{name}.bias": (out,)}
    for k in range(s["depth"]):
        for name in ("attn1", "attn2_l", "attn2_x", "attn3_l", "attn3_y", "ff"):
            resampler |= {f"layers.{k}.norm_{name}.{p}": (d,) for p in ("weight", "bias")}
        for attention in ("attn1", "attn2", "attn3"):
            for part in ("to_q", "to_k", "to_v"):
                resampler[f"layers.{k}.{attention}.{part}.weight"] = (inner, d)
            resampler[f"layers.{k}.{attention}.to_out.0.weight"] = (d, inner)
        resampler |= {
            f"layers.{k}.ff.net.0.proj.weight": (4 * d, d),
            f"layers.{k}.ff.net.0.proj.bias": (4 * d,),
            f"layers.{k}.ff.net.2.weight": (d, 4 * d),
            f"layers.{k}.ff.net.2.bias": (d,),
        }
    return resampler


def projector_shapes(s: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Tensors of a HyperLoRA's projector of the face embedding."""
    features = s["face_tokens"] * s["image"]
    return {
        "0.weight": (features, s["face"]), "0.bias": (features,),
        "2.weight": (s["image"],), "2.bias": (s["image"],),
    }  # fmt: skip


@pytest.fixture(scope="session")
def write_hyperlora() -> Callable[..., Path]:
    """Writes a HyperLoRA folder with random weights, by the names of the public format alone."""

    def write(
        folder: Path,
        modules: dict[str, tuple[int, int | None]] | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        **sizes: int,
    ) -> Path:
        """Attention modules: kohya name to width and context width (None for self-attention)."""
        modules = modules or HYPERLORA_MODULES
        s = HYPERLORA_SIZES | sizes
        generator = torch.Generator().manual_seed(seed)

        def files(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
            draw = {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}
            return {n: (x * 0.5 if x.ndim > 1 else 1 + x * 0.2).to(dtype) for n, x in draw.items()}

        folder.mkdir(parents=True, exist_ok=True)
        save_file(files(basis_shapes(modules, s)), folder / "hyper_lora_modules.safetensors")
        save_file(files(resampler_shapes(len(modules), s)), folder / "resampler.safetensors")
        save_file(files(projector_shapes(s)), folder / "id_projector.safetensors")
        table = {
            name: {"hidden_size": width, "cross_attention_dim": context}
            for name, (width, context) in modules.items()
        }
        (folder / "hyper_lora_modules.json").write_text(json.dumps(table))
        return folder

    return write


@pytest.fixture(scope="session")
def tiny_sdxl(
    tmp_path_factory: pytest.TempPathFactory, comfyui: Path
) -> tuple[Path, "StableDiffusionXLPipeline"]:
    """SDXL's pipeline at tiny size with random weights: its folder, and the pipeline itself."""
    import diffusers
    import transformers

    from difflora_core.demo.networks.base import UNET_CONFIG
    from difflora_core.models.layers import DrawnFrom

    words = comfyui / "comfy" / "sd1_tokenizer"
    unet = {**UNET_CONFIG, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 64}
    unet["projection_class_embeddings_input_dim"] = 32 + 6 * unet["addition_time_embed_dim"]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    sizes |= {"num_hidden_layers": 2, "projection_dim": 32, "vocab_size": 49408}
    sizes |= {"max_position_embeddings": 77, "bos_token_id": 49406, "eos_token_id": 49407}
    texts = [transformers.CLIPTextConfig(**sizes, hidden_act=a) for a in ("quick_gelu", "gelu")]
    read = transformers.CLIPTokenizer.from_pretrained
    with DrawnFrom(torch.Generator().manual_seed(1)):
        pipe = diffusers.StableDiffusionXLPipeline(
            vae=diffusers.AutoencoderKL(
                down_block_types=["DownEncoderBlock2D"] * 3,
                up_block_types=["UpDecoderBlock2D"] * 3,
                block_out_channels=[32] * 3,
                latent_channels=4,
            ),
            text_encoder=transformers.CLIPTextModel(texts[0]),
            text_encoder_2=transformers.CLIPTextModelWithProjection(texts[1]),
            tokenizer=read(words, model_max_length=77),
            tokenizer_2=read(words, model_max_length=77, pad_token="!"),
            unet=diffusers.UNet2DConditionModel(**unet),
            scheduler=diffusers.DDIMScheduler(prediction_type="v_prediction"),
        )
    folder = tmp_path_factory.mktemp("tiny_sdxl")
    pipe.save_pretrained(folder)
    return folder, pipe


@pytest.fixture(scope="module")
def ray_cluster():
    """A Ray cluster whose head does no work; tests add machines and kill them."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        made = Cluster(True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        yield made
        made.shutdown()
