"""Mutants of the choice among cp_linear's forms. See scripts/mutants.py."""

from __future__ import annotations

from mutant_list import kernel, reference

PLAN = [
    *reference(
        "cp_linear",
        (
            "x U is free where nobody asks for it",
            "return rows * (out + alone) >= 1.3 * inner * out",
            "return rows * out >= 1.3 * inner * out",
            "the merged form spares it",
        ),
        tests=("tests/test_cp_linear_plan.py",),
    ),
    *kernel(
        "cp_linear",
        (
            "a last wave costs its share of the card",
            "waves = cdiv(tiles, c.processors)",
            "waves = tiles / c.processors",
            "half a wave takes as long as a whole one",
        ),
        (
            "no pass over y to add the update",
            "found + _added(c, s, several)",
            "found",
            "the library's result is read and written once more",
        ),
        file="cp_linear_cost",
        tests=("tests/test_cp_linear_plan.py",),
    ),
    *kernel(
        "cp_linear",
        (
            "a form of the table that cannot run",
            "return next(form for form in order if can(form, x, weights, rank, tf32, forward=forward))",
            "return order[0]",
            "an entry is for all shapes of its class",
        ),
        (
            "descriptors on the model's word",
            "if form not in MEASURED_ONLY)",
            "if form)",
            "not before a card has shown them right",
        ),
        file="cp_linear_plan",
        tests=("tests/test_cp_linear_plan.py",),
    ),
    *kernel(
        "cp_linear",
        (
            "the library's narrow product without gain",
            "folded_v(b, gain, columns // fold_n)",
            "folded_v(b, None, columns // fold_n)",
            "each fold by its gain",
        ),
        (
            "the library's narrow product of the first rows",
            "rows = folded[first : first + a.shape[1]]",
            "rows = folded[: a.shape[1]]",
            "each piece by its rows",
        ),
        file="cp_linear_project",
        tests=("tests/test_cp_linear_plan.py::test_a_narrow_product_by_the_library",),
    ),
    *kernel(
        "cp_linear",
        (
            "the tile of the first piece",
            "not all(map(aligned, (*given, *weights)))",
            "not all(map(aligned, (given[0], *weights)))",
            "one piece that goes through registers is enough",
        ),
        file="cp_linear_plan",
        tests=(
            "tests/test_cp_linear_plan.py::test_a_piece_that_cannot_be_fetched_16_bytes_at_a_time_takes_the_ragged_tile",
        ),
    ),
    *kernel(
        "cp_linear",
        (
            "an expanded number counts as aligned",
            "1 in t.stride() and all(",
            "all(",
            "it is fetched number by number",
        ),
        (
            "rows that overlap described",
            "t.stride(0) >= t.shape[1]",
            "t.stride(0) >= 0",
            "CUDA takes no such descriptor",
        ),
        file="cp_linear_forms",
        tests=(
            "tests/test_cp_linear_forms.py::test_what_a_form_asks",
            "tests/test_cp_linear_forms.py::test_what_tensor_descriptors_ask",
        ),
    ),
]
