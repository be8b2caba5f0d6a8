"""Mutants of PETAL and of what its layers share: (name, text, its replacement, why a test must notice)."""

from __future__ import annotations

from mutant_list import Mutant

__all__ = ["PETAL"]

_TESTS = ("tests/test_petal.py", "tests/test_petal_model.py", "tests/test_petal_gist.py")


def _mutants(file: str, tests: tuple[str, ...], *changes: tuple[str, str, str, str]) -> list[Mutant]:
    where = file.removeprefix("fastgist/").removesuffix(".py")
    return [
        Mutant(f"{where}: {name}", "cp_linear", file, old, new, why, interpret=False, tests=tests)
        for name, old, new, why in changes
    ]


PETAL = [
    *_mutants(
        "fastgist/reference/cp_linear.py",
        ("tests/test_cp_pieces.py",),
        (
            "every piece has the first one's gain",
            "gain[fold : fold + folds]",
            "gain[:folds]",
            "q, k and v have gains of their own",
        ),
        (
            "x U formed for every piece",
            "h = (drop or _dropped)(x @ u, dropout_p, seed) if h is None else h",
            "h = (drop or _dropped)(x @ u, dropout_p, seed)",
            "the products are counted",
        ),
    ),
    *_mutants(
        "fastgist/integrations/transformers/qformer_attention.py",
        _TESTS,
        (
            "keys for values",
            "shared.image[key[0]] = made[2 * i], made[2 * i + 1]",
            "shared.image[key[0]] = made[2 * i + 1], made[2 * i]",
            "which is which",
        ),
        (
            "every layer's keys are the first's",
            "made[2 * i], made[2 * i + 1]",
            "made[0], made[1]",
            "layers have gains of their own",
        ),
        (
            "factors in another order",
            "dict(zip(keys, factors, strict=True))",
            "dict(zip(keys, factors[::-1], strict=True))",
            "layers have gains of their own",
        ),
        (
            "recomputed layers draw their own masks",
            'given["image"], shared.seed)',
            'given["image"], None)',
            "one mask for the image tokens",
        ),
    ),
    *_mutants(
        "fastgist/petal/parts.py",
        _TESTS,
        (
            "padding in the gate",
            "mask = None if mask is None else mask[:, queries:] != 0",
            "mask = None",
            "a sample does not depend on its padding",
        ),
        (
            "the gate reads the queries",
            "self.experts.get_gate(y[:, queries:], mask)",
            "self.experts.get_gate(y[:, : y.shape[1] - queries], mask)",
            "the instruction's words",
        ),
    ),
    *_mutants(
        "fastgist/petal/query_gist.py",
        _TESTS,
        ("words not shifted", "target[:, 1:]", "target[:, :-1]", "a word is read from the state before it"),
        (
            "the token stays in the states",
            "kept = torch.cat((states[:, :start], states[:, stop:]), dim=1)",
            "kept = states[:, : states.shape[1] - self.config.length]",
            "the instruction's rows stay",
        ),
    ),
    *_mutants(
        "fastgist/petal/extras.py",
        _TESTS,
        (
            "the cross-attention's output transformed",
            "input_tensor if before is None else before",
            "input_tensor",
            "a is the self-attention's",
        ),
        ("the mean of what came out", "input_tensor[:, :1].mean", "y[:, :1].mean", "a is the self-attention's"),
    ),
    *_mutants(
        "fastgist/petal/losses.py",
        _TESTS,
        (
            "accumulated batches not weighed",
            '(part if name == "gist" else share * part)',
            "part",
            "num_items_in_batch",
        ),
    ),
    *_mutants(
        "fastgist/petal/parts.py",
        ("tests/test_petal.py",),
        (
            "narrowed under autocast",
            "self.experts(y, gate=gate).to(y.dtype)",
            "self.experts(y, gate=gate)",
            "float32 residuals",
        ),
    ),
    *_mutants(
        "fastgist/nn/threshold.py",
        ("tests/test_petal_counts.py",),
        (
            "a dense norm",
            "squares = (torch.matmul(torch.matmul(inner, core), outer) * core).sum((-2, -1))",
            "squares = (u @ core @ v.mT).square().sum((-2, -1))",
            "never a dense update",
        ),
    ),
    *_mutants(
        "fastgist/nn/cp.py",
        ("tests/test_petal_counts.py",),
        (
            "a product for each matrix",
            "return rows * self.lam",
            "return torch.stack([row * self.lam for row in rows])",
            "all gains from one",
        ),
    ),
    *_mutants(
        "fastgist/nn/moe.py",
        ("tests/test_petal_counts.py",),
        ("no residual scale", "residual_scale=UNIFORM_RESIDUAL", "residual_scale=1.0", "0.6 x"),
    ),
    *_mutants(
        "fastgist/peft/surgery.py",
        ("tests/test_petal_refusals.py",),
        (
            "nothing is given back",
            "        if known is None:\n            _state.end(plain, state)\n        raise\n    state.records",
            "        raise\n    state.records",
            "a refusal leaves the model untouched",
        ),
    ),
    *_mutants(
        "fastgist/nn/bottleneck.py",
        ("tests/test_bottleneck_study.py",),
        (
            "the score's sign",
            "result -= self._score(bank, points)",
            "result += self._score(bank, points)",
            "its direction",
        ),
    ),
]
