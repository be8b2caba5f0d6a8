"""gist_linear_loss with a head that ranks share: statistics merged from parts of the vocabulary, and two processes (gloo)."""

from __future__ import annotations

import importlib
import itertools
import math
import re

import pytest
import torch
import torch.distributed as dist
from losses import evaluate, gradient_terms
from ranks import RANKS, on_two_ranks

from fastgist.functional import gist_linear_loss, gist_loss
from fastgist.ops import _row_state
from fastgist.reference.gist_linear_loss import gist_linear_loss as formula
from fastgist.reference.gist_loss import gist_loss as loss_formula
from fastgist.testing import assert_within_budget

# -- merging, in one process -------------------------------------------------------------------------------------------

INF, NAN = math.inf, math.nan


def merged(z, g, target, cuts, alpha=0.5, beta=0.75, detach=None, temperature=3.0, label_smoothing=0.0):
    """Row losses and gradients of logits (M, V) as ranks with the classes between ``cuts`` find them together."""
    classes, edges = z.shape[1], [0, *cuts, z.shape[1]]
    parts = [slice(a, b) for a, b in itertools.pairwise(edges)]
    soft = target.is_floating_point()
    rows = [
        _row_state.Rows(target[:, p] if soft else target, p.start, classes, p.stop - p.start, label_smoothing, -100)
        for p in parts
    ]
    states = [_row_state.state(z[:, p], g[:, p], r, temperature) for p, r in zip(parts, rows, strict=True)]
    whole = _row_state.merge(torch.stack(states), temperature)
    loss, e_p, e_q = _row_state.row_loss(whole, rows[0], alpha, beta, temperature)
    betas = (0.0 if detach == "logits" else beta, 0.0 if detach == "gist_logits" else beta)
    grads = [
        _row_state.gradients(z[:, p], g[:, p], whole, e_p, e_q, r, alpha, *betas, temperature)
        for p, r in zip(parts, rows, strict=True)
    ]
    cleared = [[r.cleared(x) for x in pair] for r, pair in zip(rows, grads, strict=True)]
    return loss, [torch.cat(side, dim=1) for side in zip(*cleared, strict=True)]


def check_merged(z, g, target, cuts, temperature=3.0, **options):
    options["temperature"] = temperature
    loss, grads = merged(z, g, target, cuts, **options)
    run = {"reduction": "none", **options}
    plain = evaluate(lambda a, b: loss_formula(a, b, target, **run), (z, g), [True, True])
    exact = evaluate(lambda a, b: loss_formula(a, b, target, **run), (z.double(), g.double()), [True, True])
    terms = float(exact[0].nan_to_num(0.0, 0.0, 0.0).abs().max()) + 1.0
    assert_within_budget(loss, plain[0], exact[0], what="loss", scale=terms)
    rows = exact[0].isfinite()  # the formula by autograd has no rule for the gradients of the others
    scale = max(gradient_terms(z[rows], g[rows], temperature), 1.0)
    for ours, p, e in zip(grads, plain[1], exact[1], strict=True):
        assert_within_budget(ours[rows], p[rows], e[rows], what="gradient", scale=scale)
    return loss, grads


