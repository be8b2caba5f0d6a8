"""Questions about images, from the files that the data sets' authors publish: VQAv2, OK-VQA, A-OKVQA, GQA, TextVQA.

A test split without annotations gives records whose answers are None. What is wrong with a file is a UserError that
names it; ``missing`` says what to do about images that are not there ("error", "drop", "ignore").
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastgist.train.config import UserError
from fastgist.train.vl_files import Table, field, read_json, split_in, wanted_split
from fastgist.train.vl_records import Missing, Record, VLDataset, checked, image_folder

__all__ = ["aokvqa", "gqa", "okvqa", "textvqa", "vqav2"]

_VQA_SPLITS = ("train", "val", "test", "test-dev")
_SPLITS = ("train", "val", "test")
_GQA_SPLITS = ("train", "val", "testdev", "test", "challenge", "submission")
_GQA_SECRET = ("test", "challenge", "submission")


def vqav2(
    questions: Path | str,
    images: Path | str,
    annotations: Path | str | None = None,
    split: str | None = None,
    missing: Missing = "error",
) -> VLDataset:
    """VQAv2 (arXiv 1612.00837): ``v2_OpenEnded_mscoco_<subset>_questions.json`` and ``v2_mscoco_<subset>_annotations.json``.

    Args:
        questions: the questions' file; its ``data_subtype`` ("train2014", "test-dev2015", ...) says the split.
        images: COCO's folder, with ``train2014/COCO_train2014_000000000009.jpg`` or those files themselves in it.
        annotations: the answers' file; None for the test splits.
        split: raise if the file is of another one.

    Raises:
        UserError: whatever is wrong with the files; questions and annotations that are not of each other.
    """
    return _vqa("vqav2", Path(questions), Path(images), annotations, split, missing)


def okvqa(
    questions: Path | str,
    images: Path | str,
    annotations: Path | str | None = None,
    split: str | None = None,
    missing: Missing = "error",
) -> VLDataset:
    """OK-VQA (arXiv 1906.00067): ``OpenEnded_mscoco_<subset>_questions.json``, ``mscoco_<subset>_annotations.json``.

    As :func:`vqav2`. The answers are the annotations' ``answer``, which is their ``raw_answer`` stemmed: what the
    official evaluation compares with.
    """
    return _vqa("okvqa", Path(questions), Path(images), annotations, split, missing)


def _vqa(
    name: str, questions: Path, images: Path, annotations: Path | str | None, split: str | None, missing: Missing
) -> VLDataset:
    whole = read_json(questions)
    table = Table.of(questions, whole, "questions")
    subset = _subset(questions, whole)
    split = wanted_split(questions, split_in(subset, _VQA_SPLITS) if subset else None, split, _VQA_SPLITS)
    answers = None if annotations is None else _vqa_answers(Path(annotations), subset)
    if answers is None and not split.startswith("test"):
        raise UserError(f"{questions}: split {split!r} has annotations: pass annotations=")
    pictures = subset.replace("-dev", "") if subset else None
    folder = image_folder(images, *([pictures] if pictures else []))
    records: list[Record] = []
    seen: set[int | str] = set()
    for place, row in table:
        key = table.identity(place, row, "question_id")
        if key in seen:
            raise UserError(f"{questions}: {place} repeats question_id {key}")
        seen.add(key)
        image_id = table.get(place, row, "image_id", int)
        prefix = f"COCO_{pictures}_" if pictures else ""
        said: dict[str, Any] = {} if answers is None else answers.get(key, {})
        records.append(
            Record(
                name, split, key, image_id, folder / f"{prefix}{image_id:012}.jpg",
                table.get(place, row, "question", str), **said,
            )
        )  # fmt: skip
    if answers is not None:
        _check_matched(questions, Path(str(annotations)), [record.id for record in records], answers)
    return VLDataset(checked(records, questions, missing))


def _subset(path: Path, whole: Any) -> str:
    """ "train2014" and the like: the file's ``data_subtype``, or from its name; "" if neither says."""
    if isinstance(whole.get("data_subtype"), str):
        return str(whole["data_subtype"])
    found = re.search(r"(train|val|test-dev|test)\d{4}", path.name)
    return found.group() if found else ""


def _vqa_answers(path: Path, subset: str) -> dict[int | str, dict[str, Any]]:
    """question_id -> the fields of a record that the annotations decide."""
    whole = read_json(path)
    table = Table.of(path, whole, "annotations")
    own = _subset(path, whole)
    if own and subset and own != subset:
        raise UserError(f"{path}: annotations of {own!r}, but the questions are of {subset!r}")
    found: dict[int | str, dict[str, Any]] = {}
    for place, row in table:
        key = table.identity(place, row, "question_id")
        if key in found:
            raise UserError(f"{path}: {place} repeats question_id {key}")
        given = table.get(place, row, "answers", list)
        if not given:
            raise UserError(f"{path}: {place}['answers'] is an empty list, expected answers")
        # interned: VQAv2 repeats few answers four million times
        texts = tuple(
            sys.intern(field(path, f"{place}['answers'][{i}]", a, "answer", str)) for i, a in enumerate(given)
        )
        kind = row.get("answer_type")
        found[key] = {"answers": texts, "answer_type": kind if isinstance(kind, str) else None}
    return found


