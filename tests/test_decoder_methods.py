"""Methods that stand beside a branch of transformers' decoders, in their attention or in the sequence: against forwards
written out in float64, and hard case 24 for each of them on every decoder. What generates runs as it trained."""

from __future__ import annotations

import copy
import pickle
import warnings
from itertools import product

import pytest
import torch
from decoders import DECODER_BACKBONES, gpt2, llama, mistral, qwen2, texts, transformers
from decoders_by_hand import by_hand, close, embedded, states
from pairs import METHODS, ROWS
from torch import Tensor, nn
from vits import stir, trainable

from fastgist import (
    AdapterConfig,
    GistConfig,
    LoraConfig,
    add_gist,
    assert_training,
    disable_adapter,
    get_peft_model,
    load_adapter,
    merge,
    save_adapter,
    set_adapter,
    unload,
)
from fastgist.nn import GistLoss
from fastgist.peft.family import find_family
from fastgist.train.export import export_model

TRIED = ("adapter, adaptformer", "adapter, shared", "prefix", "VPT", "VPT, deep")
PAIRS = list(product(DECODER_BACKBONES, TRIED))
SOME = list(product((llama, mistral, gpt2), TRIED))
#: Tracing is slow: what has code of its own in it, once on each kind of attention.
COMPILED = [
    (llama, "adapter, shared"),
    (mistral, "prefix"),
    (gpt2, "prefix"),
    (llama, "VPT, deep"),
    (gpt2, "VPT, deep"),
]
EXPORTED = [(gpt2, "adapter, shared"), (llama, "prefix"), (gpt2, "VPT, deep")]
QUIET = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
TARGET = torch.tensor([0, 2, 1])


def named(value) -> str:
    return getattr(value, "__name__", str(value))


def made(make, method, gist=None, **options) -> nn.Module:
    """A gist model in float64 without dropout whose trained parameters are away from their initial values."""
    options = QUIET | options if make is gpt2 else options
    model = get_peft_model(make(**options).double(), METHODS[method])
    return stir(add_gist(model, GistConfig(dropout=0.0) if gist is None else gist)).eval()


