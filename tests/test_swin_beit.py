"""timm's Swin, BEiT and distilled DeiT with a gist token: against forwards written out, and what is their own."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from pairs import SWINS, TIMM_BACKBONES, beit, both, distilled, example, made, swin, without_gist
from swins import swin_by_hand
from timm.layers import DropPath
from torch import Tensor, nn
from vits import dense, eva, layer_norm, stir, trainable

import fastgist
from fastgist import (
    AdapterConfig,
    CPConfig,
    GistConfig,
    LoraConfig,
    PrefixConfig,
    PromptConfig,
    add_gist,
    get_peft_model,
)

# -- against a forward written out -----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [None, LoraConfig(rank=2, targets=("q", "v", "fc1", "reduction")), AdapterConfig(4)])
@pytest.mark.parametrize("second", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("size", [24, (22, 18)], ids=str)
def test_swin_is_the_method_written_out(config, second, size) -> None:
    base = swin(second, img_size=size, num_classes=4).double()
    model = base if config is None else get_peft_model(base, config)
    model = stir(add_gist(model, GistConfig(length=2, dropout=0.0))).eval()
    x = example(model, 2, torch.float64)
    output = model(x, return_gist_logits=True)
    assert any(any(b.shift_size) for b in model.model.layers[1].blocks)
    for i in range(2):  # timm makes V2's table of distances in float32
        z, g = swin_by_hand(model.model, x[i], model.gist.token[0])
        torch.testing.assert_close(output.logits[i], z, rtol=1e-7 if second else 1e-9, atol=1e-8 if second else 1e-11)
        torch.testing.assert_close(
            output.gist_logits[i], g, rtol=1e-7 if second else 1e-9, atol=1e-8 if second else 1e-11
        )
    torch.testing.assert_close(model(x).logits, output.logits)
    torch.testing.assert_close(model.model(x), output.logits)
    if isinstance(config, LoraConfig) and size != 24:
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        hand = [torch.stack(swin_by_hand(model.model, image, model.gist.token[0])) for image in x]
        exact = torch.autograd.grad(torch.stack(hand).sin().sum(), list(parameters.values()))
        both(output).sin().sum().backward()
        for (name, p), want in zip(parameters.items(), exact, strict=True):
            torch.testing.assert_close(p.grad, want, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
    with fastgist.disable_adapter(model):
        without = model(x).logits
    z, _ = swin_by_hand(without_gist(model), x[0], None)
    torch.testing.assert_close(without[0], z, rtol=1e-7, atol=1e-8)


def beit_by_hand(model: nn.Module, x: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
    """(logits, gist logits) of a BEiT, two by two patches; in the position bias the token is a second class token."""
    batch, width, patch = x.shape[0], model.embed_dim, model.patch_embed.patch_size[0]
    side = x.shape[-1] // patch
    cut = x.reshape(batch, 3, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5).reshape(batch, side * side, -1)
    h = cut @ model.patch_embed.proj.weight.reshape(width, -1).T + model.patch_embed.proj.bias
    h = torch.cat([model.cls_token.expand(batch, -1, -1), h], 1)
    if model.pos_embed is not None:
        h = h + model.pos_embed
    h = torch.cat([h[:, :1], token.expand(batch, -1, -1), h[:, 1:]], 1)
    n, special = h.shape[1], h.shape[1] - side * side

    def bias(table: Tensor) -> Tensor:
        distances = (2 * side - 1) ** 2
        to_patch, from_patch, to_itself = table[distances], table[distances + 1], table[distances + 2]
        out = torch.empty(n, n, table.shape[1], dtype=table.dtype)
        for i in range(n):
            for j in range(n):
                if i < special and j < special:
                    out[i, j] = to_itself
                elif i < special:
                    out[i, j] = to_patch
                elif j < special:
                    out[i, j] = from_patch
                else:
                    (ri, ci), (rj, cj) = divmod(i - special, side), divmod(j - special, side)
                    out[i, j] = table[(ri - rj + side - 1) * (2 * side - 1) + ci - cj + side - 1]
        return out.permute(2, 0, 1)

    for block in model.blocks:
        attn = getattr(block.attn, "base_layer", block.attn)
        sources = [
            m for m in (model.rel_pos_bias, attn) if getattr(m, "relative_position_bias_table", None) is not None
        ]
        extra = sum(bias(m.relative_position_bias_table) for m in sources)
        qkv = dense(attn.qkv, layer_norm(block.norm1, h))
        qkv = qkv + torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
        q, k, v = (t.reshape(batch, n, attn.num_heads, -1).transpose(1, 2) for t in qkv.chunk(3, -1))
        if attn is not block.attn:  # a prefix: keys and values that every query sees, without a bias
            extra = torch.cat([torch.zeros_like(extra[:, :, : block.attn.length]), extra], 2)
            k, v = (
                torch.cat([mine.expand(batch, -1, -1, -1), t], 2)
                for mine, t in ((block.attn.key, k), (block.attn.value, v))
            )
        weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5 + extra).softmax(-1)
        out = dense(attn.proj, (weights @ v).transpose(1, 2).reshape(batch, n, width))
        h = h + out * (1 if block.gamma_1 is None else block.gamma_1)
        out = dense(block.mlp.fc2, nn.functional.gelu(dense(block.mlp.fc1, layer_norm(block.norm2, h))))
        h = h + out * (1 if block.gamma_2 is None else block.gamma_2)
    h = layer_norm(model.norm, h)
    z = h[:, 0] if model.global_pool == "token" else h[:, special:].mean(1)
    return tuple(dense(model.head, layer_norm(model.fc_norm, t)) for t in (z, h[:, 1]))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "init_values": None},
        {"use_abs_pos_emb": True, "global_pool": "token", "use_shared_rel_pos_bias": True},
    ],
    ids=["a bias a block", "shared bias", "both, and absolute positions"],
)
@pytest.mark.parametrize("config", [LoraConfig(rank=2), PrefixConfig(length=2)], ids=["LoRA", "prefix"])
@pytest.mark.parametrize("fused", [False, True])
def test_beit_is_the_method_written_out(options, config, fused) -> None:
    model = add_gist(get_peft_model(beit(**options).double(), config), GistConfig(length=2, dropout=0.0))
    stir(model).eval()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    x = example(model, 3, torch.float64)
    output = model(x, return_gist_logits=True)
    z, g = beit_by_hand(model.model, x, model.gist.token)
    torch.testing.assert_close(output.logits, z, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(output.gist_logits, g, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(model.model(x), z, rtol=1e-9, atol=1e-11)


def test_a_distilled_models_gist_is_read_by_both_heads() -> None:
    model = made("DeiT, distilled").eval()
    x, inner = example(model, 3, torch.float64), model.model
    states = model.forward_features(x)
    assert states.shape[1] == 2 + 1 + 4
    output = model(x, return_gist_logits=True)
    torch.testing.assert_close(output.logits, (inner.head(states[:, 0]) + inner.head_dist(states[:, 1])) / 2)
    torch.testing.assert_close(output.gist_logits, (inner.head(states[:, 2]) + inner.head_dist(states[:, 2])) / 2)
    torch.testing.assert_close(inner(x), output.logits)
    model.model.set_distilled_training()
    torch.testing.assert_close(model(x).logits, output.logits)
    with pytest.raises(ValueError, match="set to return two predictions"):
        model.train()(x)

    class Other(type(inner)):
        def forward_head(self, x, pre_logits=False):
            return self.head(x[:, 0])

    odd = distilled()
    odd.__class__ = Other
    with pytest.raises(ValueError, match="Other has a forward_head of its own"):
        add_gist(odd)


# -- Swin alone ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", SWINS)
def test_swin_samples_and_the_gist_are_not_mixed_up(backbone) -> None:
    """The mistakes to make: the first patch read as the gist, and windows of one image averaged with another's."""
    model = made(backbone, "linear probe").eval()
    x = example(model, 3, torch.float64).requires_grad_()
    output = model(x, return_gist_logits=True)
    for logits in (output.logits, output.gist_logits):
        for i in range(3):
            (g,) = torch.autograd.grad(logits[i].square().sum(), x, retain_graph=True)
            seen = g.abs().amax((1, 2, 3))
            assert seen[i] > 0
            assert (seen[[j for j in range(3) if j != i]] == 0).all()
    head, token = model.model.head, model.gist.token
    grid = model.forward_features(x)
    torch.testing.assert_close(head.fc(grid.mean((1, 2))), output.logits)  # the token is not among the pooled patches
    corner = head.fc(grid[:, 0, 0])
    assert not torch.allclose(corner, output.gist_logits)
    with torch.no_grad():
        token.add_(torch.randn_like(token))
    assert not torch.allclose(model(x, return_gist_logits=True).gist_logits, output.gist_logits)


