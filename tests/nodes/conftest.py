"""Real ComfyUI for the node tests: started once, on the CPU, with a base directory of its own.

Its demo world is the shipped one; while that is not trained, one with random weights.
"""

import importlib.util
import os
import urllib.request
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from runpy import run_path
from types import ModuleType

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from difflora_core.comfy_client import ComfyClient
from difflora_core.demo import paths
from difflora_core.demo.build.controlnet import save_controlnet
from difflora_core.demo.comfyui.server import ComfyServer
from difflora_core.demo.networks.base import demo_layout, load_base, new_base, save_base
from difflora_core.demo.networks.clip_vision import ClipVisionRecipe, save_clip_vision
from difflora_core.demo.networks.vae import new_vae
from difflora_core.lora.layout import LoRALayout
from difflora_core.models.difflora import DiffLoRAConfig, DiffLoRAModel
from difflora_core.models.layers import DrawnFrom
from difflora_core.storage.checkpoint import load_model, save_model
from difflora_core.training.controlnet import ControlLoRA
from difflora_core.vision.features import FeatureSizes

ROOT = Path(__file__).resolve().parents[2]
PARTS = (paths.BASE, paths.CLIP_VISION, paths.CONTROLNET, paths.FACES, *paths.MODELS.values())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test in this folder needs ComfyUI."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.comfy)


@pytest.fixture(scope="session")
def random_difflora() -> Callable[..., Path]:
    """Writes a DiffLoRA model with random weights, large enough that its LoRA shows."""

    def write(path: Path, layout: LoRALayout, sizes: FeatureSizes, seed: int = 5) -> Path:
        generator = torch.Generator().manual_seed(seed)
        model = DiffLoRAModel(DiffLoRAConfig.demo(sizes), layout, generator=generator)
        for parameter in model.parameters():
            if not parameter.any():  # branches that start at zero
                parameter.data.normal_(0, 0.05, generator=generator)
        return save_model(model, path)

    return write


