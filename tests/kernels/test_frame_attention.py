"""Attention over listed frames, against dense attention over the frames selected by hand."""

import pytest
import torch
import torch.nn.functional as F

import li_compile.kernels.frame_attention  # noqa: F401  (registers the operator)

TEXT, CONTEXT, CURRENT = 0, 1, 2
BOUND = {torch.float32: 1e-5, torch.bfloat16: 5e-3}


def segments(lengths, dtype=torch.float32, queries=24, heads=3, dim=16):
    make = lambda n: torch.randn(2, heads, n, dim).to(dtype)
    return make(queries), [make(n) for n in lengths], [make(n) for n in lengths]


def by_hand(q, k, v, at, frames, tokens, scale):
    entries = (frames[:, None] * tokens + torch.arange(tokens)).flatten()
    join = lambda x: torch.cat([s.index_select(2, entries) if i == at else s for i, s in enumerate(x)], 2).double()
    return F.scaled_dot_product_attention(q.double(), join(k), join(v), scale=scale)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize(
    ("lengths", "roles", "tokens", "block"),
    [
        ((5, 96, 24), (TEXT, CONTEXT, CURRENT), 16, 16),  # in place; text and current padded to blocks
        ((96, 24), (CONTEXT, CURRENT), 32, 16),  # frames of two blocks
        ((5, 96, 24), (TEXT, CONTEXT, CURRENT), 12, 16),  # blocks do not divide frames: copied
        ((96,), (CONTEXT,), 16, 16),  # nothing but context
    ],
)
def test_listed_frames_are_all_that_is_read(dtype, lengths, roles, tokens, block):
    q, k, v = segments(lengths, dtype)
    at = roles.index(CONTEXT)
    for kept in ([0], [1, 2], list(range(96 // tokens))):
        frames = torch.tensor(kept)
        dropped = [i for i in range(96 // tokens) if i not in kept]
        for x in (k, v):  # whatever dropped frames hold
            x[at] = x[at].clone()
            x[at].unflatten(2, (-1, tokens))[:, :, dropped] = torch.nan
        got = torch.ops.li.frame_attention(q, k, v, list(roles), frames, tokens, block, 0.3)
        want = by_hand(q, k, v, at, frames, tokens, 0.3)
        assert got.dtype == dtype and got.is_contiguous()
        assert ((got.double() - want).norm() / want.norm()).item() <= BOUND[dtype]
        q, k, v = segments(lengths, dtype)


def test_strided_caches_give_the_same():
    q, k, v = segments((8, 64, 16))
    frames = torch.tensor([0, 3])
    turned = [[x.transpose(1, 2).contiguous().transpose(1, 2) for x in s] for s in (k, v)]
    a = torch.ops.li.frame_attention(q, k, v, [0, 1, 2], frames, 16, 16, 0.3)
    b = torch.ops.li.frame_attention(q.transpose(1, 2).contiguous().transpose(1, 2), *turned, [0, 1, 2], frames, 16, 16, 0.3)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_operator_is_sound():
    q, k, v = segments((8, 32, 16))
    torch.library.opcheck(torch.ops.li.frame_attention.default, (q, k, v, [0, 1, 2], torch.tensor([1]), 16, 16, 0.3))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"roles": [0, 0, 2]}, "one of them context"),
        ({"roles": [1, 2]}, "same segments"),
        ({"tokens": 7}, "no whole frames of 7"),
        ({"frames": torch.tensor([0, 1, 2])}, r"int64 \[1 ... 2\]"),
        ({"frames": torch.tensor([0], dtype=torch.int32)}, "int32"),
        ({"q": torch.zeros(2, 3, 24, 8)}, "head_dim"),
    ],
)
def test_errors(change, words):
    q, k, v = segments((8, 32, 16))
    given = {"q": q, "k": k, "v": v, "roles": [0, 1, 2], "frames": torch.tensor([0]), "tokens": 16} | change
    with pytest.raises(ValueError, match=words):
        torch.ops.li.frame_attention(*given.values(), 16, 0.3)
