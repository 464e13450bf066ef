"""Context in tile order from its encoding to the steps that read it: where, where not, and that nothing else comes of it."""

from __future__ import annotations

import copy
import dataclasses
import functools

import pytest
import torch
import upstream
from models import worldplay_rollout as reduced
from models.worldplay import Size, WorldPlay, inputs
from test_hy_rollout import OPTIONS, graphs, quick, rollout  # noqa: F401  (quick: for all tests here)
from test_policy import left_right
from tracing import TINY, Traced, relative

import li_compile
from li_compile import handover
from li_compile.config import Config
from li_compile.errors import LightInteractionError
from li_compile.handover import Order
from li_compile.kernels import in_tile_order
from li_compile.passes.dead_tails import dead_tails
from li_compile.passes.encode import encode
from li_compile.passes.fold_encodings import fold_encodings
from li_compile.passes.propagate import propagate, tidy
from li_compile.passes.sparse_attention import sparse_attention
from li_compile.passes.tile_order import tile_order
from li_compile.patterns import registry
from li_compile.patterns.families.hy_worldplay import FAMILY, handed_on
from li_compile.patterns.graph import name_of, region_calls, subgraphs
from li_compile.patterns.matching import match_attention
from li_compile.pipeline import build

SIZE, TILE = Size(depth=4), (4, 2, 2)
LENGTH = 8 * SIZE.height * SIZE.width
SPARSE = Config.from_options(TINY | {"preset": "sparse"})


class Graph:
    """An encoding or a step of the reduced model, rewritten with and without its caches in tile order."""

    def __init__(self, form: str, call: str):
        torch.manual_seed(0)
        model = WorldPlay(SIZE, regional=form == "regions").eval()
        given = inputs(model, frames=8 if call == "encoding" else 4, context=8)
        cache, x = given.pop("kv_cache"), given.pop("x")
        names = [(i, n) for i in range(len(cache)) for n in ("k", "v")]

        def run(x, *past):
            entries = [{**e} for e in cache]
            for (i, n), value in zip(names, past):
                entries[i][n] = value
            more = {"keep": True, "rope_frames": 8, "rope_start": 0} if call == "encoding" else {}
            out = model(x, **given | more, kv_cache=entries)
            return [e[n] for e in out for n in ("k", "v")] if call == "encoding" else out

        self.inputs = [x, *(cache[i][n] for i, n in names if call == "step")]
        self.traced = Traced(run, *self.inputs)

    def build(self, ordered: bool, config: Config = SPARSE):
        facts = dataclasses.replace(self.traced.facts(**config.to_options()), ordered=ordered)
        module, report = build(facts, config, self.traced.fakes, torch._guards.detect_fake_mode(self.traced.fakes), kept=None, reuse=False)
        return module, next((r for r in report.records if r.name == "tile_order"), None)

    def run(self, module, *given):
        return module(*self.traced.arguments(*(given or self.inputs)))


def operators(module, name: str) -> int:
    """How often an operator runs."""
    here = sum(name_of(n) == name for n in module.graph.nodes)
    return here + sum(operators(sub, name) * len(region_calls(module, region)) for region, sub in subgraphs(module).items())


@pytest.mark.parametrize("form", ["flat", "regions"])
def test_an_encoding_returns_all_of_its_keys_and_values_in_order(form):
    """Of four blocks the first is dense and the last leads nowhere: theirs are moved, the others' are as the attention made them."""
    graph = Graph(form, "encoding")
    (plain, none), (ordered, record) = graph.build(False), graph.build(True)
    assert none is None and record.count == 8 and len(record.misses) == 4 and "4 of them as attention made them" in record.details[0]
    assert operators(ordered, "sparse_prefill") == 2 == operators(plain, "sparse_attention") and operators(ordered, "sparse_attention") == 0
    assert operators(ordered, "in_tile_order") == 4
    for got, want in zip(graph.run(ordered), graph.run(plain), strict=True):
        assert torch.equal(got, in_tile_order(want, SIZE.height, SIZE.width, TILE)) and not torch.equal(got, want)


