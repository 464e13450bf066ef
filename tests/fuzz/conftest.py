"""Random graphs, the same in every run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny operators gain nothing from threads and lose much where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fuzz():
    """fuzz(examples, check, **strategies): check(**drawn) -> what was checked, as text; at least so many must differ.

    A failure is shrunk and shown with what was drawn.
    """
    def run(examples: int, check, **strategies) -> None:
        seen: set[str] = set()

        @settings(max_examples=int(1.5 * examples), derandomize=True, database=None, deadline=None,
                  phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck))
        @given(**strategies)
        def each(**drawn):
            if len(seen) < examples:
                seen.add(check(**drawn))

        each()
        assert len(seen) >= examples, f"{len(seen)} different graphs of {examples}"

    return run
