"""Forwards of transformers' encoder classifiers written out, with a gist token, prompts, prefixes and adapters in them.

Nothing here calls the models' code: embeddings, attention with its position biases, and heads are formulas on their
weights. ``by_hand(name, model, ...)`` takes a float64 model whose dropout is off.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vits import dense, layer_norm

from fastgist.nn import AdaptedBlock, AdaptedLayer, PrefixedAttention, PromptedBlock


class Layer(NamedTuple):
    """One layer's parts. ``post``: norms stand behind the additions."""

    q: Callable[[Tensor], Tensor]
    k: Callable[[Tensor], Tensor]
    v: Callable[[Tensor], Tensor]
    out: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]
    norms: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
    heads: int
    post: bool
    prefix: Any
    scales: tuple[Any, Any] = (1.0, 1.0)


def bare(module: Any) -> Any:
    """``module`` without our layers around it."""
    while isinstance(module, AdaptedBlock | AdaptedLayer | PrefixedAttention | PromptedBlock):
        module = module.base_layer
    return module


def bottleneck(adapter: Any, x: Tensor) -> Tensor:
    inside = nn.functional.gelu(x @ adapter.down_weight.T + adapter.down_bias)
    return adapter.scale * (inside @ adapter.up_weight.T + adapter.up_bias)


