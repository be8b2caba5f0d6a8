"""PETAL where calls fail, repeat, nest or run side by side, and where what is around the model is not plain transformers."""

from __future__ import annotations

import sys
import threading

import pytest
import torch

pytest.importorskip("transformers")

from qformers import KINDS, inputs, make, quiet, stir

import fastgist as fg
from fastgist import functional, petal

SMALL = {"rank": 4, "expert_dim": 3, "num_experts": 2}


def wrapped(kind="instructblip-opt", **config):
    return stir(petal.wrap(make(kind), petal.PetalConfig(**SMALL | config), verbose=False))


def features(model, given):
    names = ("pixel_values", "qformer_input_ids", "qformer_attention_mask")
    return model.get_image_features(**{name: given[name] for name in names if name in given}, return_dict=True)


# -- what a call leaves behind -----------------------------------------------------------------------------------------


def test_a_forward_that_failed_leaves_nothing_to_the_next():
    """Neither its labels to ``generate``, nor the instruction it was about to embed to who embeds words next."""
    model = wrapped(instruct_llm=True)
    given, seen = inputs(labels=False), []
    words = model.get_input_embeddings()(given["input_ids"])
    model.language_model.register_forward_pre_hook(lambda m, a, k: seen.append(k["inputs_embeds"]), with_kwargs=True)
    model.generate(**given, max_new_tokens=1)
    wrong = inputs()
    with pytest.raises(RuntimeError, match="channels"):
        model(**wrong | {"pixel_values": wrong["pixel_values"][:, :2]})
    model.generate(**given, max_new_tokens=1)
    assert torch.equal(seen[0], seen[1])

    def fail(*_):
        raise RuntimeError("out of memory")

    handle = model.language_projection.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model(**wrong)
    handle.remove()
    assert torch.equal(model.get_input_embeddings()(given["input_ids"]), words)


@pytest.mark.parametrize("kind", KINDS)
def test_image_features_that_come_along_change_nothing(kind):
    model = wrapped(kind, instruct_llm=True)
    given = inputs(kind)
    want = model(**given).logits
    image = features(model, given)
    for _ in range(2):
        got = model(**given | {"pixel_values": None}, mm_encoder_outputs={"image": image}).logits
        torch.testing.assert_close(got, want)


def test_the_balance_loss_takes_each_gate_once():
    """A forward without the Q-Former, or without an instruction in words, has no gate of its own, and the last call's graph is
    gone."""
    model = quiet(wrapped(instruct_llm=True)).train()
    given = inputs()
    with torch.no_grad():
        image = features(model, given)
    model(**given).loss.backward()
    both = petal.last_losses(model)["balance"]
    model(**given | {"pixel_values": None}, mm_encoder_outputs={"image": image}).loss.backward()
    language = petal.last_losses(model)["balance"]
    ids = given.pop("input_ids")
    given["inputs_embeds"] = model.get_input_embeddings()(ids).detach()
    model(**given).loss.backward()
    torch.testing.assert_close(petal.last_losses(model)["balance"] + language, both)


def test_instructed_within_instructed():
    model, given = wrapped(), inputs()
    ids = given["qformer_input_ids"]
    first, second = (petal.instruction_gate(model, words) for words in (ids, ids.flip(1)))
    with petal.instructed(model, first):
        want = model(**given).logits
        with petal.instructed(model, second):
            assert not torch.equal(model(**given).logits, want)
        assert torch.equal(model(**given).logits, want)


def test_two_threads():
    """Each sees the gate, the mask and the instruction of its own call."""
    model = wrapped(instruct_llm=True, gist=True, gated_query=True).eval()
    batches = [inputs(batch=b, seed=b, labels=False) for b in (2, 3)]
    with torch.no_grad():
        want = [model(**given).logits for given in batches]
    wrong = []

    def work(i):
        with torch.no_grad():
            for _ in range(20):
                try:
                    torch.testing.assert_close(model(**batches[i]).logits, want[i])
                except Exception as error:
                    wrong.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


def test_a_floating_point_mask_is_read_as_transformers_reads_it():
    model, given = wrapped(), inputs(labels=False)
    want = model(**given).logits
    for dtype in (torch.bool, torch.float32):
        mask = given["qformer_attention_mask"].to(dtype)
        torch.testing.assert_close(model(**given | {"qformer_attention_mask": mask}).logits, want)


# -- what is around the model ------------------------------------------------------------------------------------------


def test_forwards_that_somebody_has_put_around_the_modules():
    """As accelerate does, which keeps the forward that was bound when it came."""
    plain, given = make(), inputs()

    def surround(model):
        for module in model.qformer.modules():
            module.forward = (lambda run: lambda *args, **kwargs: run(*args, **kwargs))(module.forward)
        return model

    model = wrapped()
    want = model(**given).logits
    first = petal.wrap(surround(make()), petal.PetalConfig(**SMALL), verbose=False)
    first.load_state_dict(model.state_dict())
    for other in (first, surround(model)):
        torch.testing.assert_close(other(**given).logits, want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fg.unload(other)(**given).logits, plain(**given).logits)


