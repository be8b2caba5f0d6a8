"""Released PETAL checkpoints, made up here by the released formula with nn.Linear alone, against what is read from them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastgist.nn import CPFactors, CPLinear, InstructionMoE
from fastgist.petal.released import load_released, read_released

D, WIDE, R, H, K, LAYERS = 8, 12, 3, 4, 2, 3
CROSSED = (0, 2)


def matrices() -> list[tuple[int, str, str]]:
    """Every adapted matrix, in the order of the layers."""
    found = []
    for i in range(LAYERS):
        found += [(i, "attention", letter) for letter in "qkv"]
        found += [(i, "crossattention", letter) for letter in "qkv"] if i in CROSSED else []
    return found


def of_image(place: tuple[int, str, str]) -> bool:
    return place[1] == "crossattention" and place[2] in "kv"


def checkpoint(experts: bool = True, transformation: bool = True, **sizes: int) -> dict[str, Tensor]:
    """A state_dict as the released code writes it, all of its numbers random, in float64."""
    d, i, r, h = (sizes.get(name, default) for name, default in (("d", D), ("i", WIDE), ("r", R), ("h", H)))
    shapes: dict[str, tuple[int, ...]] = {"CP_U.weight": (r, d), "CP_V.weight": (d, r), "CP_C": (r, r, r)}
    shapes |= {"CP_U_Image.weight": (r, i), "CP_V_Image.weight": (d, r), "CP_C_Image": (r, r, r)}
    root = "Qformer.bert.encoder.layer"
    shapes |= {f"{root}.{layer}.{kind}.self.{letter}_CP": (r, 1) for layer, kind, letter in matrices()}
    if transformation:
        names = ("scaleself", "shiftself", "scalecross", "shiftcross")
        shapes |= {f"{root}.{layer}.CP_{name}": (d,) for layer in range(LAYERS) for name in names}
    if experts:
        for j in range(K):
            shapes |= {f"Qformer.bert.ExpertA.{j}.weight": (h, d), f"Qformer.bert.ExpertA.{j}.bias": (h,)}
            shapes |= {f"Qformer.bert.ExpertB.{j}.weight": (d, h), f"Qformer.bert.ExpertB.{j}.bias": (d,)}
    state = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    return state | {"Qformer.bert.embeddings.position_ids": torch.arange(5)[None]}  # a buffer


def dense(state: dict[str, Tensor], place: tuple[int, str, str]) -> Tensor:
    """The update of a matrix (out, in): what linear layers of these weights do to the unit vectors."""
    suffix = "_Image" if of_image(place) else ""
    inner, outer = state[f"CP_U{suffix}.weight"], state[f"CP_V{suffix}.weight"]
    first = nn.Linear(inner.shape[1], len(inner), bias=False, dtype=torch.float64)
    last = nn.Linear(outer.shape[1], len(outer), bias=False, dtype=torch.float64)
    first.load_state_dict({"weight": inner})
    last.load_state_dict({"weight": outer})
    row = state["Qformer.bert.encoder.layer.{}.{}.self.{}_CP".format(*place)]
    core = torch.stack([sum(c[:, r] * row[r] for r in range(len(row))) for c in state[f"CP_C{suffix}"]])
    return last(first(torch.eye(inner.shape[1], dtype=torch.float64)) @ core).T.detach()


class Model(nn.Module):
    """The modules of a Q-Former that are adapted, at transformers' names, with rows of p in a shuffled order."""

    def __init__(
        self, *, core: str = "tucker", rank: int = R, moe: InstructionMoE | None = None, attention="attention"
    ):
        super().__init__()
        self.moe = moe
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(nn.ModuleDict() for _ in range(LAYERS))
        groups: dict[bool, list] = {False: [], True: []}
        for place in matrices():
            groups[of_image(place)].append(place)
        for image, places in groups.items():
            f = CPFactors(WIDE if image else D, D, rank, len(places), core, dtype=torch.float64)
            for mode, place in zip(torch.randperm(len(places)).tolist(), places):
                layer, kind, letter = place
                inside = self.encoder.layer[layer]
                if kind not in inside:
                    inside[kind] = nn.ModuleDict({attention: nn.ModuleDict()})
                base = nn.Linear(WIDE if image else D, D, dtype=torch.float64).requires_grad_(False)
                name = {"q": "query", "k": "key", "v": "value"}[letter]
                inside[kind][attention][name] = CPLinear(base, f, mode)
        self.attention = attention

    def layer(self, place: tuple[int, str, str]) -> CPLinear:
        name = {"q": "query", "k": "key", "v": "value"}[place[2]]
        return self.encoder.layer[place[0]][place[1]][self.attention][name]


