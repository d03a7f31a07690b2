//! `lockstep-agent check`: what the host allows, and what is wrong, before a controller asks.

use std::fmt::Write as _;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use crate::config::Config;
use crate::errors::chain;
use crate::exec::{Policy, Runner, check_owner};
use crate::tls::{Identity, client_config};
use crate::{exit, say};

/// Prints what was found; problems go to standard error.
pub(crate) fn check(path: &Path) -> u8 {
    let config = match Config::load(path) {
        Ok(config) => config,
        Err(error) => {
            say(&chain(&error));
            return exit::USAGE;
        }
    };
    let policy_path = config.policy_path();
    let policy = match Policy::load(policy_path) {
        Ok(policy) => policy,
        Err(error) => {
            say(&chain(&error));
            return exit::USAGE;
        }
    };
    let mut found = Found::default();
    found.host(&config, path);
    found.certificates(&config);
    found.files(&config, path);
    found.policy(&policy, policy_path);
    // Whoever closes the pipe has read enough.
    let _ = std::io::stdout().write_all(found.text.as_bytes());
    for problem in &found.problems {
        say(problem);
    }
    if found.problems.is_empty() {
        exit::DONE
    } else {
        exit::PROBLEMS
    }
}

#[derive(Default)]
struct Found {
    text: String,
    problems: Vec<String>,
}

impl Found {
    fn line(&mut self, name: &str, value: impl std::fmt::Display) {
        let _ = writeln!(self.text, "{name:<14}{value}");
    }

    fn host(&mut self, config: &Config, path: &Path) {
        self.line("host", &config.host);
        self.line("controller", &config.controller);
        let labels: Vec<String> = config
            .labels
            .iter()
            .map(|(k, v)| format!("{k}={v}"))
            .collect();
        self.line("labels", labels.join(" "));
        self.line("state", config.state_dir.display());
        match Runner::new(config.steps, path) {
            Ok(runner) => self.line("steps run in", runner.describe()),
            Err(error) => self
                .problems
                .push(format!("steps cannot be started: {error}")),
        }
    }

    fn certificates(&mut self, config: &Config) {
        let identity = match Identity::load(&config.tls) {
            Ok(identity) => identity,
            Err(error) => return self.problems.push(chain(&error)),
        };
        let name = format!("spiffe://{}/agent/{}", identity.domain, identity.host);
        self.line("certificate", name);
        if identity.host != config.host {
            self.problems.push(format!(
                "the certificate is that of `{}`, {} says `{}`",
                identity.host, "agent.toml", config.host
            ));
        }
        let now = crate::exec::wall_clock().0 / 1000;
        let left = identity.not_after.saturating_sub_unsigned(now);
        if left <= 0 {
            self.problems.push("the certificate has expired".to_owned());
        } else {
            self.line("valid for", format!("{} h", left / 3600));
        }
        if let Err(error) = client_config(&config.tls, &identity) {
            self.problems.push(chain(&error));
        }
    }

    /// Who could change what decides, or read what is secret.
    fn files(&mut self, config: &Config, path: &Path) {
        self.problems.extend(check_owner(path).err());
        self.problems
            .extend(private(&config.tls.key, "the agent's key"));
        if let Some(secrets) = &config.secrets_dir {
            let entries = std::fs::read_dir(secrets).into_iter().flatten().flatten();
            for entry in entries {
                self.problems.extend(private(&entry.path(), "a secret"));
            }
        }
    }

    fn policy(&mut self, policy: &Policy, path: &Path) {
        let note = if policy.exists() {
            ""
        } else {
            " (not there: only probes are allowed)"
        };
        self.line("policy", format!("{}{note}", path.display()));
        for (action, says) in policy.overview() {
            let _ = writeln!(self.text, "  {action:<26}{says}");
        }
    }
}

fn private(path: &Path, what: &str) -> Option<String> {
    // A file that is missing is named where it is needed.
    let mode = std::fs::metadata(path).ok()?.mode();
    let file = path.display();
    (mode & 0o077 != 0).then(|| {
        format!("{what} {file} can be read by others than its owner; run: chmod 0600 {file}")
    })
}
