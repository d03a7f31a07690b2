//! A controller played by the test, with real TLS, and a host with the real agent.

use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use lockstep_proto::ids::{Digest, Direction, Epoch, RolloutId, StepKey, StepRef};
use lockstep_proto::seal::{SealedPlan, seal};
use lockstep_tests::played::{self, Issuer, Keys, PATIENCE, Side, compiled};
use serde_json::Value;
use tokio::time::timeout;

pub(crate) use lockstep_tests::played::Session;

pub(crate) const HOST: &str = "app-1";
pub(crate) const DOMAIN: &str = "example.org";

/// A played controller, with issuers of its own.
pub(crate) struct Controller {
    played: played::Controller,
    agents: Issuer,
    controllers: Issuer,
}

impl Deref for Controller {
    type Target = played::Controller;
    fn deref(&self) -> &played::Controller {
        &self.played
    }
}

impl DerefMut for Controller {
    fn deref_mut(&mut self) -> &mut played::Controller {
        &mut self.played
    }
}

impl Controller {
    pub(crate) async fn start() -> Self {
        Self::start_as("controller/main").await
    }

    /// One whose certificate says something else.
    pub(crate) async fn start_as(role: &str) -> Self {
        let (agents, controllers) = (Issuer::new(), Issuer::new());
        let (certificate, key) = controllers.issue(DOMAIN, role, Side::Server);
        let keys = Keys {
            certificate,
            key,
            agents: agents.pem().to_owned(),
        };
        let loopback = ([127, 0, 0, 1], 0).into();
        Self {
            played: played::Controller::start(&keys, loopback).await,
            agents,
            controllers,
        }
    }

    /// The issuer of agents' certificates.
    pub(crate) fn agents_issuer(&self) -> &str {
        self.agents.pem()
    }
}

/// A host with the agent's files.
pub(crate) struct Host {
    pub(crate) root: tempfile::TempDir,
    pub(crate) config: PathBuf,
    agent: Option<Child>,
}

impl Host {
    pub(crate) fn new(controller: &Controller, policy: &str) -> Self {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        let name = format!("agent/{HOST}");
        let (pem, key) = controller.agents.issue(DOMAIN, &name, Side::Client);
        private_file(&at("agent.pem"), &pem);
        private_file(&at("agent.key"), &key);
        private_file(&at("ca.pem"), controller.controllers.pem());
        private_file(&at("policy.toml"), policy);
        let text = format!(
            "host = '{HOST}'\ncontroller = 'localhost:{port}'\nstate_dir = '{root}/state'\n\
             run_dir = '{root}/run'\nsteps = '{steps}'\n\
             [tls]\ncontroller_ca = 'ca.pem'\ncert = 'agent.pem'\nkey = 'agent.key'\n\
             [labels]\nrole = 'app'\n[vars]\nroot = '{root}'\n",
            // On a host of the fleet: systemd.
            steps = std::env::var("LOCKSTEP_TEST_STEPS").unwrap_or_else(|_| "session".to_owned()),
            port = controller.address.port(),
            root = root.path().display(),
        );
        let config = at("agent.toml");
        private_file(&config, &text);
        Self {
            root,
            config,
            agent: None,
        }
    }

    /// Gives the host a certificate of another domain.
    pub(crate) fn move_to(&self, controller: &Controller, domain: &str) {
        let name = format!("agent/{HOST}");
        let (pem, key) = controller.agents.issue(domain, &name, Side::Client);
        private_file(&self.path("agent.pem"), &pem);
        private_file(&self.path("agent.key"), &key);
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// The journal's records, as auditors read them.
    pub(crate) fn journal(&self) -> Vec<Value> {
        let exported = Command::new(env!("CARGO_BIN_EXE_lockstep-agent"))
            .args(["audit", "export", "--config"])
            .arg(&self.config)
            .output()
            .unwrap();
        assert!(exported.status.success(), "{exported:?}");
        let text = String::from_utf8(exported.stdout).unwrap();
        let lines = text.lines().map(serde_json::from_str);
        lines.collect::<Result<_, _>>().unwrap()
    }

    pub(crate) fn command(&self, name: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lockstep-agent"));
        command.arg(name).arg("--config").arg(&self.config);
        command
    }

    pub(crate) fn start(&mut self) {
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.path("agent.log"))
            .unwrap();
        let child = self
            .command("run")
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.agent = Some(child);
    }

    /// Ends the agent without a chance to do anything.
    pub(crate) fn kill(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            agent.kill().unwrap();
            agent.wait().unwrap();
        }
    }

    /// Ends it with SIGTERM; answers with its exit code.
    pub(crate) fn stop(&mut self) -> Option<i32> {
        let mut agent = self.agent.take().unwrap();
        let pid = rustix::process::Pid::from_child(&agent);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        agent.wait().unwrap().code()
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.path("agent.log")).unwrap_or_default()
    }

    /// The step process that has claimed an attempt.
    pub(crate) async fn claimed(&self, key: &StepKey) -> rustix::process::Pid {
        let claim = self.path("state/steps").join(key.to_string()).join("claim");
        let pid = wait_for("a claim", || {
            let text = std::fs::read(&claim).ok()?;
            let claim: Value = serde_json::from_slice(&text).ok()?;
            claim["pid"].as_i64()
        })
        .await;
        rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.kill();
        #[expect(clippy::print_stderr, reason = "for whoever reads why the test failed")]
        if std::thread::panicking() {
            eprintln!("the agent's log:\n{}", self.log());
        }
    }
}

pub(crate) async fn wait_for<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let wait = async {
        loop {
            if let Some(value) = ask() {
                return value;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, wait)
        .await
        .unwrap_or_else(|_| panic!("no {what} in time"))
}

fn private_file(path: &Path, text: &str) {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
}

pub(crate) fn rollout(byte: u8) -> RolloutId {
    RolloutId::from_random([byte; 6])
}

pub(crate) fn epoch(counter: u64) -> Epoch {
    Epoch { counter, id: 77 }
}

pub(crate) fn key(rollout: &RolloutId, step: u16, direction: Direction, attempt: u16) -> StepKey {
    StepKey {
        rollout: rollout.clone(),
        host: HOST.parse().unwrap(),
        at: StepRef { phase: 0, step },
        direction,
        attempt,
    }
}

/// A plan with these actions for this host.
pub(crate) fn plan(actions: &[(&str, Value)]) -> SealedPlan {
    let sealed = seal(compiled(actions)).unwrap();
    assert_eq!(sealed.digest(), Digest::of(sealed.bytes()));
    sealed
}
