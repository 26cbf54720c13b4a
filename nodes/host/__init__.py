"""Between ComfyUI and the library: what several nodes share."""
