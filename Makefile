# Every command of the project. `make demo` and `make test` set up all they need.
.PHONY: help install demo test test-deep lint check-sglang upstream bench peers soak reasoner thinker card readme docs clean
PYTHON ?= python3
BIN := .venv/bin
# One OpenMP thread: on shared cores more of them decode many times slower.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

help:
	@echo "make install   virtual environment with SGLang and this project"
	@echo "make demo      the main job: a question set solved by stock sampling and by programs, with a picture"
	@echo "make test      all tests"
	@echo "make test-deep 10,000 examples of every property, and more shapes of the kernels"
	@echo "make lint      ruff, pyright, and who may import whom"
	@echo "make check-sglang VERSION=0.5.24   what would break with that SGLang, by its source; nothing is installed"
	@echo "make upstream  SGLang's own tests with the flag and without; any difference fails (some minutes)"
	@echo "make bench     the benchmarks behind the tables of docs/results.md"
	@echo "make peers     what users would pick instead of programs, and programs, on one server (hours; goes on where it was cut)"
	@echo "make soak      15 minutes of overload by clients that misbehave, after which nothing may be left"
	@echo "make reasoner  train the tiny reasoner again (an hour and a quarter on two cores)"
	@echo "make thinker   train the tiny thinker, which goes on from the reasoner (about 20 minutes)"
	@echo "make card      measure the tiny reasoner and write its model card's table"
	@echo "make readme    write what is generated in the docs (results, reference, patch ledger)"
	@echo "make docs      the documentation as a site, in site/; a dead link fails"

install: .venv/installed

.venv/installed: pyproject.toml examples/cpu_platform/pyproject.toml .ci/install.sh
	PYTHON="$(PYTHON)" bash .ci/install.sh
	@touch $@

demo: install
	$(BIN)/sglang-dynasor demo

# As many test processes as cores, each with engines of its own; more than four would want more memory than they save time.
# A process that dies ends the run: the one that would take its place would wait for ever.
PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 4 --max-worker-restart=0

test: install
	$(PYTEST)

test-deep: install
	$(PYTEST) -m "hypothesis or deep" --hypothesis-profile=deep

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

upstream: install
	$(BIN)/python benchmarks/upstream.py

check-sglang: install
	@folder=$$(mktemp -d) && $(BIN)/python -m pip download --quiet --no-deps --dest $$folder "sglang==$(VERSION)" \
	&& $(BIN)/python -m zipfile -e $$folder/sglang-*.whl $$folder && $(BIN)/python -m sglang_dynasor_patches.uses $$folder; \
	code=$$?; rm -r $$folder; exit $$code

bench: install
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[bench]'
	$(BIN)/python benchmarks/bench_self_consistency.py --num-questions 128 --csv benchmarks/results/self_consistency.csv
	$(BIN)/python benchmarks/bench_passthrough.py --csv benchmarks/results/passthrough.csv
	$(BIN)/python benchmarks/bench_online.py --processes poisson --csv benchmarks/results/online --plot docs/online.png
	@# The recorded stream is not in this repository: without it this one fails, and the others go on.
	-$(BIN)/python benchmarks/bench_online.py --processes bursty --rates 0.1 0.2 0.4 0.8 1.6 --ways all \
		--csv benchmarks/results/online_bursty --plot docs/online_bursty.png
	$(BIN)/python benchmarks/bench_statistics.py --num-questions 128 --csv benchmarks/results/statistics.csv
	$(BIN)/python benchmarks/bench_statistics_overhead.py --csv benchmarks/results/statistics_overhead.csv
	$(BIN)/python benchmarks/bench_answer_tokens.py --csv benchmarks/results/answer_tokens.csv
	$(BIN)/python benchmarks/bench_starvation.py --seconds 20 --repeats 2 --csv benchmarks/results/starvation.csv
	$(BIN)/python benchmarks/bench_long_cot.py --num-questions 48 --repeats 2 --csv benchmarks/results/long_cot.csv
	$(BIN)/python benchmarks/bench_chains.py --csv benchmarks/results/chains.csv
	$(BIN)/python benchmarks/bench_algorithms.py --num-questions 48 --csv benchmarks/results/algorithms.csv
	$(BIN)/python benchmarks/bench_kernels.py --csv benchmarks/results/kernels.csv
	$(BIN)/python benchmarks/bench_simulator.py --csv benchmarks/results/simulator.csv
	$(BIN)/python benchmarks/bench_policy_overhead.py --csv benchmarks/results/policy_overhead.csv

peers: install
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[bench]'
	$(BIN)/python benchmarks/bench_peers.py --runs benchmarks/results/peers_runs.jsonl --csv benchmarks/results/peers

soak: install
	$(BIN)/python benchmarks/soak.py --csv benchmarks/results/soak.csv

reasoner: install
	OMP_NUM_THREADS=2 $(BIN)/python examples/tiny_reasoner/train.py --threads 2 --out examples/tiny_reasoner/steps
	OMP_NUM_THREADS=2 $(BIN)/python examples/tiny_reasoner/train.py --threads 2 --plan habits --tokens 2000000 --seed 2 \
		--start examples/tiny_reasoner/steps --state examples/tiny_reasoner/habits_state.pt

thinker: install
	OMP_NUM_THREADS=2 $(BIN)/python examples/tiny_reasoner/train.py --threads 2 --plan thinker --tokens 2400000 \
		--start examples/tiny_reasoner/checkpoint --out examples/tiny_reasoner/thinker --state examples/tiny_reasoner/thinker_state.pt

card: install
	$(BIN)/python examples/tiny_reasoner/card.py

readme: install
	$(BIN)/python -m sglang_dynasor_patches.table
	$(BIN)/python benchmarks/readme.py

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis demo.png site
