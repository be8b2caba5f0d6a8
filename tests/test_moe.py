"""InstructionMoE against K dense experts in a loop, in float64; its gate, its load balance, mixed instructions."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch

from fastgist.nn import (
    Gate,
    InstructionMixer,
    InstructionMoE,
    load_balance_loss,
    mix_instructions,
    pool_instruction,
)
from fastgist.testing import assert_within_budget

B, N, L, D, K, H = 3, 5, 4, 12, 6, 3


def moe(gating="softmax", top_k=None, *, dtype=torch.float64, filled=True, **options) -> InstructionMoE:
    layer = InstructionMoE(D, K, H, gating, top_k, dtype=dtype, **options)
    if filled:
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(torch.randn_like(p) * 0.4)
    return layer


def inputs(dtype=torch.float64):
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    return torch.randn(B, N, D, dtype=dtype), torch.randn(B, L, D, dtype=dtype), mask


def by_hand(layer: InstructionMoE, x, instruction, mask, act=lambda h: h):
    """The formula, one sample, one expert at a time."""
    rows = []
    for b in range(x.shape[0]):
        pooled = instruction[b][mask[b].bool()].mean(0)
        if layer.gating == "softmax":
            p = torch.softmax(layer.gate_weight @ pooled + layer.gate_bias, 0)
            chosen = sorted(range(K), key=lambda k: -p.tolist()[k])[: layer.top_k or K]
            total = sum(p[k] for k in chosen) if len(chosen) > 1 else 1.0
            share = {k: p[k] / total for k in chosen}
            y = x[b]
        else:
            share = dict.fromkeys(range(K), 0.4 / K)
            y = 0.6 * x[b]
        for k, g in share.items():
            unit = slice(k * H, (k + 1) * H)
            hidden = act(x[b] @ layer.down_weight[unit].T + layer.down_bias[unit])
            y = y + g * (hidden @ layer.up_weight[:, unit].T + layer.up_bias[k])
        rows.append(y)
    return torch.stack(rows)


FORMS = [("softmax", None), ("softmax", 1), ("softmax", 2), ("softmax", K), ("uniform", None)]


@pytest.mark.parametrize(("gating", "top_k"), FORMS)
@pytest.mark.parametrize("activation", ["identity", "gelu"])
def test_it_is_k_dense_experts(gating, top_k, activation) -> None:
    layer = moe(gating, top_k, activation=activation)
    x, instruction, mask = (t.requires_grad_(t.is_floating_point()) for t in inputs())
    act = torch.nn.functional.gelu if activation == "gelu" else lambda h: h
    ours, exact = layer(x, instruction, mask), by_hand(layer, x, instruction, mask, act)
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)
    wanted = dict(layer.named_parameters()) | {"x": x, "instruction": instruction}
    upstream = torch.randn_like(ours)
    got = torch.autograd.grad(ours, list(wanted.values()), upstream, allow_unused=True)
    right = torch.autograd.grad(exact, list(wanted.values()), upstream, allow_unused=True)
    assert len(wanted) == (8 if gating == "softmax" else 6)
    for name, one, other in zip(wanted, got, right, strict=True):
        if gating == "uniform" and name == "instruction":
            assert one is None  # no gate reads it
            continue
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
        assert bool(one.abs().max() > 0), name


def test_other_shapes_of_x() -> None:
    layer = moe()
    x, instruction, mask = inputs()
    one = torch.stack([by_hand(layer, x, instruction, mask), by_hand(layer, 2 * x, instruction, mask)], 1)
    torch.testing.assert_close(layer(torch.stack([x, 2 * x], 1), instruction, mask), one, rtol=1e-10, atol=1e-12)
    flat = layer(x[:, 0], pool_instruction(instruction, mask))
    torch.testing.assert_close(flat, by_hand(layer, x[:, :1], instruction, mask)[:, 0], rtol=1e-10, atol=1e-12)
    text = layer(instruction, attention_mask=mask)  # text embeddings are their own instruction
    torch.testing.assert_close(text, by_hand(layer, instruction, instruction, mask), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_within_the_budget(dtype) -> None:
    layer = moe(dtype=torch.float32)
    x, instruction, mask = inputs(dtype)
    exact = by_hand(copy.deepcopy(layer).to(dtype).double(), x.double(), instruction.double(), mask)
    plain = by_hand(copy.deepcopy(layer).to(dtype), x, instruction, mask)
    ours = layer(x, instruction, mask)
    assert ours.dtype == dtype
    # The gate reads float32 parameters: it is no further from the float64 one than the one of rounded parameters.
    assert_within_budget(ours, plain, exact)


def test_a_fresh_gated_module_returns_x_and_learns() -> None:
    x, instruction, mask = inputs(torch.float32)
    for top_k in (None, 1, 2):
        layer = moe(top_k=top_k, filled=False, dtype=torch.float32)
        y = layer(x, instruction, mask)
        assert torch.equal(y, x)
        y.square().sum().backward()
        assert bool(layer.up_weight.grad.abs().sum() > 0)
        assert bool(layer.up_bias.grad.abs().sum() > 0)
    assert not torch.equal(moe("uniform", filled=False, dtype=torch.float32)(x), x)
    assert not torch.equal(moe(init="paper", filled=False, dtype=torch.float32)(x, instruction, mask), x)


def test_initial_values() -> None:
    layer = InstructionMoE(400, 4, 16, "uniform")
    assert sum(p.numel() for p in InstructionMoE(768, gating="uniform", device="meta").parameters()) == 594_816
    for tensor, fan in ((layer.down_weight, 400), (layer.up_weight, 16), (layer.up_bias, 16)):
        assert tensor.abs().max().item() <= fan**-0.5
        assert tensor.std().item() == pytest.approx((3 * fan) ** -0.5, rel=0.1)
    layer = InstructionMoE(400, 4, 16)
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(7.0)
    layer.reset_parameters()
    assert not any(bool(t.any()) for t in (layer.up_weight, layer.up_bias, layer.gate_bias))
    assert layer.gate_weight.abs().max().item() <= 400**-0.5


def test_top_k_takes_the_likeliest() -> None:
    layer = moe(top_k=2)
    _, instruction, mask = inputs()
    gate = layer.get_gate(instruction, mask)
    full = moe(top_k=None)
    full.load_state_dict(layer.state_dict())
    torch.testing.assert_close(gate.probabilities, full.get_gate(instruction, mask).weights)
    for weights, probabilities in zip(*gate, strict=True):
        chosen = probabilities.topk(2).indices
        assert sorted(weights.nonzero().flatten().tolist()) == sorted(chosen.tolist())
        torch.testing.assert_close(weights[chosen], probabilities[chosen] / probabilities[chosen].sum())
    single = moe(top_k=1).get_gate(instruction, mask)
    torch.testing.assert_close(single.weights.sum(-1), single.probabilities.max(-1).values)  # a gradient for the gate


@pytest.mark.parametrize("mask_type", [torch.bool, torch.int64])
def test_padding_is_not_pooled(mask_type) -> None:
    layer = moe()
    _, instruction, mask = inputs()
    mask = mask.to(mask_type)
    clean = layer.get_gate(instruction, mask)
    for junk in (1e6, torch.nan, torch.inf):
        dirty = torch.where(mask.bool()[..., None], instruction, junk).requires_grad_()
        gate = layer.get_gate(dirty, mask)
        assert torch.equal(gate.weights, clean.weights)
        gate.weights[:, 0].sum().backward()
        assert not bool(dirty.grad[~mask.bool()].any())
        assert bool(dirty.grad[mask.bool()].all())
    assert not torch.allclose(layer.get_gate(instruction).weights, clean.weights)  # the mask does something
    assert not bool(pool_instruction(instruction, torch.zeros_like(mask)).any())


def test_samples_do_not_see_their_batch() -> None:
    layer = moe(top_k=3)
    x, instruction, mask = inputs()
    x.requires_grad_()
    instruction.requires_grad_()
    together = layer(x, instruction, mask)
    for b in range(B):
        alone = layer(x[b : b + 1], instruction[b : b + 1], mask[b : b + 1])
        torch.testing.assert_close(together[b : b + 1], alone, rtol=1e-12, atol=1e-14)
    for grad in torch.autograd.grad(together[1].sum(), (x, instruction)):
        assert bool(grad[1].any())
        assert not bool(grad[[0, 2]].any())


def test_load_balance_is_least_where_all_are_used_alike() -> None:
    even = torch.full((4, K), 1 / K, dtype=torch.float64)
    assert float(load_balance_loss(Gate(even, even))) == pytest.approx(1.0)
    each = torch.eye(K, dtype=torch.float64)  # every sample one expert, all experts alike
    assert float(load_balance_loss(Gate(each, each))) == pytest.approx(1.0)
    one = each[:1].expand(4, K)
    assert float(load_balance_loss(Gate(one, one))) == pytest.approx(K)
    for _ in range(20):
        gate = moe().get_gate(torch.randn(7, D, dtype=torch.float64))
        assert float(load_balance_loss(gate)) > 1.0
    logits = torch.randn(8, K, dtype=torch.float64, requires_grad=True)
    for _ in range(300):
        p = torch.softmax(logits, -1)
        grad = torch.autograd.grad(load_balance_loss(Gate(p, p)), logits)[0]
        logits = (logits - 20 * grad).detach().requires_grad_()
    torch.testing.assert_close(torch.softmax(logits, -1).mean(0), even[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_load_balance_trains_the_gate_of_the_last_call(top_k) -> None:
    layer = moe(top_k=top_k)
    with pytest.raises(RuntimeError, match="call the module first, or give a gate"):
        layer.load_balance_loss()
    x, instruction, mask = inputs()
    layer(x, instruction, mask)
    gate = layer.get_gate(instruction, mask)
    assert float(layer.load_balance_loss()) == float(layer.load_balance_loss(gate)) == float(load_balance_loss(gate))
    share = torch.stack([w / w.sum() for w in gate.weights]).mean(0)
    expected = K * sum(float(share[k]) * float(gate.probabilities[:, k].mean()) for k in range(K))
    assert float(layer.load_balance_loss()) == pytest.approx(expected)
    layer.load_balance_loss().backward()
    trained = {name for name, p in layer.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert trained == {"gate_weight", "gate_bias"}


def test_usage_is_the_last_calls_mean_weight_on_the_device() -> None:
    layer = moe(top_k=2)
    assert layer.usage is None
    x, instruction, mask = inputs()
    layer(x, instruction, mask)
    usage = layer.usage
    assert usage.shape == (K,)
    assert not usage.requires_grad
    torch.testing.assert_close(usage, layer.get_gate(instruction, mask).weights.mean(0))
    layer(x[:1], instruction[:1], mask[:1])
    assert not torch.allclose(layer.usage, usage)
    plain = moe("uniform")
    plain(x)
    torch.testing.assert_close(plain.usage, torch.full((K,), 1 / K, dtype=torch.float64))
    assert float(plain.load_balance_loss()) == pytest.approx(1.0)


@pytest.mark.parametrize(("gating", "top_k"), FORMS)
def test_nothing_is_read_back_to_the_host(gating, top_k) -> None:
    """On the meta device a number that is read raises."""
    layer = InstructionMoE(D, K, H, gating, top_k, device="meta")
    x, mask = torch.empty(B, N, D, device="meta"), torch.ones(B, L, dtype=torch.int64, device="meta")
    y = layer(x, torch.empty(B, L, D, device="meta"), mask)
    assert y.shape == x.shape
    assert layer.usage.shape == (K,)
    mixed = mix_instructions([layer.last_gate, layer.last_gate], weights=[1, 3])
    (layer(x, gate=mixed).sum() + layer.load_balance_loss()).backward()


def test_one_gate_serves_queries_and_text() -> None:
    layer = moe()
    x, instruction, mask = inputs()
    gate = layer.get_gate(instruction, mask)
    assert torch.equal(layer(x, gate=gate), layer(x, instruction, mask))
    assert torch.equal(layer(instruction, gate=gate), layer(instruction, attention_mask=mask))


# -- several phrasings -----------------------------------------------------------------------------------------------


def test_mixed_gates_and_embeddings() -> None:
    layer = moe(top_k=2)
    x, instruction, mask = inputs()
    longer, longer_mask = torch.randn(B, L + 3, D, dtype=torch.float64), torch.ones(B, L + 3, dtype=torch.bool)
    phrasings = [(instruction, mask), (longer, longer_mask), (-longer, longer_mask)]
    gates = [layer.get_gate(*p) for p in phrasings]
    for weights, shares in ((None, (1 / 3, 1 / 3, 1 / 3)), ((1, 2, 5), (0.125, 0.25, 0.625))):
        for given in (weights,) if weights is None else (weights, torch.tensor(weights, dtype=torch.float64)):
            mixed = mix_instructions(gates, given)
            assert isinstance(mixed, Gate)
            for side in (0, 1):
                torch.testing.assert_close(mixed[side], sum(s * g[side] for s, g in zip(shares, gates, strict=True)))
            pooled = [pool_instruction(*p) for p in phrasings]
            torch.testing.assert_close(
                mix_instructions(pooled, given), sum(s * p for s, p in zip(shares, pooled, strict=True))
            )
    # experts are linear in the gate: a mixed gate is the mean of the phrasings' outputs
    outputs = torch.stack([layer(x, *p) for p in phrasings]).mean(0)
    torch.testing.assert_close(layer(x, gate=mix_instructions(gates)), outputs, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(mix_instructions(gates[:1]).weights, gates[0].weights)


def test_learned_weights_start_at_the_mean_and_learn() -> None:
    mixer = InstructionMixer(3, dtype=torch.float64)
    pooled = list(torch.randn(3, B, D, dtype=torch.float64))
    torch.testing.assert_close(mixer(pooled), torch.stack(pooled).mean(0))
    optimiser = torch.optim.Adam(mixer.parameters(), 0.1)
    for _ in range(200):
        optimiser.zero_grad()
        (mixer(pooled) - pooled[1]).square().sum().backward()
        optimiser.step()
    assert float(torch.softmax(mixer.logits, 0)[1]) > 0.95
    assert "num_instructions=3" in repr(mixer)


def test_mixing_errors() -> None:
    a, b = torch.zeros(2, 3), torch.zeros(2, 4)
    with pytest.raises(ValueError, match="at least one phrasing, got none"):
        mix_instructions([])
    with pytest.raises(ValueError, match=r"one shape, got \(2, 3\), \(2, 4\)"):
        mix_instructions([a, b])
    with pytest.raises(ValueError, match="expected 2 weights, got 3"):
        mix_instructions([a, a], [1, 2, 3])
    with pytest.raises(ValueError, match=r"weights.shape == \(2,\), got \(3,\)"):
        mix_instructions([a, a], torch.ones(3))
    for wrong in ([0, 0], [-1, 2], [float("inf"), 1], [float("nan"), 1]):
        with pytest.raises(ValueError, match="weights must be finite, >= 0 and not all 0, got"):
            mix_instructions([a, a], wrong)
    with pytest.raises(ValueError, match="InstructionMixer: expected 3 phrasings, got 2"):
        InstructionMixer(3)([a, a])
    with pytest.raises(ValueError, match="num_instructions must be a positive int, got 0"):
        InstructionMixer(0)


# -- as a module -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gating", "top_k"), FORMS)
def test_state_dict_copy_pickle_repr_and_modes(gating, top_k) -> None:
    layer = moe(gating, top_k)
    x, instruction, mask = inputs()
    y = layer(x, instruction, mask)  # last_gate is in a graph now
    other = moe(gating, top_k)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer))
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.eval()):
        assert torch.equal(twin(x, instruction, mask), y)
    assert "12 -> 6 x 3 -> 12" in repr(layer)
    assert f"gating='{gating}'" in repr(layer)
    assert (f"top_k={top_k}" in repr(layer)) == (top_k is not None)


def test_errors_name_what_came_and_what_was_wanted() -> None:
    for options, match in (
        ({"dim": 0}, "dim must be a positive int, got 0"),
        ({"num_experts": -1}, "num_experts must be a positive int, got -1"),
        ({"bottleneck_dim": 0}, "bottleneck_dim must be a positive int, got 0"),
        ({"gating": "hard"}, "gating must be one of softmax, uniform, got 'hard'"),
        ({"activation": "tanh"}, "activation must be one of .*, got 'tanh'"),
        ({"init": "zero"}, "init must be one of identity, paper, got 'zero'"),
        ({"gating": "uniform", "init": "identity"}, ".* keeps 0.6 x"),
        ({"top_k": 0}, "top_k must be a positive int, got 0"),
        ({"top_k": 7}, r"top_k must be in 1..6 \(num_experts\), got 7"),
        ({"gating": "uniform", "top_k": 2}, "top_k needs gating='softmax', got top_k=2"),
    ):
        with pytest.raises(ValueError, match=f"InstructionMoE: {match}"):
            InstructionMoE(**({"dim": D} | options))
    layer = moe()
    x, instruction, mask = inputs()
    gate = layer.get_gate(instruction, mask)
    with pytest.raises(ValueError, match=r"expected x \(B, ..., 12\), got shape \(3, 5, 11\)"):
        layer(x[..., :-1], instruction)
    with pytest.raises(ValueError, match=r"expected instruction \(B, L, 12\) or \(B, 12\), got shape \(3, 4, 11\)"):
        layer(x, instruction[..., :-1])
    with pytest.raises(ValueError, match=r"expected attention_mask.shape == \(3, 4\), got \(3, 3\)"):
        layer(x, instruction, mask[:, :3])
    with pytest.raises(TypeError, match="attention_mask must be bool or integer, .* got float32"):
        layer(x, instruction, mask.float())
    with pytest.raises(ValueError, match="attention_mask needs an instruction"):
        layer(x, instruction[:, 0], mask)
    with pytest.raises(ValueError, match="a gate takes the place of instruction"):
        layer(x, instruction, gate=gate)
    with pytest.raises(ValueError, match=r"expected a gate \(3, 6\) .* got \(2, 6\)"):
        layer(x, instruction[:2], mask[:2])
    with pytest.raises(ValueError, match=r"expected a gate \(3, 6\) .* got \(3, 4\)"):
        layer(x, gate=Gate(*(side[:, :4] for side in gate)))


@pytest.mark.parametrize(("gating", "top_k"), [("softmax", None), ("softmax", 2), ("uniform", None)])
def test_compiles_whole(gating, top_k) -> None:
    layer = moe(gating, top_k)
    x, instruction, mask = inputs()

    def run(x):
        y = layer(x, instruction, mask)
        return y.square().sum() + layer.load_balance_loss()

    def gradients(call):
        layer.zero_grad()
        loss = call(x)
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in layer.parameters())]

    eager = gradients(run)
    compiled = gradients(torch.compile(run, fullgraph=True, backend="aot_eager"))
    for one, other in zip(compiled, eager, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert layer.usage.shape == (K,)


def test_exports() -> None:
    class Call(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moe = moe()

        def forward(self, x, instruction, mask):
            return self.moe(x, instruction, mask)

    call = Call()
    program = torch.export.export(call, inputs())
    fresh = inputs()
    torch.testing.assert_close(program.module()(*fresh), call(*fresh), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("gating", "top_k"), FORMS)
def test_autocast(gating, top_k) -> None:
    layer = moe(gating, top_k, dtype=torch.float32)
    x, instruction, mask = inputs(torch.float32)
    outside = layer.get_gate(instruction, mask)
    with torch.autocast("cpu", torch.bfloat16):
        ours = layer(x, instruction, mask)
        plain = torch.nn.functional.linear(x, torch.eye(D))
        inside = layer.get_gate(instruction, mask)
    assert ours.dtype == plain.dtype == torch.bfloat16
    assert torch.equal(inside.weights, outside.weights)  # the gate stays in float32
    low = copy.deepcopy(layer).bfloat16()
    exact = by_hand(copy.deepcopy(low).double(), x.bfloat16().double(), instruction.double(), mask)
    assert_within_budget(ours, by_hand(low, x.bfloat16(), instruction.bfloat16(), mask), exact)
    ours.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


# -- the figure ------------------------------------------------------------------------------------------------------


def test_the_figure_shows_every_instruction(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    from fastgist.train.expert_figure import draw

    layer = moe()
    usage = {}
    for text in ("which digit is it?", "is it even?"):
        layer(*inputs())
        usage[text] = layer.usage
    draw(tmp_path / "a.svg", usage)
    drawn = (tmp_path / "a.svg").read_text()
    shares = [f"{100 * float(share):.0f}%" for share in usage["is it even?"]]
    for text in ("which digit is it?", "is it even?", "expert", *shares):
        assert f"<!-- {text} -->" in drawn
    draw(tmp_path / "b.svg", {text: shares.tolist() for text, shares in usage.items()})
    assert (tmp_path / "b.svg").read_bytes() == (tmp_path / "a.svg").read_bytes()
    for wrong in ({}, {"a": [0.5, 0.5], "b": [1.0]}, {"a": []}):
        with pytest.raises(ValueError, match="the same number of experts"):
            draw(tmp_path / "c.svg", wrong)
