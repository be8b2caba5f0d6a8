"""The docstring corpus, and the base models that are pre-trained on it."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from pathlib import Path

import pytest

from fastgist.train import stdlib_text
from fastgist.train.config import UserError
from fastgist.train.stdlib_text import PACKAGES, StdlibText, docstrings, scrub, text_key

WORDS = "alpha bravo delta gamma kilo lima metro north omega papa quote river sigma tango ultra".split()


def sentence(*numbers: int) -> str:
    """Six words that say which numbers they came from."""
    seed = hashlib.sha256(repr(numbers).encode()).digest()
    return " ".join(WORDS[byte % len(WORDS)] + str(byte) for byte in seed[:6])


def write_library(root: Path, each: int = 80) -> Path:
    """A library whose packages have ``each`` functions, and modules outside the task."""
    for number, package in enumerate((*PACKAGES, "calendar", "shelve")):
        lines = ['"""The module."""', "raise RuntimeError('sources are parsed, not run')"]
        for i in range(each):
            lines += [f"def f{i}():", f'    """{sentence(number, i)}"""']
        path = root / package / "__init__.py" if package in PACKAGES else root / f"{package}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines))
    return root


@pytest.fixture(scope="module")
def corpus() -> StdlibText:
    return StdlibText.load()


# -- the corpus ------------------------------------------------------------------------------------------------------


def test_no_text_is_in_two_places(corpus):
    """Compared without case, spaces and punctuation: parts with each other, with themselves, with the documents."""
    seen: Counter[str] = Counter()
    for part in corpus.parts().values():
        seen.update(re.sub(r"[^a-z0-9]+", "", text.lower()) for text in part.texts)
    assert max(seen.values()) == 1
    for document in corpus.documents:
        for text in document:
            assert re.sub(r"[^a-z0-9]+", "", text.lower()) not in seen
            assert re.sub(r"[^a-z0-9]+", "", scrub(text).lower()) not in seen


def test_every_class_has_its_share_of_every_part(corpus):
    assert len(corpus.classes) >= 8
    counts = {name: Counter(part.labels) for name, part in corpus.parts().items()}
    for label in range(len(corpus.classes)):
        whole = sum(c[label] for c in counts.values())
        assert 60 <= whole <= 240
        for name, share in (("train", 0.6), ("val", 0.15), ("test", 0.25)):
            assert abs(counts[name][label] - share * whole) <= 1


def test_the_packages_names_are_gone(corpus):
    for part in corpus.parts().values():
        for text in part.texts:
            assert not re.search(
                r"asyncio|email|http|idlelib|importlib|logging|multiprocessing|tkinter|unittest|xml", text, re.I
            )
            assert not re.search(r"\b(tk|tcl|idle)\b", text, re.IGNORECASE)
            assert len(text_key(text).split()) >= 5


def test_labels_say_which_package_a_text_is_from(corpus):
    """Sought in the sources, by grep: the first line of the docstring, where no name was taken out of it."""
    import sysconfig

    root = Path(sysconfig.get_path("stdlib"))
    found = 0
    for text, label in list(zip(corpus.test.texts, corpus.test.labels))[::40]:
        sources = "\n".join(p.read_text(errors="replace") for p in sorted((root / corpus.classes[label]).rglob("*.py")))
        line = text.splitlines()[0].strip()
        found += line in sources
    assert found >= 8


def test_shared_and_repeated_texts(tmp_path):
    """One text in two packages is in no part; twice in a package, or again outside the task, it is there once."""
    root = write_library(tmp_path)
    shared, repeated = "this very text is shared by two", "this other text is repeated in one"
    for name, text in (("email", shared), ("xml", shared.upper()), ("http", repeated)):
        (root / name / "more.py").write_text(f'"""{text}"""\ndef g():\n    """{text} !"""\n')
    (root / "calendar.py").write_text(f'"""{repeated}"""\ndef f():\n    """{shared}"""\ndef g():\n    """kept"""\n')
    found = StdlibText.load(root)
    texts = [text_key(t) for part in found.parts().values() for t in part.texts]
    assert text_key(shared) not in texts and texts.count(text_key(repeated)) == 1
    outside = [text for document in found.documents for text in document]
    assert "kept" in outside and shared not in outside and repeated not in outside


def test_splits_follow_from_the_texts_alone(tmp_path):
    """The order of files and of definitions decides nothing; the text does."""
    one, other = write_library(tmp_path / "a"), write_library(tmp_path / "b")
    for name in PACKAGES:
        path = other / name / "__init__.py"
        lines = path.read_text().splitlines()
        functions = [lines[i : i + 2] for i in range(2, len(lines), 2)]
        (other / name / "moved.py").write_text("\n".join(line for f in reversed(functions[:40]) for line in f))
        path.write_text("\n".join([*lines[:2], *(line for f in functions[40:] for line in f)]))
    for (name, mine), theirs in zip(StdlibText.load(one).parts().items(), StdlibText.load(other).parts().values()):
        assert (mine.texts, mine.labels) == (theirs.texts, theirs.labels), name


def test_tests_are_not_read(tmp_path):
    root = write_library(tmp_path)
    for folder in ("test", "idlelib/idle_test", "unittest/test", "site-packages/timm"):
        (root / folder).mkdir(parents=True)
        (root / folder / "more.py").write_text('"""never read"""')
    assert "never read" not in {d.text for d in docstrings(root)}
    assert docstrings(root)[0].name == "" and {d.file for d in docstrings(root) if d.package == "shelve"} == {
        "shelve.py"
    }


def test_a_python_without_sources_says_so(tmp_path):
    (tmp_path / "asyncio.pyc").write_bytes(b"")
    with pytest.raises(UserError, match=f"no sources of its standard library: no docstrings under {tmp_path}"):
        StdlibText.load(tmp_path)
    with pytest.raises(UserError, match="too few docstrings"):
        StdlibText.load(write_library(tmp_path, each=20))


def test_packages_with_few_texts_are_no_class(tmp_path):
    root = write_library(tmp_path)
    (root / "tkinter" / "__init__.py").write_text('"""One text only, as on a system without it."""')
    found = StdlibText.load(root)
    assert "tkinter" not in found.classes and len(found.classes) == len(PACKAGES) - 1
    assert "tkinter" in found.notes[0]
    assert max(found.train.labels) == len(found.classes) - 1


def test_the_fingerprint_notices_a_change(tmp_path):
    root = write_library(tmp_path)
    before = StdlibText.load(root).fingerprint
    (root / "shelve.py").write_text('"""another text"""')
    stdlib_text._docstrings.cache_clear()
    assert StdlibText.load(root).fingerprint != before
