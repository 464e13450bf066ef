"""Upstream's Matrix-Game-3.0, imported from a checkout of its code, with random weights and without the packages it needs for more.

::

    git clone https://github.com/SkyworkAI/Matrix-Game        # tested at 71c3cd7
    upstream = load("Matrix-Game/Matrix-Game-3", device="cuda")
    model = upstream.make("real")
    out = model(**upstream.inputs("real", clip=1))

None of its code is here. einops, numpy and scipy must be there; of what only its text encoder, its tokenizer and its video files
need, what is missing is replaced by names that do nothing. On a CPU, its ``autocast("cuda", float32)`` acts on the CPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import pathlib
import sys
import types
import unittest.mock

import torch
import torch.nn.functional as F

from li_compile.patterns.families.matrix_game_3 import with_own

#: What upstream imports and a model with random weights does without.
SPARE = ("cv2", "diffusers", "easydict", "ftfy", "imageio", "pandas", "regex", "torchvision", "tqdm", "transformers", "trimesh")

ACTIONS = dict(enable_keyboard=True, enable_mouse=True, keyboard_dim_in=6, mouse_dim_in=2, mouse_qk_dim_list=[8, 28, 28], patch_size=[1, 2, 2],
               qk_norm=True, qkv_bias=False, rope_dim_list=[8, 28, 28], rope_theta=256, vae_time_compression_ratio=4, windows_size=3)
COMMON = dict(model_type="ti2v", patch_size=(1, 2, 2), in_dim=48, out_dim=48, qk_norm=True, cross_attn_norm=True, eps=1e-6, use_memory=True,
              sigma_theta=0.8)
#: Name -> (rows and columns of latents, arguments of the model). "real" is that of the released 5B weights.
SIZES = {
    "tiny": ((4, 6), COMMON | dict(dim=128, ffn_dim=256, num_heads=2, num_layers=3, freq_dim=64, text_dim=64, text_len=16, action_config=ACTIONS | dict(
        blocks=[0, 1], heads_num=2, hidden_size=32, img_hidden_size=128, keyboard_hidden_dim=128, mouse_hidden_dim=128))),
    "real": ((44, 80), COMMON | dict(dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, action_config=ACTIONS | dict(
        blocks=list(range(15)), heads_num=16, hidden_size=128, img_hidden_size=3072, keyboard_hidden_dim=1024, mouse_hidden_dim=1024))),
}


class Upstream:
    """Its modules by their last name (``model``, ``attention``, ``action_module``, ...), on one device and in one dtype."""

    def __init__(self, device: torch.device, dtype: torch.dtype, modules: dict[str, types.ModuleType]) -> None:
        self.device, self.dtype = device, dtype
        self.modules = modules

    def __getattr__(self, name: str):
        try:
            return self.__dict__["modules"][name]
        except KeyError:
            raise AttributeError(name) from None

    def make(self, size: str = "tiny", layers: int | None = None, seed: int = 0) -> torch.nn.Module:
        """A WanModel with random weights, those included that upstream starts at zero: without, parts of it would do nothing."""
        config = SIZES[size][1] | ({} if layers is None else {"num_layers": layers})
        before = torch.get_default_dtype()
        torch.manual_seed(seed)
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                model = self.model.WanModel(**config)
        finally:
            torch.set_default_dtype(before)
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
        return model.to(self.device, self.dtype).eval().requires_grad_(False)

    def inputs(self, size: str = "tiny", clip: int = 1, time: float = 1000.0, seed: int = 0) -> dict:
        """What upstream's pipeline calls its model with in one step of a clip: 15 latents in clip 0, then 5 of memory, 4 past and 10 new."""
        (rows, columns), config = SIZES[size]
        device, dtype = self.device, self.dtype
        random = torch.Generator(device).manual_seed(seed + clip)
        draw = lambda *shape: torch.randn(*shape, generator=random, device=device, dtype=dtype)
        tokens, frames, known = rows * columns // 4, 14 if clip else 15, 4 if clip else 1
        end = 57 + 40 * clip
        first, last = (end - 57) // 4 + 1 if clip else 0, (end - 1) // 4 + 1
        at = torch.full((frames, tokens), time, device=device, dtype=dtype)
        at[:known] = 0
        memory = 5 if clip else 0
        given = dict(x=draw(1, 48, frames, rows, columns), t=at.flatten()[None], seq_len=20 * tokens, context=[draw(min(77, config.get("text_len", 512)), config.get("text_dim", 4096))],
                     mouse_cond=draw(1, 57 if not clip else 56, 2), keyboard_cond=draw(1, 57 if not clip else 56, 6),
                     plucker_emb=draw(1, 1536, frames + memory, rows, columns), predict_latent_idx=(first, last))
        if clip:
            given |= dict(x_memory=draw(1, 48, 5, rows, columns), timestep_memory=torch.zeros(1, 5 * tokens, device=device, dtype=dtype),
                          mouse_cond_memory=torch.ones(1, 5, 2, device=device, dtype=dtype), keyboard_cond_memory=-torch.ones(1, 5, 6, device=device, dtype=dtype),
                          memory_latent_idx=[max(0, first - 2 - 2 * i) for i in range(4)] + [1])
        return given


    def rollout(self, model: torch.nn.Module, size: str = "tiny") -> tuple[object, list[torch.Tensor]]:
        """Upstream's interactive pipeline around a model, and the list in which the latents of each clip will be found.

        Its text encoder and VAE are stand-ins: random numbers of the right shapes, and black pictures. ``play`` runs it.
        """
        module, latents, config = self.inference_interactive_pipeline, [], SIZES[size][1]
        (rows, columns), random = SIZES[size][0], torch.Generator().manual_seed(1)
        draw = lambda *shape: torch.randn(*shape, generator=random).to(self.device, self.dtype)
        texts = lambda given, device=None: [draw(min(77, config.get("text_len", 512)), config.get("text_dim", 4096)) for _ in given]
        pipeline = object.__new__(module.MatrixGame3Pipeline)
        vars(pipeline).update(device=self.device, rank=0, sp_size=1, fa_version=None, use_async_vae=False, output_dir=".", vae_stride=(4, 16, 16),
                              patch_size=(1, 2, 2), config=types.SimpleNamespace(sample_neg_prompt=""), text_encoder=texts, model=model)

        def decode(given, cache, first_chunk=False, **_):
            latents.append(given)
            return torch.zeros(1, 3, 4 * given.shape[2] - (3 if first_chunk else 0), 2, 2), cache

        pipeline.vae = types.SimpleNamespace(dtype=self.dtype, encode=lambda videos: [draw(48, 1, rows, columns)], stream_decode=decode)
        return pipeline, latents

    def play(self, pipeline, actions: list[tuple[tuple, tuple]], size: str = "tiny", steps: int = 3, seed: int = 0) -> None:
        """Run ``generate`` for one (mouse, keyboard) action a clip; what it would write to files is left out."""
        module, (rows, columns) = self.inference_interactive_pipeline, SIZES[size][0]
        height, width = 16 * rows, 16 * columns
        given = iter(actions)

        def act():
            mouse, keyboard = next(given)
            return {"mouse": torch.tensor(mouse), "keyboard": torch.tensor(keyboard)}

        arguments = types.SimpleNamespace(size=f"{height}*{width}", save_name="clip", num_iterations=len(actions), fa_version=None, compile_vae=False)
        with unittest.mock.patch.object(module, "get_current_action", act), unittest.mock.patch.object(module, "process_video", lambda *a, **k: None), \
                contextlib.suppress(SystemExit):  # it ends in exit()
            pipeline.generate("a prompt", torch.zeros(height, width, 3, dtype=torch.uint8).numpy(), max_area=height * width, shift=5.0,
                              num_inference_steps=steps, seed=seed, args=arguments)


