"""Nodes of the overhead benchmark: ComfyUI's own KSampler, a step of the base, a step of a variant.

Each of the two has a model of its own, because weight patches change the model that they are put
on, and is sampled in a thread of its own; between two steps its callback waits until it is its turn
again, so that the threads never compute at the same time.
"""

from __future__ import annotations

import contextvars
import json
import threading
import time
from typing import Any

import comfy.sample
import torch
from comfy_api.latest import ComfyExtension, io

import nodes

from .pairs import WARM_UP, Seconds, interleave


class StoppedSampling(Exception):
    """Ends a sampler whose steps are not needed any more."""


class SteppedSampler:
    """One KSampler that computes only while `step` waits for it.

    Args:
        model: with all patches. conditions: positive and negative.
        latent: ComfyUI's LATENT, empty. steps: of its schedule, at least as many as will be taken.
    """

    def __init__(self, model: Any, conditions: tuple[Any, Any], latent: dict[str, Any], steps: int):
        self.model, self.conditions, self.steps = model, conditions, steps
        self.latent = comfy.sample.fix_empty_latent_channels(  # as KSampler does
            model,
            latent["samples"],
            latent.get("downscale_ratio_spacial"),
            latent.get("downscale_ratio_temporal"),
        )
        self._error: BaseException | None = None
        self._stopped = False
        self._turn, self._done = threading.Semaphore(0), threading.Semaphore(0)
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._run,), daemon=True)
        self._thread.start()

    def step(self) -> Seconds:
        """Compute one step, the first one with all preparations; the sampler's errors come out."""
        self._turn.release()
        self._done.acquire()
        if self._error is not None:
            raise self._error
        return self._seconds

    def stop(self) -> None:
        """End the sampler where it is."""
        self._stopped = True
        self._turn.release()
        self._thread.join()

    @torch.inference_mode()
    def _run(self) -> None:
        self._wait()
        try:
            if not self._stopped:
                self._sample()
        except StoppedSampling:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._done.release()

    def _sample(self) -> None:
        comfy.sample.sample(
            self.model,
            comfy.sample.prepare_noise(self.latent, 0),
            self.steps,
            2.0,
            "euler",
            "normal",
            *self.conditions,
            self.latent,
            callback=self._end_of_step,
            disable_pbar=True,
            seed=0,
        )

    def _end_of_step(self, step: int, denoised: Any, latent: Any, total: int) -> None:
        """The sampler's callback."""
        wall, processor = time.perf_counter(), time.process_time()
        self._seconds = wall - self._started[0], processor - self._started[1]
        self._done.release()
        self._wait()
        if self._stopped:
            raise StoppedSampling

    def _wait(self) -> None:
        """Until it is this sampler's turn."""
        self._turn.acquire()
        self._started = time.perf_counter(), time.process_time()


class OwnDemo(io.ComfyNode):
    """The demo's model, loaded anew for every number: equal nodes would share one model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Benchmark_OwnDemo",
            category="benchmark",
            inputs=[io.Int.Input("number")],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, number: int) -> io.NodeOutput:
        demo = nodes.NODE_CLASS_MAPPINGS["DiffLoRA_LoadDemo"].execute()
        return io.NodeOutput(demo.args[0])


class Interleave(io.ComfyNode):
    """Samples the base and a variant in turn, and shows the seconds of their steps."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Benchmark_Interleave",
            category="benchmark",
            inputs=[
                io.Model.Input("base"),
                io.Conditioning.Input("base_positive"),
                io.Conditioning.Input("base_negative"),
                io.Model.Input("model"),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Latent.Input("latent"),
                io.Int.Input("pairs", min=1),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, base, base_positive, base_negative, model, positive, negative, latent, pairs
    ) -> io.NodeOutput:
        steps = WARM_UP + pairs
        plain = SteppedSampler(base, (base_positive, base_negative), latent, steps)
        variant = SteppedSampler(model, (positive, negative), latent, steps)
        try:
            times = interleave(plain.step, variant.step, pairs)
        finally:
            plain.stop()
            variant.stop()
        return io.NodeOutput(ui={"text": [json.dumps(times)]})


class InterleavingExtension(ComfyExtension):
    """The nodes above."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [OwnDemo, Interleave]
