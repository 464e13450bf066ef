"""What explain says in numbers, outlines and pages."""

from __future__ import annotations

import dataclasses
import html.parser
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from tracing import world_inputs
from typer.testing import CliRunner

import li_compile
from examples.doom_world.model import ChunkSampler
from li_compile import roofline
from li_compile.cli import app
from li_compile.outlines import Outline, operators, outline
from li_compile.passes.cost import cost, products
from li_compile.report import Report


@pytest.fixture(scope="module")
def report(tiny_world) -> Report:
    sampler = ChunkSampler(tiny_world(depth=3))
    tiles = {"tile": (4, 2, 2), "block_size": 16}
    return li_compile.explain(sampler, *world_inputs(sampler.model, 20), config=li_compile.Config(sparse=tiles))


def test_each_site_is_priced_as_traced_and_in_each_variant(report):
    (graph,) = report.graphs
    prefill, decode = graph.sites
    # 3 blocks, of batch 1 in 2 branches, 2 heads of 16, 8 text tokens; 20 frames of 16 tokens, or 4 after them, 4 times.
    assert prefill.times == 3 and prefill.before.flops == 3 * 4 * 2 * 2 * 320 * (8 + 320) * 16
    assert decode.times == 12 and decode.before.flops == 12 * 4 * 2 * 2 * 64 * (8 + 320 + 64) * 16
    assert prefill.pattern.startswith("prefill, keys [text 8 | current") and "decode, keys [text 8 | context" in decode.pattern
    for site in graph.sites:
        file, line = site.where.rsplit(":", 1)
        assert "scaled_dot_product_attention" in open(file).read().splitlines()[int(line) - 1]
    kept, reusing = (v.label for v in graph.variants)
    # Of 4 context frames nothing is sparse: the formula again.
    assert decode.after[kept][0].flops == 12 * 4 * 2 * 2 * 64 * (8 + 64 + 64) * 16
    assert decode.after[kept][1] == "12 scaled_dot_product_attention"
    assert decode.after[reusing][1] == "2 scaled_dot_product_attention, 4 sparse_decode"  # layer 0 dense, 2 of 4 steps
    assert decode.after[reusing][0].flops < decode.after[kept][0].flops


def test_a_flat_graph_has_the_same_sites_as_one_of_regions(report, tiny_world):
    sampler = ChunkSampler(tiny_world(regional=False, depth=3))
    flat = li_compile.explain(sampler, *world_inputs(sampler.model, 20), config=li_compile.Config(sparse={"tile": (4, 2, 2), "block_size": 16}))
    prefill, decode = flat.graphs[0].sites
    assert prefill.times == 2  # the last block's is dead code of a flat graph: only its keys and values are read
    other = report.graphs[0].sites[1]
    assert (decode.times, decode.where, decode.before.flops, decode.before.bytes) == (12, other.where, other.before.flops, other.before.bytes)
    for label, (work, by) in decode.after.items():
        assert (work.flops, by) == (other.after[label][0].flops, other.after[label][1])


def test_what_the_passes_save_adds_up(report):
    (graph,) = report.graphs
    for variant in graph.variants:
        for unit in ("flops", "bytes", "ms"):
            saved = sum(getattr(e.saved, unit) for e in variant.effects)
            assert saved == pytest.approx(getattr(graph, unit) - getattr(variant, unit)), (variant.label, unit)
        effects = {e.name: e.saved for e in variant.effects}
        assert effects["prune_context"].flops > 0 and effects["equal_rows"].flops > 0
        assert effects["share_steps"].flops > 0  # what all steps share is computed once, before them
    assert {e.name for e in graph.variants[1].effects} == set(graph.variants[1].counts())


def test_the_outline_folds_blocks_and_steps_and_counts_all_of_the_graph(report):
    (graph,) = report.graphs
    for priced, drawn in [(graph, graph.outline), *((v, v.outline) for v in graph.variants)]:
        assert drawn.flops == priced.flops
    assert operators(graph.outline)["scaled_dot_product_attention"] == 15
    after = operators(graph.variants[1].outline)
    assert after["sparse_attention"] == 1 and after["sparse_decode"] == 4 and after["pack_context"] == 2  # the last block's prefill is dead
    text = "\n".join(graph.outline.lines())
    assert "3 x " in text and text.count("scaled_dot_product_attention") <= 2 * 4 and len(text.splitlines()) < 120


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Conv1d(8, 8, 1)

    def forward(self, x):
        return self.b(self.a(x).transpose(1, 2)).transpose(1, 2)


def test_repeated_pairs_and_differing_siblings():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.pairs, self.singles = nn.ModuleList(Pair() for _ in range(5)), nn.ModuleList(nn.Linear(8, 8) for _ in range(5))
            self.last = nn.Linear(8, 4)

        def forward(self, x):
            for one, two in zip(self.pairs, self.singles):
                x = F.relu(two(one(x)))
            return self.last(x)

    report = li_compile.explain(Net(), torch.randn(2, 3, 8))
    (graph,) = report.graphs
    assert [(c.name, c.kind, c.times) for c in graph.outline.children] == [
        ("pairs.0 … pairs.4", "Pair", 5), ("singles.0 … singles.4", "Linear", 5), ("last", "Linear", 1)]
    assert graph.outline.flops == graph.flops == 2 * 2 * 3 * (15 * 64 + 32)
    assert graph.outline.operators == {"relu": 5} and graph.sites == []


