"""Texts from files and folders, their columns and labels; tokenization, padding, metrics; the command line; GLUE."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("torchmetrics")

import datasets
from texts import few, pairs, write_bert, write_csv
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, LlamaConfig, RobertaConfig
from transformers.trainer_utils import EvalPrediction

from fastgist import PromptConfig, add_gist, get_peft_model
from fastgist.recipes import glue
from fastgist.train import text as run
from fastgist.train import text_metrics
from fastgist.train.config import Method, UserError
from fastgist.train.stdlib_text import StdlibText
from fastgist.train.text import collator, finetune_text, is_decoder, length_limit, tokenize
from fastgist.train.text_config import PaddingSide, Problem, TextConfig
from fastgist.train.text_data import load_texts
from fastgist.train.text_metrics import metric_names, metrics_function


@pytest.fixture(scope="module")
def corpus() -> StdlibText:
    return StdlibText.load()


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return write_bert(tmp_path_factory.mktemp("model") / "bert")


@pytest.fixture(scope="module")
def tokenizer(bert):
    return AutoTokenizer.from_pretrained(bert)


def load(data, **options):
    return load_texts(TextConfig(data=str(data), **options).resolved())


ROWS = [(f"a text number {i}, and more", i % 2) for i in range(20)]


# -- files and folders -----------------------------------------------------------------------------------------------


def test_every_kind_of_file_holds_the_same_texts(tmp_path):
    table = datasets.Dataset.from_dict({"text": [t for t, _ in ROWS], "label": [y for _, y in ROWS]})
    write_csv(tmp_path / "a.csv", ["text", "label"], ROWS)
    write_csv(tmp_path / "a.tsv", ["text", "label"], ROWS, delimiter="\t")
    table.to_json(tmp_path / "a.jsonl")
    table.to_json(tmp_path / "a.json", lines=False)
    table.to_parquet(tmp_path / "a.parquet")
    for name in ("a.csv", "a.tsv", "a.jsonl", "a.json", "a.parquet"):
        found = load(tmp_path / name, val_split=0.0)
        assert list(zip(found.train["text"], found.train["label"])) == ROWS, name
        assert found.val is None and found.tests == {} and found.classes == ["0", "1"]


def test_folders_of_splits(tmp_path):
    for name, rows in (("train", ROWS), ("dev", ROWS[:6]), ("test", ROWS[:4])):
        write_csv(tmp_path / "csv" / f"{name}.csv", ["text", "label"], rows)
    found = load(tmp_path / "csv")
    assert {k: len(v) for k, v in found.named().items()} == {"train": 20, "val": 6, "test": 4}
    assert found.notes == ["4 of 4 texts in split test are also trained on or selected by"]
    tables = datasets.DatasetDict(
        {name: datasets.Dataset.from_dict({"s": [f"{name} {i}" for i in range(8)], "label": [0, 1] * 4})
         for name in ("train", "validation", "validation_b", "test")}
    )  # fmt: skip
    tables.save_to_disk(tmp_path / "saved")
    assert load(tmp_path / "saved").val["text"][0] == "validation 0"
    found = load(tmp_path / "saved", test_name="validation,validation_b", val_split=0.25)
    assert list(found.tests) == ["validation", "validation_b"] and len(found.val) == 2
    assert all(text.startswith("train") for text in found.val["text"]), "what is reported on is not selected by"


def test_stdlib(corpus):
    found = load("stdlib")
    assert found.classes == corpus.classes and found.train["text"] == corpus.train.texts
    assert found.val["label"] == corpus.val.labels and found.tests["test"]["text"] == corpus.test.texts


# -- columns and labels ----------------------------------------------------------------------------------------------


def table_file(path: Path, **columns) -> Path:
    datasets.Dataset.from_dict(columns).to_parquet(path)
    return path


def test_columns_are_found_by_type_and_name(tmp_path):
    words, numbers = [f"w{i}" for i in range(6)], list(range(6))
    one = load(table_file(tmp_path / "1.parquet", idx=numbers, body=words, label=[0, 1] * 3), val_split=0)
    assert one.train["text"] == words and one.train.column_names == ["text", "label"]
    two = load(table_file(tmp_path / "2.parquet", a=words, b=words[::-1], score=[0.5] * 6), val_split=0)
    assert two.classes is None and two.train["pair"] == words[::-1] and two.train["label"] == [0.5] * 6
    three = table_file(tmp_path / "3.parquet", a=words, b=words, c=words, y=["yes", "no"] * 3)
    named = load(three, text_column="c", label_column="y", val_split=0)
    assert named.classes == ["no", "yes"] and named.train.column_names == ["text", "label"]
    assert named.train["label"] == [1, 0] * 3
    pair = load(three, text_column="b", pair_column="a", label_column="y", val_split=0)
    assert pair.train.column_names == ["text", "pair", "label"]
    alone = load(table_file(tmp_path / "4.parquet", t=words, grade=[3, 10, 2] * 2), val_split=0)
    assert alone.classes == ["2", "3", "10"] and alone.train["label"] == [1, 2, 0] * 2
    forced = load(tmp_path / "4.parquet", problem=Problem.REGRESSION, val_split=0)
    assert forced.classes is None and forced.train["label"] == [3.0, 10.0, 2.0] * 2


def test_rows_without_text_or_label_are_left_out_and_said(tmp_path):
    path = table_file(tmp_path / "a.parquet", t=["a", None, "c", "d", "e"], label=["x", "y", None, "y", "x"])
    found = load(path, val_split=0)
    assert found.train["text"] == ["a", "d", "e"] and found.train["label"] == [0, 1, 0]
    assert found.notes == ["2 of 5 rows in split train have no text or no label: left out"]
    features = datasets.Features({"t": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    datasets.DatasetDict(
        train=datasets.Dataset.from_dict({"t": ["a", "b"], "label": [0, 1]}, features=features),
        test=datasets.Dataset.from_dict({"t": ["c", "d"], "label": [-1, 1]}, features=features),
    ).save_to_disk(tmp_path / "hidden")
    found = load(tmp_path / "hidden", val_split=0)
    assert found.classes == ["no", "yes"] and found.tests["test"]["text"] == ["d"]


MISTAKES = [
    ({"a": ["x"], "b": ["y"], "c": ["z"], "label": [1]}, {}, "several columns .a, b, c. for the text"),
    ({"a": ["x"]}, {}, "no column for the label"),
    ({"a": ["x"], "m": [1], "n": [2]}, {}, "several columns .m, n. for the label"),
    ({"m": [1, 2], "label": [0, 1]}, {}, "no column for the text"),
    ({"a": ["x", "y"], "label": [0, 1]}, {"text_column": "b"}, "no column 'b' for --text-column .it has a, label"),
    ({"a": ["x", "y"], "label": [0, 1]}, {"text_column": "label", "label_column": "a"}, "--text-column label: .*is no text"),
    ({"a": ["x", "y"], "label": [0, 1]}, {"text_column": "a", "pair_column": "a"}, "must be different columns"),
    ({"a": ["x", "y"], "label": [1, 1]}, {}, "holds 1 distinct value"),
    ({"a": ["x", "y"], "label": ["u", "v"]}, {"problem": Problem.REGRESSION}, "holds no numbers"),
    ({"a": ["x", "y"], "label": [0, 1]}, {"test_name": "train"}, "cannot be both"),
    ({"a": ["x", "y"], "label": [0, 1]}, {"val_name": "dev"}, "--val-name: .* has no split 'dev' .it has train"),
    ({"a": ["x", "y"], "label": [0, 1]}, {}, "too few texts: 2 to train on"),
    ({"a": [None, None], "label": ["0", "1"]}, {"text_column": "a"}, "is no text|no row with text"),
]  # fmt: skip


@pytest.mark.parametrize(("columns", "options", "words"), MISTAKES, ids=[m[2][:25] for m in MISTAKES])
def test_mistakes_in_data_are_named(tmp_path, columns, options, words):
    with pytest.raises(UserError, match=words):
        load(table_file(tmp_path / "a.parquet", **columns), **options)


def test_files_that_are_not_there_or_not_data(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.parquet").write_bytes(b"no parquet")
    write_csv(tmp_path / "f" / "train.csv", ["t", "label"], ROWS)
    write_csv(tmp_path / "f" / "test.csv", ["t", "label"], [("a", 7)])
    write_csv(tmp_path / "g" / "test.csv", ["t", "label"], ROWS)
    for data, words in (
        (tmp_path / "none.csv", "no such file or folder"),
        ("here.csv", "no such file or folder"),
        (tmp_path / "a.txt", "is not one of .csv"),
        (tmp_path / "empty", "holds no train file"),
        (tmp_path / "broken.parquet", "could not be read"),
        (tmp_path / "f", "split test has class '7' that train has not"),
        (tmp_path / "g", "has no train split"),
    ):
        with pytest.raises(UserError, match=words):
            load(data)


# -- tokens ----------------------------------------------------------------------------------------------------------


def test_texts_are_cut_and_batches_padded_to_their_own_longest(tokenizer, corpus):
    rows = pairs(corpus.train, 6)
    table = datasets.Dataset.from_dict(
        {"text": [r[0] for r in rows], "pair": [r[1] for r in rows], "label": [r[2] for r in rows]}
    )
    encoded = tokenize(table, tokenizer, 20)
    lengths = [len(ids) for ids in encoded["input_ids"]]
    assert max(lengths) == 20 and all(ids.count(tokenizer.sep_token_id) == 2 for ids in encoded["input_ids"])
    assert encoded["labels"] == [r[2] for r in rows] and encoded.column_names[-1] == "labels"
    short = tokenize(datasets.Dataset.from_dict({"text": ["a", "of the value"], "label": [0, 1]}), tokenizer, 20)
    examples = [short[i] for i in range(2)]
    longest = max(len(e["input_ids"]) for e in examples)
    for side, first in ((PaddingSide.RIGHT, tokenizer.cls_token_id), (PaddingSide.LEFT, tokenizer.pad_token_id)):
        batch = collator(tokenizer, side)(examples)
        assert batch["input_ids"].shape == (2, longest) and batch["labels"].tolist() == [0, 1]
        assert batch["input_ids"][0, 0] == first
        assert batch["attention_mask"].sum(1).tolist() == [len(e["input_ids"]) for e in examples]
        for row, example in enumerate(examples):
            kept = batch["input_ids"][row][batch["attention_mask"][row] == 1]
            assert kept.tolist() == example["input_ids"]


def test_lengths_follow_the_model(tokenizer):
    bert = BertForSequenceClassification(
        BertConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            vocab_size=50,
            max_position_embeddings=40,
        )
    )
    assert length_limit(TextConfig(), bert, tokenizer) == 40 and not is_decoder(bert)
    assert length_limit(TextConfig(max_length=40), bert, tokenizer) == 40, "an encoder's gist token takes no position"
    with pytest.raises(UserError, match="--max-length 41: bert-base-uncased takes 40 tokens at most"):
        length_limit(TextConfig(max_length=41), bert, tokenizer)
    from transformers import LlamaForSequenceClassification, RobertaForSequenceClassification

    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 50,
    }
    roberta = RobertaForSequenceClassification(
        RobertaConfig(max_position_embeddings=42, pad_token_id=1, **sizes)
    ).eval()
    limit = length_limit(TextConfig(), roberta, tokenizer)
    assert limit == 40
    ids = torch.randint(3, 50, (1, limit + 1))
    roberta(input_ids=ids[:, :limit])
    with pytest.raises((IndexError, RuntimeError)):
        roberta(input_ids=ids)
    llama = LlamaForSequenceClassification(LlamaConfig(max_position_embeddings=30, pad_token_id=0, **sizes))
    assert is_decoder(llama)
    assert length_limit(TextConfig(), llama, tokenizer) == 29, "a decoder's takes one"
    assert length_limit(TextConfig(gist=False), llama, tokenizer) == 30
    for model, rows in ((bert, 0), (llama, 4)):  # a decoder's prompts take positions too
        prompted = get_peft_model(model, PromptConfig(length=4, deep=True))
        longest = model.config.max_position_embeddings - rows
        assert length_limit(TextConfig(gist=False), prompted, tokenizer) == longest
        assert length_limit(TextConfig(), add_gist(prompted), tokenizer) == longest - (rows > 0)


def test_left_padding_is_for_decoders(bert, tmp_path, corpus):
    path = write_csv(tmp_path / "a.csv", ["text", "label"], few(corpus.train, 2, 8))
    config = TextConfig(
        data=str(path), model=str(bert), padding_side=PaddingSide.LEFT, output_dir=tmp_path / "out", progress=False
    )
    with pytest.raises(UserError, match="--padding-side left: BertForSequenceClassification reads the first token"):
        finetune_text(config, say=lambda line: None)


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_decoders_predict_the_same_with_padding_on_either_side(family, tmp_path, corpus):
    """A small decoder in from_pretrained's form, read as the command reads it; in a batch, and alone without padding."""
    import transformers

    from fastgist.train.text_pretrain import train_tokenizer

    tokens = train_tokenizer([t for d in corpus.documents[:20] for t in d], 300, 40, causal=True)
    tokens.save_pretrained(tmp_path / "model")
    sizes = {
        "Llama": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48},
        "GPT2": {"n_embd": 32, "n_layer": 1, "n_head": 2},
    }[family]
    torch.manual_seed(0)
    settings = getattr(transformers, f"{family}Config")(vocab_size=len(tokens), max_position_embeddings=40, **sizes)
    getattr(transformers, f"{family}Model")(settings).save_pretrained(tmp_path / "model")
    config = TextConfig(model=str(tmp_path / "model"), progress=False, gist=False)
    model, tokenizer, _ = run.build_classifier(config, ["a", "b"])
    assert model.config.pad_token_id == tokenizer.pad_token_id is not None and is_decoder(model)
    texts = datasets.Dataset.from_dict(
        {"text": ["return a value", "a much longer text than that one is"], "label": [0, 1]}
    )
    examples = list(tokenize(texts, tokenizer, 40))
    model.eval()
    with torch.no_grad():
        alone = torch.cat([model(input_ids=torch.tensor([e["input_ids"]])).logits for e in examples])
        for side in PaddingSide:
            batch = collator(tokenizer, side, positions=True)(examples)
            batch.pop("labels")
            torch.testing.assert_close(model(**batch).logits, alone)


