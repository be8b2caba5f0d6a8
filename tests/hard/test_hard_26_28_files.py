"""Hard cases 26 (damaged files, and files that do not fit), 27 (killed while saving), 28 (files to refuse)."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from vits import images, stir, trainable, vit

from fastgist import AdapterConfig, CPConfig, LoraConfig, add_gist, get_peft_model, load_adapter, save_adapter
from fastgist.peft import storage

NAME = storage.MODEL_NAME


@pytest.fixture
def saved(tmp_path):
    base = vit()
    model = stir(add_gist(get_peft_model(copy.deepcopy(base), CPConfig(rank=2))))
    save_adapter(model, tmp_path / "adapter")
    return base, model, tmp_path / "adapter"


def refused(base, folder, message, kind=ValueError) -> None:
    """Loading raises, gives the path, and leaves both a plain and a wrapped model as they were."""
    wrapped = stir(add_gist(get_peft_model(copy.deepcopy(base), CPConfig(rank=2))))
    for model in (copy.deepcopy(base), wrapped):
        before = copy.deepcopy(model)
        with pytest.raises(kind, match=message) as error:
            load_adapter(model, folder)
        assert str(folder) in str(error.value)
        state = before.state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert trainable(model) == trainable(before)
        x = images()
        ours, theirs = model.eval()(x), before.eval()(x)
        pairs = zip(ours.values(), theirs.values(), strict=True) if isinstance(ours, dict) else [(ours, theirs)]
        assert all(torch.equal(a, b) for a, b in pairs)


def rewrite(folder, change, seal=True) -> None:
    """Write the file anew with its tensors and configuration changed; sealed with a right checksum."""
    config, tensors = storage.read(folder)
    change(config, tensors)
    text = json.dumps(config)
    metadata = {
        "fastgist": text,
        "format_version": "1",
        "sha256": storage.checksum(text, "1", tensors) if seal else "0" * 64,
    }
    save_file(tensors, folder / NAME, metadata)


# -- 26 --------------------------------------------------------------------------------------------------------------


def test_26_truncated_at_any_length(saved) -> None:
    base, _, folder = saved
    data = (folder / NAME).read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for length in (0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(data) // 2, len(data) - 1):
        (folder / NAME).write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"damaged|truncated") as error:
            load_adapter(vit(), folder)
        assert str(folder / NAME) in str(error.value)
    refused(base, folder, "damaged or truncated")
    (folder / NAME).write_bytes(data + b"\0")
    refused(base, folder, "damaged or truncated")


def test_26_any_flipped_bit_is_noticed(saved) -> None:
    base, _, folder = saved
    data = (folder / NAME).read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(header, len(data), (40,), generator=generator).tolist() + list(range(0, header, 7))
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << (place % 8)
        (folder / NAME).write_bytes(bytes(flipped))
        if bytes(flipped[:header]).rstrip(b" ") == data[:header].rstrip(b" "):
            continue
        with pytest.raises(ValueError, match=str(folder / NAME)):
            storage.read(folder)
    flipped = bytearray(data)
    flipped[-3] ^= 4
    (folder / NAME).write_bytes(bytes(flipped))
    load_file(folder / NAME)  # safetensors sees nothing wrong
    refused(base, folder, "the checksum does not match")


def test_26_names_dtypes_and_shapes_are_sealed_too(saved) -> None:
    """The checksum covers what a tensor is, not only its bytes: the same numbers under another shape are noticed."""
    _, _, folder = saved
    data = (folder / NAME).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    for old, new in (
        (b'"shape":[32,2]', b'"shape":[2,32]'),
        (b'"dtype":"F32"', b'"dtype":"I32"'),
        (b"factors.lam", b"factors.law"),
        (b'\\"rank\\": 2', b'\\"rank\\": 3'),
    ):
        assert old in data[:end]
        (folder / NAME).write_bytes(data[:end].replace(old, new, 1) + data[end:])
        with pytest.raises(ValueError, match="the checksum does not match"):
            storage.read(folder)


def test_26_missing_unexpected_and_wrong_shape(saved) -> None:
    base, _model, folder = saved
    data = (folder / NAME).read_bytes()
    key = "adapter.blocks.0.attn.qkv.factors.u"
    for change, message in (
        (lambda c, t: t.pop(key), f"missing: {key}"),
        (lambda c, t: t.pop("gist.token"), "missing: gist.token"),
        (lambda c, t: t.update({"adapter.blocks.9.u": torch.ones(1)}), "unexpected: adapter.blocks.9.u"),
        (
            lambda c, t: t.update({key: t[key][:, :1].clone()}),
            r"wrong shape: .*factors.u: expected \(32, 2\), got \(32, 1\)",
        ),
        (
            lambda c, t: c["adapter"].update(method="unheard"),
            "unknown adapter method 'unheard'; known here: adapter, bitfit, cp",
        ),
        (lambda c, t: c["adapter"].update(colour=1), "CPConfig has no field colour"),
        (lambda c, t: c.pop("adapter"), "has CPConfig|unexpected: adapter"),
        (lambda c, t: c.pop("gist"), "holds no gist|unexpected: gist.token"),
    ):
        (folder / NAME).write_bytes(data)
        rewrite(folder, change)
        refused(base, folder, message)
    deeper = vit(depth=3)
    (folder / NAME).write_bytes(data)
    with pytest.raises(ValueError, match=r"factors.p: expected \(9, 2\), got \(6, 2\)"):
        load_adapter(deeper, folder)
    assert all(p.requires_grad for p in deeper.parameters())


def test_26_other_versions_and_strangers(saved) -> None:
    base, _, folder = saved
    config, tensors = storage.read(folder)
    text = json.dumps(config)
    metadata = {"fastgist": text, "format_version": "2", "sha256": storage.checksum(text, "2", tensors)}
    save_file(tensors, folder / NAME, metadata)
    refused(base, folder, "format_version '2'; this fastgist reads '1'")
    save_file(tensors, folder / NAME)
    refused(base, folder, "not one that save_adapter wrote")
    (folder / NAME).unlink()
    refused(base, folder, "not found", FileNotFoundError)
    refused(base, folder / "nowhere", "not found", FileNotFoundError)


def test_26_the_json_beside_it_is_for_people_only(saved) -> None:
    base, model, folder = saved
    (folder / storage.CONFIG_NAME).write_text("{ nonsense")
    x = images()
    assert torch.equal(load_adapter(copy.deepcopy(base), folder).eval()(x).logits, model.eval()(x).logits)


def test_26_unlucky_module_and_adapter_names(tmp_path) -> None:
    """Modules called weight_weight and base_layer, an adapter named lora: nothing is found by part of a name."""

    def renamed():
        model = vit()
        for block in model.blocks:
            block.mlp.weight_weight = block.mlp.fc1
            block.mlp.base_layer = block.mlp.fc2
            del block.mlp.fc1, block.mlp.fc2
            block.mlp.__class__ = Renamed
        return model

    class Renamed(type(vit().blocks[0].mlp)):
        def forward(self, x):
            return self.base_layer(self.act(self.weight_weight(x)))

    base, x = renamed(), images()
    config = LoraConfig(rank=2, targets=("weight_weight", "base_layer"))
    for chosen in (config, AdapterConfig(4)):
        model = stir(get_peft_model(copy.deepcopy(base), chosen, "lora"))
        folder = tmp_path / type(chosen).__name__
        save_adapter(model, folder)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert sum(t.numel() for t in load_file(folder / NAME).values()) == trained
        loaded = load_adapter(copy.deepcopy(base), folder)
        assert torch.equal(loaded.eval()(x), model.eval()(x))


# -- 27 --------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kill -9")
def test_27_killed_while_saving(tmp_path) -> None:
    """A process that overwrites an adapter, killed before each system call of a save in turn, and then at any time: the
    file is always the old adapter or the new one, whole."""
    script = textwrap.dedent(
        """
        import os, signal, sys, time
        sys.path.insert(0, sys.argv[2])
        import torch
        from fastgist.peft import storage

        torch.set_num_threads(1)
        folder = sys.argv[1]
        adapters = [{"adapter.w": torch.full((1 << 14,), float(i))} for i in range(2)]

        def die_before(call):
            count = iter(range(100))
            def deadly(function):
                def called(*args, **kwargs):
                    if next(count) == call:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return function(*args, **kwargs)
                return called
            for name in ("open", "fsync", "replace"):
                setattr(os, name, deadly(getattr(os, name)))

        for moment in range(22):
            storage.write(folder, {"which": 0}, adapters[0])
            child = os.fork()
            if child == 0:
                if moment < 12:
                    die_before(moment)
                    storage.write(folder, {"which": 1}, adapters[1])
                    os._exit(0)
                while True:
                    for which in (1, 0):
                        storage.write(folder, {"which": which}, adapters[which])
            if moment >= 12:
                time.sleep(0.0007 * (moment - 10))
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            config, tensors = storage.read(folder)  # raises unless whole
            assert (tensors["adapter.w"] == config["which"]).all()
            print(config["which"], sum(name.endswith(".tmp") for name in os.listdir(folder)))
        """
    )
    folder, root = tmp_path / "adapter", str(Path(__file__).parents[2])
    run = subprocess.run([sys.executable, "-c", script, str(folder), root], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    found = [line.split() for line in run.stdout.splitlines()][:12]
    # For each of the two files: open, fsync, replace, then open and fsync of the folder. The first replace commits.
    assert [which for which, _ in found] == ["0"] * 3 + ["1"] * 9
    assert [litter for _, litter in found] == list("011000110000")
    storage.write(folder, {}, {})  # the next save sweeps what they left
    assert not [p for p in folder.iterdir() if p.name.endswith(".tmp")]


# -- 28 --------------------------------------------------------------------------------------------------------------


class Bomb:
    """Leaves a mark if it is ever unpickled."""

    def __init__(self, mark) -> None:
        self.mark = str(mark)

    def __reduce__(self):
        return Path.touch, (Path(self.mark),)


@pytest.mark.parametrize("kind", ["pickle", "torch.save", "torch.save, old format"])
def test_28_a_pickle_is_never_loaded(kind, saved, tmp_path) -> None:
    base, _, folder = saved
    mark = tmp_path / "exploded"
    if kind == "pickle":
        data = pickle.dumps(Bomb(mark))
    else:
        torch.save(Bomb(mark), tmp_path / "x", _use_new_zipfile_serialization=kind == "torch.save")
        data = (tmp_path / "x").read_bytes()
    (folder / NAME).write_bytes(data)  # renamed
    refused(base, folder, "a pickle under another name: refused")
    (folder / NAME).unlink()
    (folder / "adapter_model.bin").write_bytes(data)  # offered
    refused(base, folder, "adapter_model.bin looks like a pickle, which is never loaded", FileNotFoundError)
    refused(base, folder / "adapter_model.bin", "pickles .* are never loaded")
    assert not mark.exists()


@pytest.mark.parametrize(
    "key", ["../../etc/passwd", "adapter/../x", "/adapter.x", "adapter..x", ".adapter", "a\\b", "a\nb"]
)
def test_28_tensor_names_that_are_paths(key, saved) -> None:
    base, _, folder = saved
    rewrite(folder, lambda c, t: t.update({key: torch.ones(1)}))
    refused(base, folder, "looks like a path")


@pytest.mark.parametrize("name", ["../up", "a/b", "", "..", None, 7])
def test_28_adapter_names_that_are_paths(name, saved) -> None:
    base, _, folder = saved
    rewrite(folder, lambda c, t: c.update(name=name))
    model = copy.deepcopy(base)
    with pytest.raises(ValueError, match="an adapter's name is letters, digits") as error:
        load_adapter(model, folder)
    assert str(folder) in str(error.value)
    assert all(p.requires_grad for p in model.parameters())


def test_28_a_link_out_of_the_folder(saved, tmp_path) -> None:
    base, model, folder = saved
    outside = tmp_path / "outside.safetensors"
    (folder / NAME).rename(outside)
    (folder / NAME).symlink_to(outside)
    refused(base, folder, "outside the folder: refused")
    (folder / NAME).unlink()
    outside.rename(folder / "blob")
    (folder / NAME).symlink_to("blob")  # a link that stays inside is fine
    assert torch.equal(load_adapter(copy.deepcopy(base), folder).gist.token, model.gist.token)
    save_adapter(model, folder)  # saving replaces the link, and writes through none
    assert not (folder / NAME).is_symlink()
