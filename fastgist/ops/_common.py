"""What every operation's module uses unchanged: defining raw ops, and the checks behind their error messages."""

from __future__ import annotations

import functools
import math
import operator
import sys
import warnings
from collections.abc import Callable, Iterable
from numbers import Integral, Real

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastgist import backends

__all__ = [
    "define",
    "alike",
    "any_autocast",
    "check_floating",
    "check_same_dtype",
    "check_same_device",
    "check_temperature",
    "check_number",
    "check_integer",
    "check_reduction",
    "autocast_dtype",
    "autocast_enabled",
    "distinct",
    "dtype_name",
    "filled",
    "is_ordinary",
    "needs",
    "resolve_loss",
    "scale_rows",
    "single_backward",
    "tf32_allowed",
    "transforms_active",
]

_LIBRARY = torch.library.Library("fastgist", "DEF")
REDUCTIONS = ("none", "sum", "mean", "batchmean")


def define(
    schema: str, implementation: Callable, fake: Callable, public: str, tags: Iterable[torch.Tag] = ()
) -> Callable:
    """Define ``fastgist::<schema>`` with one implementation for all devices, a fake, and a guard against autograd. Returns the
    function that calls it, past the dispatcher where nobody would notice.

    Raw ops compute and do not differentiate: the public function wraps them in an autograd.Function. A raw op called
    with tensors that require gradients would drop those silently, so what the guard returns raises in a backward and names
    ``public``, a function of fastgist.functional or one by its full name. (Not at once: a model from torch.export calls raw
    ops, and may be called with gradients on.)
    """
    name = schema.split("(", 1)[0]
    arguments = schema.split("(", 1)[1].rsplit(" -> ", 1)[0].split(", ")
    directly = _guarded(name, implementation, arguments)
    mutates = "!" in schema
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    _LIBRARY.impl(name, directly, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastgist::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.fastgist, name).default
    places = [i for i, a in enumerate(arguments) if "Tensor" in a]
    tensors = operator.itemgetter(*places) if len(places) > 1 else operator.itemgetter(slice(places[0], places[0] + 1))
    public = public if "." in public else f"fastgist.functional.{public}"
    message = (
        f"torch.ops.fastgist.{name} computes without autograd: call {public} for gradients (in a "
        "model from torch.export there are none)"
    )

    def guard(*args):
        given = [t for a in args for t in (a if isinstance(a, list) else (a,))]
        leaves = [t for t in given if isinstance(t, Tensor) and t.requires_grad]
        # torch.export traces a Function's inside with gradients on; it exports a forward, so none can be lost.
        lost = bool(leaves) and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if lost and mutates:  # what it writes to is no result that could raise later
            raise RuntimeError(message)
        with torch._C._AutoDispatchBelowAutograd():
            results = op(*args)
        if not lost:
            return results
        flat, tree = pytree.tree_flatten(results)
        return pytree.tree_unflatten(_NotDifferentiable.apply(message, len(flat), *flat, *leaves), tree)

    def call(*args):
        if torch.compiler.is_compiling():
            return op(*args)
        if _nobody_listens(tensors(args)):
            return directly(*args)
        _tell_counters()
        return op(*args)

    _LIBRARY.impl(name, guard, "Autograd")
    return call


def _tell_counters() -> None:
    """Tell torch's FLOP counters that are at work what our operators have. (To have them know beforehand, we would import
    their module, and with it Triton.)"""
    if "torch.utils.flop_counter" in sys.modules:
        from fastgist.ops import _flops

        _flops.tell()


def _nobody_listens(args: Iterable[object]) -> bool:
    """Whether a raw op's implementation may be called past the dispatcher, which takes twice the host time of a launch: inside
    an autograd.Function, on ordinary tensors (``args`` are those that take one or several), with no mode, transform or tracer
    that wants to see the operator."""
    if _grad_enabled() or _count_modes() or transforms_active() or _tracing_state() is not None:
        return False
    for a in args:  # a loop: a generator, and a call for each argument, took half of this function's time
        if a is None:
            continue
        kind = type(a)
        if kind in _ORDINARY:
            if _keys_of(a).raw_repr() not in _known_keys and not is_ordinary(a):  # type: ignore[arg-type]
                return False
        elif isinstance(a, Tensor):
            return False
        elif kind is list:  # of tensors, or of what an operator is asked for
            if any(isinstance(t, Tensor) and not is_ordinary(t) for t in a):  # type: ignore[attr-defined]
                return False
    return True


def is_ordinary(t: Tensor) -> bool:
    """Whether nothing but autograd and the device's kernels have a part in ``t``: no negative or conjugate bit, no batch of
    torch's older vmap, no subclass."""
    if type(t) not in _ORDINARY:
        return False
    keys = _keys_of(t).raw_repr()
    if keys not in _known_keys:
        _know(t.device.type)
    return keys in _known_keys


