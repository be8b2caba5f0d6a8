"""Hard cases 23 and 24 for every method on every encoder of transformers; what is refused, and why. Values are checked in
test_backbones_by_hand.py."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from itertools import product

import pytest
import torch
from hf_models import TEXTS, TRANSFORMERS_BACKBONES, backbone, example_inputs, transformers, without_dropout
from pairs import ENCODER_PAIRS, METHODS, NO_PLACE, ROWS, VARIANTS
from torch import nn
from vits import stir, trainable

from fastgist import (
    AdapterConfig,
    FullConfig,
    GistConfig,
    LinearProbeConfig,
    LoraConfig,
    PromptConfig,
    add_gist,
    assert_training,
    disable_adapter,
    get_peft_model,
    load_adapter,
    merge,
    report,
    save_adapter,
    set_adapter,
    unload,
    unmerge,
)
from fastgist.nn import GistLoss
from fastgist.peft.method import method_of

TRIED = METHODS | VARIANTS
PAIRS = ENCODER_PAIRS + list(product(TRANSFORMERS_BACKBONES, VARIANTS))
#: What DINOv2 and CLIP keep and their classifiers do not read: full fine-tuning trains it in name only.
UNREAD = ("mask_token", "post_layernorm")
ROBERTAS = ("roberta", "xlm-roberta", "camembert")


def same(got, want, **options) -> None:
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], **options)


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_24_every_method_on_every_encoder(name, method, tmp_path) -> None:
    base = without_dropout(
        backbone(name)
    ).double()  # in float32 a row alone, or without gradients, may be rounded otherwise
    narrow, target = example_inputs(base), torch.tensor([0, 2, 1])
    given = {k: v.double() if v.is_floating_point() else v for k, v in narrow.items()}
    model = get_peft_model(copy.deepcopy(base), TRIED[method])
    if method not in ROWS:
        torch.testing.assert_close(model(**given).logits, base(**given).logits)
    model = stir(add_gist(model, GistConfig(dropout=0.0))).eval()
    with torch.no_grad():
        output = model(**given, return_gist_logits=True)
        assert list(model(**given)) == ["logits"]
        same(model(**given), {"logits": output.logits})
    with torch.inference_mode():
        same(model(*given.values(), return_gist_logits=True), output)
    alone = [model(**{k: v[i : i + 1] for k, v in given.items()}, return_gist_logits=True) for i in range(3)]
    same({k: torch.cat([a[k] for a in alone]) for k in output}, output)
    order = torch.tensor([2, 0, 1])
    shuffled = model(**{k: v[order] for k, v in given.items()}, return_gist_logits=True)
    same({k: v[order.argsort()] for k, v in shuffled.items()}, output)

    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    training = model.train()(**given)
    same(training, output)
    GistLoss()(training, target).backward()
    unread = {n for n in trainable(model) if method == "full" and any(part in n for part in UNREAD)}
    reached = {n for n, p in model.named_parameters() if p.grad is not None}
    assert reached <= trainable(model) and trainable(model) - reached <= unread
    dead = {n for n, p in model.named_parameters() if p.grad is not None and not p.grad.any()}
    assert not {n for n in dead if "key" not in n}, "parameters whose gradient is zero"  # softmax: a key's bias
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)

    model.eval()
    single = copy.deepcopy(model).float()
    single.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        half = single(**narrow, return_gist_logits=True)
        GistLoss()(half, target).backward()
    assert half.keys() == output.keys()
    assert {n for n, p in single.named_parameters() if p.grad is not None} == reached
    assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in single.parameters() if p.grad is not None)
    single = single(**narrow, return_gist_logits=True)
    for key, value in output.items():  # against the largest, as for timm's: errors go by what is summed
        assert (half[key].float() - value).abs().max() <= 0.1 * value.abs().max()
        assert (single[key] - value).abs().max() <= 1e-5 * value.abs().max()
    save_adapter(model, tmp_path)
    same(load_adapter(copy.deepcopy(base), tmp_path).eval()(**given, return_gist_logits=True), output)
    copied = copy.deepcopy(model) if method == "LoRA" else pickle.loads(pickle.dumps(model))
    same(copied(**given, return_gist_logits=True), output)
    other = add_gist(get_peft_model(backbone(name).double(), TRIED[method])).eval()
    other.load_state_dict(model.state_dict())
    same(other(**given, return_gist_logits=True), output)
    if method == "full":
        return  # there is no way back to weights that were moved
    with disable_adapter(model):
        torch.testing.assert_close(model(**given).logits, base(**given).logits)
    same(model(**given, return_gist_logits=True), output)
    with pytest.warns(UserWarning, match="leaves the sequence"):
        plain = unload(model, keep_head=False)
    assert all(torch.equal(v, base.state_dict()[k]) for k, v in plain.state_dict().items())
    torch.testing.assert_close(plain(**given).logits, base(**given).logits)
    assert not [n for m in plain.modules() for n in m.__dict__ if n.startswith("_fastgist")]
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in plain.modules())


@pytest.mark.parametrize(("name", "method"), PAIRS)
def test_23_wrapping(name, method) -> None:
    model = get_peft_model(backbone(name), TRIED[method])
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"an adapter named 'default' already"):
        get_peft_model(model, TRIED[method])
    refusal = "stands alone" if method == "full" else r"nothing in this model is called 'nowhere'; it has .*q.*"
    with pytest.raises(ValueError, match=refusal):
        get_peft_model(model, LoraConfig(targets=("nowhere",)), "other")
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in before.named_modules()}
    assert trainable(model) == trainable(before)
    assert report(model).adapter == "default"
    given = example_inputs(model)
    torch.testing.assert_close(model(**given).logits, before(**given).logits)
    if (name, method) == ("t5-encoder", "SSF"):
        with pytest.raises(TypeError, match=r"layer_norm: .* base_layer is T5LayerNorm; .* nothing was changed"):
            merge(model)
    elif method in ("linear probe", "full"):
        merge(model)
    elif method_of(TRIED[method]).mergeable:
        want = stir(model)(**given).logits
        torch.testing.assert_close(merge(model)(**given).logits, want, rtol=1e-4, atol=1e-5)
        unmerge(model)
    else:
        with pytest.raises(RuntimeError, match="cannot be merged"):
            merge(model)
    for n, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and not (method == "full" and any(part in n for part in UNREAD)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_training(model)
        assert_training(add_gist(model))


@pytest.mark.parametrize(("pair", "reason"), NO_PLACE.items(), ids=str)
def test_23_what_has_no_place_is_refused(pair, reason) -> None:
    model = backbone(pair[0])
    names = set(model.state_dict())
    with pytest.raises(ValueError, match=reason):
        get_peft_model(model, TRIED[pair[1]])
    assert set(model.state_dict()) == names
    assert all(p.requires_grad for p in model.parameters())


def test_what_counts_as_the_head() -> None:
    """What transformers makes anew for a classifier is trained; a pooler that comes with the pre-trained model is not."""
    for name in TRANSFORMERS_BACKBONES:
        model = get_peft_model(backbone(name), LinearProbeConfig())
        heads = {n.split(".")[0] for n in trainable(model)}
        more = {"deberta-v2": {"pooler"}, "distilbert": {"pre_classifier"}}.get(name, set())
        assert heads == {"classifier"} | more


#: Hooks and a run function each; the models left out are built of another's layers.
COMPILED = {
    "bert": "adapter, shared",
    "roberta": "VPT, deep",
    "electra": "prefix",
    "distilbert": "adapter, shared",
    "deberta-v2": "prefix",
    "modernbert": "adapter, shared",
    "t5-encoder": "VPT, deep",
    "vit": "prefix",
    "dinov2-registers": "adapter, shared",
    "clip": "prefix",
}


@pytest.mark.parametrize(("name", "method"), COMPILED.items())
def test_24_compiled_as_one_graph(name, method) -> None:
    model = stir(add_gist(get_peft_model(backbone(name), TRIED[method]))).eval()
    given = example_inputs(model.model)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    same(compiled(**given, return_gist_logits=True), model(**given, return_gist_logits=True))


@pytest.mark.parametrize(("name", "method"), ENCODER_PAIRS)
def test_24_gradient_checkpointing(name, method) -> None:
    model = stir(add_gist(get_peft_model(without_dropout(backbone(name)), TRIED[method]), GistConfig(dropout=0.0)))
    given = example_inputs(model.model)
    ours = [p for n, p in model.named_parameters() if p.requires_grad and not any(part in n for part in UNREAD)]

    calls = []
    inside = [m for n, m in model.named_modules() if ".1." in n and isinstance(m, nn.Linear)]
    inside[-1].register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients() -> tuple[torch.Tensor, ...]:
        calls.clear()
        return torch.autograd.grad(GistLoss()(model(**given), torch.tensor([0, 2, 1])), ours)

    model.train()
    want, once = gradients(), len(calls)
    model.model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradients(), want)
    assert once > 0
    assert len(calls) == 2 * once, "the last layer was not run again in the backward"


@pytest.mark.parametrize("name", COMPILED)
def test_24_a_compiled_step_has_the_same_gradients(name) -> None:
    model = add_gist(get_peft_model(without_dropout(backbone(name)), TRIED[COMPILED[name]]), GistConfig(dropout=0.0))
    stir(model).train()
    given, ours = example_inputs(model.model), [p for p in model.parameters() if p.requires_grad]

    def gradients(run) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(GistLoss()(run(**given), torch.tensor([0, 2, 1])), ours)

    want = gradients(model)
    torch._dynamo.reset()
    torch.testing.assert_close(gradients(torch.compile(model, fullgraph=True, backend="aot_eager")), want)


@pytest.mark.parametrize("name", TRANSFORMERS_BACKBONES)
@pytest.mark.parametrize(
    "config", [LoraConfig(rank=2, dropout=0.4), AdapterConfig(4, "adaptformer", scale=0.5, dropout=0.4)], ids=repr
)
def test_24_recomputed_layers_drop_the_same(name, config) -> None:
    """The model's own dropout, the layers' and the token's, drawn again in the backward from the same state."""
    model = stir(add_gist(get_peft_model(backbone(name), config), GistConfig(dropout=0.3))).train()
    given, ours = example_inputs(model.model), [p for p in model.parameters() if p.requires_grad]

    def gradients(seed: int) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(seed)
        return torch.autograd.grad(GistLoss()(model(**given), torch.tensor([0, 2, 1])), ours)

    want, other = gradients(3), gradients(4)
    assert not all(torch.equal(a, b) for a, b in zip(want, other, strict=True))
    model.model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(gradients(3), want)