def moe(**options: Any) -> InstructionMoE:
    settings: dict[str, Any] = {"num_experts": K, "bottleneck_dim": H, "gating": "uniform", "dtype": torch.float64}
    return InstructionMoE(D, **settings | options)


SKIP = ("transformation",)


@pytest.mark.parametrize("attention", ["attention", "self"])
def test_updates_are_the_released_formulas(attention) -> None:
    state = checkpoint()
    model = Model(moe=moe(), attention=attention)
    load_released(model, state, skip=SKIP)
    for place in matrices():
        torch.testing.assert_close(model.layer(place).get_delta_weight(), dense(state, place))


def test_experts_are_the_released_formula() -> None:
    state = checkpoint()
    model = Model(moe=moe())
    load_released(model, state, skip=SKIP)
    x = torch.randn(2, 5, D, dtype=torch.float64)
    outputs = []
    for j in range(K):
        down, up = nn.Linear(D, H, dtype=torch.float64), nn.Linear(H, D, dtype=torch.float64)
        for layer, side in ((down, "A"), (up, "B")):
            layer.load_state_dict({n: state[f"Qformer.bert.Expert{side}.{j}.{n}"] for n in ("weight", "bias")})
        outputs.append(up(down(x)))
    torch.testing.assert_close(model.moe(x), 0.6 * x + 0.4 * sum(outputs) / K)


def test_the_rest_is_returned() -> None:
    state = checkpoint()
    released = read_released(state)
    assert released.sizes == {"R": R, "D": D, "I": WIDE, "layers": LAYERS, "experts": K, "h": H}
    assert set(released.transformation) == {"scaleself", "shiftself", "scalecross", "shiftcross"}
    for i in range(LAYERS):
        want = state[f"Qformer.bert.encoder.layer.{i}.CP_shiftcross"]
        assert torch.equal(released.transformation["shiftcross"][i], want)
    without = read_released(checkpoint(experts=False, transformation=False))
    assert not without.experts
    assert not without.transformation
    model = Model()
    load_released(model, without)  # nothing to skip
    assert torch.equal(model.layer((0, "attention", "q")).factors.u, without.text["u"])


def test_transformers_qformer_gives_what_dense_weights_give() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": D, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.Blip2QFormerConfig(encoder_hidden_size=WIDE, vocab_size=20, **sizes)
    plain = transformers.Blip2QFormerModel(config).double().eval().requires_grad_(False)
    state = checkpoint(experts=False, transformation=False)
    groups = {image: [p for p in matrices() if of_image(p) == image] for image in (False, True)}
    factors = {
        g: CPFactors(WIDE if g else D, D, R, len(p), "tucker", 0.1, dtype=torch.float64) for g, p in groups.items()
    }
    wrapped, merged = copy.deepcopy(plain), copy.deepcopy(plain)
    for image, places in groups.items():
        for mode, place in enumerate(places):
            name = {"q": "query", "k": "key", "v": "value"}[place[2]]
            path = f"encoder.layer.{place[0]}.{place[1]}.attention"
            base = getattr(wrapped.get_submodule(path), name)
            setattr(wrapped.get_submodule(path), name, CPLinear(base, factors[image], mode))
            getattr(merged.get_submodule(path), name).weight.add_(dense(state, place))
    load_released(wrapped, state)
    inputs = {"query_embeds": torch.randn(2, 4, D), "encoder_hidden_states": torch.randn(2, 6, WIDE)}
    inputs = {name: t.double() for name, t in inputs.items()}
    ours, want = (m(**inputs).last_hidden_state for m in (wrapped.eval(), merged))
    torch.testing.assert_close(ours, want)
    assert not torch.allclose(want, plain(**inputs).last_hidden_state, rtol=1e-2)


@pytest.mark.parametrize("kind", ["pth", "nested", "safetensors"])
def test_files(kind, tmp_path) -> None:
    state = checkpoint()
    path = tmp_path / ("best.safetensors" if kind == "safetensors" else "checkpoint_best.pth")
    if kind == "safetensors":
        save_file(state, path)
    else:
        whole = {
            "model": state,
            "optimizer": {"state": {}},
            "config": {"run": {"lr": 1e-5}},
            "scaler": None,
            "epoch": 4,
        }
        torch.save(whole if kind == "nested" else state, path)
    model = Model(moe=moe())
    load_released(model, path, skip=SKIP)
    torch.testing.assert_close(
        model.layer((2, "attention", "v")).get_delta_weight(), dense(state, (2, "attention", "v"))
    )


