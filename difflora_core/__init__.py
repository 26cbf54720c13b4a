"""DiffLoRA: reference photos in, a standard LoRA out (arXiv 2408.06740). Plain Python, no ComfyUI.

Map of the rooms (imports point down this list only):

- ``errors``      what can go wrong, in the artist's words
- ``limits``      how large what we read may be
- ``config``      strict settings: unknown names and values out of range are refused
- ``comfy_client``  a running ComfyUI: run a prompt, follow it, fetch what it made
- ``lora``        LoRA weights as data: names, layouts, canonical form, distances, tokens
- ``vision``      reference images to features
- ``text``        prompts, text encoders and words that they learn
- ``diffusion``   prediction targets and the guided sampling loop
- ``base_model``  the network that is personalized: loading, layers, precision
- ``models``      our networks: MIF gate, DiT denoiser, LoRA autoencoder, and DiffLoRA of them all
- ``adapters``    trained edits of one layer, and how they are attached to a model
- ``methods``     what was trained to adapters, one file per method, and the registry
- ``storage``     the only reader and writer of files
- ``data``        folders of pictures and of LoRAs to what training reads, however many there are
- ``training``    the loop, and recipes, one per trained thing
- ``evaluation``  metrics
- ``demo``        a procedural world small enough to train everything
- ``commands``    the command line: `python -m difflora_core`

Above them all is `demo/build`, which makes the demo world, by these commands where there is one.
"""

__version__ = "0.1.0"
