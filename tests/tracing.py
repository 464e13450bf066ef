"""Tiny models, and functions traced once, for the tests of patterns, passes and the backend."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch

from li_compile.backend import last_report, light_interaction
from li_compile.config import Config
from li_compile.patterns.graph import placeholders, value
from li_compile.pipeline import Facts, canonical, match

#: What the tiny world needs: no Inductor, errors instead of warnings, a wide view, tiles of its small frames; and the
#: authors' policy, whose plans for world_inputs() are plain to see.
TINY = {"lowering": "eager", "strict": True, "context.policy": "authors", "context.fov": (90, 70), "sparse.tile": (4, 2, 2),
        "sparse.block_size": 16}


#: Dynamo 2.11 makes other regions of equal blocks than later versions, so that passes find other numbers of places in them.
OLD = torch.__version__.startswith("2.11.")


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative L2 distance."""
    return ((got - want).norm() / want.norm()).item()


def seeded(make, **arguments) -> torch.nn.Module:
    """A model with the same random weights each time, for inference."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(**arguments).eval()


def fired(counts: dict[str, int]) -> dict[str, int]:
    """The passes that did something."""
    return {name: count for name, count in counts.items() if count}


class Traced:
    """A function as Dynamo traces it, in one graph; tracing happens once, whatever is compiled or run afterwards."""

    def __init__(self, fn: Callable, *inputs):
        torch._dynamo.reset()
        modules, calls = [], []

        def capture(module, _):
            modules.append(copy.deepcopy(module))
            return lambda *args: calls.append(args) or module(*args)

        with torch.no_grad():
            torch.compile(fn, backend=capture, fullgraph=True)(*inputs)
        torch._dynamo.reset()
        (self.module,), (self.example,) = modules, calls
        self.fakes = [value(p) for p in placeholders(self.module.graph)]
        self.compiled: dict[str, Compiled] = {}
        # Position of the function's input that an argument of the graph is; None for weights and sizes.
        self.position = [next((i for i, x in enumerate(inputs) if x is arg), None) for arg in self.example]

    def arguments(self, *inputs) -> list:
        """The graph's arguments for these inputs of the function."""
        sizes = {str(s): n for fake, i in zip(self.fakes, self.position) if i is not None
                 for s, n in zip(fake.shape, inputs[i].shape)}
        return [sizes[str(fake)] if isinstance(fake, torch.SymInt) else example if i is None else inputs[i]
                for fake, example, i in zip(self.fakes, self.example, self.position)]

    def __call__(self, *inputs) -> torch.Tensor:
        """Run the graph as traced."""
        with torch.no_grad():
            return self.module(*self.arguments(*inputs))[0]

    def facts(self, **options) -> Facts:
        """What is matched in the canonical graph."""
        config = Config.from_options(options)
        return match(canonical(self.module, self.fakes, config), config)

    def compile(self, **options) -> Compiled:
        """What the backend makes of the graph under the tiny world's options, with these on top (sparse__tile for
        sparse.tile); one callable for the same options, so that a variant is built once in a session."""
        options = TINY | {name.replace("__", "."): given for name, given in options.items()}
        key = repr(sorted(options.items()))
        if key not in self.compiled:
            self.compiled[key] = Compiled(self, options)
        return self.compiled[key]


class Compiled:
    """The backend's callable for a traced graph, run on inputs of the traced function, with a report of its own."""

    def __init__(self, traced: Traced, options: dict):
        self.traced = traced
        last_report(new={"owner": id(self)})  # other options than any Config's, so that the next call starts anew
        with torch.no_grad():
            self.run = light_interaction(copy.deepcopy(traced.module), traced.fakes, options=options)
        self.report = last_report()

    def __call__(self, *inputs) -> torch.Tensor:
        with torch.no_grad():
            return self.run(*self.traced.arguments(*inputs))[0]

    @property
    def graph(self):
        (graph,) = self.report.graphs
        return graph

    @property
    def reasons(self) -> str:
        """All reasons for which something was left alone."""
        records = [r for v in self.graph.variants for r in v.records]
        return "\n".join(m.reason for m in [*self.graph.misses, *(m for r in records for m in r.misses)])


def turn(degrees: float) -> torch.Tensor:
    """World-to-camera matrix of a camera at the origin, turned around the vertical axis."""
    a, pose = math.radians(degrees), torch.eye(4)
    pose[0, 0] = pose[2, 2] = math.cos(a)
    pose[0, 2], pose[2, 0] = -math.sin(a), math.sin(a)
    return pose


def world_inputs(model, history: int, *, revisit: bool = False, batch: int = 1) -> list[torch.Tensor]:
    """Inputs of a ChunkSampler after so many context frames of a steady turn.

    revisit: frames 4 to 7 of the history and the current chunk share one view, so that 20 frames are pruned to 12 and
    steps are reused; without, 20 frames are pruned to 8 and none is.
    """
    c, random = model.config, torch.Generator().manual_seed(history)
    draw = lambda *size: torch.randn(batch, *size, generator=random)
    poses = lambda angles: torch.stack([turn(7.5 * a) for a in angles]).expand(batch, -1, 4, 4).clone()
    action = lambda n: torch.randint(0, c.actions, (batch, n), generator=random)
    intrinsics = torch.tensor([[0.5, 0.0, 0.5], [0.0, 0.6, 0.5], [0.0, 0.0, 1.0]]).expand(batch, 3, 3).clone()
    frame = (c.height, c.width)
    inputs = [draw(c.channels, 4, *frame), draw(c.channels + 1, 4, *frame), action(4),
              poses([0] * 4 if revisit else range(history, history + 4)), intrinsics]
    with torch.no_grad():
        inputs += model.prefix(draw(c.channels, *frame))
    if history:
        angles = [0 if revisit and 4 <= i < 8 else i for i in range(history)]
        inputs += [draw(c.channels, history, *frame), action(history), poses(angles)]
    return inputs


def dynamic(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The same inputs with the number of context frames marked as a dynamic size."""
    for i, dim in ((7, 2), (8, 1), (9, 1)):
        torch._dynamo.mark_dynamic(inputs[i], dim)
    return inputs


def keep(inputs: list[torch.Tensor], indices) -> list[torch.Tensor]:
    """The same inputs with only these context frames."""
    index = torch.as_tensor(list(indices))
    return [*inputs[:7], inputs[7].index_select(2, index), *(x.index_select(1, index) for x in inputs[8:])]
