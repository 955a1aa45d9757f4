# The two commands of the README are "make test" and "make demo". Both install what they need: internal/setup.
export CGO_ENABLED := 0
export CACHE ?= $(CURDIR)/.cache
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
# Signatures of OCI images by OpenPGP, without a library in C: see repo/oci/transport.
TAGS := containers_image_openpgp
GOFLAGS_BUILD := -tags $(TAGS) -trimpath -ldflags '-s -w -X main.version=$(VERSION)'

.PHONY: build test setup demo bench interop fuzz race clean

build:
	@mkdir -p bin
	go build $(GOFLAGS_BUILD) -o bin/composefs-setup-root ./cmd/composefs-setup-root
	go build $(GOFLAGS_BUILD) -o bin/composefs-boot ./cmd/composefs-boot

setup: build
	internal/setup packages peers ukify ostree kernels systems

test: setup
	go vet ./...
	go vet -tags $(TAGS) ./...
	go test -tags $(TAGS) -timeout 30m ./...

demo: build
	internal/setup packages
	examples/demo

# The table is examples/bench/results.txt, the drawings are beside it. cfsctl takes part if "make interop" has built it.
bench: setup
	internal/setup rivals
	go test -tags bench -count 1 -run TestBench -v -timeout 30m ./cmd/composefs-boot
	cd examples/bench && go run ./plot

# The tools of composefs-rs are built from their crates, which takes about ten minutes.
interop: setup
	cargo install --quiet --root $(CACHE)/cargo composefs-ctl@0.9.4 composefs-setup-root@0.9.4
	go test -tags interop -run TestInterop -v -timeout 30m ./cmd/composefs-boot ./boot/setuproot ./repo/oci ./repo/ostree

FUZZTIME ?= 60s
fuzz:
	for p in repo/dumpfile repo/erofs repo/splitstream repo/oci repo/ostree repo/ostree/gvariant boot/karg boot/setuproot boot/pid1 boot/initrd bls uki uki/secureboot; do \
		for f in $$(go test -list '^Fuzz' ./$$p | grep ^Fuzz); do \
			go test -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 5x ./$$p || exit 1; \
		done; \
	done

# The race detector needs cgo, and with it a C compiler.
race: setup
	CGO_ENABLED=1 go test -tags $(TAGS),exclude_graphdriver_btrfs -race -timeout 60m ./repo/... ./boot/... ./cmd/composefs-boot

clean:
	rm -rf bin .cache
