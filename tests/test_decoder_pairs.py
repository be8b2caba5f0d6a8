"""Hard cases 23 and 24 for every method on every decoder of transformers that docs/pairs.md says yes to; what is refused,
and why. Values are checked in test_decoders.py."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from decoders import texts
from pairs import DECODER_BACKBONES, DECODER_NO_PLACE, DECODER_PAIRS, METHODS, ROWS, VARIANTS
from torch import nn
from vits import stir, trainable

from fastgist import (
    GistConfig,
    LoraConfig,
    add_gist,
    assert_training,
    disable_adapter,
    get_peft_model,
    load_adapter,
    merge,
    report,
    save_adapter,
    unload,
    unmerge,
)
from fastgist.nn import GistLoss
from fastgist.peft.method import method_of

TRIED = METHODS | VARIANTS
EVERY = DECODER_PAIRS + [(name, "LoRA, k, proj and MLP") for name in DECODER_BACKBONES]
TARGET = torch.tensor([0, 2, 1])
STILL = ("attn_pdrop", "embd_pdrop", "resid_pdrop")


def plain(name: str) -> nn.Module:
    """GPT-2 has dropout of its own: without it, so that training says the same as evaluation."""
    return DECODER_BACKBONES[name](**dict.fromkeys(STILL, 0.0) if name == "gpt2" else {})


def both(seed: int = 3) -> tuple[dict, dict]:
    """The same texts padded on the right and on the left."""
    given = []
    for side in ("right", "left"):
        torch.manual_seed(seed)
        given.append(texts(side))
    return given[0], given[1]


def same(got, want) -> None:
    assert got.keys() == want.keys()
    for key in want:
        torch.testing.assert_close(got[key], want[key])


@pytest.mark.parametrize(("name", "method"), EVERY)
def test_24_every_method_on_every_decoder(name, method, tmp_path) -> None:
    base = plain(name)
    right, given = both()
    base_logits = base(**given).logits
    model = get_peft_model(copy.deepcopy(base), TRIED[method])
    if method not in ROWS:
        torch.testing.assert_close(model(**given).logits, base_logits)
    model = stir(add_gist(model, GistConfig(dropout=0.0))).eval()
    output = model(**given, return_gist_logits=True)
    assert report(model).parts.keys() >= {"gist", "head"}
    assert not torch.allclose(output.logits, base_logits, atol=1e-3)
    same(model(**given), {"logits": output.logits})
    same(model(**right, return_gist_logits=True), output)  # the side of the padding
    for i, row in enumerate(right["input_ids"]):
        same(model(row[row != 0][None], return_gist_logits=True), {k: v[i : i + 1] for k, v in output.items()})
    order = torch.tensor([2, 0, 1])
    shuffled = model(**{k: v[order] for k, v in given.items()}, return_gist_logits=True)
    same({k: v[order.argsort()] for k, v in shuffled.items()}, output)

    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    training = model.train()(**given)
    same(training, output)
    GistLoss()(training, TARGET).backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trainable(model)
    dead = {n for n, p in model.named_parameters() if p.grad is not None and not p.grad.any()}
    # What is read sees five positions in the tiny Mistral's last layer, and that layer's prompts stand further off.
    unseen = {"model.model.layers.1.prompt"} if (name, method) == ("mistral", "VPT, deep") else set()
    assert {n for n in dead if "factors.p" not in n} == unseen
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    model.zero_grad()
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        half = model(**given, return_gist_logits=True)
        GistLoss()(half, TARGET).backward()
    for key, value in output.items():
        assert (half[key].float() - value).abs().max() <= 0.1 * value.abs().max()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trainable(model)
    assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in model.parameters() if p.requires_grad)

    save_adapter(model, tmp_path)
    same(load_adapter(copy.deepcopy(base), tmp_path).eval()(**given, return_gist_logits=True), output)
    copied = copy.deepcopy(model) if method == "LoRA" else pickle.loads(pickle.dumps(model))
    same(copied(**given, return_gist_logits=True), output)
    other = add_gist(get_peft_model(plain(name), TRIED[method])).eval()
    other.load_state_dict(model.state_dict())
    same(other(**given, return_gist_logits=True), output)
    if method == "full":
        return  # there is no way back to weights that were moved
    with disable_adapter(model):
        torch.testing.assert_close(model(**given).logits, base_logits)
    same(model(**given, return_gist_logits=True), output)
    with pytest.warns(UserWarning, match="leaves the sequence"):
        bare = unload(model, keep_head=False)
    assert [n for n, _ in bare.named_modules()] == [n for n, _ in base.named_modules()]
    assert all(torch.equal(v, base.state_dict()[k]) for k, v in bare.state_dict().items())


@pytest.mark.parametrize(("name", "method"), DECODER_PAIRS)
def test_23_wrapping(name, method) -> None:
    model = get_peft_model(plain(name), METHODS[method])
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"an adapter named 'default' already"):
        get_peft_model(model, METHODS[method])
    refusal = "stands alone" if method == "full" else r"nothing in this model is called 'nowhere'; it has .*q.*"
    with pytest.raises(ValueError, match=refusal):
        get_peft_model(model, LoraConfig(targets=("nowhere",)), "other")
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in before.named_modules()}
    assert trainable(model) == trainable(before) and report(model).adapter == "default"
    given = texts()
    if method == "SSF" and name != "gpt2":
        with pytest.raises(TypeError, match=r"base_layer is \w+RMSNorm; .* nothing was changed"):
            merge(model)
    elif method in ("linear probe", "full"):
        merge(model)
    elif method_of(METHODS[method]).mergeable:
        want, state = stir(model)(**given).logits, copy.deepcopy(model.state_dict())
        torch.testing.assert_close(merge(model)(**given).logits, want, rtol=1e-4, atol=1e-5)
        unmerge(model)
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    else:
        with pytest.raises(RuntimeError, match="cannot be merged"):
            merge(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_training(model)
        assert_training(add_gist(model))


@pytest.mark.parametrize(("pair", "reason"), DECODER_NO_PLACE.items(), ids=str)
def test_23_what_has_no_place_is_refused(pair, reason) -> None:
    model = plain(pair[0])
    names = set(model.state_dict())
    with pytest.raises(ValueError, match=reason):
        get_peft_model(model, METHODS[pair[1]])
    assert set(model.state_dict()) == names and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("name", "method"), DECODER_PAIRS)
def test_24_gradient_checkpointing(name, method) -> None:
    model = stir(add_gist(get_peft_model(plain(name), METHODS[method]), GistConfig(dropout=0.0))).train()
    given, ours = texts("left"), [p for p in model.parameters() if p.requires_grad]
    calls: list[int] = []
    last = [m for n, m in model.named_modules() if ".1." in n and n.endswith((".post_attention_layernorm", ".ln_2"))]
    (inside,) = last
    inside.register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients() -> tuple[torch.Tensor, ...]:
        calls.clear()
        return torch.autograd.grad(GistLoss()(model(**given), TARGET), ours)

    want, once = gradients(), len(calls)
    model.activation_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradients(), want)
    assert once > 0 and len(calls) == 2 * once, "the last layer was not run again in the backward"