def test_24_deberta_with_reentrant_checkpointing_is_explained() -> None:
    """Its blocks share the relative positions: transformers' own model fails where they are trained."""
    plain = backbone("deberta-v2").train()
    plain.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="second time"):
        plain(**example_inputs(plain)).logits.sum().backward()
    for config, trains in ((LoraConfig(), True), (FullConfig(), False)):
        model = get_peft_model(backbone("deberta-v2"), config)
        model.gradient_checkpointing_enable({"use_reentrant": True})
        if trains:
            assert_training(model)
            continue
        with pytest.raises(RuntimeError, match="relative positions, also in the plain model: use the non-reentrant"):
            assert_training(model)


@pytest.mark.parametrize(
    "name", ["vit", "dinov2", "clip"]
)  # of texts, transformers lets the embeddings require gradients
@pytest.mark.parametrize("method", ["LoRA", "adapter, shared"])
def test_23_a_frozen_first_layer_with_reentrant_checkpointing(name, method) -> None:
    """Nothing before the first layer is trained, so a reentrant checkpoint cuts the graph; a gist token is before it."""
    model = get_peft_model(backbone(name), TRIED[method])
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match="receive no gradient: .*\\.0\\."):
            assert_training(model)
        assert_training(add_gist(model))


@pytest.mark.parametrize("name", ["bert", "deberta-v2", "modernbert", "t5-encoder", "clip", "dinov2-registers"])
def test_switching_between_methods_with_and_without_rows(name) -> None:
    given = example_inputs(backbone(name))
    model = add_gist(backbone(name))
    want = {}
    for method in ("LoRA", "VPT", "prefix", "VPT, deep", "adapter, shared"):
        stir(get_peft_model(model, TRIED[method], re.sub(r"\W+", "-", method)))
        want[method] = model.eval()(**given, return_gist_logits=True)
    for method in ("VPT", "LoRA", "VPT, deep", "prefix", "adapter, shared", "VPT"):
        set_adapter(model, re.sub(r"\W+", "-", method))
        same(model.eval()(**given, return_gist_logits=True), want[method])


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_of_full_length_has_room(name) -> None:
    """No model spends a position embedding on the token or on prompts."""
    model = stir(add_gist(get_peft_model(backbone(name), PromptConfig(2, deep=True)))).eval()
    longest = model.model.config.max_position_embeddings if name != "t5-encoder" else 64
    ids = torch.randint(4, 50, (2, longest - 2 * (name in ROBERTAS)))  # whose positions start behind the padding's
    output = model(ids, return_gist_logits=True)
    assert output.gist_logits.isfinite().all()
    same(model(ids, torch.ones_like(ids), return_gist_logits=True), output)
    if name not in ("t5-encoder", "modernbert", "deberta-v2"):
        with pytest.raises((IndexError, RuntimeError)):  # one word more is too long for the model itself
            model(torch.cat((ids, ids[:, :1]), 1))


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("method", ["LoRA", "prefix", "adapter, shared"])
def test_eager_attention_agrees_with_the_default(name, method) -> None:
    model = stir(add_gist(get_peft_model(backbone(name), TRIED[method]))).eval()
    given = example_inputs(model.model)
    want = model(**given, return_gist_logits=True)
    if name == "deberta-v2":
        return  # has one implementation
    model.model.set_attn_implementation("eager")
    same(model(**given, return_gist_logits=True), want)


