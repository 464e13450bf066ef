"""``li_compile.load``: an artifact as a callable, with its caches explicit; which variant runs is decided as in the backend."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

import li_compile.kernels  # noqa: F401  (registers the operators that an artifact may call)
from li_compile.calls import Calls, Known
from li_compile.config import Config
from li_compile.errors import ArtifactError
from li_compile.exporting import weights
from li_compile.exporting.manifest import CallEntry, Manifest, VariantEntry, context_from, verify
from li_compile.exporting.program import FRAMES, REUSE
from li_compile.exporting.targets import target_module
from li_compile.loops import LoopVariant

Caches = dict[str, torch.Tensor]


def load(path: str | pathlib.Path, *, device: str | torch.device | None = None) -> Runner:
    """An artifact that ``li_compile.export`` made, ready to run.

    device: None: of the kind that it was exported for.

    Raises:
        ArtifactError: files are missing, cut off or edited; another version of PyTorch or TensorRT, another kind of device or
            another GPU than it was built for. The sentence says what to rebuild.
    """
    folder = pathlib.Path(path)
    if not folder.is_dir():
        raise ArtifactError(f"there is no folder {folder}; export one with li_compile.export(..., path=...)")
    manifest = Manifest.read(folder)
    verify(manifest, folder)
    _check_versions(manifest)
    _check_device(manifest, device)
    return Runner(folder, manifest, torch.device(manifest.device["type"]) if device is None else torch.device(device))


class Runner:
    """Call it as the model that was exported; inside a :class:`~li_compile.Session`, variants are chosen by its plan.

    manifest: all that is known of the artifact. config: the options it was exported under, for ``Session(runner.config)``.

    Caches, what the model writes to, are results here: ``step`` takes and returns them. Called as a function, the runner holds them
    itself, and writes new values into tensors of the caller's that the model would have written into. One thread at a time.
    """

    def __init__(self, folder: pathlib.Path, manifest: Manifest, device: torch.device) -> None:
        self.folder, self.manifest, self.device = folder, manifest, device
        self.config = Config.from_options(manifest.options)
        self.weights = weights.load(folder, manifest.aliases, device)
        self._target = target_module(manifest.target)
        self._opened: dict[str, Callable[..., Any]] = {}
        self._calls = [_Call(self, entry) for entry in manifest.calls]
        self._own = sorted({a.name for e in manifest.calls for v in e.variants for a in v.arguments if a.cache and a.weight})
        self._held = self.caches()
        self._state: Caches = {}

    def caches(self) -> Caches:
        """What the model's own caches hold before the first call, by name: copies."""
        return {name: self.weights[name].clone() for name in self._own}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result, caches = self.step(*args, caches=self._held, **kwargs)
        self._held = {name: caches[name] for name in self._held}
        if (given := caches.keys() - self._held.keys()):
            call, flat = self._call_for(args, kwargs)
            for name in given:
                flat[call.names.index(name)].copy_(caches[name])
        return result

    def step(self, *args: Any, caches: Caches | None = None, **kwargs: Any) -> tuple[Any, Caches]:
        """(result, caches after the call). Changes nothing that it is given.

        caches: by name, as an earlier call returned them. Those that are missing are taken from the arguments, where they are inputs
        of the model, or are as they were exported.

        Raises:
            ArtifactError: inputs of other shapes or dtypes than exported.
        """
        call, flat = self._call_for(args, kwargs)
        caches = caches or {}
        self._state = {name: self.weights[name].clone() for name in self._own if name not in caches} | caches
        flat = [self._state.get(name, x) for name, x in zip(call.names, flat)]
        with torch.no_grad():
            out = call(*flat)
        written = {a.name for v in call.entry.variants for a in v.arguments if a.cache}.union(self._own)
        return pytree.tree_unflatten(list(out), call.tree_out), {n: x for n, x in self._state.items() if n in written}

    def _call_for(self, args: tuple, kwargs: dict) -> tuple[_Call, list[Any]]:
        flat, tree = pytree.tree_flatten((args, kwargs))
        alike = [c for c in self._calls if c.tree_in == tree]
        for call in alike:
            if call.misfit(flat) is None:
                return call, flat
        if alike:
            raise ArtifactError(alike[0].misfit(flat))
        given = "; or ".join(f"({', '.join(c.names)})" for c in self._calls)
        raise ArtifactError(f"called with {len(flat)} inputs in another structure than exported; this artifact takes {given}. Export with "
                            "also=[(args, kwargs)] for another way to call the model")

    def program(self, entry: VariantEntry) -> Callable[..., Any]:
        """The callable of a variant, opened at its first use: flat, in the order of ``entry.arguments``."""
        if entry.name not in self._opened:
            self._opened[entry.name] = self._target.open_variant(self.folder, entry, self.device)
        return self._opened[entry.name]

    def run(self, entry: VariantEntry, given: dict[str, Any]) -> tuple[Any, ...]:
        """Run a variant on its inputs by name; caches are taken from and left in the call's state."""
        for name in entry.caches:
            given[name] = self._state.get(name, given.get(name))
        values = [self.weights.get(a.name) if a.weight and not a.cache else given[a.name] for a in entry.arguments]  # None: not read
        out = self.program(entry)(*values)
        out = tuple(out) if isinstance(out, (tuple, list)) else (out,)
        results = len(entry.outputs) - len(entry.caches)
        self._state |= dict(zip(entry.caches, out[results:]))
        return out[:results]


