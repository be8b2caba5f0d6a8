"""Batches for InstructBLIP and BLIP-2 over decoder-only and encoder-decoder language models; generation and its files."""

from __future__ import annotations

import functools
import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("PIL")

import hypothesis
import vl_files as files
import vl_models as models
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from fastgist.train import vl_captions, vl_questions
from fastgist.train.config import UserError
from fastgist.train.data import EpochBatches
from fastgist.train.vl_collate import VLCollator, fill
from fastgist.train.vl_evaluate import evaluate, score, submission, write_results
from fastgist.train.vl_records import Example, Record, VLDataset

KINDS = [(family, language) for family in ("instructblip", "blip2") for language in ("opt", "t5")]
TEMPLATE = "Question: {} Short answer:"
QUERIES = 3


@pytest.fixture(scope="module")
def made():
    """(family, language) -> (model, processor)."""
    return {kind: (models.model(*kind), models.processor(*kind)) for kind in KINDS}


@pytest.fixture
def data(tmp_path):
    questions, annotations = files.vqa(tmp_path)
    records = vl_questions.vqav2(questions, tmp_path, annotations).records
    asked = ("What color is ball 0?", "Is the sky dark?", "What color is the balls? Is the sky dark?")
    records = [replace(r, question=question) for r, question in zip(records, asked)]
    records[1] = replace(records[1], answers=("light blue green",) * 4 + tuple(files.ANSWERS[4:]))
    return VLDataset(records)


def _collator(made, kind, templates=TEMPLATE, **options):
    return VLCollator.for_model(*made[kind], templates, **options)