def test_what_belongs_to_each_word_is_rolled_with_it() -> None:
    model = stir(add_gist(get_peft_model(backbone("bert", type_vocab_size=3), LoraConfig(rank=2)))).eval()
    ids, kinds = torch.randint(4, 50, (2, 6)), torch.randint(3, (2, 6))
    mask = torch.ones(2, 6, dtype=torch.long)
    want = model(ids, mask, kinds, return_gist_logits=True)
    left = [nn.functional.pad(t, (3, 0), value=v) for t, v in ((ids, 1), (mask, 0), (kinds, 2))]
    same(model(*left, return_gist_logits=True), want)
    positions = torch.arange(6)[None] + 5
    want = model(ids, mask, kinds, positions, return_gist_logits=True)
    moved = nn.functional.pad(positions, (3, 0))
    same(model(*left, moved, return_gist_logits=True), want)
    embeds = model.model.bert.embeddings.word_embeddings(left[0])
    same(model(None, left[1], left[2], moved, embeds, return_gist_logits=True), want)
    holes = torch.tensor([[1, 0, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1]])  # inside a text: positions stay
    want = model(ids, holes, return_gist_logits=True)
    same(model(left[0], nn.functional.pad(holes, (3, 0)), return_gist_logits=True), want)
    nothing = torch.zeros_like(mask)
    assert model(ids, nothing, return_gist_logits=True).gist_logits.isfinite().all()


