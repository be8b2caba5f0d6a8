"""The ``fastgist`` command: demo, finetune, finetune-text, compare, compare-text, export, env, warmup.

A command's flags are the fields of its dataclass; the command turns them into one call, and errors into one line. What
the user can put right exits with 2, what went wrong at run time with 1, Ctrl-C with 130. FASTGIST_DEBUG=1 shows the
traceback of an error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import os
import sys
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

if TYPE_CHECKING:
    import typer

__all__ = ["main"]

#: What the command line imports beyond torch, all in one extra.
_EXTRA = "fastgist[train]"
_PACKAGES = (
    "PIL", "accelerate", "datasets", "matplotlib", "numpy", "rich", "safetensors", "scipy", "sklearn", "timm",
    "tokenizers", "torchmetrics", "torchvision", "tqdm", "transformers", "typer", "yaml",
)  # fmt: skip
_OTHER_EXTRAS = dict.fromkeys(("onnx", "onnxruntime", "onnxscript"), "fastgist[onnx]")

#: Panels of the help that come last, in this order.
_RECIPE: dict[str, int] = {"Recipe": 1, "Parts": 2}


def main() -> None:
    """Entry point of the ``fastgist`` command."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ModuleNotFoundError as error:
        print(f"fastgist: the command line needs {error.name}: pip install '{_EXTRA}'", file=sys.stderr)
        sys.exit(2)
    build_app()(prog_name="fastgist")


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Errors become one line on stderr (of the first process only) and an exit code."""
    import typer

    from fastgist.train.config import UserError

    def leave(message: object, code: int, error: BaseException) -> typing.NoReturn:
        if os.environ.get("FASTGIST_DEBUG") == "1":
            raise error
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"fastgist: {' '.join(str(message).split())}", file=sys.stderr)
        raise typer.Exit(code) from None

    try:
        yield
    except UserError as error:
        leave(error, 2, error)
    except KeyboardInterrupt as error:
        leave(str(error) or "interrupted", 130, error)
    except typer.Exit:
        raise
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".", 1)[0]
        extra = _OTHER_EXTRAS.get(package, _EXTRA if package in _PACKAGES else None)
        install = f": pip install '{extra}'" if extra else ""
        leave(f"this command needs the package {package}{install}", 2, error)
    except Exception as error:
        leave(f"{type(error).__name__}: {error} (FASTGIST_DEBUG=1 shows where)", 1, error)


def _command(run: Callable[[Any], None], config: type, files: tuple[str, ...] = ()) -> Callable[..., None]:
    """A typer command that fills the dataclass ``config`` from flags and calls ``run`` with it.

    ``files``: which of ``--config`` and ``--recipe`` it reads settings from, which flags override. ``config.of``, where
    there is one, makes the dataclass from what was given.
    """
    import typer

    hints = typing.get_type_hints(config)
    context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    parameters = [context, *_file_flags(config, files)]
    options = [o for o in dataclasses.fields(config) if o.name not in getattr(config, "not_flags", ())]
    # The recipe's flags, inherited and therefore first, go to the end of the help.
    for option in sorted(options, key=lambda option: _RECIPE.get(option.metadata.get("panel", ""), 0)):
        about = dict(option.metadata)
        argument = about.pop("argument", False)
        if about.pop("schedule", False):
            about |= {"parser": _schedule, "metavar": "NUMBER|SCHEDULE"}
        about["rich_help_panel"] = about.pop("panel", None)
        # A switch that is off needs no --no- twin, which would only fill the help.
        names = [f"--{option.name.replace('_', '-')}"] if option.default is False else []
        kind = typer.Argument(**about) if argument else typer.Option(*names, **about)
        default = inspect.Parameter.empty if option.default is ... else option.default
        if not isinstance(option.default_factory, dataclasses._MISSING_TYPE):
            default = option.default_factory()
        hint = str if "parser" in about else hints[option.name]
        annotation = Annotated[hint, kind]  # type: ignore[valid-type]
        parameter = inspect.Parameter(
            option.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
        )
        parameters.insert(0 if argument else len(parameters), parameter)

    def command(context: typer.Context, **options: Any) -> None:
        given = {name: value for name, value in options.items() if _was_given(context, name)}
        for name in files:
            given.pop(name, None)
        with _one_line_errors():
            run(getattr(config, "of", config)(**given))

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = run.__doc__
    return command


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name not in ("DEFAULT", "PROMPT")


def _schedule(value: Any) -> float | str:
    import typer

    from fastgist.train.optim import parse_schedule

    try:
        return parse_schedule(value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _file_flags(config: type, names: tuple[str, ...]) -> list[inspect.Parameter]:
    """Those of ``--config FILE`` and ``--recipe NAME`` that are among ``names``: settings beneath the flags, the file's above
    the recipe's."""
    import typer

    def beneath(context: typer.Context, settings: dict[str, Any], over: bool) -> None:
        before = dict(context.default_map or {})
        context.default_map = {**before, **settings} if over else {**settings, **before}

    def config_file(context: typer.Context, path: Path | None) -> Path | None:
        if path is not None:
            from fastgist.train.settings import read_settings

            with _one_line_errors():
                beneath(context, read_settings(path, config), over=True)
        return path

    def recipe(context: typer.Context, name: str | None) -> str | None:
        if name is not None:
            from fastgist.recipes.benchmarks import settings_of
            from fastgist.train.settings import understood

            with _one_line_errors():
                beneath(context, understood(settings_of(name), config, f"--recipe {name}"), over=False)
        return name

    for reader, value in ((config_file, "path"), (recipe, "name")):  # typer reads them, and has no name typer there
        reader.__annotations__ = {"context": typer.Context, value: object}
    flags: dict[str, tuple[Any, Callable[..., Any], str]] = {
        "config": (
            Path,
            config_file,
            "A YAML, TOML or JSON file of settings (a run's config.json); flags override it.",
        ),
        "recipe": (str, recipe, "A benchmark's settings, such as vtab/caltech101 or fgvc/oxford_pets."),
    }
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                kind | None,
                typer.Option(f"--{name}", callback=callback, is_eager=True, help=words, rich_help_panel="Settings"),
            ],
        )
        for name, (kind, callback, words) in flags.items()
        if name in names
    ]