@pytest.mark.parametrize("backbone", SWINS)
def test_swin_hooks_see_packed_rows(backbone) -> None:
    model, shapes = made(backbone, "adapter, houlsby").train(), {}

    def note(path):
        return lambda m, args, out: shapes.update({path: tuple(out.shape)})

    for path in ("0.blocks.0.norm1", "0.blocks.1.attn", "1.blocks.0", "1.downsample.reduction"):
        model.model.layers.get_submodule(path).register_forward_hook(note(path))
    model(example(model, 2, torch.float64))
    assert shapes["0.blocks.0.norm1"] == (2, 1 + 144, 16)
    assert shapes["0.blocks.1.attn"] == (2 * 9, 1 + 16, 16)
    assert shapes["1.blocks.0"] == shapes["1.downsample.reduction"] == (2, 1 + 36, 32)


def test_swins_fused_attention_is_the_other() -> None:
    model = made("Swin").eval()
    x = example(model, 2, torch.float64)
    expected = both(model(x, return_gist_logits=True))
    attentions = [m for m in model.modules() if hasattr(m, "fused_attn")]
    assert len(attentions) == 4
    for module in attentions:
        module.fused_attn = not module.fused_attn
    torch.testing.assert_close(both(model(x, return_gist_logits=True)), expected)


