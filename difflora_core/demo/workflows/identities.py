"""The workflows of identities as material: blended, invented, timed, posed, kept and compressed."""

from __future__ import annotations

from .builder import Graph, Out
from .notes import NOTES
from .people import PERSON, SECOND, save_grid
from .targets import Target, WorkflowBuilder

POSE = "difflora_demo_pose.png"


def blend(graph: Graph, target: Target) -> None:
    """One person becomes another in five steps."""
    builder = WorkflowBuilder(graph, target, NOTES["blend"])
    add = graph.add
    with graph.group("1 Load"):
        photos = [builder.photo(PERSON, "Person A"), builder.photo(SECOND, "Person B")]
        builder.load(1)
        prompts = builder.prompts(
            1,
            "photo of a person, neutral, blue background, white shirt",
            "portrait photo of a person, white shirt, blue studio background",
        )
        canvas = builder.canvas(1)
    with graph.group("2 Two identities"):
        latents = [
            builder.latent(photo, f"person {name}", folded=True)["DIFFLORA_LATENT"]
            for photo, name in zip(photos, "AB", strict=True)
        ]
    with graph.group("3 Half and half"):
        mixed = add(
            "DiffLoRA_BlendIdentities",
            0,
            identity_1=latents[0],
            identity_2=latents[1],
            weight_1=1.0,
            weight_2=1.0,
        )["DIFFLORA_LATENT"]
        lora = builder.decode(mixed)["LORA_MODEL"]
        model = builder.apply_lora(lora)
        picture = builder.draw(0, "Draw the blend", model, prompts, canvas)
        builder.save(0, picture, "blend", "Half A, half B")
    with graph.group("4 From A to B"):
        way = add(
            "DiffLoRA_InterpolateIdentities",
            0,
            identity_a=latents[0],
            identity_b=latents[1],
            steps=5,
        )["DIFFLORA_LATENT"]
        steps = _everybody(builder, way, prompts, canvas)
    with graph.group("5 The way", wide=True):
        labels = ("A", "3/4 A", "half", "3/4 B", "B")
        save_grid(builder, builder.grid(0, steps, labels, 5), "from_a_to_b")


def invented(graph: Graph, target: Target) -> None:
    """A person who does not exist, the same in every picture."""
    builder = WorkflowBuilder(graph, target, NOTES["invented_person"])
    with graph.group("1 Load and invent"):
        builder.load()
        identity = graph.add(
            "DiffLoRA_InventIdentity", 0, difflora_model=builder.difflora, seed=target.pick(12, 1)
        )["DIFFLORA_LATENT"]
        lora = builder.decode(identity)["LORA_MODEL"]
        model = builder.apply_lora(lora)
    scenes = target.pick(
        (
            "photo of a person, smiling, blue background, red shirt",
            "photo of a person, surprised, striped yellow background, white shirt",
            "cartoon of a person, neutral, green background, purple shirt, holding a blue cup",
            "painting of a person, sad, pink background, orange shirt",
        ),
        (
            "photo of a person reading in a cafe",
            "photo of a person hiking in the mountains",
            "oil painting of a person in a red coat",
            "comic book drawing of a person, city at night",
        ),
    )
    with graph.group("2 Four scenes"):
        pictures = _scenes(builder, scenes, [model])[0]
    with graph.group("3 The same person", wide=True):
        labels = ("scene 1", "scene 2", "scene 3", "scene 4")
        save_grid(builder, builder.grid(0, pictures, labels, 4), "invented")


def fade_in(graph: Graph, target: Target) -> None:
    """The LoRA fades in while the picture is drawn."""
    builder = WorkflowBuilder(graph, target, NOTES["fade_in"])
    add = graph.add
    with graph.group("1 Load"):
        photo = builder.photo(PERSON, "Photo of the person")
        builder.load()
    with graph.group("2 A LoRA with a schedule"):
        lora = builder.personalize(photo)["LORA_MODEL"]
        hook = add("DiffLoRA_LoRAToHook", 1, lora=lora, base_model=builder.model)["HOOKS"]
        keyframes = add(
            "CreateHookKeyframesInterpolated",
            1,
            title="Strength over the steps",
            strength_start=0.0,
            interpolation="linear",
            start_percent=0.15,
            end_percent=0.6,
        )["HOOK_KEYFRAMES"]
        timed = add("SetHookKeyframes", 1, hooks=hook, hook_kf=keyframes)["HOOKS"]
        prompts = builder.prompts(
            1,
            "photo of a person, smiling, yellow background, red shirt, wearing a blue hat",
            "photo of a person smiling, blue hat, red shirt, yellow wall",
        )
    with graph.group("3 Draw three ways"):
        fading = add(
            "PairConditioningSetProperties",
            0,
            title="The prompt with the schedule",
            positive_NEW=prompts[0],
            negative_NEW=prompts[1],
            set_cond_area="default",
            hooks=timed,
        )
        model = builder.apply_lora(lora)
        canvas = builder.canvas(0)
        drawn = [
            builder.draw(1, "Without the LoRA", builder.model, prompts, canvas),
            builder.draw(
                1, "Fading in", builder.model, (fading["positive"], fading["negative"]), canvas
            ),
            builder.draw(1, "All the time", model, prompts, canvas),
        ]
    with graph.group("4 Compare", wide=True):
        variants, labels = builder.batch(0, drawn), ("without", "fading in", "all the time")
        save_grid(builder, builder.grid(0, variants, labels, 3, reference=photo), "fade_in")


