# Every target sets up what it needs on a fresh machine.
PYTHON ?= python3
VENV   ?= .venv
RECIPE ?= recipes/small-world.yaml
ARGS   ?=
CODE   := dpo_kit data benchmarks docs .ci
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed

.PHONY: setup train-dpo train-ppo frontier test test-slow lint bench bench-data docs data clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[report,ppo,judge,peft,quantisation,dev]"
	touch $(READY)

# make train-dpo RECIPE=recipes/hh.yaml ARGS="data.train=my.jsonl model.path=my-model"
train-dpo: $(READY)
	$(BIN)/dpo-kit train $(RECIPE) $(ARGS)

# PPO through TRL on the same recipe: the same policy, prompts, measurements and kind of run folder.
train-ppo: $(READY)
	$(BIN)/dpo-kit ppo $(RECIPE) $(ARGS)

# Every method from one policy, on the same pairs and prompts -> runs/frontier. One that was stopped goes on.
# make frontier QUICK=1 is the recipe's quick form.
frontier: RECIPE = recipes/sentiment-small.yaml
frontier: $(READY)
	$(BIN)/dpo-kit frontier $(RECIPE) $(if $(QUICK),--quick) $(ARGS)

# A process for each core, with a thread each: most tests are too small to share one over threads.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

test-slow: $(READY)
	$(BIN)/python -m pytest -m slow

lint: $(READY)
	$(BIN)/ruff check $(CODE) tests
	$(BIN)/ruff format --check $(CODE) tests
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/bandit -q -c pyproject.toml -r $(CODE)
	$(BIN)/python .ci/audit_pins.py constraints.txt

# Speed and memory against TRL on the same work -> benchmarks/results; see benchmarks/README.md.
# The newest TRL has an environment of its own. A run that was cut off goes on; ARGS="--fresh" begins anew.
bench: $(READY) .venv-trl-newest/.installed
	$(BIN)/python benchmarks/suite.py $(ARGS)

.venv-trl-newest/.installed: benchmarks/trl-newest.txt constraints.txt
	$(PYTHON) -m venv .venv-trl-newest
	echo '*' > .venv-trl-newest/.gitignore
	sed '/^trl==/d' constraints.txt > .venv-trl-newest/constraints.txt
	.venv-trl-newest/bin/python -m pip install -q -c .venv-trl-newest/constraints.txt -r benchmarks/trl-newest.txt
	touch $@

# Reading, checking and tokenising a million pairs -> benchmarks/results/data.md; ARGS="--pairs 50000" for fewer.
bench-data: $(READY)
	$(BIN)/python benchmarks/data.py $(ARGS)

# The tables of README.md and docs/ that code knows better: objectives, shapes, combinations, plans.
docs: $(READY)
	$(BIN)/python docs/write_tables.py
	$(BIN)/python docs/plan_one_gpu.py
	$(BIN)/python docs/plan_large_run.py
	$(BIN)/python docs/simulate_dealing.py

data: $(READY)
	$(BIN)/python data/make_small_world.py

clean:
	rm -rf $(VENV) .venv-trl-newest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
