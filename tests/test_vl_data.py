"""The vision-language data sets' files: what is read from them, and what is said where something is wrong with one."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("PIL")

import vl_files as files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fastgist.train import vl_captions, vl_questions
from fastgist.train.config import UserError
from fastgist.train.data import Draw
from fastgist.train.vl_load import NAMES, load
from fastgist.train.vl_metrics import vqa_accuracy
from fastgist.train.vl_records import Record, VLDataset

QUESTIONS = ("vqav2", "okvqa", "aokvqa", "gqa", "textvqa")


@pytest.fixture
def root(tmp_path):
    return tmp_path


def _write(name, root, split="train"):
    """The published files of split ``split`` of data set ``name``."""
    year = {"train": 2014, "val": 2014, "test": 2015, "test-dev": 2015}.get(split)
    writers = {
        "vqav2": lambda: files.vqa(root, "vqav2", f"{split}{year}"),
        "okvqa": lambda: files.vqa(root, "okvqa", f"{split}{year}"),
        "aokvqa": lambda: files.aokvqa(root, split),
        "gqa": lambda: files.gqa(root, split),
        "textvqa": lambda: files.textvqa(root, split),
        "textcaps": lambda: files.textcaps(root, split),
        "coco2014": lambda: files.coco(root, split, 2014),
        "coco2017": lambda: files.coco(root, split, 2017),
        "coco": lambda: files.karpathy(root, "coco"),
        "flickr30k": lambda: files.karpathy(root, "flickr30k"),
        "nocaps": lambda: files.nocaps(root, split),
    }
    return writers[name]()


@pytest.mark.parametrize("name", NAMES)
def test_every_data_set_is_found_by_name_and_its_pictures_open(name, root):
    split = "val" if name == "nocaps" else "train"
    _write(name, root, split)
    data = load(name, root, split)
    assert len(data) >= 1
    for example in data:
        record = example.record
        assert example.picture.mode == "RGB" and example.picture.size == (24, 16)
        assert record.split == split and record.targets
        assert (record.question is not None) == (name in QUESTIONS)
        assert (record.references is None) == (name in QUESTIONS) and (record.answers is None) != (name in QUESTIONS)
        assert record.dataset == name.removesuffix("2014").removesuffix("2017")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("coco", "flickr30k")])
def test_test_splits_have_no_targets(name, root):
    _write(name, root, "test")
    data = load(name, root, "test")
    assert len(data) >= 2 and all(r.answers is None and r.references is None and not r.targets for r in data.records)


def test_annotations_may_lie_in_a_folder_and_images_elsewhere(root):
    files.textvqa(root / "data" / "annotations")
    files.textvqa(root / "pictures")
    assert len(load("textvqa", root / "data", "train", root / "pictures")) == 2
    files.textvqa(root / "data" / "again")
    with pytest.raises(UserError, match="more than once"):
        load("textvqa", root / "data", "train", root / "pictures")
    with pytest.raises(UserError, match=r"holds no TextVQA_0.5.1_val.json"):
        load("textvqa", root / "data", "val", root / "pictures")
    with pytest.raises(ValueError, match="expected one of vqav2"):
        load("vqa", root, "train")


# -- questions -------------------------------------------------------------------------------------------------------


def test_vqav2(root):
    questions, annotations = files.vqa(root)
    data = vl_questions.vqav2(questions, root, annotations)
    assert [r.id for r in data.records] == [1, 1001, 2001]
    record = data.records[1]
    assert record.image == root / "train2014" / "COCO_train2014_000000000018.jpg" and record.image_id == 18
    assert record.question == "What color is ball 1? 什么颜色" and record.answers == tuple(files.ANSWERS)
    assert record.counts == {"blue": 6, "light blue": 3, "green": 1} and record.answer_type == "other"
    assert record.soft_scores == pytest.approx({"blue": 1.0, "light blue": 0.9, "green": 0.3})


def test_images_may_be_the_split_folder_itself(root):
    questions, annotations = files.vqa(root)
    data = vl_questions.vqav2(questions, root / "train2014", annotations)
    assert data[0].record.image.parent == root / "train2014"


def test_test_dev_questions_are_about_the_test_images(root):
    questions, _ = files.vqa(root, subset="test-dev2015")
    record = vl_questions.vqav2(questions, root, split="test-dev").records[0]
    assert record.image.name == "COCO_test2015_000000000009.jpg" and record.split == "test-dev"


def test_okvqa_takes_the_answer_that_is_evaluated(root):
    questions, annotations = files.vqa(root, "okvqa", "val2014")
    assert vl_questions.okvqa(questions, root, annotations).records[0].answers == tuple(files.ANSWERS)


def test_aokvqa(root):
    record, hard = vl_questions.aokvqa(files.aokvqa(root), root).records
    assert record.id == "22MexNkBPpdZGX6sxbxVB0" and record.image == root / "train2017" / "000000299207.jpg"
    assert record.choices[record.correct_choice] == "cab" and (record.difficult, hard.difficult) == (False, True)
    assert record.counts["ride"] == 4 and len(record.answers) == 10


def test_gqa_in_one_file_and_in_several(root):
    one = files.gqa(root)
    record = vl_questions.gqa(one, root).records[1]
    assert (record.id, record.answers, record.split) == ("02930153", ("pipe",), "train")
    assert record.image == root / "images" / "n2354787.jpg"
    folder = root / "train_all_questions"
    for number, first in enumerate((100, 200)):
        one = files.gqa(root, first=first)
        folder.mkdir(exist_ok=True)
        one.rename(folder / f"train_all_questions_{number}.json")
    assert [r.id for r in vl_questions.gqa(folder, root).records] == ["0100", "0101", "0200", "0201"]
    with pytest.raises(UserError, match="repeats question_id 0200"):
        vl_questions.gqa([folder / "train_all_questions_1.json"] * 2, root)


def test_gqa_testdev_has_answers(root):
    path = files.gqa(root, "testdev")
    assert vl_questions.gqa(path, root, "testdev").records[0].answers == ("yes",)
    whole = json.loads(path.read_text())
    del whole["02930152"]["answer"]
    files.write_json(path, whole)
    with pytest.raises(UserError, match=r"\['02930152'\] has no 'answer'"):
        vl_questions.gqa(path, root)


def test_textvqa_val_lies_with_the_train_images(root):
    path = files.textvqa(root, "val")
    record = vl_questions.textvqa(path, root).records[1]
    assert record.image == root / "train_images" / "0054c91397f2fe01.jpg" and record.split == "val"
    assert record.counts == {"nokia": 9, "toshiba": 1}


# -- captions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("split", "year"), [("train", 2014), ("val", 2017)])
def test_coco(root, split, year):
    record = vl_captions.coco(files.coco(root, split, year), root).records[0]
    name = "COCO_train2014_000000000009.jpg" if year == 2014 else "000000000009.jpg"
    assert record.id == record.image_id == 9 and record.image == root / f"{split}{year}" / name
    assert record.references[0] == "Caption 4 of image 9, café." and len(record.references) == 5


def test_karpathy_counts_restval_as_train_unless_told(root):
    path = files.karpathy(root)
    assert [r.id for r in vl_captions.coco_karpathy(path, root, "train").records] == [100, 101]
    assert [r.id for r in vl_captions.coco_karpathy(path, root, "train", restval=False).records] == [100]
    test = vl_captions.coco_karpathy(path, root, "test").records
    assert [r.id for r in test] == [103] and test[0].image.parent == root / "val2014"
    with pytest.raises(UserError, match="is of the data set 'coco', not 'flickr30k'"):
        vl_captions.flickr30k(path, root, "train")
    with pytest.raises(ValueError, match="split: expected one of train, val, test"):
        vl_captions.coco_karpathy(path, root, "restval")


def test_flickr30k_and_its_token_file_agree(root):
    karpathy = vl_captions.flickr30k(files.karpathy(root, "flickr30k"), root, "val").records
    split = root / "val.txt"
    split.write_text("1000092791\n")
    path = files.tokens(root)
    tokens = vl_captions.flickr30k_tokens(path, root, "val", split).records
    assert [(r.id, r.image) for r in karpathy] == [(r.id, r.image) for r in tokens]
    assert len(vl_captions.flickr30k_tokens(path, root).records) == 3
    assert tokens[0].references[2] == "Two young guys , number 2 , look at hands ."
    split.write_text("1000092791.jpg\n7.jpg\n")
    with pytest.raises(UserError, match=r"val.txt: 1 of its 2 images have no caption in .*the first is 7"):
        vl_captions.flickr30k_tokens(path, root, "val", split)
    path.write_text(path.read_text() + "100.jpg caption\n")
    with pytest.raises(UserError, match="line 16 is not"):
        vl_captions.flickr30k_tokens(path, root)


def test_textcaps_are_put_together_by_image(root):
    records = vl_captions.textcaps(files.textcaps(root), root).records
    assert [r.id for r in records] == ["0054c91397f2fe10", "0054c91397f2fe11"]
    assert records[1].references == tuple(f"A bottle of wine labelled {n}." for n in range(5))
    with pytest.raises(UserError, match="is of the data set 'textcaps', not 'textvqa'"):
        vl_questions.textvqa(files.textcaps(root), root)


def test_nocaps_has_domains(root):
    path = files.nocaps(root)
    records = vl_captions.nocaps(path, root).records
    assert [r.domain for r in records] == ["in-domain", "near-domain", "out-domain"]
    assert len(records[2].references) == 10 and records[0].image == root / "val" / "0013ea2087020900.jpg"
    whole = json.loads(path.read_text())
    whole["images"][1]["domain"] = "indomain"
    with pytest.raises(UserError, match=r"images\[1\]\['domain'\] is 'indomain'"):
        vl_captions.nocaps(files.write_json(path, whole), root)


def test_one_per_reference(root):
    data = vl_captions.coco(files.coco(root), root)
    each = data.one_per_reference()
    assert len(each) == 10 and all(len(r.references) == 1 for r in each.records)
    assert {r.references[0] for r in each.records} == {t for r in data.records for t in r.references}
    with pytest.raises(UserError, match="has no captions"):
        vl_captions.coco(files.coco(root, "test"), root).one_per_reference()


# -- pictures --------------------------------------------------------------------------------------------------------


def test_pictures_are_rgb_and_upright(root):
    path = root / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (24, 16), 90).save(path, exif=exif)
    Image.new("RGBA", (5, 4), (10, 20, 30, 0)).save(root / "clear.png")
    data = VLDataset([Record("coco", "val", i, i, root / name) for i, name in enumerate(("turned.jpg", "clear.png"))])
    assert data[0].picture.mode == "RGB" and data[0].picture.size == (16, 24)
    assert data[1].picture.mode == "RGB" and data[1].picture.getpixel((0, 0)) == (10, 20, 30)


@pytest.mark.parametrize("damage", ["text", "cut", "gone"])
def test_an_unreadable_picture_is_named(root, damage):
    questions, annotations = files.vqa(root)
    data = vl_questions.vqav2(questions, root, annotations)
    path = data.records[0].image
    if damage == "text":
        path.write_text("not a picture")
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:200])
    else:
        path.unlink()
    with pytest.raises(UserError, match=f"cannot read image {path}"):
        data[0]


def test_draws_and_epochs(root):
    questions, annotations = files.vqa(root)
    data = vl_questions.vqav2(questions, root, annotations)
    assert (data[Draw(2, 5)].row, data[Draw(2, 5)].epoch, data[-1].row, data[1].epoch) == (2, 5, 2, 0)
    data.set_epoch(3)
    assert data[1].epoch == 3 and data[Draw(1, 0)].epoch == 0
    with pytest.raises(IndexError):
        data[3]
    both = data + data.subset([0])
    assert len(both) == 4 and both.records[3] is data.records[0]


def test_pictures_are_not_opened_before_they_are_asked_for(root, monkeypatch):
    questions, annotations = files.vqa(root)
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("opened"))
    data = VLDataset(vl_questions.vqav2(questions, root, annotations).records, transform=lambda p: p)
    assert len(data) == 3


# -- what is wrong with a file ---------------------------------------------------------------------------------------


def test_missing_images_are_counted_and_the_first_named(root):
    questions, annotations = files.vqa(root)
    first = root / "train2014" / "COCO_train2014_000000000018.jpg"
    first.unlink()
    with pytest.raises(UserError, match=f"questions.json: 1 of its 3 images are missing, the first is {first}"):
        vl_questions.vqav2(questions, root, annotations)
    assert [r.id for r in vl_questions.vqav2(questions, root, annotations, missing="drop").records] == [1, 2001]
    assert len(vl_questions.vqav2(questions, root, annotations, missing="ignore")) == 3
    for picture in (root / "train2014").iterdir():
        picture.unlink()
    with pytest.raises(UserError, match="3 of its 3 images are missing"):
        vl_questions.vqav2(questions, root, annotations, missing="drop")
    with pytest.raises(UserError, match="no such folder of images"):
        vl_questions.vqav2(questions, root / "nowhere", annotations)
    with pytest.raises(ValueError, match="missing: expected"):
        vl_questions.vqav2(questions, root, annotations, missing="skip")


def test_questions_and_annotations_must_belong_together(root):
    questions, annotations = files.vqa(root)
    whole = json.loads(annotations.read_text())
    rows = whole["annotations"]
    with pytest.raises(UserError, match=r"2 of the 3 questions in .* have no annotation, the first is question_id 1\b"):
        vl_questions.vqav2(questions, root, files.write_json(annotations, whole | {"annotations": rows[1:2]}))
    extra = [*rows, rows[0] | {"question_id": 77}]
    with pytest.raises(UserError, match=r"1 of its 4 annotations are of questions .* the first is question_id 77"):
        vl_questions.vqav2(questions, root, files.write_json(annotations, whole | {"annotations": extra}))
    with pytest.raises(UserError, match=r"annotations\[3\] repeats question_id 2001"):
        vl_questions.vqav2(questions, root, files.write_json(annotations, whole | {"annotations": [*rows, rows[0]]}))
    other = files.write_json(annotations, whole | {"data_subtype": "val2014"})
    with pytest.raises(UserError, match="annotations of 'val2014', but the questions are of 'train2014'"):
        vl_questions.vqav2(questions, root, other)
    with pytest.raises(UserError, match="split 'train' has annotations"):
        vl_questions.vqav2(questions, root)


@pytest.mark.parametrize("name", ["aokvqa", "gqa", "textvqa", "coco2014", "textcaps", "nocaps", "vqav2"])
def test_the_wrong_split_is_said(name, root):
    own, other = ("val", "test") if name == "nocaps" else ("train", "val")
    written = _write(name, root, own)
    loader = getattr(vl_questions, name, None) or getattr(vl_captions, name.removesuffix("2014"))
    paths = (written[0], root, written[1]) if name == "vqav2" else (written, root)
    with pytest.raises(UserError, match=f"holds the split '{own}', not '{other}'"):
        loader(*paths, split=other)
    with pytest.raises(ValueError, match="split: expected one of"):
        loader(*paths, split="trian")


def test_a_split_that_no_one_names_must_be_given(root):
    path = files.gqa(root)
    bare = path.rename(root / "questions.json")
    with pytest.raises(UserError, match=r"does not say which split it is: pass split="):
        vl_questions.gqa(bare, root)
    assert vl_questions.gqa(bare, root, "val").records[0].split == "val"
    path = files.textvqa(root)
    whole = json.loads(path.read_text()) | {"dataset_type": "training"}
    with pytest.raises(UserError, match=r"says that it is the split 'training', expected one of train, val, test"):
        vl_questions.textvqa(files.write_json(path, whole), root)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.pop("questions"), r"questions.json: it has no 'questions' \(it has info"),
        (
            lambda w: w["questions"][1].pop("image_id"),
            r"questions\[1\] has no 'image_id' \(it has question, question_id",
        ),
        (lambda w: w["questions"][2].update(image_id="9"), r"questions\[2\]\['image_id'\] is a text, expected a whole"),
        (lambda w: w["questions"][2].update(image_id=True), r"\['image_id'\] is true or false, expected a whole"),
        (lambda w: w["questions"][0].update(question=None), r"questions\[0\]\['question'\] is null, expected a text"),
        (lambda w: w["questions"].insert(0, 7), r"questions\[0\] is a whole number, expected an object"),
        (lambda w: w.update(questions={}), r"it has|'questions'\] is an object, expected a list"),
        (lambda w: w["questions"].clear(), r"3 annotations are of questions|holds no record"),
        (lambda w: w["questions"][1].update(question_id=1), r"questions\[1\] repeats question_id 1"),
    ],
)
def test_a_wrong_field_is_named_with_its_place(root, change, said):
    questions, annotations = files.vqa(root)
    whole = json.loads(questions.read_text(encoding="utf-8"))
    change(whole)
    with pytest.raises(UserError, match=said):
        vl_questions.vqav2(files.write_json(questions, whole), root, annotations)


def test_answers_must_be_texts(root):
    path = files.textvqa(root)
    whole = json.loads(path.read_text())
    whole["data"][1]["answers"] = ["a", 3]
    with pytest.raises(UserError, match=r"data\[1\]\['answers'\] is a list with a whole number"):
        vl_questions.textvqa(files.write_json(path, whole), root)
    whole["data"][1]["answers"] = []
    with pytest.raises(UserError, match=r"data\[1\]\['answers'\] is an empty list"):
        vl_questions.textvqa(files.write_json(path, whole), root)
    path = files.aokvqa(root)
    rows = json.loads(path.read_text())
    rows[0]["correct_choice_idx"] = 4
    with pytest.raises(UserError, match=r"\[0\]\['correct_choice_idx'\] is 4, of 4 choices"):
        vl_questions.aokvqa(files.write_json(path, rows), root)


def test_captions_of_unknown_images_and_images_without(root):
    path = files.coco(root)
    whole = json.loads(path.read_text())
    whole["annotations"][3]["image_id"] = 77
    with pytest.raises(UserError, match=r"annotations\[3\] is of image 77, which 'images' does not have"):
        vl_captions.coco(files.write_json(path, whole), root)
    whole["annotations"] = [a for a in whole["annotations"] if a["image_id"] == 9]
    with pytest.raises(UserError, match="1 of its 2 images have no caption, the first is 25"):
        vl_captions.coco(files.write_json(path, whole), root)
    del whole["annotations"]
    with pytest.raises(UserError, match="it has no 'annotations'"):
        vl_captions.coco(files.write_json(path, whole), root)


def test_files_that_are_no_whole_json(root):
    questions, annotations = files.vqa(root)
    content = questions.read_bytes()
    questions.write_bytes(b"\xef\xbb\xbf" + content)
    assert len(vl_questions.vqav2(questions, root, annotations)) == 3
    for broken, said in (
        (b"", "is empty"), (b"<html>not found</html>", "no JSON"), (b"[1, 2", "it was cut off"), (b"[]", "expected an object"),
        (b"[" * 100_000, "cut off|nested"), (b'{"questions": "\xff"}', r"not UTF-8 \(byte 15\)"),
    ):  # fmt: skip
        questions.write_bytes(broken)
        with pytest.raises(UserError, match=said) as caught:
            vl_questions.vqav2(questions, root, annotations)
        assert str(questions) in str(caught.value)
    with pytest.raises(UserError, match="no such file"):
        vl_questions.vqav2(root / "other.json", root, annotations)


@given(keep=st.floats(0, 0.9999))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_cut_off_anywhere_is_an_error_that_names_it(tmp_path, keep):
    path = tmp_path / "TextVQA_0.5.1_train.json"
    if not (tmp_path / "whole").exists():
        files.textvqa(tmp_path).rename(tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(UserError, match=r"TextVQA_0.5.1_train.json: (ends too soon|is empty|no JSON|not UTF-8)"):
        vl_questions.textvqa(path, tmp_path)


def _places(value, path=()):
    """The paths of every node of a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from _places(value[key], (*path, key))


