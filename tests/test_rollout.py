"""A pipeline given to ``li_compile.compile``: its family attaches to it, and everything is undone."""

from __future__ import annotations

import pytest
import torch
from samplers import Denoiser, euler, shifted
from test_policy import forward_back
from torch import nn

import li_compile
from li_compile.errors import ConfigError
from li_compile.patterns import Family, register_family, registry

LEVELS = shifted(4)
CONFIG = li_compile.Config.from_options({"preset": "cache", "lowering": "eager", "cache.gate": "always", "cache.guard": None})


class Pipeline:
    """Chunks of a Denoiser, its loop in Python. No module, as pipelines are none."""

    def __init__(self):
        self.transformer, self.steps, self.seen = Denoiser(), 4, []

    def __call__(self, chunks: int):
        self.seen = []
        return self.generate(chunks)

    def denoise(self, index: int):
        generator = torch.Generator().manual_seed(index)
        x, condition = torch.randn(3, 4, generator=generator), torch.randn(3, 1, generator=generator)
        return euler(lambda x, sigma, c: self.velocity(x, sigma, c), LEVELS)(x, condition)

    def velocity(self, x, sigma, condition):
        self.seen.append(sigma)
        return self.transformer(x, torch.full_like(condition, sigma), condition)

    @torch.no_grad()
    def generate(self, chunks: int):
        return torch.stack([self.denoise(i) for i in range(chunks)])


class Derived(Pipeline):
    pass


def attach(pipeline, patch, rollout):
    patch(pipeline, "transformer", rollout.compile(pipeline.transformer))

    @torch.no_grad()
    def generate(chunks):
        rollout.session.reset()
        rollout.session.extend(forward_back())
        done = []
        for i in range(chunks):
            with rollout.session.chunk(4 * i):
                done.append(pipeline.denoise(i))
        return torch.stack(done)

    patch(pipeline, "generate", generate)


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    registry.families()
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    monkeypatch.setattr(registry, "_ORIGINS", dict(registry._ORIGINS))


@pytest.fixture
def family():
    return register_family(Family("small", pipelines=(f"{__name__}.Pipeline",), attach=attach))


@pytest.mark.parametrize("kind", [Pipeline, Derived])
def test_a_pipeline_is_attached_to_run_and_restored(family, kind):
    pipeline = kind()
    before = dict(vars(pipeline))
    exact = pipeline(3)
    compiled = li_compile.compile(pipeline, CONFIG)
    assert compiled.preparation.changes == [f"{__name__}.{kind.__name__}.transformer", f"{__name__}.{kind.__name__}.generate"]
    assert compiled.rollout.config.family == compiled.rollout.session.family == "small"
    reused = [compiled(3) for _ in range(2)]
    # The first chunk of each rollout shows the loop, the two others skip the inner two of its four steps.
    assert compiled.rollout.session.stats()["calls"] == 4 + 2 * 2 and len(compiled.seen) == 3 * 4
    assert torch.equal(*reused) and torch.allclose(reused[0][0], exact[0], atol=1e-6) and not torch.allclose(reused[0], exact, atol=1e-3)
    assert compiled.detach() is pipeline and vars(pipeline) == before | {"seen": pipeline.seen}
    assert torch.equal(pipeline(3), exact)


def test_with_approximations_off_the_result_is_the_pipelines(family):
    pipeline = Pipeline()
    exact = pipeline(2)
    compiled = li_compile.compile(pipeline, li_compile.Config(preset="exact", lowering="eager"))
    torch.testing.assert_close(compiled(2), exact, rtol=1e-5, atol=1e-6)
    compiled.detach()


def test_its_attributes_are_the_pipelines_also_when_they_are_set(family):
    pipeline = Pipeline()
    compiled = li_compile.compile(pipeline, CONFIG)
    compiled.steps = 7
    assert pipeline.steps == 7 and compiled.velocity.__self__ is pipeline
    with pytest.raises(AttributeError, match="nothing_such"):
        compiled.nothing_such


def test_a_pipeline_that_nobody_knows_is_refused_with_what_to_do():
    with pytest.raises(ConfigError, match=r"Pipeline looks like a pipeline \(it holds transformer\), and no family knows it.*"
                                          r"pipe\.transformer = li_compile\.compile\(pipe\.transformer\).*attach="):
        li_compile.compile(Pipeline())
    with pytest.raises(ConfigError, match="family 'doom_world' says nothing about pipelines"):
        li_compile.compile(Pipeline(), family="doom_world")


def test_a_family_named_takes_a_pipeline_of_another_class_and_settles_which():
    register_family(Family("small", attach=attach))
    assert li_compile.compile(Pipeline(), CONFIG, family="small").detach()
    for name in ("one", "two"):
        register_family(Family(name, pipelines=(f"{__name__}.Pipeline",), attach=attach))
    with pytest.raises(ConfigError, match="families one and two both know the pipeline Pipeline"):
        li_compile.compile(Pipeline(), CONFIG)
    assert li_compile.compile(Pipeline(), CONFIG, family="two").rollout.config.family == "two"


def test_a_family_that_fails_leaves_the_pipeline_and_its_modules_as_they_were():
    def prepare(model, patch):
        patch(model, "forward", lambda *args: None)

    def fails(pipeline, patch, rollout):
        patch(pipeline, "transformer", rollout.compile(pipeline.transformer))
        patch(pipeline, "steps", 3)
        raise ConfigError("not this version")

    register_family(Family("fails", pipelines=(f"{__name__}.Pipeline",), attach=fails, prepare=prepare,
                           modules=(f"{Denoiser.__module__}.{Denoiser.__qualname__}",)))
    pipeline = Pipeline()
    before = dict(vars(pipeline))
    with pytest.raises(ConfigError, match="not this version"):
        li_compile.compile(pipeline, CONFIG)
    assert vars(pipeline) == before and "forward" not in vars(pipeline.transformer)


def test_modules_functions_and_a_family_without_attach_are_told_apart():
    for model in (nn.Linear(2, 2), Pipeline().denoise, Denoiser().forward):
        assert type(li_compile.compile(model, CONFIG)).__name__ == "Compiled"
    with pytest.raises(ValueError, match="names pipelines, but not what to do with one"):
        Family("half", pipelines=("a.B",))
    with pytest.raises(ValueError, match="pipelines of family 'f' is a string"):
        Family("f", pipelines="a.B", attach=attach)
