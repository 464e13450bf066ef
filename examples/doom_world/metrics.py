"""Picture quality against a reference, a number a frame."""

from __future__ import annotations

import dataclasses

import torch

from li_compile.errors import LightInteractionError

#: Decibels given to identical frames, whose PSNR is infinite, and the most that any frame gets: a mean over frames
#: stays finite, and an error below 1e-10 mean square (far below 8 bits, which end at 48 dB) counts as none.
PSNR_CAP = 100.0


@dataclasses.dataclass(frozen=True)
class FrameScores:
    """``per_frame``: ``[T]`` float32 on the CPU; ``mean``: over frames."""

    per_frame: torch.Tensor
    mean: float


def psnr(pred: torch.Tensor, target: torch.Tensor) -> FrameScores:
    """Peak signal-to-noise ratio in dB, at most ``PSNR_CAP``; the mean is taken over the frames' capped values.

    Args:
        pred, target: ``[T, 3, H, W]``, floating, values in 0 ... 1.

    Raises:
        LightInteractionError: shapes that differ or are of another kind, another dtype, values outside 0 ... 1.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    pred, target = _checked(pred, target)
    each = peak_signal_noise_ratio(pred, target, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return _scores(each.clamp(max=PSNR_CAP))


def ssim(pred: torch.Tensor, target: torch.Tensor) -> FrameScores:
    """Structural similarity (Gaussian window, sigma 1.5), 1 for identical frames.

    Args:
        pred, target: ``[T, 3, H, W]``, floating, values in 0 ... 1; H and W at least 11, the window's size.

    Raises:
        LightInteractionError: as ``psnr``, or frames smaller than the window.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    pred, target = _checked(pred, target)
    if min(pred.shape[2:]) < 11:
        raise LightInteractionError(f"frames are {list(pred.shape[2:])}; the SSIM window needs at least 11 x 11 pixels")
    each = structural_similarity_index_measure(pred, target, data_range=1.0, reduction="none")
    return _scores(each)


def _scores(each: torch.Tensor) -> FrameScores:
    each = each.reshape(-1).float().cpu()
    return FrameScores(each, float(each.mean()))


def _checked(pred: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    for name, frames in (("pred", pred), ("target", target)):
        if frames.ndim != 4 or frames.shape[1] != 3 or not frames.is_floating_point() or frames.numel() == 0:
            raise LightInteractionError(
                f"{name}: found {frames.dtype} {list(frames.shape)}; give floating [T, 3, H, W] with values in 0 ... 1"
            )
        low, high = float(frames.min()), float(frames.max())
        if not (low >= 0 and high <= 1):  # also catches NaN
            raise LightInteractionError(f"{name}: values are {low:g} ... {high:g}; divide by 255 or clamp to 0 ... 1")
    if pred.shape != target.shape:
        raise LightInteractionError(f"pred is {list(pred.shape)}, target {list(target.shape)}; give equal shapes")
    return pred.float(), target.float()
