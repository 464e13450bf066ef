"""Examples as readers of spellings, tried on numbers when they are registered."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Node

from .attention_call import meaning
from .example import Example
from .spelling import Spelling

_SIZES = {"B": 2, "H": 3, "S": 5, "D": 4}
_KEYS = 7  # so that an example that mixes queries and keys up does not pass


def attention_example(name: str, example: Callable, layout: str, canonical: Callable | None = None) -> Callable:
    """The reader of ``register_attention(example=...)``. Raises ValueError if the example is not attention in that layout."""
    read = Example(example)
    numbers = [hole for hole, number in read.holes.items() if number]
    if list(read.holes)[:3] != ["q", "k", "v"] or (canonical is None and set(numbers) - {"scale"}):
        raise ValueError(f"the example of pattern {name!r} has the parameters {', '.join(read.holes)}; they must be q, k, v and then, with a "
                         "default, scale (others need canonical=)")
    if canonical is None:
        def canonical(q, k, v, scale=None):
            # An example without the parameter has its scale written out: 1, unless it says otherwise.
            return meaning(layout, 1 if "B" not in layout else 0, None, {"scale": scale if numbers else 1.0})(q, k, v)

    def inputs():
        sizes = {"q": _SIZES, "k": _SIZES | {"S": _KEYS}, "v": _SIZES | {"S": _KEYS}}
        random = torch.Generator().manual_seed(0)
        tensors = [torch.randn([s[letter] for letter in layout], generator=random, dtype=torch.float64) for s in sizes.values()]
        return (*tensors, *[0.3 + 0.1 * i for i in range(len(numbers))])

    return spelling_example(name, "attention", example, canonical, inputs, read)


def spelling_example(name: str, kind: str, example: Callable, canonical: Callable | None, check: Callable | None,
                     read: Example | None = None) -> Callable:
    """A reader: node -> Spelling or None. Its attribute ``example`` tells how near a node comes.

    Raises ValueError if example and canonical disagree on the inputs that ``check()`` gives.
    """
    read = read or Example(example)
    if canonical is None:
        raise ValueError(f"pattern {name!r} has an example and no canonical form")
    if check is not None:
        with torch.no_grad():
            given = check()
            want, got = example(*given), canonical(*given)
        if want.shape != got.shape or not torch.allclose(want, got, rtol=1e-4, atol=1e-6):
            far = f"by {float((want - got).norm() / want.norm()):.2g} (relative L2)" if want.shape == got.shape else \
                f"in shape: {tuple(want.shape)} and {tuple(got.shape)}"
            raise ValueError(f"pattern {name!r}: its example and its canonical form differ {far}")

    def reader(node: Node) -> Spelling | None:
        match = read.match(node)
        if not match.found:
            return None
        return Spelling(name, kind, match.nodes, [node], [match.bound[h] for h in read.holes], canonical)

    reader.example = read
    return reader
