"""Exact rewrites: each fires as often as it should and not on look-alikes, and changes no number beyond rounding."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from models.worldplay import Size, WorldPlay, inputs
from torch import nn
from tracing import OLD, TINY, Compiled, Traced, fired, relative

import li_compile
from li_compile import _compat
from li_compile.config import Config
from li_compile.dispatch import Dispatcher
from li_compile.passes.cost import cost
from li_compile.passes.dead_tails import dead_tails
from li_compile.passes.equal_rows import equal_rows
from li_compile.passes.functional_writes import functional_writes
from li_compile.passes.invariants import SMALL, invariants
from li_compile.passes.merge_regions import merge_regions
from li_compile.passes.propagate import propagate, tidy
from li_compile.passes.real_arithmetic import real_arithmetic
from li_compile.passes.small_products import small_products
from li_compile.patterns.graph import REGION, all_graphs, name_of, region_calls, subgraphs, value
from li_compile.pipeline import EXACT, canonical, match, prepare, report_of
from li_compile.tf32 import within_tf32

region = torch.compiler.nested_compile_region
NAMES = [run.__name__ for run in EXACT]
DEPTH = 3
WORLDPLAY = [(form, call) for form in ("flat", "regions") for call in ("step", "first step", "context")]
KEEP = {"rope_frames": 8, "rope_start": 0, "keep": True}


def leaves(result) -> list[torch.Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]


class Rewritten:
    """A function's canonical graph before and after passes; records: by pass."""

    def __init__(self, fn, *given, passes=EXACT):
        self.given = given
        self.traced = fn if isinstance(fn, Traced) else Traced(fn, *[x.clone() for x in given])
        self.module = canonical(self.traced.module, self.traced.fakes)
        self.before = cost(self.module)
        self.records = {}
        for run in passes:
            self.records[run.__name__] = run(self.module)
            tidy(self.module)
            propagate(self.module, self.traced.fakes, _compat.fake_mode_of(self.traced.fakes))
        self.after = cost(self.module)

    @property
    def count(self) -> int:
        (record,) = self.records.values()
        return record.count

    @property
    def reasons(self) -> str:
        return "\n".join(m.reason for r in self.records.values() for m in r.misses)

    def error(self) -> float:
        """Distance of the results, and of what the function did to its inputs, from the graph as it was traced."""
        with torch.no_grad():
            sides = []
            for module in (self.traced.module, self.module):
                args = [x.clone() if isinstance(x, torch.Tensor) else x for x in self.traced.arguments(*self.given)]
                sides.append([*leaves(module(*args)), *(a for a in args if isinstance(a, torch.Tensor))])
        pairs = [(got, want) for want, got in zip(*sides) if want.numel() and want.is_floating_point()]
        assert len(sides[0]) == len(sides[1]) and all(torch.isfinite(want).all() for _, want in pairs)
        return max((got - want).norm().item() / (want.norm().item() or 1.0) for got, want in pairs)


@pytest.fixture(scope="module")
def worldplay():
    """worldplay(form, call) -> the model's graph; form: whether blocks are regions."""
    made: dict = {}

    def make(form: str, call: str) -> Traced:
        if (form, call) not in made:
            torch.manual_seed(0)
            model = WorldPlay(Size(depth=DEPTH), regional=form == "regions").eval()
            given = {"step": inputs(model), "first step": inputs(model, 4, 0), "context": inputs(model, 8, 0) | KEEP}[call]
            made[form, call] = Traced(lambda x: model(**(given | {"x": x})), given["x"])
            made[form, call].x = given["x"]
        return made[form, call]

    return make


# What each pass finds in the reduced WorldPlay with three blocks. Writes: 3 matrices a block, 15 numbers and corners in all.
# Rows: a modulation, P, its inverse and the inverse camera's translation a block, and the output's modulation; of the last block
# of a context only what keys need. Invariants are merged nodes and what leaves regions. Small products: cameras over q, k, v and what
# attention gives, a block, and what their matrices are made of.
@pytest.mark.parametrize(("form", "call", "want"), [
    ("flat", "step", {"functional_writes": 15 * DEPTH, "equal_rows": 4 * DEPTH + 1, "small_products": 7 * DEPTH, "invariants": 257}),
    ("flat", "first step", {"functional_writes": 15 * DEPTH, "equal_rows": 4 * DEPTH + 1, "small_products": 7 * DEPTH, "invariants": 259}),
    ("flat", "context", {"functional_writes": 15 * DEPTH, "equal_rows": 4 * DEPTH - 1, "small_products": 7 * DEPTH - 3, "invariants": 229}),
    ("regions", "step", {"functional_writes": 15, "equal_rows": 4 * DEPTH + 1, "small_products": 7, "invariants": 47}),
    ("regions", "first step", {"functional_writes": 15, "equal_rows": 4 * DEPTH + 1, "small_products": 7, "invariants": 49}),
    ("regions", "context", {"functional_writes": 15, "equal_rows": 4 * DEPTH, "small_products": 7, "invariants": 46, "dead_tails": 1})])
