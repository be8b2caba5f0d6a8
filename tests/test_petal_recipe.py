"""PETAL's tasks: every one loads from published files, gives batches, is generated for and scored."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")
pytest.importorskip("PIL")

import vl_files as files
import vl_models as models

from fastgist.recipes import petal
from fastgist.train.vl_collate import VLCollator, fill
from fastgist.train.vl_evaluate import evaluate
from fastgist.train.vl_load import load


def _write(name, root, split):
    if name == "okvqa":
        files.vqa(root, "okvqa", f"{split}2014")
    elif name == "flickr30k":
        files.karpathy(root, "flickr30k")
    else:
        getattr(files, name)(root, split)


@pytest.mark.parametrize("language", ["opt", "t5"])
@pytest.mark.parametrize("name", petal.TASKS)
def test_every_task_runs(name, language, tmp_path):
    task = petal.task(name)
    for split in (task.train, task.evaluation):
        _write(name, tmp_path, split)
    train = load(task.dataset, tmp_path, task.train)
    train = train.one_per_reference() if task.per_reference else train
    model, processor = models.model("instructblip", language), models.processor("instructblip", language)
    collator = VLCollator.for_model(model, processor, task.template)
    assert model.train()(**collator([train[0], train[1]])).loss.item() > 0
    data = load(task.dataset, tmp_path, task.evaluation).subset([0])
    options = {"normalize": True} if task.normalize else {}
    settings = task.generation(collator.decoder_only) | {"max_new_tokens": 6, "num_beams": 2}
    done = evaluate(model, data, collator, generation=settings, progress=False, **options)
    assert set(done.metrics) >= ({"cider"} if task.per_reference else {"accuracy"})


def test_numbers_are_the_published_ones():
    tasks = petal.TASKS
    assert {(t.lr, t.weight_decay, t.per_reference) for t in tasks.values()} == {
        (2e-5, 0.02, False),
        (1e-5, 0.05, True),
    }
    assert {(t.epochs, t.warmup_steps, t.image_size, t.num_beams) for t in tasks.values()} == {(5, 1000, 224, 5)}
    assert [tasks[n].batch_size for n in tasks] == [16, 16, 32, 32, 32, 32]
    assert "repetition_penalty" not in tasks["gqa"].generation(decoder_only=True)
    assert tasks["gqa"].generation()["repetition_penalty"] == 1.5
    with pytest.raises(ValueError, match=r"did you mean okvqa"):
        petal.task("okvaq")


def test_templates_have_one_place_for_a_question_or_none():
    for template in petal.QUESTION_TEMPLATES:
        assert "which?" in fill(template, "which?")
    for template in petal.CAPTION_TEMPLATES:
        assert fill(template, None) == template
    for task in petal.TASKS.values():
        assert task.template in (petal.CAPTION_TEMPLATES if task.per_reference else petal.QUESTION_TEMPLATES)
