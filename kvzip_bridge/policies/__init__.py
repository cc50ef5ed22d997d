"""The KV policies by name. Each stands in a file of its own and implements dpllm.kvzip_bridge.interfaces.KVPolicy."""

from __future__ import annotations

from typing import Any

from dpllm.base.errors import InputError
from dpllm.kvzip_bridge.interfaces import KVPolicy
from dpllm.kvzip_bridge.policies.adakv import AdaKV
from dpllm.kvzip_bridge.policies.expected_attention import ExpectedAttention
from dpllm.kvzip_bridge.policies.heads import Heads
from dpllm.kvzip_bridge.policies.keep_all import KeepAll
from dpllm.kvzip_bridge.policies.knorm import Knorm
from dpllm.kvzip_bridge.policies.kvzip import KVzip
from dpllm.kvzip_bridge.policies.kvzip_plus import KVzipPlus
from dpllm.kvzip_bridge.policies.pyramidkv import PyramidKV
from dpllm.kvzip_bridge.policies.random import Random
from dpllm.kvzip_bridge.policies.recent import Recent
from dpllm.kvzip_bridge.policies.snapkv import SnapKV

KV_POLICIES: dict[str, type[KVPolicy]] = {
    "keep-all": KeepAll,
    "random": Random,
    "recent": Recent,
    "knorm": Knorm,
    "snapkv": SnapKV,
    "pyramidkv": PyramidKV,
    "adakv": AdaKV,
    "expected-attention": ExpectedAttention,
    "kvzip": KVzip,
    "kvzip+": KVzipPlus,
    "heads": Heads,
}


def make_kv_policy(name: str, **options: Any) -> KVPolicy:
    """A policy by name; options are its constructor's. Raises InputError for a name that does not exist."""
    if name not in KV_POLICIES:
        raise InputError(f"unknown KV policy '{name}'. Choose one of: {', '.join(KV_POLICIES)}.")
    return KV_POLICIES[name](**options)
