"""What an artifact says of itself, as JSON: versions, the machine, inputs, caches, gates, variants, operators, hashes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import platform
from importlib import metadata
from typing import Any

import torch

from li_compile.errors import ArtifactError
from li_compile.exporting.program import Argument
from li_compile.exporting.weights import sha256
from li_compile.patterns import ContextConcat
from li_compile.patterns.context import ContextInput

FILE = "manifest.json"
FORMAT = 1
TARGETS = ("exported_program", "aot_inductor", "onnx", "tensorrt")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """shape: of constant sizes; dtype: as "float32". A number or None among the inputs has no dtype and its value as shape."""

    name: str
    shape: Any
    dtype: str | None

    @classmethod
    def of(cls, name: str, x: Any) -> Tensor:
        if isinstance(x, torch.Tensor):
            return cls(name, [int(s) for s in x.shape], str(x.dtype).removeprefix("torch."))
        return cls(name, x if isinstance(x, (int, float, bool, str)) or x is None else str(x), None)


@dataclasses.dataclass
class VariantEntry:
    """One variant. kept: context frames, None: all. reuse: None where the input "reuse" decides. arguments: of its program, in
    order; inputs: those that are no weights; results: of the graph; extra: further results by name; caches: new values, last.
    operators: of ours, and what became of each. parts: what the target wrote (its files, and how they hang together)."""

    name: str
    kept: int | None
    reuse: bool | None
    arguments: list[Argument]
    inputs: list[Tensor]
    outputs: list[Tensor]
    results: int
    extra: list[Any]
    across: bool
    reuses: bool
    passes: dict[str, int]
    operators: list[dict[str, Any]]
    parts: dict[str, Any]

    @property
    def caches(self) -> list[str]:
        return [a.name for a in self.arguments if a.cache]


@dataclasses.dataclass
class CallEntry:
    """One way in which the model is called. known: as ``li_compile.calls.Known``. tree_in, tree_out: of arguments and result."""

    known: dict[str, Any]
    tree_in: str
    tree_out: str
    variants: list[VariantEntry]


@dataclasses.dataclass
class Manifest:
    target: str
    gates: str
    options: dict[str, Any]
    device: dict[str, Any]
    versions: dict[str, str]
    calls: list[CallEntry]
    aliases: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    files: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    format: int = FORMAT
    seal: str = ""  # sha256 of all of the above

    def write(self, folder: pathlib.Path) -> None:
        """Note every file's size and hash, and write the manifest beside them."""
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            self.files[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        self.seal = _seal(json.loads(json.dumps(dataclasses.asdict(self))))
        (folder / FILE).write_text(json.dumps(dataclasses.asdict(self), indent=1), encoding="utf-8")

    @classmethod
    def read(cls, folder: pathlib.Path) -> Manifest:
        path = folder / FILE
        if not path.is_file():
            raise ArtifactError(f"{folder} is no exported artifact: there is no {FILE} in it. Export one with li_compile.export(..., path=...)")
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data.get("format") != FORMAT:
                raise ArtifactError(f"{path} has format {data.get('format')!r}, and this version of li_compile reads format {FORMAT}; "
                                    "export the model again")
            if data["seal"] != _seal(data):
                raise ArtifactError(f"{path} was edited; export the model again, or set policies on a Session in place of it")
            calls = [CallEntry(c["known"], c["tree_in"], c["tree_out"], [VariantEntry(
                **(v | {"arguments": [Argument(**a) for a in v["arguments"]], "inputs": [Tensor(**t) for t in v["inputs"]],
                        "outputs": [Tensor(**t) for t in v["outputs"]]})) for v in c["variants"]]) for c in data.pop("calls")]
            return cls(calls=calls, **data)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{path} cannot be read ({type(error).__name__}: {error}): it was edited or cut off; export the model again") from error


def _seal(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data | {"seal": ""}, sort_keys=True).encode()).hexdigest()


def verify(manifest: Manifest, folder: pathlib.Path) -> None:
    """Raises ArtifactError for a file that is missing or is not what was written."""
    for name, noted in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"{folder} lacks the file {name}; copy the whole folder, or export the model again")
        if path.stat().st_size != noted["bytes"]:
            raise ArtifactError(f"{path} has {path.stat().st_size} bytes, and {noted['bytes']} were exported: it was cut off or edited; copy it "
                                "again, or export the model again")
        if sha256(path) != noted["sha256"]:
            raise ArtifactError(f"{path} is not the file that was exported (its sha256 differs): it was edited or damaged; copy it again, or "
                                "export the model again")


def versions(*packages: str) -> dict[str, str]:
    """Of Python, li_compile, torch and these packages, where they are installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("li_compile", *packages):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            pass
    return found


def device_of(tensors: list[torch.Tensor]) -> dict[str, Any]:
    """The device that a graph was traced for; of a GPU, its name and compute capability."""
    kinds = {x.device.type for x in tensors}
    kind = "cuda" if "cuda" in kinds else "cpu"
    if kind == "cuda" and torch.cuda.is_available():
        return {"type": kind, "name": torch.cuda.get_device_name(), "capability": list(torch.cuda.get_device_capability())}
    return {"type": kind, "name": platform.machine(), "capability": None}


def context_data(context: ContextConcat | None) -> dict[str, Any] | None:
    return None if context is None else dataclasses.asdict(context)


def context_from(data: dict[str, Any] | None) -> ContextConcat | None:
    if data is None:
        return None
    held = {k: {n: ContextInput(**c) for n, c in data[k].items()} for k in ("inputs", "sizes")}
    return ContextConcat(**(data | held))
