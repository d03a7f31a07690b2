#!/usr/bin/env bash
# Real systemd hosts on one machine: each host is a container that runs Debian's own init, journald and D-Bus.
#
#   hosts.sh docker                  docker and a running dockerd; 69 and the reason where that cannot be
#   hosts.sh prepare                 the same, and the base image
#   hosts.sh up NAME...              one network, one host per name; prints `NAME IP` when systemd is up
#   hosts.sh exec NAME ARGV...       run a command on a host (stdin is passed on)
#   hosts.sh put NAME SRC DST        a file or a directory becomes DST on a host, owned by root
#   hosts.sh ip NAME                 the address, which stays the same as long as the host exists
#   hosts.sh disconnect|connect NAME take a host off the network, and back
#   hosts.sh kill|restart NAME       power loss; restart boots the host whether it runs or not
#   hosts.sh reset NAME              the reset button: boots the host without shutting it down
#   hosts.sh down                    remove the hosts and the network of this fleet
#   hosts.sh stop-daemon             stop dockerd if `prepare` started it
#
# Run as root on Debian 12. Every command may be repeated. stdout is data, stderr is talk.
# Hosts reach package indexes as this machine does (variables and files of pip, npm, apt, certificates). Where they have
# no way out, a directory of wheels does: run `up` with PIP_FIND_LINKS=DIR PIP_NO_INDEX=1 in the environment.
# LOCKSTEP_FLEET names the fleet (default: main); fleets of different names do not meet.
set -euo pipefail
umask 022

fleet=${LOCKSTEP_FLEET:-main}
label=lockstep.fleet=1
run_label=lockstep.fleet.run=$fleet
network=lockstep-$fleet
state=${XDG_STATE_HOME:-$HOME/.local/state}/lockstep
cache=${XDG_CACHE_HOME:-$HOME/.cache}/lockstep
suite=bookworm
bundle=/etc/ssl/certs/ca-certificates.crt

