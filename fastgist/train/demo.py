"""``fastgist demo``: a small Vision Transformer learns new digits from a handful of images, by every method in turn.

It has been pre-trained to redraw the digits 0-4 from its class token, and learns to name 5-9 from a few images of each.
Everything printed was measured in that run; test images are looked at once, after training, and choose nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastgist.recipes import Recipe
from fastgist.recipes import digits as recipes
from fastgist.train.checkpoint import digest, write_atomically
from fastgist.train.config import DemoConfig, Method, UserError
from fastgist.train.data import seed_everything
from fastgist.train.digits import NEW, DigitImages, Digits
from fastgist.train.engine import FitResult, fit, predict
from fastgist.train.measure import commit, memory_method, trainable_share, versions
from fastgist.train.models import adapt

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["cached", "demo", "device_name", "one_thread", "prepare"]


@dataclass
class Run:
    """One contestant on one few-shot draw."""

    seed: int
    result: FitResult
    logits: Tensor
    accuracy: float


def demo(config: DemoConfig) -> dict[str, Any]:
    """Run the demo; returns what it wrote to metrics.json. Raises UserError for what the user can put right."""
    from tqdm import tqdm

    started = time.perf_counter()
    accelerator = prepare(config)
    data = Digits.load()
    seeds = list(range(config.seeds))
    contestants = recipes.CONTESTANTS
    with one_thread(accelerator.device):
        base, about_base = _base(config, data, accelerator)
        print(about_base["words"])
        runs: dict[str, list[Run]] = {c.name: [] for c in contestants}
        shares: dict[str, tuple[int, int]] = {}
        reloaded: dict[str, bool] = {}
        pairs = [(c, seed) for seed in seeds for c in contestants]
        with tqdm(pairs, desc="few-shot runs", unit="run") as bar:
            for contestant, seed in bar:
                bar.set_postfix_str(f"{contestant.name}, draw {seed}")
                recipe = recipes.quick(contestant.recipe) if config.quick else contestant.recipe
                train, _ = data.pool.draw(config.shots, seed)
                model, result = adapt_to(base, contestant, train, dataclasses.replace(recipe, seed=seed), accelerator)
                logits, labels = predict(model, data.test, 256, accelerator.device)
                accuracy = float((logits.argmax(-1) == labels).double().mean())
                runs[contestant.name].append(Run(seed, result, logits, accuracy))
                shares[contestant.name] = trainable_share(model)
                if seed == seeds[0]:
                    reloaded[contestant.name] = _round_trip(
                        config, contestant, model, base, data.test, accelerator, logits
                    )
        pixels = [_pixels(data, config.shots, seed) for seed in seeds]

    rows = [_row(c, runs[c.name], shares[c.name], reloaded[c.name]) for c in contestants]
    metrics = {
        "rows": rows,
        "pixels_logistic_regression": _spread(pixels) | {"accuracies": pixels},
        "seeds": seeds, "shots": config.shots, "quick": config.quick, "test_images": len(data.test),
        "new_digits": NEW, "base": {k: v for k, v in about_base.items() if k != "words"},
        "architecture": recipes.ARCHITECTURE, "pretrain": dataclasses.asdict(recipes.PRETRAIN),
        "few_shot": dataclasses.asdict(recipes.FEW_SHOT),
        "device": device_name(accelerator.device), "threads": 1 if accelerator.device.type == "cpu" else None,
        "peak_memory_method": memory_method(accelerator.device), "versions": versions(), "commit": commit(),
    }  # fmt: skip
    from fastgist.train.figure import draw

    shown = contestants[2].name
    figure = config.folder / "demo.png"
    draw(figure, metrics, data.test, runs[shown][0].logits.argmax(-1), shown)
    metrics["seconds"] = time.perf_counter() - started
    write_atomically(config.folder / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    _print_table(metrics, config, figure)
    broken = [name for name, same in reloaded.items() if not same]
    if broken:
        raise RuntimeError(f"reloaded adapters do not give the same predictions: {', '.join(broken)}")
    return metrics


def prepare(config: DemoConfig) -> Accelerator:
    """The output folder, made, and the device. Raises UserError for what the user can put right."""
    from accelerate import Accelerator

    if config.folder.exists() and not config.folder.is_dir():
        raise UserError(f"--output-dir {config.folder} is a file")
    try:
        config.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --output-dir {config.folder}: {error.strerror}") from error
    if config.device not in ("auto", "cpu", "cuda", "mps"):
        raise UserError(f"--device must be cpu, cuda, mps or auto, got {config.device!r}")
    accelerator = Accelerator(cpu=config.device == "cpu")
    if config.device not in ("auto", accelerator.device.type):
        raise UserError(f"--device {config.device} is not available here: found {accelerator.device.type}")
    return accelerator


@contextlib.contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU, one thread: the model is too small for more, and results do not depend on how many cores there are."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- the base model --------------------------------------------------------------------------------------------------


def plain_model(num_classes: int) -> nn.Module:
    """The demo's Vision Transformer with fresh weights."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(num_classes=num_classes, **recipes.ARCHITECTURE)


