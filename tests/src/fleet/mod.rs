//! A fleet of real systemd hosts, through `tests/fleet/hosts.sh`, and what users install on them.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::time::SystemTime;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::binaries::Binaries;
use crate::cluster::PEOPLE;
use crate::operator::{Operator, list, text};
use crate::reaper::Reaper;
use crate::wait;

pub mod effects;
mod evidence;
pub mod faults;
mod install;
mod machine;

use machine::{Stage, hosts, hosts_with};

/// The name of this fleet; another one on the machine does not meet it.
const NAME: &str = "runbook";

/// The hosts under agents.
pub const HOSTS: [(&str, &str); 3] = [("db-1", "db"), ("app-1", "app"), ("app-2", "app")];

/// The host of the controller.
pub const CONTROL: &str = "control";

/// Who lets hosts in.
const ADMIN: &str = "ada";

/// The port in the example's configuration files.
const PORT: u16 = 7443;

/// Running hosts with everything installed.
#[derive(Debug)]
pub struct Fleet {
    addresses: BTreeMap<String, String>,
    binaries: Binaries,
    work: tempfile::TempDir,
    secrets: BTreeMap<&'static str, String>,
    _reaper: Reaper,
    // Let go of after the reaper has cleaned up.
    _lock: File,
}

impl Fleet {
    /// Boots the hosts and installs Lockstep, PostgreSQL and what the application needs.
    pub fn start(mut tell: impl FnMut(&str)) -> Result<Self> {
        ensure!(
            crate::is_root(),
            "systemd hosts need root: run `sudo make fleet`"
        );
        let binaries = Binaries::find()?;
        let lock = File::create(format!("/run/lockstep-fleet-{NAME}.lock"))?;
        let free = lock.try_lock();
        free.context("another `make fleet` runs on this machine: wait until it has ended")?;
        let reaper = Reaper::of_fleet(NAME)?;
        hosts(&["prepare"])?;
        tell("booting four hosts");
        let names = [CONTROL].into_iter().chain(HOSTS.map(|(name, _)| name));
        let mut arguments = vec!["up"];
        arguments.extend(names);
        let listed = hosts(&arguments)?;
        let addresses = listed.lines().filter_map(|line| line.split_once(' '));
        let mut fleet = Self {
            addresses: addresses
                .map(|(name, ip)| (name.to_owned(), ip.to_owned()))
                .collect(),
            binaries,
            work: tempfile::Builder::new().prefix("lockstep-").tempdir()?,
            secrets: BTreeMap::new(),
            _reaper: reaper,
            _lock: lock,
        };
        for name in ["migrator", "app", "secret_key", "admin"] {
            fleet
                .secrets
                .insert(name, format!("{name}-{}", crate::cluster::token()?));
        }
        tell("installing PostgreSQL's roles, the units and the configurations");
        fleet.make_certificates()?;
        fleet.install_database()?;
        fleet.install_controller()?;
        fleet.make_profiles()?;
        for (name, role) in HOSTS {
            fleet.install_host(name, role)?;
        }
        fleet.wait_connected()?;
        Ok(fleet)
    }

    /// A command on a host; its standard output.
    pub fn on(&self, host: &str, argv: &[&str]) -> Result<String> {
        self.on_with(host, argv, "")
    }

    fn on_with(&self, host: &str, argv: &[&str], input: &str) -> Result<String> {
        ensure!(
            self.addresses.contains_key(host),
            "the fleet has no host {host}"
        );
        let mut arguments = vec!["exec", host];
        arguments.extend(argv);
        hosts_with(&arguments, input)
    }

    /// A person at the command line of this machine.
    pub fn operator(&self, name: &str) -> Operator {
        let groups = PEOPLE
            .iter()
            .find(|(person, _)| *person == name)
            .map(|(_, groups)| *groups);
        Operator {
            name: name.to_owned(),
            groups: groups
                .into_iter()
                .flatten()
                .map(|group| (*group).to_owned())
                .collect(),
            binary: self.binaries.lockstep.clone(),
            profile: self
                .work
                .path()
                .join("operators")
                .join(name)
                .join("profile.toml"),
        }
    }

    /// The agent's tests of systemd itself, on a host; what they say.
    pub fn test_systemd(&self, host: &str, program: &Path) -> Result<String> {
        let stage = Stage::new(self.work.path().join("stage/tests"))?;
        let installed = "usr/local/bin/lockstep-agent-tests";
        stage.copy(program, installed, 0o755)?;
        stage.put(host)?;
        let directory = "LOCKSTEP_TEST_UNIT_DIR=/run/systemd/system";
        let said = self.on(
            host,
            &[
                "env",
                directory,
                &format!("/{installed}"),
                "--ignored",
                "systemd::",
                "exec::unit::",
            ],
        )?;
        self.on(host, &["rm", &format!("/{installed}")])?;
        Ok(said)
    }

