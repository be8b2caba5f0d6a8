"""A model with PETAL as its users handle it: files, generation, training, what goes into the loss, and what is refused."""

from __future__ import annotations

import contextlib
import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from qformers import KINDS, QUERIES, inputs, make, quiet, stir

import fastgist as fg
from fastgist import petal
from fastgist.nn import CPLinear, InformationBottleneckLoss

SMALL = {"rank": 4, "expert_dim": 3, "num_experts": 2}


def fresh(kind="instructblip-opt", **config):
    return petal.wrap(make(kind), petal.PetalConfig(**SMALL | config), verbose=False)


def logits(model, kind="instructblip-opt"):
    with torch.no_grad():
        return model(**inputs(kind)).logits


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# -- as an adapter ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"core": "tucker", "gating": "uniform", "gated_query": True, "bottleneck": True}]
)
def test_hard_22_files_copies_and_the_way_back(kind, options, tmp_path):
    plain = make(kind)
    before, flags = logits(plain, kind), {n: p.requires_grad for n, p in plain.named_parameters()}
    model = stir(petal.wrap(plain, petal.PetalConfig(**SMALL | options), verbose=False))
    want = logits(model, kind)
    assert not torch.allclose(want, before, rtol=1e-3)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, kind), want)
        factors = {id(m.factors) for m in other.modules() if isinstance(m, CPLinear)}
        assert len(factors) == 2 and not factors & {id(m.factors) for m in model.modules() if isinstance(m, CPLinear)}
    fg.save_adapter(model, tmp_path)
    loaded = fg.load_adapter(make(kind), tmp_path)
    assert torch.equal(logits(loaded, kind), want)
    again = fresh(kind, **options)
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again, kind), want)
    with fg.disable_adapter(model):
        assert torch.equal(logits(model, kind), before)
    assert torch.equal(logits(model, kind), want)
    assert fg.unload(model) is plain
    assert torch.equal(logits(plain, kind), before)
    assert {n: p.requires_grad for n, p in plain.named_parameters()} == flags
    assert not plain._forward_hooks and not plain.qformer._forward_pre_hooks


def test_two_adapters_take_turns():
    model = stir(fresh())
    first = logits(model)
    petal.wrap(model, petal.PetalConfig(rank=2, num_experts=0), name="second", verbose=False)
    stir(model)
    second = logits(model)
    fg.set_adapter(model, "default")
    assert torch.equal(logits(model), first)
    fg.set_adapter(model, "second")
    assert torch.equal(logits(model), second) and not torch.equal(first, second)
    assert len(model.qformer._forward_pre_hooks) == 0  # the second has no experts


def test_merging_the_mode_approximation_is_bitwise_undone():
    model = stir(fresh(num_experts=0))
    want, weights = logits(model), {n: p.clone() for n, p in model.named_parameters()}
    fg.merge(model)
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-5)
    fg.unmerge(model)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    with pytest.raises(RuntimeError, match="PETAL with more than its mode approximation"):
        fg.merge(fresh())


@pytest.mark.parametrize("config", [None, fg.LoraConfig(rank=2, targets=("q", "k", "v"))], ids=["petal", "lora"])
def test_a_merged_model_is_saved_as_a_plain_one(config, tmp_path):
    model = make()
    if config is None:
        petal.wrap(model, petal.PetalConfig(rank=4, num_experts=0), verbose=False)
    else:
        fg.get_peft_model(model, config)
    want = logits(stir(model))
    plain = fg.merge_and_unload(model)
    assert plain is model and not any("base_layer" in name for name in plain.state_dict())
    torch.testing.assert_close(logits(plain), want, rtol=1e-4, atol=1e-5)
    plain.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded), logits(plain))
    with pytest.raises(RuntimeError, match="cannot be merged"):
        fg.merge_and_unload(fresh())


def test_training_in_evaluation_mode_is_warned_of_once():
    model = fresh()
    with pytest.warns(UserWarning, match=r"call model.train\(\)"):
        model(**inputs())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**inputs())
        other = fresh()
        logits(other)  # without gradients
        other.train()(**inputs())


