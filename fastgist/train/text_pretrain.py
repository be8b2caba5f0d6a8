"""What the small text models learn from, and how: a tokenizer, BERT's masked words and neighbours, Llama's next token."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastgist.train.data import derive_seed

__all__ = [
    "NeighbourCollator",
    "Neighbours",
    "causal_blocks",
    "neighbours",
    "plain_bert",
    "plain_llama",
    "segments",
    "train_tokenizer",
]

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def train_tokenizer(texts: Sequence[str], vocabulary: int, max_length: int, causal: bool = False) -> Any:
    """A lower-casing byte-level BPE tokenizer of ``texts`` with BERT's special tokens, in transformers' form.

    BERT's frame around one text or two; for a causal model [SEP] behind each and nothing else. Not WordPiece: the
    tokenizers library trains that one from a hash map's order, another vocabulary every time.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(_SPECIAL),
        show_progress=False,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    single, pair = ("$A [SEP]", "$A [SEP] $B [SEP]") if causal else ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1")
    tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), _SPECIAL, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        model_input_names=["input_ids", *([] if causal else ["token_type_ids"]), "attention_mask"],
        **names,
    )


def segments(tokenizer: Any, documents: Sequence[Sequence[str]], room: int) -> list[list[list[int]]]:
    """Each document's docstrings, in order, as token lists of at most ``room``: whole docstrings where they fit."""
    found = []
    for document in documents:
        encoded = tokenizer(list(document), add_special_tokens=False, verbose=False)["input_ids"]
        parts: list[list[int]] = []
        for ids in encoded:
            for start in range(0, len(ids), room):
                piece = ids[start : start + room]
                if parts and len(parts[-1]) + len(piece) <= room:
                    parts[-1] = parts[-1] + piece
                else:
                    parts.append(piece)
        found.append(parts)
    return found


def neighbours(
    tokenizer: Any, documents: Sequence[Sequence[str]], passes: int, max_length: int, seed: int
) -> list[dict[str, Any]]:
    """Each segment beside one that stands next to it in its document: ``input_ids``, ``other_ids``, ``document``.

    [CLS] and [SEP] around both; documents of one segment are left out; every pass draws anew.
    """
    parts = segments(tokenizer, documents, max_length - 2)
    draw = random.Random(derive_seed(seed, len(parts)))

    def framed(ids: list[int]) -> list[int]:
        return [tokenizer.cls_token_id, *ids, tokenizer.sep_token_id]

    found = []
    for _ in range(passes):
        for number, document in enumerate(parts):
            for i, part in enumerate(document):
                beside = [j for j in (i - 1, i + 1) if 0 <= j < len(document)]
                if beside:
                    other = document[draw.choice(beside)]
                    found.append({"input_ids": framed(part), "other_ids": framed(other), "document": number})
    return found


class NeighbourCollator:
    """A batch of 2 B rows: B segments, then their neighbours, both with masked words; ``document`` (B,)."""

    def __init__(self, tokenizer: Any, mask: float) -> None:
        from transformers import DataCollatorForLanguageModeling

        self.mask_words = DataCollatorForLanguageModeling(tokenizer, mlm=True, mlm_probability=mask)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        rows = [{"input_ids": e[key]} for key in ("input_ids", "other_ids") for e in examples]
        return {**self.mask_words(rows), "document": torch.tensor([e["document"] for e in examples])}


class Neighbours(nn.Module):
    """Masked words, plus which of the batch's segments stands beside mine, by the cosine of the pooler's outputs.

    The second is what trains the class token and the pooler, where BERT had next-sentence prediction: that one stays at
    chance for as long as these models are trained. Segments of one document are no negatives of each other.
    """

    def __init__(self, bert: Any, temperature: float = 0.1) -> None:
        super().__init__()
        self.model, self.temperature = bert, temperature

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, document: Tensor) -> dict[str, Tensor]:
        """input_ids, attention_mask, labels: (2 B, N), labels -100 where nothing is masked; document: (B,)."""
        states = self.model.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        masked = labels != -100
        words = nn.functional.cross_entropy(self.model.cls.predictions(states[masked]), labels[masked])
        mine, other = nn.functional.normalize(self.model.bert.pooler(states), dim=-1).chunk(2)
        same = (document[:, None] == document) & ~torch.eye(len(document), dtype=torch.bool, device=document.device)
        scores = (mine @ other.T / self.temperature).masked_fill(same, float("-inf"))
        target = torch.arange(len(document), device=document.device)
        beside = nn.functional.cross_entropy(scores, target) + nn.functional.cross_entropy(scores.T, target)
        return {"loss": words + beside / 2}


def causal_blocks(
    tokenizer: Any, documents: Sequence[Sequence[str]], passes: int, max_length: int, seed: int
) -> list[dict[str, Any]]:
    """Rows of ``max_length`` tokens, docstrings end to end with [SEP] behind each; every pass in another order."""
    encoded = [
        ids for d in documents for ids in tokenizer(list(d), add_special_tokens=False, verbose=False)["input_ids"]
    ]
    draw = random.Random(derive_seed(seed, len(encoded)))
    found = []
    for _ in range(passes):
        draw.shuffle(encoded)
        stream = [token for ids in encoded for token in (*ids, tokenizer.sep_token_id)]
        rows = range(0, len(stream) - max_length + 1, max_length)
        found += [{"input_ids": stream[start : start + max_length]} for start in rows]
    return found


def plain_bert(tokenizer: Any, architecture: dict[str, Any]) -> Any:
    """A BertForPreTraining with fresh weights."""
    from transformers import BertConfig, BertForPreTraining

    config = BertConfig(
        vocab_size=len(tokenizer), intermediate_size=4 * architecture["hidden_size"],
        pad_token_id=tokenizer.pad_token_id, **architecture,
    )  # fmt: skip
    return BertForPreTraining(config)


def plain_llama(tokenizer: Any, architecture: dict[str, Any]) -> Any:
    """A LlamaForCausalLM with fresh weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer), intermediate_size=3 * architecture["hidden_size"], tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.sep_token_id, **architecture,
    )  # fmt: skip
    return LlamaForCausalLM(config)
