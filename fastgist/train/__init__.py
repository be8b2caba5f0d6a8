"""Training runs: ``fastgist finetune`` (:mod:`fastgist.train.finetune`) and ``fastgist demo``
(:mod:`fastgist.train.demo`) over one loop (:mod:`fastgist.train.engine`); comparisons
(:mod:`fastgist.train.compare`); export (:mod:`fastgist.train.export`). For other loops: :func:`parameter_groups`."""

import sys

from fastgist._later import modules_of
from fastgist.train.optim import parameter_groups

__all__ = ["parameter_groups"]

__getattr__, __dir__ = modules_of(sys.modules[__name__])