@pytest.mark.parametrize("name", TRANSFORMERS_BACKBONES)
def test_hidden_states_and_attentions_that_are_asked_for(name) -> None:
    """Hooks run on layers and attention that are run with something left open: transformers records with them."""
    given = example_inputs(backbone(name))
    for method in ("adapter, shared", "prefix"):
        model = get_peft_model(backbone(name), TRIED[method])
        if name != "deberta-v2":
            model.set_attn_implementation("eager")
        output = model(**given, output_hidden_states=True, output_attentions=True)
        assert len(output.hidden_states) == 3
        assert len(output.attentions) == 2
        rows = output.hidden_states[0].shape[1]
        assert output.attentions[1].shape == (3, 2, rows, rows + 2 * (method == "prefix"))


def test_positions_given_to_a_rotary_model_move_up() -> None:
    model = stir(add_gist(get_peft_model(backbone("modernbert"), PromptConfig(2)))).eval()
    ids = torch.randint(4, 50, (2, 6))
    want = model(ids, return_gist_logits=True)
    for given in (torch.arange(6)[None], torch.arange(6).expand(2, -1), torch.arange(6)[None] + 7):
        same(model(ids, position_ids=given, return_gist_logits=True), want)  # rotation is relative
    assert not torch.allclose(model(ids, position_ids=2 * torch.arange(6)[None]).logits, want.logits)


