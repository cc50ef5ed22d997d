# make demo   creates .venv, installs, shows one stored model at three targets
# make test   creates .venv, installs, runs the tests but the slow ones
# make test-all   runs the slow tests too
# make wheel-test   builds the wheel, installs it into a fresh environment of the newest Python there is, runs the demo
# make gpu-code   compiles every GPU kernel for five targets and compares with tests/support/gpu_code.json; needs no GPU
# make other-triton   only those under the newest Triton, which both of these install in build/
# make native-test   tests of the C++ code: sanitizers, thread sanitizer, symbols
# make neon-test     the same code for aarch64, under qemu-user
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Where torch comes from; https://download.pytorch.org/whl/cpu saves gigabytes on Linux without a GPU.
TORCH_INDEX ?=
STAMP := $(VENV)/.installed
# The Triton that tests/support/gpu_code.json describes, where torch does not bring one (its CUDA builds do).
TRITON := triton==3.6.0; sys_platform=="linux" and platform_machine=="x86_64"
OTHER_TRITON ?= 3.9.0
OTHER := build/triton-$(OTHER_TRITON)

.PHONY: demo test test-all wheel-test gpu-code other-triton native-test neon-test lint types bench clean

demo: $(STAMP)
	$(BIN)/dpllm demo

test: $(STAMP) $(OTHER)/.installed
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-all: $(STAMP) $(OTHER)/.installed
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m ""

# The wheel as a user gets it: no checkout in sight. torch has no wheel yet for some new Pythons, hence the fallbacks.
WHEEL := build/wheel
wheel-test:
	rm -rf $(WHEEL) && mkdir -p $(WHEEL)
	$(PYTHON) -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir $(WHEEL) .
	for python in python3.13 python3.12 $(PYTHON); do \
		command -v $$python >/dev/null || continue; \
		rm -rf $(WHEEL)/venv && $$python -m venv $(WHEEL)/venv || continue; \
		$(WHEEL)/venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt \
			$(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch && break; \
	done
	$(WHEEL)/venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt $(WHEEL)/*.whl
	cd $(WHEEL) && venv/bin/python --version && venv/bin/dpllm demo --tokens 12 && venv/bin/dpllm generate --bits 3 'import os'

gpu-code: $(STAMP)
	$(BIN)/python tests/support/gpu_code.py --all

# Beside the Triton that torch wants, where there is one for this machine.
$(OTHER)/.installed: $(STAMP)
	mkdir -p $(OTHER)
	case "$$(uname -sm)" in "Linux x86_64") $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target $(OTHER) triton==$(OTHER_TRITON);; esac
	touch $@

other-triton: $(OTHER)/.installed
	$(BIN)/python -m pytest tests/unit/test_other_triton.py

native-test:
	$(PYTHON) tests/native/run.py
	$(PYTHON) tests/native/run.py --sanitize thread
	$(PYTHON) tests/native/run.py --symbols

neon-test:
	$(PYTHON) tests/native/run.py --cross aarch64

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Type checkers follow no import finder, so they get a tree of links shaped like the installed package.
types: $(STAMP)
	rm -rf build/types && mkdir -p build/types/dpllm
	cd build/types/dpllm && ln -s ../../../dpllm/* . && ln -s ../../../calib ../../../kernels ../../../kvzip_bridge ../../../quant .
	$(BIN)/mypy build/types/dpllm

# The one that draws comes last: results are not written from an edited work tree.
bench: $(STAMP)
	$(BIN)/python -m bench.reference_model.reference_quality
	$(BIN)/python -m bench.cpu.quantize_speed
	$(BIN)/python -m bench.cpu.cpu_accuracy
	$(BIN)/python -m bench.cpu.cpu_load
	$(BIN)/python -m bench.cpu.cpu_decode
	$(BIN)/python -m bench.quality.quality_vs_bits --plot docs/quality_vs_bits.png

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("dpllm needs Python 3.10 or newer: make PYTHON=python3.12 ...") if sys.version_info < (3, 10) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/pip install --quiet --disable-pip-version-check '$(TRITON)'
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info
