"""Tiny copies of the vision-language data sets' files, in the formats that they are published in, with real JPEGs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ANSWERS = ["blue"] * 6 + ["light blue"] * 3 + ["green"]


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def picture(path: Path, color: tuple[int, int, int] = (200, 30, 40), size: tuple[int, int] = (24, 16)) -> Path:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def vqa(root: Path, name: str = "vqav2", subset: str = "train2014", count: int = 3) -> tuple[Path, Path]:
    """The questions' and the annotations' file, and images in ``root``; question 1000 * i + 1 about image 9 * (i + 1)."""
    prefix = "v2_" if name == "vqav2" else ""
    numbers = range(count)
    asked = [
        {"image_id": 9 * (i + 1), "question": f"What color is ball {i}? 什么颜色", "question_id": 1000 * i + 1}
        for i in numbers
    ]
    answered = [
        {
            "question_type": "what color",
            "multiple_choice_answer": "blue",
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": k + 1, "raw_answer": answer + "s"}
                for k, answer in enumerate(ANSWERS)
            ],
            "image_id": 9 * (i + 1),
            "answer_type": "other",
            "question_id": 1000 * i + 1,
        }
        for i in reversed(numbers)  # the published files' orders differ too
    ]
    about = {"info": {"year": 2017}, "data_type": "mscoco", "data_subtype": subset, "license": {}}
    folder = subset.replace("-dev", "")
    for i in numbers:
        picture(root / folder / f"COCO_{folder}_{9 * (i + 1):012}.jpg")
    questions = write_json(
        root / f"{prefix}OpenEnded_mscoco_{subset}_questions.json",
        about | {"task_type": "Open-Ended", "questions": asked},
    )
    annotations = root / f"{prefix}mscoco_{subset}_annotations.json"
    if not subset.startswith("test"):
        write_json(annotations, about | {"annotations": answered})
    return questions, annotations


def aokvqa(root: Path, split: str = "train") -> Path:
    rows: list[dict[str, Any]] = [
        {
            "split": split,
            "image_id": 299207 + i,
            "question_id": f"22MexNkBPpdZGX6sxbxVB{i}",
            "question": "What is the man by the bags awaiting?",
            "choices": ["skateboarder", "train", "delivery", "cab"],
            "correct_choice_idx": 3,
            "direct_answers": ["ride"] * 4 + ["bus"] * 3 + ["taxi", "cab", "travelling"],
            "difficult_direct_answer": bool(i),
            "rationales": ["A train would not be on the street."] * 3,
        }
        for i in range(2)
    ]
    for row in rows:
        picture(root / f"{split}2017" / f"{row['image_id']:012}.jpg")
        if split == "test":
            for key in ("correct_choice_idx", "direct_answers", "rationales"):
                del row[key]
    return write_json(root / f"aokvqa_v1p0_{split}.json", rows)


def gqa(root: Path, split: str = "train", first: int = 2930152) -> Path:
    rows: dict[str, dict[str, Any]] = {}
    for i, answer in enumerate(("yes", "pipe")):
        rows[f"0{first + i}"] = {
            "semantic": [{"operation": "select", "dependencies": [], "argument": "sky (2486325)"}],
            "entailed": [], "equivalent": [f"0{first + i}"], "question": "Is the sky dark?", "imageId": f"n{2354786 + i}",
            "isBalanced": True, "groups": {"global": None, "local": "06-sky_dark"}, "answer": answer,
            "semanticStr": "select: sky (2486325)", "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
            "types": {"detailed": "verifyAttr", "semantic": "attr", "structural": "verify"},
            "fullAnswer": "Yes, the sky is dark.",
        }  # fmt: skip
        picture(root / "images" / f"n{2354786 + i}.jpg")
        if split == "test":
            rows[f"0{first + i}"] = {k: rows[f"0{first + i}"][k] for k in ("isBalanced", "question", "imageId")}
    return write_json(root / f"{split}_balanced_questions.json", rows)


def _flickr(image: str, split: str) -> dict[str, Any]:
    return {
        "image_id": image, "image_classes": ["Billboard"], "image_width": 24, "image_height": 16, "set_name": split,
        "flickr_original_url": f"https://farm1.staticflickr.com/{image}_o.jpg",
        "flickr_300k_url": f"https://c4.staticflickr.com/{image}_z.jpg",
    }  # fmt: skip


def textvqa(root: Path, split: str = "train") -> Path:
    rows = []
    for i in range(2):
        image = f"0054c91397f2fe0{i}"
        picture(root / ("test_images" if split == "test" else "train_images") / f"{image}.jpg")
        row = _flickr(image, split) | {"question_id": i, "question": "what is the brand of phone?"}
        row |= {"question_tokens": ["what", "is", "the", "brand", "of", "phone"]}
        rows.append(row if split == "test" else row | {"answers": ["nokia"] * 9 + ["toshiba"]})
    about = {"dataset_type": split, "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    return write_json(root / f"TextVQA_0.5.1_{split}.json", about | {"data": rows})


def textcaps(root: Path, split: str = "train") -> Path:
    rows: list[dict[str, Any]] = []
    texts = [f"A bottle of wine labelled {n}." for n in range(5)]
    for number in range(5):  # entry by entry, so that the captions of an image do not stand together
        for i in range(2):
            image = f"0054c91397f2fe1{i}"
            row = _flickr(image, split) | {"image_name": image, "image_path": f"train/{image}.jpg"}
            if split != "test":
                row |= {
                    "caption_id": 5 * i + number, "caption_str": texts[number], "reference_strs": texts,
                    "caption_tokens": texts[number].split(), "reference_tokens": [t.split() for t in texts],
                }  # fmt: skip
            elif number:
                continue
            rows.append(row)
            picture(root / ("test_images" if split == "test" else "train_images") / f"{image}.jpg")
    about = {"dataset_type": split, "dataset_name": "textcaps", "dataset_version": "0.1"}
    return write_json(root / f"TextCaps_0.1_{split}.json", about | {"data": rows})


def coco(root: Path, split: str = "train", year: int = 2014) -> Path:
    subset = f"{split}{year}"
    prefix = f"COCO_{subset}_" if year == 2014 else ""
    pictures, texts = [], []
    for i in (9, 25):
        pictures.append({"license": 3, "file_name": f"{prefix}{i:012}.jpg", "height": 16, "width": 24, "id": i})
        texts += [{"image_id": i, "id": 10 * i + n, "caption": f"Caption {n} of image {i}, café."} for n in range(5)]
        picture(root / subset / f"{prefix}{i:012}.jpg")
    whole = {"info": {"year": year}, "images": pictures, "licenses": []}
    if split == "test":
        return write_json(root / f"image_info_{subset}.json", whole)
    return write_json(root / f"captions_{subset}.json", whole | {"annotations": texts[::-1]})


def karpathy(root: Path, name: str = "coco") -> Path:
    rows = []
    for i, split in enumerate(("train", "restval", "val", "test") if name == "coco" else ("train", "val", "test")):
        texts = [f"Caption {n} of image {i}" for n in range(5)]
        row: dict[str, Any] = {
            "sentids": list(range(5 * i, 5 * i + 5)), "imgid": i, "split": split,
            "sentences": [
                {"tokens": t.lower().split(), "raw": t, "imgid": i, "sentid": 5 * i + n} for n, t in enumerate(texts)
            ],
        }  # fmt: skip
        if name == "coco":
            under = "train2014" if split == "train" else "val2014"
            row |= {"filepath": under, "filename": f"COCO_{under}_{100 + i:012}.jpg", "cocoid": 100 + i}
            picture(root / under / row["filename"])
        else:
            row["filename"] = f"100009279{i}.jpg"
            picture(root / "flickr30k-images" / row["filename"])
        rows.append(row)
    return write_json(root / f"dataset_{name}.json", {"images": rows, "dataset": name})


def tokens(root: Path) -> Path:
    lines = [f"100009279{i}.jpg#{n}\tTwo young guys , number {n} , look at hands ." for i in range(3) for n in range(5)]
    for i in range(3):
        picture(root / "flickr30k-images" / f"100009279{i}.jpg")
    path = root / "results_20130124.token"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def nocaps(root: Path, split: str = "val") -> Path:
    pictures, texts = [], []
    for i, domain in enumerate(("in-domain", "near-domain", "out-domain")):
        file = f"0013ea208702090{i}.jpg"
        pictures.append({
            "id": i, "open_images_id": file[:-4], "height": 16, "width": 24, "file_name": file, "license": 0,
            "coco_url": f"https://s3.amazonaws.com/nocaps/{split}/{file}", "date_captured": "2018-11-06 11:04:33",
        })  # fmt: skip
        if split == "val":
            pictures[-1]["domain"] = domain
        texts += [{"image_id": i, "id": 10 * i + n, "caption": f"A baby, number {n}."} for n in range(10)]
        picture(root / split / file)
    whole = {"licenses": [], "info": {"version": "0.1"}, "images": pictures}
    if split == "test":
        return write_json(root / "nocaps_test_image_info.json", whole)
    return write_json(root / "nocaps_val_4500_captions.json", whole | {"annotations": texts})