# -- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_are_sklearns_and_scipys():
    from scipy import stats
    from sklearn import metrics as sk

    scores, target = torch.randn(40, 4).numpy(), torch.randint(4, (40,)).numpy()
    found = metrics_function(["accuracy", "f1", "matthews"], 4)(EvalPrediction(scores, target))
    guess = scores.argmax(-1)
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(target, guess), abs=1e-6)
    assert found["f1"] == pytest.approx(sk.f1_score(target, guess, average="macro"), abs=1e-6)
    assert found["matthews"] == pytest.approx(sk.matthews_corrcoef(target, guess), abs=1e-6)
    two = metrics_function(["f1"], 2)(EvalPrediction(scores[:, :2], target % 2))
    assert two["f1"] == pytest.approx(sk.f1_score(target % 2, scores[:, :2].argmax(-1)), abs=1e-6)
    values, wanted = torch.randn(40, 1).numpy(), torch.randn(40).numpy()
    found = metrics_function(["pearson", "spearman"], None)(EvalPrediction(values, wanted))
    assert found["pearson"] == pytest.approx(stats.pearsonr(values[:, 0], wanted)[0], abs=1e-5)
    assert found["spearman"] == pytest.approx(stats.spearmanr(values[:, 0], wanted)[0], abs=1e-5)