def pose(graph: Graph, target: Target) -> None:
    """Who from one photo, how from another."""
    builder = WorkflowBuilder(graph, target, NOTES["controlnet_pose"])
    add = graph.add
    with graph.group("1 Load"):
        photo = builder.photo(PERSON, "Photo of the person")
        posed = builder.photo(POSE, "Pose photo")
        builder.load(1, control=True)
    with graph.group("2 Who and how"):
        lora = builder.personalize(photo)["LORA_MODEL"]
        points = add(
            "DiffLoRA_ExtractFeatures",
            1,
            title="Face points of the pose",
            images=posed,
            clip_vision=builder.clip_vision,
            face_analysis=builder.faces,
        )["keypoints"]
        prompts = builder.prompts(
            1,
            "photo of a person, neutral, blue background, white shirt",
            "portrait photo of a person, white shirt, blue studio background",
        )
        steered = add(
            "ControlNetApplyAdvanced",
            1,
            positive=prompts[0],
            negative=prompts[1],
            control_net=builder.control_net,
            image=points,
            strength=target.pick(1.5, 0.8),
            start_percent=0.0,
            end_percent=1.0,
        )
    with graph.group("3 Draw"):
        model = builder.apply_lora(lora)
        canvas = builder.canvas(0)
        free = builder.draw(0, "Without the pose", model, prompts, canvas)
        controlled = (steered["positive"], steered["negative"])
        drawn = builder.draw(1, "In that pose", model, controlled, canvas)
        builder.save(1, drawn, "pose", "Keep the picture", folded=True)
    with graph.group("4 Compare", wide=True):
        pictures = builder.batch(0, [points, free, drawn])
        labels = ("its points", "free", "in that pose")
        grid = builder.grid(0, pictures, labels, 3, reference=posed)
        save_grid(builder, grid, "pose_comparison")


def prompt_grid(graph: Graph, target: Target) -> None:
    """Many prompts at once, with and without the LoRA."""
    builder = WorkflowBuilder(graph, target, NOTES["prompt_grid"])
    with graph.group("1 Load"):
        photo = builder.photo(PERSON, "Photo of the person")
        builder.load()
    with graph.group("2 Personalize"):
        lora = builder.personalize(photo)["LORA_MODEL"]
        model = builder.apply_lora(lora)
    texts = target.pick(
        (
            "photo of a person, smiling, blue background, red shirt",
            "photo of a person, sad, dark background, white shirt, wearing a red hat",
            "cartoon of a person, surprised, striped green background, orange shirt",
            "painting of a person, neutral, pink background, purple shirt, with a black cat",
        ),
        (
            "photo of a person in a red shirt, smiling, blue background",
            "film still of a person in the rain at night, red hat",
            "anime drawing of a surprised person, green background",
            "oil painting of a person with a black cat",
        ),
    )
    with graph.group("3 The prompts"):
        rows = _scenes(builder, texts, [builder.model, model])
    with graph.group("4 Compare", wide=True):
        pictures = builder.batch(0, rows)
        labels = ["base: prompt 1", *(f"prompt {k}" for k in (2, 3, 4))]
        labels += ["person: prompt 1", *(f"prompt {k}" for k in (2, 3, 4))]
        grid = builder.grid(0, pictures, labels, 4, reference=photo)
        save_grid(builder, grid, "prompt_grid")


def _scenes(builder: WorkflowBuilder, texts: tuple[str, ...], models: list[Out]) -> list[Out]:
    """Every prompt drawn with every model: one batch of pictures per model."""
    add = builder.graph.add
    boxes = [
        add("PrimitiveStringMultiline", 0, title=f"Prompt {k + 1}", value=text)["STRING"]
        for k, text in enumerate(texts)
    ]
    every = add("CreateList", 1, title="All prompts", inputs=boxes)["list"]
    prompt = add("CLIPTextEncode", 1, title="Each prompt", clip=builder.clip, text=every)
    nothing = builder.target.pick("", "blurry, deformed, watermark")
    negative = add("CLIPTextEncode", 1, title="Negative prompt", clip=builder.clip, text=nothing)
    canvas = builder.canvas(1)
    pair = (prompt["CONDITIONING"], negative["CONDITIONING"])
    batches = []
    for k, model in enumerate(models):
        title = "Draw each prompt" if len(models) == 1 else ("Base model", "The person")[k]
        drawn = builder.draw(2, title, model, pair, canvas)
        joined = add("RebatchImages", 2, title="As one batch", images=drawn, batch_size=4096)
        batches.append(joined["IMAGE"])
    return batches


def _everybody(
    builder: WorkflowBuilder, latents: Out, prompts: tuple[Out, Out], canvas: Out
) -> Out:
    """One picture of every person of a batch of latents."""
    add = builder.graph.add
    loras = add(
        "DiffLoRA_DecodeLoRA",
        0,
        title="A LoRA for every step",
        folded=True,
        difflora_model=builder.difflora,
        lora_latent=latents,
        base_model=builder.model,
        index=-1,
    )["LORA_MODEL"]
    model = builder.apply_lora(loras, title="Each on its own model")
    drawn = builder.draw(0, "Draw each", model, prompts, canvas)
    joined = add("RebatchImages", 0, title="As one batch", images=drawn, batch_size=4096)
    return joined["IMAGE"]