def build_app() -> typer.Typer:
    """The command line: built on demand, so that importing this module needs the standard library only."""
    import typer

    from fastgist.train.config import CompareConfig, DemoConfig, ExportConfig, FinetuneConfig
    from fastgist.train.text_config import CompareTextConfig, TextConfig

    app = typer.Typer(
        help="Parameter-efficient fine-tuning with GIST and PETAL on fused kernels.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )

    def show_version(wanted: bool) -> None:
        if wanted:
            import fastgist

            print(f"fastgist {fastgist.__version__}")
            raise typer.Exit

    def top(version: bool = False) -> None:
        pass

    flag = typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and leave.")
    top.__annotations__ = {"version": Annotated[bool, flag]}
    app.callback()(top)
    app.command("demo")(_command(_demo, DemoConfig))
    app.command("finetune")(_command(_finetune, FinetuneConfig, files=("config", "recipe")))
    app.command("finetune-text")(_command(_finetune_text, TextConfig, files=("config",)))
    app.command("compare")(_command(_compare, CompareConfig, files=("config", "recipe")))
    app.command("compare-text")(_command(_compare_text, CompareTextConfig, files=("config",)))
    app.command("export")(_command(_export, ExportConfig))
    app.command("env")(_command(_env, EnvConfig))
    app.command("warmup")(_command(_warmup, WarmupConfig))
    return app


@dataclass(frozen=True, kw_only=True)
class EnvConfig:
    """Flags of ``fastgist env``."""

    json: bool = field(default=False, metadata={"help": "Print JSON."})


@dataclass(frozen=True, kw_only=True)
class WarmupConfig:
    """Flags of ``fastgist warmup``."""

    device: str = field(default="auto", metadata={"help": "cuda, cpu, or auto."})
    dtype: str = field(default="float32,bfloat16", metadata={"help": "Dtypes of the activations, by commas."})
    batch: int = field(default=32, metadata={"help": "Images a step.", "min": 1})
    tokens: int = field(default=198, metadata={"help": "Tokens an image, the gist token included.", "min": 1})
    dim: int = field(default=768, metadata={"help": "Width of the model.", "min": 1})
    classes: int = field(default=1000, metadata={"help": "Classes of the head.", "min": 1})
    rank: int = field(default=64, metadata={"help": "Rank of cp_linear.", "min": 1})
    bottleneck_dim: int = field(default=8, metadata={"help": "Bottleneck of the adapter.", "min": 1})


def _demo(config: Any) -> None:
    """Adapt a small model to new work with every method, and compare them, on real handwritten digits, offline.

    gist: a small Vision Transformer learns digits it has never seen; about a minute on two cores.

    petal: the Q-Former of a small InstructBLIP is tuned on questions and captions it has never been asked; two minutes.
    """
    from fastgist.train.config import Demo

    if config.which is Demo.PETAL:
        from fastgist.train.petal_demo import petal_demo

        petal_demo(config)
    else:
        from fastgist.train.demo import demo

        demo(config)


def _finetune(config: Any) -> None:
    """Fine-tune a timm Vision Transformer on a folder of images or a data set of the Hugging Face hub.

    Several processes: accelerate launch -m fastgist finetune ...
    """
    from fastgist.train.finetune import finetune

    if config.seeds is not None:
        from fastgist.train.sweep import sweep

        sweep(config, finetune)
    else:
        finetune(config)


def _compare(config: Any) -> None:
    """Compare methods, each with and without a gist token, on the same data and seeds; finished runs are kept.

    A table of paired differences with confidence intervals, compare.json, compare.csv and a figure.

    Learning rates decide such comparisons: choose them with --method-lr, on other images or seeds.
    """
    from fastgist.train.compare import compare

    compare(config)


def _compare_text(config: Any) -> None:
    """Compare methods on texts, each with and without a gist token, on the same data and seeds; finished runs are kept.

    A table of paired differences with confidence intervals, compare.json, compare.csv and a figure.

    Learning rates decide such comparisons: choose them with --method-lr, on other texts or seeds.
    """
    from fastgist.train.compare import compare

    compare(config.resolved())


def _export(config: Any) -> None:
    """Write an adapted model as one file for other runtimes, checked against the model itself before it takes its name.

    What merges is merged; adapters, prompts and the gist token stay in the graph. The batch is dynamic.
    """
    from fastgist.train.export_command import export

    export(config)


def _finetune_text(config: Any) -> None:
    """Fine-tune a BERT, RoBERTa or other sequence classifier of transformers on texts or pairs of texts.

    Several processes: accelerate launch -m fastgist finetune-text ...
    """
    from fastgist.train.text import finetune_text

    if config.seeds is not None:
        from fastgist.train.sweep import sweep

        sweep(config.resolved(), finetune_text)
    else:
        finetune_text(config)


#: Names of what fastgist._extension.build_info() returns, for people.
_EXTENSION_ROWS = {
    "torch": "built with torch", "torch_target": "runs with torch from", "cuda": "built with CUDA", "cuda_archs": "GPUs (sm)",
    "cpu_isas": "CPU code for", "cpu_isa": "of which here", "cuda_kernels": "CUDA kernels",
}  # fmt: skip


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _env(config: EnvConfig) -> None:
    """What is installed here, which devices there are, and what each operation will run on and why."""
    from fastgist.train.diagnostics import environment

    found = environment()
    if config.json:
        print(json.dumps(found, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False)  # "fastgist[train]" is no style
    for title, rows in (
        ("versions", found["versions"]),
        ("not installed", found["missing"]),
        ("devices", {d["name"]: d["about"] for d in found["devices"]}),
        ("compiled extension", {_EXTENSION_ROWS.get(k, k): _plain(v) for k, v in found["extension"].items()}),
        ("implementations", found["implementations"]),
    ):
        if not rows:
            continue
        table = Table(title=title, title_justify="left", show_header=False)
        for key, value in rows.items():
            table.add_row(str(key), str(value))
        console.print(table)
    table = Table("operation", "device", "runs on, and why not on others", title="operations", title_justify="left")
    for op, devices in found["operations"].items():
        for device, why in devices.items():
            table.add_row(op, device, why)
    console.print(table)


def _warmup(config: WarmupConfig) -> None:
    """Compile the kernels for this device ahead of time, for given dtypes and shapes, into Triton's cache."""
    from fastgist.train.diagnostics import warmup

    warmup(**dataclasses.asdict(config))


if __name__ == "__main__":
    main()