def test_images_of_another_size_and_masked_patches() -> None:
    model = stir(add_gist(get_peft_model(backbone("vit"), LoraConfig(rank=2)))).eval()
    large = model(torch.randn(2, 3, 32, 24), interpolate_pos_encoding=True, return_gist_logits=True)
    assert large.gist_logits.shape == (2, 3)
    images, mask = torch.randn(2, 3, 16, 16), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    changed = images.clone()
    changed[0, :, 8:] = 0.0  # patches 3 and 4 of the first image
    want = model(images, attention_mask=mask, return_gist_logits=True)
    same(model(changed, attention_mask=mask, return_gist_logits=True), want)
    assert not torch.allclose(model(changed).logits[0], model(images).logits[0])
    prompted = add_gist(get_peft_model(backbone("vit"), PromptConfig(2)))
    with pytest.raises(ValueError, match="ViTForImageClassification with prompts takes no attention_mask"):
        prompted(images, attention_mask=mask)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit", {"image_size": [16, 24]}),
        ("deberta-v2", {"embedding_size": 16}),  # projected before the norm that prompts go in behind
        ("electra", {"embedding_size": 32}),  # not projected
    ],
    ids=str,
)
def test_widths_and_sides_that_differ(name, options) -> None:
    assert_training(add_gist(get_peft_model(backbone(name, **options), PromptConfig(2, deep=True))))


def test_wrong_arguments_say_so() -> None:
    model = add_gist(backbone("bert"))
    ids = torch.randint(4, 50, (2, 6))
    with pytest.raises(TypeError, match="BertForSequenceClassification takes input_ids, attention_mask, .*; got 9 arg"):
        model(ids, *[None] * 8)
    with pytest.raises(ValueError, match=r"BertModel with a gist token or prompts: expected attention_mask of shape"):
        model.model(ids, torch.ones(2, 1, 6, 6))
    t5 = add_gist(backbone("t5-encoder"))
    with pytest.raises(ValueError, match="give input_ids or inputs_embeds, not both"):
        t5()


def test_layers_and_attention_that_are_not_known_are_refused() -> None:
    from transformers.models.bert.modeling_bert import BertLayer, BertSelfAttention

    class Layer(BertLayer):
        pass

    class Attention(BertSelfAttention):
        pass

    model = backbone("bert")
    model.bert.encoder.layer[1].__class__ = Layer
    with pytest.raises(ValueError, match=r"placement 'shared' is not to be had: how a .*Layer adds up is not known"):
        get_peft_model(model, TRIED["adapter, shared"])
    model = backbone("bert")
    model.bert.encoder.layer[0].extra = nn.Identity()
    with pytest.raises(ValueError, match="how this BertLayer adds up is not known: it has attention, .*, extra"):
        get_peft_model(model, TRIED["adapter, shared"])
    model = backbone("bert")
    model.bert.encoder.layer[1].attention.self.__class__ = Attention
    with pytest.raises(ValueError, match="PrefixConfig: what happens inside the attention of .*BertLayer is not known"):
        get_peft_model(model, TRIED["prefix"])
    model = backbone("bert")
    model.bert.encoder.layer[1].attention.self.extra = nn.Identity()
    with pytest.raises(ValueError, match="inside this BertSelfAttention is not known: it has query, .*, extra"):
        get_peft_model(model, TRIED["prefix"])


def test_a_prefix_does_not_go_with_windows_of_flash_attention() -> None:
    model = get_peft_model(backbone("modernbert"), TRIED["prefix"])
    layer = model.model.layers[1].attn
    assert layer.base_layer.sliding_window is not None
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="a prefix in ModernBERT needs attn_implementation sdpa or eager"):
        layer(torch.randn(1, 4, 32))


