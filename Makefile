# The steps of CI, each by its own name. `make ci` runs them all.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.NOTPARALLEL:

CARGO := cargo
LOCKED := --locked
# The product, without the packages that plant faults in it, or reach into what it keeps to itself.
PRODUCT := --workspace --exclude lockstep-counts --exclude lockstep-faults --exclude lockstep-fuzz --exclude lockstep-sim
FAULTY := -p lockstep-counts -p lockstep-faults -p lockstep-fuzz -p lockstep-sim
# Builds the program with the agent's own tests, as this profile; says where it is.
AGENT_TESTS = $(CARGO) test $(LOCKED) $(1) -p lockstep-agent --lib --no-run --message-format json | sed -n 's/.*"executable":"\([^"]*\)".*/\1/p'
# How many seeds `make sim` runs, through the shells and on the pure core.
SEEDS := 2000
CORE_SEEDS := 2000
# How often `make database` kills what migrates.
KILLS := 200
# Parts of `make bench` and `make bench-quick`, such as `fanout real`; none: everything.
PARTS :=
# How long `make fuzz` tries each target; a shell's own variable of that name is its age.
SECONDS := 600
# Stories open a few hundred descriptors; some shells start with 256.
NOFILE := ulimit -n 8192 2>/dev/null || ulimit -n "$$(ulimit -Hn)";

.PHONY: help prepare fmt clippy doc build release agent test rotate deny demo fleet database bench bench-quick counts counts-pin skew redteam chaos sim sim-replay fuzz fuzz-keep ci

help: ## say what there is
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

prepare: ## install, or name, what tests and demo need
	@tests/prepare.sh

fmt: ## the format is rustfmt's
	$(CARGO) fmt --all --check

clippy: ## no warnings
	$(CARGO) clippy $(LOCKED) $(PRODUCT) --all-targets -- -D warnings
	$(CARGO) clippy $(LOCKED) -p lockstep -p lockstep-agent $(FAULTY) --all-targets -- -D warnings

doc: ## the documentation builds, without broken links
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc $(LOCKED) --workspace --no-deps --document-private-items

build: prepare ## the binaries that stories run
	$(CARGO) build $(LOCKED) $(PRODUCT) --bins

release: prepare ## the binaries that users run
	$(CARGO) build $(LOCKED) --release $(PRODUCT) --bins

agent: ## the agent as hosts get it, small: target/agent/lockstep-agent
	$(CARGO) build $(LOCKED) --profile agent -p lockstep-agent

test: build ## unit, property, golden and whole-process tests, and the documentation's examples
	@$(NOFILE)
	if $(CARGO) nextest --version >/dev/null 2>&1; then
		$(CARGO) nextest run $(LOCKED) $(PRODUCT) --no-tests=warn
	else
		$(CARGO) test $(LOCKED) $(PRODUCT) --lib --bins --tests -- --test-threads=2
	fi
	$(CARGO) test $(LOCKED) $(PRODUCT) --doc
	if [ "$$(id -u)" = 0 ]; then
		$(CARGO) test $(LOCKED) $(PRODUCT) --lib -- --ignored twelve_sabotages
	else
		echo "test: the sabotaged backups were left out, for they mount a volume and want root" >&2
	fi
	# Samples of what `make sim`, `make chaos` and `make fuzz` do in full; built apart, for the faults
	# in them.
	$(CARGO) build $(LOCKED) $(FAULTY) --bins
	if $(CARGO) nextest --version >/dev/null 2>&1; then
		$(CARGO) nextest run $(LOCKED) $(FAULTY)
	else
		$(CARGO) test $(LOCKED) $(FAULTY) -- --test-threads=2
	fi

rotate: build ## 300 renewals of hosts' certificates while rollouts run; some minutes
	@$(NOFILE)
	$(CARGO) test $(LOCKED) -p lockstep-tests --test enrol -- --ignored --nocapture

deny: ## licences, sources, advisories and banned crates
	@if $(CARGO) deny --version >/dev/null 2>&1; then
		$(CARGO) deny $(LOCKED) check
	else
		echo "deny: cargo-deny is not installed, so nothing was checked (cargo install --locked cargo-deny)" >&2
	fi

demo: build ## a whole rollout before your eyes: v1.0.0 goes out, v1.1.0 comes back
	@$(NOFILE)
	target/debug/demo

