"""What the tests of topk_kl share: a student, a teacher of whom k classes are known, and the formula by dense expansion."""

from __future__ import annotations

import torch
from losses import check_against_float64, evaluate

from fastgist.functional import topk_kl
from fastgist.recipes.mutual import topk_of
from fastgist.reference.topk_kl import sparse_teacher
from fastgist.reference.topk_kl import topk_kl as formula


def case(rows, classes, known, dtype=torch.float32, device="cpu", temperature=1.0, likeliest=True):
    """A student's logits, and a teacher's log-probabilities of the classes it finds likeliest, or least likely."""
    z = (torch.randn(rows, classes, device=device) * 3).to(dtype)
    log_probs, indices = topk_of(torch.randn(rows, classes, device=device).double() * 3, classes, temperature)
    part = slice(known) if likeliest else slice(classes - known, None)
    return z, log_probs[:, part].float(), indices[:, part]


def expanded(z, t, i, *, temperature=1.0, direction="both", reduction="batchmean", mask=None, t_squared=False):
    """Row by row: probabilities of all classes, those of the others added up, and KL as the sum that defines it."""
    rows = []
    for row, log_q, classes in zip(z.flatten(0, -2), t.flatten(0, -2), i.flatten(0, -2).tolist(), strict=True):
        probs, q = (row / temperature).softmax(-1), log_q.to(row.dtype).exp()
        others = [c for c in range(len(row)) if c not in set(classes)]
        if others:
            q = torch.cat((q, 1 - q.sum(0, keepdim=True)))
        p = torch.stack([probs[c] for c in classes] + [probs[others].sum()][: len(others)])
        kl = {"reverse": (p * (p / q).log()).sum(), "forward": (q * (q / p).log()).sum()}
        rows.append(kl["reverse"] + kl["forward"] if direction == "both" else kl[direction])
    loss = torch.stack(rows).view(z.shape[:-1]) * (temperature**2 if t_squared else 1)
    loss = loss if mask is None else loss * mask
    counted = loss.numel() if mask is None else int(mask.sum())
    return {"none": loss, "sum": loss.sum()}.get(reduction, loss.sum() / counted)


def expected(z, *args, **options):
    """The exact value by expansion; in the student's own dtype, the formula in plain torch."""
    return (expanded if z.dtype == torch.float64 else formula)(z, *args, **options)


def scales(z, t, i, temperature):
    """Sums of absolute terms: (p + q)(|log p| + |log q|) of a row, p (|d| + E|d|) + p + q of a gradient."""
    log_p = (z.double() / temperature).log_softmax(-1)
    log_q, i, log_rest = sparse_teacher(t.double(), i, z.shape[-1])
    others = log_p.scatter(-1, i, -torch.inf).logsumexp(-1, keepdim=True)
    both = [torch.cat((log_p.gather(-1, i), others), -1), torch.cat((log_q, log_rest[..., None]), -1)]
    size = sum(x.abs().nan_to_num(0.0, 0.0, 0.0) for x in both)
    p, q = (x.exp() for x in both)
    gradient = p * (size + (p * size).sum(-1, keepdim=True)) + p + q
    return {"scale": float(((p + q) * size).sum(-1).max()), "grad_scale": float(gradient.max()) / temperature}


def check(impl, z, t, i, *, grad=None, factor=1.0, temperature=1.0, **options):
    found = {name: factor * value for name, value in scales(z, t, i, temperature).items()}
    return check_against_float64(
        lambda a, **k: topk_kl(a, t, i, impl=impl, **k),
        lambda a, **k: expected(a, t.to(a.device), i.to(a.device), **k),
        (z,),
        grad=grad,
        temperature=temperature,
        **found,
        **options,
    )


def rows_of(impl, z, t, i, **options):
    loss, (grad,) = evaluate(lambda a: topk_kl(a, t, i, reduction="none", impl=impl, **options), (z,), (True,))
    return loss, grad
