"""Small models of transformers' real classes with a Q-Former, random, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch

BATCH, WORDS, QUERIES, IMAGE = 3, 5, 4, 50  # IMAGE: the image token's id
KINDS = ("instructblip-opt", "instructblip-t5", "blip2-opt", "blip2-t5")
#: InstructBLIP's other language model, a Llama, in tests of its own.
VICUNA = ("instructblip-vicuna", "blip2-vicuna")


def _text(kind: str) -> dict[str, Any]:
    if kind.endswith("opt"):
        sizes: dict[str, Any] = {"model_type": "opt", "hidden_size": 24, "num_hidden_layers": 2, "ffn_dim": 32}
        return sizes | {"num_attention_heads": 2, "word_embed_proj_dim": 24, "max_position_embeddings": 64}
    if kind.endswith("vicuna"):
        sizes = {"model_type": "llama", "hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 32}
        return sizes | {"num_attention_heads": 2, "max_position_embeddings": 64}
    return {
        "model_type": "t5",
        "d_model": 24,
        "num_layers": 2,
        "d_ff": 32,
        "num_heads": 2,
        "d_kv": 12,
        "decoder_start_token_id": 0,
    }


def make(
    kind: str = "instructblip-opt",
    layers: int = 4,
    seed: int = 0,
    image: int = 20,
    text: dict[str, int] | None = None,
    **qformer: Any,
) -> Any:
    """A model in evaluation mode whose query tokens are not zero. ``text``: other sizes of the language model."""
    import transformers

    name = "InstructBlip" if kind.startswith("instructblip") else "Blip2"
    vision = {
        "hidden_size": image,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 40,
        "image_size": 16,
        "initializer_range": 0.3,  # transformers' own is 1e-10, with which no image is seen
    }
    sizes = {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"encoder_hidden_size": image, "vocab_size": 60, "max_position_embeddings": 32} | qformer
    config = getattr(transformers, f"{name}Config")(
        vision_config=vision | {"patch_size": 4},
        qformer_config=sizes,
        text_config=_text(kind)
        | (text or {})
        | {"vocab_size": 60, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0},
        num_query_tokens=QUERIES,
        image_token_index=IMAGE,
    )
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
    torch.nn.init.normal_(model.query_tokens, std=0.5)
    return model.eval()


def inputs(
    kind: str = "instructblip-opt", batch: int = BATCH, labels: bool = True, seed: int = 1
) -> dict[str, torch.Tensor]:
    """What the class's forward takes; the second sample's instruction is padded."""
    g = torch.Generator().manual_seed(seed)
    words = torch.randint(3, IMAGE, (batch, WORDS), generator=g)
    ids = torch.cat((torch.full((batch, QUERIES), IMAGE), words), 1)
    given = {
        "pixel_values": torch.randn(batch, 3, 16, 16, generator=g),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
    }
    if kind.startswith("instructblip"):
        given["qformer_input_ids"] = torch.randint(3, IMAGE, (batch, WORDS), generator=g)
        mask = torch.ones(batch, WORDS, dtype=torch.long)
        if batch > 1:
            mask[1, 3:] = 0
        given["qformer_attention_mask"] = mask
    if labels and not kind.endswith("t5"):
        given["labels"] = ids.where(torch.arange(ids.shape[1]) >= QUERIES + 2, -100)
    elif labels:
        given["labels"] = torch.randint(3, IMAGE, (batch, 3), generator=g)
    return given


def quiet(model: Any) -> Any:
    """Every dropout of the model's own at rest, so that training forwards compare."""
    for module in model.modules():
        if type(module).__module__.startswith("fastgist.nn"):
            continue
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model


def stir(model: Any, spread: float = 0.3, seed: int = 5) -> Any:
    """Trained parameters away from their start, where V = 0 would hide what is wrong."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=g).to(p) * spread)
    return model


#: The published Q-Former, and its image tokens' width.
PUBLISHED = {
    "layers": 12,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image": 1408,
    "vocab_size": 30523,
    "max_position_embeddings": 512,
}
