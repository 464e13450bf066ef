"""Registered patterns: what they are rewritten to, what is refused and why, and who registered what."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from test_patterns_attention import FRAME, GRID, HEAD_DIM, HEADS, Block, block_inputs
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from tracing import Traced, relative

import li_compile
from li_compile.errors import PatternError
from li_compile.patterns import CONTEXT, CURRENT, TEXT, Family, registry
from li_compile.patterns import register_attention, register_context, register_family, register_loop


def plain(q, k, v, scale=None, causal=False):
    """Attention in fp32, by definition, of [B, L, H, D]."""
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v)


@torch.library.custom_op("li_tests::fast", mutates_args=())
def fast(q: Tensor, k: Tensor, v: Tensor, sm_scale: float | None = None, causal: bool = False, window: int = -1,
         k_lens: Tensor | None = None, flavour: str = "a") -> Tensor:
    assert window == -1
    n = k.shape[1] if k_lens is None else int(k_lens[0])
    return plain(q, k[:, :n], v[:, :n], sm_scale, causal)


@fast.register_fake
def _(q, k, v, sm_scale=None, causal=False, window=-1, k_lens=None, flavour="a"):
    return torch.empty_like(q)


@torch.library.custom_op("li_tests::odd", mutates_args=())
def odd(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@odd.register_fake
def _(q, k, v):
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1] * q.shape[3])


@torch.library.custom_op("flash_attn::_flash_attn_varlen_forward", mutates_args=())
def varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
           dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int = -1, window_size_right: int = -1,
           softcap: float = 0.0, alibi_slopes: Tensor | None = None, return_softmax: bool = False) -> tuple[Tensor, Tensor]:
    """Stands in for flash-attn's operator of that name and those parameters."""
    out = [plain(q[None, a:b], k[None, c:d], v[None, c:d], softmax_scale, causal)[0]
           for a, b, c, d in zip(cu_seqlens_q, cu_seqlens_q[1:], cu_seqlens_k, cu_seqlens_k[1:])]
    return torch.cat(out), q.new_empty(q.shape[1], q.shape[0])


@varlen.register_fake
def _(q, k, v, *rest, **more):
    return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0])


@torch.library.custom_op("li_tests::append", mutates_args=())
def append(past: Tensor, new: Tensor) -> Tensor:
    return torch.cat([past, new], 2)


@append.register_fake
def _(past, new):
    return torch.cat([past, new], 2)


@torch.library.custom_op("li_tests::advance", mutates_args=())
def advance(x: Tensor, v: Tensor, d: float) -> Tensor:
    return x + v * d


@advance.register_fake
def _(x, v, d):
    return torch.empty_like(x)


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """What a test registers is forgotten after it."""
    registry.families()
    for name in ("_FAMILIES", "_PATTERNS", "_ORIGINS"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))