# -- what a batch holds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_training_batches(made, data, kind):
    model, processor = made[kind]
    collator = _collator(made, kind, sample=False)
    batch = collator(list(data))
    words, image = processor.tokenizer, model.config.image_token_index
    names = {"pixel_values", "input_ids", "attention_mask", "labels"}
    if kind[0] == "instructblip":
        names |= {"qformer_input_ids", "qformer_attention_mask"}
    assert set(batch) == names and batch["pixel_values"].shape == (3, 3, models.SIZE, models.SIZE)
    for row, example in enumerate(data):
        prompt = f"Question: {example.record.question} Short answer:"
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
        labels = batch["labels"][row]
        said = labels[labels != -100].tolist()
        answer = ("blue", "light blue green", "blue")[row]
        assert ids[:QUERIES] == [image] * QUERIES and image not in ids[QUERIES:]
        if kind[1] == "opt":
            # as running text: BOS, the prompt, a space, the answer, the end; the labels stand where their tokens do
            assert ids[QUERIES:] == [*words(f"{prompt} {answer}")["input_ids"], words.eos_token_id]
            assert torch.equal(batch["input_ids"][row][labels != -100], labels[labels != -100])
            assert words.decode(said) == f" {answer}</s>" and labels.shape == batch["input_ids"][row].shape
        else:
            assert ids[QUERIES:] == words(prompt)["input_ids"] and said == words(answer)["input_ids"]
            assert words.decode(said) == f"{answer}</s>"
        padding = ~batch["attention_mask"][row].bool()
        assert (batch["input_ids"][row][padding] == words.pad_token_id).all() and not padding[: len(ids)].any()
        if kind[0] == "instructblip":
            asked = batch["qformer_input_ids"][row][batch["qformer_attention_mask"][row].bool()]
            assert asked.tolist() == processor.qformer_tokenizer(prompt)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_of_the_answer_alone(made, data, kind):
    """Against the cross-entropy written out, for each example by itself: neither prompt, image nor padding counts."""
    model, processor = made[kind]
    collator = _collator(made, kind, sample=False)
    batch = collator(list(data))
    with torch.no_grad():
        loss = model(**batch).loss
    total, count = torch.zeros((), dtype=torch.float64), 0
    for example, said in zip(data, ("blue", "light blue green", "blue")):
        alone = collator.inputs([example])
        prompt = f"Question: {example.record.question} Short answer:"
        words = processor.tokenizer
        if kind[1] == "opt":
            before = alone["input_ids"].shape[1]
            answer = [*words(f"{prompt} {said}")["input_ids"][before - QUERIES :], words.eos_token_id]
            alone["input_ids"] = torch.cat((alone["input_ids"], torch.tensor([answer])), 1)
            alone["attention_mask"] = torch.ones_like(alone["input_ids"])
            with torch.no_grad():
                logits = model(**alone).logits[0, before - 1 : -1]
        else:
            answer = words(said)["input_ids"]
            start = torch.tensor([[model.config.text_config.decoder_start_token_id, *answer[:-1]]])
            with torch.no_grad():
                logits = model(**alone, decoder_input_ids=start).logits[0]
        terms = torch.nn.functional.cross_entropy(logits.double(), torch.tensor(answer), reduction="none")
        total, count = total + terms.sum(), count + len(answer)
    torch.testing.assert_close(loss.double(), total / count, rtol=2e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_image_reaches_the_model(made, data, kind):
    model, _ = made[kind]
    batch = _collator(made, kind, sample=False)(list(data))
    with torch.no_grad():
        one = model(**batch).logits
        other = model(**batch | {"pixel_values": batch["pixel_values"].flip(0) + 1}).logits
    assert not torch.allclose(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_generate_what_the_processors_own_do(made, data, kind):
    """Beams, several prompts of different lengths: the processor pads behind the image tokens, we in front of them."""
    model, processor = made[kind]
    collator = _collator(made, kind)
    examples = list(data)
    ours = collator.inputs(examples)
    prompts = [f"Question: {e.record.question} Short answer:" for e in examples]
    side = processor.tokenizer.padding_side
    processor.tokenizer.padding_side = "left" if kind[1] == "opt" else "right"
    theirs = processor(images=[e.picture for e in examples], text=prompts, padding=True, return_tensors="pt")
    processor.tokenizer.padding_side = side
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    options = {"num_beams": 3, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"])
    one, other = model.generate(**ours, **options), model.generate(**theirs, **options)
    assert torch.equal(one[:, -6:], other[:, -6:])
    alone = [model.generate(**collator.inputs([e]), **options)[0, -6:] for e in examples]
    assert torch.equal(one[:, -6:], torch.stack(alone))


def test_captions_with_and_without_a_prompt(made, tmp_path):
    data = vl_captions.coco(files.coco(tmp_path), tmp_path)
    for template, kind in (("A short image caption:", KINDS[0]), ("", KINDS[2])):
        _, processor = made[kind]
        batch = _collator(made, kind, template, sample=False)(list(data))
        labels = batch["labels"][0]
        space = " " if template else ""
        assert processor.tokenizer.decode(labels[labels != -100]) == f"{space}Caption 4 of image 9, café.</s>"
        assert processor.tokenizer.decode(batch["input_ids"][0][QUERIES:]).startswith(f"</s>{template}{space}Caption 4")


def test_long_prompts_and_answers_are_cut(made, data):
    kind = ("instructblip", "opt")
    _, processor = made[kind]
    batch = _collator(made, kind, sample=False, max_prompt_tokens=5, max_answer_tokens=1)(list(data))
    assert (batch["attention_mask"].sum(1) == QUERIES + 5 + 1).all() and ((batch["labels"] != -100).sum(1) == 1).all()
    assert processor.tokenizer.eos_token_id not in batch["labels"]  # what is cut off has no end
    batch = _collator(made, ("instructblip", "t5"), sample=False, max_answer_tokens=2)(list(data))
    assert batch["labels"].shape == (3, 2)


@pytest.mark.parametrize("language", ["opt", "llama"])
@given(prompt=st.text(max_size=12), answer=st.text(min_size=1, max_size=12))
@hypothesis.example(prompt="What color ", answer="is it")  # " is" is one token: it would take the prompt's last
@settings(max_examples=150, deadline=None)
def test_prompt_tokens_are_those_that_generation_starts_from(language, prompt, answer):
    """Whatever the texts, and also where tokens would merge across the boundary."""
    processor = _processor(language)
    collator = VLCollator(processor, True, "{}", max_prompt_tokens=200)
    asked = [Example(Record("vqav2", "val", 1, 1, None, prompt, (answer,)), _picture())]
    batch, start = collator(asked), collator.inputs(asked)
    length = start["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][:, :length], start["input_ids"])
    assert (batch["labels"][:, :length] == -100).all() and (batch["labels"][:, length:] != -100).all()
    said = processor.tokenizer.decode(batch["labels"][0, length:-1])
    answer = answer.replace("▁", " ") if language == "llama" else answer  # its own mark for a space
    assert said.strip(" ") == answer.strip(" ")
    assert batch["labels"][0, -1] == processor.tokenizer.eos_token_id


@functools.cache
def _processor(language):
    return models.processor("blip2", language)


def _picture():
    from PIL import Image

    return Image.new("RGB", (8, 8))


# -- draws -----------------------------------------------------------------------------------------------------------


def test_answers_are_drawn_by_their_counts(made):
    collator = VLCollator(models.processor("blip2", "opt"), True, ["{} a", "{} b", "{} c"], seed=3)
    record = Record("vqav2", "train", 1, 1, None, "q", tuple(files.ANSWERS))
    draws = [Example(record, None, row, epoch) for row in range(100) for epoch in range(30)]
    said = Counter(collator.target(example) for example in draws)
    templates = Counter(collator.prompt(example) for example in draws)
    for counted, expected in (
        (said, {"blue": 0.6, "light blue": 0.3, "green": 0.1}),
        (templates, dict.fromkeys(("q a", "q b", "q c"), 1 / 3)),
    ):
        assert set(counted) == set(expected)
        for key, share in expected.items():  # five standard deviations of 3,000 draws
            assert abs(counted[key] / 3000 - share) < 5 * (share * (1 - share) / 3000) ** 0.5
    again = VLCollator(models.processor("blip2", "opt"), True, ["{} a", "{} b", "{} c"], seed=3)
    assert [again.target(e) for e in draws] == [collator.target(e) for e in draws]
    other = VLCollator(models.processor("blip2", "opt"), True, ["{} a", "{} b", "{} c"], seed=4)
    assert [other.target(e) for e in draws] != [collator.target(e) for e in draws]
    fixed = VLCollator(models.processor("blip2", "opt"), True, ["{} a", "{} b"], sample=False)
    assert {fixed.target(e) for e in draws} == {"blue"} and {fixed.prompt(e) for e in draws} == {"q a"}


def test_epochs_differ_and_loaders_with_processes_agree(made, data):
    collator = _collator(made, ("blip2", "t5"))
    batches = EpochBatches(len(data), 1, seed=0)

    def labels(epoch, workers):
        batches.seek(epoch, 0)
        loader = DataLoader(data, batch_sampler=batches, collate_fn=collator, num_workers=workers)
        return [batch["labels"].tolist() for batch in loader]

    plain = [labels(epoch, 0) for epoch in range(6)]
    assert len({str(sorted(epoch)) for epoch in plain}) > 1
    assert labels(1, 2) == plain[1]


def test_best_answer_of_equals_is_the_first(made):
    collator = _collator(made, ("blip2", "t5"), sample=False)
    record = Record("vqav2", "val", 1, 1, None, "q", ("red", "blue", "blue", "red", "green"))
    assert collator.target(Example(record, None)) == "red"


# -- refusals --------------------------------------------------------------------------------------------------------


def test_what_cannot_work_is_refused(made, data):
    model, processor = made["instructblip", "opt"]
    with pytest.raises(ValueError, match="at least one template"):
        VLCollator(processor, True, [])
    with pytest.raises(ValueError, match="the processor has 5 queries, the model 3"):
        VLCollator.for_model(model, models.processor("instructblip", "opt", 5), TEMPLATE)
    bare = models.processor("blip2", "opt")
    bare.num_query_tokens = None
    with pytest.raises(ValueError, match="would insert no image tokens"):
        VLCollator(bare, True, TEMPLATE)
    strange = models.processor("blip2", "opt")
    strange.tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no pad_token"):
        VLCollator(strange, True, TEMPLATE)
    strange = models.processor("blip2", "opt")
    strange.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        VLCollator(strange, True, TEMPLATE)
    other = models.model("blip2", "opt")
    other.config.image_token_index = 7
    with pytest.raises(ValueError, match=r"image token is \d+, model.config.image_token_index is 7"):
        VLCollator.for_model(other, models.processor("blip2", "opt"), TEMPLATE)
    collator = VLCollator(processor, True, TEMPLATE)
    silent = Example(Record("vqav2", "test", 5, 1, None, "q"), _picture())
    with pytest.raises(UserError, match=r"vqav2's test split has no answers to train on \(record 5\)"):
        collator([silent])
    assert collator.inputs([silent])["input_ids"].shape[0] == 1
    with pytest.raises(ValueError, match="has 1 places for no question"):
        collator.inputs([Example(Record("coco", "val", 1, 1, None), _picture())])


def test_fill():
    assert fill("Q: {} A:", "what is {x}, or {}?") == "Q: what is {x}, or {}? A:"
    assert fill("a {photo}", None) == "a {photo}"
    for template, question in (("a photo", "q"), ("{} {}", "q"), ("{}", None)):
        with pytest.raises(ValueError, match="places for"):
            fill(template, question)


def test_the_end_is_what_generation_stops_at(made, data):
    """BLIP-2's OPT stops at a newline: trained towards another end, it would never stop."""
    model = models.model("blip2", "opt")
    newline = models.tokenizer("opt")("\n", add_special_tokens=False)["input_ids"][0]
    model.language_model.generation_config.eos_token_id = [newline, 1]
    batch = VLCollator.for_model(model, models.processor("blip2", "opt"), TEMPLATE)(list(data))
    for labels in batch["labels"]:
        assert labels[labels != -100][-1] == newline


# -- generation ------------------------------------------------------------------------------------------------------


class _Says(torch.nn.Module):
    """A model that says what it is told, in transformers' form: behind the prompt if it is decoder-only."""

    def __init__(self, collator, says):
        super().__init__()
        self.collator, self.says, self.seen = collator, iter(says), []
        self.frozen, self.tuned = torch.nn.Linear(1, 1).eval(), torch.nn.Linear(1, 1)

    def generate(self, input_ids, **options):
        assert not any(module.training for module in self.modules()) and not torch.is_grad_enabled()
        self.seen.append(options)
        tokenizer = self.collator.processor.tokenizer
        texts = [next(self.says) for _ in input_ids]
        tokens = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")["input_ids"]
        return torch.cat((input_ids, tokens), 1) if self.collator.decoder_only else tokens


@pytest.mark.parametrize("language", ["opt", "t5"])
def test_evaluate_scores_and_writes(data, tmp_path, language):
    collator = VLCollator(models.processor("instructblip", language), language == "opt", TEMPLATE)
    model = _Says(collator, ["blue", " Light blue green. ", "green"])
    path = tmp_path / "out" / "results.json"
    done = evaluate(model, data, collator, batch_size=2, results=path, progress=False, generation={"num_beams": 4})
    assert (model.training, model.frozen.training, model.tuned.training) == (True, False, True)
    assert [s["num_beams"] for s in model.seen] == [4, 4]
    assert done.predictions == {1: "blue", 1001: "Light blue green.", 2001: "green"} and done.results == path
    assert done.metrics["accuracy"] == pytest.approx(100 * (1.0 + 1.0 + 0.3) / 3)
    assert json.loads(path.read_text()) == [
        {"question_id": 1, "answer": "blue"},
        {"question_id": 1001, "answer": "Light blue green."},
        {"question_id": 2001, "answer": "green"},
    ]
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


@pytest.mark.parametrize("kind", KINDS)
def test_evaluate_with_a_model(made, data, kind, capfd):
    model, processor = made[kind]
    collator = _collator(made, kind)
    done = evaluate(model, data, collator, batch_size=2, generation={"num_beams": 2, "max_new_tokens": 4})
    assert set(done.predictions) == {1, 1001, 2001} and 0 <= done.metrics["accuracy"] <= 100
    bar = capfd.readouterr().err
    assert "3/3" in bar and "img" in bar
    tokens = model.generate(**collator.inputs([data[2]]), num_beams=2, max_new_tokens=4, min_new_tokens=1)[0]
    new = tokens[collator.inputs([data[2]])["input_ids"].shape[1] :] if kind[1] == "opt" else tokens
    assert done.predictions[2001] == processor.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_evaluate_puts_the_model_back_when_a_picture_fails(made, data, tmp_path):
    kind = ("blip2", "t5")
    model = made[kind][0]
    data.records[2].image.unlink()
    model.train()
    try:
        with pytest.raises(UserError, match="cannot read image"):
            evaluate(model, data, _collator(made, kind), results=tmp_path / "r.json", batch_size=1, progress=False)
        assert model.training and not (tmp_path / "r.json").exists()
    finally:
        model.eval()
    with pytest.raises(ValueError, match="id 1 is there twice"):
        evaluate(model, data.subset([0, 0]), _collator(made, kind), progress=False)
    with pytest.raises(ValueError, match="empty"):
        evaluate(model, data.subset([]), _collator(made, kind), progress=False)


def test_submissions_are_what_each_server_takes(tmp_path):
    said = {}

    def of(records):
        said.update({r.id: f"text {r.id}" for r in records})
        return submission(records, said)

    gqa = of(vl_questions.gqa(files.gqa(tmp_path, "test"), tmp_path).records)
    assert gqa[0] == {"questionId": "02930152", "prediction": "text 02930152"}
    aokvqa = of(vl_questions.aokvqa(files.aokvqa(tmp_path), tmp_path).records)
    assert aokvqa["22MexNkBPpdZGX6sxbxVB0"] == {"direct_answer": "text 22MexNkBPpdZGX6sxbxVB0"}
    assert of(vl_questions.textvqa(files.textvqa(tmp_path, "test"), tmp_path).records)[1] == {
        "question_id": 1, "answer": "text 1",
    }  # fmt: skip
    captions = vl_captions.nocaps(files.nocaps(tmp_path), tmp_path).records
    assert of(captions)[2] == {"image_id": 2, "caption": "text 2"}
    path = write_results(captions, {0: "café 什么", 1: "b", 2: "c"}, tmp_path / "r.json")
    assert json.loads(path.read_bytes().decode("utf-8"))[0] == {"image_id": 0, "caption": "café 什么"}
    with pytest.raises(KeyError):
        write_results(captions, {0: "a"}, path)
    assert json.loads(path.read_text())[2]["caption"] == "c" and not list(tmp_path.glob(".r.json*"))


def test_scores_of_captions(tmp_path):
    records = vl_captions.nocaps(files.nocaps(tmp_path), tmp_path).records
    texts = ["a red ball", "two dogs run fast", "a man on a horse"]
    records = [replace(r, references=(t, "some words"), domain=d) for r, t, d in zip(
        records, texts, ("in-domain", "in-domain", "out-domain"))]  # fmt: skip
    metrics = score(records, dict(enumerate(texts)))
    assert set(metrics) >= {"cider", "cider/in-domain", "cider/out-domain"}
    assert metrics["cider/out-domain"] == 0.0 and metrics["cider"] > metrics["cider/in-domain"] * 0.5 > 0
    if "bleu4" in metrics:
        assert metrics["bleu4"] == pytest.approx(100)
    assert score(vl_captions.nocaps(files.nocaps(tmp_path, "test"), tmp_path).records, dict(enumerate(texts))) == {}
    with pytest.raises(ValueError, match="no prediction for nocaps's image 2"):
        score(records, {0: "a", 1: "b"})
    with pytest.raises(ValueError, match="captions have no option normalize"):
        score(records, dict(enumerate(texts)), normalize=True)
    with pytest.raises(ValueError, match="got both"):
        score([*records, Record("vqav2", "val", 9, 9, None, "q", ("a",))], dict(enumerate(texts)))


def test_trainer_draws_anew_every_epoch(made, data, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = models.model("blip2", "t5")
    collator = VLCollator.for_model(model, made["blip2", "t5"][1], TEMPLATE)
    seen: dict[tuple[int, int], str] = {}

    def collate(examples):
        seen.update({(e.epoch, e.row): collator.target(e) for e in examples})
        return collator(examples)

    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), num_train_epochs=8, per_device_train_batch_size=3, remove_unused_columns=False,
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True, learning_rate=1e-3,
    )  # fmt: skip
    Trainer(model, arguments, data_collator=collate, train_dataset=data).train()
    assert set(seen) == {(epoch, row) for epoch in range(8) for row in range(3)}
    assert len({seen[epoch, 0] for epoch in range(8)}) > 1


def test_a_processor_that_reads_no_instruction_for_the_qformer_is_refused(made):
    model = made["instructblip", "opt"][0]
    with pytest.raises(ValueError, match="has no tokenizer: take an InstructBlipProcessor"):
        VLCollator.for_model(model, models.processor("blip2", "opt"), TEMPLATE)
