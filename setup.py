"""The compiled extension of fastgist. Everything else about the package is in pyproject.toml.

The extension is optional: without it the operations run on Triton (CUDA) or plain PyTorch. It is built against the
torch that is installed, so build without isolation:

    pip install --no-build-isolation .            (or: make setup)

Environment:
    FASTGIST_NO_EXT=1       do not build it
    FASTGIST_REQUIRE_EXT=1  fail where it cannot be built, instead of going on without
    FASTGIST_CUDA=0 | 1     leave the CUDA kernels out | fail where they cannot be built. Default: built where nvcc is
                            found and torch is a CUDA build; whether this machine has a GPU does not matter
    FASTGIST_CUDA_ARCHS     default 80,90a,100a
    CUDA_HOME, CXX, MAX_JOBS  as usual
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
# The oldest libtorch whose stable ABI the extension asks for: (major << 56) | (minor << 48).
TORCH_TARGET = (2, 11)
CUDA_ARCHS = "80,90a,100a"

CPU_SOURCES = ["csrc/bindings.cpp", "csrc/bindings_adapter.cpp"] + [
    f"csrc/cpu/{name}.cpp" for name in ("bidirectional_kl", "gist_loss", "adapter_fwd", "adapter_bwd", "dropout")
]
CUDA_SOURCES = ["csrc/bindings_cuda.cpp"] + [
    f"csrc/cuda/{name}.cu"
    for name in ("bidirectional_kl", "bidirectional_kl_fwd_bwd", "gist_loss", "gist_loss_cubed", "total")
]


def say(line: str) -> None:
    """One line that is seen with or without pip's -v in between."""
    print(f"fastgist: {line}", file=sys.stderr, flush=True)


def flag(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


def required() -> bool:
    return flag("FASTGIST_REQUIRE_EXT") or flag("FASTGIST_CUDA")


def compiler() -> str | None:
    candidates = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for path in map(shutil.which, candidates) if path), None)


