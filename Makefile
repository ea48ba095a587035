# make demo       environment, install, and an answer about a picture
# make test       environment, and every test that always runs
# make test-all   adds parity with torch and transformers, real geometry, and the slow fault tests
# make lint build clean
#
# All of it works in .venv and needs only make, Python 3.11 or newer and a package index.
# PYTHON=... names the Python to use; BACKEND=cuda12 (or cuda13) takes an NVIDIA GPU on Linux.

VENV := .venv
PY := $(VENV)/bin/python
# On macOS MLX comes by itself; on Linux its backend is an extra.
BACKEND ?= $(if $(filter Linux,$(shell uname -s)),cpu)
PICTURE := examples/shapes/pictures/scene.png
QUESTION := How many shapes are there?
# Torch is only the yardstick of the parity tests, so one known version serves.
TORCH := torch==2.13.0

comma := ,
PIP := $(PY) -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-all lint build clean

demo: $(VENV)/.demo-$(BACKEND)
	$(VENV)/bin/mlxvlm chat $(PICTURE) -p "$(QUESTION)"

test: $(VENV)/.dev-$(BACKEND)
	$(PY) -m pytest -m "not slow and not parity"

# With OpenBLAS, where it is installed, MLX's CPU matrix products are many times quicker.
test-all: $(VENV)/.all-$(BACKEND)
	LD_PRELOAD="$$( (ldconfig -p || /sbin/ldconfig -p) 2>/dev/null | \
	  awk '/libopenblas\.so\.0/ { print $$NF; exit }')" $(PY) -m pytest

lint: $(VENV)/.dev-$(BACKEND)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(PY)

build: $(VENV)/.dev-$(BACKEND)
	rm -rf dist
	$(PY) -m build
	$(PY) tests/check_dist.py dist

clean:
	rm -rf $(VENV) dist build .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp says that the environment holds what pyproject.toml asks for, so a second run is quick.
$(VENV)/.demo-$(BACKEND): pyproject.toml | $(PY)
	@echo "Installing mlxvlm into $(VENV); the first time this takes a minute or two."
	$(PIP) -e '.$(if $(BACKEND),[$(BACKEND)])'
	@touch $@

$(VENV)/.dev-$(BACKEND): pyproject.toml | $(PY)
	@echo "Installing mlxvlm and its tools into $(VENV); the first time this takes a minute or two."
	$(PIP) -e '.[$(if $(BACKEND),$(BACKEND)$(comma))dev]'
	@touch $(VENV)/.demo-$(BACKEND) $@

$(VENV)/.all-$(BACKEND): $(VENV)/.dev-$(BACKEND)
	$(PIP) '$(TORCH)'
	@touch $@

$(PY):
	@for python in $(PYTHON) python3.13 python3.12 python3.11 python3.14 python3 python; do \
	  "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	  if [ "$$(uname -s)" = Darwin ] && \
	     [ "$$("$$python" -c 'import platform; print(platform.machine())')" != arm64 ]; then \
	    echo "$$python is not an arm64 Python, which MLX needs: trying another." >&2; continue; \
	  fi; \
	  echo "Making $(VENV) with $$("$$python" --version)."; \
	  "$$python" -m venv $(VENV) && exit 0; \
	  rm -rf $(VENV); \
	  echo "$$python cannot make an environment. On Debian and Ubuntu: apt install python3-venv" >&2; \
	  exit 1; \
	done; \
	echo "No Python 3.11 or newer was found. Install one, or name it: make PYTHON=/path/to/python3" >&2; \
	exit 1