@pytest.mark.parametrize("kind", KINDS)
def test_generation_by_beams(kind):
    """The words of the merged model, and a cache that has the same words in it as none."""
    model = stir(fresh(kind, num_experts=0), 0.6)
    given = inputs(kind, labels=False)
    words = model.generate(**given, num_beams=3, max_new_tokens=5)
    assert torch.equal(model.generate(**given, num_beams=3, max_new_tokens=5, use_cache=False), words)
    fg.merge(model)
    assert torch.equal(model.generate(**given, num_beams=3, max_new_tokens=5), words)
    full = stir(fresh(kind), 0.6)
    assert full.generate(**given, num_beams=3, max_new_tokens=5).shape == words.shape


OTHERS = [
    fg.LoraConfig(rank=2),
    fg.AdapterConfig(bottleneck_dim=2),
    fg.AdapterConfig(placement="houlsby", bottleneck_dim=2),
    fg.CPConfig(rank=4),
    fg.FacTConfig(rank=4),
    fg.SSFConfig(),
    fg.BitFitConfig(),
]


@pytest.mark.parametrize("config", OTHERS, ids=lambda c: c.method)
@pytest.mark.parametrize("kind", ["instructblip-opt", "blip2-t5"])
def test_other_methods_stay_within_the_qformer(kind, config):
    model = make(kind)
    before = logits(model, kind)
    fg.get_peft_model(model, config)
    torch.testing.assert_close(logits(model, kind), before)
    assert trained(model) and all(name.startswith("qformer.") for name in trained(model))
    stir(model)
    model(**inputs(kind)).loss.backward()
    unread = ".output." if not kind.startswith("instructblip") else "nothing"
    assert all(p.grad is not None for n, p in trained(model).items() if unread not in n)
    if isinstance(config, fg.CPConfig):
        assert sum(isinstance(m, CPLinear) for m in model.modules()) == 4 * 3 + 2 * 3


def test_assert_training_and_the_report():
    model = fresh()
    fg.assert_training(model)
    assert "2 x CPFactors" not in str(fg.report(model))
    assert "18 x CPLinear" in str(fg.report(model)) and "1 x Enriched" in str(fg.report(model))


# -- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_trains_float32_factors(dtype):
    model = petal.wrap(make().to(dtype), petal.PetalConfig(**SMALL), verbose=False)
    stir(model, 0.1)
    given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs().items()}
    output = model.train()(**given)
    output.loss.backward()
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in trained(model).values())
    wide = petal.wrap(make(), petal.PetalConfig(**SMALL), verbose=False)
    wide.load_state_dict(model.state_dict())
    torch.testing.assert_close(
        quiet(model).eval()(**given).logits.float(), quiet(wide).eval()(**inputs()).logits, rtol=0.1, atol=0.05
    )


@pytest.mark.parametrize("bottleneck", [None, True])
def test_autocast_keeps_the_gate_and_the_bottleneck_in_float32(bottleneck):
    model = stir(fresh(bottleneck=bottleneck), 0.1).train()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**inputs())
    assert petal.experts_of(model).last_gate.weights.dtype == torch.float32
    output.loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in trained(model).values())


def test_torch_compile_of_the_qformer_in_one_graph():
    model = stir(fresh())
    given = inputs()
    q = {"input_ids": given["qformer_input_ids"], "query_embeds": model.query_tokens.expand(3, -1, -1)}
    q |= {"encoder_hidden_states": torch.randn(3, 17, 20)}
    want = model.qformer(**q).last_hidden_state
    compiled = torch.compile(model.qformer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**q).last_hidden_state, want, rtol=1e-4, atol=1e-5)
    want.square().sum().backward()
    grads = {n: p.grad for n, p in trained(model).items()}
    model.zero_grad()
    compiled(**q).last_hidden_state.square().sum().backward()
    for name, p in trained(model).items():
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-3, atol=1e-4, msg=name)


