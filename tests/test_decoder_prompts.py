"""Prompts in decoders: against PEFT's, where they stand, what positions they take, and what a cache with them can do.

Values for every decoder are in test_decoder_methods.py."""

from __future__ import annotations

import copy

import pytest
import torch
from decoders import gpt2, llama, mistral, texts, transformers
from decoders_by_hand import by_hand, close, embedded, states
from pairs import METHODS
from test_decoder_methods import QUIET, language_model, made, same, sides
from vits import stir

from fastgist import GistConfig, PromptConfig, add_gist, get_peft_model, set_adapter

GREEDY = {"max_new_tokens": 4, "do_sample": False}


@pytest.mark.parametrize("make", [llama, gpt2])
def test_pefts_prompt_tuning_is_ours(make) -> None:
    """Rows in front of the words' embeddings, of texts padded on the right: on the left PEFT puts them before the padding."""
    peft = pytest.importorskip("peft")
    base = make().double()
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).double().eval()
    ours = get_peft_model(copy.deepcopy(base), PromptConfig(length=3)).eval()
    with torch.no_grad():
        ours.score.weight.copy_(theirs.get_base_model().score.modules_to_save["default"].weight)
        theirs.prompt_encoder["default"].embedding.weight.copy_(ours.base_model.get_submodule(
            "h.0" if make is gpt2 else "layers.0").prompt)  # fmt: skip
    given = texts("right")
    lengths = given["attention_mask"].sum(1) - 1
    body = theirs.get_base_model().base_model
    seen = []
    body.register_forward_hook(lambda m, args, output: seen.append(output[0]))
    theirs(**given)  # which reads the last row of each, padding too: embeddings do not tell
    want = seen[0][torch.arange(3), lengths + 3] @ ours.score.weight.T
    torch.testing.assert_close(ours(**given).logits, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", [llama, mistral, gpt2])
@pytest.mark.parametrize("method", ["VPT", "VPT, deep"])
def test_they_stand_right_before_the_words(make, method) -> None:
    """Behind padding on the left, where windows and positions count on from them; also under the model's own forward, and
    where positions are given."""
    model = made(make, method).model
    right, left = sides()
    z, _ = by_hand(model, right, torch.zeros(1, 1, 32).double())
    close(model, model(**right).logits, z)
    positions = (left["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    close(model, model(**left, position_ids=positions).logits, z)
    if make is not gpt2:  # whose table counts padding on the left, as without prompts
        close(model, model(**left).logits, z)
    out = model.base_model(**left, output_hidden_states=True)
    rows = left["input_ids"].shape[1]
    assert out.last_hidden_state.shape[1] == rows and out.hidden_states[0].shape[1] == rows + 2
    first = left["attention_mask"].argmax(1)
    prompt = next(m for n, m in model.named_parameters() if n.endswith("0.prompt"))
    if make is not gpt2:
        for row, place in zip(out.hidden_states[0], first, strict=True):
            assert torch.equal(row[place : place + 2], prompt)
    nothing = {k: v.clone() for k, v in right.items()}
    nothing["attention_mask"][1] = 0
    got = model(**nothing).logits
    assert got.isfinite().all()
    close(model, got[[0, 2]], z[[0, 2]])


def test_gpt2s_types() -> None:
    """The prompts' type is the first word's."""
    model = made(gpt2, "VPT")
    right, left = sides()
    types = torch.randint(50, right["input_ids"].shape)
    want = model(**right, token_type_ids=types, return_gist_logits=True)
    wide = torch.zeros_like(left["input_ids"])
    for row, own, mask in zip(wide, types, left["attention_mask"].bool(), strict=True):
        row[mask] = own[: mask.sum()]
    same(model(**left, token_type_ids=wide, return_gist_logits=True), want)
    plain = model.model
    ids, kinds = right["input_ids"][0], types[0]
    table, prompt = plain.transformer.wte.weight, plain.transformer.h[0].prompt
    with torch.no_grad():
        prompt.add_(table[kinds[0]])
        rows = states(plain, table[ids] + table[kinds])
    close(plain, want.logits[0], rows[-1] @ plain.score.weight.T)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("full_length", ["refuse", "truncate"])
def test_what_room_they_take(make, full_length) -> None:
    """Two of 24 positions, and the gist token one more."""
    model = made(make, "VPT", GistConfig(dropout=0.0, full_length=full_length))
    fits = texts("right", (21, 20, 6))
    z, z_gist = by_hand(model.model, fits, model.gist.token)
    long = {k: torch.cat((v, v[:, :3]), 1) for k, v in fits.items()}
    long["input_ids"][1:, 21:], long["attention_mask"][1:, 21:] = 0, 0
    output = model(**fits, return_gist_logits=True)
    close(model.model, output.logits, z)
    close(model.model, output.gist_logits, z_gist)
    if full_length == "truncate":
        for some in (long, {"input_ids": long["input_ids"]}):
            output = model(**some, return_gist_logits=True)
            close(model.model, output.logits, z)
            close(model.model, output.gist_logits, z_gist)
            close(model.model, model(**some).logits, z)
        return
    with pytest.raises(ValueError, match="as long as .*'s 24 positions, 2 of them the prompts', .* shorten it by 1"):
        model(**{k: v[:, :22] for k, v in long.items()}, return_gist_logits=True)
    assert model(**{k: v[:, :22] for k, v in long.items()}).logits.isfinite().all()
    padded = {k: torch.nn.functional.pad(v, (4, 0)) for k, v in fits.items()}
    close(model.model, model(**padded, return_gist_logits=True).logits, z)  # padding takes no position
    if make is gpt2:
        for run in (model, model.model):
            with pytest.raises(
                ValueError, match="a row needs more than the 24 positions .*, 2 of which .* shorten it to 22"
            ):
                run(**long)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_generation_with_what_was_trained_beside_a_gist_token(make) -> None:
    """A language model with the classifier's body has its prompts; also beams, and a text without words before."""
    classifier = made(make, "VPT, deep").model
    language = language_model(make, None)
    setattr(language, classifier.base_model_prefix, classifier.base_model)
    ids = torch.randint(3, 50, (2, 6))
    head = language.lm_head.weight.T
    close(language, language(ids).logits, torch.stack([states(language, embedded(language, i)) @ head for i in ids]))
    options = {"attention_mask": torch.ones_like(ids)} | GREEDY
    for beams in (1, 3):
        words = language.generate(ids, num_beams=beams, **options)
        assert torch.equal(language.generate(ids, num_beams=beams, use_cache=False, **options), words)
    embeds = language.get_input_embeddings()(ids)
    assert torch.equal(language.generate(inputs_embeds=embeds, **options), language.generate(ids, **options)[:, 6:])


@pytest.mark.parametrize("make", [llama, gpt2])
def test_steps_by_hand_with_padding_on_the_left(make) -> None:
    language = language_model(make, "VPT, deep")
    left = texts("left", (7, 4))
    positions = (left["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    whole, cache = language(**left, position_ids=positions).logits, None
    for part in (slice(0, 4), slice(4, 5), slice(5, 7)):
        step = language(
            left["input_ids"][:, part],
            attention_mask=left["attention_mask"][:, : part.stop],
            position_ids=positions[:, part],
            past_key_values=cache,
            use_cache=True,
        )
        cache = step.past_key_values
        real = left["attention_mask"][:, part].bool()
        torch.testing.assert_close(step.logits[real], whole[:, part][real])
    assert cache.get_seq_length() == 9


@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_cache_in_which_generate_would_miscount_is_refused(make) -> None:
    language = language_model(make, "VPT")
    ids = torch.randint(3, 50, (2, 8))
    mask = torch.ones_like(ids)
    padded = mask.clone()
    padded[1, :2] = 0
    for some in (mask, padded):
        cache = language(ids[:, :4], attention_mask=some[:, :4], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="holds 6 rows, 2 of which are the prompts, .* start with an empty one"):
            language.generate(ids, attention_mask=some, past_key_values=cache, **GREEDY)
    with pytest.raises(ValueError, match=r"attention_mask of shape \(B, N\), got .* cache of a fixed size"):
        language.generate(ids, attention_mask=mask, cache_implementation="static", **GREEDY)
    with pytest.raises(ValueError, match=r"expected attention_mask of shape \(2, 8\), got \(2, 9\)"):
        language(ids, attention_mask=torch.ones(2, 9))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_prompts_have_dropout_of_their_own(make) -> None:
    options = QUIET if make is gpt2 else {}
    model = get_peft_model(make(**options), PromptConfig(length=2, deep=True, dropout=0.5)).train()
    given, ours = texts("left"), [p for n, p in model.named_parameters() if n.endswith("prompt")]

    def gradients(seed: int) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(seed)
        return torch.autograd.grad(model(**given).logits.square().sum(), ours)

    want = gradients(3)
    assert not torch.equal(want[0], gradients(4)[0])
    model.activation_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradients(3), want)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_switching_between_methods_with_and_without_rows(make) -> None:
    given = texts("left")
    model = add_gist(make()).eval()
    want = {}
    for method in ("LoRA", "VPT", "prefix", "VPT, deep", "adapter, shared"):
        name = method.replace(", ", "-")
        stir(get_peft_model(model, METHODS[method], name))
        want[name] = model.eval()(**given, return_gist_logits=True)
    for name in ("VPT", "LoRA", "VPT-deep", "prefix", "adapter-shared", "VPT"):
        set_adapter(model, name)
        same(model.eval()(**given, return_gist_logits=True), want[name])


def test_wrong_calls_are_the_models_own_to_refuse() -> None:
    model = get_peft_model(llama(), PromptConfig(length=2))
    plain = transformers.LlamaForSequenceClassification(copy.deepcopy(model.config))
    for run in (plain, model):
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            run.model()
