"""Accuracies of answers about images, each as its data set's official evaluation counts it.

Normalisation (digits for number words, no articles, apostrophes in contractions, punctuation) follows
``vqaEval.py`` of github.com/GT-Vision-Lab/VQA to the letter, with what is odd about it, since results are compared with
results from there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from fastgist.train.vl_records import Record

__all__ = ["accuracy", "aokvqa_accuracy", "gqa_accuracy", "normalize_answer", "textvqa_accuracy", "vqa_accuracy"]

_DIGITS = {
    word: str(value)
    for value, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}  # fmt: skip
_ARTICLES = {"a", "an", "the"}

#: With an apostrophe; each is found by itself with one apostrophe left out. The official table's forms in capitals are not
#: here: words are lower case when they are looked up.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd
where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
y'all'd've you'd you'd've you'll you're you've
""".split()


def _without_one(word: str) -> list[str]:
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


_APOSTROPHES = {bare: word for word in _CONTRACTIONS for bare in _without_one(word)} | {"somebody'd": "somebodyd"}

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"(?!<=\d)\.(?!\d)")  # the official pattern: its look-behind is a look-ahead, and does nothing
_COMMA = re.compile(r"\d,\d")
_COMMAS = re.compile(r"(?<=\d),+(?=\d)")  # TextVQA's


def _punctuation(text: str, comma: re.Pattern[str]) -> str:
    out = text
    between_digits = comma.search(text) is not None
    for mark in _PUNCTUATION:
        beside_space = mark + " " in text or " " + mark in text
        out = out.replace(mark, "" if beside_space or between_digits else " ")
    return _PERIOD.sub("", out, count=32)  # re.UNICODE is passed where the count goes


def _words(text: str) -> str:
    words = [_DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES)


def _line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalize_answer(text: str) -> str:
    """``text`` as the VQA evaluation compares it: "The two men's T-shirts." is "2 men's t shirts"."""
    return _words(_punctuation(_line(text), _COMMA))


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA accuracy of one question, in [0, 1]: the mean of min(others who said so / 3, 1) over the annotators.

    Both sides are normalised unless all annotators agree to the letter; then the strings are compared as they are.

    Args:
        prediction: what the model said.
        answers: what each annotator said, ten in VQAv2 and OK-VQA.

    Raises:
        ValueError: no answers.
    """
    if not answers:
        raise ValueError("vqa_accuracy: expected at least one answer")
    prediction, given = _line(prediction), [_line(answer) for answer in answers]
    if len(set(given)) > 1:
        prediction, given = normalize_answer(prediction), [normalize_answer(answer) for answer in given]
    return _mean_of_others(prediction, given)


def _mean_of_others(prediction: str, given: Sequence[str]) -> float:
    same = given.count(prediction)
    scores = [min(1.0, (same - (answer == prediction)) / 3) for answer in given]
    return sum(scores) / len(scores)


def textvqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """As :func:`vqa_accuracy`, with TextVQA's own normalisation, which is always applied (mmf's evaluator)."""
    if not answers:
        raise ValueError("textvqa_accuracy: expected at least one answer")
    return _mean_of_others(_textvqa(prediction), [_textvqa(answer) for answer in answers])


def _textvqa(text: str) -> str:
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _words(_punctuation(_line(text), _COMMAS))


def gqa_accuracy(prediction: str, answer: str, normalize: bool = False) -> float:
    """1.0 where ``prediction`` is GQA's one answer, else 0.0.

    The official evaluation compares strings. ``normalize`` compares what :func:`normalize_answer` makes of both, as
    LAVIS does and so the numbers published for BLIP-2 and InstructBLIP.
    """
    if normalize:
        prediction, answer = normalize_answer(prediction), normalize_answer(answer)
    return float(prediction == answer)


def aokvqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """A-OKVQA's accuracy of a direct answer, in [0, 1]: min(annotators who said so / 3, 1), strings as they are."""
    return min(1.0, list(answers).count(prediction) / 3)


def accuracy(records: Sequence[Record], predictions: Mapping[int | str, str], **options: bool) -> dict[str, float]:
    """Mean accuracy in percent over ``records`` of one data set, by its own rule; by answer type too where there are any.

    Args:
        records: those whose answers are None are not counted, nor A-OKVQA's difficult ones.
        predictions: record's id -> what was said.
        options: of the data set's rule: ``normalize`` for GQA.

    Returns:
        "accuracy" and, of VQAv2, "accuracy/yes/no", "accuracy/number", "accuracy/other". Empty where nothing is counted.

    Raises:
        ValueError: records of several data sets, or of one without a rule; a record without a prediction.
    """
    names = {record.dataset for record in records}
    if len(names) > 1:
        raise ValueError(f"accuracy: expected records of one data set, got {', '.join(sorted(names))}")
    groups: dict[str, list[float]] = {}
    for record in records:
        if record.id not in predictions:
            raise ValueError(f"accuracy: no prediction for {record.dataset}'s question {record.id}")
        if record.answers is None or (record.dataset == "aokvqa" and record.difficult):
            continue
        score = _score(record, predictions[record.id], options)
        for group in ("accuracy", *([f"accuracy/{record.answer_type}"] if record.answer_type else [])):
            groups.setdefault(group, []).append(score)
    return {group: 100 * sum(scores) / len(scores) for group, scores in groups.items()}


def _score(record: Record, prediction: str, options: Mapping[str, bool]) -> float:
    assert record.answers is not None
    if record.dataset in ("vqav2", "okvqa"):
        return vqa_accuracy(prediction, record.answers, **options)
    if record.dataset == "textvqa":
        return textvqa_accuracy(prediction, record.answers, **options)
    if record.dataset == "aokvqa":
        return aokvqa_accuracy(prediction, record.answers, **options)
    if record.dataset == "gqa":
        return gqa_accuracy(prediction, record.answers[0], **options)
    raise ValueError(f"accuracy: no rule for the data set {record.dataset!r}")
