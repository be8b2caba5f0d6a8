"""save_adapter and load_adapter: the round trip, the file, how it is written. Refusals are hard cases 26 and 28."""

from __future__ import annotations

import copy
import json
import os
import stat
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors import safe_open
from torch import nn
from vits import images, stir, trainable, vit

from fastgist import (
    AdapterConfig,
    CPConfig,
    GistConfig,
    GistModel,
    LinearProbeConfig,
    LoraConfig,
    add_gist,
    get_peft_model,
    load_adapter,
    merge,
    report,
    save_adapter,
    set_adapter,
)
from fastgist.nn import CPFactors
from fastgist.peft import storage

CONFIGS = [
    None,
    LinearProbeConfig(),
    LoraConfig(rank=2, targets=("q", "fc1")),
    CPConfig(rank=3),
    CPConfig(rank=3, core="tucker"),
    AdapterConfig(4, "houlsby", scale=0.5),
]


def logits(model, x):
    output = model.eval()(x)
    return output if isinstance(output, torch.Tensor) else output.logits


def made(base, config, with_gist):
    model = copy.deepcopy(base)
    if config is not None:
        model = get_peft_model(model, config)
    return stir(add_gist(model, GistConfig(length=2)) if with_gist else model)


CASES = [(c, g) for c in CONFIGS for g in (False, True) if c is not None or g]


@pytest.mark.parametrize(("config", "with_gist"), CASES, ids=repr)
def test_round_trip(config, with_gist, tmp_path) -> None:
    base, x = vit(), images()
    model = made(base, config, with_gist)
    save_adapter(model, tmp_path / "new" / "folder")
    into_plain = load_adapter(plain := copy.deepcopy(base), tmp_path / "new" / "folder")
    assert isinstance(into_plain, GistModel) == with_gist
    assert into_plain is plain or into_plain.model is plain
    alike = made(base, config, with_gist)
    assert load_adapter(alike, tmp_path / "new" / "folder") is alike
    for loaded in (into_plain, alike):
        assert torch.equal(logits(loaded, x), logits(model, x))
        assert trainable(loaded) == trainable(model)
        assert report(loaded).config == config
        if with_gist:
            assert loaded.config == GistConfig(length=2)


def contents(folder):
    with safe_open(folder / storage.MODEL_NAME, "pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, file.metadata()


def test_what_is_in_the_file(tmp_path) -> None:
    model = made(base := vit(), CPConfig(rank=3), True)
    save_adapter(model, tmp_path)
    tensors, metadata = contents(tmp_path)
    factors = {f"adapter.blocks.0.attn.qkv.factors.{n}" for n in ("u", "v", "p", "lam")}  # of all layers, once
    assert set(tensors) == factors | {"head.head.weight", "head.head.bias", "gist.token"}
    assert sum(t.numel() for t in tensors.values()) == report(model).trainable
    assert metadata["format_version"] == "1"
    assert len(metadata["sha256"]) == 64
    config = json.loads(metadata["fastgist"])
    cp = {"rank": 3, "core": "cp", "targets": ["q", "k", "v"], "dropout": 0.1, "threshold": None, "init": "identity"}
    assert config["adapter"] == {"method": "cp"} | cp
    assert config["gist"] == {"length": 2, "dropout": 0.1, "readout": "first", "full_length": "refuse"}
    assert json.loads((tmp_path / "fastgist_config.json").read_text()) == config
    assert sorted(p.name for p in tmp_path.iterdir()) == [storage.MODEL_NAME, storage.CONFIG_NAME]
    assert {k: type(v) for k, v in config["backbone"].items()} == {"sha256": str, "numbers": list, "dtype": str}
    loaded = load_adapter(base, tmp_path)
    assert len({id(m) for m in loaded.modules() if isinstance(m, CPFactors)}) == 1


def test_the_same_adapter_makes_the_same_file(tmp_path) -> None:
    model = made(vit(), LoraConfig(), True)
    save_adapter(model, tmp_path / "a")
    save_adapter(model, tmp_path / "b")
    assert (tmp_path / "a" / storage.MODEL_NAME).read_bytes() == (tmp_path / "b" / storage.MODEL_NAME).read_bytes()


def test_merged_models_can_be_saved(tmp_path) -> None:
    base, x = vit(), images()
    model = made(base, LoraConfig(), False)
    expected = logits(model, x)
    save_adapter(merge(model), tmp_path)
    assert torch.equal(logits(load_adapter(copy.deepcopy(base), tmp_path), x), expected)


@pytest.mark.parametrize("config", [LoraConfig(), LinearProbeConfig(), AdapterConfig(4)], ids=repr)
@pytest.mark.parametrize("with_gist", [False, True])
def test_another_backbone_is_told(config, with_gist, tmp_path) -> None:
    base = vit()
    save_adapter(made(base, config, with_gist), tmp_path)
    with warnings.catch_warnings():  # the same weights in another dtype are the same backbone
        warnings.simplefilter("error")
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            load_adapter(copy.deepcopy(base).to(dtype), tmp_path)
        resampled = copy.deepcopy(base)
        resampled.set_input_size((32, 32))
        load_adapter(resampled, tmp_path)
        load_adapter(copy.deepcopy(base).to("meta"), tmp_path)  # nothing there to compare with
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.blocks[0].mlp.fc1.weight.mul_(1.01)
    with pytest.warns(UserWarning, match="trained on other frozen weights than this model's; its predictions"):
        load_adapter(other, tmp_path)
    with pytest.warns(UserWarning, match=r"\(float32 there, bfloat16 here\)"):
        load_adapter(vit().bfloat16(), tmp_path)


def test_weights_that_cannot_be_looked_into_stop_nothing(tmp_path) -> None:
    """A weight of a class of its own (quantised, sharded): no fingerprint, and saving and loading go on."""

    class Packed(nn.Parameter):
        def reshape(self, *shape):
            raise NotImplementedError("aten.view")

    model, x = made(vit(), LoraConfig(), False), images()
    for module in model.blocks[0].mlp.children():
        if isinstance(module, nn.Linear):
            module.weight = Packed(module.weight.detach(), requires_grad=False)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "fastgist_config.json").read_text())["backbone"] is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(model, tmp_path)
    assert logits(model, x).isfinite().all()