def sides(seed: int = 3) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same texts padded on the right and on the left, the latter by more."""
    given = []
    for side, extra in (("right", 0), ("left", 2)):
        torch.manual_seed(seed)
        given.append(texts(side, extra=extra))
    return given[0], given[1]


def same(got, want, **options) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], **options)


@pytest.mark.parametrize(("make", "method"), PAIRS, ids=named)
def test_against_one_written_out(make, method) -> None:
    model = made(make, method, GistConfig(2, dropout=0.0, readout="mean"))
    right, left = sides()
    z, z_gist = by_hand(model.model, right, model.gist.token)
    assert (z - z_gist).abs().max() > 1e-2
    for given in (right, left):
        output = model(**given, return_gist_logits=True)
        close(model.model, output.logits, z)
        close(model.model, output.gist_logits, z_gist)
    close(model.model, model.model(**right).logits, z)  # the classifier's own forward
    ours = [p for p in model.parameters() if p.requires_grad]
    got, want = (torch.autograd.grad((a - 2 * b).square().sum(), ours) for a, b in (output.values(), (z, z_gist)))
    scale = max(g.abs().max() for g in want).item()  # a gradient's digits are lost where larger ones cancel
    for g, w in zip(got, want, strict=True):
        close(model.model, g / scale, w / scale)


@pytest.mark.parametrize(("make", "method"), PAIRS, ids=named)
def test_24_every_method_on_every_decoder(make, method, tmp_path) -> None:
    base = make(**QUIET if make is gpt2 else {}).double()
    right, given = sides()
    plain_logits = add_gist(copy.deepcopy(base)).eval()(**given).logits
    model = get_peft_model(copy.deepcopy(base), METHODS[method])
    assert method in ROWS or torch.equal(model(**given).logits, base(**given).logits)
    model = stir(add_gist(model, GistConfig(dropout=0.0))).eval()
    with torch.no_grad():
        output = model(**given, return_gist_logits=True)
        assert list(model(**given)) == ["logits"]
        same(model(**given), {"logits": output.logits})
        same(model(**right, return_gist_logits=True), output)
    assert not torch.allclose(output.logits, plain_logits, atol=1e-3)
    alone = [model(input_ids=row[row != 0][None], return_gist_logits=True) for row in right["input_ids"]]
    same({k: torch.cat([a[k] for a in alone]) for k in output}, output)
    embeds = model.model.get_input_embeddings()(given["input_ids"])
    same(model(inputs_embeds=embeds, attention_mask=given["attention_mask"], return_gist_logits=True), output)

    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    training = model.train()(**given)
    same(training, output)
    GistLoss()(training, TARGET).backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trainable(model)
    dead = {n for n, p in model.named_parameters() if p.grad is not None and not p.grad.any()}
    behind = {"model.model.layers.1.prompt"}  # the last words' window of five leaves the last layer's prompts out
    assert dead == (behind if (make, method) == (mistral, "VPT, deep") else set())
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)

    model.eval()
    single = copy.deepcopy(model).float()
    with torch.autocast("cpu", torch.bfloat16):
        half = single(**given, return_gist_logits=True)
    single = single(**given, return_gist_logits=True)
    for key, value in output.items():
        assert (half[key].float() - value).abs().max() <= 0.1 * value.abs().max()
        assert (single[key] - value).abs().max() <= 1e-5 * value.abs().max()
    with pytest.raises(RuntimeError, match="cannot be merged"):
        merge(model)
    save_adapter(model, tmp_path)
    same(load_adapter(copy.deepcopy(base), tmp_path).eval()(**given, return_gist_logits=True), output)
    same(pickle.loads(pickle.dumps(model))(**given, return_gist_logits=True), output)
    other = add_gist(get_peft_model(make(**QUIET if make is gpt2 else {}).double(), METHODS[method])).eval()
    other.load_state_dict(model.state_dict())
    same(other(**given, return_gist_logits=True), output)
    with disable_adapter(model):
        torch.testing.assert_close(model(**given).logits, base(**given).logits)
    same(model(**given, return_gist_logits=True), output)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_training(model)
    with pytest.warns(UserWarning, match="leaves the sequence"):
        plain = unload(model, keep_head=False)
    assert [n for n, _ in plain.named_modules()] == [n for n, _ in base.named_modules()]
    assert all(torch.equal(v, base.state_dict()[k]) for k, v in plain.state_dict().items())
    assert torch.equal(plain(**given).logits, base(**given).logits)
    assert not [n for m in plain.modules() for n in m.__dict__ if n.startswith("_fastgist")]
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in plain.modules())


@pytest.mark.parametrize(("make", "method"), SOME, ids=named)
def test_24_gradient_checkpointing(make, method) -> None:
    model = made(make, method).train()
    given, ours = texts("left"), [p for p in model.parameters() if p.requires_grad]
    calls = []
    [m for m in model.modules() if type(m).__name__.endswith("MLP")][-1].register_forward_pre_hook(
        lambda *_: calls.append(1)
    )

    def gradients() -> tuple[Tensor, ...]:
        calls.clear()
        model.zero_grad()
        GistLoss()(model(**given), TARGET).backward()
        return tuple(p.grad.clone() for p in ours)

    want, once = gradients(), len(calls)
    for reentrant in (False, True):
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        torch.testing.assert_close(gradients(), want)
        assert len(calls) == 2 * once > 0, "the last layer was not run again in the backward"


@pytest.mark.parametrize(("make", "method"), COMPILED, ids=named)
def test_24_a_step_compiled_in_one_graph_has_the_same_gradients(make, method) -> None:
    model = made(make, method).train()
    given, ours = texts("left"), [p for p in model.parameters() if p.requires_grad]

    def results(run) -> tuple[Tensor, ...]:
        output = run(**given)
        return *output.values(), *torch.autograd.grad(GistLoss()(output, TARGET), ours)

    want = results(model)
    torch._dynamo.reset()
    torch.testing.assert_close(results(torch.compile(model, backend="aot_eager", fullgraph=True)), want)


def language_model(make, method: str | None, **options) -> nn.Module:
    classifier = make(**options)
    name = type(classifier).__name__.replace("ForSequenceClassification", "")
    kind = getattr(transformers, "GPT2LMHeadModel" if make is gpt2 else f"{name}ForCausalLM")
    language = kind(copy.deepcopy(classifier.config)).eval().double()
    body = classifier.base_model_prefix
    setattr(language, body, getattr(classifier, body).double())
    return language if method is None else stir(get_peft_model(language, METHODS[method]), 0.3).eval()


@pytest.mark.parametrize(("make", "method"), SOME, ids=named)
def test_a_language_model_generates_as_it_trained(make, method) -> None:
    """Against one written out, whole, in steps with a cache, and padded on the left: the same logits and words."""
    language = language_model(make, method)
    ids = torch.randint(3, 50, (2, 7))
    whole = language(ids).logits
    head = language.lm_head.weight.T
    close(language, whole, torch.stack([states(language, embedded(language, row)) @ head for row in ids]))
    language(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in language.parameters() if p.requires_grad)
    cache = None
    for part in (slice(0, 3), slice(3, 4), slice(4, 7)):  # the first words, one, several at once
        step = language(ids[:, part], past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        torch.testing.assert_close(step.logits, whole[:, part])
    options = {"max_new_tokens": 6, "do_sample": False}
    left = texts("left", (7, 4))
    words = language.generate(**left, **options)
    assert torch.equal(language.generate(**left, use_cache=False, **options), words)
    for row, start, mask in zip(words, left["input_ids"], left["attention_mask"].bool(), strict=True):
        alone = language.generate(start[mask][None], attention_mask=torch.ones_like(start[mask][None]), **options)
        assert torch.equal(alone[0, mask.sum() :], row[len(start) :][: alone.shape[1] - mask.sum()])
    again = torch.tensor(
        [[5, 6, 7, 8] * 2]
    )  # guessed ahead from what stood before, checked, taken back out of the cache
    one = options | {"attention_mask": torch.ones_like(again), "max_new_tokens": 8}
    assert torch.equal(language.generate(again, prompt_lookup_num_tokens=3, **one), language.generate(again, **one))
    if "VPT" not in method:
        assert torch.equal(language.generate(**left, cache_implementation="static", **options), words)
    assert not torch.allclose(whole, language_model(make, None)(ids).logits, rtol=1e-2)


@pytest.mark.parametrize(("make", "method"), SOME, ids=named)
def test_a_language_models_recomputed_layers_fill_no_cache(make, method) -> None:
    """A layer that is run again would add its keys to it again; a model's own layers take none then."""
    language = language_model(make, method, **QUIET if make is gpt2 else {}).train()
    ids, ours = torch.randint(3, 50, (2, 7)), [p for p in language.parameters() if p.requires_grad]

    def gradients(**options) -> tuple[Tensor, ...]:
        return torch.autograd.grad(language(ids, labels=ids, **options).loss, ours)

    want = gradients()
    language.activation_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradients(), want)
    cache = transformers.DynamicCache(config=language.config)
    torch.testing.assert_close(gradients(past_key_values=cache, use_cache=True), want)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize(("make", "method"), EXPORTED, ids=named)
