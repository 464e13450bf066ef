"""A family's preparation: shared by the models of a family, run where the backend's name is looked up, missed aloud."""

import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import li_compile
from li_compile.backend import last_report, light_interaction
from li_compile.patterns import Family, preparation, register_family, registry
from li_compile.patterns.preparation import in_force, is_prepared, prepare, prepare_loaded

EAGER = {"preset": "exact", "lowering": "eager"}


class Loud(nn.Module):
    """Breaks the graph until its class is prepared."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(self.hear(self.linear(x)))

    def hear(self, x):
        print("a graph break")
        return x


class Louder(Loud):
    pass


@pytest.fixture
def family(monkeypatch):
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry.families()))
    for table in ("_LIVE", "_PREPARED"):  # what other tests compiled and did not detach
        monkeypatch.setattr(preparation, table, {})
    yield register_family(Family("loud", modules=(f"{__name__}.Loud",), prepare=lambda model, patch: patch(type(model), "hear", lambda self, x: x)))
    assert in_force() == []


def test_what_two_models_share_is_changed_once_and_back_with_the_last(family):
    loud = Loud.hear
    first, second = prepare(Loud(), family), prepare(Loud(), family)
    assert first.changes == second.changes == in_force() == ["Loud.hear"]
    quiet = Loud.hear
    first.undo()
    assert Loud.hear is quiet is not loud and is_prepared(family)
    second.undo()
    assert Loud.hear is loud and not is_prepared(family) and in_force() == []


def test_a_hook_that_raises_leaves_nothing_changed(family, monkeypatch):
    def fails(model, patch):
        patch(Loud, "hear", None)
        patch(Loud, "no_such_name", None)

    bad, loud = Family("bad", modules=family.modules, prepare=fails), Loud.hear
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        prepare(Loud(), bad)
    assert Loud.hear is loud and not is_prepared(bad)


def test_models_that_exist_are_prepared_and_others_are_not(family):
    assert prepare_loaded().changes == []  # no model of the family yet
    model, other = Loud(), Louder()
    done = prepare_loaded()
    assert done.changes == ["Loud.hear"] and is_prepared(family)
    done.undo()
    del model, other


def test_a_graph_of_an_unprepared_family_says_so(family):
    model = Loud()
    with torch.no_grad():
        with pytest.warns(UserWarning, match="family loud, whose preparation was not run.*li_compile.compile"):
            torch.compile(model, backend=light_interaction, options=EAGER)(torch.randn(2, 8))
        compiled = li_compile.compile(model, li_compile.Config.from_options(EAGER))
        torch._dynamo.reset()
        last_report(new={})
        with pytest.warns(UserWarning) as told:
            compiled(torch.randn(2, 8))
        assert not any("preparation was not run" in str(w.message) for w in told)
        assert compiled.report().prepared == ["Loud.hear"]
        compiled.detach()


def test_the_name_prepares_what_it_finds(tmp_path):
    """As a user writes it: the model is made, then compiled by the backend's name, and nothing else is called."""
    script = textwrap.dedent(f"""
        import sys, torch
        sys.path[:0] = {[p for p in sys.path if p.endswith("tests")]!r}
        import test_preparation as t
        from li_compile.patterns import Family, register_family
        register_family(Family("loud", modules=("test_preparation.Loud",), prepare=lambda model, patch: patch(t.Loud, "hear", lambda self, x: x)))
        model = t.Loud()
        with torch.no_grad():
            fn = torch.compile(model, backend="light_interaction", options={EAGER!r}, fullgraph=True)
            x = torch.randn(2, 8)
            assert torch.equal(fn(x), model.linear(model.linear(x)))
        import li_compile
        print(li_compile.last_report().prepared)
    """)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.splitlines()[-1] == "['Loud.hear']"


class Framed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x)


@pytest.mark.filterwarnings("ignore:light_interaction found nothing to rewrite")
def test_a_compiled_model_reports_its_own_graphs_sparse_and_dense(monkeypatch):
    """Contexts below sparse.min_context have graphs of their own, and other models are compiled meanwhile."""
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry.families()))
    register_family(Family("framed", modules=(f"{__name__}.Framed",), arguments=lambda model, args, kwargs: (args, kwargs, args[0].shape[0])))
    compiled, other = (li_compile.compile(model, li_compile.Config.from_options(
        {"preset": "sparse", "lowering": "eager", "sparse.min_context": 8})) for model in (Framed(), nn.Linear(8, 8)))
    with torch.no_grad():
        torch._dynamo.reset()
        for frames in (4, 12):
            torch._dynamo.reset()
            compiled(torch.randn(frames, 8))
            other(torch.randn(frames, 8))
    assert len(compiled.report().graphs) == 2 == len(other.report().graphs)
    assert last_report() is other.report() is not compiled.report()
