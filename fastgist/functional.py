"""The operations as functions. Each takes ``impl=`` (see :mod:`fastgist.backends`) and works on any device."""

from fastgist.ops.adapter import adapter
from fastgist.ops.bidirectional_kl import bidirectional_kl
from fastgist.ops.cp_linear import cp_linear
from fastgist.ops.cp_update import cp_update
from fastgist.ops.gelu import gelu
from fastgist.ops.gist_linear_loss import gist_linear_loss
from fastgist.ops.gist_loss import gist_loss
from fastgist.ops.topk_kl import topk_kl

__all__ = ["adapter", "bidirectional_kl", "cp_linear", "cp_update", "gelu", "gist_linear_loss", "gist_loss", "topk_kl"]
