"""PETAL's settings: one dataclass, whose fields are plain data."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from fastgist.nn._checks import check_bool, check_dropout, check_number, check_one_of, check_positive
from fastgist.nn.bottleneck import check_options
from fastgist.nn.cp import CORES
from fastgist.nn.moe import GATINGS
from fastgist.peft.config import CP_INITS, PeftConfig, ThresholdConfig

__all__ = ["BottleneckConfig", "PetalConfig", "QueryGistConfig"]


@dataclass
class BottleneckConfig:
    """The information bottleneck that goes into the model's loss; fields as those of
    :class:`fastgist.nn.InformationBottleneckLoss`, whose documentation says what each estimates, and how well."""

    compression: str | None = "score"
    relevance: str | None = "score"
    eta: float = 0.01
    b: float = 1.0
    sigma: float = 0.5
    dims: int = 8
    bank: int = 1024
    projection: str = "fixed"
    preset: str | None = None

    def __post_init__(self) -> None:
        check_options("BottleneckConfig", **self.options())

    def options(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass
class QueryGistConfig:
    """A gist token among the Q-Former's queries (:mod:`fastgist.petal.query_gist`). length, dropout: of the token; several are
    read by their mean. alpha, beta, temperature: of the loss; GIST's."""

    length: int = 1
    dropout: float = 0.1
    alpha: float = 0.5
    beta: float = 0.75
    temperature: float = 3.0

    def __post_init__(self) -> None:
        check_positive("QueryGistConfig", "length", self.length)
        check_dropout("QueryGistConfig", self.dropout)
        for name in ("alpha", "beta"):
            check_number("QueryGistConfig", name, getattr(self, name))
        check_number("QueryGistConfig", "temperature", self.temperature, above=0.0)


@dataclass
class PetalConfig(PeftConfig):
    """PETAL on a model with a Q-Former.

    rank, core, dropout: of the mode approximation (:class:`fastgist.nn.CPFactors`). The released code has core "tucker", the
    paper "cp".
    num_experts, expert_dim, gating, top_k: of the experts (:class:`fastgist.nn.InstructionMoE`) on queries and instruction,
    behind the Q-Former's embeddings; num_experts=0 leaves them out. gating "uniform" is the released form, which is not
    the identity at the start.
    load_balance: factor of the experts' load-balance loss in the model's loss (gating "softmax").
    num_instructions: P > 1 adds learned weights of P phrasings of one instruction (:func:`fastgist.petal.instructed`, without
    which they get no gradient).
    init: of the mode approximation: "identity", or "weights": U and P from a decomposition of the pre-trained weights, V = 0
    (see :class:`fastgist.CPConfig`; needs tensorly).
    threshold: None, "modes", "trust" or a :class:`fastgist.peft.ThresholdConfig`: see :class:`fastgist.nn.CPThreshold`.
    bottleneck: None or a :class:`BottleneckConfig` (True: its defaults).
    instruct_llm: experts of the same number and width on the instruction that the language model reads, too
    (:mod:`fastgist.petal.instructed_llm`: labels have to be -100 on it).
    gist: None or a :class:`QueryGistConfig` (True: its defaults): a gist token among the queries.
    batch_mean: factor of the batch's mean of query 0 before a cross-attention that the released code adds to query 0 behind
    it (0.1 there). It makes what a model says of an image depend on the others in its batch, in evaluation too: off, and
    warned of.
    gated_query: the released code's addition of 0.1 (a * s + b) to a layer's output, a being its self-attention's and s, b
    trained vectors ~ N(0, 2e-4): not the identity at the start (:mod:`fastgist.petal.extras`).
    """

    method: ClassVar[str] = "petal"
    rank: int = 64
    core: str = "cp"
    dropout: float = 0.1
    num_experts: int = 6
    expert_dim: int = 64
    gating: str = "softmax"
    threshold: Any = None
    bottleneck: Any = None
    init: str = "identity"
    top_k: int | None = None
    load_balance: float = 0.01
    num_instructions: int = 1
    instruct_llm: bool = False
    gist: Any = None
    batch_mean: float = 0.0
    gated_query: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("rank", "dropout")
        for name, known in (("core", CORES), ("init", CP_INITS), ("gating", GATINGS)):
            check_one_of("PetalConfig", name, getattr(self, name), known)
        self.threshold = ThresholdConfig.of("PetalConfig", self.threshold)
        self.bottleneck = _settings("bottleneck", self.bottleneck, BottleneckConfig)
        self.gist = _settings("gist", self.gist, QueryGistConfig)
        for name in ("load_balance", "batch_mean"):
            check_number("PetalConfig", name, getattr(self, name), least=0.0)
        if isinstance(self.num_experts, bool) or not isinstance(self.num_experts, int) or self.num_experts < 0:
            raise ValueError(f"PetalConfig: num_experts must be a whole number >= 0, got {self.num_experts!r}")
        for name in ("expert_dim", "num_instructions"):
            check_positive("PetalConfig", name, getattr(self, name))
        for name in ("instruct_llm", "gated_query"):
            check_bool("PetalConfig", name, getattr(self, name))
        if self.num_experts and self.top_k is not None:
            if check_positive("PetalConfig", "top_k", self.top_k) > self.num_experts:
                raise ValueError(f"PetalConfig: top_k must be in 1..{self.num_experts} (num_experts), got {self.top_k}")
            if self.gating == "uniform":
                raise ValueError(f"PetalConfig: top_k needs gating='softmax', got top_k={self.top_k} with 'uniform'")
        if not self.num_experts and self.num_instructions != 1:
            raise ValueError("PetalConfig: num_instructions mixes the experts' gates, and num_experts is 0")
        if not self.num_experts and self.instruct_llm:
            raise ValueError("PetalConfig: instruct_llm is about experts, and num_experts is 0")


def _settings(name: str, value: Any, kind: Any) -> Any:
    """``value`` as a ``kind``: itself, its defaults for True, or what to_dict made of one."""
    if value is None or value is False:
        return None
    if value is True:
        return kind()
    if isinstance(value, dict):
        known = {f.name for f in fields(kind)}
        if unknown := sorted(set(value) - known):
            raise ValueError(f"{kind.__name__} has no field {', '.join(unknown)}; it has {', '.join(sorted(known))}")
        return kind(**value)
    if not isinstance(value, kind):
        raise TypeError(f"PetalConfig: {name} must be None, True or a {kind.__name__}, got {type(value).__name__}")
    return value
