"""Options: presets, both spellings, errors that name the key and the nearest one, identity."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from li_compile.config import POLICIES, PRESETS, CacheConfig, Config, ContextConfig, ExactConfig, SparseConfig
from li_compile.errors import ConfigError, LightInteractionError


@pytest.mark.parametrize(
    ("preset", "on"),
    [
        ("off", ""),
        ("exact", "exact"),
        ("context", "exact context"),
        ("sparse", "exact sparse"),
        ("cache", "exact cache"),
        ("all", "exact context sparse cache"),
    ],
)
def test_presets(preset, on):
    config = Config(preset=preset)
    parts = {name: getattr(config, name).enabled for name in ("exact", "context", "sparse", "cache")}
    assert parts == {name: name in on.split() for name in parts}


def test_defaults():
    config = Config()
    assert config == Config.from_options(None) == Config.from_options({})
    assert config.preset == "all" and config.lowering == "inductor" and not config.strict and config.family is None
    assert config.sparse == SparseConfig(True, 0.175, 0.40, (4, 4, 4), 64, 4, 8, 1, None)
    context = ContextConfig(policy="coverage", memory_frames=8, temporal_frames=1, anchor_frames=4, chunk_frames=4, threshold=0.7,
                            rule="sphere", fov=(60.0, 35.0), radius=8.0, window="fixed")
    assert config.context == context and config.context.enabled
    assert config.cache == CacheConfig(True, 0.7, 3)
    assert config.exact == ExactConfig(True)


@pytest.mark.parametrize("preset", ["off", "exact", "sparse", "cache"])
def test_without_pruning_the_window_is_upstreams(preset):
    """The authors' presets off, sparse and cache leave (M, L) at 20 and 12; the cached-step gate depends on it."""
    config = Config(preset=preset)
    assert (config.context.memory_frames, config.context.temporal_frames) == (20, 12)
    for policy, frames in POLICIES.items():
        switched_on = Config.from_options({"preset": preset, "context.enabled": True, "context.policy": policy})
        assert {key: getattr(switched_on.context, key) for key in frames} == frames


def test_the_authors_window():
    config = Config.from_options({"context.policy": "authors"}).context
    assert (config.memory_frames, config.temporal_frames, config.anchor_frames, config.threshold) == (12, 4, 4, 0.7)
    slots = Config.from_options({"context.policy": "slots"}).context
    assert (slots.threshold, slots.rule, slots.radius, slots.slot_references, slots.slot_sink) == (0.45, "grid", 30.0, (1, 9, 17, 25, 33), 4)


def test_parts_on_top_of_a_preset():
    off = Config.from_options({"preset": "all", "cache.enabled": False})
    assert not off.cache.enabled and off.sparse.enabled and off.context.enabled
    on = Config.from_options({"preset": "off", "sparse": {"enabled": True, "topk_ratio": 0.25}})
    assert on.sparse.enabled and on.sparse.topk_ratio == 0.25 and not on.exact.enabled


