"""What the note in each workflow says: what it shows and what to change (Markdown)."""

from __future__ import annotations

NOTES = {
    "quickstart": """
## A photo becomes a LoRA
Load, **Personalize**, apply: that is all. The LoRA is made in one pass, nothing is trained.

- **Another person**: another picture in *Photo of the person*. Several photos of one person work \
better: see the workflow *several photos*.
- **Another scene**: change the prompt.
- **mode: sampled** draws a variant of the person for every seed.
- **Keep it**: the saved LoRA lies in `output/loras`. Move it to `models/loras` and press R: it \
works in any workflow.""",
    "portrait": """
## A portrait by the single steps
The same as *Personalize*, with every setting in sight.

- **Mix Image Features**: gate *manual* and the slider choose between the face and the whole look.
- **Sample LoRA Latent**: *best_guess*, or *sampled* with another seed for a variant; guidance \
above 1 exaggerates the person.
- **Apply LoRA by Part and Time**: strength; start_percent 0.2 leaves the layout to the base \
model; positive_only pushes towards the person; the parts (advanced) weigh layout against texture.
- **Compare Identities** says how alike the result is: about 1 is the same face, about 0 a \
stranger.""",
    "several_photos": """
## Several photos of one person
What all photos share is the person; what differs between them (light, mood, clothes) is not.

- **More photos**: connect them to *All photos*, it grows. Their order does not matter.
- A photo **without a face** is an error; set *on_missing_face* of Personalize to *skip* or \
*image_only* for a folder of mixed pictures.
- The right pictures of the grid used all photos, the left ones the first photo alone; prompt and \
seed are the same.""",
    "two_people": """
## Two people in one picture
Each LoRA becomes a **hook** that acts only inside its mask, so nobody gets the other's face.

- **Who**: the two photos.
- **Where**: the masks. Here they are the halves of the picture; any mask of the picture's shape \
works, one painted by hand with the mask editor too. White is where the person stands.
- **A third person**: one more *LoRA to Hook* and one more *Cond Pair Set Props Combine* with a \
third mask.
- The lower row shows the same with both LoRAs on the whole picture: the faces mix.
- Hooks switch weights at every step, so this draws slower than one LoRA on the model.""",
    "people_by_words": """
## Two people without masks
Each LoRA acts where the picture shows the person of some **words** of the prompt. The first steps \
find where that is; nothing is painted.

- **Who**: the two photos.
- **Who is who**: *words* of each *Place LoRA by Words* stand in the prompt just so. Swap them and \
the people change places; each node says afterwards where its person is.
- **A third person**: one more *Place LoRA by Words* between the second one and the samplers, and \
words for them in the prompt.
- **Somebody without a LoRA**: their words, with any LoRA at strength 0.
- With masks you decide yourself who stands where: see the workflow *two people*.""",
    "inpaint_face": """
## The person in a picture that exists
Above: **inpainting**. The face in the picture is found, its mask grown, and only that part is \
drawn again, as the person. Below: **image to image**, which draws the whole picture again.

- **The picture**: *Picture to change*. With several faces choose one by *face_index*.
- **How much changes**: *denoise* of the samplers; 0.5 keeps more of the old face, 1 nothing.
- **How far around the face**: *expand* of Grow Mask: hair belongs to the person too.
- The prompt should say what the picture shows.""",
    "blend": """
## Blend two people
Two photos become two identities, a blend of them is somebody in between. The grid walks from one \
to the other with the same prompt and seed.

- **Who**: the two photos.
- **One blend**: *weight_1* and *weight_2* of Blend Identities; only their proportion counts. Up \
to four people, and blends can be blended.
- **The way from A to B**: *steps* of Interpolate Identities.
- *slerp* keeps everybody distinct; *linear* passes closer to an average face.""",
    "invented_person": """
## A person who does not exist
No photo at all: *Invent Identity* draws a person from a seed. The same person then appears in \
every picture, whatever the prompt says.

- **Somebody else**: another *seed* in Invent Identity.
- **The scenes**: one text box for each picture; add a box (*String (Multiline)*) and connect it \
to *All prompts*, which grows.
- **Relatives**: put *Vary Identity* between Invent Identity and Decode LoRA.
- **Keep the person**: *Add to Identity Library*, or Save LoRA Weights after Decode LoRA.""",
    "fade_in": """
## The identity fades in
The LoRA as a **hook** with keyframes: its strength follows the steps. The first steps decide \
layout and pose, so a LoRA that comes late keeps the picture of the base model and changes who is \
in it.

- **When**: *start_percent* and *end_percent* of the keyframes node: from 0 to full strength.
- **How**: its *interpolation*.
- The grid shows, with one seed: without the LoRA, fading in, all the time.
- Hooks draw slower than a LoRA on the model. For a hard start without fading *Apply LoRA by Part \
and Time* is simpler.""",
    "controlnet_pose": """
## Who from one photo, pose from another
*Extract Identity Features* draws the five face points of the pose photo (eyes, nose, corners of \
the mouth); a **ControlNet** puts the face there. The LoRA says whose face it is.

- **The pose**: another *Pose photo*; it need not show the same person, or any style in \
particular.
- **How strictly**: *strength* of Apply ControlNet; *end_percent* 0.6 lets the last steps run \
free.
- The grid: the pose, its points, the person without and with the ControlNet, one seed.""",
    "prompt_grid": """
## Many prompts, one grid
Every text box is a prompt; one sampler draws them all, first with the base model, then with the \
person.

- **More prompts**: add a text box (*String (Multiline)*) and connect it to *All prompts*, which \
grows.
- Seed, steps and size are the same everywhere, so the rows differ by the LoRA alone.
- Labels of the grid: one line each, in the order of the pictures.""",
    "library": """
## A library of people
Every person is a few kilobytes. Add them once, then pick them by name in any workflow: no photo, \
no LoRA file.

- **Add**: photo, name. With the same name again the old entry is replaced here (*same_name*).
- **Where**: in `models/difflora_library`; *library* names the file.
- **Use**: the right half alone is enough later: *Pick from Identity Library*, with the *library* \
link removed and the name typed in.
- The identities belong to one DiffLoRA model; another model asks for the photos again.""",
    "compress_lora": """
## An old LoRA becomes an identity
A LoRA file of one person goes through the encoder: what is left is a few hundred numbers that can \
be blended, varied, or kept in a library.

- **The LoRA**: another file in *Load LoRA File*. It must be of the same base model.
- **How exactly**: *refine_steps*; more steps keep more of a LoRA that such a model made.
- **What was lost**: the grid shows the old LoRA and what came back, and *Encode LoRA* says how \
much of the weights agrees. A LoRA that a DiffLoRA model made, as the one here, comes back nearly \
whole. Of one that was trained by itself the person stays, while most of its numbers, which only \
repeat the photos it was trained on, do not: judge it by the grid.
- **Save**: the new LoRA is saved too, and *Add to Identity Library* keeps the numbers alone.""",
}
"""By the workflow's name; what the target needs is added below it (targets.py)."""
