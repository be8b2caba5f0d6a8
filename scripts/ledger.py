#!/usr/bin/env python3
"""What a training step of a ViT with GIST keeps for its backward, by module, before and after: writes docs/ledger.md.

python scripts/ledger.py                 ViT-B/16, two images, bfloat16, on the CPU: seconds
python scripts/ledger.py --width 192     another width
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

#: provider of benchmarks/train_step.py -> how the page calls it
COMPARED = {
    "authors": "the authors' expressions (attention in memory, softmax().log(), two head calls)",
    "plain": "the best of plain PyTorch (scaled_dot_product_attention, log_softmax)",
    "fastgist": "fastgist",
    "fastgist, hidden units again": 'fastgist, `set_grad_checkpointing("mlp")`',
}


def ledger(provider: str, case) -> dict[str, float]:
    """Bytes an image by module."""
    import torch

    from benchmarks import train_step
    from fastgist.train.ledger import saved_tensor_ledger

    step = train_step.PROVIDERS[provider](case, torch.device("cpu"))
    found = saved_tensor_ledger(step.model, lambda: step.loss(step.images, step.target))
    return {path: size / case["B"] for path, size in found.items()}


def page(case, found: dict[str, dict[str, float]]) -> str:
    from benchmarks import train_step

    lines = [
        "# What a training step keeps for its backward",
        "",
        f"{train_step.describe(case)}, GIST's shared adapter (bottleneck {train_step.BOTTLENECK}) and a gist token, bfloat16; "
        'MiB an image, parameters not counted. A "*" stands for all blocks. Written by `python scripts/ledger.py`, which',
        "reads autograd's saved tensors (`fastgist.train.ledger.saved_tensor_ledger`); the same on a CPU and a GPU but for",
        "what an attention kernel keeps beside its operands.",
        "",
    ]
    for provider, sizes in found.items():
        total = sum(sizes.values())
        lines += [f"## {COMPARED[provider]}: {total / 2**20:.3g}", "", "| kept in | MiB |", "|---|---|"]
        rest = 0.0
        for path, size in sizes.items():
            if size >= 0.005 * total:
                lines.append(f"| `{path}` | {size / 2**20:.2f} |")
            else:
                rest += size
        lines += [f"| the rest | {rest / 2**20:.2f} |", ""]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768, help="192, 384, 768 or 1024 (default 768)")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--size", type=int, default=224, help="pixels a side (default 224)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "ledger.md")
    args = parser.parse_args(argv)
    import torch

    from benchmarks.cases import case

    shape = case(torch.bfloat16, B=2, S=args.size, D=args.width, L=args.layers)
    args.out.write_text(page(shape, {provider: ledger(provider, shape) for provider in COMPARED}))
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
