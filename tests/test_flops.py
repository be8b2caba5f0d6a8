"""FlopCounterMode counts an operator of ours as it counts the same products in plain torch."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastgist import functional

M, D, H = 20, 48, 6


def count(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def backward(out):
    (out if isinstance(out, torch.Tensor) else torch.cat(out, -1)).sum().backward()


def both(ours, plain):
    return count(lambda: backward(ours())), count(lambda: backward(plain()))


@pytest.mark.parametrize("trained", ["x", "factors", "all"])
def test_cp_linear(trained):
    def leaf(*shape, of):
        return torch.randn(*shape).requires_grad_(trained in (of, "all"))

    x, u, v = leaf(M, D, of="x"), leaf(D, 4, of="factors"), leaf(D, 4, of="factors")
    weights = [torch.randn(D, D), torch.randn(D, D)]
    gains = torch.ones(2, 4)

    def plain():
        h = x @ u
        return [x @ w.T + (h * g) @ v.T for w, g in zip(weights, gains, strict=True)]

    ours, theirs = both(lambda: functional.cp_linear(x, weights, None, u, v, gains), plain)
    assert ours == theirs


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("trained", ["y", "x", "factors", "all"])
def test_cp_update(trained, inplace):
    def leaf(*shape, of):
        return torch.randn(*shape).requires_grad_(trained in (of, "all"))

    y, x, u, v = leaf(M, 2 * D, of="y"), leaf(M, D, of="x"), leaf(D, 4, of="factors"), leaf(D, 4, of="factors")
    gains = torch.ones(2, 4)

    def plain():
        h = x @ u
        return y + torch.cat([(h * g) @ v.T for g in gains], -1)

    ours, theirs = both(lambda: functional.cp_update(y * 1.0, x, u, v, gains, inplace=inplace), plain)
    assert ours == theirs


@pytest.mark.parametrize("trained", ["x", "weights", "all"])
def test_adapter(trained):
    def leaf(*shape, of):
        return torch.randn(*shape).requires_grad_(trained in (of, "all"))

    x, down, up = leaf(M, D, of="x"), leaf(H, D, of="weights"), leaf(D, H, of="weights")
    ours, theirs = both(
        lambda: functional.adapter(x, down, None, up, None), lambda: x + nn.functional.gelu(x @ down.T) @ up.T
    )
    assert theirs <= ours <= theirs + 2 * M * D * H  # where the hidden units are not kept they are formed again


def test_gist_linear_loss():
    hidden, gist = (torch.randn(M, D, requires_grad=True) for _ in range(2))
    weight, target = torch.randn(30, D), torch.randint(30, (M,))
    ours, theirs = both(
        lambda: functional.gist_linear_loss(hidden, gist, weight, None, target),
        lambda: functional.gist_loss(hidden @ weight.T, gist @ weight.T, target),
    )
    assert ours == theirs


def test_gist_linear_loss_that_forms_logits_twice():
    """Where the head's gradient is formed by blocks of classes in a second pass."""
    hidden, gist = (torch.randn(M, D).bfloat16().requires_grad_() for _ in range(2))
    weight, target = torch.randn(30, D).bfloat16().requires_grad_(), torch.randint(30, (M,))

    def ours(rows):
        return count(
            lambda: functional.gist_linear_loss(hidden, gist, weight, None, target, chunk_rows=rows).backward()
        )

    assert ours(4) == ours(M) + 2 * (2 * M) * D * 30