@pytest.mark.parametrize("cuts", [(), (1,), (20,), (36,), (0, 37), (5, 5, 30)])
@pytest.mark.parametrize("temperature", [1.0, 2.5, 3.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_parts_of_any_size_make_the_whole(cuts, temperature, label_smoothing):
    z, g = torch.randn(9, 37) * 4, torch.randn(9, 37) * 4 + 30.0
    target = torch.randint(37, (9,))
    target[2] = -100
    z[2], g[2] = NAN, INF  # what an ignored row holds does not matter
    loss, grads = merged(z, g, target, cuts, temperature=temperature, label_smoothing=label_smoothing)
    assert loss[2] == 0 and all((x[2] == 0).all() for x in grads)
    kept = target != -100
    check_merged(z[kept], g[kept], target[kept], cuts, temperature, label_smoothing=label_smoothing)
    check_merged(z[kept], g[kept], torch.rand(8, 37).softmax(-1), cuts, temperature, label_smoothing=label_smoothing)


@pytest.mark.parametrize("options", [{"alpha": 0.0}, {"beta": 0.0}, {"detach": "logits"}, {"detach": "gist_logits"}])
def test_factors_and_detached_sides(options):
    z, g, target = torch.randn(6, 37), torch.randn(6, 37), torch.randint(37, (6,))
    check_merged(z, g, target, (10, 20), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_smoothed_labels_weigh_what_they_do_in_the_dtype_of_the_sums(dtype):
    """In float64 the label's 1 - 0.1 used to be that of float32: losses wrong by 2e-8."""
    target = torch.tensor([0, 36, 5, -100])
    weights = _row_state.Rows(target, 0, 37, 37, 0.1, -100).weights(torch.empty(4, 37, dtype=dtype))
    expected = torch.nn.functional.one_hot(target.clamp(min=0), 37).to(dtype) * (1.0 - 0.1) + 0.1 / 37
    assert torch.equal(weights[:3], expected[:3])


@pytest.mark.parametrize("cuts", [(), (4,), (10,), (3, 17)])
def test_absent_classes_and_bad_rows_follow_the_rules_of_the_whole(cuts):
    z, g, target = torch.randn(8, 21), torch.randn(8, 21), torch.zeros(8, dtype=torch.int64)
    z[1, 10:], g[1, 10:] = -INF, -INF  # a rank without a class that exists
    z[2, 12] = -INF  # absent on one side only: the divergence is infinite
    g[3, 5] = NAN
    z[4] = -INF
    g[5, 20] = INF
    z[6, 0] = -INF  # the label itself
    g[6, 0] = -INF
    z[7, 10:], g[7, 1] = -INF, NAN  # NaN goes before infinite
    whole = loss_formula(z.double(), g.double(), target, reduction="none")
    assert [float(x) if not x.isfinite() else 0.0 for x in whole][1:3] == [0.0, INF]
    loss, grads = check_merged(z, g, target, cuts)
    ours, of_op = (
        grads,
        evaluate(lambda a, b: gist_loss(a, b, target, reduction="none", impl="reference"), (z, g), [True, True]),
    )
    assert torch.equal(loss.isnan(), of_op[0].isnan()) and torch.equal(loss == INF, of_op[0] == INF)
    for row in (2, 3, 4, 5, 7):
        assert ours[0][row].isnan().all() and ours[1][row].isnan().all()


# -- two ranks ---------------------------------------------------------------------------------------------------------

ROWS, WIDTH, CLASSES = 11, 24, 37
CASES = {
    "plain": {},
    "T = 1": {"temperature": 1.0},
    "T = 2.5, smoothed": {"temperature": 2.5, "label_smoothing": 0.1, "t_squared": True},
    "chunks of 1": {"chunk_rows": 1},
    "chunks of 4, a sum": {"chunk_rows": 4, "reduction": "sum"},
    "row losses": {"chunk_rows": 3, "reduction": "none"},
    "no bias": {"bias": False},
    "frozen": {"frozen": True, "chunk_rows": 5},
    "uneven": {"cut": 1},
    "uneven the other way": {"cut": 36, "chunk_rows": 4},
    "a rank without a class": {"cut": 0},
    "soft": {"soft": True, "label_smoothing": 0.05},
    "detached": {"detach": "logits", "divisor": 7.5},
    "gist token without a loss": {"alpha": 0.0, "beta": 0.0},
    "told": {"told": True, "cut": 30},
    "shares": {"reduce_hidden": False},
    "bfloat16": {"dtype": torch.bfloat16, "chunk_rows": 4},
    "float16": {"dtype": torch.float16, "chunk_rows": 4},
    "float64": {"dtype": torch.float64},
}
OURS = ("chunk_rows", "reduce_hidden")


def problem(name: str):
    """(inputs, target, options, the classes of each rank, what of it trains)."""
    generator = torch.Generator().manual_seed(list(CASES).index(name))
    case = dict(CASES[name])
    dtype = case.pop("dtype", torch.float32)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    inputs = [randn(ROWS, WIDTH), randn(ROWS, WIDTH), randn(CLASSES, WIDTH) * WIDTH**-0.5, randn(CLASSES)]
    target = torch.randint(CLASSES, (ROWS,), generator=generator)
    target[3] = -100
    if case.pop("soft", False):
        target = torch.rand(ROWS, CLASSES, generator=generator).softmax(-1)
    if not case.pop("bias", True):
        inputs.pop()
    frozen = case.pop("frozen", False)
    cut = case.pop("cut", 20)
    wanted = [i < 2 or not frozen for i in range(len(inputs))]
    return inputs, target, case, ((0, cut), (cut, CLASSES)), wanted


def incoming(case: dict) -> torch.Tensor:
    return torch.linspace(0.5, 1.5, ROWS) if case.get("reduction") == "none" else torch.tensor(1.3)


def call(loss, target, options):
    return lambda h, g, w, *b: loss(h, g, w, b[0] if b else None, target, **options)


def work(rank: int) -> dict:
    found = {}
    for name in CASES:
        inputs, target, case, shares, wanted = problem(name)
        mine = slice(*shares[rank])
        local = inputs[:2] + [x[mine] for x in inputs[2:]]
        target = target[:, mine] if target.is_floating_point() else target
        if case.pop("told", False):
            case |= {"vocab_start": mine.start, "vocab_size": CLASSES}
        options = case | {"group": dist.group.WORLD}
        loss, grads = evaluate(call(gist_linear_loss, target, options), local, wanted, incoming(case))
        found[name] = {"loss": loss, "grads": grads}
    return found | others(rank)


def others(rank: int) -> dict:
    """What is no loss of the whole head: a group of one, errors."""
    alone = [dist.new_group([r]) for r in range(RANKS)]
    inputs, target, _, _, wanted = problem("plain")
    loss, grads = evaluate(call(gist_linear_loss, target, {"group": alone[rank]}), inputs, wanted)
    given, labels, _, shares, _ = problem("told")
    mine = slice(*shares[rank])
    told = {"group": dist.group.WORLD, "vocab_start": mine.start, "vocab_size": CLASSES}
    local = given[:2] + [x[mine] for x in given[2:]]
    compiled = torch.compile(call(gist_linear_loss, labels, told), fullgraph=True, backend="aot_eager")
    of_compiled = evaluate(compiled, local, [True] * 4, incoming({}))
    errors = {}

    def attempt(name: str, hidden=inputs[0], gist=inputs[1], labels=target, head=inputs[2], **options):
        try:
            gist_linear_loss(hidden, gist, head, None, labels, **{"group": dist.group.WORLD} | options)
        except (ValueError, RuntimeError, IndexError) as error:
            errors[name] = f"{type(error).__name__}: {error}"

    rows = ROWS - rank
    attempt("rows", inputs[0][:rows], inputs[1][:rows], target[:rows])
    attempt("option", temperature=1.0 + rank)
    attempt("reduction", reduction=("mean", "sum")[rank])
    attempt("divisor", divisor=3 + rank)
    attempt("reduce_hidden", reduce_hidden=rank == 0)
    attempt("gradient", inputs[0].clone().requires_grad_(rank == 0))
    attempt("impl", impl="triton")
    attempt("half told", vocab_start=0)
    attempt("outside", vocab_start=30, vocab_size=CLASSES)
    attempt("not in it", group=alone[1 - rank])
    attempt("target", labels=torch.full_like(target, 2 * CLASSES))  # each rank has CLASSES of them here
    wrong = target.clone()
    wrong[8] = 2 * CLASSES + rank
    attempt("target of one", labels=torch.where(torch.tensor(rank == 0), target, wrong), chunk_rows=3)
    attempt("targets differ", labels=target.roll(rank), chunk_rows=4)
    attempt("later chunk", labels=torch.where(wrong >= 2 * CLASSES, 2 * CLASSES, wrong), chunk_rows=3)
    other = inputs[1].clone()
    other[6, 2] += rank
    module = importlib.import_module("fastgist.ops.gist_linear_loss")
    module.DEBUG = True
    attempt("states differ", gist=other)
    loss_of_debug, _ = evaluate(call(gist_linear_loss, labels, told), local, [True] * 4)
    module.DEBUG = False
    soft = torch.rand(ROWS, CLASSES).softmax(-1)[:, mine]
    sent = {
        name: traffic(lambda y=y: evaluate(call(gist_linear_loss, y, told | {"chunk_rows": 4}), local, [True] * 4))
        for name, y in (("classes", labels), ("soft", soft))
    }
    results = {"alone": (loss, grads), "compiled": of_compiled, "debug": (loss_of_debug, of_compiled[1])}
    return {name: {"loss": x[0], "grads": x[1]} for name, x in results.items()} | {"errors": errors, "sent": sent}


def traffic(run) -> list[tuple[str, list[int]]]:
    """Each collective that ``run`` takes part in: its name and the shape of what this rank gives."""
    seen: list[tuple[str, list[int]]] = []
    names = ("all_gather_into_tensor", "all_gather", "all_reduce", "reduce_scatter", "broadcast", "barrier")
    originals = {n: getattr(dist, n) for n in names}

    def watched(name):
        def collective(*args, **kwargs):
            seen.append((name, list(args[1 if name == "all_gather_into_tensor" else 0].shape)))
            return originals[name](*args, **kwargs)

        return collective

    try:
        for name in names:
            setattr(dist, name, watched(name))
        run()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return seen


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_two_ranks(work, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_have_the_loss_and_the_gradients_of_the_whole_head(ranks, name):
    a, b = (r[name] for r in ranks)
    inputs, target, case, _, wanted = problem(name)
    assert torch.equal(a["loss"], b["loss"]), "the same bits on all ranks"
    case.pop("told", None)
    partial = not case.pop("reduce_hidden", True)
    grad = incoming(case)
    divisor = case.pop("divisor", None)
    if divisor:
        case["reduction"], grad = "sum", grad / divisor
    options = {k: v for k, v in case.items() if k not in OURS}
    unfused = lambda h, g, w, b=None: gist_loss(  # noqa: E731
        torch.nn.functional.linear(h, w, b), torch.nn.functional.linear(g, w, b), target, impl="reference", **options
    )
    plain = evaluate(unfused, inputs, wanted, grad)
    exact = evaluate(call(formula, target, options), [x.double() for x in inputs], wanted, grad)
    share = 1.0 / (divisor or 1.0)
    terms = 5.0 * (ROWS if case.get("reduction") == "sum" else 1)
    assert_within_budget(a["loss"], plain[0] * share, exact[0] * share, what="loss", scale=terms)
    for i, (p, e) in enumerate(zip(plain[1], exact[1], strict=True)):
        mine = a["grads"][i], b["grads"][i]
        if not wanted[i]:
            assert mine == (None, None)
            continue
        if i >= 2:
            ours = torch.cat(mine)
        elif partial:
            assert not torch.equal(*mine)
            ours = mine[0] + mine[1]
        else:
            assert torch.equal(*mine)
            ours = mine[0]
        if e is None:  # nothing of the loss reaches this input
            assert not ours.any()
        else:
            assert_within_budget(ours, p, e, what=f"gradient {i}")


def test_a_group_of_one_is_no_group(ranks):
    inputs, target, _, _, wanted = problem("plain")
    loss, grads = evaluate(call(gist_linear_loss, target, {}), inputs, wanted)
    for found in ranks:
        assert torch.equal(found["alone"]["loss"], loss)
        assert all(torch.equal(x, y) for x, y in zip(found["alone"]["grads"], grads, strict=True))


@pytest.mark.parametrize(("target", "numbers"), [("classes", 13), ("soft", 12)])
def test_one_all_gather_a_chunk_and_one_sum_a_gradient_of_hidden_states(ranks, target, numbers):
    """11 rows in chunks of 4: what a row costs is twelve numbers, and its class beside them."""
    gathers = [("all_gather_into_tensor", [numbers, rows]) for rows in (4, 4, 3)]
    sums = [("all_reduce", [ROWS, WIDTH])] * 2
    for found in ranks:
        assert [tuple(x) for x in found["sent"][target]] == gathers + sums


def test_told_its_share_a_rank_may_be_compiled_whole(ranks):
    for found in ranks:
        torch.testing.assert_close(found["compiled"], found["told"])
        torch.testing.assert_close(found["debug"]["loss"], found["told"]["loss"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rows", "ValueError: gist_linear_loss: the number of rows must be the same on all ranks .*: .11, 10."),
        ("option", "ValueError: gist_linear_loss: an option must be the same on all ranks"),
        ("reduction", "ValueError: gist_linear_loss: an option must be the same on all ranks"),
        ("divisor", "ValueError: gist_linear_loss: an option must be the same on all ranks"),
        ("reduce_hidden", "ValueError: gist_linear_loss: an option must be the same on all ranks"),
        ("gradient", "ValueError: gist_linear_loss: hidden.requires_grad must be the same on all ranks"),
        ("impl", "RuntimeError: gist_linear_loss: impl='triton' cannot run here: with a group"),
        ("half told", "ValueError: gist_linear_loss: vocab_start and vocab_size belong together"),
        ("outside", "ValueError: gist_linear_loss: rows 30 to 67 are not within a head of vocab_size 37"),
        ("not in it", "ValueError: gist_linear_loss: this process is not in the group"),
        ("target", r"IndexError: gist_linear_loss: target\[0\] is 74, and there are 74 classes"),
        ("target of one", r"ValueError: gist_linear_loss: target must be the same .* target\[8\] is \[\d+, 75\]"),
        ("targets differ", r"ValueError: gist_linear_loss: target must be the same .* target\[0\] is"),
        ("later chunk", r"IndexError: gist_linear_loss: target\[8\] is 74, and there are 74 classes"),
        (
            "states differ",
            "ValueError: gist_linear_loss: gist_hidden must be the same on all ranks .*, and row 6 is not",
        ),
    ],
)
def test_what_cannot_be_raises_on_both_ranks_and_hangs_on_none(ranks, name, message):
    for found in ranks:
        assert re.match(message, found["errors"][name]), found["errors"][name]


def test_shares_need_a_group():
    inputs, target, _, _, _ = problem("plain")
    with pytest.raises(ValueError, match="describe a group's shares, and there is no group"):
        gist_linear_loss(*inputs, target, vocab_start=0, vocab_size=2 * CLASSES)