def adapted(module: Any, run: Callable[[Any, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``run(module, x)`` with the adapter that stands behind or beside the module."""

    def running(x: Tensor) -> Tensor:
        y = run(bare(module), x)
        if isinstance(module, AdaptedLayer):
            y = y + bottleneck(module.adapter, y if module.placement == "sequential" else x)
        return y

    return running


def linear(module: Any) -> Callable[[Tensor], Tensor]:
    return adapted(module, dense)


def norm(module: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: layer_norm(module, x)


def norm_no_bias(module: Any) -> Callable[[Tensor], Tensor]:
    if isinstance(module, nn.Identity):
        return lambda x: x
    return lambda x: nn.functional.layer_norm(x, x.shape[-1:], module.weight, None, module.eps)


def rms(module: Any) -> Callable[[Tensor], Tensor]:
    """T5's norm, whose mean square transformers takes in float32."""

    def running(x: Tensor) -> Tensor:
        square = x.float().pow(2).mean(-1, keepdim=True)
        return x * torch.rsqrt(square + module.variance_epsilon) * module.weight

    return running


gelu = nn.functional.gelu


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def layer_of(name: str, whole: Any, model: Any) -> Layer:
    layer = bare(whole)
    if name in ("bert", "roberta", "electra", "deberta-v2"):
        a = bare(layer.attention.self)
        q, k, v = (a.query_proj, a.key_proj, a.value_proj) if name == "deberta-v2" else (a.query, a.key, a.value)
        fc1, fc2 = layer.intermediate.dense, layer.output.dense
        return Layer(
            linear(q), linear(k), linear(v), linear(layer.attention.output.dense),
            lambda x: linear(fc2)(gelu(linear(fc1)(x))),
            (norm(layer.attention.output.LayerNorm), norm(layer.output.LayerNorm)), 2, True, layer.attention.self,
        )  # fmt: skip
    if name == "distilbert":
        a = bare(layer.attention)
        mlp = adapted(layer.ffn, lambda m, x: linear(m.lin2)(gelu(linear(m.lin1)(x))))
        return Layer(
            linear(a.q_lin), linear(a.k_lin), linear(a.v_lin), linear(a.out_lin), mlp,
            (norm(layer.sa_layer_norm), norm(layer.output_layer_norm)), 2, True, layer.attention,
        )  # fmt: skip
    if name == "modernbert":
        a = bare(layer.attn)
        third = a.Wqkv.out_features // 3

        def gated(m: Any, x: Tensor) -> Tensor:
            first, gate = linear(m.Wi)(x).chunk(2, -1)
            return linear(m.Wo)(gelu(first) * gate)

        cut = [lambda x, i=i: linear(a.Wqkv)(x)[..., i * third : (i + 1) * third] for i in range(3)]
        norms = norm_no_bias(layer.attn_norm), norm_no_bias(layer.mlp_norm)
        return Layer(*cut, linear(a.Wo), adapted(layer.mlp, gated), norms, 2, False, layer.attn)
    if name == "t5-encoder":
        a = bare(layer.layer[0].SelfAttention)
        mlp = adapted(layer.layer[1].DenseReluDense, lambda m, x: linear(m.wo)(torch.relu(linear(m.wi)(x))))
        norms = rms(layer.layer[0].layer_norm), rms(layer.layer[1].layer_norm)
        return Layer(
            linear(a.q), linear(a.k), linear(a.v), linear(a.o), mlp, norms, 2, False, layer.layer[0].SelfAttention
        )
    attention = layer.self_attn if name == "clip" else layer.attention
    a = bare(attention)
    act = quick_gelu if name == "clip" else gelu
    mlp = adapted(layer.mlp, lambda m, x: linear(m.fc2)(act(linear(m.fc1)(x))))
    names = {"clip": ("layer_norm1", "layer_norm2"), "vit": ("layernorm_before", "layernorm_after")}
    names["deit"] = names["vit"]
    norms = tuple(norm(getattr(layer, n)) for n in names.get(name, ("norm1", "norm2")))
    scales = (layer.layer_scale1.lambda1, layer.layer_scale2.lambda1) if "dino" in name else (1.0, 1.0)
    out = a.out_proj if name == "clip" else a.o_proj
    return Layer(
        linear(a.q_proj), linear(a.k_proj), linear(a.v_proj), linear(out), mlp, norms, 2, False, attention, scales
    )


# -- embeddings ------------------------------------------------------------------------------------------------------


def embedded(name: str, model: Any, given: dict[str, Tensor]) -> Tensor:
    """What the rows of ours go into, (B, N, D)."""
    if "pixel_values" in given:
        return _patches(name, model, given["pixel_values"])
    ids = given["input_ids"]
    if name == "t5-encoder":
        return model.transformer.shared.weight[ids]
    if name == "modernbert":
        e = model.model.embeddings
        return norm_no_bias(bare(e.norm))(e.tok_embeddings.weight[ids])
    body = getattr(model, {"deberta-v2": "deberta"}.get(name, name))
    e = body.embeddings
    h = e.word_embeddings.weight[ids]
    if e.position_embeddings is not None:
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        if name == "roberta":  # behind the padding's position, which all padding has
            real = (ids != model.config.pad_token_id).long()
            positions = real.cumsum(1) * real + model.config.pad_token_id
        h = h + e.position_embeddings.weight[positions]
    if getattr(e, "token_type_embeddings", None) is not None:
        h = h + e.token_type_embeddings.weight[0]
    return norm(bare(e.LayerNorm))(h)


def _patches(name: str, model: Any, images: Tensor) -> Tensor:
    body = getattr(model, {"clip": "vision_model", "dinov2-registers": "dinov2_with_registers"}.get(name, name))
    e = body.embeddings
    size, side, batch = 8, images.shape[-1] // 8, len(images)
    cut = images.reshape(batch, 3, side, size, side, size).permute(0, 2, 4, 1, 3, 5).reshape(batch, side * side, -1)
    conv = e.patch_embedding if name == "clip" else e.patch_embeddings.projection
    h = cut @ conv.weight.flatten(1).T + (0 if conv.bias is None else conv.bias)
    first = e.class_embedding[None, None] if name == "clip" else e.cls_token
    prefix = [first.expand(batch, -1, -1)]
    if name == "deit":
        prefix.append(e.distillation_token.expand(batch, -1, -1))
    positions = e.position_embedding.weight[None] if name == "clip" else e.position_embeddings
    h = torch.cat([*prefix, h], 1) + positions
    if name == "dinov2-registers":
        h = torch.cat([h[:, :1], e.register_tokens.expand(batch, -1, -1), h[:, 1:]], 1)
    return h


# -- what attention adds to its scores -------------------------------------------------------------------------------


def t5_bucket(distance: int, buckets: int, longest: int) -> int:
    """The bucket of the bias from a query at i to a key at i + distance."""
    half = buckets // 2
    size, exact = abs(distance), half // 2
    if size >= exact:
        size = min(half - 1, exact + int(math.log(size / exact) / math.log(longest / exact) * (half - exact)))
    return size + (half if distance > 0 else 0)


def deberta_bucket(distance: int, buckets: int, longest: int) -> int:
    """The relative position that a query at j + distance has for a key at j."""
    half, size = buckets // 2, abs(distance)
    if size > half:
        size = half + math.ceil(math.log(size / half) / math.log((longest - 1) / half) * (half - 1))
    return size if distance > 0 else -size


def t5_bias(model: Any, n: int) -> Tensor:
    """(heads, N, N), the same in every layer."""
    a = bare(bare(model.transformer.encoder.block[0]).layer[0].SelfAttention)
    table = a.relative_attention_bias.weight
    sizes = model.config.relative_attention_num_buckets, model.config.relative_attention_max_distance
    rows = [[table[t5_bucket(j - i, *sizes)] for j in range(n)] for i in range(n)]
    return torch.stack([torch.stack(row) for row in rows]).permute(2, 0, 1)


def deberta_scores(model: Any, layer: Layer, q: Tensor, k: Tensor) -> Tensor:
    """(B, heads, N, N): content with position and position with content, before the division."""
    encoder, own, n = model.deberta.encoder, bare(layer.prefix), q.shape[2]
    longest = encoder.max_relative_positions
    span = encoder.position_buckets if encoder.position_buckets > 0 else longest
    table = encoder.rel_embeddings.weight[: 2 * span]
    if "layer_norm" in encoder.norm_rel_ebd:
        table = layer_norm(encoder.LayerNorm, table)
    kinds = model.config.pos_att_type

    def of_position(projection: Any) -> Tensor:
        return dense(projection, table).unflatten(-1, (layer.heads, -1)).transpose(0, 1)

    shared = model.config.share_att_key
    scores = torch.zeros(*q.shape[:2], n, n, dtype=q.dtype)
    for i in range(n):
        for j in range(n):
            distance = deberta_bucket(i - j, span, longest) if encoder.position_buckets > 0 else i - j
            at = min(max(distance + span, 0), 2 * span - 1)
            if "c2p" in kinds:
                rows = of_position(own.key_proj if shared else own.pos_key_proj)
                scores[:, :, i, j] += (q[:, :, i] * rows[:, at]).sum(-1)
            if "p2c" in kinds:
                rows = of_position(own.query_proj if shared else own.pos_query_proj)
                scores[:, :, i, j] += (k[:, :, j] * rows[:, at]).sum(-1)
    return scores


def rotated(t: Tensor, base: float) -> Tensor:
    """t: (B, heads, N, d), turned by its place in the sequence; angles in float32, as transformers has them."""
    d = t.shape[-1]
    angles = torch.arange(t.shape[2]).float()[:, None] * (base ** -(torch.arange(0, d, 2).float() / d))
    cos, sin = (f(torch.cat((angles, angles), -1)).to(t.dtype) for f in (torch.cos, torch.sin))
    first, second = t.chunk(2, -1)
    return t * cos + torch.cat((-second, first), -1) * sin


# -- the whole -------------------------------------------------------------------------------------------------------


def by_hand(
    name: str, model: Any, given: dict[str, Tensor], token: Tensor | None = None, mean: bool = False
) -> tuple[Tensor, Tensor | None]:
    """(logits, gist logits or None); ``token`` (1, L, D), of which the first is read, or all in the ``mean``."""
    name = {"xlm-roberta": "roberta", "camembert": "roberta"}.get(name, name)
    h = embedded(name, model, given)
    batch = len(h)
    mask = given.get("attention_mask")
    seen = torch.ones(h.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    real = seen
    own = {"deit": 2, "dinov2-registers": 3}.get(name, 1)
    body = {"modernbert": "model", "t5-encoder": "transformer.encoder", "clip": "vision_model.encoder"}
    body |= {"deberta-v2": "deberta.encoder", "distilbert": "distilbert.transformer"}
    body |= {"vit": "vit", "deit": "deit", "dinov2-registers": "dinov2_with_registers.encoder"}
    inside: Any = model.get_submodule(body.get(name, f"{name}.encoder"))
    container = next(getattr(inside, n) for n in ("layer", "layers", "block") if hasattr(inside, n))

    places = {"bert": "bert.embeddings.LayerNorm", "roberta": "roberta.embeddings.LayerNorm"}
    places |= {"electra": "electra.embeddings.LayerNorm"}
    places |= {"distilbert": "distilbert.embeddings.LayerNorm", "deberta-v2": "deberta.embeddings.LayerNorm"}
    places |= {"modernbert": "model.embeddings.norm", "t5-encoder": "embedded"}
    first = model.get_submodule(places[name]) if name in places else container[0]
    ours = [] if token is None else [token.expand(batch, -1, -1)]
    gist_rows = sum(t.shape[1] for t in ours)
    if isinstance(first, PromptedBlock):
        prompt = first.prompt.expand(batch, -1, -1)
        ours.append(linear(bare(_projection(model)))(prompt) if name == "electra" else prompt)
    prompts = ours[-1].shape[1] if isinstance(first, PromptedBlock) else 0
    if name == "electra":
        h = linear(_projection(model))(h)
    if name == "clip":  # the gist token goes in before the first norm, prompts before the first layer
        pre = norm(getattr(model.vision_model.pre_layrnorm, "base_layer", model.vision_model.pre_layrnorm))
        h = pre(h)
        ours = [pre(t) if i < (token is not None) else t for i, t in enumerate(ours)]
    h = torch.cat([h[:, :own], *ours, h[:, own:]], 1)
    added = gist_rows + prompts
    seen = torch.cat([seen[:, :own], torch.ones(batch, added, dtype=torch.bool), seen[:, own:]], 1)

    bias = t5_bias(model, h.shape[1]) if name == "t5-encoder" else None
    for i, whole in enumerate(container):
        if isinstance(whole, PromptedBlock) and not whole.insert:
            start = own + gist_rows
            h = torch.cat([h[:, :start], whole.prompt.expand(batch, -1, -1), h[:, start + prompts :]], 1)
        before = h
        h = _layer(name, model, layer_of(name, whole, model), whole, i, h, seen, bias)
        if i == 0 and getattr(inside, "conv", None) is not None:  # DeBERTa-v2's large sizes, over the sequence as it is
            there = seen[..., None]
            mixed = nn.functional.conv1d(
                (before * there).transpose(1, 2), inside.conv.conv.weight, inside.conv.conv.bias, padding=1
            )
            mixed = torch.tanh(mixed.transpose(1, 2) * there)
            h = layer_norm(inside.conv.LayerNorm, h + mixed) * there
    final = {"vit": norm, "deit": norm, "dinov2": norm, "dinov2-registers": norm, "modernbert": norm_no_bias}
    if name in final:
        holder = model.model if name == "modernbert" else model.get_submodule(body.get(name, name).split(".")[0])
        h = final[name](holder.final_norm if name == "modernbert" else holder.layernorm)(h)
    if name == "t5-encoder":
        h = rms(inside.final_layer_norm)(h)
    kept = torch.cat([h[:, :own], h[:, own + added :]], 1)
    read = h[:, own : own + gist_rows].mean(1) if mean else h[:, own]
    z, z_gist = _rows(name, model, kept, read, real, own)
    head = _head(name, model)
    return head(z), None if token is None else head(z_gist)


def _projection(model: Any) -> Any:
    return getattr(model.electra.embeddings_project, "base_layer", model.electra.embeddings_project)


def _layer(
    name: str, model: Any, layer: Layer, whole: Any, index: int, h: Tensor, seen: Tensor, bias: Tensor | None
) -> Tensor:
    def beside(kind: str, x: Tensor) -> Tensor | float:
        on = isinstance(whole, AdaptedBlock) and kind in whole.branches
        return bottleneck(whole.adapter, x) if on else 0.0

    x = h if layer.post else layer.norms[0](h)
    q, k, v = (f(x).unflatten(-1, (layer.heads, -1)).transpose(1, 2) for f in (layer.q, layer.k, layer.v))
    n, d = h.shape[1], q.shape[-1]
    see = seen[:, None, None].expand(-1, 1, n, -1)
    divide = d**0.5
    if name == "modernbert":
        kind = model.config.layer_types[index]
        base = model.config.rope_parameters[kind]["rope_theta"]
        q, k = rotated(q, base), rotated(k, base)
        if kind == "sliding_attention":
            far = (torch.arange(n)[:, None] - torch.arange(n)).abs() > model.config.sliding_window
            see = see & ~far
    scores = q @ k.transpose(-1, -2)
    if name == "deberta-v2":
        scores, divide = scores + deberta_scores(model, layer, q, k), (d * (1 + len(model.config.pos_att_type))) ** 0.5
    elif name == "t5-encoder":
        scores, divide = scores + bias, 1.0
    scores = scores / divide
    if isinstance(layer.prefix, PrefixedAttention):
        key, value = (p.expand(len(h), -1, -1, -1) for p in (layer.prefix.key, layer.prefix.value))
        scores = torch.cat([q @ key.transpose(-1, -2) / divide, scores], -1)
        v = torch.cat([value, v], 2)
        see = torch.cat([torch.ones(*see.shape[:3], key.shape[2], dtype=torch.bool), see], -1)
    mixed = scores.masked_fill(~see, -1e300).softmax(-1) @ v
    out = layer.out(mixed.transpose(1, 2).flatten(2))
    h = h + layer.scales[0] * out + beside("attention", h)
    h = layer.norms[0](h) if layer.post else h
    x = h if layer.post else layer.norms[1](h)
    h = h + layer.scales[1] * layer.mlp(x) + beside("mlp", h)
    return layer.norms[1](h) if layer.post else h


def _rows(name: str, model: Any, kept: Tensor, gist: Tensor, real: Tensor, own: int) -> tuple[Tensor, Tensor]:
    """What the head reads for the prediction and for the gist logits."""
    patches = kept[:, own:].mean(1)
    if "dino" in name:
        return torch.cat([kept[:, 0], patches], -1), torch.cat([gist, patches], -1)
    if name == "clip":
        return patches, gist
    if name == "t5-encoder" or (name == "modernbert" and model.config.classifier_pooling == "mean"):
        mean = torch.stack([states[there].mean(0) for states, there in zip(kept, real, strict=True)])
        return mean, gist
    return kept[:, 0], gist


def _head(name: str, model: Any) -> Callable[[Tensor], Tensor]:
    c = model.classifier
    if name == "bert":
        return lambda r: dense(c, torch.tanh(dense(model.bert.pooler.dense, r)))
    if name == "roberta":
        return lambda r: dense(c.out_proj, torch.tanh(dense(c.dense, r)))
    if name == "electra":
        return lambda r: dense(c.out_proj, gelu(dense(c.dense, r)))
    if name == "deberta-v2":
        return lambda r: dense(c, gelu(dense(model.pooler.dense, r)))
    if name == "distilbert":
        return lambda r: dense(c, torch.relu(dense(model.pre_classifier, r)))
    if name == "modernbert":
        return lambda r: dense(c, norm_no_bias(model.head.norm)(gelu(dense(model.head.dense, r))))
    return lambda r: dense(c, r)
