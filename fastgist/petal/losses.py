"""What PETAL adds to a model's loss: a gist token's, the experts' load-balance loss and the information bottleneck.

A hook on the wrapped model adds them to ``output.loss`` in training, so that any training loop, and transformers' Trainer,
minimises the whole. Evaluation gives the task's loss alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastgist.petal.calls import IGNORED, arguments, items_of

__all__ = ["add", "last_losses"]


def add(model: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """A forward hook: ``output`` with PETAL's terms in its loss."""
    site = _site(model)
    if not model.training:
        if (
            not torch.compiler.is_compiling()
            and torch.is_grad_enabled()
            and arguments(model, args, kwargs).get("labels") is not None
        ):
            site.warn_of_evaluation()
        if site.gist is not None:
            site.gist.take_states()  # and with them their graph
        return output
    whole = isinstance(output, tuple)
    loss = output[0] if whole else output.get("loss")
    given = arguments(model, args, kwargs)
    labels = given.get("labels")
    if loss is None or labels is None:
        return output
    parts = {"task": loss}
    if whole and (site.bottleneck is not None or site.gist is not None):
        raise ValueError("petal: the model's output is read by name here: return_dict=False is not for training")
    if site.gist is not None:
        parts["gist"] = site.gist.loss(model, given, output, site.language) - loss
    if site.load_balance > 0 and (due := site.due()):
        parts["balance"] = site.load_balance * sum(moe.load_balance_loss() for moe in due)
    if site.bottleneck is not None:
        parts["bottleneck"] = _bottleneck(model, site.bottleneck, output, labels)
    site.parts = {name: part.detach() for name, part in parts.items()}
    share = _share(labels, items_of(model, given), loss)
    total = loss
    for name, part in parts.items():
        if name != "task":
            total = total + (part if name == "gist" else share * part).to(loss.dtype)
    if whole:
        return (total, *output[1:])
    output["loss"] = total
    return output


def _share(labels: Tensor, items: Any, loss: Tensor) -> Any:
    """How much of the step this batch is: transformers' Trainer divides sums of accumulated batches by all their labels."""
    if items is None:
        return 1.0
    return (labels != IGNORED).sum().to(loss.device) / items


def _bottleneck(model: Any, estimate: nn.Module, output: Any, labels: Tensor) -> Tensor:
    """I(z; x) and I(z; y) of the queries' mean state z, the image tokens' mean x and the answer's words y."""
    queries = model.query_tokens.shape[1]
    z = output.qformer_outputs[0][:, :queries].mean(1)
    x = output.vision_outputs[0].mean(1).to(z.device)
    return estimate(z, x, labels.to(z.device))


def _site(model: Any) -> Any:
    from fastgist.petal.parts import Enriched

    return next(module for module in model.qformer.modules() if isinstance(module, Enriched))


def last_losses(model: nn.Module) -> dict[str, Tensor]:
    """The parts of the last training forward's loss, for a log: "task", and where they are on "gist", "balance" and
    "bottleneck" (with their factors). Detached scalars on the model's device; "score" terms have no value and count 0.

    Raises:
        ValueError: the model has no PETAL adapter with such terms.
    """
    from fastgist.peft.state import inner
    from fastgist.petal.parts import Enriched

    for module in inner(model).modules():
        if isinstance(module, Enriched):
            return dict(module.parts)
    raise ValueError(f"petal.last_losses: {type(model).__name__} has no experts and no bottleneck of PETAL")
