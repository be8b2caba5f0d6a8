"""Texts for training: files, folders, the Hugging Face hub, or this Python's docstrings; columns by name or by type.

What comes out has the columns ``text``, ``pair`` (for sentence pairs) and ``label``, and no row without all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fastgist.train import selection
from fastgist.train.config import UserError
from fastgist.train.data import derive_seed
from fastgist.train.stdlib_text import StdlibText
from fastgist.train.text_config import Problem, TextConfig

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

__all__ = ["TextSplits", "load_texts"]

_VAL_NAMES = ("val", "valid", "validation", "dev")
_LABEL_NAMES = ("label", "labels", "class", "target", "score")
_BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass
class TextSplits:
    """``classes`` is None for a regression. ``notes`` are remarks for the user."""

    train: Dataset
    val: Dataset | None
    tests: dict[str, Dataset]
    classes: list[str] | None
    notes: list[str] = field(default_factory=list)

    def named(self) -> dict[str, Dataset]:
        found = {"train": self.train, **({"val": self.val} if self.val is not None else {})}
        return found | self.tests


def load_texts(config: TextConfig) -> TextSplits:
    """The splits of a resolved ``config``, with a part of train held out where no split is there to select by.

    Raises UserError for whatever is wrong with the data.
    """
    tables, notes = _tables(config)
    train_name, val_name, test_names = _split_names(tables, config)
    columns = _columns(tables[train_name], config)
    regression = _is_regression(tables[train_name], columns["label"], config)
    classes = None if regression else _class_names(tables[train_name], columns["label"])
    splits: dict[str, Dataset] = {}
    for name in [train_name, *([val_name] if val_name else []), *test_names]:
        splits[name], dropped = _tidy(tables[name], name, columns, classes)
        if dropped:
            notes.append(f"{dropped} of {len(tables[name])} rows in split {name} have no text or no label: left out")
    found = TextSplits(
        splits[train_name],
        splits[val_name] if val_name else None,
        {name: splits[name] for name in test_names},
        classes,
        notes,
    )
    _check_sizes(found, train_name)
    found = _few_shot(found, config) if config.shots is not None else _hold_out(found, config)
    _note_repeats(found)
    return found


# -- where they come from --------------------------------------------------------------------------------------------


def _tables(config: TextConfig) -> tuple[DatasetDict, list[str]]:
    try:
        import datasets
    except ImportError:
        raise UserError("reading texts needs the datasets library: pip install 'fastgist[train]'") from None
    data = str(config.data)
    if data == "stdlib":
        if Path("stdlib").is_dir():
            raise UserError("stdlib is the built-in data set and a folder here: write ./stdlib for the folder")
        return _stdlib()
    root = Path(data).expanduser()
    if not root.exists() and (data.count("/") > 1 or data.startswith((".", "/", "~")) or root.suffix in _BUILDERS):
        raise UserError(f"no such file or folder: {root}")
    try:
        if root.is_file():
            tables = _read_files({"train": root})
        elif root.is_dir():
            tables = _read_folder(root)
        else:
            tables = datasets.load_dataset(data, config.subset)
    except UserError:
        raise
    except Exception as error:
        what = (
            "could not be read" if root.exists() else "is no file or folder here and could not be loaded as a data set"
        )
        raise UserError(f"{data} {what}: {' '.join(str(error).split())[:400]}") from error
    if isinstance(tables, datasets.Dataset):
        tables = datasets.DatasetDict(train=tables)
    return tables, []


def _read_files(files: dict[str, Path]) -> DatasetDict:
    import datasets

    tables = {}
    for split, path in files.items():
        if path.suffix not in _BUILDERS:
            raise UserError(f"{path} is not one of {', '.join(_BUILDERS)}")
        options = {"delimiter": "\t"} if path.suffix == ".tsv" else {}
        tables[split] = datasets.load_dataset(_BUILDERS[path.suffix], data_files=str(path), split="train", **options)
    return datasets.DatasetDict(tables)


def _read_folder(root: Path) -> Any:
    """A folder of files named after splits, a saved DatasetDict, or a data set's own folder."""
    import datasets

    if (root / "dataset_dict.json").exists() or (root / "state.json").exists():
        return datasets.load_from_disk(str(root))
    files = {p.stem.lower(): p for p in sorted(root.iterdir()) if p.suffix in _BUILDERS and p.is_file()}
    known = {name: p for name, p in files.items() if name in ("train", "test", *_VAL_NAMES)}
    if known:
        return _read_files(known)
    if not files and not any(root.glob("*/*.parquet")):
        raise UserError(f"{root} holds no train file ({', '.join(f'train{e}' for e in _BUILDERS)})")
    return datasets.load_dataset(str(root))