#: Actions of a rollout's clips: a turn to the left and back, a walk forward and back.
def there_and_back(kind: str, clips: int = 8) -> list[tuple[tuple, tuple]]:
    mouse = {"turn": (-0.1, 0.1), "walk": (0.0, 0.0)}[kind]
    keys = {"turn": (None, None), "walk": (0, 1)}[kind]
    return [((0.0, mouse[i >= clips // 2]), tuple(float(k == keys[i >= clips // 2]) for k in range(6))) for i in range(clips)]


@contextlib.contextmanager
def load(path, device="cuda", dtype: torch.dtype = torch.bfloat16, pipeline: bool = False):
    """Upstream's modules from the folder that holds ``wan``, as a context, in which they are of this device and dtype.

    dtype: bfloat16, as released, or float32: every cast to bfloat16 in its code is then one to float32, to compare by.
    pipeline: its rollouts too. Raises FileNotFoundError if the folder holds no such code.
    """
    root, device = pathlib.Path(path).resolve(), torch.device(device)
    if not (root / "wan" / "modules" / "action_module.py").is_file():
        raise FileNotFoundError(f"{root} holds no Matrix-Game-3.0 code (wan/modules/action_module.py)")
    dynamo = torch._dynamo.config
    kept = dynamo.suppress_errors, dynamo.recompile_limit  # importing its VAE sets both
    with contextlib.ExitStack() as stack:
        finder = Spare()
        sys.meta_path.append(finder)
        stack.callback(sys.meta_path.remove, finder)
        stack.callback(forget_spare)
        sys.path.insert(0, str(root))
        stack.callback(sys.path.remove, str(root))
        if device.type == "cpu":
            stack.enter_context(cuda_on_cpu())
        names = ["wan.modules.model", "wan.modules.attention", "wan.modules.action_module", "wan.modules.posemb_layers", "wan.utils.fm_solvers_unipc"]
        names += ["utils.utils", "utils.cam_utils", "pipeline.inference_interactive_pipeline"] if pipeline else []
        modules = {name.rpartition(".")[2]: importlib.import_module(name) for name in names}
        dynamo.suppress_errors, dynamo.recompile_limit = kept
        change = lambda module, **new: [stack.enter_context(unittest.mock.patch.object(module, name, value)) for name, value in new.items()]
        if modules["action_module"].flash_attn_ops is None:  # no flash-attn here: upstream's model would refuse to run
            change(modules["model"], flash_attention=DenseAttention(dtype))
        if dtype != torch.bfloat16:
            for name in ("model", "action_module", "inference_interactive_pipeline")[: 3 if pipeline else 2]:
                change(modules[name], torch=with_own(torch, bfloat16=dtype))
        yield Upstream(device, dtype, modules)


class DenseAttention:
    """What upstream's ``flash_attention`` computes, by PyTorch's: [B, L, heads, head_dim], keys cut to ``k_lens``, in half precision."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, q, k, v, k_lens=None, window_size=(-1, -1), version=None):
        own = q.dtype
        if k_lens is not None:
            k, v = k[:, : int(k_lens[0])], v[:, : int(k_lens[0])]
        with torch.autocast("cuda", enabled=False):
            out = F.scaled_dot_product_attention(*(x.to(self.dtype).transpose(1, 2) for x in (q, k, v)))
        return out.transpose(1, 2).to(own)


class Spare(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds, after everything else, the packages of ``SPARE``: modules in which every name is a class that takes and does anything."""

    def find_spec(self, name, path=None, target=None):
        package, _, inside = name.partition(".")
        ours = package in SPARE and (not inside or isinstance(sys.modules.get(package), Anything))  # an installed one lacks what it lacks
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if ours else None

    def create_module(self, spec):
        return Anything(spec.name)

    def exec_module(self, module):
        module.__path__ = []
        known = {"diffusers.configuration_utils": {"ConfigMixin": Configured, "register_to_config": remember_config},
                 "diffusers.models.modeling_utils": {"ModelMixin": torch.nn.Module},
                 "diffusers.schedulers.scheduling_utils": {"KarrasDiffusionSchedulers": [], "SchedulerMixin": type("SchedulerMixin", (), {})},
                 "diffusers.utils": {"is_scipy_available": lambda: False}, "easydict": {"EasyDict": Attributes},
                 "tqdm": {"tqdm": lambda items, **_: items}}
        vars(module).update(known.get(module.__name__, {}))


def forget_spare() -> None:
    """So that nobody else takes a stand-in for an installed package."""
    for name in [name for name, module in sys.modules.items() if isinstance(module, Anything)]:
        del sys.modules[name]


class Anything(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return unittest.mock.MagicMock(name=f"{self.__name__}.{name}")


class Attributes(dict):
    __getattr__, __setattr__ = dict.__getitem__, dict.__setitem__


class Configured:
    """In the place of diffusers' ``ConfigMixin``."""

    config = property(lambda self: self._config)

    def register_to_config(self, **changes):
        object.__setattr__(self, "_config", types.SimpleNamespace(**{**vars(getattr(self, "_config", types.SimpleNamespace())), **changes}))


def remember_config(init):
    """In the place of diffusers' ``register_to_config``."""

    @functools.wraps(init)
    def remembering(self, *args, **kwargs):
        given = inspect.signature(init).bind(self, *args, **kwargs)
        given.apply_defaults()
        object.__setattr__(self, "_config", types.SimpleNamespace(**{k: v for k, v in given.arguments.items() if k != "self"}))
        init(self, *args, **kwargs)

    return remembering


@contextlib.contextmanager
def cuda_on_cpu():
    """``autocast("cuda", dtype=...)`` and ``torch.cuda.current_device()`` mean the CPU, so that dtypes are those of a GPU."""
    from torch.amp.autocast_mode import autocast

    init = autocast.__init__

    def on_cpu(self, device_type, dtype=None, enabled=True, cache_enabled=None):
        if device_type == "cuda":
            init(self, "cpu", torch.bfloat16, enabled, cache_enabled)
            self.fast_dtype = torch.bfloat16 if dtype is None else dtype
        else:
            init(self, device_type, dtype, enabled, cache_enabled)

    with unittest.mock.patch.object(autocast, "__init__", torch.compiler.disable(on_cpu)), \
            unittest.mock.patch.object(torch.cuda, "current_device", lambda: torch.device("cpu")), \
            unittest.mock.patch.object(torch.cuda, "synchronize", lambda *_: None):
        yield
