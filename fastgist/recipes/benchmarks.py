"""The benchmarks of the GIST paper as settings of ``fastgist finetune``: VTAB-1k and few-shot fine-grained sets.

``--recipe vtab/caltech101``, ``--recipe fgvc/oxford_pets --shots 4``: what a recipe sets, any flag overrides, the data
included (a folder of images, of parquet files or of WebDataset's tar files in the place of the hub).

**VTAB-1k** (arXiv 1910.04867): 800 training images and 200 to select by, test on the whole test split, no augmentation.
Both are drawn here from the train split by the seed; the benchmark's own index lists are TensorFlow Datasets' and are
not reproduced, so numbers compare with published ones as draws of the same size do.

**Few-shot FGVC** (as in NOAH, arXiv 2206.04673, and the GIST authors' wider code): 1, 2, 4, 8 or 16 images of each
class, drawn by the seed; selection by as many again, at most four a class, from the val split or from what the draw left.

Nothing is ever selected by a test split. The names below are data sets of the Hugging Face hub as we know them; these
runs have not been made by us (the tests run the same settings on digits written in the same format).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

__all__ = ["FGVC", "SHOTS", "VTAB", "Task", "names", "settings_of"]


@dataclass(frozen=True)
class Task:
    """A data set of the hub. ``splits``: which are which; ``classes``: how many it should have."""

    data: str
    classes: int
    image_column: str = "webp"
    label_column: str = "cls"
    splits: str = "train=train,test=test"


def _vtab(name: str, classes: int) -> Task:
    return Task(f"clip-benchmark/wds_{name}", classes)


VTAB: dict[str, Task] = {
    # natural
    "caltech101": _vtab("vtab-caltech101", 102),
    "cifar": _vtab("vtab-cifar100", 100),
    "dtd": _vtab("vtab-dtd", 47),
    "oxford_flowers102": _vtab("vtab-flowers", 102),
    "oxford_iiit_pet": _vtab("vtab-pets", 37),
    "sun397": _vtab("sun397", 397),
    "svhn": _vtab("vtab-svhn", 10),
    # specialised
    "diabetic_retinopathy": _vtab("vtab-diabetic_retinopathy", 5),
    "eurosat": _vtab("vtab-eurosat", 10),
    "patch_camelyon": _vtab("vtab-pcam", 2),
    "resisc45": _vtab("vtab-resisc45", 45),
    # structured
    "clevr_count": _vtab("vtab-clevr_count_all", 8),
    "clevr_dist": _vtab("vtab-clevr_closest_object_distance", 6),
    "dmlab": _vtab("vtab-dmlab", 6),
    "dsprites_loc": _vtab("vtab-dsprites_label_x_position", 16),
    "dsprites_ori": _vtab("vtab-dsprites_label_orientation", 16),
    "kitti": _vtab("vtab-kitti_closest_vehicle_distance", 4),
    "smallnorb_azi": _vtab("vtab-smallnorb_label_azimuth", 18),
    "smallnorb_ele": _vtab("vtab-smallnorb_label_elevation", 9),
}

FGVC: dict[str, Task] = {
    "food-101": Task("ethz/food101", 101, "image", "label", "train=train,test=validation"),
    "oxford_pets": Task("timm/oxford-iiit-pet", 37, "image", "label"),
    "stanford_cars": Task("tanganke/stanford_cars", 196, "image", "label"),
    "oxford_flowers": Task(
        "dpdl-benchmark/oxford_flowers102", 102, "image", "label", "train=train,val=validation,test=test"
    ),
    "fgvc_aircraft": _vtab("fgvc_aircraft", 100),
}

#: The numbers of shots of the few-shot benchmark; --shots chooses.
SHOTS = (1, 2, 4, 8, 16)


def names() -> list[str]:
    """Every recipe's name."""
    return [f"vtab/{name}" for name in VTAB] + [f"fgvc/{name}" for name in FGVC]


def settings_of(name: str) -> dict[str, Any]:
    """The settings of recipe ``name``, by the names of ``fastgist finetune``'s flags.

    Raises:
        UserError: no such recipe.
    """
    from fastgist.train.config import UserError

    group, _, task_name = name.partition("/")
    task = {"vtab": VTAB, "fgvc": FGVC}.get(group, {}).get(task_name)
    if task is None:
        close = difflib.get_close_matches(name, names(), n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UserError(f"no recipe is called {name!r}{hint}; there are {', '.join(names())}")
    settings: dict[str, Any] = {
        "data": task.data, "image_column": task.image_column, "label_column": task.label_column, "splits": task.splits,
    }  # fmt: skip
    if group == "vtab":
        return settings | {"train_images": 800, "val_images": 200, "augment": False}
    return settings | {"shots": SHOTS[-1]}