def _stdlib() -> tuple[DatasetDict, list[str]]:
    import datasets

    corpus = StdlibText.load()
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=corpus.classes)})
    parts = {
        name: datasets.Dataset.from_dict({"text": part.texts, "label": part.labels}, features=features)
        for name, part in corpus.parts().items()
    }
    return datasets.DatasetDict(parts), list(corpus.notes)


# -- which splits and columns ----------------------------------------------------------------------------------------


def _split_names(tables: DatasetDict, config: TextConfig) -> tuple[str, str | None, list[str]]:
    if "train" not in tables:
        raise UserError(f"{config.data} has no train split (it has {', '.join(tables)})")
    if config.test_name is None:
        tests = ["test"] if "test" in tables else []
    else:
        tests = [name for name in config.test_name.split(",") if name]
    if config.val_name is None:
        val = next((name for name in _VAL_NAMES if name in tables and name not in tests), None)
    else:
        val = config.val_name or None
    for flag, name in [*(("--test-name", name) for name in tests), *([("--val-name", val)] if val else [])]:
        if name not in tables:
            raise UserError(f"{flag}: {config.data} has no split {name!r} (it has {', '.join(tables)})")
        if name == "train" or (flag == "--test-name" and name == val):
            raise UserError(f"{flag}: split {name!r} cannot be both reported on and used to train or select")
    return "train", val, tests


def _columns(table: Dataset, config: TextConfig) -> dict[str, str]:
    """Column by role (text, pair, label), as asked for or by their types."""
    import datasets

    features = table.features
    has = ", ".join(features)
    asked = {"text": config.text_column, "pair": config.pair_column, "label": config.label_column}
    for role, name in asked.items():
        if name and name not in features:
            raise UserError(f"{config.data} has no column {name!r} for --{role}-column (it has {has})")
    label = asked["label"]
    if label is None:
        typed = [c for c, f in features.items() if isinstance(f, datasets.ClassLabel)]
        named = [c for c in features if c.lower() in _LABEL_NAMES]
        numbers = [c for c, f in features.items() if _kind(f) in ("float", "int", "bool")]
        candidates = (typed or named) if typed or named else numbers
        if len(candidates) != 1:
            raise UserError(
                f"found {_which(candidates)} for the label in {config.data}: name one with --label-column (it has {has})"
            )
        label = candidates[0]
    texts = [c for c, f in features.items() if _kind(f) == "string" and c not in (label, *asked.values())]
    text, pair = asked["text"], asked["pair"]
    if text is None:
        wanted = 2 if pair is None else 1
        if not 1 <= len(texts) <= wanted:
            raise UserError(
                f"found {_which(texts)} for the text in {config.data}: name it with --text-column, and the second of a "
                f"pair with --pair-column (it has {has})"
            )
        text, pair = texts[0], texts[1] if len(texts) == 2 else pair
    found = {"text": text, **({"pair": pair} if pair else {}), "label": label}
    for role in ("text", "pair"):
        if role in found and _kind(features[found[role]]) != "string":
            raise UserError(f"--{role}-column {found[role]}: {features[found[role]]} is no text")
    if len(set(found.values())) < len(found):
        raise UserError(f"text, pair and label must be different columns, got {', '.join(found.values())}")
    return found


def _kind(feature: Any) -> str:
    dtype = str(getattr(feature, "dtype", ""))
    return next((kind for kind in ("string", "float", "int", "bool") if kind in dtype), "other")


def _which(names: Sequence[str]) -> str:
    return f"several columns ({', '.join(names)})" if names else "no column"


# -- labels ----------------------------------------------------------------------------------------------------------


def _is_regression(table: Dataset, column: str, config: TextConfig) -> bool:
    kind = _kind(table.features[column])
    if config.problem is Problem.REGRESSION:
        if kind not in ("float", "int"):
            raise UserError(f"--problem regression: the label column {column} holds no numbers")
        return True
    return config.problem is Problem.AUTO and kind == "float"


def _class_names(table: Dataset, column: str) -> list[str]:
    import datasets

    if isinstance(table.features[column], datasets.ClassLabel):
        return list(table.features[column].names)
    values = sorted({value for value in table.unique(column) if value is not None})
    if len(values) < 2:
        raise UserError(
            f"the label column {column} holds {len(values)} distinct value(s): at least two classes are needed"
        )
    return [str(value) for value in values]