def test_metrics_are_chosen_by_the_problem():
    assert metric_names(None, False) == ["accuracy", "f1"] and metric_names(None, True) == ["pearson", "spearman"]
    assert metric_names("matthews", False) == ["matthews"]
    for asked, regression in (("pearson", False), ("accuracy", True), ("bleu", False), (",", False)):
        with pytest.raises(UserError, match="--metrics"):
            metric_names(asked, regression)


def test_without_torchmetrics_the_loss_is_what_there_is(bert, tmp_path, corpus, monkeypatch):
    monkeypatch.setattr(text_metrics.importlib.util, "find_spec", lambda name: None)
    path = write_csv(tmp_path / "a.csv", ["text", "label"], few(corpus.train, 2, 12))
    lines: list[str] = []
    config = TextConfig(
        data=str(path),
        model=str(bert),
        epochs=2,
        val_split=0.25,
        output_dir=tmp_path / "out",
        progress=False,
        max_length=16,
    )
    summary = finetune_text(config, say=lines.append)
    assert summary["selected_by"] == "val loss" and list(summary["val"]) == ["loss"]
    assert any("torchmetrics is not installed: only the loss is measured" in line for line in lines)
    log = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert summary["val"]["loss"] == min(e["eval_loss"] for e in log if "eval_loss" in e)


