# The two commands of the README, and what they are made of. Every target can be repeated at any time.
SHELL := /bin/bash
VENV ?= .venv
export VENV
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export ANSIBLE_FORCE_COLOR ?= $(if $(MAKE_TERMOUT),1,)
# Progress shows at once through a pipe too: make train | tee log
export PYTHONUNBUFFERED := 1
MINUTES ?= 10
REPEAT ?= 1

.PHONY: help setup lab train test lint unit sanity nodes bench soak docs build clean bundle gpu kernel
help: ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: ## Make the Python environment in .venv
	@tools/setup.sh

lab: setup ## Boot two systemd nodes on this machine
	ansible-playbook playbooks/lab.yml -i inventories/lab

train: lab ## Boot the lab and train a model on it
	ansible-playbook train.yml -i inventories/lab

test: setup ## Run the checks; SUITE="unit lint" for some of them, REPEAT=3 for each three times
	@tools/test.sh --repeat $(REPEAT) $(SUITE)

lint: setup ## ansible-lint, production profile
	ansible-lint --offline
	yamllint --strict .

unit: setup ## Unit tests
	pytest tests/unit

sanity: setup ## ansible-test sanity
	@tools/sanity.sh

build: setup ## Build the collection's tarball in build/
	ansible-galaxy collection build --force --output-path build

bench: setup ## Measure: speed, verification, overhead, recovery (as root; PARTS="nochange scale" for some of them)
	@python tests/bench/bench.py $(PARTS)

soak: setup ## New examples for the unit tests, more cases on nodes, random faults for MINUTES minutes, train.yml killed at 20 random moments (as root)
	HYPOTHESIS_PROFILE=new pytest -q -n 2 tests/unit
	for suite in faults nvidia verify; do pytest -q -m matrix tests/$$suite || exit; done
	python tests/soak.py $(MINUTES)
	python tests/interrupts/soak.py

kernel: setup ## Driver, DKMS, reboots and kernel upgrade in a virtual machine that needs no KVM (as root)
	pytest tests/kernel

docs: setup ## Build the documentation site in build/docs
	@tools/docs.sh

clean: setup ## Remove the lab: nodes, bridge, mounts, firewall table
	ansible-playbook playbooks/lab.yml -i inventories/lab -e lab_state=absent

bundle: setup ## Fetch all that make gpu needs without network, into build/bundle
	@tools/bundle.sh

gpu: ## Run everything on this machine's GPUs (as root): tables, and build/gpu.json
	@tools/gpu.sh
