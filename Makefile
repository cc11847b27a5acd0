# quickstart  data, training, evaluation, a sample and curves on this machine's CPU, in minutes
# talk        the quickstart's model learns to answer: dialogues, training, answers with base rates, a chat
# translate   names in five languages into each other, from scratch: training, scores beside guessing and looking up
# caption     pictures of letters and their names, from scratch: training, scores with a right and a wrong picture, a sheet
# test        the tests                 check     lint and types
# test-all    with the slow ones        bench     speed, into benchmarks/RESULTS.md
# soak        hours of faults and restarts (cut off, it goes on), and 20,000 steps in one go: campaign.md, soak.md
PYTHON ?= python3
# In the order of tests/conftest.py: two workers begin with Slurm, and wait most of the time, so that there is a third.
PYTEST = .venv/bin/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder
# DS_BUILD_OPS=0: DeepSpeed compiles operators when they are first used, not at installation.
INSTALL = DS_BUILD_OPS=0 .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: quickstart talk translate caption test test-all check bench soak

quickstart: .venv/core
	launch/quickstart.sh

talk: .venv/talk
	launch/talk.sh

translate: .venv/talk
	launch/translate.sh

caption: .venv/core
	launch/caption.sh

test: .venv/dev
	$(PYTEST) -m "not slow"

test-all: .venv/dev
	$(INSTALL) -e ".[eval]"
	$(PYTEST)

check: .venv/dev
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

bench: .venv/dev
	$(INSTALL) -e ".[bench]"
	.venv/bin/python -m benchmarks

soak: .venv/dev
	.venv/bin/python -m tests.campaign --faults 300 --report campaign.md
	.venv/bin/python -m tests.soak --report soak.md
	SOAK_KILLS=20 $(PYTEST) -m slow -k soak

.venv/core: pyproject.toml constraints.txt
	test -x .venv/bin/python || $(PYTHON) -m venv --upgrade-deps .venv
	@echo "installing into .venv; this takes a few minutes"
	$(INSTALL) -e ".[hf]"
	@touch $@

.venv/talk: .venv/core
	$(INSTALL) -e ".[hf,answers,talk]"
	@touch $@

.venv/dev: .venv/core
	$(INSTALL) -e ".[dev,hf,s3,clean,answers,talk,serve,notebook,privacy,tensorboard]"
	@touch $@
