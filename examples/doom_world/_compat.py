"""The private PyTorch API that the example uses, with its versions and reason."""

from __future__ import annotations


def graphs_compiled() -> int:
    """Graphs that Dynamo has handed to a backend in this process (2.11 to 2.14: ``counters``; for a change only)."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]
