"""CP factors as a method of Hugging Face PEFT, against dense weights with the update written out."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from vits import stir

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
from decoders import llama, texts
from safetensors.torch import load_file

from fastgist import add_gist
from fastgist.integrations.peft import register
from fastgist.nn import GistLoss

TARGETS = ["q_proj", "v_proj", "up_proj"]


@pytest.fixture(scope="module")
def configuration() -> type:
    """Registered while this module runs, and taken out again: other tests see PEFT as it is."""
    from peft import mapping
    from peft.utils import PeftType

    made = register()
    assert register() is made
    yield made
    member = PeftType._member_map_.pop("FASTGIST_CP")
    PeftType._value2member_map_.pop("FASTGIST_CP")
    PeftType._member_names_.remove("FASTGIST_CP")
    type.__delattr__(PeftType, "FASTGIST_CP")
    for known in vars(mapping).values():
        if isinstance(known, dict):
            known.pop(member, None)


def adapted(base: nn.Module, configuration: type, **options) -> nn.Module:
    config = configuration(**{"task_type": "SEQ_CLS", "r": 3, "dropout": 0.0, "target_modules": TARGETS} | options)
    return stir(peft.get_peft_model(base, config), 0.2).eval()


def dense_update(factors: nn.Module, mode: int) -> torch.Tensor:
    """V diag(lambda p_m) U^T, or V (C x_3 p_m)^T U^T."""
    if factors.core == "cp":
        return factors.v @ torch.diag(factors.lam * factors.p[mode]) @ factors.u.T
    return factors.v @ torch.einsum("abr,r->ab", factors.c, factors.p[mode]).T @ factors.u.T


@pytest.mark.parametrize("core", ["cp", "tucker"])
def test_the_papers_update_saved_and_merged(core, configuration, tmp_path) -> None:
    base, given = llama(), texts()
    model = adapted(copy.deepcopy(base), configuration, core=core)
    layers = {
        n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "fastgist_cp_mode")
    }
    assert len(layers) == 6
    assert len({id(layer.fastgist_cp_factors["default"]) for layer in layers.values()}) == 3  # one for each shape
    dense = copy.deepcopy(base)
    with torch.no_grad():
        for path, layer in layers.items():
            mode = ["model.layers.0" in path, "model.layers.1" in path].index(True)
            dense.get_submodule(path).weight.add_(dense_update(layer.fastgist_cp_factors["default"], mode))
    dense.score.load_state_dict(model.base_model.model.score.modules_to_save["default"].state_dict())
    want = dense(**given).logits
    torch.testing.assert_close(model(**given).logits, want)

    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len([k for k in saved if "fastgist_cp" in k]) == 3 * 4  # u, v, p and lam or c, once for each shape
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(loaded(**given).logits, want)
    kept = {id(m.fastgist_cp_factors["default"]) for m in loaded.modules() if hasattr(m, "fastgist_cp_mode")}
    assert len(kept) == 3, "the factors are not shared any more"
    with model.disable_adapter():
        torch.testing.assert_close(model(**given).logits, base(**given).logits)
    model.merge_adapter()
    torch.testing.assert_close(model(**given).logits, want)
    model.unmerge_adapter()
    torch.testing.assert_close(model(**given).logits, want)
    torch.testing.assert_close(model.merge_and_unload()(**given).logits, want)


def test_trains_with_a_gist_token_and_a_second_adapter(configuration) -> None:
    model = adapted(llama(), configuration)
    given = texts()
    first = model(**given).logits
    config = configuration(task_type="SEQ_CLS", r=2, target_modules=["k_proj", "q_proj"])
    model.add_adapter("other", config)
    torch.testing.assert_close(model(**given).logits, first)
    gist = add_gist(model).train()
    GistLoss()(gist(**given), torch.tensor([0, 2, 1])).backward()
    names = {n for n, p in gist.named_parameters() if p.grad is not None}
    assert names == {n for n, p in gist.named_parameters() if p.requires_grad}
    assert len([n for n in names if "fastgist_cp" in n]) == 12 and not any("other" in n for n in names)


def test_nothing_is_registered_on_import() -> None:
    script = (
        "import fastgist.integrations.peft, peft, sys\n"
        "assert 'fastgist.integrations.peft.cp' not in sys.modules\n"
        "assert 'FASTGIST_CP' not in peft.PeftType.__members__\n"
        "assert fastgist.integrations.peft.register()(r=2).peft_type in list(peft.PeftType)\n"
        "assert peft.PeftType('FASTGIST_CP') is peft.PeftType.FASTGIST_CP\n"
    )
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


def test_what_is_not_linear_is_refused(configuration) -> None:
    with pytest.raises(TypeError, match=r"FASTGIST_CP: .*embed_tokens is Embedding; it adapts torch\.nn\.Linear"):
        adapted(llama(), configuration, target_modules=["embed_tokens"])
