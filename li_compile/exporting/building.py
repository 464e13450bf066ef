"""``li_compile.export``: trace, rewrite, lower and write, in a folder that appears only when all of it is done."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from li_compile.calls import Known
from li_compile.compiling import with_family
from li_compile.config import Config
from li_compile.errors import BackendUnavailable, ExportError
from li_compile.exporting import weights
from li_compile.exporting.advice import advise
from li_compile.exporting.inputs import family_inputs
from li_compile.exporting.lowering import check_choice, lower_operators, lowered
from li_compile.exporting.manifest import CallEntry, Manifest, Tensor, VariantEntry, context_data, device_of, versions
from li_compile.exporting.program import Program, bind_weights, make_program
from li_compile.exporting.report import ExportReport, VariantRow
from li_compile.exporting.targets import target_module
from li_compile.exporting.trace import Traced, trace
from li_compile.exporting.variants import Variant, variants, wanted
from li_compile.patterns.graph import placeholders, value
from li_compile.patterns.preparation import arguments_of, prepare
from li_compile.pipeline import family_of
from li_compile.reuse import why_not

GATES = ("variants", "device")
Progress = Callable[[str, int, int], None]


def export(model: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any] | None = None, *, target: str = "exported_program",
           path: str | pathlib.Path, config: Config | None = None, gates: str = "variants", sparse: str = "auto", strict: bool = False,
           overwrite: bool = False, also: Sequence[tuple[Sequence[Any], dict[str, Any]]] = (), progress: Progress | None = None) -> ExportReport:
    """Write an accelerated model into a folder that ``li_compile.load`` runs. The passes are the backend's, on the same graph.

    Args:
        model: a module or function: a whole chunk (context encoding and denoising loop), a transformer, or one step.
        args, kwargs: inputs as for a real call, with the longest context; sizes are constants of the artifact, but for the number
            of context frames, which has a variant for each length that a plan of ``config`` can come to.
        target: "exported_program" (``torch.export``, needs PyTorch), "aot_inductor" (compiled, needs PyTorch's libraries),
            "onnx" (extra ``[onnx]``), "tensorrt" (extra ``[tensorrt-rtx]`` or ``[tensorrt]``, and an NVIDIA driver).
        path: of the folder to be made. overwrite: replace what is there, once all is built.
        config: as for ``li_compile.compile``; None: all defaults.
        gates: "variants": with every step and with steps reused are two programs, and the runner chooses from the Session's
            plan; "device": one program with an input "reuse" (``torch.cond``, ONNX If, TensorRT IIfConditional), which is read back from
            the device. It has no quality guard (``cache.guard``).
        sparse: what becomes of block-sparse attention. "native": written out in standard operators; "segment": our operator,
            called from the program (in TensorRT, by PyTorch between two engines); "compiled": our portable Triton kernels, compiled
            into an AOTInductor package for CUDA; "plugin": in ONNX, a custom operator of the runtime, of the domain ``li_compile``; in standard
            TensorRT, a plugin that holds our Triton kernel (experimental: no engine with it was ever built or run); "auto": what suits the
            target, and never TensorRT's plugin. What cannot be written out is dense attention in ONNX, and a segment in TensorRT; the report
            says why.
        strict: raise where a graph could only be exported in part, with dense attention in place of sparse, or would need li_compile, or an
            implementation of the domain.
        also: further (args, kwargs) with which the model is called, such as without context for the first chunk.
        progress: called with (what, done, of how many) as variants are built.

    Returns an :class:`ExportReport`. Nothing is written unless all of it could be.

    Raises:
        ExportError: a target, gate or lowering that there is not; a path that exists; what cannot be traced or lowered.
        BackendUnavailable: packages or a driver that the target needs are missing; says which.
    """
    path = pathlib.Path(path)
    if path.exists() and not overwrite:
        raise ExportError(f"{path} exists; choose another path, or pass overwrite=True")
    job = _Job(model, args, kwargs, target, config, gates, sparse, strict, also)
    if (why := job.unavailable()) is not None:
        raise BackendUnavailable(why)
    parent = path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        report = job.run(folder, progress or (lambda *_: None))
        folder.chmod(0o755)  # mkdtemp's are their maker's alone
        _replace(path, folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        if not parent:
            path.parent.rmdir()
        raise
    report.path = str(path)
    return report


def _replace(path: pathlib.Path, new: pathlib.Path) -> None:
    """Put a folder in the place of whatever is there, which comes back if that fails."""
    old = new.with_name(f"{new.name}.old")
    if path.exists():
        path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        if old.exists():
            old.rename(path)
        raise
    if old.exists():
        shutil.rmtree(old) if old.is_dir() else old.unlink()


def export_report(model: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any] | None = None, *, target: str = "exported_program",
                  config: Config | None = None, gates: str = "variants", sparse: str = "auto",
                  also: Sequence[tuple[Sequence[Any], dict[str, Any]]] = ()) -> ExportReport:
    """What :func:`export` would make: variants, rewrites, and what becomes of each of our operators. Builds and writes nothing, and
    needs neither the target's packages nor a GPU; ``unavailable`` says what is missing here. Arguments and errors as there."""
    return _Job(model, args, kwargs, target, config, gates, sparse, False, also).run(None, lambda *_: None)


class _Job:
    def __init__(self, model, args, kwargs, target: str, config: Config | None, gates: str, sparse: str, strict: bool, also) -> None:
        self.target, self.name, self.gates, self.sparse, self.strict = target_module(target), target, gates, sparse, strict
        check_choice(target, sparse)
        if gates not in GATES:
            raise ExportError(f"gates={gates!r} is unknown; choose one of {', '.join(GATES)}")
        if not callable(model) or isinstance(model, type):
            raise ExportError(f"{type(model).__name__} is neither a module nor a function")
        self.model, self.config = model, with_family(Config() if config is None else config, model)
        self.engine_rows: list[dict[str, Any]] = []  # what would become of our operators in TensorRT
        if self.config.exact.enabled and self.config.exact.islands == "tf32":
            raise ExportError("exact.islands='tf32' is a switch around the graphs of a process, and no part of an artifact; export with "
                              "'keep' or 'bf16', and set TF32 where the artifact runs")
        self.calls = [(tuple(args), dict(kwargs or {})), *((tuple(a), dict(k)) for a, k in also)]

    def unavailable(self) -> str | None:
        """Why this cannot be built here."""
        if self.name == "tensorrt" and self.sparse == "plugin":
            from li_compile.exporting.targets.tensorrt_plugin import why_no_plugin

            return why_no_plugin() or self.target.unavailable()
        return self.target.unavailable()

    def run(self, folder: pathlib.Path | None, progress: Progress) -> ExportReport:
        """Build into a folder, or nothing."""
        prepared = prepare(self.model, family_of(self.config))
        try:
            traced = []
            for i, (args, kwargs) in enumerate(self.calls):
                progress("tracing", i, len(self.calls))
                traced.append(trace(self.model, *family_inputs(self.model, args, kwargs, self.config), self.config))
        finally:
            prepared.undo()
        tensors = _rename(traced)
        used = {name: tensors[name] for name in tensors.keys() & _used(traced)}
        todo = sum(len(wanted(t, self.config, self.gates)) for t in traced)
        report = ExportReport(self.name, self.gates, None, [], sum(t.nbytes for t in used.values()),
                              unavailable=self.unavailable())
        aliases = {}
        if folder is not None and not self.target.HOLDS_WEIGHTS:
            aliases = weights.save(used, folder)
        entries = []
        missed: dict[tuple[str, str, str], None] = {}
        for call, one in enumerate(traced):
            entry = self._call(one)
            missed |= dict.fromkeys((m.pattern, m.reason, m.where) for m in one.facts.misses)
            for variant in variants(one, self.config, self.gates):
                progress(variant.name, len(report.variants), todo)
                built = self._variant(one, variant, call, folder, aliases, lambda what: progress(what, len(report.variants), todo))
                entry.variants.append(built[0])
                report.variants.append(built[1])
                missed |= dict.fromkeys((m.pattern, m.reason, m.where) for r in variant.report.records for m in r.misses)
            entries.append(entry)
        if self.gates == "device" and not any(v.reuse is None for v in report.variants):
            why = [m.reason for t in traced for m in t.facts.misses if m.pattern == "denoising loop"]
            why += [m.reason for t in traced if t.facts.loop is not None and (m := why_not(t.facts, self.config)) is not None]
            raise ExportError("gates='device', and there is nothing to gate: " + ("; ".join(dict.fromkeys(why)) or "no denoising loop whose "
                              "steps may be reused under this config"))
        if folder is not None and self.target.HOLDS_WEIGHTS:  # what is left are caches, as they are at the start
            aliases = weights.save({a.name: tensors[a.name] for e in entries for v in e.variants for a in v.arguments if a.weight}, folder)
        device = device_of([f for t in traced for f in t.fakes if isinstance(f, torch.Tensor)])
        report.notes, report.advice = self._notes(report), advise(self.engine_rows, device)
        report.left_alone = [{"pattern": pattern, "reason": reason, "where": where} for pattern, reason, where in missed]
        if folder is not None:
            manifest = Manifest(self.name, self.gates, self.config.to_options(), device, versions(*self.target.PACKAGES), entries, aliases,
                                report.notes)
            progress("writing", todo, todo)
            manifest.write(folder)
            report.size = sum(f["bytes"] for f in manifest.files.values())
        return report

    def _call(self, traced: Traced) -> CallEntry:
        known = Known.of(traced.facts, self.config, frozenset(traced.weights))
        data = dataclasses.asdict(known) | {"context": context_data(known.context)}
        return CallEntry(data, pytree.treespec_dumps(traced.tree_in), pytree.treespec_dumps(traced.tree_out), [])

    def _variant(self, traced: Traced, variant: Variant, call: int, folder: pathlib.Path | None, aliases, note) -> tuple[VariantEntry, VariantRow]:
        start, name = time.perf_counter(), f"call{call}_{variant.name}"
        self.engine_rows += lowered(variant.graph, "tensorrt", self.sparse if self.name == "tensorrt" else "auto")
        operators = lower_operators(variant.graph, self.name, self.sparse, self.strict)
        row = VariantRow(call, variant.name, variant.kept, variant.reuse, variant.report.counts(), operators)
        if folder is None:
            return None, row
        program = make_program(traced, variant)
        if self.target.FIXED:
            program = bind_weights(program, traced.tensors)
        row.parts = self.target.write(program, folder, name, aliases, note)
        if self.strict and (left := row.parts.get("left_to_pytorch")):
            raise ExportError(f"{', '.join(left)} cannot be part of an engine, and strict forbids PyTorch between engines")
        row.caches, row.seconds = program.caches, time.perf_counter() - start
        return _entry(program, variant, name, row), row

    def _notes(self, report: ExportReport) -> list[str]:
        notes, ways = [], {o["lowering"] for v in report.variants for o in v.operators}
        if (family := family_of(self.config)) is not None and arguments_of(self.model, family, False) is not None:
            notes.append(f"Inputs are those that family {family.name} makes of a call's: li_compile.exporting.family_inputs(model, args, kwargs) gives them.")
        if ways & {"operator", "segment"}:
            notes.append("Operators of li_compile are called from this artifact: import li_compile.kernels before running it without li_compile.load.")
        if "dense" in ways:
            notes.append("Attention that the config makes sparse is dense in this artifact; the table says which and why.")
        if "plugin" in ways:
            notes.append("Block-sparse attention is a TensorRT plugin in this artifact. It is experimental: compare its results with another target's.")
        if "domain" in ways:
            notes.append("Nodes of the domain li_compile are left in this graph: a runtime needs an implementation of them.")
        if self.gates == "device" and self.config.cache.guard is not None:
            notes.append("cache.guard is not watched: a condition in the graph has no result that says how far a step drifted.")
        return notes


def _entry(program: Program, variant: Variant, name: str, row: VariantRow) -> VariantEntry:
    exported = program.exported
    nodes = [n for n, s in zip(placeholders(exported.graph), exported.graph_signature.input_specs)
             if s.kind is torch.export.graph_signature.InputKind.USER_INPUT]
    results = exported.graph.output_node().args[0]
    named = [*(f"result{i}" for i in range(variant.loop.results)), *map(str, variant.loop.extra), *(f"cache.{c}" for c in program.caches)]
    return VariantEntry(
        name, variant.kept, variant.reuse, program.arguments,
        [Tensor.of(a.name, value(n)) for a, n in zip(program.arguments, nodes) if not a.weight or a.cache],
        [Tensor.of(n, value(r) if isinstance(r, torch.fx.Node) else r) for n, r in zip(named, results)],
        variant.loop.results, [list(e) if isinstance(e, tuple) else e for e in variant.loop.extra], variant.loop.across, variant.loop.reuses,
        row.passes, row.operators, row.parts)


def _used(traced: list[Traced]) -> set[str]:
    """Names of the weights that anything is computed from."""
    return {t.weights[p.name] for t in traced for p in placeholders(t.facts.module.graph) if p.name in t.weights and p.users}


def _rename(traced: list[Traced]) -> dict[str, torch.Tensor]:
    """All weights by name. A name that stands for something else in another call (a constant of the trace) is set apart."""
    tensors: dict[str, torch.Tensor] = {}
    for i, one in enumerate(traced):
        for placeholder, name in list(one.weights.items()):
            tensor = one.tensors[name]
            if name in tensors and tensors[name].data_ptr() != tensor.data_ptr():
                one.weights[placeholder] = name = f"call{i}.{name}"
                one.tensors[name] = tensor
            tensors[name] = tensor
    return tensors
