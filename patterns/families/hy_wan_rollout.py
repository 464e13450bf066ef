"""HY-WorldPlay's pipeline that is based on Wan 2.2 (5B): its chunks planned, steps reused, old keys and values released in time.

::

    for each chunk of 4 latents, a call of the pipeline with its poses:
        context = upstream's selection                                           the plan's indices, where context is pruned
        K/V of the context, labelled time 14, positions 0 ... n - 1              the last chunk's are gone by then
        for each step: velocity of the chunk at positions n ... n + 3; Euler     some velocities are held

Upstream's call is one method, with text encoder, image, scheduler and decoder in it, and its state in ``ctx`` from chunk to chunk. It
stays as it is. What it calls is changed: the transformer, and the selection of context. With nothing approximate switched on it
gives upstream's result.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import inspect
import sys

import torch

from .hy_rollout import refuse_model, refuse_parallel

MODEL = "wan.models.dits.arwan_w_action_w_mem_relative_rope.WanTransformer3DModel"
PIPELINE = "wan.inference.pipeline_wan_w_mem_relative_rope.WanPipeline"
SELECT, SIZE = "select_mem_frames_wan", "CHUNK_SIZE"
INPUTS = ("few_step", "first_chunk_size", "image_path", "viewmats", "Ks", "action", "use_memory", "context_window_length", "chunk_i")
_RUNNING: contextvars.ContextVar[Chunk | None] = contextvars.ContextVar("hy_wan_chunk", default=None)


def attach(pipeline, patch, rollout) -> None:
    check(pipeline, rollout)
    kind, module = type(pipeline), place()
    call, select = kind.__call__, getattr(module, SELECT)

    @functools.wraps(call)
    def called(self, *args, **kwargs):
        given = inspect.signature(call).bind(self, *args, **kwargs)
        given.apply_defaults()
        with self.transformer.chunk(self, given.arguments) if isinstance(self.transformer, Chunks) else contextlib.nullcontext():
            return call(*given.args, **given.kwargs)

    @functools.wraps(select)
    def selected(*args, **kwargs):
        choose, chunk = functools.partial(select, *args, **kwargs), _RUNNING.get()
        return choose() if chunk is None else chunk.select(choose)

    patch(pipeline, "transformer", Chunks(pipeline.transformer, rollout))
    patch(kind, "__call__", called)  # it is looked up on the class; other pipelines of it run as they are
    patch(module, SELECT, selected)


def check(pipeline, rollout) -> None:
    """Refuse what would be silently wrong."""
    model, config = pipeline.transformer, rollout.config
    if isinstance(model, Chunks):
        rollout.refuse("this pipeline is compiled already; call detach() on what li_compile.compile gave for it first")
    takes = tuple(inspect.signature(type(pipeline).__call__).parameters)
    if takes[-len(INPUTS):] != INPUTS:
        rollout.refuse(f"this is another version of upstream's pipeline than the one known: its call takes ({', '.join(takes)}), and not "
                       f"{', '.join(INPUTS)} last. Compile the model alone, pipe.transformer = li_compile.compile(pipe.transformer), or use "
                       "upstream's revision da2d0c2")
    if missing := [name for name in (SELECT, SIZE) if not hasattr(place(), name)]:
        rollout.refuse(f"the pipeline's module has no {' and no '.join(missing)}: this is not upstream's tree, or another version of it")
    refuse_model(rollout, model, MODEL, "Wan 2.2", "add_discrete_action_parameters(), then load_state_dict()",
                 hasattr(getattr(model, "condition_embedder", None), "action_embedder"), lambda: [b.attn1.to_out_prope[0] for b in model.blocks])
    if config.offload or config.stream:
        rollout.refuse("stream and offload are for the pipeline that is based on HunyuanVideo 1.5: this one decodes each chunk before the "
                       "next is generated, and its transformer has no text streams whose weights could wait. Leave them off")


def place():
    """The module of upstream's pipeline, or None."""
    return sys.modules.get(PIPELINE.rpartition(".")[0])


class Chunks(torch.nn.Module):
    """Stands in for the pipeline's transformer, which it holds, so that it is moved with the pipeline. attributes: the transformer's."""

    def __init__(self, model: torch.nn.Module, rollout) -> None:
        super().__init__()
        self.model, self.rollout, self.compiled = model, rollout, rollout.compile(model)
        self.next: int | None = 0

    def __getattr__(self, name):
        model = super().__getattr__("model")
        return model if name == "model" else getattr(model, name)

    @contextlib.contextmanager
    def chunk(self, pipeline, given: dict):
        """A call of the pipeline with these arguments, some of which are changed: the next chunk of the rollout, or the first of a new one."""
        rollout, session, index = self.rollout, self.rollout.session, given["chunk_i"]
        size, first = getattr(place(), SIZE), given["first_chunk_size"]
        if pipeline.parallel_run and (count := place().get_sp_world_size()) > 1:
            refuse_parallel(rollout, count)
        if index == 0:
            if first != size:
                rollout.refuse(f"first_chunk_size is {first} and a chunk has {size} latents: poses and context of every later chunk would be "
                               f"those of other latents. Give first_chunk_size={size}, as upstream's generate.py does")
            session.reset()
            self.next = 0
        if index != self.next:
            rollout.refuse(f"chunk_i is {index}, and " + ("the last chunk did not finish" if self.next is None else f"chunk {self.next} comes next")
                           + ": chunks are generated in order. Begin a new video with chunk_i=0")
        self.next = None
        session.extend(given["viewmats"][0])
        if rollout.config.context.enabled:
            given["context_window_length"] = 0  # the latents up to which upstream takes all and asks for no selection
        rollout.begin()
        with session, contextlib.ExitStack() as stack:
            before = _RUNNING.set(Chunk(self, pipeline, session.plan(index * size, size), stack))
            stack.callback(_RUNNING.reset, before)
            yield
        self.next = index + 1

    def forward(self, **given):
        chunk = _RUNNING.get()
        if chunk is None or chunk.of is not self:
            return self.compiled(**given)
        return chunk.encode(given) if given.get("is_cache") else (chunk.velocity(given),)


@dataclasses.dataclass
class Chunk:
    """A chunk while the pipeline generates it. stack: what is closed at its end. done: steps that it asked for."""

    of: Chunks
    pipeline: object
    plan: object
    stack: contextlib.ExitStack
    steps: object = None
    done: int = 0

    def select(self, choose) -> list[int]:
        """The latents of context: the plan's; where context is not pruned, those that upstream chooses."""
        if not self.of.rollout.config.context.enabled:
            self.plan = dataclasses.replace(self.plan, indices=tuple(choose()))
        return list(self.plan.indices)

    def encode(self, given: dict) -> list[dict]:
        """Keys and values of the context, a dict a block. The pipeline's old ones, of which nothing is read, go first."""
        for entry in given["kv_cache"]:
            entry |= dict.fromkeys(entry)
        return self.of.compiled(**given) if given["hidden_states"].shape[2] else given["kv_cache"]

    def velocity(self, given: dict) -> torch.Tensor:
        if self.steps is None:
            times = self.pipeline.ctx["timesteps"][:-1].tolist()  # the last is where the last step leads to
            self.steps = self.stack.enter_context(self.of.rollout.steps(self.plan, times, (given["action"],)))
        self.done += 1
        return self.steps.output(self.done - 1, lambda: self.of.compiled(**given)[0])
