"""Tiny InstructBLIPs and BLIP-2s with random weights, and processors with tokenizers of the tests' own text."""

from __future__ import annotations

from typing import Any

import torch

TEXTS = [
    "Question: What color is ball 0? Short answer: blue",
    "Question: What color is the balls? Short answer: light blue green",
    "Question: What is the man by the bags awaiting? Short answer: ride bus taxi cab travelling",
    "Question: Is the sky dark? Short answer: yes pipe no",
    "A short image caption: Caption 4 of image 9, café. A bottle of wine labelled 2.",
]
SIZE = 28


def tokenizer(kind: str) -> Any:
    """BPE: "opt" and "llama" begin with </s> and have no end, "t5" ends with </s>, "bert" has a frame of both.

    Byte-level, but "llama", which marks words by "▁" in front and falls back to bytes, as SentencePiece does.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>", "[CLS]", "[SEP]"]
    if kind == "llama":
        own = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        own.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        own.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet = []
        special += [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        own = Tokenizer(models.BPE())
        own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        own.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    own.train_from_iterator(
        TEXTS * 3,
        trainers.BpeTrainer(
            vocab_size=len(special) + 375, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    frame = {"opt": "</s> $A", "llama": "</s> $A", "t5": "$A </s>", "bert": "[CLS] $A [SEP]"}[kind]
    own.post_processor = processors.TemplateProcessing(
        single=frame, special_tokens=[(token, own.token_to_id(token)) for token in special[:5]]
    )
    names = {"eos_token": "</s>"} | ({"bos_token": "</s>"} if kind in ("opt", "llama") else {})
    return PreTrainedTokenizerFast(tokenizer_object=own, pad_token="<pad>", unk_token="<unk>", **names)


def processor(family: str, language: str, queries: int = 3) -> Any:
    from transformers import Blip2Processor, BlipImageProcessor, InstructBlipProcessor

    images = BlipImageProcessor(size={"height": SIZE, "width": SIZE})
    if family == "instructblip":
        return InstructBlipProcessor(images, tokenizer(language), tokenizer("bert"), num_query_tokens=queries)
    return Blip2Processor(images, tokenizer(language), num_query_tokens=queries)


def model(family: str, language: str, queries: int = 3) -> Any:
    """A model for ``processor(family, language, queries)``."""
    import transformers as hf

    words = processor(family, language).tokenizer
    width = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}
    vision = width | {"image_size": SIZE, "patch_size": 14}
    qformer = width | {"encoder_hidden_size": 16, "cross_attention_frequency": 2, "vocab_size": len(words)}
    if language == "opt":
        text: Any = hf.OPTConfig(
            vocab_size=len(words), hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=1, dropout=0.0,
        )  # fmt: skip
    else:
        text = hf.T5Config(
            vocab_size=len(words), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, pad_token_id=0, eos_token_id=1,
            decoder_start_token_id=0, dropout_rate=0.0,
        )  # fmt: skip
    kinds = {
        "instructblip": (hf.InstructBlipConfig, hf.InstructBlipForConditionalGeneration),
        "blip2": (hf.Blip2Config, hf.Blip2ForConditionalGeneration),
    }
    config_class, model_class = kinds[family]
    config = config_class(
        vision_config=vision, qformer_config=qformer, text_config=text.to_dict(), num_query_tokens=queries,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    torch.manual_seed(0)
    return model_class(config).eval()
