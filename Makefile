# Every command sets up .venv first when it is missing or stale (scripts/setup).
# On a machine with a GPU: make demo ACCELERATOR=gpu, and so on.

SHELL := bash
PYTHON := .venv/bin/python
# Exported so that scripts/setup sees it however it is given.
export ACCELERATOR ?= cpu
# What is imported is compiled once: a trainer that compiles torch and transformers anew starts 15 s later.
unexport PYTHONDONTWRITEBYTECODE
# The base model where neither CONFIG nor the environment names one: the demo's, built when missing.
demo_model = $(if $(CONFIG)$(THUMBLOOP_$(1)_MODEL__PATH),,model=$$($(PYTHON) -m demo.base_model) && export THUMBLOOP_$(1)_MODEL__PATH="$$model" &&)

.PHONY: demo test check serve train web observe loadtest bench bench-learning soak protos dashboard alerts lock setup packages prometheus clean
.DEFAULT_GOAL := demo

# Builds the base model, then learns from simulated users while serving them: a table in the
# terminal, runs/demo/report.json and runs/demo/learning.png.
# PREFERENCE=module:function SEED=0 ROUNDS=6 MINUTES=8 SHUFFLE_THUMBS=1 MODEL=folder-or-hub-id
demo: setup
	$(PYTHON) -m demo $(if $(PREFERENCE),--preference '$(PREFERENCE)') $(if $(SEED),--seed '$(SEED)') \
	  $(if $(ROUNDS),--rounds '$(ROUNDS)') \
	  $(if $(MINUTES),--max-minutes '$(MINUTES)') $(if $(filter-out 0,$(SHUFFLE_THUMBS)),--shuffle-thumbs) $(if $(MODEL),--model '$(MODEL)')

# All tests; those of tests/gpu with ACCELERATOR=gpu only. TESTS=tests/trainer runs a part.
# One process a core, one thread each; then, alone, those whose engines take all cores.
pytest = $(PYTHON) -m pytest $(if $(filter cpu,$(ACCELERATOR)),-m 'not gpu')
test: setup packages
ifdef TESTS
	$(pytest) $(TESTS)
else
	OMP_NUM_THREADS=1 $(pytest) -n logical --dist loadfile --ignore tests/end_to_end
	$(PYTHON) -m demo.base_model # minutes, which no test's time limit should count
	$(pytest) tests/end_to_end
endif

# Lint, types, imports, protos, and whether stubs and locks are what they are made from.
check: setup
	@scripts/check

# Serves on 127.0.0.1:50051. CONFIG=server.yaml
serve: setup
	$(call demo_model,SERVER) exec $(PYTHON) -m server $(if $(CONFIG),--config '$(CONFIG)')

# Learns from what the server stored. CONFIG=trainer.yaml
train: setup
	$(call demo_model,TRAINER) exec $(PYTHON) -m trainer $(if $(CONFIG),--config '$(CONFIG)')

# The page for raters, beside a demo or a server that runs here: http://127.0.0.1:7860
# ADDRESS=127.0.0.1:50051 METRICS=127.0.0.1:9464 PORT=7860; without ADDRESS that of runs/demo, or this. Tokens and TLS: as loadtest.
web: setup
	exec $(PYTHON) -m web $(if $(ADDRESS),--address '$(ADDRESS)') $(if $(METRICS),--metrics '$(METRICS)') $(if $(PORT),--port '$(PORT)')

# Prometheus, with our alerts, beside a demo or a server and a trainer that run here: http://127.0.0.1:9090
# SERVER=127.0.0.1:9464 TRAINER=127.0.0.1:9465 PORT=9090; without SERVER and TRAINER those of runs/demo, or these.
observe: setup prometheus
	exec $(PYTHON) -m deploy.observe $(if $(SERVER),--server '$(SERVER)') $(if $(TRAINER),--trainer '$(TRAINER)') $(if $(PORT),--port '$(PORT)')

# Calls at random moments against a server that runs: runs/loadtest holds the latencies.
# ADDRESS=127.0.0.1:50051 RATE=4 DURATION=30 MIX=none=3,soft_best_of_n:4=1 DEADLINE=60 SWAPS=0.2 STATE=state PROMPTS=file
# With tokens or TLS: THUMBLOOP_TOKEN, THUMBLOOP_CA, THUMBLOOP_CERT and THUMBLOOP_KEY, THUMBLOOP_TLS=1.
loadtest: setup
	$(PYTHON) -m loadtest $(if $(ADDRESS),--address '$(ADDRESS)') $(if $(RATE),--rate '$(RATE)') $(if $(DURATION),--duration '$(DURATION)') \
	  $(if $(MIX),--mix '$(MIX)') $(if $(DEADLINE),--deadline '$(DEADLINE)') $(if $(SWAPS),--swaps '$(SWAPS)') $(if $(STATE),--state '$(STATE)') $(if $(PROMPTS),--prompts '$(PROMPTS)')

# Our server beside vLLM's own and two hand-wired rerankers: runs/bench/serving.json, docs/benchmarks.md.
# DTYPE=float32 PART=lora SEED=0 REPEATS=5; without DTYPE and PART everything, in an hour or so. Other
# parts stay as they were measured last.
bench: setup
	$(PYTHON) -m loadtest.bench $(foreach d,$(DTYPE),--dtype '$(d)') $(foreach p,$(PART),--part '$(p)') \
	  $(if $(SEED),--seed '$(SEED)') $(if $(REPEATS),--repeats '$(REPEATS)')

# Swaps and kill -9 of server, engine and trainer under load, whose callers' notes a judge reads; then trials of versions and an
# attack, simulated. Four hours or so: runs/soak/report.json. PART=swaps SWAPS=1000 REQUESTS=10000 APART=250 ROLLBACKS=25 KILLS=200 SEED=0
soak: setup
	$(PYTHON) -m loadtest.soak $(foreach p,$(PART),--part '$(p)') $(if $(SWAPS),--swaps '$(SWAPS)') \
	  $(if $(REQUESTS),--requests '$(REQUESTS)') $(if $(APART),--apart '$(APART)') $(if $(ROLLBACKS),--rollbacks '$(ROLLBACKS)') $(if $(KILLS),--kills '$(KILLS)') $(if $(SEED),--seed '$(SEED)')

# Our learning beside TRL's trainers, in environments of their own, and beside our first one: runs/bench/learning.json,
# docs/benchmarks.md. PART=step SEED=0 REPEATS=5; without PART everything. Other parts stay as they were measured last.
bench-learning: setup
	$(PYTHON) -m loadtest.learning $(foreach p,$(PART),--part '$(p)') \
	  $(if $(SEED),--seed '$(SEED)') $(if $(REPEATS),--repeats '$(REPEATS)')

# Regenerates thumbloop/v1 from protos/.
protos: setup
	scripts/protos

# Regenerates deploy/grafana/thumbloop.json from deploy/panels.py.
dashboard: setup
	scripts/dashboard

# Regenerates deploy/kubernetes/monitoring/alerts.yaml from deploy/prometheus/rules.yml.
alerts: setup
	scripts/alerts

# Recompiles locks/ from pyproject.toml; UPGRADE=1 takes newer versions.
lock: setup
	scripts/lock $(if $(UPGRADE),--upgrade)

setup:
	@scripts/setup

# Debian's packages that tests need, where their commands are missing.
packages:
	@scripts/packages prometheus postgresql chromium kubernetes-client

prometheus:
	@scripts/packages prometheus

# Removes what can be made again; leaves state/ and runs/ alone.
clean:
	rm -rf .venv .cache build dist .*_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -exec rm -rf {} +
