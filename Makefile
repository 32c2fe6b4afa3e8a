# make demo   train, evaluate, simulate and report on the shipped water data (a few minutes on two cores)
# make test   the test suite (about three minutes on two cores)
# make thorough   further variants of the networks and long paths, which CI runs too (eight minutes)
# make docs   build the site into site/, warnings as errors
# make wheel  build the wheel, install it into an environment of its own, use it
# make campaign  tries to break it: kills, full disks, damaged files, nonsense, sanitizers (half an hour; benchmarks/reliability)
# All set up a virtual environment with pinned versions first.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
export OMP_WAIT_POLICY ?= passive
export MPLBACKEND ?= Agg

.PHONY: demo test thorough lint slow lammps campaign docs tutorials wheel clean

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gossamer needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(VENV)/.ready
	$(BIN)/python demo/run.py

test: export OMP_NUM_THREADS = 1
test: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist worksteal

thorough: export OMP_NUM_THREADS = 1
thorough: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "thorough and not slow and not gpu"

slow: $(VENV)/.ready
	$(BIN)/python -m pytest -m slow

# LAMMPS on several processes against the ASE calculator (one to two minutes)
lammps: export OMP_NUM_THREADS = 1
lammps: $(VENV)/.ready
	$(BIN)/python -m pytest -m slow tests/test_lammps.py

# PARTS="fuzz damage" chooses parts, COUNT their size; results in runs/campaign
campaign: export OMP_NUM_THREADS = 1
campaign: $(VENV)/.ready
	$(BIN)/python benchmarks/reliability/campaign.py $(PARTS) $(if $(COUNT),--count $(COUNT))

docs: export OMP_NUM_THREADS = 1
docs: $(VENV)/.ready
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -c docs -b html . site

# runs the tutorials and writes what they print into their pages (minutes)
tutorials: $(VENV)/.ready
	$(BIN)/python docs/make_tutorials.py

wheel: $(VENV)/.ready
	.ci/wheel $(VENV)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) site demo/run demo/report.html