def _check_matched(
    questions: Path, annotations: Path, asked: Sequence[int | str], answered: dict[int | str, Any]
) -> None:
    silent = [key for key in asked if key not in answered]
    if silent:
        raise UserError(
            f"{annotations}: {len(silent)} of the {len(asked)} questions in {questions} have no annotation, the first "
            f"is question_id {silent[0]}"
        )
    known = set(asked)
    unasked = [key for key in answered if key not in known]
    if unasked:
        raise UserError(
            f"{annotations}: {len(unasked)} of its {len(answered)} annotations are of questions that {questions} does "
            f"not have, the first is question_id {unasked[0]}"
        )


def aokvqa(
    annotations: Path | str, images: Path | str, split: str | None = None, missing: Missing = "error"
) -> VLDataset:
    """A-OKVQA (arXiv 2206.01718): ``aokvqa_v1p0_<split>.json``, a list of questions that say their split.

    Args:
        annotations: the file.
        images: COCO 2017's folder, with ``train2017/000000299207.jpg`` or those files themselves in it.
        split: raise if the file is of another one.
    """
    path = Path(annotations)
    table = Table(path, read_json(path))
    records: list[Record] = []
    folder: Path | None = None
    for place, row in table:
        split = wanted_split(path, table.get(place, row, "split", str), split, _SPLITS)
        if folder is None:
            folder = image_folder(Path(images), f"{split}2017")
        image_id = table.get(place, row, "image_id", int)
        choices = table.texts(place, row, "choices")
        said: dict[str, Any] = {}
        if not split.startswith("test") or row.get("direct_answers"):
            right = table.get(place, row, "correct_choice_idx", int)
            if not 0 <= right < len(choices):
                raise UserError(f"{path}: {place}['correct_choice_idx'] is {right}, of {len(choices)} choices")
            said = {
                "answers": table.texts(place, row, "direct_answers"),
                "correct_choice": right,
                "difficult": table.get(place, row, "difficult_direct_answer", bool),
            }
        key, question = table.identity(place, row, "question_id"), table.get(place, row, "question", str)
        image = folder / f"{image_id:012}.jpg"
        records.append(Record("aokvqa", split, key, image_id, image, question, choices=choices, **said))
    _check_unique(path, records)
    return VLDataset(checked(records, path, missing))


def gqa(
    questions: Path | str | Iterable[Path | str],
    images: Path | str,
    split: str | None = None,
    missing: Missing = "error",
) -> VLDataset:
    """GQA (arXiv 1902.09506): ``<split>_balanced_questions.json``, an object of questions by id, one answer each.

    Args:
        questions: a file, several, or a folder of them, as ``train_all_questions/`` is.
        images: the folder with ``images/2407890.jpg`` or those files themselves in it.
        split: where the file's name does not say it; raise if that says another.
    """
    paths = _paths(questions)
    folder = image_folder(Path(images), "images")
    records: list[Record] = []
    for path in paths:
        whole = read_json(path)
        if not isinstance(whole, dict):
            raise UserError(f"{path}: expected an object of questions by their ids")
        own = wanted_split(path, split_in(path.name, _GQA_SPLITS), split, _GQA_SPLITS)
        for key, row in whole.items():
            place = f"[{key!r}]"
            secret = own in _GQA_SECRET and isinstance(row, dict) and "answer" not in row
            answers = None if secret else (field(path, place, row, "answer", str),)
            image_id = field(path, place, row, "imageId", str)
            asked = field(path, place, row, "question", str)
            records.append(Record("gqa", own, key, image_id, folder / f"{image_id}.jpg", asked, answers))
    _check_unique(paths[0], records)
    return VLDataset(checked(records, paths[0], missing))


def _paths(questions: Path | str | Iterable[Path | str]) -> list[Path]:
    if not isinstance(questions, Path | str):
        paths = [Path(path) for path in questions]
    elif Path(questions).is_dir():
        paths = sorted(Path(questions).glob("*.json"))
    else:
        paths = [Path(questions)]
    if not paths:
        raise UserError(f"no questions' file in {questions}")
    return paths


def textvqa(
    annotations: Path | str, images: Path | str, split: str | None = None, missing: Missing = "error"
) -> VLDataset:
    """TextVQA (arXiv 1904.08920): ``TextVQA_0.5.1_<split>.json``, whose ``dataset_type`` says the split.

    Args:
        annotations: the file.
        images: the folder with ``train_images/`` (which holds the val images too) and ``test_images/``, or one of these.
        split: raise if the file is of another one.
    """
    path = Path(annotations)
    whole = read_json(path)
    check_named(path, whole, "textvqa")
    table = Table.of(path, whole, "data")
    split = wanted_split(path, field(path, "", whole, "dataset_type", str), split, _SPLITS)
    folder = image_folder(Path(images), "test_images" if split == "test" else "train_images")
    records = []
    for place, row in table:
        image_id = table.get(place, row, "image_id", str)
        answers = None if split == "test" and not row.get("answers") else table.texts(place, row, "answers")
        records.append(
            Record(
                "textvqa", split, table.identity(place, row, "question_id"), image_id, folder / f"{image_id}.jpg",
                table.get(place, row, "question", str), answers,
            )
        )  # fmt: skip
    _check_unique(path, records)
    return VLDataset(checked(records, path, missing))


def check_named(path: Path, whole: Any, name: str) -> None:
    """UserError where the file says that it is of another data set."""
    said = field(path, "", whole, "dataset_name", str)
    if said != name:
        raise UserError(f"{path}: is of the data set {said!r}, not {name!r}")


def _check_unique(path: Path, records: Sequence[Record]) -> None:
    seen: set[int | str] = set()
    for record in records:
        if record.id in seen:
            raise UserError(f"{path}: repeats question_id {record.id}")
        seen.add(record.id)
