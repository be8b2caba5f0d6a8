"""How the demo's learning rates were chosen: ``python -m fastgist.train.tune_demo`` (minutes; prints a table).

Every method has the same grid, draws and images. The draws are not the demo's and the images are those of the pool
that a draw leaves over, never the test half.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from statistics import mean

from fastgist.recipes import digits as recipes
from fastgist.train.config import DemoConfig
from fastgist.train.demo import _base, adapt_to, one_thread
from fastgist.train.digits import Digits
from fastgist.train.engine import evaluate

__all__ = ["tune"]


def tune(shots: int = 10) -> dict[str, float]:
    """The best learning rate of every contestant, by mean accuracy on the left-over pool images."""
    from accelerate import Accelerator
    from tqdm import tqdm

    accelerator = Accelerator(cpu=True)
    data = Digits.load()
    best: dict[str, float] = {}
    with one_thread(accelerator.device):
        base, _ = _base(DemoConfig(output_dir=Path()), data, accelerator)
        for contestant in recipes.CONTESTANTS:
            scores = {}
            for lr in tqdm(recipes.LEARNING_RATES, desc=contestant.name):
                found = []
                for seed in recipes.TUNING_SEEDS:
                    train, rest = data.pool.draw(shots, seed)
                    recipe = dataclasses.replace(contestant.recipe, lr=lr, seed=seed)
                    model, _ = adapt_to(base, contestant, train, recipe, accelerator)
                    found.append(evaluate(model, rest, 256, accelerator)["accuracy"])
                scores[lr] = mean(found)
            best[contestant.name] = max(scores, key=lambda lr: scores[lr])
            shown = ", ".join(f"{lr:g}: {score:.1%}" for lr, score in scores.items())
            print(f"{contestant.name}: {shown}; best {best[contestant.name]:g}")
    return best


if __name__ == "__main__":
    tune()