say() { printf 'hosts: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
# For what this machine does not give, rather than what went wrong.
unavailable() { say "$*"; exit 69; }

install_packages() {
  say "installing $*"
  apt-get update -qq >&2 && DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends "$@" >&2
}

# --- the base image -------------------------------------------------------------------------------------------------

# Prints apt's sources for the suite, as this machine has them configured: only those mirrors may be within reach.
sources() {
  # shellcheck disable=SC2016 # These are apt's own placeholders.
  apt-get indextargets --format 'deb $(REPO_URI) $(RELEASE) $(COMPONENT)' 'Identifier: Packages' 'Origin: Debian' |
    awk -v suite="$suite" '$3 ~ "^" suite "(-security|-updates)?$" && $4 == "main"' | sort -u
}

# How this machine's apt reaches its mirrors: proxies, certificates, and whether old snapshots are fine.
apt_reach() { apt-config dump | grep -E '^Acquire::(https?::|Check-)' || true; }

# Fills directory $1. debootstrap cannot resolve dependencies on virtual packages (npm has some), so that it makes only
# the smallest system and apt does the rest inside. The pid namespace ends whatever a package script leaves running.
build_root() {
  local root=$1 mirror
  mirror=$(sources | awk -v suite="$suite" '$3 == suite && !found++ { print $2 }')
  [ -n "$mirror" ] || die "apt on this machine has no source for Debian $suite"
  debootstrap --variant=minbase --include=ca-certificates "$suite" "$root" "$mirror" >&2
  sources >"$root/etc/apt/sources.list"
  apt_reach >"$root/tmp/apt.conf"
  cp -L /etc/resolv.conf "$root/etc/resolv.conf"
  cp -L "$bundle" "$root$bundle"
  printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
  chmod 755 "$root/usr/sbin/policy-rc.d"
  # LANG decides the encoding of the PostgreSQL cluster that the package creates.
  LANG=C.UTF-8 DEBIAN_FRONTEND=noninteractive APT_CONFIG=/tmp/apt.conf \
    unshare --mount --pid --fork chroot "$root" /bin/sh -euc '
      mount -t proc proc /proc
      apt-get update -qq
      apt-get install -qq --no-install-recommends systemd systemd-sysv dbus iproute2 iptables curl procps \
        python3 python3-venv git nodejs npm postgresql
      apt-get clean
      # PostgreSQL is for the hosts that ask for it: systemctl enable --now postgresql
      systemctl disable postgresql
      # No consoles, devices, clocks or timers of their own: a container borrows them.
      systemctl mask getty.target console-getty.service systemd-logind.service systemd-timesyncd.service \
        systemd-networkd.service systemd-networkd.socket systemd-network-generator.service \
        systemd-remount-fs.service systemd-modules-load.service systemd-firstboot.service \
        dev-hugepages.mount dev-mqueue.mount sys-kernel-config.mount sys-kernel-debug.mount \
        sys-kernel-tracing.mount sys-fs-fuse-connections.mount proc-sys-fs-binfmt_misc.automount \
        apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer
      systemctl set-default multi-user.target
      rm -rf /var/lib/apt/lists/* /tmp/* /usr/sbin/policy-rc.d /etc/hostname
      find /usr/share/doc /usr/share/man /usr/share/locale -type f -delete
      # Empty, not absent: each host makes an id of its own, and the boot does not count as a first one. Without the
      # second file, for an empty id would be filled from there.
      : >/etc/machine-id
      rm -f /var/lib/dbus/machine-id
    ' >&2
}

image=lockstep-fleet:$({ declare -f sources build_root; echo "$suite"; } | sha256sum | cut -c1-16)
tarball=$cache/fleet-${image#*:}.tar

prepare_image() {
  docker image inspect "$image" >/dev/null 2>&1 && return
  if [ ! -s "$tarball" ]; then
    mkdir -p "$cache"
    local work
    command -v debootstrap >/dev/null || install_packages debootstrap || die "debootstrap cannot be installed"
    [ -f "$bundle" ] || install_packages ca-certificates || die "ca-certificates cannot be installed"
    work=$(mktemp -d "$cache/build.XXXXXX")
    say "building the base image, log in $cache/build.log"
    # A process of its own: bash ignores `set -e` within a condition.
    if ! "$0" build-root "$work/root" 2>"$cache/build.log"; then
      tail -20 "$cache/build.log" >&2
      rm -rf "$work"
      die "the base image did not build"
    fi
    tar -C "$work/root" --numeric-owner --exclude './dev/*' -cf "$work/root.tar" .
    rm -f "$cache"/fleet-*.tar
    mv "$work/root.tar" "$tarball"
    rm -rf "$work"
  fi
  say "importing $tarball"
  docker import --change 'ENV container=docker' --change 'CMD ["/sbin/init"]' "$tarball" "$image" >/dev/null
}

# --- dockerd --------------------------------------------------------------------------------------------------------

# A pid may be given out again; a pid with its start time may not. Prints nothing for a process that has ended.
started_at() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | awk '$1 != "Z" { print $20 }'; }

# Starts dockerd with the given flags and waits until it answers; false when it ends or stays silent.
try_dockerd() {
  local pid
  say "starting dockerd $*"
  setsid dockerd "$@" >>"$state/dockerd.log" 2>&1 </dev/null &
  pid=$!
  for _ in $(seq 300); do
    [ -n "$(started_at "$pid")" ] || return 1
    if docker info >/dev/null 2>&1; then
      echo "$pid $(started_at "$pid")" >"$state/dockerd"
      return
    fi
    sleep 0.1
  done
  kill "$pid"
  wait "$pid" || true
  return 1
}

prepare_dockerd() {
  docker info >/dev/null 2>&1 && return
  mkdir -p "$state/legacy"
  : >"$state/dockerd.log"
  try_dockerd && return
  try_dockerd --storage-driver=vfs && return
  # Some kernels speak only the older of the two packet filter interfaces.
  ln -sf "$(command -v iptables-legacy)" "$state/legacy/iptables"
  ln -sf "$(command -v ip6tables-legacy)" "$state/legacy/ip6tables"
  PATH=$state/legacy:$PATH try_dockerd && return
  PATH=$state/legacy:$PATH try_dockerd --storage-driver=vfs && return
  tail -20 "$state/dockerd.log" >&2
  unavailable "dockerd does not start, log in $state/dockerd.log"
}

prepare_docker() {
  [ "$(id -u)" = 0 ] || unavailable "systemd hosts need root"
  if ! { command -v dockerd && command -v docker && command -v iptables; } >/dev/null; then
    command -v apt-get >/dev/null || unavailable "docker is not installed, nor apt-get to install it with"
    install_packages docker.io iptables || unavailable "docker cannot be installed"
  fi
  prepare_dockerd
}

prepare() {
  prepare_docker
  prepare_image
}

stop_daemon() {
  [ -s "$state/dockerd" ] || return 0
  local pid since
  read -r pid since <"$state/dockerd"
  if [ "$(started_at "$pid")" = "$since" ]; then
    kill "$pid"
    for _ in $(seq 600); do
      [ "$(started_at "$pid")" = "$since" ] || break
      sleep 0.1
    done
    [ "$(started_at "$pid")" != "$since" ] || die "dockerd ($pid) does not stop, log in $state/dockerd.log"
    say "dockerd stopped"
  fi
  rm -f "$state/dockerd"
}

# --- what a host gets from this machine -----------------------------------------------------------------------------

# The variables that say how this machine reaches package indexes.
reach_names() {
  compgen -e | grep -E \
    -e '^(PIP|NPM_CONFIG|npm_config)_' \
    -e '^((https?|ftp|all|no)_proxy|(HTTPS?|FTP|ALL|NO)_PROXY)$' \
    -e '^(NODE_EXTRA_CA_CERTS|REQUESTS_CA_BUNDLE)$' || true
}

# Fills directory $1 with the files of a host that make pip, npm, apt and TLS work there as they do here, whatever the
# configuration of this machine is. A file that a setting names comes along under its own path.
reach_files() {
  local root=$1 name path line
  mkdir -p "$root/etc/apt/apt.conf.d" "$root/etc/systemd/system.conf.d"
  mkdir -m 700 "$root/root"
  install -D -m 644 "$bundle" "$root$bundle"
  apt_reach >"$root/etc/apt/apt.conf.d/90fleet"
  for path in /etc/pip.conf /etc/xdg/pip/pip.conf "$HOME/.config/pip/pip.conf" "$HOME/.pip/pip.conf"; do
    if [ -f "$path" ]; then install -D -m 644 "$path" "$root${path/#"$HOME"//root}"; fi
  done
  for path in /etc/npmrc "$HOME/.npmrc"; do
    # A directory in an npmrc is about this machine's own node.
    if [ -f "$path" ]; then
      while IFS= read -r line; do
        [ -d "${line#*=}" ] || printf '%s\n' "$line"
      done <"$path" >"$root${path/#"$HOME"//root}"
    fi
  done
  # systemd starts services without the variables of its own process, so that they are given to it as a setting.
  for name in $(reach_names); do
    printf 'DefaultEnvironment="%s"\n' "$(printf '%s' "$name=${!name}" | tr '\n' ' ' | sed 's/[\\"]/\\&/g; s/%/%%/g')"
  done | sed '1i [Manager]' >"$root/etc/systemd/system.conf.d/fleet.conf"
  { for name in $(reach_names); do printf '%s\n' "${!name}"; done
    find "$root/etc" "$root/root" '(' -name pip.conf -o -name '*npmrc' ')' -exec sed -n 's/^[^#=]*= *//p' '{}' +
  } 2>/dev/null | sort -u | while IFS= read -r path; do
    case $path in
      /*) if [ -f "$path" ]; then install -D -m 644 "$path" "$root$path"; fi ;;
    esac
  done
}

# --- hosts ----------------------------------------------------------------------------------------------------------

container() { printf 'lockstep-%s-%s' "$fleet" "$1"; }
known() { docker container inspect "$(container "$1")" >/dev/null 2>&1; }
must_know() { known "$1" || die "no host $1 in fleet $fleet"; }
inspect() { docker container inspect --format "$2" "$(container "$1")"; }
address() { inspect "$1" '{{index .Config.Labels "lockstep.fleet.ip"}}'; }
connected() { [ "$(inspect "$1" "{{if index .NetworkSettings.Networks \"$network\"}}yes{{end}}")" = yes ]; }

# docker keeps fixed addresses only on a network whose subnet was given, and knows best which subnet is free: it makes
# the network once to choose, and once more with its choice.
make_network() {
  docker network inspect "$network" >/dev/null 2>&1 && return
  local subnet
  docker network create --label "$label" --label "$run_label" "$network" >/dev/null
  subnet=$(docker network inspect --format '{{(index .IPAM.Config 0).Subnet}}' "$network")
  docker network rm "$network" >/dev/null
  docker network create --label "$label" --label "$run_label" --subnet "$subnet" "$network" >/dev/null
}

free_address() {
  local subnet used i
  subnet=$(docker network inspect --format '{{(index .IPAM.Config 0).Subnet}}' "$network")
  used=$(docker ps -a --filter "label=$run_label" --format '{{.Label "lockstep.fleet.ip"}}')
  for i in $(seq 11 250); do
    grep -qxF "${subnet%.*}.$i" <<<"$used" || { echo "${subnet%.*}.$i"; return; }
  done
  die "network $network is full"
}

create() {
  local name=$1 reach=$2 ip link flags=()
  ip=$(free_address)
  for link in $(reach_names); do flags+=(--env "$link"); done
  for link in ${PIP_FIND_LINKS:-}; do
    if [ -d "$link" ]; then flags+=(--volume "$link:$link:ro"); fi
  done
  docker create --name "$(container "$name")" --hostname "$name" \
    --label "$label" --label "$run_label" --label "lockstep.fleet.ip=$ip" \
    --network "$network" --network-alias "$name" --ip "$ip" \
    --cap-add SYS_ADMIN --cap-add NET_ADMIN --cap-add DAC_READ_SEARCH --cap-add SYS_PTRACE \
    --security-opt seccomp=unconfined \
    --cgroupns=host --volume /sys/fs/cgroup:/sys/fs/cgroup:rw --tmpfs /run --tmpfs /run/lock \
    --stop-signal SIGRTMIN+3 "${flags[@]}" "$image" /sbin/init >/dev/null
  tar -C "$reach" --owner=0 --group=0 -c . | docker cp - "$(container "$name"):/"
}

# Waits until systemd of a host has finished its boot. A degraded host is up as well, and says what failed.
wait_booted() {
  local name=$1 status
  for _ in $(seq 600); do
    status=$(docker exec "$(container "$name")" systemctl is-system-running 2>/dev/null) || true
    case $status in
      running) return ;;
      degraded)
        say "$name is degraded:"
        docker exec "$(container "$name")" systemctl --failed --no-legend --plain >&2
        return ;;
    esac
    sleep 0.1
  done
  docker logs --tail 20 "$(container "$name")" >&2
  die "$name did not boot: ${status:-no answer from systemd}"
}

up() {
  local name reach
  # The directory that is copied becomes the root of a host and must be readable there, but not here.
  reach=$(mktemp -d)
  reach_files "$reach/root"
  make_network
  for name; do
    known "$name" || create "$name" "$reach/root"
  done
  rm -rf "$reach"
  for name; do docker start "$(container "$name")" >/dev/null; done
  for name; do
    wait_booted "$name"
    echo "$name $(address "$name")"
  done
}

put() {
  local src=$2 dst=$3 to mode
  to=$(container "$1")
  # Not `docker cp`: it writes below what a running host has mounted, such as /run.
  if [ -d "$src" ]; then
    docker exec "$to" mkdir -p "$dst"
    tar -C "$src" -c . | docker exec -i "$to" tar -C "$dst" --no-same-owner -x
  else
    mode=$(stat -L -c %a "$src")
    docker exec -i "$to" install -D -m "$mode" /dev/stdin "$dst" <"$src"
  fi
}

down() {
  docker info >/dev/null 2>&1 || return 0
  docker ps -aq --filter "label=$label" --filter "label=$run_label" | xargs -r docker rm --force --volumes >/dev/null
  docker network ls -q --filter "label=$label" --filter "label=$run_label" | xargs -r docker network rm >/dev/null
}

usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0" >&2; exit 2; }
need() { [ "$1" -ge "$2" ] || usage; }

command=${1:-}
shift || usage
case $command in
  docker) prepare_docker ;;
  prepare) prepare ;;
  up) need $# 1; up "$@" ;;
  down) down ;;
  build-root) build_root "$1" ;;
  stop-daemon) stop_daemon ;;
  exec | put | ip | disconnect | connect | kill | restart | reset)
    need $# 1
    must_know "$1"
    host=$(container "$1")
    case $command in
      exec) need $# 2; shift; exec docker exec -i "$host" "$@" ;;
      put) need $# 3; put "$@" ;;
      ip) address "$1" ;;
      disconnect) if connected "$1"; then docker network disconnect --force "$network" "$host"; fi ;;
      connect) connected "$1" || docker network connect --alias "$1" --ip "$(address "$1")" "$network" "$host" ;;
      kill) if [ "$(inspect "$1" '{{.State.Running}}')" = true ]; then docker kill "$host" >/dev/null; fi ;;
      restart) docker restart "$host" >/dev/null; wait_booted "$1" ;;
      # Not a restart without patience: init would be asked to shut down, and is fast.
      reset) docker kill "$host" >/dev/null; docker start "$host" >/dev/null; wait_booted "$1" ;;
    esac ;;
  *) usage ;;
esac