STRANGERS = {
    "ResNetForImageClassification": ("ResNetConfig", {"embedding_size": 8, "hidden_sizes": [8], "depths": [1]},
                                     "is a convolutional network.*ViTForImageClassification, Dinov2"),
    "SwinForImageClassification": ("SwinConfig", {"embed_dim": 8, "depths": [1], "num_heads": [1], "image_size": 56},
                                   "attends within windows of patches and merges"),
    "PvtForImageClassification": (
        "PvtConfig", {"hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4}, "from stage to stage"),
    "LayoutLMForSequenceClassification": ("LayoutLMConfig", "words", "takes a box on the page for every token.*BertFor"),
    "BeitForImageClassification": ("BeitConfig", "images", "fixed grid of patches"),
    "LongformerForSequenceClassification": ("LongformerConfig", "words", "does not let every token attend to every"),
    "SiglipForImageClassification": ("SiglipConfig", {}, "has no class token for the gist token to stand behind"),
    "T5ForSequenceClassification": ("T5Config", "t5", "T5EncoderForSequenceClassification puts one on a T5's encoder"),
    "T5EncoderModel": ("T5Config", "t5", "T5EncoderForSequenceClassification puts one"),
    "BartForSequenceClassification": (
        "BartConfig", {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 50, "encoder_ffn_dim": 8,
                       "decoder_ffn_dim": 8, "encoder_attention_heads": 1, "decoder_attention_heads": 1},
        "has an encoder and a decoder"),
    "BertModel": ("BertConfig", "words", "has no classification head, .*: take BertForSequenceClassification"),
    "CLIPVisionModel": ("CLIPVisionConfig", "images", "has no classification head, .*: take CLIPForImageClassification"),
    "Dinov2Model": ("Dinov2Config", "images", "has no classification head, .*: take Dinov2ForImageClassification"),
    "BertForTokenClassification": ("BertConfig", "words", "does not read its classes from one row.*: take BertForSeq"),
    "DeiTForImageClassificationWithTeacher": ("DeiTConfig", "images", "does not read its classes from one row"),
    "ViTMAEModel": ("ViTMAEConfig", "images", "the structure of transformers.models.vit_mae.* is not known"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "case"), STRANGERS.items(), ids=STRANGERS)
def test_what_cannot_carry_a_token_says_why(name, case) -> None:
    from hf_models import IMAGES, SIZES, WORDS

    config, options, reason = case
    sizes = {"words": SIZES | WORDS, "images": SIZES | IMAGES, "t5": {"d_model": 8, "d_ff": 8, "num_layers": 1}}
    options = sizes[options] if isinstance(options, str) else options
    if name.startswith("Siglip"):
        small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        options = {
            "vision_config": small | {"image_size": 16, "patch_size": 8},
            "text_config": small | {"vocab_size": 9},
        }
    with torch.device("meta"):
        model = getattr(transformers, name)(getattr(transformers, config)(**options))
    flags = [p.requires_grad for p in model.parameters()]
    for wrap in (add_gist, lambda m: get_peft_model(m, LoraConfig())):
        with pytest.raises(TypeError, match=f"(add_gist|get_peft_model): .*{reason}"):
            wrap(model)
    assert flags == [p.requires_grad for p in model.parameters()]


def test_reasons_are_given_for_models_that_exist() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    from fastgist.integrations.transformers.refusals import REASONS

    assert set(REASONS) <= set(CONFIG_MAPPING_NAMES)


def test_t5_encoder_alone(tmp_path) -> None:
    """It saves and loads as any of transformers' models, takes a T5's weights, and has a loss of its own."""
    from fastgist.integrations.transformers import T5EncoderForSequenceClassification

    model = backbone("t5-encoder")
    given, target = example_inputs(model), torch.tensor([0, 2, 1])
    output = model(**given, labels=target)
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, target))
    model.save_pretrained(tmp_path / "own")
    loaded = T5EncoderForSequenceClassification.from_pretrained(tmp_path / "own").eval()
    torch.testing.assert_close(loaded(**given).logits, output.logits)
    whole = transformers.T5ForConditionalGeneration(model.config)
    whole.save_pretrained(tmp_path / "t5")
    taken = T5EncoderForSequenceClassification.from_pretrained(tmp_path / "t5", num_labels=4).eval()
    for n, p in taken.transformer.encoder.named_parameters():
        assert torch.equal(p, whole.encoder.get_parameter(n)), n
    assert taken(**given).logits.shape == (3, 4)
    embeds = taken.transformer.get_input_embeddings()(given["input_ids"])
    again = taken(inputs_embeds=embeds, attention_mask=given["attention_mask"])
    torch.testing.assert_close(again.logits, taken(**given).logits)
