"""Published figures of GPUs, for bench/gpu/roofline.py. Nothing here was measured by this project."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """gb_per_s: peak memory bandwidth. multiprocessors. ghz: boost clock. source: where these stand."""

    name: str
    gb_per_s: float
    multiprocessors: int
    ghz: float
    source: str


DEVICES = (
    Device("H200 SXM", 4800, 132, 1.98, "NVIDIA H200 datasheet; multiprocessors and clock as H100 SXM5"),
    Device("A100 SXM 80GB", 2039, 108, 1.41, "NVIDIA A100 80GB datasheet"),
    Device("RTX 5090", 1792, 170, 2.41, "NVIDIA RTX Blackwell GPU architecture whitepaper"),
    Device("RTX 4090", 1008, 128, 2.52, "NVIDIA Ada GPU architecture whitepaper"),
    Device("RTX 4060 Ti", 288, 34, 2.535, "NVIDIA GeForce RTX 4060 Ti product page"),
    Device("RTX 3090", 936, 82, 1.695, "NVIDIA Ampere GA102 whitepaper"),
    Device("Jetson AGX Orin 64GB", 204.8, 16, 1.3, "NVIDIA Jetson AGX Orin series technical brief"),
    Device("Jetson Orin Nano Super 8GB", 102, 8, 1.02, "NVIDIA Jetson Orin Nano Super developer kit page"),
)
