"""Keeps what threads share usable in processes that are forked from this one.

A forked process has one thread, whatever the parent had: pools have lost their threads, and locks may be held by
threads that are not there. Before a fork, every watched resource is held, so that none is in the middle of a call;
afterwards the parent releases it and the child renews it. Locks made by `lock` are new in the child.

GNU's OpenMP, with which torch computes on several threads, cannot start threads in a forked process and waits for them
for ever. torch's own worker processes compute on one thread for that reason; so does a child that inherits a model.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any, Protocol

import torch


class Resource(Protocol):
    """Anything that no thread may be in the middle of while the process is forked."""

    def hold(self) -> None:
        """Waits until no other thread uses the resource, and keeps other threads out."""
        ...

    def release(self) -> None:
        """Lets other threads in again."""
        ...

    def renew(self) -> None:
        """Makes the held resource usable in the child."""
        ...


_registry = threading.RLock()  # guards the sets, and is held while the process is forked
_resources: weakref.WeakSet[Any] = weakref.WeakSet()
_locks: weakref.WeakSet[Any] = weakref.WeakSet()
_held: list[Resource] = []
_computes = False  # whether this process, or one before it, computes with torch


def watch(resource: Resource) -> None:
    """Holds the resource whenever this process is forked, as long as the resource exists."""
    with _registry:
        _resources.add(resource)


def lock() -> Any:
    """Returns a reentrant lock that is free in every forked process."""
    made = threading.RLock()
    with _registry:
        _locks.add(made)
    return made


def keep_children_on_one_thread() -> None:
    """Lets torch compute on one thread in processes that are forked from now on."""
    global _computes
    _computes = True


def _before() -> None:
    _registry.acquire()
    for resource in list(_resources):
        resource.hold()
        _held.append(resource)


def _in_parent() -> None:
    while _held:
        _held.pop().release()
    _registry.release()


def _in_child() -> None:
    global _registry
    _registry = threading.RLock()
    while _held:
        _held.pop().renew()
    for made in list(_locks):
        made._at_fork_reinit()  # as the standard library renews its own locks
    if _computes:
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
