"""How large what we read may be. One place, so that every reader refuses before it allocates.

Each limit lies well above what an honest file needs; docs/reliability.md lists them for people.
"""

FILE_BYTES = 2**35
"""A safetensors file. The largest model of ours has 2 GiB."""

HEADER_BYTES = 2**24
"""Its header. A LoRA of 10,000 tensors needs about 2 MiB."""

TENSORS = 2**17
"""Tensors in a file. An identity library has one for each picture."""

DIMENSIONS = 8
"""Dimensions of a tensor."""

NAME_LENGTH = 1000
"""Characters of a tensor's name. Real ones have about 100."""

JSON_BYTES = 2**24
"""A JSON text."""

JSON_DEPTH = 32
"""Lists and tables inside each other."""

INTEGER_DIGITS = 20
"""Digits of a whole number in JSON: seeds need 20."""

PROMPT_BYTES = 2**24
"""A text file of prompts. A hundred thousand long ones."""

LAYERS = 4096
"""Layers of a LoRA or an adaptation. SDXL has 794 with weights."""

FEATURES = 2**16
"""Width of a layer. SDXL's widest has 10,240."""

RANK = 4096
"""Components of a LoRA's layer."""

LAYOUT_VALUES = 2**30
"""Numbers of one LoRA of a layout, in all its layers."""

MATRIX_VALUES = 2**25
"""Numbers of a matrix that is computed from a file: LoHa, LoKr, whole weight changes."""

MATRIX_SIDE = 1536
"""Shorter side of a matrix of which singular values are taken; SDXL's layers have 1280."""

COMPUTED_VALUES = 2**26
COMPUTED_SHARE = 256
"""Numbers that LoKr, LoHa and whole changes may become as LoRA: so many, and so many times what the
file holds. SDXL's LoKr files become 10 to 100 times as large."""

NUMBER = 1e9
"""Largest number in a LoRA. Beyond it products leave the range of 32 bits."""

PICTURE_BYTES = 2**28
"""A picture file to train on."""

PICTURE_PIXELS = 2**26
"""Pixels of a picture. Cameras make 60 million; the picture is in memory with 3 bytes each."""

CAPTION_LENGTH = 4000
"""Characters of a caption. SDXL reads about 300."""
