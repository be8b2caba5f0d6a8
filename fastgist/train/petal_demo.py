"""``fastgist demo petal``: the Q-Former of a small InstructBLIP learns questions and a caption it has never been asked.

The model is transformers' InstructBlipForConditionalGeneration, small, pre-trained here on four other questions about real
handwritten digits. Then it is frozen, and PETAL, LoRA and adapters of equal size and all of the Q-Former learn from a
few images. Everything printed was measured in that run; test images are looked at once, at the end, and choose nothing.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor

from fastgist.recipes import petal_digits as recipes
from fastgist.recipes.petal_digits import Contestant, Training
from fastgist.train.checkpoint import write_atomically
from fastgist.train.config import DemoConfig
from fastgist.train.data import seed_everything
from fastgist.train.demo import cached, device_name, one_thread, prepare
from fastgist.train.digits import DigitImages
from fastgist.train.measure import commit, memory_method, versions
from fastgist.train.petal_base import Fit, answers, fit, plain_model, pretrain, question_loss, score
from fastgist.train.petal_data import HELD_OUT, NAMES, PRETRAINED, PetalDigits, Question, Row, rows_of, train_tokenizer
from fastgist.train.statistics import spread

__all__ = ["Base", "Share", "adapt", "expert_usage", "load_base", "petal_demo", "tune"]

#: Beams of the answer that is shown beside its image.
BEAMS = 4


@dataclass
class Base:
    """The pre-trained model's weights, its words, and where it runs."""

    tokenizer: Any
    weights: dict[str, Tensor]
    device: torch.device

    def fresh(self) -> Any:
        model = plain_model(self.tokenizer)
        model.load_state_dict(self.weights)
        return model.to(self.device)


@dataclass(frozen=True)
class Share:
    """Trained numbers, and of how many: of the Q-Former with its query tokens, and of the model, what was added included."""

    trained: int
    qformer: int
    model: int


@dataclass
class Run:
    """One contestant on one draw."""

    seed: int
    accuracies: dict[str, float]
    fit: Fit


