"""Chooses the fastest decode step that a decoder supports."""

from __future__ import annotations

from dpllm.decode.cpu_step import NativeModel, NativeStep
from dpllm.decode.gpu_step import GpuStep
from dpllm.decode.step import DecoderStep, TokenStep
from dpllm.model.decoder import Decoder


class StepMaker:
    """Makes the steps of one decoder. What steps can share is made once.

    On a GPU all texts share one step, which holds the captured graphs; elsewhere each text has its own.
    """

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self.native = NativeModel.of(decoder)
        self.gpu = GpuStep.of(decoder)

    def new(self) -> TokenStep:
        """A step for one text."""
        if self.native is not None:
            return NativeStep(self.native)
        return self.gpu or DecoderStep(self.decoder)