def test_exported(make, method, tmp_path) -> None:
    model = made(make, method).float()
    torch.manual_seed(5)
    export_model(model, tmp_path / "model.pt2", texts("right"))
    program = torch.export.load(tmp_path / "model.pt2").module()
    for lengths, side in (((5,), "right"), ((9, 3, 6, 4), "right"), ((9, 3, 6, 4), "left")):
        given = texts(side, lengths)
        with torch.no_grad():
            torch.testing.assert_close(program(**given), model(**given).logits)


@pytest.mark.parametrize(("make", "method"), SOME, ids=named)
def test_eager_attention_and_what_is_recorded(make, method) -> None:
    model = made(make, method).float()  # of rows that see nothing, transformers' eager attention makes NaN in float64
    given = texts("left")
    want = model(**given, return_gist_logits=True)
    model.model.set_attn_implementation("eager")
    same(model(**given, return_gist_logits=True), want)
    asked = model.model(**given, output_hidden_states=True, output_attentions=True)
    assert len(asked.hidden_states) == 3 and len(asked.attentions) == 2
    assert not torch.equal(asked.hidden_states[0], asked.hidden_states[1])
    torch.testing.assert_close(asked.attentions[0].sum(-1), torch.ones_like(asked.attentions[0].sum(-1)))


