"""A gist token and every method that stands in the sequence or beside a branch, on transformers' encoders, against forwards
written out in float64: what is attended to, at which position, and what the head reads."""

from __future__ import annotations

import pytest
import torch
from hf_by_hand import by_hand, deberta_bucket, t5_bucket
from hf_models import TEXTS, TRANSFORMERS_BACKBONES, backbone, example_inputs
from pairs import METHODS
from torch import nn
from vits import stir

from fastgist import FullConfig, GistConfig, add_gist, get_peft_model, load_adapter, save_adapter
from fastgist.peft.family import find_family

#: DeBERTa divides by a float32 square root: of 36 it is exact.
OPTIONS = {"deberta-v2": {"hidden_size": 24}}
#: What transformers computes in float32 whatever the model is in: T5's norm (so does the other side), rotary angles.
TOLERANCE = {"modernbert": {"rtol": 1e-5, "atol": 1e-6}, "t5-encoder": {"rtol": 1e-6, "atol": 1e-7}}
TRIED = ("LoRA", "adapter, houlsby", "adapter, shared", "adapter, adaptformer", "VPT", "VPT, deep", "prefix")


def close(name, got, want) -> None:
    torch.testing.assert_close(got, want, **TOLERANCE.get(name, {"rtol": 1e-9, "atol": 1e-10}))


def double(name, **options) -> nn.Module:
    return backbone(name, **OPTIONS.get(name, {}) | options).double()


@pytest.mark.parametrize("name", TRANSFORMERS_BACKBONES)
def test_a_plain_model_is_what_is_written_out(name) -> None:
    model = double(name)
    given = example_inputs(model)
    close(name, model(**given).logits, by_hand(name, model, given)[0])


@pytest.mark.parametrize("name", TRANSFORMERS_BACKBONES)
@pytest.mark.parametrize("method", TRIED)
def test_methods_with_a_gist_token(name, method) -> None:
    model = stir(get_peft_model(double(name), METHODS[method]))
    given = example_inputs(model)
    close(name, model(**given).logits, by_hand(name, model, given)[0])
    gist = stir(add_gist(model, GistConfig(length=1 + (method == "LoRA")))).eval()
    output = gist(**given, return_gist_logits=True)
    z, z_gist = by_hand(name, model, given, gist.gist.token)
    close(name, output.logits, z)
    close(name, output.gist_logits, z_gist)
    close(name, model(**given).logits, z)  # the wrapped model's own forward, with the token in it
    if method in ("adapter, shared", "VPT, deep", "prefix"):
        ours = [p for p in gist.parameters() if p.requires_grad]
        got, want = (torch.autograd.grad((a - 2 * b).square().sum(), ours) for a, b in (output.values(), (z, z_gist)))
        scale = max(g.abs().max() for g in want).item()  # a gradient's digits are lost where larger ones cancel
        for g, w in zip(got, want, strict=True):
            close(name, g / scale, w / scale)


@pytest.mark.parametrize("name", ["bert", "t5-encoder", "dinov2-registers", "clip"])
def test_several_gist_tokens_read_as_their_mean(name) -> None:
    model = stir(add_gist(double(name), GistConfig(3, readout="mean"))).eval()
    given = example_inputs(model.model)
    output = model(**given, return_gist_logits=True)
    z, z_gist = by_hand(name, model.model, given, model.gist.token, mean=True)
    close(name, output.logits, z)
    close(name, output.gist_logits, z_gist)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("modernbert", {"classifier_pooling": "mean"}),
        ("deberta-v2", {"share_att_key": False, "position_biased_input": True, "type_vocab_size": 2}),
        ("deberta-v2", {"pos_att_type": ["c2p"], "hidden_size": 16, "share_att_key": False}),
        ("deberta-v2", {"position_buckets": -1, "max_relative_positions": 5, "norm_rel_ebd": "none"}),
        ("deberta-v2", {"conv_kernel_size": 3}),
        ("deberta-v2", {"position_buckets": 6, "max_position_embeddings": 40}),
        ("electra", {"embedding_size": 32}),
        ("t5-encoder", {"relative_attention_num_buckets": 6, "relative_attention_max_distance": 5}),
    ],
    ids=repr,
)
def test_other_sizes_and_poolings(name, options) -> None:
    if name == "electra":  # no projection behind the embeddings
        model = double(name, **options)
        assert not hasattr(model.electra, "embeddings_project")
        assert add_gist(model).host.path == "electra.embeddings.dropout"
        return
    for method in ("linear probe", "VPT", "prefix"):
        model = stir(add_gist(get_peft_model(double(name, **options), METHODS[method]))).eval()
        given = example_inputs(model.model, length=14)
        output = model(**given, return_gist_logits=True)
        z, z_gist = by_hand(name, model.model, given, model.gist.token)
        close(name, output.logits, z)
        close(name, output.gist_logits, z_gist)