def anew(output):
    """An output made of the same tensors, as DistributedDataParallel(find_unused_parameters=True) and torch.export make it."""
    from torch.utils import _pytree

    return _pytree.tree_map(lambda leaf: leaf, output)


def test_a_gist_token_where_outputs_are_made_anew():
    given = inputs()
    found = []
    for around in (False, True):
        model = quiet(wrapped(gist={"dropout": 0.0}, dropout=0.0)).train()
        if around:
            for module in (model.qformer, model):  # as accelerate's casts to float32
                module.forward = (lambda run: lambda *args, **kwargs: anew(run(*args, **kwargs)))(module.forward)
        output = anew(model(**given))
        found.append((output.loss, *petal.last_losses(model).values()))
    torch.testing.assert_close(*found)


def test_a_gist_token_of_features_that_come_along():
    model, given = quiet(wrapped(gist={"dropout": 0.0}, dropout=0.0)).train(), inputs()
    want = model(**given).loss
    given |= {"mm_encoder_outputs": {"image": features(model, given)}, "pixel_values": None}
    torch.testing.assert_close(model(**given).loss, want)
    with pytest.raises(ValueError, match="read from the Q-Former, which did not run for this loss"):
        model(**given)


@pytest.mark.parametrize("policy", ["modes", "trust"])
@pytest.mark.parametrize("core", ["cp", "tucker"])
def test_thresholds_under_autocast(core, policy):
    model = quiet(wrapped(core=core, threshold=policy, dropout=0.0)).train()
    want = model(**inputs())
    with torch.autocast("cpu", torch.bfloat16):
        got = model(**inputs())
    got.loss.backward()
    torch.testing.assert_close(got.logits.float(), want.logits, rtol=0.1, atol=0.1)
    factors = {m for m in model.modules() if isinstance(m, fg.nn.CPFactors)}
    assert all(p.grad.isfinite().all() for f in factors for p in f.parameters())


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"rank": "4"}, TypeError, "rank must be a positive int, got '4'"),
        ({"num_instructions": 0}, ValueError, "num_instructions must be a positive int, got 0"),
        ({"num_instructions": "2"}, TypeError, "num_instructions must be a positive int, got '2'"),
        ({"dropout": "0.1"}, TypeError, r"dropout must be a number in \[0, 1\), got '0.1'"),
        ({"gated_query": "no"}, TypeError, "gated_query must be True or False, got 'no'"),
        ({"instruct_llm": 1}, TypeError, "instruct_llm must be True or False, got 1"),
        ({"gist": {"temperature": 0.0}}, ValueError, "temperature must be a finite number > 0, got 0.0"),
        ({"gist": {"alpha": float("nan")}}, ValueError, "alpha must be a finite number, got nan"),
    ],
)
def test_settings_that_cannot_be(config, error, message):
    model = make()
    before = list(model.state_dict())
    with pytest.raises(error, match=message):
        petal.wrap(model, petal.PetalConfig(**SMALL | config), verbose=False)
    assert list(model.state_dict()) == before and all(p.requires_grad for p in model.parameters())


def test_calls_that_cannot_be():
    model, given = wrapped(num_instructions=2), inputs()
    gate = petal.instruction_gate(model, given["qformer_input_ids"])
    with pytest.raises(ValueError, match=r"qformer_input_ids must be \(B, L\), got shape \(5,\)"):
        petal.instruction_gate(model, given["qformer_input_ids"][0])
    for gates in (None, gate.weights, [gate.weights]):
        with pytest.raises(TypeError, match="gates must be what petal.instruction_gate gives"):
            petal.instructed(model, gates).__enter__()
    for call in (petal.wrap, petal.trainable_shares):
        for other in (None, torch.nn.Linear(2, 2)):
            with pytest.raises(TypeError, match=f"expected a model with a Q-Former .*, got {type(other).__name__}"):
                call(other)
    factors = fg.nn.CPFactors(4, 4, 2, 3)
    for mode in (-1, 3, (0, 3), [5], ()):
        with pytest.raises(IndexError, match=r"modes must be in 0\.\.2, got "):
            factors(mode)
    for targets in (5, [None], [("q",)]):
        with pytest.raises(TypeError, match="LoraConfig: targets must be a tuple of names, got"):
            fg.LoraConfig(targets=targets)


# -- cp_linear ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [(7, 0, 9), (16, 0), (0, 16)])
@pytest.mark.parametrize("batch", [0, 3, 60])
def test_hard_1_a_weight_without_rows_among_several(rows, batch):
    """v has a row for each row of all weights, so that none is left for the empty one."""
    double = {"dtype": torch.float64}  # in float32 one weight and several are not rounded alike
    x, u, v = (torch.randn(n, m, requires_grad=True, **double) for n, m in ((batch, 8), (8, 3), (16, 3)))
    weights = [torch.randn(n, 8, **double) for n in rows]
    pieces = functional.cp_linear(x, weights, None, u, v)
    assert [tuple(y.shape) for y in pieces] == [(batch, n) for n in rows]
    whole = functional.cp_linear(x, torch.cat(weights), None, u, v)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    grads = [torch.autograd.grad(y.square().sum(), (x, u, v)) for y in (torch.cat(pieces, 1), whole)]
    torch.testing.assert_close(*grads)
