"""Adapters to other libraries. Each module is imported only when a model of that library is met."""

import sys

from fastgist._later import modules_of

__getattr__, __dir__ = modules_of(sys.modules[__name__])