def test_spellings_are_equal():
    rest = {"preset": "sparse", "strict": True}
    flat = Config.from_options({**rest, "sparse.topk_ratio": 0.25, "sparse.tile": [2, 4, 8]})
    nested = Config.from_options({**rest, "sparse": {"topk_ratio": 0.25, "tile": (2, 4, 8)}})
    mixed = Config.from_options({**rest, "sparse": {"topk_ratio": 0.25}, "sparse.tile": (2, 4, 8)})
    direct = Config("sparse", sparse=SparseConfig(topk_ratio=0.25, tile=(2, 4, 8)), strict=True)
    by_mapping = Config("sparse", sparse={"topk_ratio": 0.25, "tile": (2, 4, 8)}, strict=True)
    with_part = Config.from_options({**rest, "sparse": direct.sparse})
    assert flat == nested == mixed == direct == by_mapping == with_part
    assert len({c.digest() for c in (flat, nested, mixed, direct)}) == 1 and hash(flat) == hash(direct)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"presett": "all"}, ["'presett'", "did you mean 'preset'"]),
        ({"preset": "sparce"}, ["'sparce'", "off, exact, context, sparse, cache, all", "did you mean 'sparse'"]),
        ({"preset": ["all"]}, ["preset", "['all']"]),
        ({"sparse.topk": 0.2}, ["'sparse.topk'", "'sparse.topk_ratio'"]),
        ({"sparse": {"topk": 0.2}}, ["'sparse.topk'", "'sparse.topk_ratio'"]),
        ({"topk_ratio": 0.2}, ["'topk_ratio'", "'sparse.topk_ratio'"]),
        ({"threshold": 0.2}, ["'context.threshold' or 'cache.threshold'"]),
        ({"triton.cudagraphs": True}, ["'triton.cudagraphs'", "'inductor'"]),
        ({7: 1}, ["unknown option 7"]),
        ({"sparse": True}, ["'sparse' is True", "'sparse.enabled'"]),
        ({"sparse": {"tile": (4, 4, 4)}, "sparse.tile": (4, 4, 4)}, ["'sparse.tile'", "twice"]),
        ({"sparse.enabled": 1}, ["'sparse.enabled' is 1", "True or False"]),
        ({"sparse.topk_ratio": 0}, ["'sparse.topk_ratio' is 0", "(0, 1]"]),
        ({"sparse.topk_ratio": True}, ["'sparse.topk_ratio' is True"]),
        ({"sparse.topk_ratio": "0.2"}, ["'sparse.topk_ratio' is '0.2'"]),
        ({"sparse.topk_ratio": float("nan")}, ["'sparse.topk_ratio' is nan"]),
        ({"sparse.tile": (4, 4)}, ["'sparse.tile' is (4, 4)"]),
        ({"sparse.tile": (4, 15, 2)}, ["'sparse.tile'", "divides sparse.block_size = 64", "120"]),
        ({"sparse.block_size": 96}, ["'sparse.block_size' is 96", "power of two"]),
        ({"sparse.sub_blocks": 3}, ["'sparse.sub_blocks' is 3", "divisor"]),
        ({"sparse.skip_layers": -1}, ["'sparse.skip_layers' is -1", "from 0"]),
        ({"sparse.grid": (30,)}, ["'sparse.grid' is (30,)", "None or"]),
        ({"context.memory_frames": 10}, ["'context.memory_frames' is 10", "multiple", "4"]),
        ({"context.policy": "authors", "context.memory_frames": 4}, ["'context.memory_frames' is 4", "at least 8"]),
        ({"context.anchor_frames": 8}, ["'context.memory_frames' is 8", "at least 9"]),
        ({"context.policy": "authors", "context.anchor_frames": 2}, ["'context.anchor_frames' is 2", "multiple"]),
        ({"context.chunk_frames": 3}, ["multiple of context.chunk_frames = 3"]),
        ({"context.policy": "best"}, ["'context.policy' is 'best'", "'coverage', 'chunks', 'authors' or 'slots'"]),
        ({"context.rule": "cone"}, ["'context.rule' is 'cone'", "'frustum'"]),
        ({"context.intrinsics": (0.5, 0.9, 0.5, 0.5)}, ["'context.intrinsics'", "context.rule is 'frustum'"]),
        ({"context.rule": "frustum", "context.near": 9}, ["'context.near' is 9", "below context.radius"]),
        ({"context.kappa": 0}, ["'context.kappa' is 0"]),
        ({"context.slot_references": ()}, ["'context.slot_references' is ()", "a tuple, each a whole number from 1"]),
        ({"context.threshold": 1.5}, ["'context.threshold' is 1.5", "[0, 1]"]),
        ({"context.fov": (60, 200)}, ["'context.fov' is (60, 200)"]),
        ({"context.radius": 0}, ["'context.radius' is 0"]),
        ({"cache.min_steps": 2}, ["'cache.min_steps' is 2", "from 3"]),
        ({"lowering": "tensorrt"}, ["'lowering' is 'tensorrt'", "'inductor' or 'eager'"]),
        ({"strict": None}, ["'strict' is None"]),
        ({"family": ""}, ["'family' is ''"]),
        ({"inductor": {1: 2}}, ["'inductor'"]),
    ],
)
def test_errors_name_the_key_the_value_and_the_way_out(options, words):
    with pytest.raises(ConfigError) as caught:
        Config.from_options(options)
    for word in words:
        assert word in str(caught.value)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, LightInteractionError)


