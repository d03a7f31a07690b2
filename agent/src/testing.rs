//! A host in a temporary directory, for tests of actions.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use lockstep_proto::ids::{Direction, RolloutId, StepKey, StepRef};
use lockstep_proto::order::{Binding, Fact};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::config::{Config, StepRunner, Tls};
use crate::step::{Context, StepLog};

mod tools;

pub(crate) use tools::{environment, program};

/// A host in a temporary directory.
pub(crate) struct Host {
    /// Removed with the value.
    root: tempfile::TempDir,
    /// What the contexts made from now on see.
    pub(crate) config: Config,
    attempts: AtomicU16,
}

impl Host {
    /// A host with nothing on it.
    pub(crate) fn new() -> Self {
        let root = tempfile::tempdir().expect("there is room for a temporary directory");
        let at = |name: &str| {
            let path = root.path().join(name);
            std::fs::create_dir(&path).expect("a new directory can be made in a new directory");
            path
        };
        let tls = Tls {
            controller_ca: "ca.pem".into(),
            cert: "agent.pem".into(),
            key: "agent.key".into(),
        };
        let config = Config {
            host: "host-1".parse().expect("a host name"),
            controller: "localhost:0".into(),
            controller_name: None,
            state_dir: at("state"),
            run_dir: at("run"),
            link_user: None,
            policy: None,
            secrets_dir: Some(at("secrets")),
            secrets: BTreeMap::new(),
            vault: None,
            tls,
            labels: BTreeMap::new(),
            vars: BTreeMap::new(),
            steps: StepRunner::Session,
            apps: BTreeMap::new(),
            services: BTreeMap::new(),
            postgres: BTreeMap::new(),
        };
        Self {
            root,
            config,
            attempts: AtomicU16::new(1),
        }
    }

    /// The host's directory.
    pub(crate) fn path(&self) -> &Path {
        self.root.path()
    }

    /// Puts a secret on the host.
    pub(crate) fn secret(&self, name: &str, value: &str) {
        let directory = self.config.secrets_dir.as_ref().expect("set in `new`");
        std::fs::write(directory.join(name), value).expect("secrets can be written");
    }

    /// What the next attempt at the step 0.0 sees. It has a minute.
    pub(crate) fn context(&self) -> Context {
        self.context_with(vec![])
    }

    /// The same with bound facts.
    pub(crate) fn context_with(&self, facts: Vec<Fact>) -> Context {
        let attempt = self.attempts.fetch_add(1, Ordering::Relaxed);
        let key = StepKey {
            rollout: RolloutId::from_random([1; 6]),
            host: self.config.host.clone(),
            at: StepRef { phase: 0, step: 0 },
            direction: Direction::Do,
            attempt,
        };
        let dir = self
            .config
            .state_dir
            .join("steps")
            .join(key.to_string())
            .join("files");
        std::fs::create_dir_all(&dir).expect("an attempt's directory can be made");
        let bindings = facts.into_iter().map(|fact| Binding {
            origin: key.clone(),
            fact,
            signature: None,
        });
        Context {
            secrets: Arc::default(),
            bindings: bindings.collect(),
            key,
            config: Arc::new(self.config.clone()),
            dir,
            log: StepLog::nowhere(),
            deadline: Instant::now() + Duration::from_mins(1),
            stop: CancellationToken::new(),
            log_offsets: Arc::new(BTreeMap::new()),
            dry_run: false,
        }
    }
}