@pytest.mark.parametrize("form", ["flat", "regions"])
def test_a_step_reads_it_in_place(form):
    """Against the graph that packs a context in the model's order; behind the context's last token there is poison."""
    graph = Graph(form, "step")
    (plain, none), (ordered, record) = graph.build(False), graph.build(True)
    assert none is None and record.count == 3 and operators(ordered, "sparse_attention") == 3 and not record.misses
    assert operators(ordered, "pack_context") == operators(ordered, "sparse_decode") == 0 < operators(plain, "pack_context") == 3
    want, (x, *cache) = graph.run(plain)[0], graph.inputs

    def in_order(c):
        memory = torch.full((*c.shape[:2], c.shape[2] + 64, c.shape[3]), float("nan"))
        memory[:, :, : c.shape[2]] = in_tile_order(c, SIZE.height, SIZE.width, TILE)
        return memory[:, :, : c.shape[2]]

    assert relative(graph.run(ordered, x, *map(in_order, cache))[0], want) <= 1e-6
    assert relative(graph.run(plain, x, *map(in_order, cache))[0], want) > 1e-4, "blocks of tokens from everywhere"


def test_bytes_that_a_step_saves():
    """Keys and values of text and context read and written, less context keys for their means and the join of text and current tokens."""
    graph = Graph("flat", "step")
    _, record = graph.build(True)
    row = 2 * SIZE.heads * SIZE.head_dim * 4
    assert f"{3 * row * (4 * (22 + LENGTH) - LENGTH - 4 * (22 + 48)) / 1e6:,.0f} MB less" in record.details[0]


def test_what_returns_other_things_is_no_encoding():
    graph = Graph("flat", "encoding")
    output = next(n for n in graph.traced.module.graph.nodes if n.op == "output")
    output.args = ((*output.args[0], next(n for n in graph.traced.module.graph.nodes if n.op == "call_method")),)
    module, record = graph.build(True)
    assert record.count == 0 and "no encoding, which returns keys and values alone" in record.misses[0].reason
    assert operators(module, "sparse_attention") == 2 and operators(module, "in_tile_order") == 0


