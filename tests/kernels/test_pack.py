"""Packing: order, padding, means, the encodings, and writing into a cache. One contract for all providers."""

import pytest
import torch

from li_compile.kernels import pack, pack_, use_provider
from li_compile.kernels._compat import has_triton, interpreting
from li_compile.kernels.encode import encode, why_not_encoded
from li_compile.kernels.layout import tile_order

GPU = torch.cuda.is_available() and not interpreting()
DTYPES = {"reference-cpu": (torch.float32, torch.bfloat16, torch.float64), "triton-cpu": (torch.float32, torch.float16),
          "triton-cuda": (torch.float32, torch.float16, torch.bfloat16)}  # fmt: skip
MARKS = {"triton-cpu": pytest.mark.skipif(not (has_triton() and interpreting()), reason="runs in the interpreter"),
         "triton-cuda": [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="needs a CUDA device")]}  # fmt: skip
BOUND = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}  # relative L2
BLOCK, SUB = 64, 4


@pytest.fixture(params=[pytest.param((key, dtype), id=f"{key}-{str(dtype)[6:]}", marks=MARKS.get(key, ()))
                        for key, dtypes in DTYPES.items() for dtype in dtypes])  # fmt: skip
def case(request):
    key, dtype = request.param
    name, device = key.split("-")
    with use_provider(name):
        yield dtype, device


def make(case, batch=2, frames=3, height=5, width=7, heads=2, dim=32):
    """x as models have it, strided; and the order of its tokens."""
    dtype, device = case
    x = torch.randn(batch, frames * height * width, heads, dim, device=device).to(dtype).transpose(1, 2)
    return x, tile_order(frames, height, width, (2, 2, 4), device)


