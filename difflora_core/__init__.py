"""DiffLoRA: reference photos in, a standard LoRA out (arXiv 2408.06740). Plain Python, no ComfyUI.

Map of the rooms (imports point down this list only):

- ``errors``      what can go wrong, in the artist's words
- ``lora``        LoRA weights as data: names, layouts, canonical form, distances, tokens
- ``vision``      reference images to features
- ``diffusion``   prediction targets and the guided sampling loop
- ``models``      networks: MIF gate, DiT denoiser, LoRA autoencoder
- ``adapters``    trained edits of one layer, and how they are attached to a model
- ``methods``     inference: request to adapters, one file per method
- ``storage``     the only reader and writer of files
- ``training``    recipes, one per trained thing
- ``evaluation``  metrics
- ``demo``        a procedural world small enough to train everything
- ``cli``         command line front
"""

__version__ = "0.1.0"