def _with(value, path, new):
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = _with(value[path[0]], path[1:], new)
    return copy


@pytest.mark.parametrize("name", NAMES)
@given(draw=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_in_any_place_is_read_or_refused(name, tmp_path, draw):
    """Whatever stands where, an error is a UserError with the file's name: no traceback of ours."""
    split = "val" if name == "nocaps" else "train"
    if not any(tmp_path.iterdir()):
        _write(name, tmp_path, split)
    path = draw.draw(st.sampled_from(sorted(tmp_path.glob("*.json"))))
    content = path.read_text(encoding="utf-8")
    whole = json.loads(content)
    place = draw.draw(st.sampled_from(list(_places(whole))))
    new = draw.draw(st.sampled_from([None, True, 3, -1, 2.5, "", "x", "a/../\0b", [], [[]], {}, {"x": None}, ["x"]]))
    files.write_json(path, _with(whole, place, new))
    data = None
    try:
        data = load(name, tmp_path, split)
    except UserError as error:
        said = str(error)
    finally:
        path.write_text(content, encoding="utf-8")
    if data is None:
        assert str(tmp_path) in said
    else:
        assert data.records and all(isinstance(r.image_id, int | str) and r.image.is_file() for r in data.records)
        assert all(isinstance(text, str) for r in data.records for text in r.targets)


@given(st.lists(st.sampled_from(["blue", "red", "a b"]), min_size=2, max_size=12))
def test_soft_scores_are_the_accuracy_of_the_answers(answers):
    record = Record("vqav2", "val", 1, 1, None, "q", tuple(answers))
    for answer, score in record.soft_scores.items():
        assert score == pytest.approx(vqa_accuracy(answer, answers))