def encoded(x, norm=None, eps=1e-6, cos=None, sin=None, camera=None):
    """The branches in fp64, written as models write them."""
    y = x.double()
    if norm is not None:
        y = (y / (y.square().mean(-1, keepdim=True) + eps).sqrt()).to(x.dtype).double() * norm.double()
    first = y
    if cos is not None:
        turned = torch.stack((-y[..., 1::2], y[..., ::2]), -1).flatten(-2)
        first = y * cos.double() + turned * sin.double()
    if camera is None:
        return first
    per_token = camera.double().repeat_interleave(x.shape[2] // camera.shape[1], 1)  # [B, L, 4, 4]
    second = torch.einsum("blij,bhlgj->bhlgi", per_token, y.unflatten(-1, (-1, 4))).flatten(-2)
    return torch.cat((first, second))


def check(packed, means, want, order, dtype):
    length = want.shape[2]
    rows = want if order is None else want[:, :, order]
    assert packed.dtype == dtype and packed.shape[2] % BLOCK == 0 and packed.shape[2] - length < BLOCK
    error = (packed[:, :, :length].double() - rows).norm() / rows.norm()
    assert error <= BOUND[dtype], f"relative L2 {error:.1e}"
    assert (packed[:, :, length:] == 0).all(), "padding is zero"
    size = BLOCK // SUB
    for i, mean in enumerate(means.unbind(2)):
        part = packed[:, :, i * size : min((i + 1) * size, length)].double()
        torch.testing.assert_close(mean.double(), part.mean(2) if part.shape[2] else torch.zeros_like(mean).double(), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("ordered", [True, False])
def test_order_padding_and_means(case, ordered):
    x, order = make(case)
    order = order if ordered else None
    packed, means = pack(x, order, BLOCK, SUB)
    check(packed, means, x.double(), order, case[0])
    exact = x if order is None else x[:, :, order]
    assert torch.equal(packed[:, :, : x.shape[2]], exact), "moved bit by bit"


def table(x, frames):
    length, dim = x.shape[2], x.shape[3]
    angle = torch.rand(length, dim // 2, device=x.device).repeat_interleave(2, 1) * 6
    camera = torch.randn(x.shape[0], frames, 4, 4, device=x.device)
    norm = torch.rand(dim, device=x.device).to(x.dtype) + 0.5
    return {"norm": norm, "cos": angle.cos(), "sin": angle.sin(), "camera": camera}


@pytest.mark.parametrize("parts", ["norm", "cos sin", "camera", "norm cos sin", "norm cos sin camera"])
def test_encodings(case, parts):
    x, order = make(case)
    given = {name: value for name, value in table(x, 3).items() if name in parts.split()}
    packed, means = pack(x, order, BLOCK, SUB, **given)
    assert packed.shape[0] == (4 if "camera" in parts else 2)
    check(packed, means, encoded(x, **given), order, case[0])


@pytest.mark.parametrize("parts", ["norm", "cos sin", "camera", "norm cos sin camera"])
def test_encode_alone(case, parts):
    """Tokens as they come: nothing is padded, and what lies behind the result is not touched."""
    x, _ = make(case)
    given = {name: value for name, value in table(x, 3).items() if name in parts.split()}
    got = encode(x, **given)
    want = encoded(x, **given)
    assert got.shape == want.shape and got.dtype == x.dtype and got.is_contiguous()
    assert (got.double() - want).norm() / want.norm() <= BOUND[case[0]]


def test_an_operator_like_any_other():
    x = torch.randn(2, 4, 6, 8).transpose(1, 2)
    tables = {"norm": torch.rand(8), "cos": torch.rand(4, 8), "sin": torch.rand(4, 8), "camera": torch.rand(2, 2, 4, 4)}
    torch.library.opcheck(torch.ops.li.encode.default, (x,), tables, test_utils=("test_schema", "test_faketensor"))
    assert encode(x[:, :, :0]).shape == (2, 6, 0, 8)
    with pytest.raises(ValueError, match="camera must be"):
        encode(x, camera=torch.rand(2, 3, 4, 4))
    why = why_not_encoded(x)
    assert (why is None) == interpreting() or "GPU" in why or "Triton" in why or "power of two" in why


def test_one_camera_a_frame_equals_one_a_token(case):
    x, order = make(case)
    camera = torch.randn(2, 3, 4, 4, device=x.device)
    each = camera.repeat_interleave(35, 1)
    torch.testing.assert_close(pack(x, order, BLOCK, SUB, camera=camera), pack(x, order, BLOCK, SUB, camera=each))


def test_cache_in_pieces_equals_at_once(case):
    """Segments written one by one, and one of them again, into a larger cache; nothing else is touched."""
    dtype, device = case
    segments = [make(case, frames=f) for f in (3, 1, 2)]
    whole = [pack(x, order, BLOCK, SUB) for x, order in segments]
    blocks = [packed.shape[2] // BLOCK for packed, _ in whole]
    room = sum(blocks) + 2
    cache = torch.full((2, 2, room * BLOCK, 32), 7.0, device=device).to(dtype)
    means = torch.full((2, 2, room * SUB, 32), 7.0, device=device, dtype=whole[0][1].dtype)
    stale = make(case, frames=1)
    at = 0
    for (x, order), n in zip(segments, blocks):
        if n == blocks[1]:
            pack_(cache, means, at, *stale, BLOCK, SUB)
        pack_(cache, means, at, x, order, BLOCK, SUB)
        at += n
    assert torch.equal(cache[:, :, : at * BLOCK], torch.cat([p for p, _ in whole], 2))
    assert torch.equal(means[:, :, : at * SUB], torch.cat([m for _, m in whole], 2))
    assert (cache[:, :, at * BLOCK :] == 7).all() and (means[:, :, at * SUB :] == 7).all()


def test_writes_through_compile():
    """As a graph has it: functionalised, and written into the caller's memory."""
    x, order = make((torch.float32, "cpu"))
    cache, means = torch.zeros(2, 2, 4 * BLOCK, 32), torch.zeros(2, 2, 4 * SUB, 32)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(cache, means, x):
        pack_(cache, means, 1, x * 2, order, BLOCK, SUB)
        return cache.sum()

    total = step(cache, means, x)
    packed, _ = pack(x * 2, order, BLOCK, SUB)
    assert torch.equal(cache[:, :, BLOCK : BLOCK + packed.shape[2]], packed) and total == cache.sum()


def test_expanded_and_empty(case):
    x, order = make(case, batch=1)
    both = x.expand(2, -1, -1, -1)
    packed, means = pack(both, order, BLOCK, SUB)
    assert torch.equal(packed[0], packed[1]) and torch.equal(means[0], means[1])
    packed, means = pack(x[:, :, :0], None, BLOCK, SUB)
    assert packed.shape[2] == means.shape[2] == 0


def test_wrong_arguments_say_what_is_wrong():
    x, order = make((torch.float32, "cpu"))
    camera = torch.zeros(2, 3, 4, 4)
    for args, more, words in (
        ((x, order[1:], BLOCK, SUB), {}, "order"),
        ((x, order, BLOCK, 5), {}, "sub-blocks must divide"),
        ((x, order, BLOCK, SUB), {"cos": torch.zeros(105, 32)}, "cos and sin go together"),
        ((x, order, BLOCK, SUB), {"cos": torch.zeros(1, 32), "sin": torch.zeros(1, 32)}, "cos and sin must be"),
        ((x, order, BLOCK, SUB), {"norm": torch.zeros(3)}, "norm must be"),
        ((x, order, BLOCK, SUB), {"camera": camera[:1]}, "camera must be"),
        ((x, order, BLOCK, SUB), {"camera": torch.zeros(2, 4, 4, 4)}, "F dividing 105 tokens"),
    ):
        with pytest.raises(ValueError, match=words):
            pack(*args, **more)
    with pytest.raises(ValueError, match="2 blocks of 64 at block 1 need"):
        pack_(torch.zeros(2, 2, 2 * BLOCK, 32), torch.zeros(2, 2, 2 * SUB, 32), 1, x, order, BLOCK, SUB)


def test_operators_are_well_formed():
    x, order = make((torch.float32, "cpu"))
    more = table(x, 3)
    torch.library.opcheck(pack, (x, order, BLOCK, SUB), more)
    packed, means = pack(x, order, BLOCK, SUB)
    torch.library.opcheck(pack_, (packed, means, 0, x, order, BLOCK, SUB))
