# `make demo` and `make test` each set everything up and then do their job. `make help` lists the rest.
#
#   make test                               .venv from the first Python 3.11-3.13 found
#   make test PYTHON=python3.12             .venv from that one
#   make test PYTHON=python3 VENV=none      no .venv: an environment that already has torch
#
# Set-up is repeated only for what changed: packages when setup.py, pyproject.toml or constraints.txt did, the compiled
# extension when csrc/ did. FASTGIST_NO_EXT=1, FASTGIST_CUDA=0 and the like are explained in setup.py.

ifeq ($(filter oneshell,$(.FEATURES)),)
$(error GNU make 3.82 or newer is needed (macOS: brew install make, then gmake))
endif

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

VENV ?= .venv
WORKERS ?= 2
MUTANTS ?= 8
ARGS ?=

SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
ifeq ($(origin PYTHON),undefined)
PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c '$(SUPPORTED)' >/dev/null 2>&1 && echo $$p && break; done)
endif

ifeq ($(VENV),none)
PY := $(PYTHON)
FASTGIST := $(PY) -c 'import sys; from fastgist.cli import main; sys.exit(main())'
# Nothing is written into that environment but packages it lacks; the checkout is imported from where it lies.
export PYTHONPATH := $(CURDIR):$(CURDIR)/kernels$(if $(PYTHONPATH),:$(PYTHONPATH))
CLANG_FORMAT := clang-format
STAMPS := build/stamps/$(subst /,_,$(PYTHON))
else
PY := $(VENV)/bin/python
FASTGIST := $(VENV)/bin/fastgist
CLANG_FORMAT := $(VENV)/bin/clang-format
STAMPS := $(VENV)/stamps
endif

PACKAGES := $(STAMPS)/packages
EXTENSION := $(STAMPS)/extension
CSRC := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help setup test demo studies petalstudy textstudy bench lint format aot mutants plot gpu wheel clean distclean

help: ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 12

# -- set-up -----------------------------------------------------------------------------------------------------------

setup: $(PACKAGES) $(EXTENSION) ## the environment and the compiled extension

define CHECK_PYTHON
	@if [ -z "$(PYTHON)" ]; then
	  echo "fastgist needs Python 3.11 to 3.13 and found none. Name one: make <target> PYTHON=/path/to/python3.12" >&2; exit 1
	elif ! $(PYTHON) -c 'pass' 2>/dev/null; then
	  echo "fastgist: PYTHON=$(PYTHON) does not run" >&2; exit 1
	elif ! $(PYTHON) -c '$(SUPPORTED)'; then
	  echo "fastgist needs Python 3.11 to 3.13; $(PYTHON) is $$($(PYTHON) -V 2>&1). Name another: make <target> PYTHON=..." >&2; exit 1
	fi
endef

ifeq ($(VENV),none)
# What the tests and the demo import, and the package it comes in. What is missing is installed if pip can; torch stays.
define CHECK_PACKAGES
import importlib.metadata, importlib.util, subprocess, sys, tempfile
wanted = dict(accelerate="accelerate", datasets="datasets", expecttest="expecttest", huggingface_hub="huggingface_hub",
    hypothesis="hypothesis", matplotlib="matplotlib", ninja="ninja", numpy="numpy", onnx="onnx",
    onnxruntime="onnxruntime", onnxscript="onnxscript", pybind11="pybind11", pytest="pytest",
    pytest_benchmark="pytest-benchmark", rich="rich", safetensors="safetensors", scipy="scipy",
    sklearn="scikit-learn", tensorboard="tensorboard", timm="timm", torchmetrics="torchmetrics",
    torchvision="torchvision", tqdm="tqdm", transformers="transformers", typer="typer", xdist="pytest-xdist",
    yaml="pyyaml")
def missing():
    absent = [package for module, package in wanted.items() if importlib.util.find_spec(module) is None]
    try:  # older ones cannot read our pyproject.toml; torch 2.11 wants no newer
        old = int(importlib.metadata.version("setuptools").split(".")[0]) < 77
    except importlib.metadata.PackageNotFoundError:
        old = True
    return absent + ["setuptools>=77,<82"] * old
if importlib.util.find_spec("torch") is None:
    sys.exit(f"fastgist: VENV=none, but {sys.executable} has no torch; leave VENV=none out and a .venv is made")
import torch
lacking = missing()
if lacking:
    print("fastgist: installing what this environment lacks:", *lacking, flush=True)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as held:
        held.write("torch==" + torch.__version__ + "\n")
        held.flush()
        subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--retries", "0",
            "--timeout", "15", "-c", held.name, *lacking], stderr=subprocess.DEVNULL)
    importlib.invalidate_caches()
    lacking = missing()
if lacking:
    print("fastgist: WARNING: could not be installed, and what needs them cannot run:", *lacking)
print("fastgist: using", sys.executable, "with torch", torch.__version__)
endef
export CHECK_PACKAGES

$(PACKAGES): setup.py pyproject.toml constraints.txt
	$(CHECK_PYTHON)
	$(PY) -c "$$CHECK_PACKAGES"
	mkdir -p $(STAMPS)
	touch $@
else
$(PACKAGES): setup.py pyproject.toml constraints.txt
	$(CHECK_PYTHON)
	if ! [ -x $(PY) ] || ! $(PY) -m pip --version >/dev/null 2>&1; then
	  echo "fastgist: making $(VENV) with $(PYTHON)"
	  $(PYTHON) -m venv $(VENV) || { echo "fastgist: $(PYTHON) cannot make virtual environments (on Debian: apt install python3-venv)" >&2; exit 1; }
	fi
	echo "fastgist: installing packages into $(VENV) (minutes the first time)"
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt setuptools wheel
	FASTGIST_NO_EXT=1 $(PY) -m pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[triton,dev]'
	mkdir -p $(STAMPS)
	touch $@