def test_transformers_trainer(tmp_path):
    """Its loss is the whole, accumulated batches weigh by their words, and what it saves resumes."""
    from transformers import Trainer, TrainingArguments

    model = fresh(bottleneck=True)
    rows = [{k: v[i] for k, v in inputs(batch=4).items()} for i in range(4)]
    options = {
        "output_dir": str(tmp_path),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    options |= {"use_cpu": True, "report_to": "none", "save_steps": 2, "disable_tqdm": True, "logging_strategy": "no"}
    before = {n: p.detach().clone() for n, p in trained(model).items()}
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    Trainer(model, TrainingArguments(**options), train_dataset=rows).train()
    assert any(not torch.equal(p, before[n]) for n, p in trained(model).items())
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    other = fresh(bottleneck=True)
    Trainer(other, TrainingArguments(**options | {"max_steps": 2}), train_dataset=rows).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    assert all(torch.equal(p, dict(model.named_parameters())[n]) for n, p in other.named_parameters())


# -- the loss --------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_tasks_with_balance_and_bottleneck():
    model = quiet(stir(fresh(bottleneck={"compression": "club", "relevance": "mine", "eta": 0.5}, load_balance=0.3)))
    task = model(**inputs()).loss  # evaluation: the task's alone
    model.train()
    torch.manual_seed(0)
    total = model(**inputs()).loss
    parts = petal.last_losses(model)
    assert set(parts) == {"task", "balance", "bottleneck"}
    torch.testing.assert_close(parts["task"], task, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(total, sum(parts.values()))
    torch.testing.assert_close(parts["balance"], 0.3 * petal.experts_of(model).load_balance_loss())
    given, items = inputs(), torch.tensor(100)
    share = (given["labels"] != -100).sum() / items  # of this batch in the step
    weighed = model(**given, num_items_in_batch=items).loss
    parts = petal.last_losses(model)
    assert abs(parts["bottleneck"]) > 1e-5, "the estimators, which begin at 0, have had a step"
    torch.testing.assert_close(weighed, parts["task"] + share * (parts["balance"] + parts["bottleneck"]))
    assert total.requires_grad and 0 < share < 0.5


def test_the_bottleneck_sees_z_x_and_y(monkeypatch):
    seen = []
    original = InformationBottleneckLoss.forward
    monkeypatch.setattr(InformationBottleneckLoss, "forward", lambda self, *a: (seen.append(a), original(self, *a))[1])
    model = quiet(stir(fresh(bottleneck=True))).train()
    given = inputs()
    output = model(**given)
    ((z, x, y),) = seen
    torch.testing.assert_close(z, output.qformer_outputs.last_hidden_state[:, :QUERIES].mean(1))
    torch.testing.assert_close(x, output.vision_outputs.last_hidden_state.mean(1))
    assert torch.equal(y, given["labels"])
    assert z.requires_grad and not x.requires_grad


def test_the_bank_is_saved_and_resumed(tmp_path):
    model = fresh(bottleneck={"bank": 512}).train()
    model(**inputs()).loss.backward()
    fg.save_adapter(model, tmp_path)
    other = fg.load_adapter(make(), tmp_path)
    banks = [m for m in (*model.modules(), *other.modules()) if isinstance(m, InformationBottleneckLoss)]
    assert int(banks[1].seen) == 3 and torch.equal(banks[0].z_bank, banks[1].z_bank)


@pytest.mark.parametrize("output", ["tuple", "no labels"])
def test_a_loss_that_is_not_there_or_in_a_tuple(output):
    model = quiet(stir(fresh())).train()
    given = inputs(labels=output == "tuple")
    got = model(**given, return_dict=output != "tuple")
    if output == "tuple":
        torch.testing.assert_close(got[0], sum(petal.last_losses(model).values()))
    else:
        assert got.loss is None


# -- instructions ----------------------------------------------------------------------------------------------------


def test_phrasings_are_mixed_without_another_look_at_the_image():
    model = stir(fresh(num_instructions=2))
    given = inputs()
    looks = []
    model.vision_model.register_forward_hook(lambda *_: looks.append(1))
    own = petal.instruction_gate(model, given["qformer_input_ids"], given["qformer_attention_mask"])
    want = logits(model)
    torch.testing.assert_close(petal.experts_of(model).last_gate.weights, own.weights)
    other = petal.instruction_gate(model, given["qformer_input_ids"].flip(1))
    assert looks == [1]
    with petal.instructed(model, own):
        torch.testing.assert_close(logits(model), want)
    with petal.instructed(model, [own, other], [3.0, 1.0]):
        mixed = logits(model)
        torch.testing.assert_close(petal.experts_of(model).last_gate.weights, 0.75 * own.weights + 0.25 * other.weights)
    assert not torch.allclose(mixed, want)
    torch.testing.assert_close(logits(model), want)
    mixer = next(m for m in model.modules() if isinstance(m, fg.nn.InstructionMixer))
    with petal.instructed(model, [own, other]):
        model(**given).loss.backward()
    assert mixer.logits.grad.any()


def test_a_gate_of_another_batch_is_refused():
    model = fresh()
    gate = petal.instruction_gate(model, torch.full((2, 3), 4))
    with pytest.raises(ValueError, match="the gate is for 2 samples, got 3"), petal.instructed(model, gate):
        model(**inputs())
    model(**inputs())  # and the next call is as always
    with pytest.raises(ValueError, match="reads no instruction"):
        petal.instruction_gate(fresh("blip2-opt"), torch.full((2, 3), 4))
    with pytest.raises(ValueError, match="has no experts of PETAL"):
        petal.experts_of(fresh(num_experts=0))


# -- the released code's extras --------------------------------------------------------------------------------------


def attentive(kind="instructblip-opt"):
    """A model whose cross-attentions change what they are given: freshly drawn ones hardly do."""
    model = make(kind)
    with torch.no_grad():
        for layer in model.qformer.encoder.layer:
            if layer.has_cross_attention:
                layer.crossattention.output.dense.weight.normal_()
                layer.crossattention.attention.value.weight.normal_()
    return model


def states(model, kind="instructblip-opt"):
    """Of the Q-Former: a small language model's logits hardly tell them apart."""
    with torch.no_grad():
        return model(**inputs(kind)).qformer_outputs.last_hidden_state


def by_the_released_layers(plain, factor=0.0, transformations=None):
    """``plain`` with the released code's additions, by hooks: a is noted where it is made and used further on."""
    for i, layer in enumerate(plain.qformer.encoder.layer):
        noted = {}

        def note(module, args, out, noted=noted):
            noted["a"] = out

        def mean(module, args, out, noted=noted):
            noted["out"] = torch.cat((out[:, :1] + factor * noted["a"][:, :1].mean(0), out[:, 1:]), 1)
            return noted["out"]

        def add(module, args, out, noted=noted, i=i):
            return out + 0.1 * (noted["a"] * transformations[i].s + transformations[i].b)

        layer.attention.register_forward_hook(note)
        if factor and layer.has_cross_attention:
            layer.crossattention.register_forward_hook(mean)
        if transformations:
            layer.register_forward_hook(add)
    return plain


def test_batch_mean_is_the_released_addition_and_warns():
    plain = attentive()
    with pytest.warns(UserWarning, match="depend on the other images"):
        model = petal.wrap(copy.deepcopy(plain), petal.PetalConfig(batch_mean=0.1, **SMALL), verbose=False)
    before = states(plain)
    torch.testing.assert_close(states(model), states(by_the_released_layers(plain, 0.1)))
    assert not torch.allclose(before, states(plain), rtol=1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh()


@pytest.mark.parametrize("factor", [0.0, 0.1])
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("kind", ["instructblip-opt", "blip2-opt"])
@pytest.mark.filterwarnings("ignore:PetalConfig. batch_mean")
def test_the_query_transformation_is_the_released_one(kind, factor, recomputed):
    plain = attentive(kind)
    config = petal.PetalConfig(gated_query=True, batch_mean=factor, **SMALL)
    model = petal.wrap(copy.deepcopy(plain), config, verbose=False)
    found = [layer.output_query.transformation for layer in model.qformer.encoder.layer]
    assert all(0 < t.s.std() < 1e-3 and t.s.shape == (16,) for t in found)
    with torch.no_grad():
        [t.s.normal_() for t in found], [t.b.normal_() for t in found]
    other = by_the_released_layers(quiet(plain).train(), factor, found)
    quiet(model).train()
    if recomputed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    got, want = model(**inputs(kind)), other(**inputs(kind))
    found_states, wanted = (out.qformer_outputs.last_hidden_state for out in (got, want))
    torch.testing.assert_close(found_states, wanted, rtol=1e-4, atol=1e-5)
    parameters = [p for t in found for p in (t.s, t.b)]
    grads = [torch.autograd.grad(out.logits.square().sum(), parameters) for out in (got, want)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("core", ["cp", "tucker"])
def test_a_start_from_the_weights_is_the_model_and_reads_their_directions(core):
    pytest.importorskip("tensorly")
    model = fresh(init="weights", core=core)
    assert torch.equal(logits(model), logits(fresh(core=core)))
    for group in {m.factors for m in model.modules() if isinstance(m, CPLinear)}:
        members = [m for m in model.modules() if isinstance(m, CPLinear) and m.factors is group]
        weights = torch.cat([m.base_layer.weight for m in members])  # (matrices x out, in)
        basis = torch.linalg.qr(group.u).Q
        drawn = torch.linalg.qr(torch.randn_like(group.u)).Q
        assert (weights @ basis).square().sum() > 1.1 * (weights @ drawn).square().sum()
    with pytest.raises(ValueError, match="init must be one of identity, weights, got 'svd'"):
        petal.PetalConfig(init="svd")


def test_thresholds_by_configuration(tmp_path):
    model = stir(fresh(threshold={"policy": "trust", "gamma": 0.01}))
    free = fresh()
    free.load_state_dict(model.state_dict(), strict=False)
    assert not torch.allclose(logits(model), logits(free), rtol=1e-3)
    assert fg.nn.update_thresholds(model) == 2
    fg.save_adapter(model, tmp_path)
    assert torch.equal(logits(fg.load_adapter(make(), tmp_path)), logits(model))
    with pytest.raises(ValueError, match="PetalConfig: threshold must be None, one of"):
        petal.PetalConfig(threshold="norms")


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"rank": 17}, ValueError, "rank must be at most 16, the text matrices being 16 -> 16, got 17"),
        ({"rank": 0}, ValueError, "rank must be a positive int, got 0"),
        ({"core": "dense"}, ValueError, "core must be one of"),
        ({"num_experts": -1}, ValueError, "num_experts must be a whole number >= 0, got -1"),
        ({"expert_dim": 0}, ValueError, "expert_dim must be a positive int, got 0"),
        ({"gating": "hard"}, ValueError, "gating must be one of softmax, uniform"),
        ({"top_k": 3}, ValueError, "top_k must be in 1..2"),
        ({"dropout": 1.0}, ValueError, r"dropout must be a number in \[0, 1\), got 1.0"),
        ({"bottleneck": {"eta": -1.0}}, ValueError, "eta must be a finite number >= 0, got -1.0"),
        ({"bottleneck": {"beta": 1.0}}, ValueError, "no field beta; it has b, bank"),
        ({"bottleneck": "club"}, TypeError, "bottleneck must be None, True or a BottleneckConfig, got str"),
        ({"load_balance": -0.1}, ValueError, "load_balance must be a finite number >= 0"),
        ({"num_experts": 0, "num_instructions": 2}, ValueError, "num_experts is 0"),
    ],
)
def test_settings_that_cannot_be(config, error, message):
    model = make()
    before, flags = model.state_dict(), [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=message):
        petal.wrap(model, petal.PetalConfig(**SMALL | config), verbose=False)
    assert list(model.state_dict()) == list(before) and [p.requires_grad for p in model.parameters()] == flags
    assert not model.qformer._forward_pre_hooks
    model(**inputs())


def test_models_that_cannot_be(tmp_path):
    from transformers import BertConfig, BertModel

    for model in (
        nn.Linear(3, 3),
        BertModel(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)),
    ):
        with pytest.raises(TypeError, match=f"expected a model with a Q-Former .*got {type(model).__name__}"):
            petal.wrap(model)
    with pytest.raises(TypeError, match="config must be a PetalConfig, got a LoraConfig"):
        petal.wrap(make(), fg.LoraConfig())
    model = fresh()
    with pytest.raises(ValueError, match="has an adapter named 'default' already"):
        petal.wrap(model)
    fg.save_adapter(model, tmp_path)
    wider = make(hidden_size=32)
    keys = list(wider.state_dict())
    with pytest.raises(ValueError, match="shape"), contextlib.redirect_stdout(None):
        fg.load_adapter(wider, tmp_path)
    assert list(wider.state_dict()) == keys


def test_wrapping_prints_what_is_trained(capsys):
    petal.wrap(make(), petal.PetalConfig(**SMALL))
    line = capsys.readouterr().out
    assert line.startswith("trainable params: ") and "mode approximation 352" in line and "|| Q-Former: " in line
    assert line.count("trainable%") == 2
