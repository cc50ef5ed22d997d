"""The KV policies by name. Each has a file of its own and implements dpllm.kvzip_bridge.interfaces.KVPolicy."""

from __future__ import annotations

from typing import Any

from dpllm.base.errors import InputError
from dpllm.kvzip_bridge.interfaces import KVPolicy
from dpllm.kvzip_bridge.policies.adakv import AdaKV
from dpllm.kvzip_bridge.policies.expected_attention import ExpectedAttention
from dpllm.kvzip_bridge.policies.keep_all import KeepAll
from dpllm.kvzip_bridge.policies.knorm import Knorm
from dpllm.kvzip_bridge.policies.kvzip import KVzip
from dpllm.kvzip_bridge.policies.kvzip_plus import KVzipPlus
from dpllm.kvzip_bridge.policies.pyramidkv import PyramidKV
from dpllm.kvzip_bridge.policies.random import Random
from dpllm.kvzip_bridge.policies.recent import Recent
from dpllm.kvzip_bridge.policies.snapkv import SnapKV
from dpllm.kvzip_bridge.policies.whole_heads import WholeHeads

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
    "whole-heads": WholeHeads,
}
ALIASES = {"heads": "whole-heads"}


def canonical_name(name: str) -> str:
    """Returns the name in KV_POLICIES that a policy's alias stands for; any other name is returned as it is."""
    return ALIASES.get(name, name)


def make_kv_policy(name: str, **options: Any) -> KVPolicy:
    """Makes a policy by its name or alias.

    options: arguments of its constructor. Raises InputError for a name that does not exist."""
    name = canonical_name(name)
    if name not in KV_POLICIES:
        raise InputError(f"unknown KV policy '{name}'. Choose one of: {', '.join(KV_POLICIES)}.")
    return KV_POLICIES[name](**options)