class Opened(dict):
    """A class that a pickle would have to import."""


def test_files_that_are_refused(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.pth: not found"):
        read_released(tmp_path / "nowhere.pth")
    pickled = tmp_path / "pickled.pth"
    torch.save({"model": checkpoint(), "config": Opened()}, pickled)
    with pytest.raises(ValueError, match=f"{pickled}: cannot be read as tensors and plain data alone"):
        read_released(pickled)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x00" * 40)
    with pytest.raises(ValueError, match=f"{broken}: damaged, or not a safetensors file"):
        read_released(broken)
    torch.save({"model": [1, 2]}, pickled)
    with pytest.raises(ValueError, match=f"{pickled}: holds no state_dict"):
        read_released(pickled)


def renamed(state: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {new if name == old else name: t for name, t in state.items()}


def test_names_and_shapes_are_listed() -> None:
    key = "Qformer.bert.encoder.layer.1.attention.self.k_CP"
    for change, match in (
        (lambda s: renamed(s, key, "Qformer.other"), f"missing: {key}; unexpected: Qformer.other"),
        (lambda s: s | {"t5_proj.weight": torch.randn(3, 3)}, "unexpected: t5_proj.weight"),
        (
            lambda s: s | {"CP_C": torch.randn(R, R)},
            rf"wrong shape: CP_C: expected \({R}, {R}, {R}\), got \({R}, {R}\)",
        ),
        (lambda s: s | {key: torch.zeros(R, 1, dtype=torch.int64)}, f"not floating point: {key}"),
        (lambda s: renamed(s, "CP_U_Image.weight", "CP_U_Img.weight"), "missing: matrices CP_U_Image.weight"),
        (lambda s: renamed(s, "Qformer.bert.ExpertB.1.bias", "x"), "missing: Qformer.bert.ExpertB.1.bias"),
        (
            lambda s: renamed(s, key, key.replace("layer.1", "layer.999999999999")),
            f"missing: {key}; unexpected: .*layer.999999999999",
        ),
        (lambda s: {}, "missing: matrices CP_U.weight, CP_U_Image.weight"),
    ):
        with pytest.raises(ValueError, match=f"is not a checkpoint of PETAL's released code; .*{match}"):
            read_released(change(checkpoint()))


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def extra_layer(model: Model) -> Model:
    """One more adapted matrix than any checkpoint has."""
    f = model.layer((0, "attention", "q")).factors
    base = nn.Linear(D, D, dtype=torch.float64)
    model.encoder.layer[1]["crossattention"] = nn.ModuleDict(
        {"attention": nn.ModuleDict({"query": CPLinear(base, f, 0)})}
    )
    return model


def shared_row(model: Model) -> Model:
    layer = model.layer((0, "attention", "q"))
    layer.mode = model.layer((1, "attention", "q")).mode
    return model


def foreign(model: Model) -> Model:
    model.layer((2, "attention", "v")).factors = CPFactors(D, D, R, 20, "tucker", dtype=torch.float64)
    return model


def scaled(model: Model) -> Model:
    model.layer((2, "attention", "v")).scale = 0.5
    return model


@pytest.mark.parametrize(
    ("made", "match"),
    [
        (lambda: Model(rank=R + 1, moe=moe()), rf"u of the text group: expected \({D}, {R + 1}\), got \({D}, {R}\)"),
        (lambda: Model(core="cp", moe=moe()), "the text group's core is 'cp', expected 'tucker'"),
        (lambda: Model(), "the checkpoint has 2 experts, the model 0 InstructionMoE"),
        (lambda: Model(moe=moe(gating="softmax")), "moe has gating 'softmax' and activation 'identity', expected 'uniform'"),
        (lambda: Model(moe=moe(num_experts=3)), "moe has 3 experts 4 wide, the checkpoint 2, 4 wide"),
        (lambda: extra_layer(Model(moe=moe())), "encoder.layer.1.crossattention.attention.query has no row in the checkpoint"),
        (lambda: shared_row(Model(moe=moe())), "expected 11 matrices with a row of p each, got 10 rows in use of 11"),
        (lambda: foreign(Model(moe=moe())), "encoder.layer.2.attention.attention.value does not share the text group's"),
        (lambda: scaled(Model(moe=moe())), "encoder.layer.2.attention.attention.value has scale 0.5, expected 1.0"),
        (lambda: nn.Linear(3, 3), "the model has no CPLinear at encoder.layer"),
        (lambda: nn.ModuleList([Model(moe=moe()), Model()]), "the model has two Q-Formers, with 0.encoder.* and 1.encoder"),
    ],
)  # fmt: skip
def test_a_model_that_does_not_fit_is_left_alone(made, match) -> None:
    model = made()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"load_released: .*{match}"):
        load_released(model, checkpoint(), skip=SKIP)
    assert unchanged(model, before)


def test_what_would_be_lost_is_said() -> None:
    model = Model(moe=moe())
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"has a query transformation.*skip=\('transformation',\) leaves it out"):
        load_released(model, checkpoint())
    with pytest.raises(ValueError, match="moe is an InstructionMoE, and the checkpoint has no experts"):
        load_released(model, checkpoint(experts=False), skip=SKIP)
    with pytest.raises(ValueError, match="skip may name experts, transformation, got 'image'"):
        load_released(model, checkpoint(), skip=("image",))
    assert unchanged(model, before)
    bare = Model()
    load_released(bare, checkpoint(), skip=("experts", "transformation"))
    model.layer((0, "attention", "q")).merge()
    with pytest.raises(RuntimeError, match=r"encoder.layer.0.attention.attention.query is merged"):
        load_released(model, checkpoint(), skip=SKIP)


