# Each target sets up what it needs in .venv; only python3 >= 3.11 and make must be there.
#   make demo   ask the bundled model about two pictures
#   make test   run the tests            (ARGS="-k vision" to choose), but for those of the extras:
#   make test-coreml test-swift test-server test-page     (test-swift fetches Debian's Swift, once)
#   make test-coreml-grid  every combination of export's options (about half an hour)
#   make test-long  2,000 generations and 500 requests, memory flat (about half an hour)
#   make test-suites   others' server tests and clients (ARGS="langchain" to choose), from the index
#   make fuzz   try 100,000 spoiled inputs (ARGS="--total 1000 --only pictures")
#   make test-kills  kill every command at every operation on files (ARGS="convert pull")
#   make test-install  build wheel and sdist, install both in empty environments, on every Python here
#   make docs   build the site of the documents in build/site, strictly
#   make check  lint, types, import rules, code figures
#   make format rewrite the sources in the project's format

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check
CODE := mlx_vlm_edge convert benchmarks/mlx_vlm_edge_bench
COREML := tests/convert/coreml tests/examples/test_coreml_answer.py tests/benchmarks/test_coreml_on_mac.py \
	tests/interruption/test_export.py
SWIFT := tests/examples/test_swift.py tests/examples/test_swift_runs.py \
	tests/examples/test_swift_sessions.py tests/examples/test_app_runs.py
PAGE := tests/server/test_page.py
IMAGE ?= examples/images/hello.png examples/images/shapes.png
QUESTION ?= Describe the image.
ARGS ?=

.PHONY: docs test-install demo test test-coreml test-coreml-grid test-swift test-server test-page test-long test-kills fuzz check format clean

demo: $(VENV)/.runtime
	@for image in $(IMAGE); do \
		$(BIN)/mlx-vlm-edge generate --model demo --image $$image --prompt "$(QUESTION)" || exit; \
	done

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(addprefix --ignore=,$(COREML) $(SWIFT) tests/server) $(ARGS)

test-coreml: $(VENV)/.dev
	$(BIN)/python -m pytest $(COREML) $(ARGS)

test-coreml-grid: $(VENV)/.dev
	$(BIN)/python -m tests.convert.coreml.grid.run $(ARGS)

test-swift: $(VENV)/.dev
	tests/examples/swift_toolchain.sh >/dev/null
	$(BIN)/python -m pytest $(SWIFT) $(ARGS)

test-server: $(VENV)/.dev
	$(BIN)/python -m pytest tests/server --ignore=$(PAGE) $(ARGS)

test-page: $(VENV)/.page
	$(BIN)/python -m pytest $(PAGE) $(ARGS)

test-long: $(VENV)/.dev
	MLX_VLM_EDGE_LONG=1 $(BIN)/python -m pytest -s tests/generation/test_long_run.py tests/server/test_soak.py $(ARGS)

test-suites: $(VENV)/.dev
	$(BIN)/python -m tests.server.suites.run $(ARGS)

fuzz: $(VENV)/.dev
	$(BIN)/python -m tests.fuzz $(ARGS)

test-kills: $(VENV)/.dev
	$(BIN)/python -m tests.interruption --all $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tests/tools/code_figures.py --limits $(CODE)

test-install: $(VENV)/.dev
	$(BIN)/python tests/tools/installs.py $(ARGS)

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet -f docs/site/mkdocs.yml

format: $(VENV)/.dev
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python3")'
	@echo "Setting up $(VENV) (once)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.runtime: $(VENV)/.made pyproject.toml
	@echo "Installing mlx-vlm-edge in $(VENV)"
	@$(PIP) install -e .
	@touch $@

# torch goes in first, by its exact version: a wheel on disk is then kept, where a range in some
# dependency would fetch a newer one with gigabytes of CUDA libraries.
$(VENV)/.dev: $(VENV)/.made pyproject.toml
	@echo "Installing mlx-vlm-edge and the reference implementations for the tests in $(VENV)"
	@$(PIP) install $$(sed -n 's/^ *"\(torch==[^"]*\)",/\1/p' pyproject.toml | head -1)
	@$(PIP) install -e '.[dev]'
	@touch $(VENV)/.runtime $@

# The browser itself is the system's: apt-get install chromium.
$(VENV)/.page: $(VENV)/.dev
	@echo "Installing playwright and axe-core in $(VENV)"
	@$(PIP) install 'playwright>=1.45'
	@npm install --silent --no-fund --no-audit --prefix $(VENV)/node axe-core >/dev/null
	@touch $@
