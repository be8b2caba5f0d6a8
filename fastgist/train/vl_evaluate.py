"""Generate answers or captions for a split, score them, and write the file that the data set's server takes."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgist.train.vl_cider import bleu, cider
from fastgist.train.vl_collate import VLCollator
from fastgist.train.vl_metrics import accuracy
from fastgist.train.vl_records import Example, Record, VLDataset

__all__ = ["GENERATION", "Evaluation", "evaluate", "score", "submission", "write_results"]

#: Beams and lengths where none are given; :mod:`fastgist.recipes.petal` has each task's.
GENERATION: dict[str, Any] = {"num_beams": 5, "max_new_tokens": 30, "min_new_tokens": 1, "do_sample": False}


@dataclass(frozen=True)
class Evaluation:
    """``metrics`` are empty for a split without answers. ``predictions``: record's id -> text."""

    metrics: dict[str, float]
    predictions: dict[int | str, str]
    results: Path | None = None


def evaluate(
    model: Any,
    dataset: VLDataset,
    collator: VLCollator,
    *,
    generation: Mapping[str, Any] | None = None,
    batch_size: int = 32,
    workers: int = 0,
    results: Path | str | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    **options: bool,
) -> Evaluation:
    """Generate for every record of ``dataset``, in one process, and score with the data set's own metric.

    All of the model is in evaluation mode meanwhile, and each module put back to its own. Nothing is cast: wrap the call
    in autocast for a model that was trained so.

    Args:
        model: InstructBLIP or BLIP-2 for conditional generation, tuned or not.
        dataset: records of one data set; from :func:`fastgist.train.vl_load.load`.
        collator: made for the model; its first template is the prompt.
        generation: arguments of ``generate`` that replace those of :data:`GENERATION`.
        workers: processes that read the pictures.
        results: a file to write, see :func:`submission`; nothing is written before all is generated.
        device: where the model is; asked of its parameters if not given.
        options: of the metric: ``normalize=True`` for GQA as LAVIS counts it.

    Raises:
        ValueError: no record, or two with one id (as :meth:`VLDataset.one_per_reference` makes).
        UserError: an image cannot be read.
    """
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    if not len(dataset):
        raise ValueError("evaluate: the data set is empty")
    _check_ids(dataset.records)
    device = device if device is not None else next(model.parameters()).device
    settings = GENERATION | dict(generation or {})
    batches = DataLoader(
        dataset, batch_size, collate_fn=_Inputs(collator), num_workers=workers, pin_memory="cuda" in str(device)
    )
    predictions: dict[int | str, str] = {}
    # each module's own mode: a frozen part may be in evaluation mode for good
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), tqdm(total=len(dataset), unit="img", disable=not progress) as bar:
            for ids, inputs in batches:
                moved = {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}
                generated = model.generate(**moved, **settings)
                texts = _texts(generated, moved["input_ids"], collator)
                predictions.update(zip(ids, texts, strict=True))
                bar.update(len(ids))
    finally:
        for module, training in modes:
            module.training = training
    metrics = score(dataset.records, predictions, **options)
    path = None if results is None else write_results(dataset.records, predictions, results)
    return Evaluation(metrics, predictions, path)


@dataclass(frozen=True)
class _Inputs:
    """(ids, inputs) of a batch; a class, so that loader processes can be sent it."""

    collator: VLCollator

    def __call__(self, examples: Sequence[Example]) -> tuple[list[int | str], dict[str, Tensor]]:
        return [example.record.id for example in examples], self.collator.inputs(examples)


def _texts(generated: Tensor, prompts: Tensor, collator: VLCollator) -> list[str]:
    """The new text of each row: transformers returns a decoder-only model's prompt in front of it."""
    length = prompts.shape[1]
    if collator.decoder_only and generated.shape[1] >= length and torch.equal(generated[:, :length], prompts):
        generated = generated[:, length:]
    texts = collator.processor.tokenizer.batch_decode(generated, skip_special_tokens=True)
    return [text.strip() for text in texts]


def _check_ids(records: Sequence[Record]) -> None:
    seen: set[int | str] = set()
    for record in records:
        if record.id in seen:
            raise ValueError(f"evaluate: {record.dataset}'s id {record.id} is there twice")
        seen.add(record.id)


def score(records: Sequence[Record], predictions: Mapping[int | str, str], **options: bool) -> dict[str, float]:
    """The metrics of a data set, in percent as papers print them: accuracy for questions, CIDEr and BLEU for captions.

    CIDEr is of the records with captions, and for NoCaps of each domain too, its n-grams' frequencies then counted in
    that domain alone, as LAVIS does. BLEU-4 only where torchmetrics is installed.

    Raises:
        ValueError: a record without a prediction; of several data sets; ``options`` that the metric does not have.
    """
    questions = [record for record in records if record.question is not None]
    if questions:
        if len(questions) < len(records):
            raise ValueError("score: expected either questions or images to caption, got both")
        return accuracy(records, predictions, **options)
    if options:
        raise ValueError(f"score: captions have no option {', '.join(options)}")
    absent = next((record for record in records if record.id not in predictions), None)
    if absent is not None:
        raise ValueError(f"score: no prediction for {absent.dataset}'s image {absent.id}")
    known = [record for record in records if record.references]
    if not known:
        return {}
    metrics = {"cider": _cider(known, predictions)}
    for domain in sorted({record.domain for record in known if record.domain}):
        metrics[f"cider/{domain}"] = _cider([r for r in known if r.domain == domain], predictions)
    try:
        references = {record.id: record.references or () for record in known}
        metrics["bleu4"] = 100 * bleu({record.id: predictions[record.id] for record in known}, references)
    except ImportError:
        pass
    return metrics


def _cider(records: Sequence[Record], predictions: Mapping[int | str, str]) -> float:
    said = {record.id: predictions[record.id] for record in records}
    return 100 * cider(said, {record.id: record.references or () for record in records})[0]


# -- results files ---------------------------------------------------------------------------------------------------


def submission(records: Sequence[Record], predictions: Mapping[int | str, str]) -> Any:
    """What the data set's evaluation server takes, ready for JSON; ids as the data set's files have them.

    [{"question_id", "answer"}] for VQAv2, OK-VQA and TextVQA; [{"questionId", "prediction"}] for GQA; {question_id:
    {"direct_answer"}} for A-OKVQA; [{"image_id", "caption"}] for captions.
    """
    pairs = [(record, predictions[record.id]) for record in records]
    if records and records[0].question is None:
        return [{"image_id": record.image_id, "caption": text} for record, text in pairs]
    if records and records[0].dataset == "gqa":
        return [{"questionId": record.id, "prediction": text} for record, text in pairs]
    if records and records[0].dataset == "aokvqa":
        return {str(record.id): {"direct_answer": text} for record, text in pairs}
    return [{"question_id": record.id, "answer": text} for record, text in pairs]


def write_results(records: Sequence[Record], predictions: Mapping[int | str, str], path: Path | str) -> Path:
    """Write :func:`submission` to ``path``, whole or not at all; returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(submission(records, predictions), file, ensure_ascii=False)
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise
    return path