def test_several_contexts_are_read_as_a_whole():
    """None is chosen from, as the choice would be one of blocks that are none."""
    graph = Graph("flat", "step")
    facts = graph.traced.facts(**SPARSE.to_options())
    s = SPARSE.sparse
    sparse_attention(facts.module, facts.sites, topk_ratio=s.topk_ratio, prefill_ratio=s.prefill_ratio, tile=s.tile, block_size=s.block_size,
                     sub_blocks=s.sub_blocks, min_context=0, skip_layers=1)
    nodes = [n for n in facts.module.graph.nodes if name_of(n) == "sparse_attention"]
    for node in nodes:  # the context in two pieces of whole frames
        (text, context, current), roles = zip(*node.args[1:3]), node.args[3]
        with facts.module.graph.inserting_before(node):
            halves = [[facts.module.graph.call_method("narrow", (x, 2, start, LENGTH // 2)) for start in (0, LENGTH // 2)] for x in context]
        node.args = (node.args[0], [text[0], *halves[0], current[0]], [text[1], *halves[1], current[1]], [0, 1, 1, 2], *node.args[4:])
        assert list(roles) == [0, 1, 2]
    record = tile_order(facts.module)
    assert record.count == 0 and len(record.misses) == 3 and "2 context segments cannot be read in place" in record.misses[0].reason
    facts.module.recompile()
    dense, _ = graph.build(False, Config.from_options(TINY | {"preset": "exact"}))
    assert relative(graph.run(facts.module)[0], graph.run(dense)[0]) <= 1e-5


# A rollout, and calls of its model.

ROLLOUT = OPTIONS | {"preset": "sparse", "sparse.min_context": 4, "sparse.skip_layers": 0}
ORDER = Order(TILE, (reduced.SIZE.height, reduced.SIZE.width))


def compiled(pipe, **options):
    torch._dynamo.utils.counters.clear()
    return li_compile.compile(pipe, Config.from_options(ROLLOUT | {k.replace("__", "."): v for k, v in options.items()}))


@pytest.fixture
def make(monkeypatch):
    return lambda chunks=3, **given: (reduced.pipeline(monkeypatch, chunks), reduced.inputs(chunks, left_right(), **given))


def counts(model) -> list[int]:
    """Of each graph, what the pass did; without graphs that it was not run on."""
    return [v.counts()["tile_order"] for g in model.report().graphs for v in g.variants if "tile_order" in v.counts()]


def test_a_rollout_is_the_same_with_it_and_without(make):
    """With guidance: each prompt has a cache."""
    pipe, given = make(3, rows=2)
    pipe.guidance_scale = 3.0
    off = compiled(pipe, exact__tile_order=False)
    want = rollout(off, given)
    assert graphs() == 3 and counts(off) == []
    off.detach()
    on = compiled(pipe)
    got = rollout(on, given)
    assert graphs() == 3 and counts(on) == [4, 2], "keys and values of two blocks, that both read"
    assert relative(got, want) <= 1e-4
    said = " ".join(d for g in on.report().graphs for v in g.variants for r in v.records if r.name == "tile_order" for d in r.details)
    assert "4 keys and values are returned in tile order, 2 of them as attention made them" in said
    assert "2 calls read their context where it lies, which moves" in said and "tile_order" in str(on.report())
    assert torch.equal(rollout(on, given), got) and graphs() == 3, "a rollout leaves nothing that the next one sees"
    assert relative(rollout(on.detach(), given), want) > 1e-3, "the rollout is sparse"


@upstream.needs_upstream
def test_upstreams_rollout_is_the_same_with_it_and_without(monkeypatch):
    """Blocks are regions there; with one operator for encodings, as on a GPU."""
    monkeypatch.setattr("li_compile.passes.encode.why_not_encoded", lambda x: None)
    given = reduced.inputs(3, left_right(), upstream.TINY["in_channels"], widths=upstream.WIDTHS)
    pipe, results = upstream.pipeline(upstream.transformer(mm_double_blocks_depth=3), 3), []
    for option in (False, True):
        fast = compiled(pipe, exact__tile_order=option)
        results.append(rollout(fast, given))
        assert counts(fast) == ([6, 3] if option else []) and graphs() == 3
        assert fast.report().counts().get("fold_encodings", 0) == (3 * 2 + 3 * 3 if option else 0)
        fast.detach()
    assert relative(results[1], results[0]) <= 1e-5


def test_graphs_of_inductor_do_the_same(make):
    pipe, given = make(2)
    off = compiled(pipe, exact__tile_order=False)
    want = rollout(off, given)
    off.detach()
    on = compiled(pipe, lowering="inductor")
    assert relative(rollout(on, given), want) <= 1e-4 and counts(on) == [4, 2]


def test_it_is_off_where_nothing_is_sparse_or_nobody_asks_for_it(make, monkeypatch):
    pipe, _ = make()

    def hands_on(**options):
        fast = compiled(pipe, **options)
        (model,) = fast.rollout.compiled
        fast.detach()
        return model._ordered is not None

    assert hands_on()
    assert not any(hands_on(**o) for o in ({"preset": "exact"}, {"exact__enabled": False}, {"exact__tile_order": False}))
    monkeypatch.setitem(registry._FAMILIES, FAMILY.name, dataclasses.replace(FAMILY, handed_on=None))
    assert not hands_on(), "the family does not say which tensors these are"


class Calls:
    """Calls of a transformer, compiled or not, as a rollout makes them: eight latents of context, then a step of the next four."""

    def __init__(self, model, given):
        self.model, self.given = model, given
        self.text = model(bi_inference=False, ar_txt_inference=True, timestep_txt=torch.zeros(1), text_states=given["prompt_embeds"],
                          encoder_attention_mask=given["prompt_mask"], vision_states=given["vision_states"], kv_cache=[], cache_txt=True,
                          extra_kwargs={k: v[:1] for k, v in given["extra_kwargs"].items()})

    def call(self, frames, cache, keep, before):
        g, pick = self.given, lambda name, dim: self.given[name].narrow(dim, frames.start, len(frames))
        return self.model(
            bi_inference=False, ar_vision_inference=True, hidden_states=torch.cat([pick("latents", 2), pick("cond_latents", 2)], 1),
            timestep=torch.full((len(frames),), 14.0 if keep else 700.0), viewmats=pick("viewmats", 1).float(), Ks=pick("Ks", 1).float(),
            action=g["action"][:, frames.start : frames.stop].float(), kv_cache=cache, cache_vision=keep,
            rope_temporal_size=before + len(frames), start_rope_start_idx=before)

    def encode(self, cache=None):
        return self.call(range(8), cache or self.text, True, 0)

    def step(self, cache):
        return self.call(range(8, 12), cache, False, 8)[0]


@pytest.fixture
def rolling(make):
    """rolling(options) -> (calls of a rollout's model, the model): one at a time is compiled"""
    pipe, given = make()
    alive = []

    def compile_anew(**options):
        for fast in alive:
            fast.detach()
        alive[:] = [compiled(pipe, **options)]
        (model,) = alive[0].rollout.compiled
        return Calls(model, given), model

    yield compile_anew
    for fast in alive:
        fast.detach()


def test_a_cache_is_told_apart_by_where_it_comes_from(rolling):
    calls, _ = rolling(exact__tile_order=False)
    plain = calls.encode()
    want = calls.step(plain)
    calls, model = rolling()
    cache = calls.encode()
    assert len(handed_on(cache)) == 4 and handover.common_order(handed_on(cache)) == ORDER and handover.common_order(handed_on(plain)) is None
    for ours, theirs in zip(handed_on(cache), handed_on(plain)):
        assert relative(ours, in_tile_order(theirs, *ORDER.grid, TILE)) <= 1e-5 and relative(ours, theirs) > 0.1
    assert relative(calls.step(cache), want) <= 1e-5 and counts(model) == [4, 2]
    assert relative(calls.step(plain), want) <= 1e-5 and len(model.report().graphs) == 3, "from elsewhere: the graph that packs it"
    assert relative(calls.step([cache[0], plain[1]]), want) <= 1e-5 and len(model.report().graphs) == 3, "in part: the rest is brought back"
    assert handover.common_order(handed_on(calls.encode(plain))) == ORDER, "a new context, whatever is given with it"
    for x in handed_on(cache):
        handover.remember(x, Order(TILE, (2, 8)))
    with pytest.raises(LightInteractionError, match=r"reads keys and values of context in Order\(tile=\(4, 2, 2\), grid=\(4, 4\)\).*tile_order = False"):
        calls.step(cache)


def test_who_knows_nothing_of_it_gets_the_same(rolling):
    """A model that is compiled otherwise has it brought back; the model as it was attends to all of the context, in any order."""
    calls, model = rolling()
    cache = calls.encode()
    back = handover.in_model_order(cache)
    assert handover.common_order(handed_on(back)) is None and not torch.equal(back[0]["k_vision"], cache[0]["k_vision"])
    calls, other = rolling(sparse__tile=(2, 2, 2))
    assert relative(calls.step(cache), calls.step(back)) <= 1e-6 and counts(other) == [0], "in the order of other tiles it is of no use"
    assert len(other.report().graphs) == 1
    original = Calls(other.detach(), calls.given)
    assert relative(original.step(cache), original.step(back)) <= 1e-5


def test_an_open_chunk_whose_plan_drops_frames_finds_them_where_the_model_has_them(rolling):
    results = []
    for option in (False, True):
        calls, model = rolling(exact__tile_order=option, context__enabled=True, context__memory_frames=4, context__temporal_frames=4,
                               context__anchor_frames=0, context__threshold=1.0)
        cache = calls.encode()
        assert handover.common_order(handed_on(cache)) == (ORDER if option else None)
        session = li_compile.Session(model.config)
        session.extend(calls.given["viewmats"][0])
        with session.chunk(8, 4) as plan:
            assert len(plan.indices) == 4 < plan.history
            results.append(calls.step(cache))
            assert not option or handover.common_order(handed_on(calls.encode())) is None
    assert relative(results[1], results[0]) <= 1e-5


def test_a_model_by_itself_keeps_the_models_order_and_says_why(make):
    pipe, given = make()
    model = li_compile.compile(pipe.transformer, Config.from_options(ROLLOUT))
    calls = Calls(model, given)
    cache = calls.encode()
    calls.step(cache)
    records = [r for g in model.report().graphs for v in g.variants for r in v.records if r.name == "tile_order"]
    assert handover.common_order(handed_on(cache)) is None and [r.count for r in records] == [0, 0]
    assert all("may go anywhere" in m.reason and "li_compile.compile(pipeline)" in m.reason for r in records for m in r.misses)
    model.detach()


def test_what_is_remembered_is_a_tensor_until_it_is_written():
    x, before = torch.randn(1, 1, 16, 4), len(handover._REMEMBERED)
    handover.remember(x, ORDER)
    assert handover.order_of(x) == handover.common_order([x, x]) == ORDER
    assert handover.order_of(x.clone()) is handover.order_of(x.view(x.shape)) is handover.order_of(x[:, :, :8]) is None
    assert handover.common_order([x, x.clone()]) is None and handover.common_order([]) is None
    x.zero_()
    assert handover.order_of(x) is None
    with torch.inference_mode():
        y = torch.randn(1, 1, 16, 4)
    handover.remember(y, ORDER)
    assert handover.order_of(y) == ORDER and len(handover._REMEMBERED) == before + 2
    del x, y
    assert len(handover._REMEMBERED) == before


def test_options_with_and_without_it_are_told_apart_in_caches():
    on, off = (Config.from_options({"exact.tile_order": t}) for t in (True, False))
    assert on.digest() != off.digest()


# Encodings on the way into blocks.


class Encoded:
    """The rewritten graph of a call, with norm, rotary and camera encodings one operator, before and after they are folded."""

    def __init__(self, form: str, call: str, between=lambda module: None):
        self.graph, records = Graph(form, call), []
        facts = dataclasses.replace(self.graph.traced.facts(**SPARSE.to_options()), ordered=True)
        mode, s, self.module = torch._guards.detect_fake_mode(self.graph.traced.fakes), SPARSE.sparse, facts.module
        sparse = functools.partial(sparse_attention, sites=[], topk_ratio=s.topk_ratio, prefill_ratio=s.prefill_ratio, tile=s.tile,
                                   block_size=s.block_size, sub_blocks=s.sub_blocks, min_context=0, skip_layers=1)
        for run in (functools.partial(encode, anywhere=True), dead_tails, lambda m: sparse(m, sites=match_attention(m, None, None)[0]), tile_order,
                    between, fold_encodings):  # fmt: skip
            self.before = copy.deepcopy(self.module)
            self.before.recompile()
            records.append(run(self.module))
            tidy(self.module)
            propagate(self.module, self.graph.traced.fakes, mode)
        self.record = records[-1]


@pytest.mark.parametrize(("form", "call", "layers"), [("flat", "encoding", 2), ("regions", "encoding", 2), ("flat", "step", 3), ("regions", "step", 3)])
def test_attention_encodes_what_it_alone_reads(form, call, layers):
    """Queries, keys and values of every sparse layer; those of the dense first and, in an encoding, of the last stay as they are."""
    done = Encoded(form, call)
    assert done.record.count == 3 * layers and not done.record.misses
    left = {"encoding": 3 + 2, "step": 3}[call]
    assert operators(done.before, "encode") == left + 3 * layers and operators(done.module, "encode") == left
    size = 2 * SIZE.heads * SIZE.head_dim * 4 * SIZE.height * SIZE.width * (8 if call == "encoding" else 4)
    assert f"which moves {layers * 3 * 2 * size / 1e6:,.0f} MB less" in done.record.details[0]
    for got, want in zip(done.graph.run(done.module), done.graph.run(done.before), strict=True):
        assert relative(got, want) <= 1e-5


def test_what_is_read_elsewhere_or_seen_differently_is_not_folded():
    def other_reader(module):
        first = next(n for n in module.graph.nodes if name_of(n) == "sparse_attention")
        with module.graph.inserting_after(first.args[0]):
            more = module.graph.call_method("sum", (first.args[0],))
        output = next(n for n in module.graph.nodes if n.op == "output")
        output.args = ((*output.args[0], more),)

    def other_eps(module):
        node = next(n for n in module.graph.nodes if name_of(n) == "sparse_attention").args[0]
        while name_of(node) != "encode":
            node = node.args[0]
        node.args = (*node.args[:2], 1e-3, *node.args[3:])

    for change, says in ((other_reader, "not all of queries, keys and values are encoded for it alone"), (other_eps, "normalised or rotated differently")):
        done = Encoded("flat", "step", lambda m: change(m))
        assert done.record.count == 3 * 2 and says in done.record.misses[0].reason
        assert relative(done.graph.run(done.module)[0], done.graph.run(done.before)[0]) <= 1e-5