def test_the_gist_token_of_a_relative_model_stands_at_distance_one() -> None:
    """The numbers that the documentation names, at the sizes of the published models."""
    assert (t5_bucket(1, 32, 128), t5_bucket(-1, 32, 128), t5_bucket(0, 32, 128)) == (17, 1, 0)
    assert (deberta_bucket(-1, 256, 512), deberta_bucket(1, 256, 512)) == (-1, 1)
    model = backbone("t5-encoder", relative_attention_num_buckets=32, relative_attention_max_distance=128)
    attention = model.transformer.encoder.block[0].layer[0].SelfAttention
    seen = []
    attention.relative_attention_bias.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    add_gist(model).eval()(torch.randint(4, 50, (1, 6)))
    (buckets,) = seen
    assert buckets.shape == (7, 7)
    assert (buckets[0, 1], buckets[1, 0], buckets[1, 2], buckets[0, 2]) == (17, 1, 17, 18)
    deberta = backbone("deberta-v2")
    deberta.deberta.encoder.layer[1].register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["relative_pos"]), with_kwargs=True
    )
    add_gist(deberta).eval()(torch.randint(4, 50, (1, 6)))
    relative = seen[-1][0]
    assert relative.shape == (7, 7)
    assert (relative[0, 1], relative[1, 0], relative[0, 2]) == (-1, 1, -2)


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("method", ["LoRA", "VPT", "prefix"])
def test_padding_on_either_side(name, method) -> None:
    """The same texts padded left and right, and by more: the same logits."""
    model = stir(add_gist(get_peft_model(double(name), METHODS[method]))).eval()
    right = example_inputs(model.model, batch=4)
    want = model(**right, return_gist_logits=True)
    pad = model.model.config.pad_token_id
    lengths = right["attention_mask"].sum(1)
    for width, side in ((7, "left"), (11, "left"), (11, "right"), (9, "middle")):
        ids = torch.full((4, width), pad)
        for row, n in enumerate(lengths.tolist()):
            start = {"left": width - n, "right": 0, "middle": 1}[side]
            ids[row, start : start + n] = right["input_ids"][row, :n]
        got = model(input_ids=ids, attention_mask=(ids != pad).long(), return_gist_logits=True)
        close(name, got.logits, want.logits)
        close(name, got.gist_logits, want.gist_logits)


@pytest.mark.parametrize("name", TRANSFORMERS_BACKBONES)
def test_layers_left_open_are_transformers_own_with_every_dropout(name) -> None:
    """What AdaptedBlock and PrefixedAttention run, with nothing put in, draws the same masks and gives the same output."""
    attention = "attention_probs_dropout_prob"
    options = {"drop_path_rate": 0.5, attention: 0.2} if "dino" in name else {}
    options |= {"attention_dropout": 0.2, "mlp_dropout": 0.2} if name == "modernbert" else {}
    options |= {"attention_dropout": 0.2} if name == "clip" else {}
    options |= {"hidden_dropout_prob": 0.2, attention: 0.2} if name in ("vit", "deit") else {}
    model = backbone(name, **options).train()
    family = find_family(model, "test")
    calls = {}
    blocks, attentions = family.residual_blocks(model), family.attentions(model)
    for path in (*blocks, *attentions):
        model.get_submodule(path).register_forward_pre_hook(
            lambda m, args, kwargs, path=path: calls.update({path: (args, kwargs)}), with_kwargs=True
        )
    model(**example_inputs(model))
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
        got, want, again = (t if isinstance(t, tuple) else (t,) for t in (got, want, again))
        torch.testing.assert_close(got, want)
        assert not torch.equal(got[0], again[0]), "no dropout is in it"


def test_a_text_that_is_all_padding_is_finite() -> None:
    """Its mean over no token is 0, not NaN, and the other rows do not know of it."""
    model = backbone("t5-encoder").eval()
    ids, mask = torch.randint(2, 40, (3, 6)), torch.ones(3, 6, dtype=torch.long)
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=mask).logits
        mask[1] = 0
        got = model(input_ids=ids, attention_mask=mask).logits
    assert bool(got.isfinite().all())
    torch.testing.assert_close(got[[0, 2]], want[[0, 2]])


def test_tied_weights_are_saved_once(tmp_path) -> None:
    """T5's embedding has two names; all of the model is saved by full fine-tuning."""
    model = get_peft_model(backbone("t5-encoder"), FullConfig()).eval()
    save_adapter(model, tmp_path)
    fresh = load_adapter(backbone("t5-encoder"), tmp_path).eval()
    inputs = example_inputs(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, fresh(**inputs).logits)
    assert fresh.transformer.shared.weight is fresh.transformer.encoder.embed_tokens.weight
