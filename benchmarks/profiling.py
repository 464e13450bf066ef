"""Kernels of one call by time, as PyTorch's profiler tells them."""

from __future__ import annotations

from torch.profiler import ProfilerActivity, profile


def profiled(title: str, once, device: str, rows: int = 25):
    """What ``once`` returns; its table is printed."""
    cuda = device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
        out = once()
    by = "self_device_time_total" if cuda else "self_cpu_time_total"
    print(f"\n{title}\n{seen.key_averages().table(sort_by=by, row_limit=rows, max_name_column_width=110)}", flush=True)
    return out
