# `make demo` shows the agent at work, and `make test` runs the tests. Both do all set-up by themselves.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := rating_agent_hep.py setup.py scripts tests

# The profiles of docker-compose.yaml say what runs in Docker.
COMPOSE := docker compose
ALL_PROFILES := $(addprefix --profile ,cluster opensips kamailio tester canyan statsd)
SCENARIO := /scenarios/test_

.PHONY: demo demo-cluster run test test-fast chaos bench fuzz soak lint format docs clean sip-servers \
  browser redis-server test-opensips docker-start-cluster \
  test-kamailio test-images \
  docker-build docker-pull docker-start docker-start-opensips docker-start-kamailio \
  docker-start-canyan docker-start-statsd docker-test-opensips docker-test-kamailio docker-test \
  docker-logs docker-stop docker-clean

demo: $(VENV)/.runs
	@$(BIN)/python scripts/demo.py

# Redis, three agents and a kill.
demo-cluster: $(VENV)/.runs redis-server
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[cluster]'
	@$(BIN)/python scripts/demo_cluster.py

run: $(VENV)/.runs
	@$(BIN)/python scripts/demo.py --stay

# Files side by side, on more workers than a small machine has cores: the long ones mostly wait.
WORKERS := 4
test: lint sip-servers browser redis-server
	$(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder --durations=5

# While editing: the pure rooms, which are HEP, SIP, routes, calls, call table and outbox; some 30 s.
PURE := hep sip torture routes calls rules outbox layers
test-fast: $(VENV)/.tests
	$(BIN)/python -m pytest --numprocesses=2 --dist=loadfile $(PURE:%=tests/test_%.py)

# This runs ten times as many kills and restarts of tests/test_crash.py and tests/test_sockets.py, which
# takes some ten minutes, and those of tests/test_cluster.py, which takes half an hour.
chaos: $(VENV)/.tests
	CHAOS=10 $(BIN)/python -m pytest -rP tests/test_crash.py tests/test_sockets.py tests/test_cluster.py

# This takes ten minutes and feeds inputs that no server would send. FUZZ=--seed=7 makes other inputs.
FUZZ := --seconds 600 --processes 2
fuzz: $(VENV)/.tests
	$(BIN)/python scripts/fuzz.py $(FUZZ)

# This takes ten minutes at 300 calls a second, with lost, late and broken packets and a bad API.
SOAK := --seconds 600 --rate 300
soak: $(VENV)/.tests
	$(BIN)/python scripts/soak.py $(SOAK)

# This measures the figures of docs/performance.md. It takes half an hour, on two cores with
# nothing else to do.
bench: $(VENV)/.runs
	$(BIN)/python scripts/benchmark.py

# This installs Kamailio, SIPp and tcpdump if packages can be installed. Otherwise the tests say
# what they skip.
sip-servers:
	@sh scripts/install_for_tests.sh "Kamailio, SIPp, ip and tcpdump" "kamailio sipp ip tcpdump" \
	  "kamailio sip-tester iproute2 tcpdump"

# This installs Redis and nginx for the tests of several agents, in the same way.
redis-server:
	@sh scripts/install_for_tests.sh "Redis and nginx" "redis-server nginx" \
	  "redis-server nginx-light libnginx-mod-stream"

# This installs Chromium for the test of the status page, in the same way.
browser:
	@sh scripts/install_for_tests.sh Chromium chromium chromium

# test-opensips runs the OpenSIPS scenario with OpenSIPS' recorded mirror. test-kamailio runs all
# scenarios with a real Kamailio.
test-opensips: $(VENV)/.tests
	$(BIN)/python -m pytest tests/test_scenarios.py -k opensips_scenario

test-kamailio: $(VENV)/.tests sip-servers
	$(BIN)/python -m pytest tests/test_scenarios.py -k "kamailio or every_call or both_ways or proxy or mirror"

# Buildah builds the images of the Dockerfile, and the services of the compose file run in them.
test-images: $(VENV)/.runs
	@sh scripts/install_for_tests.sh "Buildah and debootstrap" "buildah debootstrap ip" \
	  "buildah debootstrap iproute2"
	@$(BIN)/python scripts/test_images.py

lint: $(VENV)/.tests
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy rating_agent_hep.py scripts

format: $(VENV)/.tests
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# This writes the options table of docs/configuration.md from the module.
docs: $(VENV)/.runs
	$(BIN)/python scripts/options_table.py docs/configuration.md

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

docker-build:
	$(COMPOSE) $(ALL_PROFILES) build

docker-pull:
	$(COMPOSE) $(ALL_PROFILES) pull --ignore-buildable

docker-start:
	$(COMPOSE) up --detach --build

docker-start-opensips:
	$(COMPOSE) --profile opensips up --detach --build

docker-start-kamailio:
	$(COMPOSE) --profile kamailio up --detach --build

docker-start-canyan:
	RATING_API_URL=http://rating-agent:8000 $(COMPOSE) --profile canyan up --detach --build

# Without the agent that works alone. The balancer needs the two agents, and these need Redis.
docker-start-cluster:
	$(COMPOSE) --profile cluster up --detach --build balancer sandbox

docker-start-statsd:
	STATSD_HOST=statsd-exporter $(COMPOSE) --profile statsd up --detach --build

docker-test-opensips:
	$(COMPOSE) run --rm --build tester $(SCENARIO)opensips_call.yaml --target opensips:5060

docker-test-kamailio:
	$(COMPOSE) run --rm --build tester $(SCENARIO)kamailio_call.yaml --target kamailio:5060

# This runs all scenarios through OpenSIPS or Kamailio, whichever of the two runs.
docker-test:
	@server=$$($(COMPOSE) $(ALL_PROFILES) ps --services --status running | grep -Ex 'opensips|kamailio' \
	  | head -n 1); \
	[ -n "$$server" ] || { echo "first: make docker-start-opensips or docker-start-kamailio"; exit 1; }; \
	$(COMPOSE) run --rm --build tester $(addprefix /scenarios/,$(notdir $(wildcard tests/scenarios/test_*.yaml))) \
	  --target "$$server:5060"

docker-logs:
	$(COMPOSE) $(ALL_PROFILES) ps --all
	$(COMPOSE) $(ALL_PROFILES) logs

# This keeps the volumes, because events may wait in the journal.
docker-stop:
	$(COMPOSE) $(ALL_PROFILES) down

# After this the next start has an empty sandbox and an empty journal.
docker-clean:
	$(COMPOSE) $(ALL_PROFILES) down --volumes

# In Debian and Ubuntu, venv is in a package of its own.
$(BIN)/python:
	@$(PYTHON) -m venv $(VENV) 2>/dev/null || { \
	  rm -rf $(VENV); \
	  echo "python3-venv is missing, installing it"; \
	  if [ "$$(id -u)" = 0 ]; then SUDO=; else SUDO=sudo; fi; \
	  $$SUDO apt-get update -qq && $$SUDO apt-get install -qq -y python3-venv >/dev/null && \
	  $(PYTHON) -m venv $(VENV); }

$(VENV)/.runs: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[sandbox]'
	@touch $@

$(VENV)/.tests: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[sandbox,test]'
	@touch $@ $(VENV)/.runs
