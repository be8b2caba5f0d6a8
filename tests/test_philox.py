"""The dropout rule: Philox4x32-10 against published vectors, and every implementation's mask against the rule."""

from __future__ import annotations

import pytest
import torch

from fastgist.functional import cp_linear
from fastgist.reference.philox import keep_mask, philox4x32, threshold

OP = "cp_linear"

# Known answers of philox4x32-10 as Random123 publishes them: counter, key, words.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_known_answers(counter, key, words):
    got = philox4x32(tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor(k) for k in key))
    assert tuple(int(w) for w in got) == words


def test_threshold_is_the_rate():
    assert threshold(0.0) == 0 and threshold(0.5) == 2**30 and threshold(1.0 - 1e-12) == 2**31 - 1


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_mask_has_the_rate_and_no_pattern(p):
    keep = keep_mask(torch.tensor([1234567]), (2000, 64), p).double()
    sigma = (p * (1 - p) / keep.numel()) ** 0.5
    assert abs(float(keep.mean()) - (1 - p)) < 5 * sigma
    centred = keep - keep.mean()
    for shift in ((1, 0), (0, 1), (0, 4), (1, 1)):  # neighbours are uncorrelated
        product = (centred * centred.roll(shift, (0, 1))).mean() / centred.square().mean()
        assert abs(float(product)) < 5 / keep.numel() ** 0.5


def test_mask_depends_on_the_whole_seed():
    shape = (50, 20)
    base = keep_mask(torch.tensor([7]), shape, 0.5)
    assert torch.equal(base, keep_mask(torch.tensor([7]), shape, 0.5))
    for other in (8, 7 + 2**32, -7):
        assert 0.4 < float((base != keep_mask(torch.tensor([other]), shape, 0.5)).double().mean()) < 0.6


@pytest.mark.parametrize("rank", [1, 3, 4, 17, 64])
@pytest.mark.parametrize("seed", [0, 5, -(2**62) - 3])
def test_every_implementation_draws_the_same_mask(impl, device, rank, seed):
    """With W = 0, U = 1 and V picking one unit, the output is the mask itself."""
    rows, p = 37, 0.4
    seed = torch.tensor([seed], device=device)
    x = torch.ones(rows, 16, device=device)
    u = torch.full((16, rank), 1 / 16, device=device)
    weight, v = torch.zeros(rank, 16, device=device), torch.eye(rank, device=device)
    y = cp_linear(x, weight, None, u, v, dropout_p=p, training=True, seed=seed, impl=impl)
    keep = keep_mask(seed, (rows, rank), p)
    torch.testing.assert_close(y, keep / (1 - p))
