//! A whole installation on one machine.
//!
//! ```text
//! ROOT/pki/                      issuers and certificates
//! ROOT/controller/               configuration, state, log
//! ROOT/hosts/NAME/               configuration, policy, secrets, state, srv/, log/ of each host
//! ROOT/operators/NAME.toml       profiles
//! ROOT/postgres/                 the database cluster
//! ROOT/git/employee-system       the application's history
//! ROOT/backups/                  where copies of backups go
//! ```

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use rustix::process::{Pid, Signal};
use serde_json::Value;

use crate::binaries::Binaries;
use crate::daemon::{Daemon, Launch};
use crate::hosts::Host;
use crate::mail::Mailbox;
use crate::operator::Operator;
use crate::postgres::Postgres;
use crate::reaper::Reaper;
use crate::{example, processes, wait};

mod enrol;
mod setup;

pub(crate) use setup::token;

/// The trust domain of test installations.
pub const DOMAIN: &str = "lockstep.test";

/// How the controller's unit has its allocator give memory back.
const ALLOCATOR: &str = "background_thread:true,dirty_decay_ms:1000,muzzy_decay_ms:0";

/// Who submits rollouts; in no group that approves them.
pub const REQUESTER: &str = "alice";

/// The people of an installation and what they may decide.
pub const PEOPLE: [(&str, &[&str]); 5] = [
    (REQUESTER, &["release_manager"]),
    ("bob", &["dba"]),
    ("carol", &["qa_lead"]),
    ("dave", &["dev_lead", "devops_lead"]),
    ("erin", &["product_manager"]),
];

/// What a cluster is made of.
#[derive(Debug)]
pub struct Builder {
    hosts: Vec<(String, String)>,
    database: bool,
    policies: BTreeMap<String, Option<String>>,
    secrets: BTreeMap<String, String>,
    backup_dir: Option<PathBuf>,
    agent_path: Option<String>,
    tables: BTreeMap<String, String>,
    agent_env: BTreeMap<String, Vec<(String, String)>>,
    binaries: Option<Binaries>,
    enrol: Option<String>,
    compact_above: Option<u64>,
    rehearsing: bool,
}

/// A running installation.
#[derive(Debug)]
pub struct Cluster {
    controller: Option<Daemon>,
    hosts: BTreeMap<String, Host>,
    postgres: Option<Postgres>,
    /// Mail that the controller sent.
    pub mailbox: Mailbox,
    /// The values of the secrets, by name: what must be found nowhere.
    pub secrets: BTreeMap<String, String>,
    binaries: Binaries,
    /// What the controller is started from.
    controller_binary: PathBuf,
    address: String,
    /// How long certificates live of hosts that join; none: nobody may.
    enrol: Option<String>,
    /// How many records the journal may have; none: the controller's own number.
    compact_above: Option<u64>,
    root: tempfile::TempDir,
    _reaper: Reaper,
}

impl Builder {
    /// Without PostgreSQL and the application's database.
    #[must_use]
    pub fn without_database(mut self) -> Self {
        self.database = false;
        self
    }

    /// Only these hosts, each with its role.
    #[must_use]
    pub fn hosts(mut self, hosts: &[(&str, &str)]) -> Self {
        self.hosts = owned(hosts);
        self
    }

    /// Another policy than the example's on a host; `None` for no file at all.
    #[must_use]
    pub fn policy(mut self, host: &str, text: Option<&str>) -> Self {
        self.policies
            .insert(host.to_owned(), text.map(str::to_owned));
        self
    }

    /// Another value of a secret on the hosts than the one that is right.
    #[must_use]
    pub fn wrong_secret(mut self, name: &str, value: &str) -> Self {
        self.secrets.insert(name.to_owned(), value.to_owned());
        self
    }

    /// Where the database host keeps backups.
    #[must_use]
    pub fn backup_dir(mut self, directory: &Path) -> Self {
        self.backup_dir = Some(directory.to_owned());
        self
    }

    /// Another search path for the programs of the application hosts' builds and migrations.
    #[must_use]
    pub fn tools_at(mut self, path: &str) -> Self {
        self.agent_path = Some(path.to_owned());
        self
    }

    /// The database's host may build releases of the application, and rehearse their migrations.
    #[must_use]
    pub fn rehearsing(mut self) -> Self {
        self.rehearsing = true;
        self
    }

