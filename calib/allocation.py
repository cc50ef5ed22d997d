"""Static bit allocation: one width per group for every token, chosen once."""

from __future__ import annotations

import numpy as np

from dpllm.base.errors import InputError


def knapsack(loss: np.ndarray, size: np.ndarray, budget: float) -> np.ndarray:
    """Chooses one option per group, with the least total loss within a budget.

    Solves an integer program, to one part in a million of the largest loss.

    loss, size: [G, B] of each option. budget: total size allowed.
    Returns int64 [G], the index of each group's option. Raises InputError if nothing fits.
    """
    # Imported here because most runs do not allocate, and the import takes time.
    from scipy.optimize import LinearConstraint, milp
    from scipy.sparse import csr_array

    groups, options = loss.shape
    if size.min(axis=1).sum() > budget * (1 + 1e-12):
        raise InputError(
            f"budget {budget:g} is below the smallest choice, {size.min(axis=1).sum():g}. Raise it."
        )
    scale = max(float(np.abs(loss).max()), np.finfo(float).tiny)
    rows = np.repeat(np.arange(groups), options)
    one_each = csr_array((np.ones(groups * options), (rows, np.arange(groups * options))))
    result = milp(
        (loss / scale).ravel(),
        integrality=np.ones(groups * options),
        bounds=(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint((size / budget).ravel()[None], -np.inf, 1 + 1e-9),
        ],
        options={"mip_rel_gap": 1e-6, "time_limit": 30},
    )
    if result.x is None:
        raise InputError(f"no allocation within {budget:g} was found ({result.message}). Raise the budget.")
    return result.x.reshape(groups, options).argmax(axis=1)


def static_bits(mean_loss: np.ndarray, weights: np.ndarray, seed_bits: int, target_bits: float) -> np.ndarray:
    """Widths int64 [G] of the best static allocation whose effective bits do not exceed the target.

    mean_loss: [G, B], the loss when every token reads this width. weights: [G], matrix elements. Raises InputError
    for a target below the seed.
    """
    widths = seed_bits + np.arange(mean_loss.shape[1])
    size = weights[:, None] * widths[None, :]
    return seed_bits + knapsack(mean_loss, size.astype(float), float(target_bits * weights.sum()))


def memory_allocation(mean_loss: np.ndarray, held: np.ndarray, allowed: float) -> np.ndarray:
    """Maximum widths under a memory budget, as steps above the seed, int64 [G].

    This is DP-LLM's first stage (arXiv:2508.06041), with bytes instead of bits.

    mean_loss: [G, B], the loss when every token reads this width. held: [G, B], bytes resident when planes up to
    this width are usable: planes, scales, and the table of every usable width. allowed: total bytes. Raises
    InputError if even the seed does not fit.
    """
    return knapsack(mean_loss, held.astype(float), allowed)