def swapped(attend):
    """attend of [B, L, H, D] as one of [B, H, L, D]."""
    return lambda q, k, v: attend(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def packed(q, k, v, lengths=None, **rest):
    """flash-attn's varlen call of [B, L, H, D]."""
    batch = q.shape[0]
    cu = []
    for x in (q, k):
        lens = torch.tensor(lengths or [x.shape[1]] * batch, dtype=torch.int32)
        cu.append(torch.cat([lens.new_zeros(1), lens]).cumsum(0, dtype=torch.int32))
    out, _ = torch.ops.flash_attn._flash_attn_varlen_forward(
        *(x.flatten(0, 1) for x in (q, k, v)), *cu, q.shape[1], k.shape[1], 0.0, q.shape[-1] ** -0.5, False, **rest)
    return out.unflatten(0, (batch, -1))


def joined(attend):
    """attend of queries and of one k and v, where text, context and current are joined in [B, L, H, D]."""
    join = lambda t, c, x: torch.cat([p.transpose(1, 2) for p in (t, c, x)], 1).transpose(1, 2)
    return Block(swapped(attend), join)


def facts_of(module, inputs, **options):
    traced = Traced(module, *inputs)
    facts = traced.facts(**options)
    with torch.no_grad():
        assert relative(facts.module(*traced.arguments(*inputs))[0], module(*inputs)) <= 1e-5
    return facts


SPELLINGS = {
    "operator": (lambda q, k, v: fast(q, k, v), None),
    "operator with a scale": (lambda q, k, v: fast(q, k, v, sm_scale=0.2), 0.2),
    "operator with full lengths": (lambda q, k, v: fast(q, k, v, k_lens=torch.tensor([k.shape[1]])), None),
    "packed, one sample": (packed, None),
    "flex": (swapped(flex_attention), None),
    "flex with a scale": (swapped(lambda q, k, v: flex_attention(q, k, v, scale=0.2)), 0.2),
    "full mask": (swapped(lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, torch.arange(k.shape[2])[None, :] < k.shape[2])), None),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_becomes_one_site(name):
    register_attention("fast", call="li_tests::fast", layout="BSHD", neutral={"window": (-1,)})
    attend, scale = SPELLINGS[name]
    facts = facts_of(joined(attend), block_inputs())
    (site,) = facts.sites
    assert [(s.role, s.length) for s in site.segments] == [(TEXT, 5), (CONTEXT, 8 * FRAME), (CURRENT, 4 * FRAME)]
    assert site.scale == (None if scale is None else pytest.approx(scale))
    assert not [m for m in facts.misses if m.pattern == "attention"]


def test_valid_keys_become_a_slice():
    register_attention("fast", call="li_tests::fast", layout="BSHD")
    for attend in (lambda q, k, v: fast(q, k, v, k_lens=torch.tensor([20])),
                   swapped(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, torch.arange(k.shape[2])[None] < 20))):
        facts = facts_of(Block(swapped(attend)), block_inputs(0, 0))
        (node,) = [n for n in facts.module.graph.nodes if "scaled_dot" in str(n.target)]
        assert node.args[1].meta["example_value"].shape == (1, HEADS, 20, HEAD_DIM) and len(node.args) == 3


def test_packed_samples_of_one_length_get_their_batch_axis_back():
    inputs = block_inputs(0, 0)
    inputs[0] = torch.randn(2, 3, 4, *GRID)
    (site,) = facts_of(Block(swapped(packed)), inputs).sites
    assert site.query.meta["example_value"].shape == (2, HEADS, 24, HEAD_DIM)


REFUSED = {
    "lengths of an input": (lambda q, k, v: fast(q, k, v, k_lens=(q.sum((1, 2, 3)) * 0 + 24).long()), "k_lens are no constants"),
    "lengths that differ": (lambda q, k, v: packed(q.view(2, 12, HEADS, HEAD_DIM), *(x.view(2, 12, HEADS, HEAD_DIM) for x in (k, v)),
                                                   lengths=[10, 14]).flatten(0, 1)[None], "different lengths ([10, 14] queries"),
    "a window": (lambda q, k, v: packed(q, k, v, window_size_left=8), "window_size_left = 8 changes what is computed"),
    "an unknown argument": (lambda q, k, v: fast(q, k, v, flavour="b"), "argument flavour = b is not known to leave the result alone"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_provably_equal_is_a_miss_with_reason_and_line(name):
    register_attention("fast", call="li_tests::fast", layout="BSHD", neutral={"window": (-1,)}, ignored=() if "unknown" in name else ("flavour",))
    attend, reason = REFUSED[name]
    traced = Traced(Block(swapped(attend)), *block_inputs(0, 0))
    facts = traced.facts()
    (miss,) = [m for m in facts.misses if m.pattern == "attention"]
    assert not facts.sites and reason in miss.reason and "test_registration.py:" in miss.where
    line = int(miss.where.rpartition(":")[2])
    source = inspect.getsource(inspect.getmodule(attend)).splitlines()[line - 1]
    assert "fast(" in source or "varlen" in source


def test_a_flex_mask_is_a_miss():
    from torch.nn.attention.flex_attention import create_block_mask

    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 24, 24, device="cpu")
    for attend, reason in ((lambda q, k, v: flex_attention(q, k, v, block_mask=mask), "block mask"),
                           (lambda q, k, v: flex_attention(q, k, v, lambda s, b, h, i, j: s + i), "score function")):
        facts = Traced(Block(attend), *block_inputs(0, 0)).facts()
        (miss,) = [m for m in facts.misses if m.pattern == "attention"]
        assert not facts.sites and reason in miss.reason


# By example.


def by_einsum(q, k, v, scale=1.0):
    scores = torch.einsum("blhd,bmhd->bhlm", q, k) * scale
    return torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v)