    /// Hosts may join, and their certificates live for so long.
    #[must_use]
    pub fn enrolling(mut self, life: &str) -> Self {
        self.enrol = Some(life.to_owned());
        self
    }

    /// The controller compacts its journal once it has more records than this.
    #[must_use]
    pub fn compact_above(mut self, records: u64) -> Self {
        self.compact_above = Some(records);
        self
    }

    /// More tables of a host's agent.toml, as they stand; `@HOST@` is the host's directory.
    #[must_use]
    pub fn tables(mut self, host: &str, text: &str) -> Self {
        self.tables.insert(host.to_owned(), text.to_owned());
        self
    }

    /// A variable of a host's agent's own environment; `@HOST@` is the host's directory.
    #[must_use]
    pub fn agent_env(mut self, host: &str, name: &str, value: &str) -> Self {
        let variables = self.agent_env.entry(host.to_owned()).or_default();
        variables.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Everything from these binaries, such as those of another release.
    #[must_use]
    pub fn binaries(mut self, binaries: &Binaries) -> Self {
        self.binaries = Some(binaries.clone());
        self
    }

    /// Starts everything, and waits until the controller knows every host.
    pub fn start(self) -> Result<Cluster> {
        let binaries = match &self.binaries {
            Some(binaries) => binaries.clone(),
            None => Binaries::find()?,
        };
        let root = tempfile::Builder::new().prefix("lockstep-").tempdir()?;
        // PostgreSQL runs as another user and must get through to its part.
        fs::set_permissions(root.path(), Permissions::from_mode(0o755))?;
        let mut cluster = Cluster {
            controller: None,
            hosts: BTreeMap::new(),
            postgres: None,
            mailbox: Mailbox::open()?,
            secrets: BTreeMap::new(),
            controller_binary: binaries.lockstep.clone(),
            binaries,
            address: String::new(),
            enrol: self.enrol.clone(),
            compact_above: self.compact_above,
            _reaper: Reaper::of_cluster(root.path())?,
            root,
        };
        cluster.make_secrets()?;
        if self.database {
            cluster.start_database()?;
        }
        cluster.make_certificates(&self.hosts)?;
        cluster.configure_controller()?;
        cluster.start_controller()?;
        cluster.make_hosts(&self)?;
        let names: Vec<String> = cluster.hosts.keys().cloned().collect();
        for name in &names {
            cluster.host_mut(name).start_agent()?;
        }
        cluster.wait_connected(&names)?;
        Ok(cluster)
    }
}

impl Cluster {
    /// One database host and two application hosts, as the example's plan wants them.
    pub fn builder() -> Builder {
        Builder {
            hosts: owned(&[("db-1", "db"), ("app-1", "app"), ("app-2", "app")]),
            database: true,
            policies: BTreeMap::new(),
            secrets: BTreeMap::new(),
            backup_dir: None,
            agent_path: None,
            tables: BTreeMap::new(),
            agent_env: BTreeMap::new(),
            binaries: None,
            enrol: None,
            compact_above: None,
            rehearsing: false,
        }
    }

    /// The directory that holds everything.
    pub fn root(&self) -> &Path {
        self.root.path()
    }

    /// The binaries that it was started with.
    pub fn binaries(&self) -> &Binaries {
        &self.binaries
    }

    /// The controller's address.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The database server.
    pub fn postgres(&self) -> &Postgres {
        self.postgres
            .as_ref()
            .expect("the cluster was built with a database")
    }

    /// A host.
    pub fn host(&self, name: &str) -> &Host {
        &self.hosts[name]
    }

    /// A host, to start and end its agent.
    pub fn host_mut(&mut self, name: &str) -> &mut Host {
        self.hosts.get_mut(name).expect("the cluster has this host")
    }

    /// All hosts, by name.
    pub fn hosts(&self) -> impl Iterator<Item = &Host> {
        self.hosts.values()
    }

    /// The hosts of the application, by name.
    pub fn app_hosts(&self) -> impl Iterator<Item = &Host> {
        self.hosts
            .values()
            .filter(|host| host.name.starts_with("app-"))
    }

    /// The application's git repository, as hosts reach it.
    pub fn git(&self) -> PathBuf {
        self.root().join("git").join(example::APP)
    }

    /// Where certificates are.
    pub fn pki(&self) -> PathBuf {
        self.root().join("pki")
    }