def test_the_roofline_takes_the_longer_of_operations_and_bytes():
    machine = roofline.Machine("m", {"float32": 100.0, "bfloat16": 400.0}, 10.0, "made up")
    assert machine.seconds(1000, 1, torch.float32) == 10
    assert machine.seconds(1000, 1, torch.bfloat16) == 2.5
    assert machine.seconds(1000, 500, torch.float32) == 50
    assert machine.seconds(1000, 1, torch.float64) == 10  # of the slowest that is known
    h100 = roofline.known_machine("NVIDIA H100 80GB HBM3")
    assert h100.peak["bfloat16"] == 989.4e12 and h100.bandwidth == 3.35e12 and h100.source.startswith("https://")
    assert roofline.known_machine("NVIDIA H100 PCIe").bandwidth == 2.0e12
    assert roofline.known_machine("NVIDIA A100-SXM4-40GB").bandwidth == pytest.approx(1.555e12)
    assert roofline.known_machine("NVIDIA A100-SXM4-80GB").bandwidth == pytest.approx(2.039e12)
    assert roofline.known_machine("Some Card") is None
    here = roofline.machine_of(torch.device("cpu"))
    assert here.source.startswith("measured") and 1e8 < here.peak["float32"] < 1e14 and 1e7 < here.bandwidth < 1e13
    assert here is roofline.machine_of("cpu")


class Sources(html.parser.HTMLParser):
    """Everything that a page would load, and the texts that it shows."""

    def __init__(self):
        super().__init__()
        self.loads, self.text, self.depth = [], [], []

    def handle_starttag(self, tag, attributes):
        self.loads += [v for k, v in attributes if k in ("src", "href")] + [tag] * (tag in ("script", "link", "img", "iframe"))
        if tag not in ("meta",):
            self.depth.append(tag)

    def handle_endtag(self, tag):
        while self.depth and self.depth.pop() != tag:
            pass

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_loads_nothing_and_shows_what_the_table_shows(report, tmp_path):
    text = report.html(tmp_path / "out.html")
    assert (tmp_path / "out.html").read_text(encoding="utf-8") == text
    page = Sources()
    page.feed(text)
    assert page.loads == [] and "url(" not in text and "@import" not in text
    shown = " ".join(" ".join(page.text).split())
    for word in ("sparse_decode", "prune_context", "sparse.skip_layers", "As traced", "context frames, cached steps", "VisionBlock", "3 ×",
                 report.machine.name):
        assert word in shown, word
    evil = dataclasses.replace(report, options={"<script>alert(1)</script>": 1})
    assert "<script>alert" not in evil.html()
    json.dumps(report.to_dict())


def test_a_report_of_compiling_has_a_table_and_a_page_too():
    with torch.no_grad():
        torch.compile(nn.Linear(4, 4), backend="light_interaction", options={"lowering": "eager"})(torch.randn(2, 4))
    report = li_compile.last_report()
    assert report.machine is None and "Graph 0" in str(report) and "Graph 0" in report.html()


def test_the_command_writes_a_page(tmp_path):
    run = CliRunner().invoke(app, ["explain", "tests.test_explain:target", "--html", str(tmp_path / "r.html")])
    assert run.exit_code == 0 and "<h2>Graph 0</h2>" in (tmp_path / "r.html").read_text(encoding="utf-8")


def plain_models():
    """Models with nothing to rewrite: name -> (module, inputs, words of the reason)."""
    class Attention(nn.Module):
        def __init__(self, causal: bool):
            super().__init__()
            self.qkv, self.out, self.causal = nn.Linear(32, 96), nn.Linear(32, 32), causal

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
            return x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))

    class ViT(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch, self.blocks = nn.Conv2d(3, 32, 8, 8), nn.Sequential(*(Attention(False) for _ in range(4)))
            self.cls, self.head = nn.Parameter(torch.zeros(1, 1, 32)), nn.Linear(32, 10)

        def forward(self, x):
            tokens = self.patch(x).flatten(2).transpose(1, 2)
            return self.head(self.blocks(torch.cat([self.cls.expand(len(x), -1, -1), tokens], 1))[:, 0])

    class UNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.low, self.up = nn.Conv2d(4, 32, 3, 2, 1), Attention(False), nn.ConvTranspose2d(32, 8, 2, 2)
            self.last = nn.Conv2d(12, 4, 3, 1, 1)

        def forward(self, x):
            low = self.down(x)
            mixed = self.low(low.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, low.shape[2:])
            return self.last(torch.cat([x, self.up(mixed)], dim=1))

    return {"vit": (ViT(), torch.randn(2, 3, 32, 32), "17 tokens are no whole number"),
            "causal": (nn.Sequential(*(Attention(True) for _ in range(3))), torch.randn(2, 16, 32), "causal"),
            "unet": (UNet(), torch.randn(1, 4, 16, 16), "attends within one frame")}


@pytest.mark.parametrize("name", ["vit", "causal", "unet"])
def test_models_of_another_kind_are_left_alone_with_the_reason_at_the_line(name):
    model, x, reason = plain_models()[name]
    (graph,) = li_compile.explain(model, x).graphs
    assert graph.sites == [] and not any(v.counts().get(p, 0) for v in graph.variants for p in v.counts())
    misses = [m for m in graph.misses if m.pattern == "attention"]
    assert misses and all(reason in m.reason for m in misses), misses
    for miss in misses:
        file, line = miss.where.rsplit(":", 1)
        assert "scaled_dot_product_attention" in open(file).read().splitlines()[int(line) - 1]
    (row,) = [n for m, n in graph.left_alone() if m.pattern == "attention"]
    assert row == len(misses) == {"vit": 4, "causal": 3, "unet": 1}[name]


def test_products_of_regions_count_once_a_call(world):
    facts = world[1].facts()
    assert sum(p.runs * p.operations for p in products(facts.module)) == cost(facts.module)[0] == outline(facts.module).flops
    assert isinstance(outline(facts.module), Outline)