def _to_redraw(part: DigitImages) -> DigitImages:
    """Every image in its eight rotations and reflections, with its own pixels as the target."""
    turned = [torch.rot90(part.images, quarter, (-2, -1)) for quarter in range(4)]
    images = torch.cat([*turned, *(image.flip(-1) for image in turned)])
    return DigitImages(images, images.flatten(1))


def pretrain(data: Digits, recipe: Recipe, accelerator: Accelerator) -> nn.Module:
    """The base model, from scratch, without labels."""
    seed_everything(recipe.seed)
    model = plain_model(data.old_train.images[0].numel())
    fit(
        model, _to_redraw(data.old_train), recipe, accelerator, objective=nn.functional.mse_loss,
        description="pre-training on digits 0-4", measure_memory=False,
    )  # fmt: skip
    return model


def cached(
    name: str, key: dict[str, Any], train: Callable[[], nn.Module], keep: bool
) -> tuple[dict[str, Tensor], float, str]:
    """A pre-trained model's weights, from the cache or trained now; the seconds it took; where they come from, in words.

    Args:
        name: what the file's name begins with.
        key: everything that decides the weights.
        train: makes them.
        keep: read and write the cache.
    """
    import safetensors
    import safetensors.torch

    digits = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastgist"
    path = cache / f"{name}-{digits}.safetensors"
    if keep and path.is_file():
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                weights = {key: file.get_tensor(key).clone() for key in file.keys()}
                if (file.metadata() or {}).get("sha256") != digest(weights):
                    raise ValueError("checksum")
            return weights, 0.0, f"from {path}"
        except Exception:
            print(f"{path} is damaged: pre-training again")
    start = time.perf_counter()
    trained = train()
    weights = {key: value.to("cpu", copy=True).contiguous() for key, value in trained.state_dict().items()}
    seconds = time.perf_counter() - start
    if keep:
        try:
            cache.mkdir(parents=True, exist_ok=True)
            write_atomically(path, safetensors.torch.save(weights, {"sha256": digest(weights)}))
        except OSError as error:
            print(f"could not keep the pre-trained model in {cache}: {error.strerror}")
    return weights, seconds, f"trained in {seconds:.1f} s"


def _base(config: DemoConfig, data: Digits, accelerator: Accelerator) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The base model's weights, from the cache or trained now, and what to say about them."""
    recipe = recipes.quick(recipes.PRETRAIN) if config.quick else recipes.PRETRAIN
    key = {"recipe": dataclasses.asdict(recipe), "architecture": recipes.ARCHITECTURE, "objective": "redraw"}
    key |= {
        name: version for name, version in versions().items() if name in ("fastgist", "torch", "timm", "scikit-learn")
    }
    key["device"] = accelerator.device.type
    weights, seconds, origin = cached("digits", key, lambda: pretrain(data, recipe, accelerator), config.cache)
    model = plain_model(len(weights["head.bias"]))
    model.load_state_dict(weights)
    held_out = _to_redraw(data.old_test)
    redrawn, pixels = predict(model.to(accelerator.device), held_out, 256, accelerator.device)
    explained = 1 - float(nn.functional.mse_loss(redrawn, pixels) / pixels.var())
    words = (
        f"base: ViT of {sum(p.numel() for p in model.parameters()):,} parameters that redraws the digits 0-4 from its "
        f"class token: {explained:.1%} of the pixel variance of {len(data.old_test)} held-out images ({origin})"
    )
    return weights, {"words": words, "explained": explained, "pretrain_seconds": seconds, "cached": not seconds}


# -- one run ---------------------------------------------------------------------------------------------------------


def fresh(base: dict[str, Tensor], classes: int, seed: int) -> nn.Module:
    """A copy of the base model with a new head: the same for every method of one seed."""
    model = plain_model(len(base["head.bias"]))
    model.load_state_dict(base)
    seed_everything(seed)
    model.reset_classifier(classes)
    return model