    /// The controller's log.
    pub fn controller_log(&self) -> PathBuf {
        self.root().join("controller/log")
    }

    /// The controller's process.
    pub fn controller_pid(&self) -> Option<Pid> {
        self.controller.as_ref().map(Daemon::pid)
    }

    /// A person at the command line.
    pub fn operator(&self, name: &str) -> Operator {
        let groups = PEOPLE.iter().find(|(person, _)| *person == name);
        let groups = groups.map(|(_, groups)| *groups).unwrap_or_default();
        Operator {
            name: name.to_owned(),
            groups: groups.iter().map(|group| (*group).to_owned()).collect(),
            binary: self.binaries.lockstep.clone(),
            profile: self
                .root()
                .join("operators")
                .join(name)
                .join("profile.toml"),
        }
    }

    /// Who submits rollouts.
    pub fn requester(&self) -> Operator {
        self.operator(REQUESTER)
    }

    /// Everybody else.
    pub fn approvers(&self) -> Vec<Operator> {
        let others = PEOPLE.iter().filter(|(name, _)| *name != REQUESTER);
        others.map(|(name, _)| self.operator(name)).collect()
    }

    /// The inputs of a plan of the example for a release. Logs are watched for seconds, and the
    /// limits of the benchmark are those of a machine that does everything at once.
    pub fn inputs(&self, plan: &Path, release: &str) -> Vec<(String, String)> {
        let repository = self.git().display().to_string();
        let mut inputs = vec![
            ("release", release),
            ("driver", "process"),
            ("repository", &repository),
        ];
        if plan != example::install_plan() {
            inputs.extend([("watch", "3s"), ("list_ms", "2000")]);
            inputs.extend([("search_ms", "2000"), ("write_ms", "2000")]);
        }
        let owned = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
        inputs.into_iter().map(owned).collect()
    }

    /// Submits one of the example's plans for a release; the rollout's id.
    pub fn submit(&self, plan: &Path, release: &str) -> Result<String> {
        let inputs = self.inputs(plan, release);
        let inputs: Vec<(&str, &str)> = inputs
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
            .collect();
        self.requester().submit(plan, &inputs)
    }

    /// Answers every gate until the rollout ends.
    pub fn finish(&self, rollout: &str) -> Result<Value> {
        let people = self.approvers();
        let people: Vec<&Operator> = people.iter().collect();
        crate::operator::answer_gates(&people, rollout, wait::ROLLOUT, |_, _| {})
    }

    /// Brings v0.9.5 onto the hosts, the way the example says.
    pub fn install(&self) -> Result<()> {
        let rollout = self.submit(&example::install_plan(), "v0.9.5")?;
        let document = self.finish(&rollout)?;
        let state = crate::operator::text(&document["state"]);
        ensure!(
            state == "succeeded",
            "v0.9.5 is not installed: {}",
            self.explain(&document)
        );
        Ok(())
    }

    /// Why a rollout ended as it did, with the last words of everybody: for failing tests.
    pub fn explain(&self, document: &Value) -> String {
        let text = crate::operator::text;
        let mut lines = vec![format!(
            "{}: {}",
            text(&document["state"]),
            text(&document["reason"])
        )];
        for event in crate::operator::list(&document["events"]) {
            let (host, action) = (text(&event["host"]), text(&event["action"]));
            lines.push(format!(
                "  {} {host} {action} {}",
                text(&event["kind"]),
                text(&event["message"])
            ));
            for detail in crate::operator::list(&event["detail"]) {
                lines.push(format!("      {}", text(detail)));
            }
        }
        lines.push(self.last_words());
        lines.join("\n")
    }

    /// The last lines of the controller's and the agents' logs.
    pub fn last_words(&self) -> String {
        let mut logs = vec![("controller".to_owned(), self.controller_log())];
        logs.extend(
            self.hosts()
                .map(|host| (host.name.clone(), host.agent_log())),
        );
        let mut words = String::new();
        for (name, log) in logs {
            let text = fs::read_to_string(log).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            for line in &lines[lines.len().saturating_sub(12)..] {
                let _ = writeln!(words, "  {name}| {line}");
            }
        }
        words
    }

    /// Another release of the controller; it is that from the next start on. People keep theirs.
    pub fn install_controller(&mut self, binary: &Path) {
        binary.clone_into(&mut self.controller_binary);
    }