endif

$(EXTENSION): $(filter-out csrc/tests/%,$(CSRC)) setup.py $(PACKAGES)
	@mkdir -p build
	echo "fastgist: building the extension (half a minute, with CUDA two; log in build/extension.log)"
	if ! $(PY) setup.py build_ext --inplace >build/extension.log 2>&1; then
	  tail -n 30 build/extension.log >&2
	  if [ "$${FASTGIST_REQUIRE_EXT:-0}$${FASTGIST_CUDA:-0}" != 00 ]; then exit 1; fi
	  echo "fastgist: WARNING: the extension could not be built; going on without it" >&2
	fi
	grep -a '^fastgist: ' build/extension.log || true
	$(PY) -c 'from fastgist import _extension as e; m = e.load(); print("fastgist: extension:", m or "loaded, with" + "out" * (not e.has_cuda()) + " CUDA kernels")'
	touch $@

# -- jobs -------------------------------------------------------------------------------------------------------------

demo: setup ## fine-tune on real digits, in under 90 s once set up (ARGS=petal: a Q-Former, two minutes)
	@$(FASTGIST) demo $(ARGS)

studies: setup ## temperature and gist length on digits and on docstrings, paired by seed, into docs/ (half an hour)
	@$(PY) scripts/studies.py --data digits $(ARGS)
	$(PY) scripts/studies.py --data stdlib $(ARGS)

petalstudy: setup ## PETAL's threshold off, static and dynamic on the petal demo's questions, into docs/ (minutes)
	@$(PY) scripts/petal_study.py $(ARGS)

textstudy: setup ## every method on the standard library's docstrings, with and without gist, into docs/ (an hour)
	@$(PY) scripts/text_study.py $(ARGS)

# Four stages, each in its own process; all run, and one that fails fails the target. Logs in build/test/.
test: setup ## everything that runs without a GPU
	@mkdir -p build/test
	status=0; summary=""
	stage() {
	  local name=$$1 verdict=passed start=$$SECONDS; shift
	  echo; echo "== $$name: $$*"
	  "$$@" 2>&1 | tee "build/test/$$name.log" || { verdict=FAILED; status=1; }
	  summary+=$$(printf '%-12s %-7s %4d s  %s' "$$name" "$$verdict" $$((SECONDS - start)) "$$(grep . "build/test/$$name.log" | tail -n 1)")$$'\n'
	}
	spread=""
	if $(PY) -c 'import xdist' 2>/dev/null; then spread="-n $(WORKERS)"; fi
	threads=$$(( $$(getconf _NPROCESSORS_ONLN) / $(WORKERS) )); export OMP_NUM_THREADS=$$(( threads > 0 ? threads : 1 ))
	stage tests $(PY) -m pytest tests --ignore=tests/aot $$spread $(ARGS)
	stage interpreter env TRITON_INTERPRET=1 $(PY) -m pytest tests --ignore=tests/aot -m kernel $$spread $(ARGS)
	stage aot $(PY) -m pytest tests/aot -rs $$spread $(ARGS)
	stage mutants $(PY) scripts/mutants.py --sample $(MUTANTS)
	echo; echo "== summary"; printf '%s' "$$summary"
	exit $$status

bench: setup ## benchmarks on this machine's devices (ARGS=benchmarks/bench_<op>.py: one operation's)
	@$(PY) -m pytest $(if $(filter benchmarks/bench_%,$(ARGS)),,benchmarks) --benchmark-only $(ARGS)

plot: setup ## the figures, from the committed results
	@$(PY) benchmarks/plot.py $(ARGS)
	$(PY) scripts/crossovers.py

# UPDATE=1 compiles what is not of the table's digests, and a sample, and rewrites the table; UPDATE=1 ALL=1 everything.
aot: setup ## compile every kernel for sm_80, sm_90 and sm_100 and check what came out
	@AOT_ALL=$(or $(ALL),$(if $(UPDATE),0,1)) $(PY) -m pytest tests/aot $(ARGS)

mutants: setup ## break every kernel in every listed way; some test must notice
	@$(PY) scripts/mutants.py $(ARGS)

gpu: setup ## everything that needs a GPU, results under benchmarks/results/<gpu>/
	@$(PY) scripts/gpu.py $(ARGS)

lint: setup ## ruff, mypy, clang-format: report only
	@status=0
	$(PY) -m ruff check . || status=1
	$(PY) -m ruff format --check . || status=1
	$(PY) -m mypy || status=1
	$(CLANG_FORMAT) --dry-run -Werror $(CSRC) || status=1
	exit $$status

format: setup ## ruff and clang-format: rewrite
	@$(PY) -m ruff check --fix . || true
	$(PY) -m ruff format .
	$(CLANG_FORMAT) -i $(CSRC)

wheel: setup ## a wheel with the extension, in dist/
	@$(PY) -m build --wheel --no-isolation

clean: ## built files (the environment stays)
	rm -rf build dist fastgist.egg-info fastgist/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis $(EXTENSION)
	find fastgist kernels tests benchmarks scripts -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean ## built files and the environment
	@if [ "$(VENV)" != none ]; then rm -rf "$(VENV)"; fi