def test_options_must_be_a_mapping():
    with pytest.raises(ConfigError, match="dict"):
        Config.from_options([("preset", "all")])


_OPTIONS = st.fixed_dictionaries(
    {"preset": st.sampled_from(sorted(PRESETS))},
    optional={
        "exact.enabled": st.booleans(),
        "sparse.enabled": st.booleans(),
        "sparse.topk_ratio": st.floats(0.01, 1),
        "sparse.tile": st.sampled_from([(4, 4, 4), [2, 4, 4], (4, 8, 4)]),
        "sparse.block_size": st.sampled_from([64, 128, 256]),
        "sparse.grid": st.none() | st.tuples(st.integers(1, 99), st.integers(1, 99)),
        "context.enabled": st.booleans(),
        "context.memory_frames": st.sampled_from([16, 20, 24]),
        "context.fov": st.tuples(st.floats(1, 360), st.integers(1, 180)),
        "cache.threshold": st.floats(0, 1),
        "lowering": st.sampled_from(["inductor", "eager"]),
        "inductor": st.dictionaries(st.text(max_size=5), st.booleans() | st.integers()),
        "family": st.sampled_from([None, "hy_worldplay"]),
    },
)


@given(_OPTIONS)
def test_options_round_trip(options):
    config = Config.from_options(options)
    again = Config.from_options(config.to_options())
    assert again == config and again.digest() == config.digest()
    for key in options:
        assert key in config.to_options()


def test_digest_follows_meaning():
    base = Config()
    assert base.digest() == Config.from_options(base.to_options()).digest() and len(base.digest()) == 64
    spelled = Config.from_options(
        {"preset": "off", "exact.enabled": True, "sparse.enabled": True, "cache.enabled": True, "context.enabled": True}
    )
    assert spelled.digest() == base.digest()
    changes = {
        "strict": True,
        "lowering": "eager",
        "family": "x",
        "offload": True,
        "stream": True,
        "cuda_graphs": True,
        "sparse.tile": (2, 4, 8),
        "sparse.min_context": 9,
        "context.fov": (61, 35),
        "cache.min_steps": 4,
        "inductor": {"max_autotune": True},
        "exact.islands": "bf16",
        "exact.invariant_memory": 0.0,
    }
    flags = [f.name for f in dataclasses.fields(base.exact) if f.default is True and f.name != "enabled"]
    changes |= {f"exact.{name}": False for name in flags}
    digests = {Config.from_options({key: value}).digest() for key, value in changes.items()}
    digests.add(Config.from_options({"exact.islands": "tf32"}).digest())
    assert len(digests | {base.digest()}) == len(changes) + 2


def test_digest_of_inductor_passes():
    class Pass:
        def __init__(self, name):
            self.name = name

        def uuid(self):
            return self.name

    one, same, other = (Config(inductor={"post_grad_custom_pre_pass": Pass(n)}).digest() for n in ("a", "a", "b"))
    assert one == same != other
    with pytest.raises(ConfigError, match="post_grad_custom_pre_pass"):
        Config(inductor={"post_grad_custom_pre_pass": lambda graph: None}).digest()


def test_immutable():
    mine = {"max_autotune": True}
    config = Config(inductor=mine)
    mine["max_autotune"] = False
    assert config.inductor == {"max_autotune": True}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.strict = True
    assert dataclasses.replace(config, strict=True).strict and not config.strict


def test_import_is_light():
    """Importing the package, its options and its command must not pay for torch."""
    code = "import sys, li_compile, li_compile.cli; li_compile.Config(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_package_exports():
    import li_compile

    assert li_compile.Config is Config and li_compile.LightInteractionError is LightInteractionError
    for name in li_compile.__all__:
        assert getattr(li_compile, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Confg'"):
        li_compile.Confg  # noqa: B018