    /// Another release of the command line, for everybody.
    pub fn install_cli(&mut self, binary: &Path) {
        binary.clone_into(&mut self.binaries.lockstep);
    }

    /// Starts the controller, where it was if it ran before.
    pub fn start_controller(&mut self) -> Result<()> {
        let directory = self.root().join("controller");
        let ready = directory.join("ready");
        let _ = fs::remove_file(&ready);
        let argv = vec![
            self.controller_binary.clone().into_os_string(),
            "serve".into(),
            "--config".into(),
            directory.join("controller.toml").into_os_string(),
            "--ready-file".into(),
            ready.clone().into_os_string(),
        ];
        let log = self.controller_log();
        let mut controller = Daemon::spawn(Launch {
            name: "the controller",
            argv,
            env: vec![
                ("NO_COLOR".to_owned(), "1".into()),
                ("MALLOC_CONF".to_owned(), ALLOCATOR.into()),
            ],
            dir: &directory,
            log: &log,
            user: None,
            stop: Signal::TERM,
        })?;
        let address = wait::until("the controller to be ready", wait::SOON, || {
            if let Err(ended) = controller.check() {
                return Ok(Err(ended));
            }
            let text = fs::read_to_string(&ready).unwrap_or_default();
            let address = text.trim();
            if address.is_empty() {
                Err(controller.tail(3))
            } else {
                Ok(Ok(address.to_owned()))
            }
        })?
        .map_err(anyhow::Error::msg)?;
        self.controller = Some(controller);
        if self.address.is_empty() {
            self.address = address;
            // The same port after a restart: agents and operators dial what they know.
            self.configure_controller()?;
            self.make_profiles()?;
        }
        Ok(())
    }

    /// Ends the controller as a crash does.
    pub fn kill_controller(&mut self) {
        if let Some(mut controller) = self.controller.take() {
            controller.kill();
        }
    }

    /// Ends the controller in good order; its exit code.
    pub fn stop_controller(&mut self) -> Option<i32> {
        self.controller.take()?.stop()?.code()
    }

    /// Waits until the controller says that these hosts are connected.
    pub fn wait_connected(&mut self, names: &[String]) -> Result<()> {
        let requester = self.requester();
        let hosts = &mut self.hosts;
        wait::until("the agents to be connected", wait::SOON, || {
            for name in names {
                if let Err(ended) = hosts.get_mut(name).expect("a host of the cluster").check() {
                    return Ok(Err(ended));
                }
            }
            let known = requester
                .json(&["hosts"])
                .map_err(|error| format!("{error:#}"))?;
            let listed = crate::operator::list(&known["hosts"]);
            let connected: Vec<&str> = listed
                .filter(|host| host["connected"] == Value::Bool(true))
                .map(|host| crate::operator::text(&host["host"]))
                .collect();
            match names
                .iter()
                .find(|name| !connected.contains(&name.as_str()))
            {
                None => Ok(Ok(())),
                Some(missing) => Err(format!("{missing} is not among {connected:?}")),
            }
        })?
        .map_err(anyhow::Error::msg)
        .with_context(|| self.last_words())
    }

    /// Runs `lockstep pki` with arguments.
    pub fn make_certificate(&self, arguments: &[&str]) -> Result<()> {
        let output = Command::new(&self.binaries.lockstep)
            .arg("pki")
            .args(arguments)
            .env_clear()
            .current_dir(self.root())
            .output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "lockstep pki {arguments:?}: {said}"
        );
        Ok(())
    }

    /// Ends everything in good order, and names the processes of the hosts (services, mostly) that
    /// had to be ended like at a shutdown of those hosts.
    pub fn stop(&mut self) -> Result<Vec<String>> {
        for host in self.hosts.values_mut() {
            host.stop_agent();
        }
        self.controller = None;
        self.postgres = None;
        processes::sweep(self.root.path())
    }
}

fn owned(hosts: &[(&str, &str)]) -> Vec<(String, String)> {
    let owned = |(name, role): &(&str, &str)| ((*name).to_owned(), (*role).to_owned());
    hosts.iter().map(owned).collect()
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let stopped = self.stop();
        // A second panic would hide the first one.
        if let Err(error) = stopped
            && !std::thread::panicking()
        {
            panic!("processes of the cluster stay behind: {error:#}");
        }
    }
}