@functools.cache
def _know(device: str) -> None:
    """Learn the dispatch keys of a device's ordinary tensors: of one, and of one made in inference mode. They name the device,
    so those of all devices are one set."""
    plain = torch.empty(0, device=device)
    with torch.inference_mode():
        inferred = torch.empty(0, device=device)
    _known_keys.update(torch._C._dispatch_keys(t).raw_repr() for t in (plain, inferred))


_known_keys: set[int] = set()
_ORDINARY = frozenset({Tensor, torch.nn.Parameter})
# Looked up once: the questions are asked in every call, and half of an answer's time is the way to it.
_grad_enabled, transforms_active = torch.is_grad_enabled, torch._C._are_functorch_transforms_active
_tracing_state, _keys_of = torch._C._get_tracing_state, torch._C._dispatch_keys
#: Where a version of torch cannot say, autocast may be on, and somebody may listen.
any_autocast: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)
_count_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)


class _NotDifferentiable(torch.autograd.Function):
    """The first ``count`` tensors, as results of the others that cannot be differentiated."""

    @staticmethod
    def forward(ctx, message, count, *tensors):
        ctx.message = message
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(ctx.message)


def _guarded(name: str, implementation: Callable, arguments: list[str]) -> Callable:
    """The implementation as both the dispatcher and those who pass it by call it.

    Without autocast: dtypes are settled before a raw op is called, and autocast must not narrow a sum inside it (a matrix
    product would be). And where the device has no room for any tile of a kernel that "auto" chose, saying so once and taking
    plain PyTorch; an explicit impl="triton" raises. The launcher has tried smaller tiles by then, and no operator writes what
    it reads before its last launch, so all can begin again.
    """
    at = next((i for i, a in enumerate(arguments) if a.rstrip(")") == "str impl"), None)

    @functools.wraps(implementation)
    def run(*args):
        if any_autocast():
            device_type = next(a.device.type for a in args if isinstance(a, Tensor))
            if autocast_enabled(device_type):
                with torch.autocast(device_type, enabled=False):
                    return run(*args)
        try:
            return implementation(*args)
        except _no_room() as error:
            if at is None or args[at] != "auto":
                raise
            _tell_once(
                f"fastgist::{name}: this device has no room for any tile of a kernel ({error}); plain PyTorch is used "
                "for such shapes. impl='reference' does so without this warning"
            )
        return implementation(*args[:at], "reference", *args[at + 1 :])

    return run


def _no_room() -> tuple[type[Exception], ...]:
    """Triton's error for a tile that does not fit, where Triton is loaded: asked for once something was raised."""
    errors = sys.modules.get("triton.runtime.errors")
    return () if errors is None else (errors.OutOfResources,)


@functools.cache
def _tell_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def single_backward(
    op: str, instead: str = "Double backward needs the formula in plain torch (fastgist.reference)"
) -> Callable[[Callable], Callable]:
    """Decorator of an autograd.Function's backward that cannot be differentiated itself: it raises under create_graph=True.

    At once, not when a second derivative reaches the gradients: the engine only runs what lies on a path to the inputs
    that it was asked for, and the results of a kernel lie on none, so a gradient penalty would silently be a constant.
    (torch's once_differentiable is silent too where the incoming gradient does not require grad.)
    """
    message = (
        f"{op}: no second derivative (backward was called with create_graph=True): its backward is a kernel. {instead}"
    )

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def run(ctx, *grads):
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                raise RuntimeError(message)
            return backward(ctx, *grads)

        return run

    return decorate


