"""Distil Checkpoint in real ComfyUI: on the demo base, in a few steps."""

import pytest
import torch

from difflora_core.base_model.diffusers_base import DiffusersBase
from difflora_core.comfy_client import ComfyPromptError
from difflora_core.lora.layout import SDXL_UNET_CONFIG
from difflora_core.training.picture_task import PictureTask
from difflora_core.training.recipes import default_distillation, distillation_recipes

METHOD = default_distillation()
PROMPTS = "photo of a person\nphoto of a person, smiling\n# a note\ncartoon of a person, red shirt"
WIDGETS = {
    "prompts": PROMPTS, "prompt_file": "none", "method": METHOD, "steps": 4, "rank": 2,
    "pictures": 2, "width": 64, "height": 64, "batch_size": 2, "seed": 1,
    "file_name": "taught", "source": "teacher", "sampling_steps": 2, "cfg": 2.0,
    "output_weight": 1.0, "feature_weight": 0.1, "learning_rate": 0.01, "held_out": 34,
    "small_file": False,
}  # fmt: skip
STUDENT = {"model": ["demo", 0], "clip": ["demo", 1], "vae": ["demo", 2]}


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def graph(**changes):
    """A teacher that is the student with a LoRA on it."""
    inputs = {"teacher": ["lora", 0], "teacher_clip": ["demo", 1], **STUDENT, **WIDGETS, **changes}
    return {
        "demo": node("DiffLoRA_LoadDemo"),
        "reader": node("CLIPMergeSubtract", clip1=["demo", 1], clip2=["demo", 1], multiplier=0.3),
        "file": node("DiffLoRA_LoadLoRAFile", lora_name="difflora_demo_old_lora.safetensors"),
        "lora": node(
            "LoraModelLoader", model=["demo", 0], lora=["file", 0], strength_model=2.0, bypass=False
        ),
        "distil": node("DiffLoRA_DistilCheckpoint", **inputs),
        "told": node("PreviewAny", source=["distil", 1]),
    }


@pytest.fixture
def styles(comfy_server):
    return comfy_server.base_directory / "models" / "difflora_styles"


def test_a_lora_on_the_student_is_learned_as_a_style(comfy, styles, is_shipped):
    from difflora_core.storage.adapter_file import read_adaptation

    if not is_shipped:
        pytest.skip("needs the trained demo world")
    told = comfy.run(graph()).outputs["told"]["text"][0]
    made = read_adaptation(styles / "taught.safetensors")
    assert (made.method, made.word, made.facts["pictures"]) == (METHOD, None, 2)
    assert made.facts["distilled_by"] == "outputs and features"
    assert any(name.endswith("in_layers.2") for name in made.layers)  # convolutions too
    assert "text encoders" not in told
    with pytest.raises(ComfyPromptError, match="nothing to learn: teacher and student"):
        comfy.run(graph(teacher=["demo", 0]))


def test_a_teacher_that_reads_otherwise_is_compared_by_outputs(comfy, comfy_server, styles):
    from difflora_core.storage.adapter_file import read_adaptation

    other = next(name for name in distillation_recipes() if name != METHOD)
    (comfy_server.base_directory / "input" / "told.txt").write_text(
        "照人 => photo of a person\n笑 => photo of a person, smiling", "utf-8"
    )
    told = comfy.run(
        graph(
            teacher=["demo", 0], teacher_clip=["reader", 0], prompts="", prompt_file="told.txt",
            file_name="foreign", method=other, rank=1, steps=2, held_out=0,
        )
    ).outputs["told"]["text"][0]  # fmt: skip
    made = read_adaptation(styles / "foreign.safetensors")
    assert (made.method, made.facts["distilled_by"]) == (other, "outputs")
    assert "the text encoders differ, so only outputs are compared" in told


def test_what_is_missing_is_said(comfy, comfy_server):
    for name, text in (("empty.txt", ""), ("blank.txt", "\n \n# a note\n")):
        (comfy_server.base_directory / "input" / name).write_text(text, "utf-8")
        with pytest.raises(ComfyPromptError, match="no prompts: write some"):
            comfy.run(graph(prompts="# nothing", prompt_file=name))
    with pytest.raises(ComfyPromptError, match=r"nowhere\.txt"):
        comfy.run(graph(prompt_file="nowhere.txt"))


@pytest.fixture
def demo(demo):
    """Also the model with random patches on it."""
    model, clip, vae = demo
    taught, generator = model.clone(), torch.Generator().manual_seed(3)
    for name, part in model.model.diffusion_model.named_modules():
        if name.endswith(("to_q", "to_v")):
            change = 0.02 * torch.randn(part.weight.shape, generator=generator)
            taught.add_patches({f"diffusion_model.{name}.weight": ("diff", (change,))})
    return model, taught, clip, vae


