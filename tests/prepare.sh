#!/usr/bin/env bash
# What the tests and the demo need beside Rust: a C compiler, git, Python with venv, node with npm,
# a PostgreSQL server, pgBackRest, Barman, ssh-keygen, and valgrind. What is missing is installed
# where that is possible (root, or sudo without a password); otherwise the one command that does it
# is named.
set -euo pipefail

say() { printf 'prepare: %s\n' "$*" >&2; }

if ! command -v cargo >/dev/null; then
  say "Rust is missing: install it from https://rustup.rs, then open a new shell"
  exit 1
fi

missing=()
need() { local package=$1; shift; "$@" >/dev/null 2>&1 || missing+=("$package"); }
have() { command -v "$1"; }
# A server of any version, where Debian's packages put it.
server() { compgen -G '/usr/lib/postgresql/*/bin/postgres'; }

need gcc have cc
need libc6-dev test -e /usr/include/stdio.h
need git have git
need python3 have /usr/bin/python3
need python3-venv /usr/bin/python3 -c 'import venv, ensurepip'
need nodejs have node
need npm have npm
need postgresql server
need procps have ps
need pgbackrest have pgbackrest
need barman have barman
need openssh-client have ssh-keygen
need valgrind have valgrind
need ca-certificates test -e /etc/ssl/certs/ca-certificates.crt

# Tests of these say NOT TESTED without them, or fail with LOCKSTEP_REQUIRE_TOOLS=1. They take minutes to
# build, so nothing installs them unasked.
for tool in "sqlx sqlx-cli@0.9.0 postgres,rustls" "diesel diesel_cli@2.3.14 postgres" \
  "s3s-fs s3s-fs@0.14.1 binary"; do
  read -r program crate features <<<"$tool"
  have "$program" >/dev/null ||
    say "not here: $program; cargo install --locked --no-default-features --features $features $crate (diesel: with libpq-dev)"
done

[ ${#missing[@]} -gt 0 ] || exit 0

if [ "$(id -u)" = 0 ]; then
  as_root=()
elif sudo -n true 2>/dev/null; then
  as_root=(sudo -n env)
else
  say "missing: ${missing[*]}"
  say "run this, then try again:  sudo apt-get install -y ${missing[*]}"
  exit 1
fi
if ! command -v apt-get >/dev/null; then
  say "missing: ${missing[*]}; this machine has no apt-get, so install them its own way"
  exit 1
fi

say "installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
apt() {
  "${as_root[@]}" apt-get -qq -o Dpkg::Use-Pty=0 "$@" </dev/null >"$log" 2>&1 && return
  tail -20 "$log" >&2
  say "apt-get $1 failed; the whole log is $log"
  exit 1
}
apt update
if [[ " ${missing[*]} " == *' postgresql '* ]]; then
  # The tests start clusters of their own; the package would make and start one on port 5432.
  apt install -y --no-install-recommends postgresql-common
  "${as_root[@]}" sed -i -E 's/^#?create_main_cluster.*/create_main_cluster = false/' \
    /etc/postgresql-common/createcluster.conf
fi
apt install -y --no-install-recommends "${missing[@]}"
rm "$log"
