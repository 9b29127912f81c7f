# Every target is one line that calls a program; `make help` lists them.
SHELL := /bin/bash
GO    ?= go
# sudo's own PATH has neither go nor, for a test that is not started by it, sbin.
SUDO  := $(if $(filter 0,$(shell id -u)),,sudo -E env "PATH=$(PATH):/usr/sbin:/sbin")
LAB   := bin/tkelab

.DEFAULT_GOAL := help
# The tiers share bin/ and the processors: one after the other, also with -j.
.NOTPARALLEL:
.PHONY: help setup build demo down test test-unit test-kernel test-node check vuln fmt bench bench-boot bench-eni bench-disk campaign-boot campaign-eni campaign-disk sweep-disk clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

setup: ## install what the other targets need (Debian packages; asks for root only if some are missing)
	@packaging/setup

build: ## build the binaries into bin/
	@packaging/watch 'compile tkelab, tkenode, tke-disk, tke-eni' env CGO_ENABLED=0 $(GO) build -v -trimpath -buildvcs=false -ldflags='-s -w' -o bin/ ./cmd/...

demo: setup build ## launch a node in the lab and run a pod on it
	@$(LAB) demo

down: ## stop the lab that demo left running
	@if [ -x $(LAB) ]; then $(LAB) down; else echo "no $(LAB), so no lab of this checkout runs"; fi

test: setup build test-unit test-kernel test-node ## all three tiers

test-unit: ## pure code, goldens, fuzz seeds; no root
	$(GO) test -race ./...

test-kernel: setup build ## network namespaces, loop devices, real mkfs, the node's containerd; root
	@$(LAB) build
	@$(if $(SUDO),sudo -v &&) true # the password is asked for before the tests compile
	TKENODE_CACHE="$${TKENODE_CACHE:-$${XDG_CACHE_HOME:-$$HOME/.cache}/tkenode}" TKE_ENI='$(CURDIR)/bin/tke-eni' $(GO) test -tags kernel -count=1 -run '^TestKernel' -exec '$(SUDO)' ./...

test-node: setup build ## the shipped image in a virtual machine, with a real control plane
	@$(LAB) build
	$(GO) test -tags node -count=1 -p 1 -timeout 80m -run '^TestNode' ./...

check: ## what CI checks before the tests: format, vet, lint, units
	@packaging/check

vuln: ## known vulnerabilities of what we import (asks the Go vulnerability database)
	$(GO) tool govulncheck ./...

fmt: ## format the code
	gofmt -w $$(git ls-files '*.go')

bench: bench-boot bench-eni bench-disk ## every benchmark

bench-boot: setup build ## power-on to Ready against a hand-written node, in pairs
	@$(LAB) bench boot

bench-eni: setup build ## ADD, DEL and round trips of pods against ptp and host-local, in network namespaces; root
	cd lab/bench/peer && CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -ldflags='-s -w' -o ../../../bin/peer/ tool
	@$(SUDO) $(LAB) bench eni

bench-disk: setup build ## a new disk, from attached to mounted, against mount-utils; a formatted one, from uevent to mounted; root
	cd lab/bench/mountutils && CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -ldflags='-s -w' -o ../../../bin/peer/mountutils .
	@$(SUDO) $(LAB) bench disk

campaign-eni: setup build ## break the network of pods at random, by a seed (SEED=1); goes on where it was interrupted; root
	@mkdir -p out
	TKE_ENI='$(CURDIR)/bin/tke-eni' $(GO) test -tags kernel -count=1 -timeout 2h -run '^TestKernelCampaign' -exec '$(SUDO)' ./agent/eni/ \
		-campaign $(CURDIR)/out/campaign-eni.jsonl -seed $(or $(SEED),1) -commit $$(git rev-parse --short HEAD)
	@cat out/campaign-eni.jsonl
	@$(LAB) build
	$(GO) test -tags node -count=1 -v -timeout 1h -run '^TestNodeNetwork$$' ./lab/ -whole

campaign-disk: setup build ## break disks, their content and the agent at random, by a seed (SEED=1); goes on where it was interrupted; root
	@mkdir -p out
	$(GO) test -tags kernel -count=1 -timeout 2h -run '^TestKernelCampaign' -exec '$(SUDO)' ./agent/disk/ \
		-campaign $(CURDIR)/out/campaign-disk.jsonl -seed $(or $(SEED),1) -commit $$(git rev-parse --short HEAD)
	@$(LAB) build
	$(GO) test -tags node -count=1 -timeout 2h -run '^Test(Campaign|Node)Disk' ./lab/ -whole \
		-campaign $(CURDIR)/out/campaign-disk.jsonl -seed $(or $(SEED),1) -commit $$(git rev-parse --short HEAD)

campaign-boot: setup build ## boot nodes with everything that they cannot become a node with
	@$(LAB) build
	$(GO) test -tags node -count=1 -v -timeout 1h -run '^TestNodeBadInput$$' ./lab/ -whole

sweep-disk: ## make every read of 34 kinds of disks fail, for us and for mount-utils, and count who would format them; at most 10 min
	@packaging/setup debian-packages debian-packages-sweep
	cd lab/bench/mountutils && CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false -ldflags='-s -w' -o ../../../bin/peer/mountutils .
	$(GO) test -tags sweep -count=1 -v -timeout 10m -run '^TestSweep$$' ./agent/disk/ -peer $(CURDIR)/bin/peer/mountutils

clean: down ## stop the lab and remove what was built here (the cache stays: ~/.cache/tkenode)
	rm -rf bin out