def test_named_adapters_in_files(tmp_path) -> None:
    base, x = vit(), images()
    model = stir(get_peft_model(copy.deepcopy(base), LoraConfig(rank=2), "a"))
    a = logits(model, x)
    save_adapter(model, tmp_path / "a")
    stir(get_peft_model(model, AdapterConfig(4), "b"))
    b = logits(model, x)
    save_adapter(model, tmp_path / "b")

    both = load_adapter(copy.deepcopy(base), tmp_path / "a")
    assert report(both).adapter == "a"  # the name it was saved under
    load_adapter(both, tmp_path / "b", name="b")
    assert torch.equal(logits(both, x), b)
    set_adapter(both, "a")
    assert torch.equal(logits(both, x), a)
    with pytest.raises(ValueError, match=r"adapter 'b' is there and not in place; set_adapter\(model, 'b'\) first"):
        load_adapter(both, tmp_path / "b", name="b")
    assert report(load_adapter(copy.deepcopy(base), tmp_path / "a", name="c")).adapter == "c"


def test_other_dtypes_keep_the_models(tmp_path) -> None:
    base, x = vit(), images()
    model = made(base, LoraConfig(rank=2), True)
    save_adapter(model, tmp_path)
    wide = load_adapter(copy.deepcopy(base).double(), tmp_path)
    torch.testing.assert_close(logits(wide, x.double()).float(), logits(model, x))
    assert wide.gist.token.dtype == torch.float64
    half = load_adapter(copy.deepcopy(base).bfloat16(), tmp_path)
    assert half.model.blocks[0].attn.qkv.u.dtype == torch.float32  # adapters stay float32 in half-precision models
    assert half.model.head.weight.dtype == torch.bfloat16
    save_adapter(half, tmp_path / "half")
    assert contents(tmp_path / "half")[0]["head.head.weight"].dtype == torch.bfloat16
    load_adapter(copy.deepcopy(base), tmp_path / "half")


def test_not_strict(tmp_path) -> None:
    base = vit()
    model = made(base, LoraConfig(rank=2), False)
    save_adapter(model, tmp_path)
    other = copy.deepcopy(base)
    other.reset_classifier(9)
    head = other.head.weight.clone()
    with pytest.raises(ValueError, match=r"wrong shape: head.head.weight: expected \(9, 32\), got \(5, 32\)"):
        load_adapter(other, tmp_path)
    assert report(other).adapter is None  # plain as before
    with pytest.warns(
        UserWarning, match=r"skipped, as strict=False: wrong shape: head.head.weight: expected \(9, 32\)"
    ):
        load_adapter(other, tmp_path, strict=False)
    assert torch.equal(other.head.weight, head)
    assert torch.equal(other.blocks[1].attn.qkv.v, model.blocks[1].attn.qkv.v)


def test_loading_into_what_is_wrapped_otherwise(tmp_path) -> None:
    base = vit()
    save_adapter(made(base, LoraConfig(rank=2), False), tmp_path / "lora")
    save_adapter(made(base, LoraConfig(rank=2), True), tmp_path / "both")
    for model, folder, message in (
        (made(base, LoraConfig(rank=3), False), "lora", r"holds LoraConfig\(rank=2.*the model has LoraConfig\(rank=3"),
        (made(base, LoraConfig(rank=2), True), "lora", "holds no gist, and the model has one"),
        (made(base, None, True), "lora", "holds no gist, and the model has one"),
        (made(base, LoraConfig(rank=2), False), "both", "holds a gist, the model has none"),
        (
            add_gist(get_peft_model(vit(), LoraConfig(rank=2))),
            "both",
            "holds gist .*'length': 2.*the model has .*'length': 1",
        ),
    ):
        state = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=message) as error:
            load_adapter(model, tmp_path / folder)
        assert str(tmp_path / folder) in str(error.value)
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match=r"adapters \(default\) have none; load into a plain model"):
        load_adapter(made(base, LoraConfig(rank=2), False), tmp_path / "both", name="other")
    gisted = load_adapter(add_gist(copy.deepcopy(base), GistConfig(length=2)), tmp_path / "both")
    assert report(gisted).config == LoraConfig(rank=2)