class _Call(Calls):
    """One way in which the model is called."""

    def __init__(self, runner: Runner, entry: CallEntry) -> None:
        known = dict(entry.known)
        lists = {k: tuple(known[k]) for k in ("names", "controls", "changing")}
        super().__init__(Known(**(known | lists | {"context": context_from(known["context"])})), runner.config)
        self.runner, self.entry = runner, entry
        self.tree_in, self.tree_out = pytree.treespec_loads(entry.tree_in), pytree.treespec_loads(entry.tree_out)
        self.by_plan = {(v.kept, r): v for v in entry.variants for r in ((v.reuse,) if v.reuse is not None else (False, True))}

    def variant(self, kept: int | None, reuse: bool, args: Sequence[Any]) -> LoopVariant:
        entry = self.by_plan.get((kept, reuse)) or self.by_plan.get((kept, False))
        if entry is None:
            lengths = dict.fromkeys("all" if k is None else str(k) for k, _ in self.by_plan)
            raise ArtifactError(f"this artifact has variants for {', '.join(lengths)} context frames, and the plan keeps "
                                f"{'all' if kept is None else kept}: export with inputs that have this much context")
        extra = tuple(tuple(e) if isinstance(e, list) else e for e in entry.extra)
        return LoopVariant(lambda *given: self._run(entry, reuse, given), entry.results, extra, entry.across, entry.reuses)

    def _run(self, entry: VariantEntry, reuse: bool, given: Sequence[Any]) -> tuple[Any, ...]:
        known = {a.name for a in entry.arguments}
        more = iter(given[len(self.names):])
        named = dict(zip(self.names, given))
        for argument in entry.arguments:  # in the order in which Calls appends them: frames, then earlier outputs
            if argument.name == FRAMES or argument.name.startswith("earlier."):
                named[argument.name] = next(more)
        if REUSE in known and REUSE not in named:
            named[REUSE] = torch.tensor(reuse, device=self.runner.device)
        for want in entry.inputs:
            _fits(want, named.get(want.name), entry.name)
        return self.runner.run(entry, named)

    def misfit(self, flat: Sequence[Any]) -> str | None:
        """Why these inputs are not what was exported; None if they may be."""
        context = self.known.context
        free = {n: c.dim for n, c in context.inputs.items()} if context is not None and context.at_source and self.prunes else {}
        for want in self.entry.variants[0].inputs:
            if want.name not in self.names:
                continue
            x = flat[self.names.index(want.name)]
            if (why := _differs(want, x, free.get(want.name))) is not None:
                return why
        return None


def _differs(want, x: Any, free: int | None = None) -> str | None:
    """free: a dimension that may be of any size."""
    if want.dtype is None:
        return None if x == want.shape else f"input {want.name} is {x!r}, and {want.shape!r} was exported, as a constant: export again with this value"
    if not isinstance(x, torch.Tensor):
        return f"input {want.name} is {type(x).__name__}, and a tensor of shape {want.shape} was exported"
    same = len(x.shape) == len(want.shape) and all(a == b for d, (a, b) in enumerate(zip(x.shape, want.shape)) if d != free)
    if not same or str(x.dtype).removeprefix("torch.") != want.dtype:
        shape = [("any" if d == free else s) for d, s in enumerate(want.shape)]
        return (f"input {want.name} is {str(x.dtype).removeprefix('torch.')} {list(x.shape)}, and this artifact takes {want.dtype} {shape}: "
                "export again with inputs of this size, or add them with also=[(args, kwargs)]")
    return None


def _fits(want, x: Any, variant: str) -> None:
    if want.name in (REUSE, FRAMES) or x is None:
        return
    if (why := _differs(want, x)) is not None:
        raise ArtifactError(f"{why} (variant {variant})")


def _check_versions(manifest: Manifest) -> None:
    from li_compile.exporting.manifest import versions

    target = target_module(manifest.target)
    here = versions(*target.PACKAGES)
    for package in target.TIED:
        built = manifest.versions.get(package)
        public = lambda version: version.split("+")[0]  # builds of one version for another CUDA are alike here
        if built is not None and public(here.get(package, built)) != public(built):
            raise ArtifactError(f"this artifact was exported with {package} {built}, and {here[package]} is installed: export it again here, or "
                                f"pip install '{package}=={built.split('+')[0]}'")


def _check_device(manifest: Manifest, device: str | torch.device | None) -> None:
    built, wanted = manifest.device, torch.device(device or manifest.device["type"]).type
    if manifest.target == "tensorrt":
        wanted = "cuda"
        built = built if built["type"] == "cuda" else {"type": "cuda", "name": "any", "capability": None}
    if wanted != built["type"]:
        raise ArtifactError(f"this artifact was exported for {built['type']}, and {wanted} was asked for: export it again with the model and its "
                            f"inputs on {wanted}")
    if wanted != "cuda":
        return
    if not torch.cuda.is_available():
        raise ArtifactError(f"this artifact was exported for a GPU ({built['name']}), and PyTorch finds none here: install a driver, or export it "
                            "again with the model and its inputs on the CPU")
    here = list(torch.cuda.get_device_capability())
    if built["capability"] is not None and here != built["capability"]:
        name = torch.cuda.get_device_name()
        raise ArtifactError(f"this artifact was built for {built['name']} (compute capability {'.'.join(map(str, built['capability']))}), and here is "
                            f"{name} ({'.'.join(map(str, here))}): export it again on this GPU")