def adapt_to(
    base: dict[str, Tensor],
    contestant: recipes.Contestant,
    train: DigitImages,
    recipe: Recipe,
    accelerator: Accelerator,
) -> tuple[nn.Module, FitResult]:
    """Adapt a copy of the base model to a few-shot draw; the last step's weights are kept: nothing is selected."""
    model = fresh(base, len(train.labels.unique()), recipe.seed)
    model = adapt(model, Method(contestant.method), gist=contestant.gist, **contestant.options)
    result = fit(model, train, recipe, accelerator, progress=False)
    return model, result


def _round_trip(
    config: DemoConfig,
    contestant: recipes.Contestant,
    model: nn.Module,
    base: dict[str, Tensor],
    test: DigitImages,
    accelerator: Accelerator,
    logits: Tensor,
) -> bool:
    """Save the adapter, load it into a fresh base model, and compare the logits of every test image, bitwise."""
    import fastgist

    folder = config.folder / "adapters" / contestant.name.replace(" + ", "-").replace(" ", "-").lower()
    fastgist.save_adapter(model, folder)
    again = fastgist.load_adapter(fresh(base, len(test.labels.unique()), seed=987654321), folder)
    others, _ = predict(again.to(accelerator.device), test, 256, accelerator.device)
    return bool(torch.equal(others, logits))


def _pixels(data: Digits, shots: int, seed: int) -> float:
    """Logistic regression on the raw pixels of the same draw: what 64 numbers an image give without any network."""
    from sklearn.linear_model import LogisticRegression

    train, _ = data.pool.draw(shots, seed)
    model = LogisticRegression(max_iter=5000).fit(train.images.flatten(1).numpy(), train.labels.numpy())
    return float(model.score(data.test.images.flatten(1).numpy(), data.test.labels.numpy()))


# -- what came out ---------------------------------------------------------------------------------------------------


def _spread(values: list[float]) -> dict[str, float | None]:
    return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else None}


def _row(contestant: recipes.Contestant, runs: list[Run], share: tuple[int, int], reloaded: bool) -> dict[str, Any]:
    speeds = [run.result.images_per_second for run in runs if run.result.images_per_second]
    memories = [run.result.peak_memory_bytes for run in runs if run.result.peak_memory_bytes]
    return {
        "name": contestant.name, **_spread([run.accuracy for run in runs]), "gist": contestant.gist,
        "accuracies": {str(run.seed): run.accuracy for run in runs}, "lr": contestant.lr, "options": contestant.options,
        "trained": share[0], "all": share[1], "images_per_second": mean(speeds) if speeds else None,
        "peak_memory_bytes": max(memories) if memories else None, "reloaded_identical": reloaded,
    }  # fmt: skip


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _print_table(metrics: dict[str, Any], config: DemoConfig, figure: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    def percent(entry: dict[str, Any]) -> str:
        return f"{entry['mean']:.1%}" + (f" ± {100 * entry['std']:.1f}" if entry["std"] is not None else "")

    draws = f"{len(metrics['seeds'])} draw{'s' if len(metrics['seeds']) > 1 else ''}"
    table = Table(title=f"digits 5-9 from {config.shots} images each, {draws}", title_justify="left")
    table.add_column("method", no_wrap=True)
    for column in ("accuracy", "trained/all", "share", "images/s", "peak MiB"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in metrics["rows"]:
        speed = f"{row['images_per_second']:,.0f}" if row["images_per_second"] else "-"
        memory = f"{row['peak_memory_bytes'] / 2**20:.2f}" if row["peak_memory_bytes"] else "-"
        counts = f"{row['trained']:,}/{row['all']:,}"
        table.add_row(row["name"], percent(row), counts, f"{row['trained'] / row['all']:.2%}", speed, memory)
    table.add_section()
    table.add_row("pixels alone", percent(metrics["pixels_logistic_regression"]), "", "", "", "")
    console = Console()
    console.print(table)
    same = sum(row["reloaded_identical"] for row in metrics["rows"])
    lines = [
        f"accuracy: mean ± standard deviation over draws, on {metrics['test_images']} held-out images; "
        "training: images/s while training, peak memory of one training step",
        f"peak memory is {metrics['peak_memory_method']}",
        "pixels alone: logistic regression on the 64 pixels of the same training images, no network",
        "differences within the spread say nothing about the methods; --seeds gives more draws",
        f"saved, reloaded into a fresh model, logits bitwise the same: {same} of {len(metrics['rows'])} adapters",
    ]
    if config.quick:
        lines.append("--quick: an eighth of the training; these accuracies say nothing about the methods")
    lines.append(f"{figure}, {config.folder / 'metrics.json'}; {metrics['seconds']:.0f} s on {metrics['device']}")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