# -- writing ---------------------------------------------------------------------------------------------------------


def test_mode_by_umask(tmp_path) -> None:
    old = os.umask(0o027)
    try:
        save_adapter(made(vit(), LoraConfig(), False), tmp_path)
    finally:
        os.umask(old)
    for name in (storage.MODEL_NAME, storage.CONFIG_NAME):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_failed_save_leaves_the_old_adapter_and_no_litter(step, tmp_path, monkeypatch) -> None:
    old, new = made(vit(), LoraConfig(), False), made(vit(), LoraConfig(), False)
    save_adapter(old, tmp_path)
    before = (tmp_path / storage.MODEL_NAME).read_bytes()

    def fail(*_, **__):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, {"write": "fdopen", "fsync": "fsync", "replace": "replace"}[step], fail)
        with pytest.raises(OSError, match="no space"):
            save_adapter(new, tmp_path)
    assert (tmp_path / storage.MODEL_NAME).read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [storage.MODEL_NAME, storage.CONFIG_NAME]


def test_stale_temporaries_are_swept_and_others_left(tmp_path) -> None:
    import socket

    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = "".join(c if c.isalnum() or c == "_" else "-" for c in socket.gethostname())
    dead = tmp_path / f".{storage.MODEL_NAME}.{host}.{gone.pid}.0a0b0c0d.tmp"
    alive = tmp_path / f".{storage.MODEL_NAME}.{host}.{os.getpid()}.0a0b0c0d.tmp"
    elsewhere = tmp_path / f".{storage.MODEL_NAME}.another-host.{gone.pid}.0a0b0c0d.tmp"
    old = tmp_path / f".{storage.CONFIG_NAME}.another-host.1.0a0b0c0d.tmp"
    mine = tmp_path / "notes.tmp"
    for path in (dead, alive, elsewhere, old, mine):
        path.write_bytes(b"half an adapter")
    os.utime(old, (0, 0))
    save_adapter(made(vit(), LoraConfig(), False), tmp_path)
    assert {p.name for p in tmp_path.iterdir() if p.name.endswith(".tmp")} == {alive.name, elsewhere.name, mine.name}


def test_a_compiled_model_is_seen_through(tmp_path) -> None:
    base, x = vit(), images()
    model = made(base, LoraConfig(rank=2), True)
    compiled = torch.compile(model, backend="eager")
    save_adapter(compiled, tmp_path)
    assert report(compiled).parts == report(model).parts
    assert torch.equal(logits(load_adapter(copy.deepcopy(base), tmp_path), x), logits(model, x))


def test_not_wrapped(tmp_path) -> None:
    with pytest.raises(ValueError, match="save_adapter: VisionTransformer is not wrapped"):
        save_adapter(vit(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_from_before_a_field_of_gist_config_existed(tmp_path) -> None:
    base = vit()
    model = made(base, LoraConfig(rank=2), True)
    save_adapter(model, tmp_path)
    config, tensors = storage.read(tmp_path)
    assert config["gist"].pop("full_length") == "refuse"
    storage.write(tmp_path, config, tensors)
    for target in (copy.deepcopy(base), made(base, LoraConfig(rank=2), True)):
        loaded = load_adapter(target, tmp_path).eval()
        assert torch.equal(loaded.gist.token, model.gist.token)
    config["gist"]["newer"] = 1
    storage.write(tmp_path, config, tensors)
    for target in (copy.deepcopy(base), made(base, LoraConfig(rank=2), True)):
        with pytest.raises(ValueError, match="newer"):
            load_adapter(target, tmp_path)


def test_what_is_trained_beside_the_adapter_is_named(tmp_path):
    """Nothing of it is in the file: to say nothing would lose it."""
    model = made(vit(), LoraConfig(rank=2), with_gist=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(model, tmp_path / "adapter")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or ".norm" in name)
    with pytest.warns(UserWarning, match=r"does not hold blocks\.0\.norm1\.weight, .* and \d+ more, which are trained"):
        save_adapter(model, tmp_path / "adapter")


def test_adapters_that_transformers_put_in_are_named(tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    model = add_gist(transformers.BertForSequenceClassification(config))
    model.model.add_adapter(peft.LoraConfig(r=2, target_modules=["query"]))
    with pytest.warns(UserWarning, match=r"does not hold .*query\.lora_A\.default\.weight"):
        save_adapter(model, tmp_path)