@pytest.mark.parametrize("backbone", SWINS)
def test_drop_path_drops_a_samples_token_with_its_patches(backbone) -> None:
    model = add_gist(TIMM_BACKBONES[backbone]()).train()
    block = model.model.layers[0].blocks[1]
    block.drop_path1, block.drop_path2 = DropPath(0.5), DropPath(1.0)
    x = torch.randn(16, 1 + 144, 16)
    moved = (block(x, (12, 12)) != x).any(-1)
    assert (moved[:, :1] == moved).all()
    assert 0 < moved[:, 0].sum() < 16


@pytest.mark.parametrize("second", [False, True])
def test_swin_of_any_input_size_with_several_tokens(second) -> None:
    settings = GistConfig(length=3, dropout=0.0, readout="mean")
    fixed = stir(add_gist(swin(second), settings)).eval()
    moving = add_gist(swin(second, dynamic_img_size=True), settings).eval()
    moving.load_state_dict(fixed.state_dict())
    x = example(fixed)
    torch.testing.assert_close(both(moving(x, return_gist_logits=True)), both(fixed(x, return_gist_logits=True)))
    assert moving(torch.randn(2, 3, 30, 20), return_gist_logits=True).gist_logits.shape == (2, 5)
    inner = fixed.model
    states = inner.patch_embed(x)
    for stage in inner.layers:
        states = stage(states) if isinstance(states, Tensor) else stage(*states)
    rows = inner.norm(states[0][:, :3])
    mean = inner.head.fc(rows.mean(1))
    torch.testing.assert_close(fixed(x, return_gist_logits=True).gist_logits, mean)
    fixed.config.readout = "first"
    torch.testing.assert_close(fixed(x, return_gist_logits=True).gist_logits, inner.head.fc(rows[:, 0]))