def filled(results: Iterable[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """The results of a raw op, whose arity is fixed: an empty tensor where nothing was computed."""
    return tuple([like.new_empty(0) if r is None else r for r in results])  # a generator takes twice as long


def needs(ctx, count: int, record: bool) -> tuple[bool, ...]:
    """Which of a Function's first ``count`` inputs want a gradient. Under no_grad (``record`` False) none does, but
    ctx.needs_input_grad still names the parameters: an evaluation would compute gradients for nobody."""
    return tuple(ctx.needs_input_grad[:count]) if record else (False,) * count


def scale_rows(grads: Iterable[Tensor], scales: Iterable[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Finished gradients (M, V) times scales of their rows (M,), as ``dtype``, out of place: a second backward over a
    retained graph finds them unscaled. Gradients that were not asked for (empty, 1-D) pass through."""
    return [(g * s[:, None]).to(dtype) if g.dim() == 2 else g for g, s in zip(grads, scales, strict=True)]


def distinct(a: Tensor, b: Tensor) -> Tensor:
    """``b``, or a view of it where it is ``a`` in compiled code: torch traces no autograd.Function that takes one twice."""
    return b.view_as(b) if b is a and torch.compiler.is_compiling() else b


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def alike(a: object, b: object) -> bool:
    """Whether two logits pass all checks at one look: strided tensors (..., V) of one floating-point dtype, shape and device.
    Where they do not, the checks below say why."""
    return (
        isinstance(a, Tensor)
        and isinstance(b, Tensor)
        and a.dtype == b.dtype
        and a.dtype in _FLOATING
        and a.shape == b.shape
        and a.dim() > 0
        and a.device == b.device
        and a.layout == b.layout == torch.strided
    )


def check_floating(op: str, name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a Tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise TypeError(
            f"{op}: {name} must be strided, got a {str(x.layout).removeprefix('torch.')} tensor; x.to_dense() is"
        )
    if x.dtype not in _FLOATING:
        raise TypeError(f"{op}: {name} must be float32, float64, bfloat16 or float16, got {dtype_name(x.dtype)}")


def check_same_dtype(op: str, **tensors: Tensor | None) -> None:
    """Every given tensor has the dtype of the first; TypeError names the two that differ."""
    given = [(name, t) for name, t in tensors.items() if t is not None]
    first_name, first = given[0]
    for name, t in given[1:]:
        if t.dtype != first.dtype:
            raise TypeError(
                f"{op}: {first_name} is {dtype_name(first.dtype)} and {name} is {dtype_name(t.dtype)}; outside autocast "
                "all must have one dtype"
            )


def check_same_device(op: str, **tensors: Tensor | None) -> None:
    given = [(name, t) for name, t in tensors.items() if t is not None]
    first_name, first = given[0]
    for name, t in given[1:]:
        if t.device != first.device:
            raise ValueError(f"{op}: {first_name} is on {first.device} and {name} is on {t.device}")


_ROOTS_OF_LARGEST = {dtype: math.sqrt(torch.finfo(dtype).max) for dtype in (torch.float32, torch.float64)}


def check_temperature(op: str, temperature: object, dtype: torch.dtype) -> float:
    """T as a float. ``dtype``: what exponentials are taken in, where the square of T, and that of 1 / T, which a gradient is
    times, have to be numbers."""
    if type(temperature) is float and 1e-18 < temperature < 1e18:  # as it mostly is; no root of a dtype is nearer to 1
        return temperature
    if isinstance(temperature, Tensor):
        raise TypeError(f"{op}: temperature must be a Python number (reading a tensor would synchronise), got a Tensor")
    if not isinstance(temperature, (int, float, Real)) or isinstance(temperature, bool):
        raise TypeError(f"{op}: temperature must be a number, got {type(temperature).__name__}")
    temperature = float(temperature)
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"{op}: temperature must be finite and > 0, got {temperature}")
    most = _ROOTS_OF_LARGEST[dtype]
    if not 1.0 / most <= temperature <= most:
        raise ValueError(
            f"{op}: temperature must be finite and > 0, and its square and that of its inverse finite in "
            f"{dtype_name(dtype)}, got {temperature}"
        )
    return temperature


def check_number(op: str, name: str, value: object, least: float = -math.inf, most: float = math.inf) -> None:
    """A finite Python or NumPy number within [least, most]; a tensor is none, since reading it would synchronise."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
    if not -math.inf < float(value) < math.inf or not least <= float(value) <= most:
        wanted = "a finite number" if least == -math.inf else f"in [{least:g}, {most:g}]"
        raise ValueError(f"{op}: {name} must be {wanted}, got {value}")


def check_integer(op: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, Integral)):
        raise TypeError(f"{op}: {name} must be an integer, got {type(value).__name__}")


def check_reduction(op: str, reduction: str, allowed: tuple[str, ...] = REDUCTIONS) -> None:
    if reduction not in allowed:
        raise ValueError(f"{op}: reduction must be one of {', '.join(allowed)}, got {reduction!r}")


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast asks matrix products to run in on this device, or None outside autocast."""
    if autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on; never on "meta", where torch's own question raises."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def tf32_allowed() -> bool:
    """Whether float32 products may use tf32: torch's own switch, torch.set_float32_matmul_precision, decides."""
    return torch.get_float32_matmul_precision() != "highest"


def resolve_loss(op: str, impl: str, logits: Tensor) -> str:
    """:func:`fastgist.backends.resolve` for a loss that Triton and CUDA C++ serve on a GPU: "auto" takes the quicker."""
    chosen = backends.resolve(op, impl, logits)
    if impl == "auto" and chosen == "triton" and logits.is_cuda and backends.serves(op, "cuda", logits):
        return _quicker(op, logits.device, logits.shape[-1])
    return chosen


@functools.cache
def _quicker(op: str, device: torch.device, classes: int) -> str:
    """Which of a loss's two implementations a card was quicker with at so many classes: the entry "<op>_impl" of the launch
    tables, {"cuda": 0 or 1}; "triton" where nothing was measured."""
    from fastgist_kernels.common import device_arch, launch_config, next_power_of_2

    entry = launch_config(f"{op}_impl", device_arch(device), f"v{next_power_of_2(max(classes, 1))}")
    return "cuda" if entry.get("cuda") else "triton"