fleet: release ## the same on real systemd hosts, and faults of such hosts; needs root
	@$(NOFILE)
	# The tests that need a systemd of their own run on the fleet's hosts.
	tests=$$($(call AGENT_TESTS,))
	LOCKSTEP_AGENT_TESTS=$$tests target/release/fleet

# Each part leaves its figures in target/reports/database/, and the last one sums them up. One after
# another, and with a release build, for the backup's benchmark measures time.
DATABASE_PARTS := twelve_sabotages whatever_is_killed rollbacks:: a_step_costs_hardly_more
database: build ## backups, kills of migrations, ways back, a gigabyte: target/reports/database.json; an hour; needs root
	@$(NOFILE)
	rm -rf target/reports/database target/reports/database.json
	mkdir -p target/reports/database
	export LOCKSTEP_DATABASE_REPORT_DIR=$(CURDIR)/target/reports/database LOCKSTEP_KILLS=$(KILLS)
	failed=0
	for part in $(DATABASE_PARTS); do
		$(CARGO) test $(LOCKED) --release -p lockstep-agent --lib -- --include-ignored --nocapture "$$part" || failed=1
	done
	target/debug/database || failed=1
	exit $$failed

bench: release agent ## fleets of up to 10,000 simulated agents beside a bare baseline: target/reports/bench.json
	@tests=$$($(call AGENT_TESTS,--release))
	LOCKSTEP_AGENT_TESTS=$$tests target/release/bench $(PARTS)

bench-quick: release agent ## the same with up to 1,000, for every day
	@tests=$(if $(findstring backup,$(PARTS)),$$($(call AGENT_TESTS,--release)))
	LOCKSTEP_AGENT_TESTS=$$tests target/release/bench quick $(PARTS)

COUNTS := $(CARGO) run $(LOCKED) --profile counts -p lockstep-counts
counts: prepare ## instructions that hot paths take, held against the pinned ones
	@$(COUNTS)

counts-pin: prepare ## pin what they take now: tests/counts/pinned.json
	@$(COUNTS) -- pin

skew: build ## the same with the previous release on one side, or on some hosts (tests/previous)
	@$(NOFILE)
	target/debug/skew

redteam: build ## a stolen controller, a hostile host, hostile load: target/reports/redteam.json
	@$(NOFILE)
	rm -f target/reports/redteam.json
	target/debug/redteam

chaos: prepare ## kills at every write of both sides: target/reports/chaos.json; up to an hour
	@$(NOFILE)
	rm -f target/reports/chaos.json
	$(CARGO) build $(LOCKED) -p lockstep-tests --bin lockstep-reaper
	$(CARGO) build $(LOCKED) -p lockstep-faults --bins
	target/debug/chaos

sim: ## seeds of everything in one thread, under faults; planted ones are found: target/reports/sim.json
	@mkdir -p target/reports
	rm -f target/reports/{core,sim}.json
	LOCKSTEP_SEEDS=0..$(CORE_SEEDS) LOCKSTEP_SEEDS_RAN=$(CURDIR)/target/reports/core.json \
		$(CARGO) test $(LOCKED) --profile sim -p lockstep-core --test cluster -- range_of_seeds
	$(CARGO) build $(LOCKED) --profile sim -p lockstep-sim
	target/sim/sim run --seeds $(SEEDS) --core target/reports/core.json --report target/reports/sim.json

sim-replay: ## one seed again, event by event: SEED=7 [WITHOUT=1,2] [PLANTED=UndoTwice]
	@$(CARGO) build $(LOCKED) --profile sim -p lockstep-sim
	target/sim/sim replay $(SEED) $(if $(WITHOUT),--without $(WITHOUT)) $(if $(PLANTED),--planted $(PLANTED)) $(if $(STEP),--step)

fuzz: ## every parser that meets bytes from elsewhere, SECONDS=600 each: [TARGETS="plan policy"]
	@tests/fuzz/run.sh $(SECONDS) $(TARGETS)

fuzz-keep: ## choose the inputs that reach most, of those that `make fuzz` found: tests/fuzz/corpus
	@tests/fuzz/run.sh keep $(TARGETS)

ci: fmt clippy doc test counts deny demo fleet ## everything