OPTIONS = [(make, {} if make is gpt2 else {"attention_dropout": 0.2}) for make in DECODER_BACKBONES]
OPTIONS += [(gpt2, {"attn_implementation": "eager", "reorder_and_upcast_attn": True})]
OPTIONS += [(llama, {"attention_dropout": 0.2, "is_causal": False})]
OPTIONS += [(gpt2, {"scale_attn_by_inverse_layer_idx": True}), (gpt2, {"scale_attn_weights": False})]


@pytest.mark.parametrize(("make", "options"), OPTIONS, ids=named)
@pytest.mark.parametrize("side", ["left", None])
def test_layers_left_open_are_transformers_own_with_every_dropout(make, options, side) -> None:
    """What AdaptedBlock and PrefixedAttention run, with nothing put in, draws the same masks and gives the same output."""
    model = make(**options).train()
    family = find_family(model, "test")
    calls = {}
    blocks, attentions = family.residual_blocks(model), family.attentions(model)
    for path in (*blocks, *attentions):
        model.get_submodule(path).register_forward_pre_hook(
            lambda m, args, kwargs, path=path: calls.update({path: (args, kwargs)}), with_kwargs=True
        )
    model(**texts("left") if side else {"input_ids": torch.randint(3, 50, (2, 7))}, use_cache=False)
    assert len(calls) == len(blocks) + len(attentions) == 4
    runs = [(path, run, lambda kind, x, branch: x + branch) for path, run in blocks.items()]
    runs += [(path, site.run, lambda k, v: (k, v)) for path, site in attentions.items()]
    for path, run, opened in runs:
        module, (args, kwargs) = model.get_submodule(path), calls[path]
        torch.manual_seed(0)
        want = module(*args, **kwargs)
        torch.manual_seed(0)
        got, again = (run(module, opened, *args, **kwargs) for _ in range(2))
        assert type(got) is type(want)
        got, want, again = (t[0] if isinstance(t, tuple) else t for t in (got, want, again))
        torch.testing.assert_close(got, want)
        assert not torch.equal(got, again), "no dropout is in it"


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("method", TRIED)
def test_two_adapters(make, method) -> None:
    model = made(make, "LoRA")
    given = texts("left")
    first = model(**given, return_gist_logits=True)
    stir(get_peft_model(model, METHODS[method], "other"))
    second = model.eval()(**given, return_gist_logits=True)
    assert not torch.allclose(second.gist_logits, first.gist_logits)
    for name, want in (("default", first), ("other", second), ("default", first)):
        set_adapter(model, name)
        same(model.eval()(**given, return_gist_logits=True), want)


def test_a_layer_that_is_not_known_is_refused() -> None:
    model = transformers.GPT2ForSequenceClassification(copy.deepcopy(gpt2().config))
    model.config.add_cross_attention = True
    crossed = transformers.GPT2ForSequenceClassification(model.config)
    with pytest.raises(ValueError, match="how this GPT2Block adds up is not known: it has ln_1, .*crossattention"):
        get_peft_model(crossed, AdapterConfig(4, "shared"))
    model = qwen2()
    model.model.layers[1].extra = nn.Identity()
    with pytest.raises(
        ValueError, match="placement 'adaptformer' is not to be had: how this Qwen2DecoderLayer adds up"
    ):
        get_peft_model(model, AdapterConfig(4, "adaptformer"))
    get_peft_model(model, LoraConfig(rank=2))  # which asks less of it
