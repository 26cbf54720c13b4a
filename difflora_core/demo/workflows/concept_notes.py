"""What the notes in the workflows of taught words say (Markdown); see workflow_notes.py."""

from __future__ import annotations

CONCEPT_NOTES = {
    "teach_concept": """
## Teach the model a word
Three pictures of a hat, and masks that say where it is, become the word `<my-hat>`. The look is \
learned beside the model, in a file of {demo: 4 KiB}{sdxl: about 175 KiB}; no weight changes.

- **Another thing**: other pictures, one is enough and three to ten are better, each with a mask: \
painted in the mask editor, or from a segmentation node. Without masks the whole pictures count.
- **word and superclass**: the new word, and one plain word for its kind.
- **prompts**: what else is on the pictures; what is said is not learned. Empty takes *a photo of* \
and the like.
- **steps**: {demo: few here, to be done in seconds; }200 to 600 are usual. Stopping keeps the \
best so far.
- **Two things on one picture**: *second_word* and *second_superclass*.""",
    "one_concept": """
## A taught word, and how much of it
*Load Concept* brings the word into the CLIP, *Apply Concept* gives it its look. The grid \
draws one prompt and seed with its plain kind and at three biases.

- **bias**: how like the concept a word must be to get its look. Lower: more likeness; higher: \
more agreement with the prompt.
- **temperature**: softness of that choice. **strength**: 0 is the model alone.
- **lock**: *local* puts the thing where its kind would be; *global* leaves the whole layout to \
the prompt with the plain word, which must be connected.
- **start and end**: a late start keeps the layout of the first steps.""",
    "two_concepts": """
## Two taught words in one prompt
Each has its own file, its own gate and its own settings; neither was trained with the other.

- **Order**: chain the CLIP through both *Load Concept*, and the model through both *Apply \
Concept*.
- **One is too faint**: lower its *bias*; the other one stays as it is.
- **They look alike**: *combine* exact keeps words apart that resemble each other.
- **They get in each other's way**: train and apply them with *reach* 0, so that each acts at its \
own word alone{demo:  (these two are)}.
- **A third word**: one more of each node.""",
    "concept_person": """
## A person with a taught thing
The person comes from a photo as a LoRA on the weights, the thing from its file beside the \
weights: they do not meet. The grid shows the word alone, the person alone, and both.

- **Who**: the photo. **What**: the concept's file.
- **How much of each**: *strength_model* of the LoRA, *bias* of the concept.
- **More**: ControlNet, other LoRAs and a second concept go into the same chain.""",
}
"""By the workflow's name."""
