"""Every way to spread a model gives the unsplit result; lost or repeated pieces are refused."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import cgpt_kernels as ck
from cgpt_kernels.wafer import split
from cgpt_kernels.wafer.split import Piece


@given(parts=st.integers(1, 9))
def test_tensor_parallel_feed_forward_is_the_whole_one(parts):
    x, up, down = torch.randn(5, 12), torch.randn(30, 12), torch.randn(12, 30)
    wanted = F.gelu(x @ up.t()) @ down.t()
    torch.testing.assert_close(split.feed_forward(x, up, down, F.gelu, parts), wanted)


@pytest.mark.parametrize("parts", [1, 3, 7])
def test_a_gated_feed_forward_and_its_gradients_are_the_whole_ones(parts):
    leaves = [torch.randn(s, requires_grad=True) for s in ((5, 12), (30, 12), (12, 30), (30, 12))]
    x, up, down, gate = leaves
    wanted = (F.silu(x @ gate.t()) * (x @ up.t())) @ down.t()
    found = split.feed_forward(x, up, down, F.silu, parts, gate)
    torch.testing.assert_close(found, wanted)
    dy = torch.randn_like(wanted)
    for ours, true in zip(
        torch.autograd.grad(found, leaves, dy), torch.autograd.grad(wanted, leaves, dy), strict=True
    ):
        torch.testing.assert_close(ours, true)


@pytest.mark.parametrize("micro_batches", [1, 2, 5, 8])
def test_a_pipeline_of_blocks_is_the_model(micro_batches):
    config = ck.GPTConfig(vocab_size=11, n_positions=8, n_embd=16, n_layer=3, n_head=2)
    blocks = ck.GPT(config).eval().transformer.h
    x = torch.randn(8, 6, 16)
    with torch.no_grad():
        wanted = x
        for block in blocks:
            wanted = _output(block(wanted, None, None))
        stages = [lambda h, block=block: _output(block(h, None, None)) for block in blocks]
        found, schedule = split.pipeline(x, stages, micro_batches)
    torch.testing.assert_close(found, wanted)
    assert len(schedule) == 3 + micro_batches - 1
    assert sum(map(len, schedule)) == 3 * micro_batches


def _output(result):
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_ring_attention_is_attention(parts, causal):
    q, k, v = torch.randn(3, 2, 3, 14, 8)
    wanted = ck.ops.attention(q, k, v, causal=causal, backend="eager")
    torch.testing.assert_close(split.ring_attention(q, k, v, parts, causal=causal), wanted)


@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
def test_streaming_does_one_axpy_per_nonzero(density):
    x, weight = torch.randn(4, 20), torch.randn(9, 20)
    weight = weight * (torch.rand(9, 20) < density)
    for columns in (1, 3, 20):
        y, count = split.stream_product(x, weight, columns)
        torch.testing.assert_close(y, x @ weight.t())
        assert count == int((weight != 0).sum())


@given(rows=st.integers(1, 6), tokens=st.integers(0, 60))
def test_the_shifted_cache_stays_balanced_and_in_order(rows, tokens):
    cache = split.ShiftedCache(rows, 10)
    for token in range(min(tokens, 10 * rows)):
        cache.append(token)
        held = [len(r) for r in cache.rows]
        assert max(held) - min(held) <= 1 and max(held) <= 10
        assert cache.entries() == list(range(token + 1))
    if tokens >= 10 * rows:
        with pytest.raises(MemoryError, match="rows of cores hold 10 entries"):
            cache.append(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 5])
def test_decoding_over_the_shifted_cache_is_attention(rows, dtype):
    B, H, T, D = 2, 3, 11, 8
    q, k, v = (torch.randn(B, H, T, D).to(dtype) for _ in range(3))
    cache = split.ShiftedCache(rows, 4)
    eager = ck.ops.attention(q, k, v, causal=True, backend="eager").double()
    truth = ck.ops.attention(q.double(), k.double(), v.double(), causal=True, backend="eager")
    allowed = 2 * (eager - truth).abs().max() + 1e-6 * truth.abs().max()
    for token in range(T):
        if token == 4 * rows:
            break
        cache.append((k[:, :, token], v[:, :, token]))
        found = cache.attention(q[:, :, token]).double()
        assert (found - truth[:, :, token]).abs().max() <= allowed


MERGES = (split.merge_sum, lambda pieces: split.merge_concat(pieces, 0))


def sealed():
    return [Piece(a, a + 3, 9, torch.full((3,), float(a))) for a in (0, 3, 6)]


@pytest.mark.parametrize(
    "spans",
    [
        [(0, 3)],  # lost at the end
        [(3, 6), (6, 9)],  # lost at the beginning
        [(0, 3), (6, 9)],  # lost within
        [(0, 3), (0, 3), (6, 9)],  # repeated in place of another
        [(0, 3), (3, 6), (3, 6), (6, 9)],  # repeated
        [(0, 5), (4, 9)],  # overlapping
        [(0, 9), (3, 6)],  # within another
        [(0, 3), (3, 6), (6, 12)],  # beyond the end
        [(0, 3), (3, 3), (3, 9)],  # empty
        [(0, 3), (2, 3), (5, 8), (6, 8)],  # count, sum and sum of squares are those of 0:9
        [],
    ],
    ids=str,
)
def test_pieces_that_do_not_cover_their_axis_once_are_refused(spans):
    pieces = [Piece(a, b, 9, torch.zeros(b - a)) for a, b in spans]
    for merge in MERGES:
        with pytest.raises(ValueError, match=r"no pieces|do not cover 0:9 once"):
            merge(pieces)


@pytest.mark.parametrize("a, b", [(0, 1), (1, 2), (0, 2)])
def test_pieces_whose_values_or_places_are_exchanged_are_refused(a, b):
    values, places = sealed(), sealed()
    values[a], values[b] = (
        replace(values[a], value=values[b].value),
        replace(values[b], value=values[a].value),
    )
    places[a], places[b] = (
        replace(places[a], start=places[b].start, stop=places[b].stop),
        replace(places[b], start=places[a].start, stop=places[a].stop),
    )
    for merge in MERGES:
        merge(sealed()[::-1])  # they may come in any order
        for pieces in (values, places):
            with pytest.raises(ValueError, match="is not what was sealed"):
                merge(pieces)


def test_a_value_that_changed_on_its_way_is_refused():
    for dtype in (torch.float32, torch.bfloat16):
        pieces = [
            Piece(a, a + 3, 9, (torch.ones(2, 3), torch.ones(3, dtype=dtype))) for a in (0, 3, 6)
        ]
        split.check_cover(pieces)
        pieces[1].value[1][2] = -1
        with pytest.raises(ValueError, match="piece 3:6 of 9 is not what was sealed"):
            split.check_cover(pieces)


def test_pieces_of_different_axes_are_refused():
    pieces = [Piece(0, 3, 6, torch.zeros(3)), Piece(3, 6, 9, torch.zeros(3))]
    with pytest.raises(ValueError, match="pieces 0:3 of 6, 3:6 of 9 do not cover 0:6 once"):
        split.check_cover(pieces)