@pytest.fixture(scope="session")
def random_world(random_difflora, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo world with random weights; its faces are green squares."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    folder = tmp_path_factory.mktemp("random_world")
    unet, text = new_base(3)
    for module in (unet, text):
        for parameter in module.parameters():
            parameter.data = parameter.data.half().float()  # exact in the file
    vae = new_vae(4)
    save_base(folder / "base.safetensors", unet, text, vae)
    generator = torch.Generator().manual_seed(6)
    control = ControlLoRA(load_base(folder / "base.safetensors"), 4, generator)
    for parameter in control.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    save_controlnet(control, folder / "controlnet.safetensors")
    recipe = ClipVisionRecipe()
    with DrawnFrom(generator):
        vision = CLIPVisionModelWithProjection(CLIPVisionConfig(**recipe.network()))
    save_clip_vision(vision, recipe, {}, folder / "clip_vision.safetensors")
    # The ONNX models of the vision tests: one set of green-square faces is enough.
    spec = importlib.util.spec_from_file_location("faces", ROOT / "tests/vision/conftest.py")
    green = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(green)
    faces = folder / "insightface" / "demo_faces"
    faces.mkdir(parents=True)
    onnx.save(green._detector(128), faces / "detector.onnx")
    onnx.save(green._recogniser(), faces / "recogniser.onnx")
    sizes = FeatureSizes(128, recipe.projection, 65, recipe.width)
    random_difflora(folder / "difflora.safetensors", demo_layout(), sizes)
    return folder


@pytest.fixture(scope="session")
def is_shipped() -> bool:
    """True when the trained demo world is complete."""
    return all(part.exists() for part in PARTS)


@pytest.fixture(scope="session")
def demo_world(is_shipped, request: pytest.FixtureRequest) -> Path:
    """The folder that Load DiffLoRA Demo reads in the tests."""
    return paths.ARTEFACTS if is_shipped else request.getfixturevalue("random_world")


@pytest.fixture(scope="session")
def sizes(demo_world: Path) -> FeatureSizes:
    """Sizes of the demo world's encoders."""
    return load_model(demo_world / "difflora.safetensors").config.feature_sizes


@pytest.fixture(scope="session")
def face_picture(is_shipped, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 128 x 128 picture file with one face that the demo world's detector finds."""
    path = tmp_path_factory.mktemp("pictures") / "face.png"
    if is_shipped:
        from difflora_core.demo.world.identities import split_seeds
        from difflora_core.demo.world.scenes import render_portraits

        pixels = render_portraits(split_seeds("validation", 1), [0]).images[0]
    else:
        pixels = torch.full((128, 128, 3), 0.4)
        pixels[52:76, 50:74] = torch.tensor([0.0, 1.0, 0.0])
    Image.fromarray((pixels * 255).round().byte().numpy()).save(path)
    return path


@pytest.fixture(scope="session")
def plain_picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grey picture without any face."""
    path = tmp_path_factory.mktemp("plain") / "plain.png"
    Image.new("RGB", (128, 128), (110, 110, 110)).save(path)
    return path


@pytest.fixture(scope="session")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], dict[str, str]]:
    """Makes variables that keep a Python process from the network.

    The file ASKED then says who tried to reach it.
    """

    def make() -> dict[str, str]:
        asked = tmp_path_factory.mktemp("network") / "asked.txt"
        asked.touch()
        paths = [str(Path(__file__).parent / "no_network"), os.environ.get("PYTHONPATH")]
        path = os.pathsep.join(filter(None, paths))
        return {"PYTHONPATH": path, "ASKED": str(asked), "HF_HUB_OFFLINE": "0"}

    return make


@pytest.fixture(scope="session")
def comfy_server(
    comfyui: Path, demo_world: Path, watched, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ComfyServer]:
    """A running ComfyUI with this pack: base directory, input and output folders, log.

    It is kept from the network, and at its end nobody may have tried to reach it.
    """
    base = tmp_path_factory.mktemp("comfyui")
    paths = base / "model_paths.yaml"
    paths.write_text(f"tests:\n  base_path: {demo_world}\n  difflora_demo: .\n")
    here = Path(__file__).parent
    packs = (ROOT, here / "foreign_pack", here / "renaming_pack", here / "toy_pack")
    arguments = ["--extra-model-paths-config", str(paths)]
    variables = watched()
    server = ComfyServer(base, packs=packs, arguments=arguments)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        server.start()
    try:
        yield server
    finally:
        server.stop()
    asked = Path(variables["ASKED"]).read_text("utf-8")
    assert not asked, f"the network was asked:\n{asked}"


@pytest.fixture(autouse=True)
def own_files(request: pytest.FixtureRequest) -> Iterator[None]:
    """Removes the models that a test made, so that no other test finds them by their names.

    All tests share one ComfyUI, and a file name of it is a name of all of them.
    """
    if "comfy_server" not in request.fixturenames:
        yield
        return
    models = request.getfixturevalue("comfy_server").base_directory / "models"
    before = set(models.rglob("*"))
    yield
    for path in set(models.rglob("*")) - before:
        if not path.is_dir():
            path.unlink()


@pytest.fixture(scope="session")
def comfy(comfy_server: ComfyServer) -> ComfyClient:
    """Its client: `run(prompt)`, `object_info()`, `upload_picture(path)`."""
    return comfy_server.client


@pytest.fixture(scope="session")
def ask() -> Callable[..., str]:
    """Gives what a server answers to a GET, or to a POST with a body, past any proxy."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def answer(client: ComfyClient, path: str, body: bytes | None = None) -> str:
        request = urllib.request.Request(client.url + path, body)
        with opener.open(request, timeout=60) as reply:
            return reply.read().decode("utf-8")

    return answer


@pytest.fixture(scope="session")
def interrupt(comfy: ComfyClient, ask: Callable[..., str]) -> Callable[[], str]:
    """Stops the prompt that runs now, as the button in the browser does."""
    return lambda: ask(comfy, "/interrupt", b"{}")


@pytest.fixture(scope="session")
def node_module(pack: ModuleType):
    """Gives a module of nodes/ by name, in this process."""
    return lambda name: import_module(f".nodes.{name}", pack.__name__)


@pytest.fixture
def parts(pack):
    """Gives the pack's own modules by their names."""
    return lambda name: import_module(f".{name}", pack.__name__)


@pytest.fixture
def unet(parts):
    """Makes a fresh demo UNet in a ModelPatcher."""
    (base, *_), _ = parts("nodes.model_paths").demo_paths()
    return lambda: parts("nodes.host.demo").load_demo_unet(base, disable_dynamic=True)


@pytest.fixture
def demo(parts, unet):
    """The demo's model, CLIP and VAE in this process."""
    (base, *_), _ = parts("nodes.model_paths").demo_paths()
    host = parts("nodes.host.demo")
    return unet(), host.load_demo_clip(base), host.load_demo_vae(base)


@pytest.fixture(scope="module")
def face(comfy, face_picture):
    """The name of an uploaded photo with a face."""
    return comfy.upload_picture(face_picture)


@pytest.fixture(scope="module")
def plain(comfy, plain_picture):
    """The name of an uploaded picture without one."""
    return comfy.upload_picture(plain_picture)


@pytest.fixture
def random_adaptation(parts, unet):
    """Gives a maker of random adaptations of a method: make(seed).

    It is `maker` of the file with the method's name in random_adaptations/.
    """
    folder, model = Path(__file__).parent / "random_adaptations", unet()
    return lambda method: run_path(str(folder / f"{method}.py"))["maker"](parts, model)


@pytest.fixture
def draw_models(comfy):
    """Draws with several models of one graph: name to (model, positive, negative), to pictures.

    The graph has the demo, a person's LoRA, ordinary prompts and an empty latent beside what is
    given.
    """
    vae, difflora = ["demo", 2], ["demo", 5]

    def node(class_type, **inputs):
        return {"class_type": class_type, "inputs": inputs}

    def run(nodes, models):
        graph = {
            "demo": node("DiffLoRA_LoadDemo"),
            "identity": node(
                "DiffLoRA_InventIdentity", difflora_model=difflora, seed=3, count=1, steps=4,
                guidance=1.0,
            ),
            "lora": node(
                "DiffLoRA_DecodeLoRA", difflora_model=difflora, lora_latent=["identity", 0]
            ),
            "words": node("CLIPTextEncode", clip=["demo", 1], text="photo of a person, smiling"),
            "none": node("CLIPTextEncode", clip=["demo", 1], text=""),
            "empty": node("EmptyLatentImage", width=64, height=64, batch_size=2),
        } | nodes  # fmt: skip
        for name, (model, positive, negative) in models.items():
            graph |= {
                f"{name} latent": node(
                    "KSampler", model=model, positive=positive, negative=negative,
                    latent_image=["empty", 0], seed=3, steps=4, cfg=2.0, sampler_name="euler",
                    scheduler="normal", denoise=1.0,
                ),
                f"{name} picture": node("VAEDecode", samples=[f"{name} latent", 0], vae=vae),
                f"{name} shown": node("PreviewImage", images=[f"{name} picture", 0]),
            }  # fmt: skip
        shown = comfy.run(graph).pictures
        return {name: np.stack(shown[f"{name} shown"]).astype(int) for name in models}

    return run