OTHER_WORDS = {
    "as it is": by_einsum,
    "number first, other letters": lambda q, k, v: torch.einsum(
        "b h i j, b j h d -> b i h d", F.softmax(0.3 * torch.einsum("b i h d, b j h d -> b h i j", q, k), dim=3), v),
    "casts and copies": lambda q, k, v: torch.einsum("bhlm,bmhd->blhd", (torch.einsum("blhd,bmhd->bhlm", q, k) * 0.3).float().softmax(
        -1).to(v.dtype).contiguous(), v),
    "a reshape to the same": lambda q, k, v: torch.einsum("bhlm,bmhd->blhd", (torch.einsum("blhd,bmhd->bhlm", q, k) * 0.3).softmax(
        -1).reshape(1, HEADS, 24, -1), v),
}


@pytest.mark.parametrize("name", OTHER_WORDS)
def test_an_example_is_found_in_other_words(name):
    register_attention("einsum", example=by_einsum, layout="BSHD")
    facts = facts_of(Block(swapped(OTHER_WORDS[name])), block_inputs(0, 0))
    (site,) = facts.sites
    assert site.node.meta["li_pattern"] == "einsum"


@pytest.mark.parametrize("attend", [
    lambda q, k, v: torch.einsum("bhlm,bmhd->blhd", (torch.einsum("blhd,bmhd->bhlm", q, k) * 0.3).softmax(-2), v),
    lambda q, k, v: torch.einsum("bhlm,bmhd->blhd", (torch.einsum("blhd,bmhd->bhlm", q, k) * 0.3).sigmoid(), v),
    lambda q, k, v: torch.einsum("bhlm,bmhd->blhd", (torch.einsum("blhd,bmhd->bhlm", q, k) * q.mean()).softmax(-1), v),
    lambda q, k, v: torch.einsum("bhml,bmhd->blhd", (torch.einsum("blhd,bmhd->bhlm", q, k) * 0.3).softmax(-1), v),
], ids=["softmax over queries", "no softmax", "a scale that is computed", "transposed weights"])
def test_an_example_is_not_found_in_look_alikes(attend):
    register_attention("einsum", example=by_einsum, layout="BSHD")
    facts = facts_of(Block(swapped(attend)), block_inputs(0, 0))
    assert not facts.sites and not any("li_pattern" in n.meta for n in facts.module.graph.nodes)


def test_an_example_that_is_not_what_it_says_is_refused_at_once():
    with pytest.raises(ValueError, match="differ by"):
        register_attention("wrong", example=lambda q, k, v: torch.einsum(
            "bhlm,bmhd->blhd", torch.einsum("blhd,bmhd->bhlm", q, k).softmax(-1) * 1.01, v), layout="BSHD")
    with pytest.raises(ValueError, match="one of call, example, read"):
        register_attention("both", example=by_einsum, call="li_tests::fast")
    with pytest.raises(ValueError, match="D last"):
        register_attention("layout", call="li_tests::fast", layout="BSDH")
    with pytest.raises(ValueError, match="neither 'context' nor 'loop' nor one of its groups"):
        Family("f", opt_out=("nothing",))


def test_an_opaque_append_and_an_opaque_update_are_put_into_plain_words():
    register_context("append", example=lambda past, new: torch.ops.li_tests.append(past, new),
                     canonical=lambda past, new: torch.cat([past, new], 2), check=lambda: (torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4)))
    (site,) = facts_of(Block(join=lambda t, c, x: append(c, x)), block_inputs(0)).sites
    assert [(s.role, s.length) for s in site.segments] == [(CONTEXT, 8 * FRAME), (CURRENT, 4 * FRAME)]
    register_loop("advance", example=lambda x, v, d=0.5: torch.ops.li_tests.advance(x, v, d), canonical=lambda x, v, d: x + v * d,
                  check=lambda: (torch.randn(3), torch.randn(3), 0.5))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(9, 16), nn.Linear(16, 8)

        def forward(self, x):
            for t in (1.0, 0.7, 0.3):
                v = self.b(F.silu(self.a(torch.cat([x, torch.full_like(x[:, :1], t)], 1))))
                x = advance(x, v, -0.3)
            return x

    facts = facts_of(Model(), [torch.randn(2, 8)])
    assert facts.loop is not None and facts.loop.steps == 3 and facts.loop.updates.kind


# Patterns that do not hold what they promise.