# -- GLUE ------------------------------------------------------------------------------------------------------------


def glue_tables(task: glue.GlueTask, name: str, corpus: StdlibText, each: int = 15) -> datasets.DatasetDict:
    """Docstrings in the form the hub has the task in: its columns and splits, idx, labels of -1 in test."""
    tables = {}
    splits = ["train", *task.test, *(["test"] if name != "mnli" else ["test_matched", "test_mismatched"])]
    for number, split in enumerate(splits):
        rows = pairs(corpus.train if split == "train" else corpus.val, each, seed=number)
        same = [r[2] for r in rows]
        labels = {1: [4.0 * y for y in same], 2: same, 3: [i % 3 for i in range(len(rows))]}[task.labels]
        if split.startswith("test"):
            labels = [-1] * len(rows)
        label = datasets.Value("float32") if task.labels == 1 else datasets.ClassLabel(num_classes=task.labels)
        columns = {task.text: [r[0] for r in rows], **({task.pair: [r[1] for r in rows]} if task.pair else {})}
        features = {**dict.fromkeys(columns, datasets.Value("string")), "label": label, "idx": datasets.Value("int32")}
        columns |= {"label": labels, "idx": list(range(len(rows)))}
        tables[split] = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    return datasets.DatasetDict(tables)


@pytest.mark.parametrize("name", glue.TASKS)
def test_every_glue_task_is_read_as_it_is(name, tmp_path, corpus):
    """Columns, classes, metrics; the reported split is the hub's validation split and is never selected by."""
    task = glue.TASKS[name]
    tables = glue_tables(task, name, corpus)
    tables.save_to_disk(tmp_path / name)
    config = glue.config(name, data=str(tmp_path / name)).resolved()
    assert TextConfig(recipe=f"glue/{name}", data=str(tmp_path / name)).resolved() == replace(
        config, recipe=f"glue/{name}"
    )
    assert (
        glue.config(name).resolved().data == "nyu-mll/glue" and config.subset == name and config.epochs == task.epochs
    )
    found = load_texts(config)
    assert (1 if found.classes is None else len(found.classes)) == task.labels
    assert metric_names(config.metrics, found.classes is None) == list(task.metrics)
    assert list(found.tests) == list(task.test)
    assert ("pair" in found.train.column_names) == (task.pair is not None)
    key = (lambda t: list(zip(t["text"], t["pair"]))) if task.pair else (lambda t: list(t["text"]))
    source = (
        list(zip(*(tables["train"][c] for c in (task.text, task.pair)))) if task.pair else tables["train"][task.text]
    )
    assert sorted(key(found.train) + key(found.val)) == sorted(source) and len(found.val) == 3
    for split in task.test:
        assert found.tests[split]["text"] == tables[split][task.text]
        assert not set(key(found.val)) & set(key(found.tests[split]))


