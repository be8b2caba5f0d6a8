"""The formulas in plain PyTorch: the oracle of every test, and the path taken where no kernel runs.

Each module holds, for one operation:

- a function named like the operation: the formula, differentiable by autograd, written to be checked against the paper.
  It computes in float32 (float64 for float64) and never calls a kernel. Tests hold every implementation against it.
- ``forward`` (and ``backward`` where the gradients do not come with it): the same mathematics with hand-derived
  gradients and the fewest passes that eager PyTorch allows. This is what ``impl="reference"`` runs.
"""

import sys

from fastgist._later import modules_of

__getattr__, __dir__ = modules_of(sys.modules[__name__])