def test_two_patterns_on_one_node_are_an_error_with_the_line():
    for name in ("one", "two"):
        register_attention(name, call="li_tests::fast", layout="BSHD", neutral={"window": (-1,)})
    traced = Traced(Block(swapped(lambda q, k, v: fast(q, k, v))), *block_inputs(0, 0))
    with pytest.raises(PatternError, match=r"fires twice on one node \('one' and 'two'\).*test_registration.py:\d+"):
        traced.facts(strict=True)
    with pytest.warns(UserWarning, match="fires twice"):
        facts = traced.facts()
    assert not facts.sites and any("fires twice" in m.reason for m in facts.misses)
    register_family(Family("picky", attention=("two",)))
    facts = traced.facts(strict=True, family="picky")
    assert [s.node.meta["li_pattern"] for s in facts.sites] == ["two"]


def test_shapes_that_do_not_agree_are_an_error_with_the_line():
    register_attention("odd", call="li_tests::odd", layout="BSHD")  # it is BHSD, and its result has its heads side by side
    traced = Traced(Block(odd), *block_inputs(0, 0))
    with pytest.raises(PatternError, match=r"'odd': it yields \(1, 2, 24, 8\) torch.float32 where \(1, 24, 16\) .*test_patterns_attention.py:\d+"):
        traced.facts(strict=True)
    with pytest.warns(UserWarning, match="'odd': it yields"):
        assert not traced.facts().sites


def test_a_pattern_of_the_family_that_never_fires_is_an_error_that_names_the_nearest_node():
    register_attention("einsum", example=by_einsum, layout="BSHD")
    register_family(Family("wants", attention=("einsum",)))
    look_alike = lambda q, k, v: torch.einsum("bhlm,bmhd->blhd", (torch.einsum("blhd,bmhd->bhlm", q, k) * 0.3).sigmoid(), v)
    traced = Traced(Block(swapped(look_alike)), *block_inputs(0, 0))
    with pytest.raises(PatternError, match=r"'einsum' of family 'wants' fires nowhere.*sigmoid stands where the example has softmax.*"
                                           r"test_registration.py:\d+"):
        traced.facts(strict=True, family="wants")
    with pytest.warns(UserWarning, match="fires nowhere"):
        assert not traced.facts(family="wants").sites
    register_family(Family("typo", attention=("einsun",)))
    with pytest.raises(PatternError, match="nobody has registered"):
        traced.facts(strict=True, family="typo")


def test_a_context_that_does_not_fit_the_graph_is_an_error():
    from li_compile.patterns.context import ContextConcat, ContextInput

    register_context("mine", find=lambda module, sites, roles: ContextConcat(
        "cache", {"l_x_": ContextInput(2, FRAME)}, {}, None, None, 1, FRAME, 4, 8))
    traced = Traced(Block(), *block_inputs(0))
    with pytest.raises(PatternError, match="says that l_x_ holds 8 frames of 6"):
        traced.facts(strict=True)


def test_a_registered_context_is_used_and_its_name_can_be_required():
    from li_compile.patterns.context_cache import find_cache

    def find(module, sites, roles):
        return find_cache(module, sites, roles) if roles.get("use") else None

    register_context("mine", find=find)
    register_family(Family("uses", roles={"use": "yes"}, context="mine"))
    register_family(Family("lacks", context="mine"))
    traced = Traced(Block(), *block_inputs(0))
    assert traced.facts(strict=True, family="uses").context.frames == 8
    with pytest.raises(PatternError, match="'mine', which the family names, fires nowhere"):
        traced.facts(strict=True, family="lacks")


# Families.


class Preparable(nn.Module):
    """Its attention breaks the graph until it is prepared."""

    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, *inputs):
        print("a graph break")
        return self.block(*inputs)

    def quiet(self, *inputs):
        return self.block(*inputs)


def silence(model, patch):
    patch(model, "forward", model.quiet)


