"""Matrix-Game-3.0's interactive pipeline, with each clip run as one compiled function and planned from the camera's poses.

Upstream's ``generate`` is one method: it asks for an action, integrates poses, chooses memory, and calls model and scheduler step by
step. It stays as it is. What it calls is changed: the model runs all steps of a clip when it is called for the first of them, the
scheduler hands the result back at the last, and the choice of memory says which clip it is.
"""

from __future__ import annotations

import inspect
import sys

import torch

from ..preparation import settle
from . import matrix_game_3
from .matrix_game_3_clip import Clip

#: Upstream's world is left-handed. What one camera sees of another's view is the same in its mirror.
MIRROR = torch.diag(torch.tensor([1.0, 1.0, -1.0, 1.0], dtype=torch.float64))


def attach(pipeline, patch, rollout) -> None:
    """Refuses options that do not go with memory slots."""
    config = rollout.config
    if (config.context.enabled or config.cache.enabled) and config.context.policy != "slots":
        rollout.refuse(f"Matrix-Game-3.0 fills memory slots, and context.policy is {config.context.policy!r}; give "
                       'Config(context={"policy": "slots"}, cache={"threshold": 0.45}), the released thresholds, or preset "exact" or "sparse"')
    clips, module = Clips(pipeline.model, rollout), sys.modules[type(pipeline).__module__]
    scheduler, select, generate = module.FlowUniPCMultistepScheduler, module.select_memory_idx_fov, pipeline.generate

    def selected(extrinsics, start, references, *args, **kwargs):
        clips.plan(extrinsics, start, references)
        return select(extrinsics, start, references, *args, **kwargs)

    def generated(*args, **kwargs):
        clips.reset(inspect.signature(generate).bind(*args, **kwargs).arguments.get("use_base_model", False))
        return generate(*args, **kwargs)

    patch(pipeline, "model", clips)
    patch(pipeline, "generate", generated)
    patch(module, "FlowUniPCMultistepScheduler", lambda *args, **kwargs: Steps(scheduler(*args, **kwargs), clips))
    patch(module, "select_memory_idx_fov", selected)


class Clips:
    """Stands in for the model. attributes: the model's.

    Of the base model, which upstream calls twice a step for guidance, and 50 times, the single calls are compiled; no step is left out.
    """

    def __init__(self, model: torch.nn.Module, rollout) -> None:
        self.model, self.rollout = model, rollout
        self.clip = self.call = None
        self.reset(False)

    def __getattr__(self, name):
        return getattr(vars(self)["model"], name)

    def reset(self, singly: bool) -> None:
        """A rollout begins. singly: of the base model."""
        self.singly, self.scheduler, self.window = singly, None, None
        self.rollout.session.reset()

    def plan(self, extrinsics, start: int, references) -> None:
        """Note the camera-to-world poses of all frames so far; the window that comes next begins at frame ``start`` and ends with the
        first of the reference frames."""
        session = self.rollout.session
        poses = torch.as_tensor(extrinsics).double().cpu()[len(session.poses):]
        session.extend(torch.linalg.inv(MIRROR @ poses if len(poses) and torch.linalg.det(poses[0]) < 0 else poses))
        self.window = start, references[0] + 1 - start

    def begin(self, scheduler: Steps) -> None:
        self.scheduler, self.result = scheduler, None

    def __call__(self, *args, **kwargs):
        if self.singly:
            self.call = self.call or self.rollout.compile(self.model)
            return self.call(*args, **kwargs)
        _, given, _ = matrix_game_3.arguments(self.model, args, kwargs)
        if self.result is None:
            self.result = self.run(given)
        return given["x"]  # what the scheduler makes of it is the result's, or nothing

    def run(self, given: dict):
        self.clip = self.clip or self.rollout.compile(Clip(self.model))
        session, levels, times = self.rollout.session, self.scheduler.levels, self.scheduler.times
        latents, first = given["x"], given.get("x_memory") is None
        rest = {name: x for name, x in given.items() if x is not None and name not in ("x", "t", "seq_len", "timestep_memory")}
        config = self.rollout.config  # steps are left out for the sake of what is in memory
        planned = not first and (config.context.enabled or config.cache.enabled)
        settle(matrix_game_3.FAMILY, rest | {"x": latents}, planned)
        with session.chunk(*self.window, steps=len(times)) if planned else session:
            return self.clip(latents, levels, times, rest).clone()  # upstream keeps it, and the compiled clip's memory may be its own (CUDA graphs)


class Steps:
    """Upstream's scheduler of one clip: its times and noise levels; its steps have been done."""

    def __init__(self, scheduler, clips: Clips) -> None:
        self.scheduler, self.clips, self.done = scheduler, clips, 0

    def __getattr__(self, name):
        return getattr(vars(self)["scheduler"], name)

    def set_timesteps(self, *args, **kwargs):
        self.scheduler.set_timesteps(*args, **kwargs)
        self.levels, self.times = (tuple(map(float, x)) for x in (self.scheduler.sigmas, self.scheduler.timesteps))
        self.done = 0
        self.clips.begin(self)

    def step(self, model_output, timestep, sample, *args, **kwargs):
        if self.clips.singly:
            return self.scheduler.step(model_output, timestep, sample, *args, **kwargs)
        self.done += 1
        return (self.clips.result if self.done == len(self.times) else sample,)