@pytest.mark.parametrize("name", glue.TASKS)
def test_a_glue_recipe_runs_end_to_end(name, tmp_path, corpus, bert):
    """Pairs of docstrings in the task's form: same package or not; the small BERT in place of a real one."""
    task = glue.TASKS[name]
    glue_tables(task, name, corpus, each=16).save_to_disk(tmp_path / name)
    config = TextConfig(
        recipe=f"glue/{name}", data=str(tmp_path / name), model=str(bert), epochs=1, max_length=32, lr=1e-3,
        output_dir=tmp_path / "out", progress=False, method=Method.ADAPTER,
    )  # fmt: skip
    summary = finetune_text(config, say=lambda line: None)
    assert list(summary["test"]) == list(task.test) and summary["selected_by"] == f"val {task.metrics[0]}"
    for scores in (summary["val"], *summary["test"].values()):
        assert set(scores) == {"loss", *task.metrics}
    assert summary["config"]["test_name"] == ",".join(task.test) and (tmp_path / "out" / "adapter").is_dir()


def test_names_that_are_no_recipe():
    with pytest.raises(UserError, match="no recipe named 'glue/ax': there are glue/cola"):
        TextConfig(recipe="glue/ax").resolved()
    with pytest.raises(ValueError, match="expected one of cola"):
        glue.config("ax")
    with pytest.raises(UserError, match="no data: give a file"):
        TextConfig().resolved()
    for field, value in (("temperature", 0.0), ("lr", 0.0), ("beta", float("nan"))):
        with pytest.raises(UserError, match=f"--{field}"):
            TextConfig(data="stdlib", **{field: value}).resolved()