def test_worldplay(worldplay, form, call, want):
    traced = worldplay(form, call)
    done = Rewritten(traced, traced.x)
    assert fired({n: r.count for n, r in done.records.items()}) == want
    assert done.error() <= 1e-6
    assert done.after[0] < 0.8 * done.before[0] and done.after[1] < done.before[1]
    again = Rewritten(traced, traced.x, passes=EXACT + EXACT)
    assert not any(r.count for r in again.records.values()), "idempotent"


@pytest.mark.parametrize("run", EXACT, ids=NAMES)
@pytest.mark.parametrize("form", ["flat", "regions"])
def test_each_pass_alone_changes_no_number(worldplay, form, run):
    for call in ("step", "context"):
        traced = worldplay(form, call)
        assert Rewritten(traced, traced.x, passes=(run,)).error() <= 1e-6


def test_the_matrices_of_a_model_are_made_once(worldplay):
    """For four frames and not for 48 tokens in each of three blocks; nothing is left of the writes."""
    traced = worldplay("flat", "step")
    done = Rewritten(traced, traced.x, passes=tuple(run for run in EXACT if run is not small_products))
    names = [name_of(n) for n in done.module.graph.nodes]
    assert names.count("setitem") == 0
    made = [n for n in done.module.graph.nodes if name_of(n) == "einsum" and n.args[0] == "...ij,...jk->...ik"]
    assert [tuple(n.meta["example_value"].shape) for n in made] == [(1, 4, 4, 4)] * 2


def test_switches_and_report(worldplay):
    traced = worldplay("regions", "context")
    for name in NAMES:
        compiled = Compiled(traced, TINY | {"preset": "exact", f"exact.{name}": False})
        (variant,) = compiled.graph.variants
        assert [n for n in NAMES if n != name] == [n for n in variant.counts() if n in NAMES]
    compiled = Compiled(traced, TINY | {"preset": "exact"})
    (variant,) = compiled.graph.variants
    saved = {r.name: (r.flops, r.bytes) for r in variant.records}
    assert all(n in saved for n in NAMES)
    assert compiled.graph.flops - variant.flops == sum(f for f, _ in saved.values())
    assert saved["equal_rows"][0] > 0 and saved["dead_tails"][0] > 0 and saved["functional_writes"] == (0, 0)
    rows = [line for line in str(compiled.report).splitlines() if "equal_rows" in line]
    assert f"{saved['equal_rows'][0] / 1e9:.2f}" in rows[0]
    for preset in li_compile.config.PRESETS:
        exact = li_compile.Config(preset=preset).exact
        assert exact.enabled == (preset != "off") and all(getattr(exact, n) for n in NAMES)


def test_explain_shows_them():
    torch.manual_seed(0)
    model = WorldPlay(Size(depth=2)).eval()
    report = li_compile.explain(model, **inputs(model, 4, 12), config=li_compile.Config(preset="exact"))
    assert report.counts()["equal_rows"] == 9 and report.counts()["functional_writes"] == 30
    assert "4 rows for 48" in str(report)


# What does nothing (normalize).


def idle(how, x):
    if how == "nothing at all":
        (part,) = x.split([8], dim=-1)
        x, *_ = torch.cat([part.repeat_interleave(1, dim=1)], dim=0).chunk(1)
        x = x.float().to(x.dtype).type_as(x).expand(3, 8).expand(-1, -1).view(3, 8).reshape(3, -1).contiguous().repeat(1, 1)
    elif how == "something":
        a, b = x.split([4, 4], dim=-1)
        x = torch.cat([a, b], 1).repeat_interleave(1)[None].expand(3, 24).double().t().contiguous().repeat(2, 1)
    elif how == "a copy that is written":
        copied = torch.cat([x])
        copied.add_(1)
        x = x * copied
    elif how == "a copy of what is written":
        x = x.clone()
        copied = x.repeat(1, 1)
        x.add_(1)
        x = x * copied
    elif how == "a copy on purpose":
        x = x.to(torch.float32, copy=True)
    return x.sin() if how != "given out" else torch.cat([x])


