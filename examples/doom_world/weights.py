"""Reading and writing Doom World's weights: one safetensors file with the transformer and the codec, in bfloat16."""

from __future__ import annotations

import os
import pathlib

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from li_compile.errors import LightInteractionError

from .codec import Codec
from .model import WorldConfig, WorldModel

FILE = pathlib.Path(__file__).parent / "world.safetensors"


def save_weights(path: pathlib.Path, model: WorldModel, codec: Codec) -> None:
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"codec.{k}": v for k, v in codec.state_dict().items()}
    partial = path.with_suffix(".partial")
    save_file({k: v.detach().cpu().to(torch.bfloat16).contiguous() for k, v in tensors.items()}, partial)
    os.replace(partial, path)


def load_world(path: pathlib.Path = FILE, device: str = "cpu", dtype: torch.dtype = torch.float32,
               regional: bool = True) -> tuple[WorldModel, Codec]:
    """The trained transformer (in dtype) and the codec (always float32), both in eval mode on device.

    Raises LightInteractionError if the file is missing, cut short or of another model.
    """
    model, codec = WorldModel(WorldConfig(), regional), Codec()
    try:
        tensors = load_file(path)
        for module, prefix in ((model, "model."), (codec, "codec.")):
            module.load_state_dict({k.removeprefix(prefix): v.float() for k, v in tensors.items() if k.startswith(prefix)})
    except FileNotFoundError:
        raise LightInteractionError(f"the weights {path} are missing; restore the file from git, or train them again with "
                                    "train.py") from None
    except (SafetensorError, OSError, RuntimeError) as error:
        raise LightInteractionError(f"the weights {path} cannot be used ({str(error).splitlines()[0]}); restore the file "
                                    "from git, or train them again with train.py") from error
    return model.to(device, dtype).eval().requires_grad_(False), codec.to(device).eval().requires_grad_(False)