# -- the command line ------------------------------------------------------------------------------------------------


def test_the_command(bert, tmp_path, corpus):
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from fastgist import cli

    def invoke(*arguments):
        return CliRunner().invoke(cli.build_app(), ["finetune-text", *map(str, arguments)], env={"COLUMNS": "120"})

    path = write_csv(tmp_path / "a.csv", ["text", "label"], few(corpus.train, 2, 12))
    common = ["--model", bert, "--epochs", 1, "--no-progress", "--output-dir", tmp_path / "out", "--max-length", 16]
    done = invoke(path, *common, "--method", "lora", "--set", "targets=q,k,v", "--rank", 2, "--no-gist")
    assert done.exit_code == 0, done.output
    assert "lora: " in done.stdout and "GIST" not in done.stdout and "adapter saved in" in done.stdout
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["config"]["set"] == ["targets=q,k,v"] and summary["gist"] is False
    for arguments, words in (
        ((path, *common), "holds a run already"),
        ((tmp_path / "none.csv", "--output-dir", tmp_path / "a", "--model", bert), "no such file"),
        ((path, "--output-dir", tmp_path / "b", "--model", tmp_path / "no-model"), "could not get the model"),
        (("--recipe", "glue/x"), "no recipe named"),
        ((path, "--model", bert, "--output-dir", path), "is a file"),
        ((path, "--model", bert, "--output-dir", tmp_path / "c", "--device", "tpu"), "--device is cpu"),
    ):
        done = invoke(*arguments)
        assert done.exit_code == 2, done.output
        (line,) = [line for line in done.stderr.strip().splitlines() if line.startswith("fastgist")]
        assert words in line
    assert "finetune-text" in CliRunner().invoke(cli.build_app(), ["--help"]).stdout
