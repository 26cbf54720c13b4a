"""Real ComfyUI as a subprocess, its client, and its front end in a browser."""
