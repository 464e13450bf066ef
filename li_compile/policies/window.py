"""The temporal window by latent dynamics: how many of the newest latents are worth keeping.

Paper section 3.1, equations 1 to 3 (the released code has none of it: method notes A.0)::

    D_t    = mean((z_{t-1} - z_{t-2})**2)                    over two finished units, all latent dimensions
    Dbar_t = alpha * D_t + (1 - alpha) * Dbar_{t-1}          Dbar starts with the first D
    L_t    = clip(round(L_m * kappa / (Dbar_t + kappa)), 1, L_m)

As printed, the brackets of the rounding hold the ratio alone, so that L_t could only be 1 or L_m, although the paper
speaks of windows in between; here they hold the product.
"""

from __future__ import annotations

import math

import torch

from li_compile.errors import PoseError

__all__ = ["latent_change", "smoothed", "window_length"]


def latent_change(latents: torch.Tensor, dim: int, unit: int) -> float | None:
    """D_t (eq. 1) of the two newest units of ``unit`` frames each along dimension ``dim``; None if there are fewer.

    Reads the value back to the host: call it between chunks. Half-precision latents are compared in fp32.

    Raises:
        PoseError: the change is not finite.
    """
    frames = latents.shape[dim]
    if frames < 2 * unit:
        return None
    newer, older = (latents.detach().narrow(dim, frames - k * unit, unit) for k in (1, 2))
    change = float((newer.float() - older.float()).square().mean())
    if not math.isfinite(change):
        raise PoseError("the newest finished latents hold values that are not finite; check what made them")
    return change


def smoothed(before: float | None, change: float, alpha: float) -> float:
    """Dbar_t (eq. 2)."""
    return change if before is None else alpha * change + (1 - alpha) * before


def window_length(dynamics: float, kappa: float, longest: int) -> int:
    """L_t (eq. 3) in units: long while little changes, 1 where much does. Halves are rounded up."""
    return min(longest, max(1, math.floor(longest * kappa / (dynamics + kappa) + 0.5)))
