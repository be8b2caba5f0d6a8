"""Merging of every method that merges, on every backbone: the logits stay, the way back is bitwise, and a fresh model of the
class loads what it gives or is said to have no place for it."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

pytest.importorskip("transformers")

from pairs import (
    DECODER_BACKBONES,
    MERGED,
    TIMM_BACKBONES,
    TRANSFORMERS_BACKBONES,
    WITHOUT_ATTENTION,
    merging,
)
from vits import eva, images, stir

from fastgist import LoraConfig, SSFConfig, get_peft_model, merge_and_unload, unload

BACKBONES = TIMM_BACKBONES | TRANSFORMERS_BACKBONES | DECODER_BACKBONES
RMS_NORMS = ("t5-encoder", "llama", "mistral", "qwen2", "qwen3", "gemma")
#: Where a shift needs a bias that the class has no place for, and where.
MORE = {
    "ViT, CLIP's": "proj.bias",
    "EVA-02": "k_proj.bias",
    "Swin": "reduction.bias",
    "Swin V2": "2.bias, attn.k_bias, reduction.bias",
    "modernbert": "Wi.bias, Wo.bias, Wqkv.bias, attn_norm.bias, dense.bias, final_norm.bias, mlp_norm.bias, norm.bias",
}
WITHOUT_BIAS = ("modernbert", "t5-encoder", "llama", "mistral", "qwen3", "gemma")


@pytest.mark.parametrize("name", [name for name in BACKBONES if name not in WITHOUT_ATTENTION])
def test_every_method_that_merges(name) -> None:
    for method in MERGED:
        result, why = merging(BACKBONES[name], method)
        if method == "SSF" and name in RMS_NORMS:
            assert result == "no" and "Norm" in why, (method, result, why)
        elif method == "SSF" and name in MORE:
            assert (result, why) == ("more keys", MORE[name])
        elif method == "BitFit" and name in WITHOUT_BIAS:
            assert result == "" and "no layer of this model has a bias" in why, (method, result, why)
        else:
            assert (result, why) == ("yes", ""), method


@pytest.mark.parametrize("rope", [True, False])
def test_a_shift_of_keys_that_are_rotated_is_kept_beside_them(rope) -> None:
    """EVA with one layer for q, k and v, and biases of q and v: the class has k's for a buffer that files do not hold."""
    plain = eva(use_rot_pos_emb=rope).double().eval()
    model = stir(get_peft_model(copy.deepcopy(plain), SSFConfig())).eval()
    x = images(dtype=torch.float64)
    want = model(x)
    with pytest.warns(UserWarning, match=r"blocks\.0\.attn\.k_bias, blocks\.1\.attn\.k_bias; give it those"):
        merged = merge_and_unload(model)
    assert merged.blocks[0].attn.qkv.bias is None and not merged.blocks[0].attn.qkv_bias_separate
    torch.testing.assert_close(merged(x), want)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"blocks.0.attn.k_bias\""):
        plain.load_state_dict(merged.state_dict())
    for block in plain.blocks:  # as the warning says
        block.attn.register_buffer("k_bias", block.attn.k_bias)
    plain.load_state_dict(merged.state_dict())
    torch.testing.assert_close(plain(x), want)


def test_nothing_is_moved_or_said_where_nothing_is_merged() -> None:
    plain = TIMM_BACKBONES["BEiT"]()
    state = copy.deepcopy(plain.state_dict())
    model = stir(get_peft_model(plain, SSFConfig()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unload(model, keep_head=False)
    assert plain.state_dict().keys() == state.keys()
    assert all(torch.equal(v, state[k]) for k, v in plain.state_dict().items())


def test_a_layer_that_the_user_wrapped_under_our_name_is_no_new_bias() -> None:
    class Wrapped(torch.nn.Module):
        def __init__(self, layer) -> None:
            super().__init__()
            self.base_layer = layer

        def forward(self, x):
            return self.base_layer(x)

    plain = TIMM_BACKBONES["ViT"]()
    plain.head = Wrapped(plain.head)
    model = get_peft_model(plain, LoraConfig(rank=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_and_unload(model)