def cuda_home() -> Path | None:
    """The folder that holds bin/nvcc, include/ and lib64/: not nvcc's parent where the nvcc on PATH is a wrapper."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name) and (Path(os.environ[name]) / "bin/nvcc").exists():
            return Path(os.environ[name]).resolve()
    nvcc = shutil.which("nvcc")
    if nvcc:  # nvcc itself knows: a dry run prints the folder it belongs to as "#$ TOP=..."
        try:
            dry = subprocess.run(
                [nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, timeout=60, cwd=ROOT, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            dry = None
        top = re.search(r"^#\$ TOP=(.+)$", dry.stderr + dry.stdout, re.MULTILINE) if dry else None
        for folder in ([Path(top[1].strip())] if top else []) + [Path(nvcc).resolve().parent.parent]:
            if (folder / "bin/nvcc").exists() and (folder / "include/cuda_runtime.h").exists():
                return folder.resolve()
    default = Path("/usr/local/cuda")
    return default.resolve() if (default / "bin/nvcc").exists() else None


def nvcc_version(home: Path) -> str:
    out = subprocess.run([home / "bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", out)
    return found[1] if found else "unknown"


def library_dir(home: Path) -> Path | None:
    """Where the toolkit keeps the static runtime."""
    machine = {"x86_64": "x86_64-linux", "aarch64": "sbsa-linux"}.get(platform.machine(), "")
    folders = [home / "lib64", home / "lib", home / "targets" / machine / "lib"]
    return next((folder for folder in folders if (folder / "libcudart_static.a").exists()), None)


def gencode(archs: list[str]) -> list[str]:
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    # PTX of the plainest one, for GPUs that none of the binaries serves.
    plain = [arch for arch in archs if arch.isdigit()]
    lowest = min(plain, key=int, default=None)
    return flags + ([f"-gencode=arch=compute_{lowest},code=compute_{lowest}"] if lowest else [])


def pybind11_include() -> list[str]:
    try:
        import pybind11
    except ImportError:  # torch ships the headers
        return []
    return [pybind11.get_include()]


def extensions(cuda: Path | None) -> list[Extension]:
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    target = f"0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000"
    define = [("TORCH_TARGET_VERSION", target)]
    # Neither -ffast-math (it breaks inf and NaN) nor -march (the CPU ops choose their instruction set at run time).
    # The sources say where to fuse multiply and add (csrc/cpu/simd.h), so the compiler must not. The two -fno- flags
    # say that nobody reads errno or floating-point traps; vectorising needs them.
    # Error messages carry __FILE__: relative to here, not to the machine that built it.
    common = ["-g0", "-std=c++20", "-fvisibility=hidden", f"-ffile-prefix-map={ROOT}/="]
    cxx = [*common, "-O3", "-fopenmp-simd", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    archs = os.environ.get("FASTGIST_CUDA_ARCHS", CUDA_ARCHS).replace(";", ",").split(",")
    sources, libraries, library_dirs = list(CPU_SOURCES), ["c10", "torch_cpu", "torch"], library_paths()
    if cuda is not None:
        sources += CUDA_SOURCES
        define += [("FASTGIST_WITH_CUDA", "1"), ("USE_CUDA", "1")]
        # The static runtime: the extension then loads where there is no CUDA toolkit and no GPU.
        libraries += ["torch_cuda", "cudart_static", "rt", "pthread", "dl"]
        library_dirs.append(str(library_dir(cuda)))
    native = Extension(
        "fastgist._C",
        sources,
        include_dirs=[*include_paths(), *([str(cuda / "include")] if cuda else [])],
        define_macros=define,
        library_dirs=library_dirs,
        libraries=libraries,
        extra_compile_args={
            "cxx": cxx,
            "nvcc": ["-O3", "-std=c++20", "--threads=2", "--compiler-options=-fvisibility=hidden", *gencode(archs)],
        },
        py_limited_api=True,  # no Python symbol in it at all: one file serves every Python
        language="c++",
    )
    info = Extension(
        "fastgist._build_info",
        ["csrc/build_info.cpp"],
        include_dirs=[*pybind11_include(), *include_paths()],
        define_macros=[  # bare tokens; csrc/build_info.cpp makes them strings
            ("FASTGIST_BUILT_TORCH", torch.__version__),
            ("FASTGIST_BUILT_TORCH_TARGET", ".".join(map(str, TORCH_TARGET))),
            ("FASTGIST_BUILT_CUDA", nvcc_version(cuda) if cuda else ""),
            ("FASTGIST_BUILT_CUDA_ARCHS", ",".join(archs) if cuda else ""),
        ],
        extra_compile_args={"cxx": [*common, "-O2"]},
        language="c++",
    )
    return [native, info]


def plan() -> dict:
    """What to hand to setup(): the extensions this machine can build, and the command that builds them."""

    def without(reason: str) -> dict:
        if required():
            raise SystemExit(f"fastgist: the extension was asked for and cannot be built: {reason}")
        say(f"building without the compiled extension ({reason}); PyTorch and Triton serve every operation")
        return {}

    if flag("FASTGIST_NO_EXT"):
        say("building without the compiled extension (FASTGIST_NO_EXT is set)")
        return {}
    if not {"build_ext", "build", "bdist_wheel", "editable_wheel", "install", "develop"} & set(sys.argv):
        return {}  # metadata, sdist, clean: nothing to compile, and torch need not be imported
    if sys.platform == "win32":
        return without("Windows has not been tried")
    if compiler() is None:
        return without("no C++ compiler was found; install g++ or clang++, or set CXX")

    # torch.utils.cpp_extension reads CUDA_HOME when it is imported, so it must be right before that.
    home = None if os.environ.get("FASTGIST_CUDA") == "0" else cuda_home()
    if home is not None:
        os.environ["CUDA_HOME"] = str(home)
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension
    except ImportError as error:
        return without(f"torch cannot be imported at build time ({error}); install it first, use --no-build-isolation")
    if tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2]) < TORCH_TARGET:
        return without(f"it needs torch >= {TORCH_TARGET[0]}.{TORCH_TARGET[1]}, found {torch.__version__}")

    obstacle = None
    if home is None:
        obstacle = "nvcc was not found" if os.environ.get("FASTGIST_CUDA") != "0" else "FASTGIST_CUDA=0"
    elif torch.version.cuda is None:
        obstacle = "this torch is built without CUDA"
    elif library_dir(home) is None:
        obstacle = f"{home} has no libcudart_static.a"
    if obstacle:
        if flag("FASTGIST_CUDA"):
            raise SystemExit(f"fastgist: FASTGIST_CUDA=1 and the CUDA kernels cannot be built: {obstacle}")
        say(f"building the extension for the CPU only ({obstacle})")
        home = None

    class Build(BuildExtension):
        """Builds what it can: a failing CUDA build falls back to the CPU's, a failing CPU build to none."""

        def build_extensions(self) -> None:
            attempts = [home, None] if home is not None else [None]
            for cuda in attempts:
                self.extensions[:] = [self._named(ext) for ext in extensions(cuda)]
                try:
                    super().build_extensions()
                    return
                except Exception as error:  # compilers, ninja and torch's version checks fail in many types
                    if required():
                        raise
                    what = "the CUDA kernels" if cuda is not None else "the extension"
                    say(f"WARNING: {what} could not be built and will be left out: {error}")
            self.extensions[:] = []

        def _named(self, ext: Extension) -> Extension:
            """As setuptools' finalize_options prepares the extensions that it is given."""
            ext._full_name = self.get_ext_fullname(ext.name)
            ext._links_to_dynamic = ext._needs_stub = False
            ext._file_name = self.get_ext_filename(ext._full_name)
            self.ext_map[ext.name] = self.ext_map[ext._full_name] = ext
            return ext

    return {"ext_modules": extensions(home), "cmdclass": {"build_ext": Build}}


if int(setuptools.__version__.split(".")[0]) < 77:  # it could not read pyproject.toml, and says so in forty lines
    raise SystemExit(
        f"fastgist: building needs setuptools >= 77, found {setuptools.__version__}: pip install 'setuptools>=77'"
    )
setup(**plan())
