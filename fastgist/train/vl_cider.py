"""CIDEr-D of captions (arXiv 1411.5726) and the words that it counts; BLEU by torchmetrics.

Written here because no library fits: torchmetrics and evaluate have no CIDEr, pycocoevalcap (the reference; last released
in 2020) brings 100 MB and tokenises by Java, aac-metrics brings audio models. Checked against the reference.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

__all__ = ["bleu", "caption_words", "cider"]

Key = TypeVar("Key")

# -- words -----------------------------------------------------------------------------------------------------------

#: Words that keep a period behind them.
_ABBREVIATIONS = (
    "adm|apt|assn|ave|blvd|bros|capt|cmdr|co|col|corp|cpl|dept|dr|etc|gen|gov|hon|inc|jr|lt|ltd|maj|mr|mrs|ms|mt|ph\\.d|pres|"
    "prof|rd|rep|rev|sen|sgt|sr|st|vs"
)
_TOKEN = re.compile(
    rf"""
    https?://[^\s<>"]+
  | [\w.+-]+@[\w-]+(?:\.[\w-]+)+
  | (?<![\w.])(?:[a-z]\.){{2,}}                         # U.S., a.m.
  | (?<![\w.&'])[a-hj-z]\.(?![\w.])                     # B. King, grade A.
  | (?<![\w-])(?:{_ABBREVIATIONS})\.(?!\w)              # St.
  | (?<![\w-])no\.(?=\s*\d)                             # No. 5
  | \d+(?::\d+)?(?=[ap]m\b)                             # 10:45 of 10:45am
  | (?<!\S)[-+]\d+(?:[.,]\d+)*(?![\w-])
  | \b[a-z]&[a-z]\b                                     # R&B
  | (?<!\w)'n'(?!\w)
  | \w+(?:(?:['./-]|(?<=\d)[,:](?=\d))\w+)*             # dog, can't, t-shirt, and/or, 3,000
  | [?!]{{2,}} | \.+ | [^\w\s]
    """,
    re.VERBOSE | re.IGNORECASE,
)
_CLITIC = re.compile(r"(.+?)(n't|'s|'m|'d|'re|'ve|'ll)")
_SPLIT = {
    "cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "lemme": "lem me", "gimme": "gim me",
    "y'all": "y' all",
}  # fmt: skip
_PLAIN = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": " - ", "—": " - ", "…": " ... "})
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_DROPPED = set("'`\".?!,:-;")


def caption_words(text: str) -> list[str]:
    """The words of a caption as COCO's evaluation counts them: lower case, Penn Treebank's, most punctuation dropped.

    "A man's dog can't run (far), won't stop." is a, man, 's, dog, ca, n't, run, -lrb-, far, -rrb-, wo, n't, stop. Written
    after Stanford's tokenizer, which the reference runs in Java. They agree on what captions are made of; in
    addresses, tags, telephone numbers and rare abbreviations they may not.
    """
    return [word for token in _TOKEN.findall(text.lower().translate(_PLAIN)) for word in _parts(token)]


def _parts(token: str) -> Iterator[str]:
    if token in _DROPPED or token.strip(".") == "":
        return
    if token in _BRACKETS:
        yield _BRACKETS[token]
        return
    if token in _SPLIT:
        yield from _SPLIT[token].split()
        return
    clitics: list[str] = []
    while found := _CLITIC.fullmatch(token):
        token = found[1]
        clitics.insert(0, found[2])
    yield from (token, *clitics)


# -- scores ----------------------------------------------------------------------------------------------------------


def cider(predictions: Mapping[Key, str], references: Mapping[Key, Sequence[str]]) -> tuple[float, dict[Key, float]]:
    """CIDEr-D of a corpus: (the mean, every image's own). The usual scale: 1.0 is what papers print as 100.

    For n = 1 to 4, a caption is a vector over n-grams, g(w) = count(w) log(I / images whose references have w), and

        CIDEr-D_n(c, refs) = 10 mean over r of exp(-(|c| - |r|)^2 / (2 * 6^2)) min(g_c, g_r) . g_r / (|g_c| |g_r|)

    with |c| the number of words; the score is the mean over n. The frequencies are those of ``references``: a score is of
    a whole split, and of one image alone it is 0.

    Args:
        predictions: image -> caption.
        references: image -> its captions, of the same images.

    Raises:
        ValueError: other images, no image, or one without a caption.
    """
    if predictions.keys() != references.keys() or not predictions:
        raise ValueError(
            f"cider: expected captions and references of the same images, at least one, got {len(predictions)} and "
            f"{len(references)} with {len(predictions.keys() & references.keys())} in common"
        )
    said = {key: _Counts(text) for key, text in predictions.items()}
    known = {key: [_Counts(text) for text in texts] for key, texts in references.items()}
    empty = next((key for key, counts in known.items() if not counts), None)
    if empty is not None:
        raise ValueError(f"cider: image {empty!r} has no reference")
    frequency = Counter(gram for counts in known.values() for gram in {g for c in counts for g in c.grams})
    weights = {gram: math.log(len(known)) - math.log(n) for gram, n in frequency.items()}
    most = math.log(len(known))
    scores = {}
    for key, counts in said.items():
        vector = counts.vector(weights, most)
        similarities = [_similarity(counts, vector, other, other.vector(weights, most)) for other in known[key]]
        scores[key] = 10 * math.fsum(similarities) / len(similarities)
    return math.fsum(scores.values()) / len(scores), scores


class _Counts:
    """How often a caption has which n-gram, n = 1 to 4."""

    def __init__(self, text: str) -> None:
        words = caption_words(text)
        self.length = len(words)
        self.grams = Counter(tuple(words[i : i + n]) for n in range(1, 5) for i in range(len(words) - n + 1))

    def vector(self, weights: Mapping[tuple[str, ...], float], unseen: float) -> tuple[dict, list[float]]:
        """(g by n-gram, its norm for each n)."""
        values = {gram: count * weights.get(gram, unseen) for gram, count in self.grams.items()}
        squares = [0.0] * 4
        for gram, value in values.items():
            squares[len(gram) - 1] += value * value
        return values, [math.sqrt(square) for square in squares]


def _similarity(counts: _Counts, vector: tuple, other: _Counts, reference: tuple) -> float:
    """Mean over n of the clipped cosine, damped by the difference in length."""
    (values, norms), (wanted, wanted_norms) = vector, reference
    products = [0.0] * 4
    for gram, value in values.items():
        if gram in wanted:
            products[len(gram) - 1] += min(value, wanted[gram]) * wanted[gram]
    cosines = [p / (a * b) if a and b else 0.0 for p, a, b in zip(products, norms, wanted_norms)]
    return math.exp(-((counts.length - other.length) ** 2) / 72) * sum(cosines) / 4


def bleu(predictions: Mapping[Key, str], references: Mapping[Key, Sequence[str]], order: int = 4) -> float:
    """BLEU of a corpus in [0, 1], over :func:`caption_words`, without smoothing, by torchmetrics.

    Raises:
        ImportError: torchmetrics is not installed.
    """
    from torchmetrics.functional.text import bleu_score

    said = [" ".join(caption_words(predictions[key])) for key in references]
    # Of references equally far in length the reference implementation takes the shorter, torchmetrics the first.
    known = [[" ".join(w) for w in sorted(map(caption_words, texts), key=len)] for texts in references.values()]
    return float(bleu_score(said, known, n_gram=order))