def test_a_family_is_recognised_prepared_listed_and_undone():
    register_family(Family("quiet", modules=(f"{__name__}.Preparable",), prepare=silence, grid=(3, 2)))
    model = Preparable()
    report = li_compile.explain(model, *block_inputs(), config=li_compile.Config(preset="exact"))
    assert not report.breaks and report.prepared == [f"{__name__}.Preparable.forward"] and "prepared before tracing" in str(report)
    assert report.graphs[0].found["family"] == "quiet" and "grid 3 x 2" in report.graphs[0].found["attention, decode"]
    assert "forward" not in vars(model)
    compiled = li_compile.compile(model, li_compile.Config(preset="exact", lowering="eager"))
    assert compiled.config.family == "quiet" and "forward" in vars(model)
    assert compiled.detach() is model and "forward" not in vars(model)
    assert li_compile.explain(model, *block_inputs(), config=li_compile.Config(preset="exact", family="doom_world")).breaks


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.spatial, self.temporal = Block(), Block()

    def forward(self, x):
        return self.spatial(x) + self.temporal(x)


def test_a_graph_tells_its_family_and_groups_can_be_left_alone():
    register_family(Family("grouped", modules=(f"{Block.__module__}.Block",), groups={"space": "spatial"}, opt_out=("space", "loop")))
    facts = facts_of(Outer(), block_inputs(0, 0)[:1])
    assert facts.family.name == "grouped" and len(facts.sites) == 1
    reasons = [m.reason for m in facts.misses]
    assert any("of the group 'space', which family 'grouped' leaves alone" in r for r in reasons)
    assert any("opts out of cached steps" in r for r in reasons)
    register_family(Family("rival", modules=(f"{Block.__module__}.Block",)))
    with pytest.raises(PatternError, match="both claim the modules"):
        Traced(Outer(), *block_inputs(0, 0)[:1]).facts()


def test_names_are_taken_once_and_change_the_cache_key():
    from li_compile.pipeline import digest

    before = digest("")
    register_attention("fast", call="li_tests::fast", layout="BSHD")
    after = digest("")
    register_attention("fast", call="li_tests::fast", layout="BSHD")  # the same again
    assert before != after == digest("")
    with pytest.raises(ValueError, match="registered already"):
        register_attention("fast", call="li_tests::fast", layout="BHSD")
    register_family(Family("f", prepare=silence))
    assert digest("") not in (before, after) and "0x" not in registry.identity()
    assert registry.origins()["f"] == __name__ and registry.origins()["doom_world"] == "built in"


# Grids.


class Patched(Block):
    """A patchify and an unpatchify by reshape, no convolution; ``back``: whether the latter is there."""

    def __init__(self, back: bool, patch=(2, 2)):
        super().__init__()
        self.back, self.size = back, patch
        self.embed, self.out = nn.Linear(3 * patch[0] * patch[1], HEADS * HEAD_DIM), nn.Linear(HEADS * HEAD_DIM, 3)

    def forward(self, x):
        p, q = self.size
        x = x.unfold(3, p, p).unfold(4, q, q).permute(0, 2, 3, 4, 1, 5, 6)
        rows, columns = x.shape[2:4]
        tokens = self.embed(x.flatten(4).flatten(1, 3))
        q, k, v = self.qkv(tokens).unflatten(-1, (HEADS, -1)).transpose(1, 2).chunk(3, -1)
        out = self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return out.unflatten(1, (4, rows, columns)) if self.back else out


def test_a_grid_is_read_from_the_unpatchify_or_solved_or_its_ambiguity_is_told():
    latents = [torch.randn(1, 3, 4, 4, 6)]
    assert [s.grid for s in facts_of(Patched(True), latents).sites] == [(2, 3)]
    facts = facts_of(Patched(False), latents)
    (miss,) = [m for m in facts.misses if m.pattern == "attention"]
    assert not facts.sites and "shapes alone leave 2 x 3 or 1 x 6" in miss.reason and "sparse.grid" in miss.reason
    assert [s.grid for s in facts_of(Patched(False, (1, 1)), latents).sites] == [(4, 6)]  # one answer only


def test_the_command_lists_families_and_patterns_with_their_origin():
    from typer.testing import CliRunner

    from li_compile.cli import app

    register_attention("fast", call="li_tests::fast", layout="BSHD")
    run = CliRunner().invoke(app, ["families"], env={"COLUMNS": "200"})
    lines = {line.split("│")[1].strip(): line for line in run.stdout.splitlines() if line.count("│") == 4}
    assert "built in" in lines["doom_world"] and "built in" in lines["flash_attn"] and __name__ in lines["fast"]


def test_a_group_that_is_never_padded_must_be_one_of_the_familys():
    with pytest.raises(ValueError, match=r"says of actions that it is never padded, which is none of its groups \(text\)"):
        Family("x", groups={"text": ".text"}, never_padded=("actions",))