def test_the_network_behind_swin_v2s_position_bias_is_no_target() -> None:
    with pytest.raises(
        ValueError, match="nothing in this model is called '0'; it has qkv, q, k, v, proj, fc1, fc2, reduc"
    ):
        get_peft_model(swin(second=True), LoraConfig(targets=("0",)))


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224"])
def test_a_checkpoint_for_other_classes_leaves_the_heads_alone(name, tmp_path) -> None:
    import timm
    from safetensors.torch import save_file

    from fastgist.train.models import load_weights

    tiny = {"embed_dim": 16, "img_size": 32}
    tiny |= (
        {"depth": 1, "num_heads": 2} if "deit" in name else {"depths": (1, 1), "num_heads": (2, 2), "window_size": 4}
    )
    source, model = (timm.create_model(name, num_classes=n, **tiny) for n in (7, 5))
    save_file({k: v.contiguous() for k, v in source.state_dict().items()}, tmp_path / "w.safetensors")
    before = copy.deepcopy(model.state_dict())
    load_weights(model, tmp_path / "w.safetensors")
    for key, value in model.state_dict().items():
        assert torch.equal(value, (before if key.startswith("head") else source.state_dict())[key])


def test_shapes_that_differ_by_stage_are_groups_of_their_own() -> None:
    model = get_peft_model(swin(), CPConfig(rank=3, targets=("q", "v", "fc1", "fc2", "reduction"), dropout=0.0))
    factors = {m for m in model.modules() if isinstance(m, fastgist.nn.CPFactors)}
    assert sorted((f.in_features, f.out_features, f.modes) for f in factors) == [(16, 16, 20), (32, 32, 22)]
    widths = {path: layer.adapter.dim for path, layer in adapted(get_peft_model(swin(), AdapterConfig(4))).items()}
    assert {path.split(".")[1]: width for path, width in widths.items()} == {"0": 16, "1": 32}


def adapted(model: nn.Module) -> dict[str, nn.Module]:
    return {path: m for path, m in model.named_modules() if isinstance(m, fastgist.nn.AdaptedLayer)}


def test_both_first_layers_of_a_gated_mlp_answer_to_fc1() -> None:
    model = get_peft_model(TIMM_BACKBONES["EVA-02"](), LoraConfig(targets=("fc1",)))
    names = {re.sub(r"\.\d\.", ".i.", n) for n in trainable(model) if n.endswith(".u")}
    assert names == {"blocks.i.mlp.fc1_g.u", "blocks.i.mlp.fc1_x.u"}


# -- refusals -------------------------------------------------------------------------------------------------------


def test_other_refusals_say_why() -> None:
    from timm.layers import NormMlpClassifierHead
    from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr

    cr = SwinTransformerV2Cr(img_size=(32, 32), window_size=4, embed_dim=8, depths=(1, 1), num_heads=(2, 2))
    with pytest.raises(TypeError, match=r"V2Cr is not known \(it has attention layers, but how a token would go"):
        add_gist(cr)
    with pytest.raises(ValueError, match="global_pool=''"):
        add_gist(swin(global_pool=""))
    with pytest.raises(ValueError, match="add_gist: SwinTransformer has global_pool='catavgmax'"):
        add_gist(swin(global_pool="catavgmax"))
    later = add_gist(swin())
    later.reset_classifier(5, global_pool="max")
    later(example(later))
    later.reset_classifier(5, global_pool="catavgmax")
    with pytest.raises(ValueError, match="GistModel: SwinTransformer has global_pool='catavgmax'"):
        later(example(later))
    other = swin()
    other.head = NormMlpClassifierHead(32, 5)
    with pytest.raises(ValueError, match="has a NormMlpClassifierHead as its head"):
        add_gist(other)

    class Odd(type(other.layers[0].blocks[0].attn)):
        """Window attention of another library."""

    odd = swin()
    odd.layers[1].blocks[0].attn.__class__ = Odd
    with pytest.raises(ValueError, match="how a gist token goes through a Odd is not known"):
        add_gist(odd)
    odd.layers[0].blocks[0].__class__ = type("Strange", (type(odd.layers[0].blocks[0]),), {})
    with pytest.raises(ValueError, match="how a Strange adds up is not known"):
        get_peft_model(odd, AdapterConfig(4, "shared"))
    for config, word in ((PromptConfig(), "prompts are rows of a sequence"), (PrefixConfig(), "a bias of its own")):
        with pytest.raises(ValueError, match=word):
            get_peft_model(swin(), config)
    with pytest.raises(ValueError, match="global_pool='map'"):
        add_gist(eva(global_pool="map"))
    with pytest.raises(ValueError, match="pools its prefix tokens; the prompts would enter"):
        get_peft_model(eva(global_pool="map"), PromptConfig())