@pytest.fixture
def own_styles(tmp_path, monkeypatch):
    """The folder of styles, and those of states, of a ComfyUI of its own."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path / "user"))
    folders = {"difflora_styles": ([str(tmp_path / "styles")], {".safetensors"})}
    monkeypatch.setattr(
        folder_paths, "folder_names_and_paths", folder_paths.folder_names_and_paths | folders
    )
    (tmp_path / "styles").mkdir()
    return tmp_path / "styles"


def test_an_interrupt_keeps_the_best_and_the_next_run_goes_on(demo, parts, own_styles):
    """Stopped while the teacher draws, then while the student learns."""
    import comfy.utils
    from comfy import model_management

    model, taught, clip, vae = demo
    execute = parts("nodes.distillation").DistilCheckpoint.execute
    widgets = WIDGETS | {"pictures": 3, "steps": 60, "held_out": 0}
    seen = []

    def run(stop_at=None):
        seen.clear()

        def hook(value, total, preview, node_id=None):
            seen.append((value, total))
            if (value, total) == stop_at:
                model_management.interrupt_current_processing(True)

        comfy.utils.set_progress_bar_global_hook(hook)
        try:
            with torch.inference_mode():
                return execute(taught, clip, model, clip, vae, **widgets).result
        finally:
            comfy.utils.set_progress_bar_global_hook(None)
            model_management.interrupt_current_processing(False)

    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    with pytest.raises(model_management.InterruptProcessingException):
        run(stop_at=(2, 3))
    assert not list(own_styles.iterdir())
    with pytest.raises(model_management.InterruptProcessingException):
        run(stop_at=(50, 60))
    assert (1, 3) not in seen  # drawn before
    assert (3, 3) in seen
    assert len(list(own_styles.iterdir())) == 1
    style, report = run()
    assert (3, 3) not in seen
    assert seen[0][0] > 50
    assert "best at step" in report
    assert style.adaptation.facts["pictures"] == 3
    assert len(list(own_styles.iterdir())) == 1  # the end of a run replaces what a stop kept
    model_management.unload_all_models()
    after = model.model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_a_teacher_of_its_own_weights_is_the_patched_model(demo, parts):
    """As ComfyUI patches it, once; the model that it came from stays as it was."""
    from comfy import model_management

    model, taught, _, vae = demo
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    model_management.load_models_gpu([taught])
    expected = {k: v.clone() for k, v in taught.model.state_dict().items()}
    model_management.unload_all_models()
    own = parts("nodes.host.base").ComfyBase(taught, vae, apart=True)
    for _ in range(2):
        own.load(0)
        assert not own.patcher.backup
        made = own.patcher.model.state_dict()
        assert all(torch.equal(made[k], v) for k, v in expected.items())
        model_management.unload_all_models()
    assert sum(not torch.equal(expected[k], v) for k, v in before.items()) > 10
    after = model.model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_a_teacher_of_another_vae_is_refused(demo, parts):
    """Its latents would be pictures of other colours to the student's VAE."""
    import comfy.latent_formats

    model, _, clip, vae = demo
    (base, *_), _ = parts("nodes.model_paths").demo_paths()
    teacher = parts("nodes.host.demo").load_demo_unet(base, disable_dynamic=True)
    execute = parts("nodes.distillation").DistilCheckpoint.execute
    for other in (comfy.latent_formats.SD15(), comfy.latent_formats.SD3()):
        teacher.model.latent_format = other
        with pytest.raises(Exception, match=r"other latents, of \(channels, scale\).*VAEs differ"):
            execute(teacher, clip, model, clip, vae, **WIDGETS)


def test_a_teacher_that_draws_through_styles_is_refused(demo, parts, random_adaptation):
    adapters = parts("nodes.host.adapters")
    applied_adaptation = parts("difflora_core.methods.base").AppliedAdaptation
    model, _, clip, vae = demo
    style = random_adaptation(METHOD)(1)
    applied = applied_adaptation(style, style.adaptation.settings)
    styled = adapters.with_link(model, adapters.Link(applied, 0.0, 1.0, False))
    execute = parts("nodes.distillation").DistilCheckpoint.execute
    for role, teacher, student in (("teacher", styled, model), ("model", model, styled)):
        with pytest.raises(Exception, match=f"The {role} has .* act while a sampler runs"):
            execute(teacher, clip, student, clip, vae, **WIDGETS)


@pytest.fixture
def sdxl():
    """SDXL by its shapes alone: diffusers' UNet, and core's model in half precision."""
    import comfy.model_detection
    import comfy.model_patcher
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL_UNET_CONFIG)
        config = comfy.model_detection.model_config_from_diffusers_unet(unet.state_dict())
        config.set_inference_dtype(torch.float16, None)
        model = config.get_model({}, "", device="meta")
    cpu = torch.device("cpu")
    return unet, comfy.model_patcher.ModelPatcher(model, cpu, cpu)


def test_a_step_at_full_size_is_counted_and_fits_24_gb(parts, sdxl, monkeypatch):
    """Teacher and student of SDXL, one picture of 1024 x 1024, a style of rank 16."""
    import comfy.model_management
    from diffusers import DDIMScheduler

    unet, model = sdxl
    monkeypatch.setattr(comfy.model_management, "get_total_memory", lambda *_: 24e9)
    memory, recipe = parts("nodes.host.memory"), distillation_recipes()[METHOD]
    config = recipe.Config.for_distillation(16, batch=1)
    task = PictureTask(DiffusersBase(unet, None, None, DDIMScheduler()), None, "sdxl")
    trained = memory.trained_bytes(recipe(task, config))
    alone = memory.plan_memory(model, 128 * 128, config, "saving")
    plan = memory.plan_memory(model, 128 * 128, config, "auto", model)
    assert plan.checkpointing
    assert alone.weights == pytest.approx(2 * sum(p.numel() for p in unet.parameters()), rel=1e-3)
    assert plan.weights == 2 * alone.weights
    # channels that blocks put out at the height and width of the latents, a half and a quarter
    full, half, quarter = 6 * 320 + 640, 320 + 4 * 640 + 1280, 640 + 5 * 1280
    numbers = 128**2 * full + 64**2 * half + 32**2 * quarter
    assert plan.needed - alone.needed == pytest.approx(numbers * (2 + 2 + 4 + 4), rel=0.02)
    total = plan.weights + plan.needed + trained
    assert 10e9 < total < 24e9
    assert f"{total / 2**30:.1f} GiB of memory" in plan.summary(trained)