@pytest.mark.parametrize(("how", "left"), [("nothing at all", 1), ("something", None), ("a copy that is written", 4), ("a copy of what is written", 5),
                                           ("a copy on purpose", 2), ("given out", 1)])
def test_no_ops_vanish(how, left):
    done = Rewritten(lambda x: idle(how, x), torch.randn(3, 8), passes=())
    calls = lambda module: sum(n.op.startswith("call") for n in module.graph.nodes)
    assert calls(done.module) == (left or calls(done.traced.module)) and done.error() == 0


# Writes.


def write(how, x, y):
    z = torch.zeros(4, 3, 3)
    if how == "given":
        z = x
    view = z[0] if how in ("an old view", "a view of a view") else None
    view = view[:1] if how == "a view of a view" else view
    if how == "in place too":
        z.add_(1)
    if how == "computed":
        z[y[:, 0].argmax()] = 2.0
    elif how == "more dimensions":
        z[0] = x[None, 0]
    else:
        z[..., :2, 1] = y[:, :2]
        z[1:3, 0, 2] = 7.0
    return z * 2, 0 if view is None else view * 3


@pytest.mark.parametrize(("how", "count", "reason"), [
    ("plain", 2, ""), ("given", 0, "what the graph was given"), ("an old view", 0, "view that was taken before"),
    ("a view of a view", 0, "view that was taken before"), ("in place too", 0, "other ways"),
    pytest.param("computed", 0, "computed places", marks=pytest.mark.skipif(OLD, reason="Dynamo 2.11 traces no such write")),
    ("more dimensions", 0, "more dimensions")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_writes(how, count, reason, dtype):
    """What is written may be of another dtype than the place."""
    done = Rewritten(lambda x, y: write(how, x, y), torch.randn(4, 3, 3), torch.randn(4, 3, dtype=dtype), passes=(functional_writes,))
    assert done.count == count and reason in done.reasons and done.error() == 0


def timed(how, x):
    """A layer of the time of each of 14 frames of 6 tokens; memory of 5 frames in front of them."""
    frames = torch.cat([x.new_zeros(4), x.new_full((10,), 9.0)])
    t = frames[None].repeat_interleave(6, dim=1)
    if how in ("joined", "joined unlike"):
        t = torch.cat([x.new_zeros(1, 5 if how == "joined" else 6).repeat_interleave(6 if how == "joined" else 5, dim=1), t], 1)
    if how == "outer":  # a sinusoid of all tokens of a batch, as Wan's
        waves = torch.outer(t.flatten().double(), 10.0 ** -torch.arange(4))
        return F.silu(F.linear(torch.cat([waves.cos(), waves.sin()], 1).unflatten(0, (1, -1)).float(), x))
    y = F.linear(t[..., None] * x.new_ones(8), x)
    if how != "squeezed":
        return F.silu(y)
    shift, scale = y.unflatten(2, (2, 8)).chunk(2, dim=2)
    return x.new_ones(1, 84, 8) * (1 + scale.squeeze(2)) + shift.squeeze(2)


@pytest.mark.parametrize(("how", "rows"), [("plain", "14 rows for 84"), ("joined", "19 rows for 114"), ("outer", "14 rows for 84"),
                                           ("squeezed", "14 rows for 84"), ("joined unlike", None)])
def test_time_is_computed_once_a_frame(how, rows):
    done = Rewritten(lambda x: timed(how, x), torch.randn(16, 8), passes=(equal_rows,))
    details = done.records["equal_rows"].details
    assert done.error() <= 1e-6 and (all(rows in d for d in details) and details if rows else not details)


def put_back(how, x):
    """Rows 1 and 2 of a product, changed and put back in place, as some write their rotary embeddings."""
    made = x * 2
    z = made.view(2, 2, 9).transpose(0, 1)
    if how == "given":
        z = x.view(2, 2, 9)
    z[:, 1:, :4] = z[:, 1:, :4] + 1
    return (z * 3, made) if how == "read elsewhere" else z * 3


@pytest.mark.parametrize(("how", "count"), [("alone", 1), ("given", 0), ("read elsewhere", 0)])
def test_writes_into_a_product_that_nothing_else_reads(how, count):
    done = Rewritten(lambda x: put_back(how, x), torch.randn(4, 9), passes=(functional_writes,))
    assert done.count == count and done.error() == 0
    assert count or "more than this reads" in done.reasons


# Complex numbers.


def rotary(how, x, angle):
    """x [B, L, H, 2 D] turned by angles [L, D]."""
    table = torch.polar(torch.ones_like(angle), angle)
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    if how == "axes":  # a table put together of parts, one axis each, as Wan's
        a, b = table.split([1, 2], dim=1)
        table = torch.cat([a[:, None].expand(-1, 2, -1), b.unsqueeze(1).expand(-1, 2, -1)], dim=-1).to(torch.complex64)
    elif how == "given":
        table = torch.view_as_complex(torch.stack([angle, 1 - angle], -1)) + 0  # not followed any further
    table = table.view(1, angle.shape[0], -1, angle.shape[1])
    turned = pairs * (table.conj() if how == "conjugate" else table)
    if how == "scaled":
        turned = turned * angle[0, 0]
    if how == "written":
        turned[0] = 0
    if how == "no product":
        turned = pairs + 1
    return torch.view_as_real(turned).flatten(3) * 2


@pytest.mark.parametrize(("how", "count"), [("plain", 1), ("axes", 1), ("given", 1), ("scaled", 2), ("conjugate", 1), ("written", 0), ("no product", 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_complex_rotary_embeddings(how, count, dtype):
    if how == "axes" and dtype == torch.float64:
        pytest.skip("that table is in single precision")
    done = Rewritten(lambda x, angle: rotary(how, x, angle), torch.randn(2, 5, 2, 6, dtype=dtype), torch.rand(5, 3, dtype=dtype),
                     passes=(real_arithmetic,))
    assert done.count == count and done.error() <= (1e-6 if dtype == torch.float32 else 1e-14)
    complex_ = [n for n in done.module.graph.nodes if isinstance(v := n.meta.get("example_value"), torch.Tensor) and v.is_complex()]
    assert bool(complex_) == (how in ("given", "conjugate", "written", "no product"))


# Rows. More in test_passes.py.


class Modulated(nn.Module):
    def __init__(self):
        super().__init__()
        self.time, self.out = nn.Linear(6, 8), nn.Linear(8, 8)

    def forward(self, x, t, how):
        if how == "runs":  # a context at one time, new tokens at another
            rows = torch.cat([(t[:1] * 0).expand(5, -1), t[:1].expand(7, -1)])
        elif how == "three values":
            rows = torch.cat([t[i:i + 1].expand(4, -1) for i in range(3)])
        elif how == "every token":
            rows = torch.cat([t, t[:1].expand(9, -1)])
        else:
            rows = t.repeat_interleave(4, dim=0)
        if how == "written in place":
            rows[0] += 1
        h = F.silu(self.time(rows))
        if how == "result written in place":
            h.mul_(x)
        return x * (1 + self.out(h)) + (rows.sum() if how == "written in place" else 0)


@pytest.mark.parametrize(("how", "count"), [("repeated", 2), ("runs", 2), ("three values", 2), ("every token", 0), ("written in place", 0),
                                            ("result written in place", 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows(how, count, dtype):
    torch.manual_seed(0)
    model, x, t = Modulated().to(dtype), torch.randn(12, 8, dtype=dtype), torch.randn(3, 6, dtype=dtype)
    done = Rewritten(lambda x, t: model(x, t, how), x, t, passes=(equal_rows,))
    assert done.count == count
    assert done.error() <= (1e-6 if dtype == torch.float32 else 1e-14)
    rows = {"runs": 2}.get(how, 3)
    assert all(f"{rows} rows for 12" in d for d in done.records["equal_rows"].details)


def test_rows_of_a_dynamic_number(worldplay):
    model = WorldPlay(Size(depth=2)).eval()
    given = {n: inputs(model, n, 0) for n in (4, 8)}
    dims = {"x": 2, "timestep": 0, "action": 1, "viewmats": 1, "ks": 1}
    fn = lambda *args: model(**dict(zip(dims, args)), kv_cache=given[4]["kv_cache"], rope_frames=8)
    args = {n: [g[k] for k in dims] for n, g in given.items()}
    for x, dim in zip(args[4], dims.values()):
        torch._dynamo.mark_dynamic(x, dim)
    traced = Traced(fn, *args[4])
    module = canonical(traced.module, traced.fakes)
    assert functional_writes(module).count == 15 * 2
    assert equal_rows(module).count == 4 * 2 + 1, "modulations and camera matrices, as of a known number"
    tidy(module)
    propagate(module, traced.fakes, _compat.fake_mode_of(traced.fakes))
    for n, given_ in args.items():
        with torch.no_grad():
            assert relative(module(*traced.arguments(*given_))[0], fn(*given_)) <= 1e-6


# Invariants.


class Layers(nn.Module):
    """Layers that compute something of what they all read."""

    def __init__(self, how: str, depth=4, regional=True):
        super().__init__()
        self.weights, self.how = nn.ParameterList(torch.randn(8, 8) for _ in range(depth)), how
        self.run = region(lambda *args: self.layer(*args)) if regional else self.layer

    def layer(self, x, w, camera):
        if self.how == "random":
            camera = camera + torch.rand_like(camera)
        if self.how == "of its own":
            camera = camera + x
        if self.how == "island":
            with torch.autocast("cpu", torch.bfloat16):
                return x + (x @ w) * (camera @ camera)
        if self.how == "view":
            return x + (x @ w) * camera.transpose(0, 1)
        if self.how == "large":
            return x + (x @ w) * camera.exp()
        if self.how == "large product":
            return x + (x @ w) * (camera @ camera).mean()
        return x + (x @ w) * (camera @ camera).sigmoid()

    def forward(self, x, camera):
        camera = camera.clone()
        for i, w in enumerate(self.weights):
            if self.how == "written" and i:
                camera.mul_(0.5)
            if self.how == "modes" and i >= 2:
                with torch.autocast("cpu", torch.bfloat16):
                    x = self.run(x, w, camera)
            else:
                x = self.run(x, w, camera)
        return x


@pytest.mark.parametrize(("how", "left", "inside"), [
    ("same", 1, 0), ("random", 4, 1), ("of its own", 4, 1), ("written", 4, 1), ("view", 0, 0), ("island", 4, 1), ("modes", 2, 0)])
@pytest.mark.parametrize("regional", [True, False])
def test_what_layers_have_in_common(how, left, inside, regional):
    """left: products of cameras that are computed in all; inside: still in the layers' region."""
    torch.manual_seed(0)
    camera, model = torch.randn(8, 8) / 3, Layers(how, regional=regional)
    done = Rewritten(model, torch.randn(8, 8), camera, passes=(invariants,))
    squares = lambda graph: sum(name_of(n) == "matmul" and n.args[0] is n.args[1] for n in graph.nodes)
    (inner,) = [squares(s.graph) for s in subgraphs(done.module).values()] if regional else [0]
    calls = 4 if inner else 0
    flat_island = how == "island" and not regional  # four islands alike, and all read the same
    assert squares(done.module.graph) + inner * calls == (1 if flat_island else left)
    if regional:
        assert inner == inside
        assert all(len(c.args) == 2 + len([n for n in s.graph.nodes if n.op == "placeholder"])
                   for name, s in subgraphs(done.module).items() for c in region_calls(done.module, name))
    if how != "random":
        assert done.error() <= 1e-6


@pytest.mark.parametrize(("how", "size", "moved"), [("large", 128, True), ("large", 1024, False), ("large product", 1024, True)])
def test_what_is_stored_is_small_or_worth_it(how, size, moved):
    """A large value that is cheap to compute is computed again; a scalar that costs a product is not."""
    assert 4 * 128**2 <= SMALL < 4 * 1024**2
    model = Layers(how)
    model.weights = nn.ParameterList(torch.randn(size, size) for _ in range(2))
    done = Rewritten(model, torch.randn(size, size), torch.randn(size, size) / size, passes=(invariants,))
    assert any("out of its region" in d and "MB kept" in d for d in done.records["invariants"].details) == moved
    assert done.error() <= 1e-6


def test_equal_nodes_and_nodes_that_only_look_alike():
    def fn(x, y):
        a, b = x + 1, x + 1  # equal
        c, d = torch.rand_like(x), torch.rand_like(x)
        z = x.clone()
        e = z.sum()
        z.add_(y)
        f = z.sum()  # after a write
        with torch.autocast("cpu", torch.bfloat16):
            g = x @ y
        h = x @ y
        return a * b + e * f, c, d, g, h, x.sum(0), x.sum(1), x * 1, x * 1.0, x * True

    done = Rewritten(fn, torch.randn(4, 4), torch.randn(4, 4), passes=(invariants,))
    assert done.count == 1 and done.records["invariants"].details == ["1 equal nodes merged"]
    count = lambda name: sum(name_of(n) == name for n in done.module.graph.nodes)
    assert (count("rand_like"), count("sum"), count("matmul"), count("mul")) == (2, 4, 2, 5)


# Tails.


class Keeping(nn.Module):
    """Blocks that give their keys beside their result, as in a context encoding."""

    def __init__(self, product=True, write=False):
        super().__init__()
        self.keys, self.mlps = (nn.ModuleList(nn.Linear(8, 8) for _ in range(3)) for _ in range(2))
        self.product, self.write = product, write
        self.run = region(lambda *args: self.block(*args))

    def block(self, key, mlp, x, log):
        k = key(x)
        if self.write:
            log.copy_(mlp(x))
        return x + (mlp(x) if self.product else k), k

    def forward(self, x, log, last):
        kept = []
        for key, mlp in zip(self.keys, self.mlps):
            x, k = self.run(key, mlp, x, log)
            kept.append(k)
        return (*kept, x) if last else tuple(kept)


@pytest.mark.parametrize(("last", "product", "count"), [(False, True, 1), (True, True, 0), (False, False, 0)])
def test_tails(last, product, count):
    """One call of three computes its keys only, unless its result is read, or costs nothing."""
    model = Keeping(product)
    done = Rewritten(lambda x, log: model(x, log, last), torch.randn(2, 8), torch.zeros(2, 8), passes=(dead_tails,))
    assert done.count == count and done.error() == 0
    assert done.before[0] - done.after[0] == count * 2 * 2 * 8 * 8
    assert len(subgraphs(done.module)) == 1 + count


# Equal regions.


def split(module):
    """A graph whose calls have a region each, as Dynamo 2.11 leaves it."""
    for i, call in enumerate([n for n in module.graph.nodes if n.target is REGION]):
        module.add_submodule(f"own_{i}", copy.deepcopy(getattr(module, call.args[0].target)))
        with module.graph.inserting_before(call):
            own = module.graph.get_attr(f"own_{i}")
        call.args = (own, f"own_{i}", *call.args[2:])
    tidy(module)
    return module


class Numbered(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.layers, self.how = nn.ModuleList(nn.Linear(8, 8) for _ in range(4)), how
        self.run = region(lambda *args: self.block(*args))

    def block(self, index, layer, x):
        x = layer(x)
        return x * (1 + index % 2) if self.how == "number read" else x.relu() if self.how == "other half" and index > 1 else x.tanh()

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            x = self.run(i, layer, x)
        return x


@pytest.mark.parametrize(("how", "different"), [("alike", 1), ("number read", 2), ("other half", 2)])
def test_equal_regions(how, different):
    """A block's number is passed along in all cases; only where it is read are the blocks different."""
    traced, x = Traced(Numbered(how), torch.randn(2, 8)), torch.randn(2, 8)
    module = split(canonical(traced.module, traced.fakes))
    assert len(subgraphs(module)) == 4
    assert merge_regions(module).count == 4 - different
    tidy(module)
    assert len(subgraphs(module)) == different and merge_regions(module).count == 0
    with torch.no_grad():
        assert relative(module(*traced.arguments(x))[0], traced(x)) == 0


# Precision islands: found always, lowered only where asked for.


class Island(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            x = self.a(x)
            with torch.autocast("cpu", enabled=False):
                x = self.b(x.float())
            return self.c(x) + (x @ x.t()).mean()


def test_islands_are_reported_and_kept_unless_named():
    torch.manual_seed(0)
    model, x = Island(), torch.randn(4, 16)
    traced = Traced(model, x)
    with pytest.warns(UserWarning, match="found nothing"):
        kept = Compiled(traced, {"preset": "exact", "lowering": "eager"})
        lowered = Compiled(traced, {"preset": "exact", "lowering": "eager", "exact.islands": "bf16"})
    for compiled in (kept, lowered):
        assert "1 products in fp32" in compiled.graph.found["precision islands"] and "test_exact.py" in compiled.graph.found["precision islands"]
    assert "islands" not in kept.report.counts() and lowered.report.counts()["islands"] == 1
    with torch.no_grad():
        want = model(x).float()
        assert relative(kept(x).float(), want) == 0 and 0 < relative(lowered(x).float(), want) < 2e-2
    assert "precision islands" not in Compiled(Traced(model.b, x), {"preset": "off", "lowering": "eager"}).graph.found
    with pytest.warns(UserWarning, match="found nothing"):
        whole = Compiled(Traced(model.b, x), {"preset": "exact", "lowering": "eager", "exact.islands": "bf16"})
    assert "precision islands" not in whole.graph.found and whole.report.counts()["islands"] == 0, "a model in fp32 is no island"


class Widened(nn.Module):
    """A product in bf16 that an autocast to fp32 widens, as CUDA's does; within a region or not."""

    def __init__(self, regional: bool):
        super().__init__()
        self.a, self.b = (nn.Linear(16, 16, dtype=torch.bfloat16) for _ in range(2))
        self.run = region(lambda x: self.b(x)) if regional else self.b

    def forward(self, x):
        x = self.a(x)
        with torch.autocast("cuda", torch.float32):
            return self.run(x) + self.run(2 * x)


@pytest.mark.parametrize("regional", [False, True])
@pytest.mark.parametrize("islands, dtype", [("keep", torch.float32), ("bf16", torch.bfloat16)])
def test_an_autocast_to_full_precision_does_not_widen_what_was_lowered(monkeypatch, regional, islands, dtype):
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)  # tensors here are fakes, which need no GPU
    traced = Traced(Widened(regional), torch.randn(4, 16, dtype=torch.bfloat16))
    mode, fakes = _compat.static_fakes([x.to("meta") for x in traced.example], [torch.device("cuda")] * len(traced.example))
    config = Config.from_options({"preset": "exact", "strict": True, "exact.islands": islands})
    done = prepare(match(canonical(traced.module, fakes, config), config), config, fakes, mode, kept=None)
    graphs = (done.module, *subgraphs(done.module).values())
    products = [value(n).dtype for graph_module in graphs for n in graph_module.graph.nodes if name_of(n) == "linear"]
    assert sorted(products, key=str) == [torch.bfloat16] + [dtype] * (2 - regional) and len(graphs) == 1 + regional
    assert value(next(n for n in done.module.graph.nodes if n.op == "output"))[0].dtype == torch.float32


class Steps(nn.Module):
    """Three steps of a model in bf16, in whose blocks, which are a region, a product is in fp32."""

    def __init__(self):
        super().__init__()
        self.start, self.time = (nn.Linear(n, 16, dtype=torch.bfloat16) for n in (16, 1))
        self.islands = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.run = region(lambda layer, x: x + layer(x.float()).bfloat16())

    def forward(self, x):
        for step in (0.5, 0.3, 0.2):
            v = self.start(x) + self.time(x.new_full((1,), step))
            for island in self.islands:
                v = self.run(island, v)
            x = x + v * step
        return x


@pytest.mark.parametrize("islands, dtype", [("keep", torch.float32), ("bf16", torch.bfloat16)])
def test_islands_within_the_steps_of_a_loop_are_lowered_too(islands, dtype):
    torch.manual_seed(0)
    model, x = Steps(), torch.randn(4, 16, dtype=torch.bfloat16)
    traced = Traced(model, x)
    config = Config.from_options({"preset": "exact", "strict": True, "exact.islands": islands})
    done = prepare(match(canonical(traced.module, traced.fakes, config), config), config, traced.fakes, _compat.fake_mode_of(traced.fakes), kept=None)
    assert {r.name: r.count for r in done.records}["share_steps"] == 3
    products = [value(n).dtype for part in all_graphs(done.module) for n in part.graph.nodes if name_of(n) == "linear"]
    assert sorted(products, key=str) == [torch.bfloat16] * 2 + [dtype], "the first two products and the blocks', once each"
    with torch.no_grad():
        assert relative(done.module(*traced.arguments(x))[0].float(), model(x).float()) <= (0 if islands == "keep" else 2e-2)


SMALL_PRODUCTS = {
    "cameras": (lambda p, x: torch.einsum("bcij,bncpkj->bncpki", p, x), 1),
    "transposed": (lambda p, x: torch.einsum("bncpkj, bcji -> bnpkci", x, p), 1),
    "an ellipsis": (lambda p, x: torch.einsum("...ij,...jk->...ik", p, p.mT), 1),
    "a vector": (lambda p, x: torch.einsum("...ij,...j->...i", p, p[..., 0]), 1),
    "matmul": (lambda p, x: x[:, 0, :, 0] @ p, 1),
    "bmm": (lambda p, x: torch.bmm(p[0], p[1].mT), 1),
    "half precision": (lambda p, x: torch.einsum("bcij,bncpkj->bncpki", p.bfloat16(), x.bfloat16()).float(), 1),
    "many terms": (lambda p, x: x.flatten(-2) @ x.flatten(-2).mT, 0),
    "two large sides": (lambda p, x: x[:, 0, 0, 0].flatten(1)[..., None] @ x[:, 0, 0, 0].flatten(1)[:, None], 0),
    "two sums": (lambda p, x: torch.einsum("bcij,bncpkj->bncpk", p, x), 0),
    "a trace": (lambda p, x: torch.einsum("bcii,bcij->bcj", p, p), 0),
    "numbers": (lambda p, x: ((4 * p).long() @ (4 * p).long()).float(), 0),
    "a linear layer": (lambda p, x: F.linear(x, p[0, 0]), 0),
}


@pytest.mark.parametrize("case", SMALL_PRODUCTS)
def test_small_products(case):
    torch.manual_seed(0)
    fn, count = SMALL_PRODUCTS[case]
    p, x = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 3, 6, 7, 4)
    done = Rewritten(fn, p, x, passes=(small_products,))
    assert done.count == count and done.error() <= 1e-6
    again = Rewritten(fn, p, x, passes=(small_products, lambda m: small_products(m)))
    assert again.records["<lambda>"].count == 0, "idempotent"


def test_small_products_of_free_lengths():
    p, x = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 3, 6, 7, 4)
    for given, dim in ((p, 1), (x, 2)):
        torch._dynamo.mark_dynamic(given, dim)
    traced = Traced(lambda p, x: torch.einsum("bcij,bncpkj->bncpki", p, x), p, x)
    assert any(isinstance(fake, torch.SymInt) for fake in traced.fakes)
    done = Rewritten(traced, torch.randn(2, 4, 4, 4), torch.randn(2, 5, 4, 6, 7, 4), passes=(small_products,))
    assert done.count == 1 and done.error() <= 1e-6


# ... or in TF32, on CUDA: by a switch of the process, which is on while the graph is compiled and while it runs.

MATMUL = torch.backends.cuda.matmul


class Cast(nn.Module):
    """A model in bf16, and one product of it that is not. fp32: all of it in full precision."""

    def __init__(self, fp32: bool = False):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16, dtype=torch.float32 if fp32 else torch.bfloat16), nn.Linear(16, 16)

    def forward(self, x):
        return self.b(self.a(x.to(self.a.weight.dtype)).float())


def dispatched(model, device: str, islands: str):
    """(fp32's precision on CUDA when a graph of that device is compiled and when it runs, its report). The tensors are fakes: a GPU's graph
    can be seen to without one."""
    traced, seen = Traced(model, torch.randn(4, 16)), []
    mode, fakes = _compat.static_fakes([x.to("meta") for x in traced.example], [torch.device(device)] * len(traced.example))
    config = Config.from_options({"preset": "exact", "strict": True, "exact.islands": islands})
    facts = match(canonical(traced.module, fakes, config), config)
    report = report_of(0, facts)

    def lower(module, inputs):
        seen.append(MATMUL.fp32_precision)
        return lambda *args: seen.append(MATMUL.fp32_precision) or args

    Dispatcher(facts, config, fakes, fakes, lower, report)(*fakes)
    return seen, report


@pytest.fixture
def precision(request):
    """fp32's precision on CUDA, as a user set it before."""
    was, MATMUL.fp32_precision = MATMUL.fp32_precision, request.param
    yield request.param
    MATMUL.fp32_precision = was


@pytest.mark.parametrize("precision", ["none", "ieee", "tf32"], indirect=True)
def test_islands_in_tf32_are_so_while_their_graph_is_compiled_and_runs(precision):
    before = precision
    seen, report = dispatched(Cast(), "cuda", "tf32")
    assert seen == ["tf32", "tf32"] and MATMUL.fp32_precision == before
    (record,) = (r for r in report.variants[0].records if r.name == "islands")
    assert record.count == 1 and record.details == ["1 products in TF32, by a switch while this graph runs"] and not record.misses
    for model, islands in ((Cast(), "keep"), (Cast(), "bf16"), (Cast(fp32=True), "tf32")):  # a model in fp32 is no island
        seen, report = dispatched(model, "cuda", islands)
        assert seen == [before, before] and report.variants[0].counts().get("islands") == {"keep": None, "bf16": 1, "tf32": 0}[islands]


def test_the_switch_is_off_again_after_a_graph_that_fails():
    """In both of its spellings, which torch refuses to read where they disagree."""
    before = MATMUL.fp32_precision
    assert within_tf32(lambda: (MATMUL.fp32_precision, MATMUL.allow_tf32, torch.get_float32_matmul_precision()))() == ("tf32", True, "high")
    with pytest.raises(ZeroDivisionError):
        within_tf32(lambda: 1 / 0)()
    assert (MATMUL.fp32_precision, MATMUL.allow_tf32, torch.get_float32_matmul_precision()) == (before, False, "highest")


def test_where_there_is_no_tf32_islands_stay_and_the_report_says_so():
    seen, report = dispatched(Cast(), "cpu", "tf32")
    assert seen == [MATMUL.fp32_precision] * 2 and report.variants[0].counts()["islands"] == 0
    assert "cpu has no TF32; this product stays in fp32" in {m.reason for m, _ in report.left_alone()}
    model, x = Cast(), torch.randn(4, 16)
    compiled = Compiled(Traced(model, x), {"preset": "exact", "lowering": "eager", "exact.islands": "tf32"})
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
