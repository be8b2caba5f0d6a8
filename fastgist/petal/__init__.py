"""PETAL (arXiv 2312.12458): the Q-Former of BLIP-2 and InstructBLIP tuned by mode approximation, with experts of the
instruction and an information bottleneck.

    model = petal.wrap(model, petal.PetalConfig())

Image encoder, query tokens, language projection and language model stay frozen. What is the paper's, what the released
code's and what our reconstruction stands at each part: :class:`PetalConfig`.
"""

from fastgist.peft import ThresholdConfig
from fastgist.petal.config import BottleneckConfig, PetalConfig, QueryGistConfig
from fastgist.petal.losses import last_losses
from fastgist.petal.released import load_released, read_released
from fastgist.petal.wrapping import experts_of, instructed, instruction_gate, trainable_shares, wrap

__all__ = [
    "BottleneckConfig",
    "PetalConfig",
    "QueryGistConfig",
    "ThresholdConfig",
    "experts_of",
    "instructed",
    "instruction_gate",
    "last_losses",
    "load_released",
    "read_released",
    "trainable_shares",
    "wrap",
]
