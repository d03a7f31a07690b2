//! The hosts of a cluster: directories of one machine, each with an agent of its own.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::daemon::{Daemon, Launch};
use crate::{example, processes};

/// A host: everything that it has lies in its directory.
#[derive(Debug)]
pub struct Host {
    /// The name, as in its certificate.
    pub name: String,
    /// Its directory.
    pub root: PathBuf,
    /// The loopback address that its services bind.
    pub address: String,
    agent: Option<Daemon>,
    /// The network side, if the agent is two processes.
    link: Option<Daemon>,
    halves: bool,
    binary: PathBuf,
}

/// What goes into a host's configuration file.
#[derive(Debug, Default)]
pub struct Settings {
    /// `host:port`.
    pub controller: String,
    /// Trust anchor, certificate and key.
    pub tls: [PathBuf; 3],
    /// By which plans select it.
    pub labels: BTreeMap<String, String>,
    /// For `${host.NAME}`.
    pub vars: BTreeMap<String, String>,
    /// More tables, as they stand: applications, services, databases.
    pub tables: String,
    /// The policy; none means that no file is written.
    pub policy: Option<String>,
}

impl Host {
    /// Makes the directory.
    pub fn new(root: PathBuf, name: &str, address: String, binary: PathBuf) -> Result<Self> {
        for part in ["secrets", "srv", "log"] {
            fs::create_dir_all(root.join(part))?;
        }
        fs::set_permissions(root.join("secrets"), Permissions::from_mode(0o700))?;
        Ok(Self {
            name: name.to_owned(),
            root,
            address,
            agent: None,
            link: None,
            halves: false,
            binary,
        })
    }

    /// Writes the configuration and the policy.
    pub fn configure(&self, settings: &Settings) -> Result<()> {
        let Settings {
            controller,
            tls,
            labels,
            vars,
            tables,
            policy,
        } = settings;
        let mut text = String::new();
        let state = self.root.join("state");
        let run = self.root.join("run");
        let [ca, cert, key] = tls;
        writeln!(text, "host = {}", quote(&self.name))?;
        writeln!(text, "controller = {}", quote(controller))?;
        writeln!(
            text,
            "state_dir = {}\nrun_dir = {}",
            quote_path(&state),
            quote_path(&run)
        )?;
        // Step processes in sessions of their own, on machines with systemd too.
        writeln!(text, "steps = \"session\"\n\n[tls]")?;
        for (name, path) in [("controller_ca", ca), ("cert", cert), ("key", key)] {
            writeln!(text, "{name} = {}", quote_path(path))?;
        }
        for (table, values) in [("labels", labels), ("vars", vars)] {
            writeln!(text, "\n[{table}]")?;
            for (name, value) in values {
                writeln!(text, "{name} = {}", quote(value))?;
            }
        }
        text.push('\n');
        text.push_str(tables);
        fs::write(self.config(), text)?;
        if let Some(policy) = policy {
            fs::write(self.root.join("policy.toml"), policy)?;
        }
        Ok(())
    }

    /// The configuration file.
    pub fn config(&self) -> PathBuf {
        self.root.join("agent.toml")
    }

    /// Puts a secret on the host.
    pub fn secret(&self, name: &str, value: &str) -> Result<()> {
        let file = self.root.join("secrets").join(name);
        fs::write(&file, value)?;
        Ok(fs::set_permissions(&file, Permissions::from_mode(0o600))?)
    }

    /// The application's directory: `releases`, `shared`, `current`.
    pub fn app(&self) -> PathBuf {
        self.root.join("srv").join(example::APP)
    }

    /// The release that is active, by the link; empty if none is.
    pub fn release(&self) -> String {
        let target = fs::read_link(self.app().join("current")).unwrap_or_default();
        let name = target.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    /// Where the application notes its starts and stops.
    pub fn effects(&self) -> PathBuf {
        self.root.join("log/effects")
    }

    /// Where its migrations note themselves.
    pub fn migrations(&self) -> PathBuf {
        self.root.join("log/migrations")
    }

    /// The agent's log.
    pub fn agent_log(&self) -> PathBuf {
        self.root.join("log/agent.log")
    }

    /// Another release of the agent; it is that from the next start on.
    pub fn install(&mut self, binary: &Path) {
        binary.clone_into(&mut self.binary);
    }

    /// From the next start on, link and exec are two processes.
    pub fn split(&mut self) {
        self.halves = true;
    }

    /// Starts the agent.
    pub fn start_agent(&mut self) -> Result<()> {
        if !self.halves {
            self.agent = Some(self.spawn("run")?);
            return Ok(());
        }
        self.agent = Some(self.spawn("exec")?);
        self.start_link()
    }

    /// Starts the link of an agent that is two processes, in place of one that runs.
    pub fn start_link(&mut self) -> Result<()> {
        self.link = Some(self.spawn("link")?);
        Ok(())
    }

    fn spawn(&self, command: &str) -> Result<Daemon> {
        let argv = vec![
            self.binary.clone().into_os_string(),
            command.into(),
            "--config".into(),
            self.config().into_os_string(),
        ];
        Daemon::spawn(Launch {
            name: &format!("the agent of {} ({command})", self.name),
            argv,
            env: vec![("NO_COLOR".to_owned(), "1".into())],
            dir: &self.root,
            log: &self.agent_log(),
            user: None,
            stop: Signal::TERM,
        })
    }

    /// Ends the link as a crash does.
    pub fn kill_link(&mut self) {
        if let Some(mut link) = self.link.take() {
            link.kill();
        }
    }

    /// Ends the agent as a crash does; what it started goes on, and so does the link of one that is
    /// two processes.
    pub fn kill_agent(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            agent.kill();
        }
    }

    /// Ends the agent in good order.
    pub fn stop_agent(&mut self) {
        self.link = None;
        self.agent = None;
    }

    /// Says that the agent runs, or how it ended.
    pub fn check(&mut self) -> Result<(), String> {
        match &mut self.agent {
            Some(agent) => agent.check(),
            None => Err(format!("the agent of {} is not running", self.name)),
        }
    }

    /// The agent's process.
    pub fn agent_pid(&self) -> Option<Pid> {
        self.agent.as_ref().map(Daemon::pid)
    }

    /// The step processes that run on the host now.
    pub fn step_processes(&self) -> Vec<processes::Process> {
        let mut found = processes::of(&self.root);
        found.retain(|process| {
            let mut words = process.argv.iter();
            words
                .next()
                .is_some_and(|program| Path::new(program).ends_with("lockstep-agent"))
                && words.next().is_some_and(|command| command == "step")
        });
        found
    }

    /// Kills the step process that is running, as the kernel does when memory runs out.
    pub fn kill_step_process(&self) -> Result<String> {
        let found = self.step_processes();
        let Some(step) = found.first() else {
            bail!("no step process runs on {}", self.name);
        };
        kill_process(step.pid, Signal::KILL).context("the step process cannot be killed")?;
        Ok(step.line())
    }
}

/// A text as TOML and JSON write it.
pub fn quote(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// A path as TOML and JSON write it.
pub fn quote_path(path: &Path) -> String {
    quote(&path.to_string_lossy())
}
