"""What is refused leaves a model untouched: tensors, flags, classes, hooks, and what it says, to the bit."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from qformers import inputs, make, stir

import fastgist as fg
from fastgist import petal

SMALL = {"rank": 4, "expert_dim": 3, "num_experts": 2}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


def named(hook: Any) -> str:
    return getattr(hook, "__qualname__", type(hook).__qualname__)


def seen(model: Any, kind: str = "instructblip-opt") -> dict[str, Any]:
    """All of a model that a refusal might have changed."""
    with torch.no_grad():
        logits = model(**inputs(kind)).logits
    return {
        "tensors": {n: t.clone() for n, t in model.state_dict().items()},
        "same": {n: id(p) for n, p in model.named_parameters()},
        "flags": {n: p.requires_grad for n, p in model.named_parameters()},
        "classes": {n: type(m) for n, m in model.named_modules()},
        "modules": {n: id(m) for n, m in model.named_modules()},
        "modes": {n: m.training for n, m in model.named_modules()},
        # By name: an adapter that is set aside for another, and put back, registers its hooks anew.
        "hooks": {(n, h): [named(f) for f in getattr(m, h).values()] for n, m in model.named_modules() for h in HOOKS},
        "forwards": {n for n, m in model.named_modules() if "forward" in vars(m)},
        "logits": logits,
    }


def assert_untouched(model: Any, before: dict[str, Any], kind: str = "instructblip-opt") -> None:
    after = seen(model, kind)
    tensors, earlier = after.pop("tensors"), before["tensors"]
    assert tensors.keys() == earlier.keys() and all(torch.equal(t, earlier[n]) for n, t in tensors.items())
    assert torch.equal(after.pop("logits"), before["logits"])
    for what, value in after.items():
        assert value == before[what], what


def saved(folder, kind="instructblip-opt", sizes: dict[str, Any] | None = None, **config) -> None:
    model = petal.wrap(make(kind, **(sizes or {})), petal.PetalConfig(**SMALL | config), verbose=False)
    fg.save_adapter(stir(model), folder)


OTHER_SIZES = [
    ("a wider Q-Former", {"hidden_size": 32}, {}),
    ("wider image tokens", {"image": 24}, {}),
    ("more layers", {"layers": 6}, {}),
    ("the bottleneck's bank", {"hidden_size": 32}, {"bottleneck": {"bank": 512}}),
    ("gated queries", {"hidden_size": 32}, {"gated_query": True, "gating": "uniform", "core": "tucker"}),
]


@pytest.mark.parametrize(("what", "sizes", "config"), OTHER_SIZES, ids=[w for w, *_ in OTHER_SIZES])
def test_a_checkpoint_of_another_size(what, sizes, config, tmp_path) -> None:
    saved(tmp_path, sizes=sizes, **config)
    model = make()
    before = seen(model)
    with pytest.raises(ValueError, match=r"model.safetensors|shape|missing|unexpected"):
        fg.load_adapter(model, tmp_path)
    assert_untouched(model, before)
    petal.wrap(model, petal.PetalConfig(**SMALL), verbose=False)  # and it can be wrapped as if nothing had been


def test_a_checkpoint_of_another_size_into_a_wrapped_model(tmp_path) -> None:
    saved(tmp_path, sizes={"hidden_size": 32})
    model = stir(petal.wrap(make(), petal.PetalConfig(**SMALL), verbose=False))
    before = seen(model)
    with pytest.raises(ValueError, match="shape"):
        fg.load_adapter(model, tmp_path)
    assert_untouched(model, before)
    with pytest.raises(ValueError, match="shape"):
        fg.load_adapter(model, tmp_path, name="second")
    assert_untouched(model, before)


def test_a_damaged_checkpoint(tmp_path) -> None:
    saved(tmp_path)
    (name,) = tmp_path.glob("*.safetensors")
    content = bytearray(name.read_bytes())
    content[-3] ^= 255
    name.write_bytes(bytes(content))
    model = make()
    before = seen(model)
    with pytest.raises(ValueError, match=r"checksum|damaged|sha256"):
        fg.load_adapter(model, tmp_path)
    assert_untouched(model, before)


def test_a_build_that_fails_half_way() -> None:
    """gated_query is refused behind the mode approximation and the experts, which are made by then."""
    model = make(chunk_size_feed_forward=1)
    before = seen(model)
    with pytest.raises(ValueError, match="gated_query reads whole sequences, .*chunk_size_feed_forward is 1"):
        petal.wrap(model, petal.PetalConfig(gated_query=True, bottleneck=True, gist=True, **SMALL), verbose=False)
    assert_untouched(model, before)


@pytest.mark.parametrize("where", ["CPLinear", "InstructionMoE", "Transformed", "CrossOutput", "Enriched"])
@pytest.mark.filterwarnings("ignore:PetalConfig. batch_mean")
def test_any_part_that_cannot_be_made(where, monkeypatch) -> None:
    """The last of several where there are several."""
    from fastgist.petal import method

    original, made = getattr(method, where), []

    def failing(*args, **kwargs):
        made.append(1)
        if len(made) == (1 if where in ("InstructionMoE", "Enriched") else 2):
            raise RuntimeError("no memory")
        return original(*args, **kwargs)

    monkeypatch.setattr(method, where, failing)
    model = make()
    before = seen(model)
    config = petal.PetalConfig(gated_query=True, batch_mean=0.1, **SMALL)
    with pytest.raises(RuntimeError, match="no memory"):
        petal.wrap(model, config, verbose=False)
    assert_untouched(model, before)


@pytest.mark.parametrize("config", [{"rank": 17}, {"rank": 16, "threshold": {"policy": "trust"}, "top_k": 3}], ids=str)
def test_a_rank_or_number_of_experts_that_does_not_fit(config) -> None:
    model = make()
    before = seen(model)
    with pytest.raises(ValueError, match=r"rank must be at most 16|top_k must be in 1\.\.2"):
        petal.wrap(model, petal.PetalConfig(**SMALL | config), verbose=False)
    assert_untouched(model, before)


@pytest.mark.parametrize("kind", ["blip2-opt", "instructblip-t5"])
def test_a_second_adapter_that_is_refused_leaves_the_first(kind) -> None:
    model = stir(petal.wrap(make(kind), petal.PetalConfig(**SMALL), verbose=False))
    before = seen(model, kind)
    with pytest.raises(ValueError, match="rank must be at most 16"):
        petal.wrap(model, petal.PetalConfig(**SMALL | {"rank": 17}), name="second", verbose=False)
    assert_untouched(model, before, kind)


def test_the_check_sees_what_it_is_for() -> None:
    model = make()
    before = seen(model)
    assert_untouched(model, before)
    for change in (
        lambda m: m.qformer.register_forward_pre_hook(lambda *_: None),
        lambda m: setattr(next(m.parameters()), "requires_grad", False),
        lambda m: m.train(),
        lambda m: next(m.parameters()).data.add_(1e-3),
    ):
        other = make()
        before = seen(other)
        change(other)
        with pytest.raises(AssertionError):
            assert_untouched(other, before)
    assert json.dumps(sorted(before)) == json.dumps(sorted(seen(make())))
