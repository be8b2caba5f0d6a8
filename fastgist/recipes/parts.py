"""Learning rates and weight decays of parts: the same settings wherever something is trained."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["PartRates"]


def _number(help: str):
    return field(default=None, metadata={"help": help, "panel": "Parts", "min": 0})


@dataclass(frozen=True, kw_only=True)
class PartRates:
    """What sets a part apart from ``lr`` and ``weight_decay``; None: nothing does."""

    lr_gist: float | None = _number("Peak learning rate of the gist token; --lr if not given.")
    lr_peft: float | None = _number("Peak learning rate of the adapter's layers; --lr if not given.")
    lr_head: float | None = _number("Peak learning rate of the head; --lr if not given.")
    wd_gist: float | None = _number("Weight decay of the gist token; --weight-decay if not given.")
    wd_peft: float | None = _number("Weight decay of the adapter's matrices, likewise.")
    wd_head: float | None = _number("Weight decay of the head's matrix, likewise.")

    @property
    def lrs(self) -> dict[str, float | None]:
        """Learning rates of single parts, for :func:`fastgist.train.parameter_groups`."""
        return {"gist": self.lr_gist, "peft": self.lr_peft, "head": self.lr_head}

    @property
    def weight_decays(self) -> dict[str, float | None]:
        """Weight decays of single parts, likewise."""
        return {"gist": self.wd_gist, "peft": self.wd_peft, "head": self.wd_head}