def _tidy(table: Dataset, name: str, columns: dict[str, str], classes: list[str] | None) -> tuple[Dataset, int]:
    """(text, pair and label of the complete rows, how many were not)."""
    import datasets

    raw = table[columns["label"]]
    labels: list[Any]
    if classes is None:
        labels = [None if value is None or value != value else float(value) for value in raw]
    elif isinstance(table.features[columns["label"]], datasets.ClassLabel):
        names = table.features[columns["label"]].names
        labels = [names[value] if value is not None and 0 <= value < len(names) else None for value in raw]
    else:
        labels = [None if value is None else str(value) for value in raw]
    if classes is not None:
        index = {c: i for i, c in enumerate(classes)}
        unknown = sorted({label for label in labels if label is not None} - index.keys())
        if unknown:
            raise UserError(f"split {name} has class {unknown[0]!r} that train has not")
        labels = [None if label is None else index[label] for label in labels]
    texts = {role: list(table[column]) for role, column in columns.items() if role != "label"}
    rows = list(zip(*texts.values(), labels))
    keep = [i for i, row in enumerate(rows) if all(value is not None for value in row)]
    contents = {role: [values[i] for i in keep] for role, values in texts.items()}
    label = datasets.Value("float32") if classes is None else datasets.ClassLabel(names=classes)
    features = datasets.Features({**dict.fromkeys(texts, datasets.Value("string")), "label": label})
    tidy = datasets.Dataset.from_dict({**contents, "label": [labels[i] for i in keep]}, features=features)
    return tidy, len(rows) - len(keep)


def _check_sizes(splits: TextSplits, train_name: str) -> None:
    for name, table in splits.named().items():
        if not len(table):
            raise UserError(f"no row with text and label in split {name}")
    if splits.classes is not None:
        absent = sorted(set(range(len(splits.classes))) - set(splits.train["label"]))
        if absent:
            raise UserError(f"no training text of class {splits.classes[absent[0]]!r} in split {train_name}")


@dataclass
class _Rows:
    """A table as what :mod:`fastgist.train.selection` draws from."""

    kind: ClassVar[str] = "texts"

    table: Dataset

    @property
    def labels(self) -> list[int]:
        return list(self.table["label"])

    def subset(self, rows: list[int]) -> _Rows:
        return _Rows(self.table.select(rows))


def _few_shot(splits: TextSplits, config: TextConfig) -> TextSplits:
    """``--shots`` texts of each class to train on, and as many others, at most four, to select by: of the val split where
    there is one; none with --val-split 0."""
    assert config.shots is not None
    if splits.classes is None:
        raise UserError("--shots counts texts of a class, and these labels are numbers")
    train, rest = selection.few_shot(_Rows(splits.train), config.shots, splits.classes, config.seed)
    source = rest if splits.val is None else _Rows(splits.val)
    val = None if config.val_split == 0 else selection.few(source, config.shots, splits.classes, config.seed)
    notes = selection.notes_of(f"{config.shots} texts of each class", config.seed, val, splits.val is None)
    return dataclasses.replace(
        splits, train=train.table, val=None if val is None else val.table, notes=[*splits.notes, *notes]
    )


def _hold_out(splits: TextSplits, config: TextConfig) -> TextSplits:
    """Where there is no split to select by, take a share of the training texts, of every class alike."""
    if splits.val is not None or config.val_split <= 0:
        return splits
    by_class = "label" if splits.classes is not None else None
    seed = derive_seed(config.seed, len(splits.train)) & 0xFFFFFFFF
    try:
        parts = splits.train.train_test_split(test_size=config.val_split, stratify_by_column=by_class, seed=seed)
    except ValueError as error:
        raise UserError(
            f"too few texts: {len(splits.train)} to train on, of which {config.val_split:g} should be held out "
            f"({error}): add texts, give a val split, or pass --val-split 0"
        ) from error
    note = f"no split to select by: {len(parts['test'])} of {len(splits.train)} training texts held out for it"
    return dataclasses.replace(splits, train=parts["train"], val=parts["test"], notes=[*splits.notes, note])


def _note_repeats(splits: TextSplits) -> None:
    def rows(table: Dataset) -> list[tuple[str, ...]]:
        return list(zip(*(table[c] for c in table.column_names if c != "label")))

    known = set(rows(splits.train)) | (set(rows(splits.val)) if splits.val is not None else set())
    for name, table in splits.tests.items():
        repeats = sum(row in known for row in rows(table))
        if repeats:
            splits.notes.append(f"{repeats} of {len(table)} texts in split {name} are also trained on or selected by")
