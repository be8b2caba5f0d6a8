"""Mutants of cp_update and of the layers that take it: (name, text, its replacement, why a test must notice)."""

from __future__ import annotations

from mutant_list import Mutant, kernel, op, reference

__all__ = ["CP_UPDATE"]

_LAYERS = ("tests/test_any_base.py",)
_HARD = ("tests/hard/test_hard_07_layers.py",)
_IN_CPP = ("tests/test_native_update.py", "tests/test_cp_update.py")


def _tuner(*rows: tuple[str, str, str, str]) -> list[Mutant]:
    file = "fastgist/nn/_tuner.py"
    return [Mutant(f"nn/_tuner: {n}", "cp_update", file, old, new, why, False, _LAYERS) for n, old, new, why in rows]


CP_UPDATE = [
    *kernel(
        "cp_update",
        ("y left out", "        if HAS_Y:\n", "        if HAS_Y and scale > 1e9:\n", "the base layer's output stays"),
        (
            "fold's columns from the first fold",
            "offs_n = fold * fold_n + offs_c",
            "offs_n = offs_c",
            "folds stand side by side",
        ),
        (
            "one gain for all folds",
            "gain = tl.load(gain_ptr + fold * stride_gg + offs_r * stride_gr, mask=mask_r, other=0.0)",
            "gain = tl.load(gain_ptr + offs_r * stride_gr, mask=mask_r, other=0.0)",
            "a row of gain for each fold",
        ),
        (
            "one gain for all folds, h read",
            "gain = tl.load(gain_ptr + fold * stride_gg + offs_q * stride_gr, mask=mask_q, other=0.0)",
            "gain = tl.load(gain_ptr + offs_q * stride_gr, mask=mask_q, other=0.0)",
            "a row of gain for each fold",
        ),
        ("scale left out", "        h = h * scale\n", "        h = h * 1.0\n", "scale"),
        (
            "scale left out, h read",
            "other=0.0).to(tl.float32) * scale",
            "other=0.0).to(tl.float32)",
            "scale at ranks above a tile",
        ),
        (
            "tiles beyond a part's own",
            "tl.minimum(first_tile + each, tiles)",
            "tl.minimum(first_tile + each + 1, tiles)",
            "in place a tile that two programs write has the update twice",
        ),
        ("tiles lost", "each = tl.cdiv(tiles, parts)", "each = tiles // parts", "tiles that no part has"),
        (
            "no inner mask",
            "mask_k = offs_k < K - first_k",
            "mask_k = offs_k < BLOCK_K",
            "K that is no multiple of the tile",
        ),
        (
            "strides of y for the result",
            "out_ptr + offs_m[:, None] * stride_om",
            "out_ptr + offs_m[:, None] * stride_ym",
            "y of any layout, and a contiguous result",
        ),
        (
            "strides of v swapped",
            "v_ptrs = v_ptr + offs_r[:, None] * stride_vr + offs_c[None, :] * stride_vn",
            "v_ptrs = v_ptr + offs_r[:, None] * stride_vn + offs_c[None, :] * stride_vr",
            "v of any layout",
        ),
        ("h not stored", "STORE_H=fused and h is not None", "STORE_H=False", "the backward reads h"),
        (
            "h of a second mask",
            "_update(y, None, None, v, gain, None, h, scale, 0.0, tf32, out)",
            "_update(y, None, None, v, None, None, h, scale, 0.0, tf32, out)",
            "the gain at ranks above a tile",
        ),
        (
            "dx of y's gradient without U",
            "_update(None, None, None, u, None, None, grad_h, 1.0, 0.0, tf32, grad_x)",
            "_update(None, None, None, u, None, None, grad_h, 2.0, 0.0, tf32, grad_x)",
            "dx = dL/dh U^T",
        ),
    ),
    *kernel(
        "cp_update",
        (
            "h's gradient left out where U is trained",
            "    need_grad_h = grad_h is not None and not known\n",
            "    need_grad_h = grad_h is not None and not known and grad_u is None\n",
            "dU = x^T dL/dh",
        ),
        (
            "dropout left out of dL/dh",
            "    elif need_grad_h:\n        project(dy, v, gain, seed, scale, dropout_p, tf32, grad_h)",
            "    elif need_grad_h:\n        project(dy, v, gain, None, scale, dropout_p, tf32, grad_h)",
            "the mask of the forward, where no one pass is taken",
        ),
        file="cp_linear_bwd",
    ),
    *reference(
        "cp_update",
        (
            "update not scaled",
            "torch.addmm(y, h, v, alpha=scale, out=out)",
            "torch.addmm(y, h, v, out=out)",
            "scale",
        ),
        (
            "half precision not scaled",
            "out[rows].copy_(torch.mm(h[rows], v).mul_(scale).add_(y[rows]))",
            "out[rows].copy_(torch.mm(h[rows], v).add_(y[rows]))",
            "scale, in half precision",
        ),
        (
            "float32 factors rounded",
            "torch.bfloat16 if x == factors == torch.bfloat16 else accumulate_dtype(x)",
            "torch.bfloat16 if x == torch.bfloat16 else accumulate_dtype(x)",
            "float32 factors are taken as they are",
        ),
        (
            "blocks of the first rows",
            "torch.mm(a[rows].to(b.dtype), b, out=h[rows])",
            "torch.mm(a[: rows.stop - rows.start].to(b.dtype), b, out=h[rows])",
            "each block has its rows",
        ),
        (
            "no dropout in the backward",
            "        grad_h = (drop or _dropped)(grad_h, dropout_p, seed)\n",
            "",
            "the mask of the forward",
        ),
        (
            "factors' gradients not scaled",
            "outer = _scaled(accumulate(outer), scale)",
            "outer = accumulate(outer)",
            "P_g = s dy_g^T h",
        ),
    ),
    *op(
        "cp_update",
        ("y's gradient lost", "return grad if ctx.needs_input_grad[0] else None,", "return None,", "dL/dy = dL/dy'"),
        ("not marked", "            ctx.mark_dirty(y)\n", "            pass\n", "autograd must know that y changed"),
        (
            "leaves overwritten",
            "if y.requires_grad and y.is_leaf:",
            "if False:",
            "a leaf is refused before it is written to",
        ),
        ("views taken", "if recorded and y._is_view():", "if False:", "views are refused where gradients are recorded"),
        (
            "always x kept",
            "            x if need_u else None,\n",
            "            x,\n",
            "x is kept for U's gradient alone",
        ),
    ),
    Mutant(
        "ops/cp_update: written where x is read",
        "cp_update",
        "fastgist/ops/cp_update.py",
        "alone = not (inplace and any(_share_memory(y, t) for t in (x, u, v, gain)))",
        "alone = True",
        "of y and x in one memory a program would read what another has written",
    ),
    *op(
        "cp_update",
        (
            "mask left out of h",
            "    if h is not None and seed is not None:\n",
            "    if False:\n",
            "V's gradient takes the units that were kept",
        ),
        (
            "dropped out twice",
            "again = (1.0 - dropout_p) if through_h and seed is not None else 1.0",
            "again = 1.0",
            "h has been divided by 1 - p already",
        ),
        (
            "past float16's range",
            "        if excess > 0:\n",
            "        if False:\n",
            "V times the gain may pass 65504",
        ),
        (
            "scale of the larger V'",
            "outer.mul_(again * (scale / factor_scale))",
            "outer.mul_(again)",
            "what was put into the scale is none of V's gradient",
        ),
        (
            "no mask in the backward",
            "seed if through_h else None",
            "None",
            "the mask of the forward",
        ),
        (
            "result left in the copy",
            "    if to is not out:\n",
            "    if False:\n",
            "rows that are not contiguous",
        ),
        (
            "half precision taken",
            "x.dtype != torch.float32 or ",
            "",
            "PyTorch's products are faster there",
        ),
        (
            "few rows taken",
            " or rows < 64:",
            ":",
            "the factors are packed for nothing",
        ),
        file="_native_update",
        tests=_IN_CPP,
    ),
    *op(
        "cp_update",
        (
            "strided rows copied",
            'if impl == "auto" and chosen == "native" and not (contiguous and _native_update.pays(x, rank, widest)):',
            'if impl == "auto" and chosen == "native" and not _native_update.pays(x, rank, widest):',
            "plain PyTorch writes into them without a copy",
        ),
        (
            "factors changed before the backward",
            "u, v, gain = (t.clone() if _share_memory(y, t) else t for t in (u, v, gain))",
            "pass",
            "what the backward reads was y's memory",
        ),
        tests=_IN_CPP,
    ),
    *op(
        "cp_linear",
        (
            "base left out of dx",
            "            grad_x = reference._plus_product(grad_x, grad, used)\n",
            "            grad_x = grad @ used if grad_x is None else grad_x\n",
            "dx = dy W + dL/dh U^T",
        ),
        (
            "update in C++ although W has it",
            "low_x, need_outer = need_x and not whole, need_v or need_gain",
            "low_x, need_outer = need_x, need_v or need_gain",
            "what W + dW has done is not done again",
        ),
        (
            "several weights in C++ by default",
            "and not (weights == 1 and _native_update.pays(a, rank, widest)):",
            "and not _native_update.pays(a, rank, widest):",
            "x U is formed once for all",
        ),
        (
            "few rows in C++ by default",
            "and not (weights == 1 and _native_update.pays(a, rank, widest)):",
            "and not weights == 1:",
            "the factors are packed for nothing",
        ),
        (
            "factors' gradients of the last weight",
            "grad_u = of_u if grad_u is None or of_u is None else grad_u.add_(of_u)",
            "grad_u = of_u",
            "dU is the sum over the weights",
        ),
        (
            "update of dx by the first weight alone",
            "        if low_x and later:\n",
            "        if False:\n",
            "dL/dh is the sum over the weights",
        ),
        (
            "every weight has all of the gains",
            "low, of_u, outer = _native_update.backward(grad, x, u, own, its, seed, h, *options)",
            "low, of_u, outer = _native_update.backward(grad, x, u, own, gain, seed, h, *options)",
            "a fold has its own gain",
        ),
        (
            "a backward in plain PyTorch",
            '    if impl == "native" and not empty:\n',
            '    if impl == "native" and not empty and len(grads) < 2:\n',
            "what was asked for by name is taken",
        ),
        (
            "pieces that Triton has not",
            'widths = [sum(sizes)] if backends.resolve(_OP, impl, x) == "triton" else sizes',
            "widths = [sum(sizes)]",
            "a compiler must know as many results as there are",
        ),
        (
            "float32 sums handed out for half precision",
            "(None if g is None else g.to(dtype) for g in (grad_u, grad_v, grad_gain))",
            "(grad_u, grad_v, grad_gain)",
            "a gradient has its input's dtype",
        ),
        tests=(*_IN_CPP, "tests/test_cp_linear.py", "tests/test_cp_pieces.py", *_HARD),
    ),
    *op(
        "cp_linear",
        (
            "no mask for later weights",
            "forward(grad_x, grad, folded, u, None, seed, scale, dropout_p, grad_x, None)",
            "forward(grad_x, grad, folded, u, None, None, scale, dropout_p, grad_x, None)",
            "one mask for all weights",
        ),
        file="_native_update",
        tests=("tests/test_cp_pieces.py",),
    ),
    *reference(
        "cp_linear",
        (
            "update of the whole gain",
            "update(y, x, u, own_v, own_gain, seed, scale, dropout_p, y, h if forms_h else None)",
            "update(y, x, u, own_v, gain, seed, scale, dropout_p, y, h if forms_h else None)",
            "a fold has its own gain",
        ),
        tests=("tests/test_temporary_memory.py", "tests/test_cp_pieces.py"),
    ),
    *op(
        "cp_update",
        (
            "overlapping rows taken",
            "if shape[i] > 1 and strides[i] <= reach:",
            "if shape[i] > 1 and strides[i] == 0:",
            "of two elements in one place one is lost",
        ),
        file="_low_rank",
    ),
    *_tuner(
        (
            "written under hooks",
            "    while not is_hooked(layer):\n",
            "    while True:\n",
            "a hook may have kept the output",
        ),
        (
            "written under everybody's hooks",
            "    if every_module._global_forward_hooks:\n        return False\n",
            "",
            "a hook on every module may have kept the output",
        ),
        (
            "written to any subclass's output",
            "return type(layer).forward is nn.Linear.forward or package in _KNOWN",
            "return True",
            "an activation keeps its output for the backward",
        ),
        (
            "never in place",
            "            and _gives_away(self.base_layer)\n",
            "            and False\n",
            "known layers' output is written to",
        ),
        (
            "plain for ever",
            "        return is_plain(self.base_layer)  # asked",
            "        return True  # asked",
            "a model may be quantised after it was wrapped",
        ),
        (
            "few rows of another layer's weight",
            "        if few and x.dtype == y.dtype:\n            return self._few_rows(y, x, factors)\n",
            "        if few and x.dtype == y.dtype:\n            return self._few_rows(y * 0.0, x, factors)\n",
            "the base layer's output stays",
        ),
    ),
]
