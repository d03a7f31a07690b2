#!/usr/bin/env bash
# Fuzzes targets of lockstep-fuzz, one after the other, and keeps what it learns outside of git:
#
#   tests/fuzz/run.sh SECONDS [TARGET...]
#
# target/fuzz/corpus/TARGET grows; target/fuzz/found holds inputs that break a promise; the figures
# are in target/reports/fuzz.txt. With `keep` in place of SECONDS the inputs that reach something new
# are chosen anew, and kept in tests/fuzz/corpus.
set -euo pipefail
cd "$(dirname "$0")/../.."

say() { printf 'fuzz: %s\n' "$*" >&2; }

toolchain=${FUZZ_TOOLCHAIN:-nightly}
missing=
if ! rustc "+$toolchain" --version >/dev/null 2>&1; then
  say "the $toolchain compiler is missing: rustup toolchain install $toolchain"
  missing=1
fi
if ! cargo fuzz --version >/dev/null 2>&1; then
  say "cargo-fuzz is missing: cargo install --locked cargo-fuzz"
  missing=1
fi
if ! command -v c++ >/dev/null; then
  say "a C++ compiler is missing: apt-get install g++"
  missing=1
fi
[ -z "$missing" ] || exit 1

how=${1:?seconds for each target, or keep}
shift
work=$PWD/target/fuzz
host=$(rustc "+$toolchain" -vV | sed -n 's/^host: //p')
fuzzer=tests/fuzz/libfuzzer/target/$host/release/lockstep
# No sanitiser: there is no unsafe code of our own to watch, and so more is tried.
cargo "+$toolchain" fuzz build --fuzz-dir tests/fuzz/libfuzzer --sanitizer none \
  --debug-assertions lockstep

mapfile -t all < <(sed -n 's/^    "\([a-z_]*\)" [a-z_:]*, \([0-9]*\), .*/\1 \2/p' tests/fuzz/src/lib.rs)
[ ${#all[@]} -gt 0 ] || { say "there are no targets in tests/fuzz/src/lib.rs"; exit 1; }

# Inputs that were found broken stay; of those that reach something new, up to 150 of all sizes.
keep() {
  local chosen every=1 number sum
  chosen=$(mktemp -d)
  "$fuzzer" -merge=1 -max_len="$max_len" "$chosen" "$kept" "$grown" >"$work/logs/$target-merge" 2>&1
  find "$kept" -type f ! -name 'found-*' -delete
  find "$chosen" -type f -size -16385c -printf '%s %p\n' | sort -n >"$work/logs/$target-chosen"
  while read -r number sum < <(awk -v every="$every" \
    'NR % every == 0 { number++; sum += $1 } END { print number + 0, sum + 0 }' \
    "$work/logs/$target-chosen") && ((number > 150 || sum > 131072)); do
    every=$((every + 1))
  done
  awk -v every="$every" 'NR % every == 0 { print $2 }' "$work/logs/$target-chosen" |
    xargs -r cp -t "$kept"
  rm -r "$chosen"
  say "$target: $(find "$kept" -type f | wc -l) inputs"
}

failed=()
mkdir -p "$work/found" "$work/logs" target/reports
for row in "${all[@]}"; do
  read -r target max_len <<<"$row"
  if [ $# -gt 0 ] && [[ " $* " != *" $target "* ]]; then continue; fi
  kept=tests/fuzz/corpus/$target
  grown=$work/corpus/$target
  mkdir -p "$kept" "$grown"
  export LOCKSTEP_FUZZ=$target
  if [ "$how" = keep ]; then
    keep
    continue
  fi
  log=$work/logs/$target
  say "$target for $how s"
  # A gigabyte and 25 s are far more than any input may take, also on a machine that is busy.
  if ! "$fuzzer" -max_total_time="$how" -max_len="$max_len" -rss_limit_mb=1024 -timeout=25 \
    -print_final_stats=1 -artifact_prefix="$work/found/$target-" "$grown" "$kept" >"$log" 2>&1; then
    failed+=("$target")
    grep -a -m1 -A2 'panicked at\|ERROR:' "$log" >&2 || tail -5 "$log" >&2
  fi
  runs=$(sed -n 's/^stat::number_of_executed_units: //p' "$log")
  rss=$(sed -n 's/^stat::peak_rss_mb: //p' "$log")
  read -r cov ft corp < <(grep -a -o 'cov: [0-9]* ft: [0-9]* corp: [0-9]*' "$log" | tail -1 | tr -dc '0-9 \n')
  printf '%-20s %5s s %12s runs  cov %6s  features %7s  corpus %6s  peak %5s MiB\n' "$target" "$how" \
    "$runs" "$cov" "$ft" "$corp" "$rss" | tee -a target/reports/fuzz.txt
done
if [ ${#failed[@]} -gt 0 ]; then
  say "broken by ${failed[*]}: the inputs are in target/fuzz/found"
  exit 1
fi
