"""What the notes in the workflows of styles say (Markdown); see notes.py."""

from __future__ import annotations

STYLE_NOTES = {
    "apply_style": """
## A style, and how much of it
*Load Style* reads a look from its file, *Apply Style* gives it to the model; the prompt needs \
no word for it. The grid draws one prompt and seed at several strengths, the last one below 0.

- **strength**: 0 is the base model to the pixel, 1 is as trained, below 0 leads away from the \
style.
- **start_percent** 0.2 leaves the layout of the first steps to the base model.
- **The parts** (advanced): *input_blocks* hold the layout, *output_blocks* texture and colour.
- **Another style after it**: one more *Apply Style*; they act in their order.
- **Style Router Picture** draws as KSampler does and shows which of the style's own looks acted \
where: a panel for each part of the model, time from left to right.""",
    "style_person": """
## A style, a person and a pose
The person comes from a photo as a LoRA, the style from its file, the pose from a ControlNet. The \
grid adds them one by one, with one seed.

- **Who**: the photo. **How**: the *Pose photo*. **Which look**: the style's file.
- **How much of each**: *strength_model* of the LoRA, *strength* of Apply Style, *strength* of \
Apply ControlNet.
- **The person is too faint**: lower the style a little, or let it start at 0.1.
- The order of LoRA and style makes no difference.""",
    "few_shot_style": """
## Learn a style from a few pictures
Six pictures of one look become a style: *Train StyleInject* learns what they have in common and \
no prompt says. It is kept in `models/difflora_styles`.

- **Your pictures**: connect them to *All pictures*, which grows; some dozens are better than \
six.
- **prompts**: one line for each picture, in their order; what a line says is not learned.
- **styles**: 1 for one artist, more for a collection; **rank**: higher is more faithful.
- **steps**: {demo: few here, to be done in a minute; }500 to 2000 are usual. Stopping keeps \
the best so far.""",
    "distil_checkpoint": """
## Carry the look of a checkpoint in a small file
The teacher is {demo: the demo with a sepia LoRA on it}{sdxl: a checkpoint of yours}. *Distil \
Checkpoint* lets it draw the prompts, and the base model learns to predict what it predicts. What \
is learned is a small style, kept in `models/difflora_styles`.

- **Your teacher**: {demo: at full size a second *Load Checkpoint*}{sdxl: choose it in *The \
teacher*}; or the base model with LoRAs on it.
- **prompts**: one a line, of what you want to draw later; dozens or more, or a file of them.
- **pictures**: how many the teacher draws, each prompt in turn.
- **steps**: {demo: few here, to be done in a minute; }it stops when held-out prompts gain \
nothing more.
- **Afterwards** *Load Style* and *Apply Style* give the look to the base model; its LoRAs and \
ControlNets still fit.""",
    "para_style": """
## Take a style out of the model
*Train PaRa* adds nothing: it takes directions out of the model's layers, so that what is left \
draws like the given pictures. It suits looks of few colours and tones.

- **Your pictures**: connect them to *All pictures*, which grows. Three to ten are enough.
- **rank**: directions taken out of every layer. Higher: more faithful; lower: more room for the \
prompt.
- **bound** keeps all PaRa of a model from taking too much. {demo: The narrow demo needs \
much; SDXL takes 0.025.}{sdxl: 0.025 is usual.}
- **strength**: 0.5 takes half of it out, below 0 makes more of what 1 takes out.
- **With a LoRA** it goes first wherever its node stands, and the LoRA stays whole.""",
}
"""By the workflow's name."""