def petal_demo(config: DemoConfig) -> dict[str, Any]:
    """Run the demo; returns what it wrote to metrics.json. Raises UserError for what the user can put right."""
    from tqdm import tqdm

    started, processor = time.perf_counter(), time.process_time()
    device = prepare(config).device
    data = PetalDigits.load()
    contestants, seeds = recipes.CONTESTANTS, list(range(config.seeds))
    runs: dict[str, list[Run]] = {c.name: [] for c in contestants}
    shares: dict[str, Share] = {}
    reloaded: dict[str, bool] = {}
    with one_thread(device):
        base, about = load_base(config, data, device)
        print(about["words"])
        untuned = score(base.fresh(), base.tokenizer, data.test, HELD_OUT, device)
        pairs = [(c, seed) for seed in seeds for c in contestants]
        shown: dict[str, Any] = {}
        with tqdm(pairs, desc="tuning", unit="run") as bar:
            for contestant, seed in bar:
                bar.set_postfix_str(f"{contestant.name}, draw {seed}")
                training = _training(contestant, config.quick, seed)
                train, _ = data.pool.draw(config.shots, seed)
                model, result = tune(base, contestant, train, training)
                runs[contestant.name].append(
                    Run(seed, score(model, base.tokenizer, data.test, HELD_OUT, device), result)
                )
                if seed == seeds[0]:
                    shares[contestant.name] = _share(model, base)
                    if contestant.method != "full":
                        reloaded[contestant.name] = _round_trip(config, contestant, model, base, data.test)
                    if contestant.method == "petal":
                        shown = _shown(model, base, data.test)
        floor = [_without_network(data, config.shots, seed) for seed in seeds]

    metrics = {
        "rows": [_row(c, runs[c.name], shares[c.name], reloaded.get(c.name)) for c in contestants],
        "untuned": untuned, "without_network": {n: spread([f[n] for f in floor]) for n in floor[0]},
        "seeds": seeds, "shots": config.shots, "quick": config.quick, "test_images": len(data.test),
        "questions": {q.name: q.phrasings for q in HELD_OUT}, "pretrained_on": {q.name: q.phrasings for q in PRETRAINED},
        "usage": shown["usage"], "example": shown["example"],
        "base": {k: v for k, v in about.items() if k != "words"}, "architecture": recipes.ARCHITECTURE,
        "tune": dataclasses.asdict(recipes.quick(recipes.TUNE) if config.quick else recipes.TUNE),
        "device": device_name(device), "threads": 1 if device.type == "cpu" else None,
        "peak_memory_method": memory_method(device), "versions": versions(), "commit": commit(),
    }  # fmt: skip
    from fastgist.train import expert_figure
    from fastgist.train.petal_figure import draw

    figures = [config.folder / name for name in ("petal.png", "experts.png")]
    draw(figures[0], metrics, data.test.images, shown["picked"])
    expert_figure.draw(figures[1], shown["usage"])
    metrics["seconds"], metrics["cpu_seconds"] = time.perf_counter() - started, time.process_time() - processor
    write_atomically(config.folder / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    _print_table(metrics, config, figures)
    broken = [name for name, same in reloaded.items() if not same]
    if broken:
        raise RuntimeError(f"reloaded adapters do not give the same answers: {', '.join(broken)}")
    return metrics


def _training(contestant: Contestant, quick: bool, seed: int) -> Training:
    training = recipes.quick(contestant.training) if quick else contestant.training
    return dataclasses.replace(training, seed=seed)


def load_base(config: DemoConfig, data: PetalDigits, device: torch.device) -> tuple[Base, dict[str, Any]]:
    """The base model, from the cache or trained now, and what to say about it."""
    vision, training = recipes.VISION, recipes.PRETRAIN
    if config.quick:
        vision, training = recipes.quick(vision), recipes.quick(training)
    tokenizer = train_tokenizer()
    key: dict[str, Any] = {
        "vision": dataclasses.asdict(vision), "training": dataclasses.asdict(training), "device": device.type,
        "architecture": recipes.ARCHITECTURE, "words": tokenizer.get_vocab(),
        "questions": [dataclasses.asdict(q) for q in PRETRAINED + HELD_OUT],
    }  # fmt: skip
    key |= {n: v for n, v in versions().items() if n in ("fastgist", "torch", "transformers", "scikit-learn")}
    weights, seconds, origin = cached(
        "petal", key, lambda: pretrain(tokenizer, data, vision, training, device), config.cache
    )
    base = Base(tokenizer, weights, device)
    model = base.fresh()
    known = score(model, tokenizer, data.test, PRETRAINED, device)
    counts = {
        "image encoder": _count(model.vision_model), "Q-Former": _count(model.qformer) + model.query_tokens.numel(),
        "language model": _count(model.language_model), "all": _count(model),
    }  # fmt: skip
    asked = ", ".join(f"{name} {share:.1%}" for name, share in known.items() if name != "all")
    words = (
        f"base: InstructBLIP of {counts['all']:,} parameters (image encoder {counts['image encoder']:,}, Q-Former "
        f"{counts['Q-Former']:,}, language model {counts['language model']:,}), pre-trained on {len(data.pretrain)} images; "
        f"right on {len(data.test)} held-out images: {asked} ({origin})"
    )
    return base, {
        "words": words,
        "known": known,
        "parameters": counts,
        "pretrain_seconds": seconds,
        "cached": not seconds,
    }


def _count(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


# -- one run ---------------------------------------------------------------------------------------------------------


def adapt(model: Any, method: str, options: dict[str, Any]) -> Any:
    """Freeze ``model`` but for what ``method`` trains in its Q-Former, in place."""
    import fastgist
    from fastgist import petal

    if method == "petal":
        return petal.wrap(model, petal.PetalConfig(**options), verbose=False)
    if method == "full":
        model.requires_grad_(False)
        model.qformer.requires_grad_(True)
        model.query_tokens.requires_grad_(True)
        return model
    config = {"lora": fastgist.LoraConfig, "adapter": fastgist.AdapterConfig}[method](**options)
    return fastgist.get_peft_model(model, config)


def tune(base: Base, contestant: Contestant, train: DigitImages, training: Training) -> tuple[Any, Fit]:
    """Tune a copy of the base model on a few images; the last step's weights are kept: nothing is selected."""
    from fastgist.nn import update_thresholds

    model = base.fresh()
    seed_everything(training.seed)
    model = adapt(model, contestant.method, contestant.options)
    loss_of = question_loss(model, base.tokenizer, train, HELD_OUT, training, base.device)
    result = fit(
        model, loss_of, training, base.device, measure_memory=True,
        after_step=lambda progress: update_thresholds(model, progress),
    )  # fmt: skip
    return model, result


def _share(model: Any, base: Base) -> Share:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    plain = base.fresh()
    added = _count(model) - _count(plain)
    return Share(trained, _count(plain.qformer) + plain.query_tokens.numel() + added, _count(model))


def _round_trip(config: DemoConfig, contestant: Contestant, model: Any, base: Base, test: DigitImages) -> bool:
    """Save the adapter, load it into a fresh base model, and compare the answers to all questions about 32 images."""
    import fastgist

    folder = config.folder / "adapters" / contestant.method
    fastgist.save_adapter(model, folder)
    again = fastgist.load_adapter(base.fresh(), folder)
    part = DigitImages(test.images[:32], test.labels[:32])
    rows = rows_of(part, HELD_OUT)
    first, second = (answers(m, base.tokenizer, part.images, rows, base.device) for m in (model, again))
    return first == second


@torch.no_grad()
def expert_usage(model: Any, tokenizer: Any, device: torch.device) -> dict[str, list[float]]:
    """Each held-out instruction -> how much a PETAL model takes of every expert for it."""
    from fastgist import petal

    instructions = [phrasing for question in HELD_OUT for phrasing in question.phrasings]
    tokens = tokenizer(instructions, padding=True, padding_side="right", return_tensors="pt").to(device)
    gate = petal.instruction_gate(model, tokens["input_ids"], tokens["attention_mask"])
    return dict(zip(instructions, gate.weights.cpu().tolist(), strict=True))


def _shown(model: Any, base: Base, test: DigitImages) -> dict[str, Any]:
    """What the figures show of a tuned model: the experts' usage, and answers by beam search about one image a digit."""
    picked = [int(torch.nonzero(test.labels == digit)[0]) for digit in range(10)]  # the first of each
    caption = HELD_OUT[-1]
    labels = test.labels.tolist()
    rows = [Row(i, caption.phrasings[0], caption.answers[labels[i]]) for i in picked]
    found = answers(model, base.tokenizer, test.images, rows, base.device, beams=BEAMS)
    one = picked[8]
    asked = [Row(one, q.phrasings[0], q.answers[labels[one]]) for q in HELD_OUT]
    replies = answers(model, base.tokenizer, test.images, asked, base.device, beams=BEAMS)
    return {
        "usage": expert_usage(model, base.tokenizer, base.device), "picked": picked,
        "example": {
            "beams": BEAMS, "instruction": caption.phrasings[0], "captions": found, "right": [r.answer for r in rows],
            "of": NAMES[labels[one]], "answers": {row.instruction: reply for row, reply in zip(asked, replies, strict=True)},
        },
    }  # fmt: skip


def _without_network(data: PetalDigits, shots: int, seed: int) -> dict[str, float]:
    """Answers without any network: always the most frequent one of the training images, and the rule applied to what
    logistic regression on the pixels of the same images takes the digit for."""
    from sklearn.linear_model import LogisticRegression

    train, _ = data.pool.draw(shots, seed)
    regression = LogisticRegression(max_iter=5000).fit(train.images.flatten(1).numpy(), train.labels.numpy())
    taken = regression.predict(data.test.images.flatten(1).numpy()).tolist()
    labels = data.test.labels.tolist()

    def share(question: Question, given: list[str]) -> float:
        return mean(a == question.answers[label] for a, label in zip(given, labels, strict=True))

    frequent, ruled = [], []
    for question in HELD_OUT:
        top = Counter(question.answers[label] for label in train.labels.tolist()).most_common(1)[0][0]
        frequent.append(share(question, [top] * len(labels)))
        ruled.append(share(question, [question.answers[digit] for digit in taken]))
    return {"most frequent answer": mean(frequent), "pixels and the rule": mean(ruled)}


# -- what came out ---------------------------------------------------------------------------------------------------


def _row(contestant: Contestant, runs: list[Run], share: Share, reloaded: bool | None) -> dict[str, Any]:
    memories = [run.fit.peak_memory_bytes for run in runs if run.fit.peak_memory_bytes]
    return {
        "name": contestant.name, "method": contestant.method, "lr": contestant.lr, "options": contestant.options,
        "accuracies": {str(run.seed): run.accuracies for run in runs},
        "accuracy": {name: spread([run.accuracies[name] for run in runs]) for name in runs[0].accuracies},
        "trained": share.trained, "qformer": share.qformer, "model": share.model,
        "last_losses": {str(run.seed): mean(run.fit.losses[-10:]) for run in runs},
        "seconds_per_step": median(run.fit.seconds_per_step for run in runs),
        "peak_memory_bytes": max(memories) if memories else None, "reloaded_identical": reloaded,
    }  # fmt: skip


def _print_table(metrics: dict[str, Any], config: DemoConfig, figures: list[Path]) -> None:
    from rich.console import Console
    from rich.table import Table

    seeds, names = len(metrics["seeds"]), list(metrics["questions"])

    def percent(entry: dict[str, Any]) -> str:
        return f"{entry['mean']:.1%}" + (f" ± {100 * entry['std']:.1f}" if entry["std"] is not None else "")

    draws = f"{seeds} draw{'s' if seeds > 1 else ''}"
    table = Table(title=f"new questions from {config.shots} images of each digit, {draws}", title_justify="left")
    table.add_column("tuned", no_wrap=True)
    for column in ("all", *names, "trained/Q-Former", "/model", "ms/step", "peak MiB"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_row("nothing (base)", *(f"{metrics['untuned'][n]:.1%}" for n in ("all", *names)), "", "", "", "")
    for row in metrics["rows"]:
        memory = f"{row['peak_memory_bytes'] / 2**20:.2f}" if row["peak_memory_bytes"] else "-"
        table.add_row(
            row["name"], percent(row["accuracy"]["all"]), *(f"{row['accuracy'][n]['mean']:.1%}" for n in names),
            f"{row['trained']:,}/{row['qformer']:,} = {row['trained'] / row['qformer']:.1%}",
            f"{row['model']:,} = {row['trained'] / row['model']:.1%}", f"{1000 * row['seconds_per_step']:.1f}", memory,
        )  # fmt: skip
    table.add_section()
    for name, entry in metrics["without_network"].items():
        table.add_row(name, percent(entry), *[""] * (len(names) + 4))
    console = Console(width=max(150, Console().width))
    console.print(table)
    same = [row["reloaded_identical"] for row in metrics["rows"] if row["reloaded_identical"] is not None]
    example = metrics["example"]
    lines = [
        f"accuracy: answers right to the word on {metrics['test_images']} held-out images, every phrasing; mean (± standard "
        "deviation over draws)",
        "larger, holes, next, caption: " + "; ".join(" or ".join(p) for p in metrics["questions"].values()),
        f"trained of the Q-Former and of the whole model, what a method adds included; ms/step: median while tuning (on a "
        f"CPU: of processor time), batches of {metrics['tune']['batch_size']}; peak memory of one step",
        f"peak memory is {metrics['peak_memory_method']}",
        "without a network: always the most frequent answer; the rule on what logistic regression on pixels names",
        "differences within the spread say nothing about the methods; --seeds gives more draws",
        f"PETAL, {example['beams']} beams, about the first image of an {example['of']}: "
        + "; ".join(f"{question} {answer}" for question, answer in example["answers"].items()),
        f"saved, reloaded into a fresh model, the same answers: {sum(same)} of {len(same)} adapters",
    ]
    if config.quick:
        lines.append("--quick: a tenth of the training; these accuracies say nothing about the methods")
    paths = ", ".join(str(path) for path in (*figures, config.folder / "metrics.json"))
    lines.append(
        f"{paths}; {metrics['seconds']:.0f} s ({metrics['cpu_seconds']:.0f} of processor time) on {metrics['device']}"
    )
    for line in lines:
        console.print(line, style="dim", highlight=False, soft_wrap=True)
