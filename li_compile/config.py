"""Every option of the compiler: names, defaults, allowed values, presets. Needs no torch.

The flat, dotted spelling of ``torch.compile(options=...)`` and the dataclasses are two forms of one thing::

    Config.from_options({"preset": "all", "sparse.topk_ratio": 0.25})
    Config(preset="all", sparse={"topk_ratio": 0.25})

Defaults are those of the released Light Interaction code (arXiv 2605.31158) unless a field says otherwise.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, ClassVar

from li_compile._rules import (FLAG, NAME, RATIO, RATIOS, SHARE, ascending, integer, listed, one_of, option, optional, real,
                               several, validate)
from li_compile.errors import ConfigError

__all__ = ["PRESETS", "CacheConfig", "Config", "ContextConfig", "ExactConfig", "SparseConfig"]

#: Preset -> the parts it switches on.
PRESETS: dict[str, frozenset[str]] = {
    "off": frozenset(),
    "exact": frozenset({"exact"}),
    "context": frozenset({"exact", "context"}),
    "sparse": frozenset({"exact", "sparse"}),
    "cache": frozenset({"exact", "cache"}),
    "all": frozenset({"exact", "context", "sparse", "cache"}),
}

#: Context policy -> what those options default to that it has a taste of its own about.
POLICIES: dict[str, dict[str, Any]] = {
    "coverage": {"memory_frames": 8, "temporal_frames": 1, "anchor_frames": 4, "threshold": 0.7, "rule": "sphere", "radius": 8.0, "dynamics_unit": "frame"},
    "chunks": {"memory_frames": 16, "temporal_frames": 4, "anchor_frames": 4, "threshold": 0.7, "rule": "sphere", "radius": 8.0, "dynamics_unit": "chunk"},
    "authors": {"memory_frames": 12, "temporal_frames": 4, "anchor_frames": 4, "threshold": 0.7, "rule": "sphere", "radius": 8.0, "dynamics_unit": "chunk"},
    "slots": {"memory_frames": 5, "temporal_frames": 0, "anchor_frames": 0, "threshold": 0.45, "rule": "grid", "radius": 30.0, "dynamics_unit": "chunk"},
}

#: Unit -> change D (eq. 1) at which half of the temporal window is kept: the median over free-running rollouts of Doom
#: World (benchmarks/context_policies.py calibrate). Latents of another model have another scale.
KAPPA = {"frame": 0.01, "chunk": 0.05}

#: Where nothing is pruned, the window that decides which chunks are candidates is upstream's own: the authors' presets
#: off, sparse and cache leave (M, L) at these, and their cached-step gate depends on them.
UNPRUNED = {"memory_frames": 20, "temporal_frames": 12, "anchor_frames": 4}


class _Section:
    section: ClassVar[str]

    def __post_init__(self) -> None:
        validate(self, self.section + ".")

    def _require(self, ok: bool, key: str, needed: str) -> None:
        if not ok:
            raise ConfigError(f"option '{self.section}.{key}' is {getattr(self, key)!r}; it must be {needed}")


@dataclasses.dataclass(frozen=True)
class ExactConfig(_Section):
    """Rewrites that change no result beyond rounding: on in every preset but ``off``.

    functional_writes: writes into fresh tensors become values, which the others can move.
    real_arithmetic: complex products, as of rotary embeddings, in real arithmetic, which compilers fuse.
    equal_rows: what is computed token by token of a value repeated over tokens is computed once a value.
    invariants: what layers or steps compute alike is computed once.
    dead_tails: a block computes only those of its outputs that are read.
    encode: norm, rotary and camera encodings of queries, keys and values are one operator, where there is a kernel for it.
    dense_attention: attention that stays dense is computed by the Hopper kernel, where that is faster, without concatenating keys and values.
    linear_gelu: GELU in its tanh form is applied by the linear layer before it, in half precision on an NVIDIA GPU.
    tile_order: in a pipeline's rollout, the context's keys and values keep the tile order of block-sparse attention from the call that
        encodes them to the steps that read them, and what such attention alone reads is encoded on its way into that order.
    small_products: small matrices over many vectors, as of cameras, are written out as products and sums, which compilers fuse.
    merge_regions: equal blocks are compiled once.
    invariant_memory: share of the device's memory that values of single layers, the same in all denoising steps, may take from the first
        step to the last; those that save most are kept. 0: each step computes its own.
    shared_steps: the model that a sampling loop calls N times is compiled once and called N times.
    repeated_blocks: equal blocks of a flat graph are compiled once and called N times.
    islands: what becomes of products in fp32 within a model in half precision, which ``explain`` lists: "keep" leaves them
        alone; "bf16" computes them in bf16, "tf32" in TF32 (CUDA only), which is not exact and therefore never a default.
    """

    section: ClassVar[str] = "exact"
    enabled: bool = option(True, FLAG)
    functional_writes: bool = option(True, FLAG)
    real_arithmetic: bool = option(True, FLAG)
    equal_rows: bool = option(True, FLAG)
    invariants: bool = option(True, FLAG)
    invariant_memory: float = option(0.1, RATIO)
    dead_tails: bool = option(True, FLAG)
    encode: bool = option(True, FLAG)
    dense_attention: bool = option(True, FLAG)
    linear_gelu: bool = option(True, FLAG)
    tile_order: bool = option(True, FLAG)
    small_products: bool = option(True, FLAG)
    merge_regions: bool = option(True, FLAG)
    shared_steps: bool = option(True, FLAG)
    repeated_blocks: bool = option(True, FLAG)
    islands: str = option("keep", one_of("keep", "bf16", "tf32"))


@dataclasses.dataclass(frozen=True)
class SparseConfig(_Section):
    """Block-sparse attention over 3D tiles of tokens (released ``ar_sparse_operation``, ``bi_sparse_operation``).

    topk_ratio: share of the history's key blocks that a query block of the current chunk reads; text and the current
        chunk are always read. 0.175 in the paper and the released code.
    prefill_ratio: share of all key blocks read where the context is encoded. 0.30 in the code, not in the paper; on Doom
        World's short, pruned contexts 0.30 loses 0.51 dB of PSNR teacher-forced in preset "all", 0.50 loses 0.37 dB.
    tile: latent frames, rows and columns of tokens in a tile; its volume divides block_size or is a multiple of it.
        The authors use (4, 8, 4) in blocks of 128; smaller blocks choose better at the same density.
    block_size: tokens a block of the attention kernel: 16, 32, 64, 128 or 256.
    sub_blocks: means kept a block for scoring; more find sharper blocks at little cost (docs/numbers.md). The authors keep one.
    min_context: latent frames kept in context from which attention is made sparse.
    skip_layers: leading layers left dense. 1 in the code; not in the paper.
    grid: rows and columns of tokens in one latent frame; None: found in the graph.
    summary: blocks that are left out still take part, through the means of their keys and values.
    head_ratios: one ratio a head in place of topk_ratio, where heads need budgets of their own; None: the same for all.
    """

    section: ClassVar[str] = "sparse"
    enabled: bool = option(True, FLAG)
    topk_ratio: float = option(0.175, SHARE)
    prefill_ratio: float = option(0.40, SHARE)
    tile: tuple[int, int, int] = option((4, 4, 4), several(*[integer(1, 256)] * 3))
    block_size: int = option(64, integer(16, 256))
    sub_blocks: int = option(4, integer(1, 64))
    min_context: int = option(8, integer(0))
    skip_layers: int = option(1, integer(0))
    grid: tuple[int, int] | None = option(None, optional(several(integer(1), integer(1))))
    summary: bool = option(False, FLAG)
    head_ratios: tuple[float, ...] | None = option(None, optional(RATIOS))

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.block_size.bit_count() == 1, "block_size", "a power of two (16, 32, 64, 128 or 256)")
        volume = math.prod(self.tile)
        self._require(
            volume % self.block_size == 0 or self.block_size % volume == 0,
            "tile",
            f"of a volume that divides sparse.block_size = {self.block_size} or is a multiple of it, and has {volume}: "
            "blocks would straddle tiles everywhere",
        )
        self._require(
            self.block_size % self.sub_blocks == 0, "sub_blocks", f"a divisor of sparse.block_size = {self.block_size}"
        )


@dataclasses.dataclass(frozen=True)
class ContextConfig(_Section):
    """Which history latents the model attends to (paper section 3.1; docs/context.md).

    policy: "coverage" (default: single latents that together saw most of the current view), "chunks" (each retrieved
        chunk on its own score), "authors" (the released selection for HY-WorldPlay), "slots" (Matrix-Game-3.0's).
    memory_frames: latents kept in all, at most (M). temporal_frames: the newest, always kept (L). anchor_frames: the
        oldest, always kept; with "coverage" on new ground only. None: what the policy is best at (POLICIES above).
        Where pruning is off, upstream's 20, 12 and 4, which then only bound the candidates of the cached-step gate.
    chunk_frames: latents generated together; M is a multiple of it, and so is every length that a plan comes to, so
        that few variants are compiled.
    threshold: least view overlap for which retrieved memory is kept (tau_pose): of the best chunk ("authors"), of each
        chunk ("chunks"), of each slot ("slots"). None: 0.7, slots 0.45.
    hysteresis: what a score may fall below a threshold before a gate that is open closes; of the memory and of the
        cached-step gate. "authors" and "slots" have none.
    min_gain: what chunk_frames further latents must add to be kept, as a share of the current view; seeing a point for the
        second time counts a quarter of the first, and so on ("coverage").
    rule: what a view is: "sphere", "frustum" or "grid" (kernels/view_overlap.py). None: sphere, slots grid.
    fov: horizontal and vertical angle of view, degrees. intrinsics: fx, fy, cx, cy over the image's width and height,
        in its place (rule "frustum" only). radius: how far a camera sees, in the units of the poses; None: 8, slots 30.
        near: least depth of what it sees.
    window: "fixed", or "dynamics": of temporal_frames only as many as the newest latents' change calls for (eq. 1-3).
        dynamics_unit: what is compared, "chunk" or "frame", and what a window's length is a multiple of. None: frame for
        "coverage", whose lengths do not depend on it, else chunk. alpha: weight of the newest change. kappa: change at
        which half of the window is kept, in squared latent units; None: as calibrated on Doom World (KAPPA below).
    teleport: distance between consecutive cameras, in radii, from which the new place has nothing to do with the newest
        latents: none is then kept for being new, and hysteresis and dynamics start afresh. Not in "authors" and "slots".
    slot_references: current poses, counted from the end, that a memory slot is filled for; the last one's slot holds
        slot_sink, a frame of the history ("slots"). slot_repeats: "keep" slots that hold the same latent, as released, or "drop"
        all but one: the model then reads it once, with the camera rays of that slot alone ("slots").
    """

    section: ClassVar[str] = "context"
    enabled: bool = option(True, FLAG)
    policy: str = option("coverage", one_of(*POLICIES))
    memory_frames: int = option(None, optional(integer(1)))  # type: ignore[assignment]  # None: resolved in __post_init__
    temporal_frames: int = option(None, optional(integer(0)))  # type: ignore[assignment]
    anchor_frames: int = option(None, optional(integer(0)))  # type: ignore[assignment]
    chunk_frames: int = option(4, integer(1, 1024))
    threshold: float = option(None, optional(RATIO))  # type: ignore[assignment]
    hysteresis: float = option(0.05, RATIO)
    min_gain: float = option(0.01, RATIO)
    rule: str = option(None, optional(one_of("sphere", "frustum", "grid")))  # type: ignore[assignment]
    fov: tuple[float, float] = option((60.0, 35.0), several(real(0, 360, above=True), real(0, 180, above=True)))
    intrinsics: tuple[float, float, float, float] | None = option(
        None, optional(several(real(0, above=True), real(0, above=True), real(-4, 4), real(-4, 4))))
    radius: float = option(None, optional(real(0, above=True)))  # type: ignore[assignment]
    near: float = option(0.1, real(0, above=True))
    window: str = option("fixed", one_of("fixed", "dynamics"))
    alpha: float = option(0.5, SHARE)
    kappa: float = option(None, optional(real(0, above=True)))  # type: ignore[assignment]
    dynamics_unit: str = option(None, optional(one_of("chunk", "frame")))  # type: ignore[assignment]
    teleport: float = option(0.5, real(0, above=True))
    slot_references: tuple[int, ...] = option((1, 9, 17, 25, 33), listed(integer(1)))
    slot_sink: int = option(4, integer(0))
    slot_repeats: str = option("keep", one_of("keep", "drop"))

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, default in (POLICIES[self.policy] | ({} if self.enabled else UNPRUNED)).items():
            if getattr(self, key) is None:
                object.__setattr__(self, key, default)
        if self.kappa is None:
            object.__setattr__(self, "kappa", KAPPA[self.dynamics_unit])
        whole = ("memory_frames", "temporal_frames", "anchor_frames") if self.policy in ("authors", "chunks") else ("memory_frames",)
        for key in whole if self.policy != "slots" else ():
            self._require(getattr(self, key) % self.chunk_frames == 0, key, f"a multiple of context.chunk_frames = {self.chunk_frames}")
        least = self.anchor_frames + self.temporal_frames
        needed = f"at least {least}, the sum of context.anchor_frames and context.temporal_frames"
        self._require(self.memory_frames >= least, "memory_frames", needed)
        unit = self.policy == "coverage" or self.dynamics_unit == "chunk" or self.window == "fixed"
        self._require(unit, "dynamics_unit", f"'chunk' with context.policy = {self.policy!r}, or context lengths would be many")
        self._require(self.intrinsics is None or self.rule == "frustum", "intrinsics", "None unless context.rule is 'frustum'")
        self._require(self.rule == "sphere" or self.near < self.radius, "near", f"below context.radius = {self.radius:g}")

    def lengths(self) -> tuple[int, int]:
        """The shortest and the longest context, in latents, of a plan with enough history."""
        if self.policy == "slots":
            return 1, len(self.slot_references)
        least = self.temporal_frames + (0 if self.policy == "coverage" else self.anchor_frames)  # there on new ground only
        return max(1, -(-least // self.chunk_frames)) * self.chunk_frames, self.memory_frames

    def kept_of(self, history: int) -> range:
        """All numbers of latents that a plan may keep of a history of this many, fewest first."""
        unit = 1 if self.policy == "slots" else self.chunk_frames
        return range(unit, min(self.lengths()[1], history) + 1, unit)

    def view(self) -> dict[str, Any]:
        """What a camera sees, as keyword arguments of ``kernels.view_overlap``. Needs torch if intrinsics are given."""
        view: dict[str, Any] = {"rule": self.rule, "fov": self.fov, "radius": self.radius}
        if self.rule != "sphere":
            view["near"] = self.near
        if self.intrinsics is not None:
            import torch

            fx, fy, cx, cy = self.intrinsics
            view["intrinsics"] = torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=torch.float64)
        return view


@dataclasses.dataclass(frozen=True)
class CacheConfig(_Section):
    """Denoising steps that are not computed: earlier outputs of the model stand in (paper eq. 5-8; docs/cached_steps.md).

    threshold: least view overlap of the best candidate chunk for which a chunk's steps are reused (tau_FOV).
    min_steps: least number of denoising steps for which it is done; below 3 there is no step to skip.
    predictor: what stands in. "hold": the last computed output (the authors'); "linear": the line through the last two;
        "previous": the last one, changed as over the same steps of the last chunk that was computed in full, unless an
        action has changed since.
    skip: steps to skip, counted from 0; None: all between the first and the last (the authors': 1, 2 of 4 and 1 of 3),
        which with "hold" is a schedule of two steps. The first and the last step are computed in any case.
    gate: which chunks. "views": those whose cameras are back where they were (threshold); "always": all.
    guard: most relative L1 distance of the last step's computed output from what would have stood in for it; past it,
        ``guard_chunks`` chunks are computed in full. Watched inside a Session; None: not watched.
    """

    section: ClassVar[str] = "cache"
    enabled: bool = option(True, FLAG)
    threshold: float = option(0.7, RATIO)
    min_steps: int = option(3, integer(3, 10_000))
    predictor: str = option("hold", one_of("hold", "linear", "previous"))
    skip: tuple[int, ...] | None = option(None, optional(ascending(1, 10_000)))
    gate: str = option("views", one_of("views", "always"))
    guard: float | None = option(0.2, optional(real(0)))
    guard_chunks: int = option(2, integer(1, 10_000))

    def skipped(self, steps: int) -> tuple[int, ...]:
        """The steps of a schedule of so many that a chunk with reuse does not compute; none below ``min_steps``."""
        between = range(1, steps - 1) if steps >= self.min_steps else ()
        return tuple(i for i in between if self.skip is None or i in self.skip)


_SECTIONS: dict[str, type[_Section]] = {c.section: c for c in (ExactConfig, SparseConfig, ContextConfig, CacheConfig)}


@dataclasses.dataclass(frozen=True)
class Config:
    """All options of one compilation. Immutable, hashable; ``dataclasses.replace`` makes a changed copy.

    preset: off | exact | context | sparse | cache | all. Switches parts on and off; every option can be set on top.
    exact, sparse, context, cache: the part's dataclass, taken as it is, or a mapping laid over what the preset says.
    strict: raise where a rewrite fails or a pattern is ambiguous, instead of warning and leaving the graph alone.
    lowering: "inductor", or "eager" to run the rewritten graph as it is (for tests and debugging).
    inductor: options passed through to Inductor.
    cuda_graphs: Inductor records what it compiles for a GPU as CUDA graphs, those of a chunk for each length of context, at that length's
        second chunk, and replays them from the third on. What a compiled model returns is overwritten once the next chunk begins: in
        ``Session.chunk``, in a pipeline's rollout, or with a call of a whole chunk. Steps that stand in none of these read one another's
        results only after ``torch.compiler.cudagraph_mark_step_begin()`` said where their chunk begins.
    family: name of the model family (``li-compile families``); None: the matchers alone decide.
    offload: of a pipeline, weights that a rollout does not need any more (the text streams') wait in the CPU's memory.
    stream: of a pipeline, each chunk is decoded while the next one is generated.

    Raises:
        ConfigError: an unknown key or preset (with the nearest names), a wrong type, a value out of range.
    """

    preset: str = "all"
    exact: ExactConfig = None  # type: ignore[assignment]  # None or a mapping: resolved in __post_init__
    sparse: SparseConfig = None  # type: ignore[assignment]
    context: ContextConfig = None  # type: ignore[assignment]
    cache: CacheConfig = None  # type: ignore[assignment]
    strict: bool = option(False, FLAG)
    lowering: str = option("inductor", one_of("inductor", "eager"))
    inductor: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    cuda_graphs: bool = option(False, FLAG)
    family: str | None = option(None, optional(NAME))
    offload: bool = option(False, FLAG)
    stream: bool = option(False, FLAG)

    def __post_init__(self) -> None:
        if not isinstance(self.preset, str) or self.preset not in PRESETS:
            hint = _nearest(self.preset, PRESETS)
            raise ConfigError(f"option 'preset' is {self.preset!r}; it must be one of {', '.join(PRESETS)}{hint}")
        validate(self, "")
        if not isinstance(self.inductor, Mapping) or not all(isinstance(key, str) for key in self.inductor):
            raise ConfigError(f"option 'inductor' is {self.inductor!r}; it must be a dict of Inductor's option names")
        if self.cuda_graphs and self.lowering == "eager":
            raise ConfigError("option 'cuda_graphs' needs lowering=\"inductor\", which records them; leave one of the two out")
        object.__setattr__(self, "inductor", dict(self.inductor))  # a later change by the caller must not reach us
        for name in _SECTIONS:
            object.__setattr__(self, name, _resolve(name, getattr(self, name), name in PRESETS[self.preset]))

    @property
    def rewrites(self) -> bool:
        """Whether any part is on; without, compiling is plain Inductor."""
        return any(getattr(self, name).enabled for name in _SECTIONS)

    def may_reuse(self, kept: int | None) -> bool:
        """Whether steps may be reused with this much context (None: all there is). Where views decide, a history shorter than any window
        has nothing to revisit."""
        return kept is None or self.cache.gate == "always" or kept >= self.context.lengths()[0]

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> Config:
        """The Config of ``torch.compile(options=...)``: dotted keys, nested mappings, or both; None: all defaults."""
        if not isinstance(options, Mapping | None):
            raise ConfigError(f"options must be a dict of names and values, found {type(options).__name__}")
        arguments: dict[str, Any] = {}
        for key, value in (options or {}).items():
            section, dot, leaf = key.partition(".") if isinstance(key, str) else ("", "", "")
            given: Mapping[str, Any] = {leaf: value}
            if key in _SECTIONS:
                section, given = key, _as_mapping(key, value)
            elif key not in _keys() or not dot:
                if key not in _TOP:
                    raise _unknown(key)
                arguments[key] = value
                continue
            part = arguments.setdefault(section, {})
            for leaf in given:
                if leaf in part:
                    raise ConfigError(f"option '{section}.{leaf}' is given twice, nested and dotted; keep one")
            part.update(given)
        return cls(**arguments)

    def to_options(self) -> dict[str, Any]:
        """Every option in the flat spelling, defaults too; ``Config.from_options`` gives an equal Config back."""
        options: dict[str, Any] = {name: getattr(self, name) for name in _TOP}
        options["inductor"] = dict(self.inductor)
        for section, cls in _SECTIONS.items():
            part = getattr(self, section)
            options |= {f"{section}.{field.name}": getattr(part, field.name) for field in dataclasses.fields(cls)}
        return options

    def digest(self) -> str:
        """sha256 (hex) of what the options mean: equal for two spellings of the same settings, stable between runs.

        Raises:
            ConfigError: an Inductor option that is neither plain data nor an object with a ``uuid()``.
        """
        options = {key: _canonical(key, value) for key, value in self.to_options().items() if key != "preset"}
        return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()


_TOP = tuple(field.name for field in dataclasses.fields(Config) if field.name not in _SECTIONS)


def _keys() -> list[str]:
    dotted = [f"{name}.{field.name}" for name, cls in _SECTIONS.items() for field in dataclasses.fields(cls)]
    return [*_TOP, *dotted]


def _nearest(key: Any, names: Any) -> str:
    close = difflib.get_close_matches(str(key), list(names), n=2, cutoff=0.6)
    return "; did you mean " + " or ".join(map(repr, close)) + "?" if close else ""


def _unknown(key: Any) -> ConfigError:
    # A bare or misplaced name ("topk_ratio", "cache.topk_ratio") is nearest by its last part.
    leaf = str(key).rpartition(".")[2]
    same = [known for known in _keys() if known.rpartition(".")[2] == leaf]
    hint = "; did you mean " + " or ".join(map(repr, same)) + "?" if same else _nearest(key, [*_keys(), *_SECTIONS])
    rest = "" if hint else f"; known are {', '.join(_keys())}"
    return ConfigError(f"unknown option {key!r}{hint}{rest} (Inductor's own options go in one dict under 'inductor')")


def _as_mapping(section: str, value: Any) -> Mapping[str, Any]:
    if isinstance(value, _SECTIONS[section]):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"option '{section}' is {value!r}; it must be a dict of its options (to switch it, set '{section}.enabled')"
        )
    for key in value:
        if f"{section}.{key}" not in _keys():
            raise _unknown(f"{section}.{key}")
    return value


def _resolve(section: str, given: Any, on: bool) -> _Section:
    cls = _SECTIONS[section]
    if isinstance(given, cls):
        return given
    return cls(**{"enabled": on, **_as_mapping(section, {} if given is None else given)})


def _canonical(key: str, value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_canonical(key, item) for item in value]
    if isinstance(value, Mapping):
        return {str(name): _canonical(f"{key}[{name!r}]", item) for name, item in value.items()}
    uuid = getattr(value, "uuid", None)
    identity = uuid() if callable(uuid) else None
    if identity is None:
        raise ConfigError(
            f"option {key} is {value!r}, which has no stable identity to key a cache by; "
            "give plain data, or a pass object whose uuid() is not None"
        )
    return {"uuid": str(identity)}