def test_text_and_image_are_two_groups() -> None:
    """Where image features are as wide as the Q-Former, one group could hold all matrices; the checkpoint's are two."""
    model = Model()
    f = CPFactors(D, D, R, 15, "tucker", dtype=torch.float64)
    for mode, place in enumerate(matrices()):
        layer = CPLinear(nn.Linear(D, D, dtype=torch.float64), f, mode)
        model.encoder.layer[place[0]][place[1]]["attention"][{"q": "query", "k": "key", "v": "value"}[place[2]]] = layer
    with pytest.raises(ValueError, match="text and image share factors"):
        load_released(model, checkpoint(experts=False, transformation=False, i=D))


def test_a_wrapped_model_takes_all_of_it() -> None:
    """Two groups, experts and the query transformation of a real class, each layer's own."""
    qformers = pytest.importorskip("qformers")
    from fastgist import petal

    sizes = {"d": 8, "i": 12, "r": R, "h": H}
    model = qformers.make(layers=LAYERS, hidden_size=8, image=12)  # layers 0 and 2 look at the image
    config = petal.PetalConfig(rank=R, core="tucker", gating="uniform", num_experts=K, expert_dim=H, gated_query=True)
    petal.wrap(model, config, verbose=False)
    state = checkpoint(**sizes)
    petal.load_released(model, state)
    for i, layer in enumerate(model.qformer.encoder.layer):
        root = f"Qformer.bert.encoder.layer.{i}"
        transformation = layer.output_query.transformation
        assert torch.equal(transformation.s, state[f"{root}.CP_scaleself"].float())
        assert torch.equal(transformation.b, state[f"{root}.CP_shiftself"].float())
        assert layer.output.transformation is transformation
        for place in [p for p in matrices() if p[0] == i]:
            name = {"q": "query", "k": "key", "v": "value"}[place[2]]
            found = getattr(getattr(layer, place[1]).attention, name).get_delta_weight()
            torch.testing.assert_close(found, dense(state, place).float())
    model(**qformers.inputs()).loss.backward()
    with pytest.raises(ValueError, match="in each of 3 layers, the model in 0"):
        petal.load_released(
            petal.wrap(
                qformers.make(layers=LAYERS, hidden_size=8, image=12),
                petal.PetalConfig(rank=R, core="tucker", gating="uniform", num_experts=K, expert_dim=H),
                verbose=False,
            ),
            state,
        )


def test_an_experts_weight_without_a_dimension_and_a_skip_without_a_tuple() -> None:
    state = checkpoint()
    with pytest.raises(ValueError, match=r"ExpertA.0.weight: expected \(0, 8\), got \(\)"):
        read_released(state | {"Qformer.bert.ExpertA.0.weight": torch.ones(())})
    assert load_released(Model(moe=moe()), state, skip="transformation").experts
