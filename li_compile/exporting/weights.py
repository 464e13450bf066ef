"""The weights of all variants in one safetensors file; what is the same memory is stored once."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Mapping

import torch

FILE = "weights.safetensors"


def save(tensors: Mapping[str, torch.Tensor], folder: pathlib.Path) -> dict[str, str]:
    """Write them and return, for each that is another under a second name, that other's name."""
    from safetensors.torch import save_file

    first, stored, aliases = {}, {}, {}
    for name, tensor in tensors.items():
        memory = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else name
        if memory in first:
            aliases[name] = first[memory]
        else:
            first[memory], stored[name] = name, tensor.detach().contiguous().cpu().clone()
    save_file(stored, folder / FILE)
    (folder / FILE).chmod(0o644)  # it is made for its maker alone
    return aliases


def load(folder: pathlib.Path, aliases: Mapping[str, str], device: torch.device) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    tensors = load_file(folder / FILE, device=str(device))
    return tensors | {name: tensors[other] for name, other in aliases.items()}


def sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