    /// Removes the hosts, and stops the daemon if it was started for them.
    pub fn stop(self) -> Result<()> {
        hosts(&["down"])?;
        hosts(&["stop-daemon"])?;
        Ok(())
    }

    /// Waits until the controller says that every agent is connected.
    pub fn wait_connected(&self) -> Result<()> {
        let waited = wait::until("the agents to be connected", wait::SOON, || {
            let connected = self.connected().map_err(|error| format!("{error:#}"))?;
            let all = connected.len() == HOSTS.len();
            all.then_some(()).ok_or_else(|| format!("{connected:?}"))
        });
        waited.with_context(|| {
            let journal = ["journalctl", "--no-pager", "-n", "12", "-u", "lockstep-*"];
            let names = self.addresses.keys();
            let said = names
                .map(|name| format!("{name}:\n{}", self.on(name, &journal).unwrap_or_default()));
            said.collect::<String>()
        })
    }

    /// The certificates that the hosts have, by their digests.
    pub fn certificates(&self) -> Result<BTreeMap<&'static str, String>> {
        let digest = ["sha256sum", "/var/lib/lockstep-link/tls/agent.crt"];
        let hosts = HOSTS.iter();
        hosts
            .map(|(name, _)| Ok((*name, self.on(name, &digest)?)))
            .collect()
    }

    /// Waits until every host has another certificate than it had, and is connected.
    pub fn wait_renewed(&self, before: &BTreeMap<&'static str, String>) -> Result<()> {
        wait::until(
            "the hosts to renew their certificates",
            wait::ROLLOUT,
            || {
                let now = self.certificates().map_err(|error| format!("{error:#}"))?;
                let same = HOSTS.iter().find(|(name, _)| now[name] == before[name]);
                same.map_or(Ok(()), |(name, _)| Err(format!("{name} has not")))
            },
        )?;
        self.wait_connected()
    }

    /// Holds the installed units against what systemd says a daemon like them is exposed to.
    pub fn check_exposure(&self) -> Result<String> {
        let units = [
            (CONTROL, "lockstep-controller", "15"),
            (HOSTS[0].0, "lockstep-link", "15"),
            (HOSTS[0].0, "lockstep-agent", "20"),
        ];
        let mut said = String::new();
        for (host, unit, threshold) in units {
            let analyze = [
                "systemd-analyze",
                "--no-pager",
                "security",
                "--offline=true",
            ];
            let threshold = format!("--threshold={threshold}");
            let unit = format!("/etc/systemd/system/{unit}.service");
            said += &self.on(host, &[&analyze[..], &[&threshold, &unit]].concat())?;
        }
        Ok(said)
    }

    /// The hosts that the controller says are connected.
    pub fn connected(&self) -> Result<Vec<String>> {
        let known = self.operator(PEOPLE[0].0).json(&["hosts"])?;
        let connected = list(&known["hosts"]).filter(|host| host["connected"] == Value::Bool(true));
        Ok(connected
            .map(|host| text(&host["host"]).to_owned())
            .collect())
    }

    /// Kills the main process of a unit, and sees in the journal that it was killed and what of.
    pub fn kill(&self, host: &str, unit: &str) -> Result<()> {
        // At once: the next thing that a step does may be its end. The hosts' clock is this one's.
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
        let since = format!("--since=@{}", now.as_secs());
        let kill = ["systemctl", "kill", "--kill-whom=main", "--signal=KILL"];
        self.on(host, &[&kill[..], &["--", unit]].concat())?;
        let journal = ["journalctl", "--no-pager", "-o", "cat", &since, "-u", unit];
        wait::until(&format!("{unit} on {host} to die"), wait::SOON, || {
            let said = self.on(host, &journal);
            let said = said.map_err(|error| format!("{error:#}"))?;
            let died = said.contains("Main process exited, code=killed, status=9/KILL");
            died.then_some(()).ok_or(said)
        })
    }

    /// Takes a host off the network: nobody reaches it, and it reaches nobody.
    pub fn cut(&self, host: &str) -> Result<()> {
        hosts(&["disconnect", host]).map(drop)
    }

    /// Puts it back, with the address that it had.
    pub fn heal(&self, host: &str) -> Result<()> {
        hosts(&["connect", host]).map(drop)
    }

    /// Reboots a host in good order, or boots one that is off; back when systemd is up.
    pub fn restart(&self, host: &str) -> Result<()> {
        hosts(&["restart", host]).map(drop)
    }

    /// Boots a host without shutting it down first; back when systemd is up.
    pub fn reset(&self, host: &str) -> Result<()> {
        hosts(&["reset", host]).map(drop)
    }

    /// Takes a host's power away.
    pub fn power_off(&self, host: &str) -> Result<()> {
        hosts(&["kill", host]).map(drop)
    }
}
