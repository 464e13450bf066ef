"""What HY-WorldPlay's rollout keeps in memory and when: idle weights elsewhere, chunks decoded while others are generated."""

from __future__ import annotations

import contextlib
import types

import pytest
import torch
from models import worldplay_rollout as reduced
from test_hy_rollout import compiled, quick, rollout  # noqa: F401
from test_policy import left_right

from li_compile.errors import ConfigError
from li_compile.patterns.families.hy_rollout import text_streams
from li_compile.patterns.parking import Parked


@pytest.fixture
def make(monkeypatch):
    return lambda chunks=3: (reduced.pipeline(monkeypatch, chunks), reduced.inputs(chunks, left_right()))


class Elsewhere:
    """Stands for a weight on a device that this machine may not have."""

    def __init__(self, device):
        self.device, self.data = device, self

    def to(self, device):
        return Elsewhere(device)


def test_parked_weights_are_elsewhere_inside_and_back_after_an_error(monkeypatch):
    module = torch.nn.Linear(8, 8)
    parked = Parked([module, torch.nn.Sequential(module)])
    assert parked.bytes == 4 * (64 + 8), "shared weights count once"
    weights = [Elsewhere("cuda:0"), Elsewhere("cuda:1")]
    monkeypatch.setattr(parked, "tensors", lambda: weights)
    with pytest.raises(KeyError), parked.away():
        assert [w.data.device for w in weights] == [torch.device("cpu")] * 2
        raise KeyError
    assert [w.data.device for w in weights] == ["cuda:0", "cuda:1"]


def test_the_text_streams_are_away_while_chunks_are_made(make, monkeypatch):
    pipe, given = make()
    want, inside = rollout(pipe, given), []
    names = {id(m): n for n, m in pipe.transformer.named_modules()}
    streams = [names[id(m)] for m in text_streams(pipe.transformer)]
    assert len(streams) == 2 * 6 + 3 and all(n.rpartition(".")[2].startswith(("txt_", "byt5_in", "vision_in")) for n in streams)

    @contextlib.contextmanager
    def away(self):
        """Weights that are not there give no numbers."""
        inside.append(self.bytes)
        before = [t.clone() for t in self.tensors()]
        for t in self.tensors():
            t.fill_(torch.nan)
        yield
        for t, old in zip(self.tensors(), before):
            t.copy_(old)

    monkeypatch.setattr(Parked, "away", away)
    with torch.compiler.set_stance("force_eager"):
        fast = compiled(pipe, preset="exact", offload=True)
        for _ in range(2):
            assert torch.allclose(rollout(fast, given), want, atol=1e-5)
        rollout(compiled(fast.detach(), preset="exact"), given)
    parameters = sum(p.numel() * p.element_size() for m in text_streams(pipe.transformer) for p in m.parameters())
    assert inside == [parameters] * 2


class Vae:
    """A causal decoder: each latent gives four frames but the first, which gives one; it keeps the latent before."""

    def __init__(self):
        self.config, self.decoded, self.whole = types.SimpleNamespace(scaling_factor=0.5, shift_factor=None), [], 0
        self.clear_cache()

    def clear_cache(self):
        self._feat_map, self._conv_idx = [None], [0]

    def decoder(self, z, feat_cache, feat_idx, first_chunk=False):
        before, feat_cache[feat_idx[0]] = feat_cache[feat_idx[0]], z.clone()
        self.decoded.append(z.shape[2])
        x = torch.sin(z) + (0 if before is None else 0.5 * before)
        return x if first_chunk else x.repeat_interleave(4, 2)

    def decode(self, z, return_dict=True, generator=None):
        self.whole += 1
        self.clear_cache()
        out = torch.cat([self.decoder(z[:, :, i:i + 1], self._feat_map, [0], i == 0) for i in range(z.shape[2])], 2)
        return (out,)


def streaming(pipe) -> Vae:
    pipe.vae, pipe.vae_dtype, pipe.vae_autocast_enabled = Vae(), torch.float16, False
    return pipe.vae


def test_chunks_are_decoded_as_they_are_made_and_the_frames_are_the_same(make):
    pipe, given = make()
    vae = streaming(pipe)
    decode = lambda latents: pipe.vae.decode(latents / 0.5, return_dict=False)[0]
    with torch.compiler.set_stance("force_eager"):
        fast = compiled(pipe, preset="exact", stream=True)
        for _ in range(2):
            vae.decoded.clear()
            latents = rollout(fast, given)
            assert vae.decoded == [1] * 12 and vae.whole == 0, "decoded before anyone asked"
            frames = decode(latents)
            assert vae.whole == 0 and frames.shape[2] == 1 + 4 * 11
        other = decode(latents + 1)
        assert vae.whole == 1 and not torch.equal(other, frames), "other latents are decoded afresh"
        rollout(fast, given)
        assert not torch.equal(decode(latents + 1), frames) and vae.whole == 2
    fast.detach()
    assert torch.equal(decode(latents), frames) and vae.whole == 3 and "decode" not in vars(vae)


def test_what_cannot_be_streamed_is_refused(make):
    pipe, _ = make()
    for tiles in (True, False):
        vae = streaming(pipe)
        vae.use_spatial_tiling = tiles
        pipe.enable_offloading = not tiles
        with pytest.raises(ConfigError, match="needs the VAE on the device"):
            compiled(pipe, preset="exact", stream=True)
        assert "decode" not in vars(vae)
