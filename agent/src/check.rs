//! `lockstep-agent check`: what the host allows, and what is wrong, before a controller asks.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use lockstep_proto::report::Failure;
use lockstep_proto::seal;
use lockstep_proto::values::Timestamp;

use crate::config::{Config, Service};
use crate::errors::chain;
use crate::exec::{ExecError, Policy, Runner, check_owner, explain};
use crate::journal::{self, Record};
use crate::process::{Program, User};
use crate::secrets::{Source, named};
use crate::tls::{Identity, client_config, wrong_anchor};
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
    found.names(&config);
    found.secrets(&config);
    found.state(&config);
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
        self.problems.extend(wrong_anchor(&config.tls, &identity));
    }

    /// Who could change what decides, or read what is secret.
    fn files(&mut self, config: &Config, path: &Path) {
        self.problems.extend(unsafe_files(config, path));
        self.problems.extend(unsafe_key(config));
        if let Some(secrets) = &config.secrets_dir {
            let entries = std::fs::read_dir(secrets).into_iter().flatten().flatten();
            for entry in entries {
                self.problems.extend(private(&entry.path(), "a secret"));
            }
        }
        for source in config.secrets.values() {
            if let Source::File(file) = source {
                self.problems.extend(private(file, "a secret"));
            }
        }
    }

    /// Names that stand in the configuration, and what they stand for.
    fn names(&mut self, config: &Config) {
        let mut found = vec![];
        let mut user = |table: &str, name: &str, user: &Option<String>| {
            let user = user.as_deref().map(User::find).transpose();
            found.extend(
                user.err()
                    .map(|no| format!("[{table}.{name}]: {}", no.message)),
            );
        };
        for (name, app) in &config.apps {
            user("apps", name, &app.user);
        }
        for (name, service) in &config.services {
            user("services", name, &service.user);
        }
        for (name, database) in &config.postgres {
            user("postgres", name, &database.os_user);
        }
        for (name, service) in &config.services {
            found.extend(missing_programs(config, name, service));
        }
        self.problems.extend(found);
    }

    /// Whether each secret can be had from where the configuration says it is. What is fetched is
    /// dropped at once.
    fn secrets(&mut self, config: &Config) {
        let runtime = match crate::runtime() {
            Ok(runtime) => runtime,
            Err(error) => {
                return self
                    .problems
                    .push(format!("cannot look up secrets: {error}"));
            }
        };
        let secrets = secrets(config);
        if !secrets.is_empty() {
            self.text += "secrets\n";
        }
        for (name, used) in secrets {
            let source = config.secrets.get(name).map(Source::describe);
            let source = source.unwrap_or_else(|| "credential or file of its name".to_owned());
            let had = runtime.block_on(crate::secrets::resolve(config, name));
            let says = if had.is_ok() { "" } else { ": CANNOT BE HAD" };
            let _ = writeln!(self.text, "  {name:<26}{source}{says}");
            if let Err(Failure { message, hint, .. }) = had {
                let hint = hint.map(|hint| format!("; {hint}")).unwrap_or_default();
                self.problems.push(format!("{used}: {message}{hint}"));
            }
        }
    }

    /// A state directory that another domain's agent has used is not taken up.
    fn state(&mut self, config: &Config) {
        let Ok(identity) = Identity::load(&config.tls) else {
            return;
        };
        let opened = journal::verify(&config.state_dir).ok();
        if let Some(Record::Opened { domain, .. }) = opened.and_then(|found| found.opened)
            && domain != identity.domain
        {
            self.problems.push(chain(&ExecError::OtherDomain {
                state: config.state_dir.clone(),
                journal: domain,
                certificate: identity.domain,
            }));
        }
    }

    fn policy(&mut self, policy: &Policy, path: &Path) {
        let note = if policy.exists() {
            ""
        } else {
            " (not there: only probes are allowed)"
        };
        self.line("policy", format!("{}{note}", path.display()));
        if let Some(seal) = policy.trust().seal() {
            self.line("takes only", seal.describe());
        }
        if let Some(approvers) = policy.trust().approvers() {
            let names: Vec<&str> = approvers.iter().map(|it| it.name.as_str()).collect();
            self.line("approvals", format!("signed by {}", names.join(", ")));
        }
        let breakers = policy.trust().breakers();
        if !breakers.is_empty() {
            let names: Vec<&str> = breakers.iter().map(|it| it.name.as_str()).collect();
            self.line("break-glass", format!("two of {}", names.join(", ")));
        }
        for (action, says) in policy.overview() {
            let _ = writeln!(self.text, "  {action:<26}{says}");
        }
    }
}

/// What keeps the agent from starting: files that decide and that others than their owner can
/// change.
pub(crate) fn unsafe_files(config: &Config, path: &Path) -> Vec<String> {
    let directories = [path, config.policy_path()].map(|file| match file.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    });
    let secrets = config.secrets_dir.as_deref();
    let mut found: Vec<String> = check_owner(path).err().into_iter().collect();
    found.extend(
        directories
            .into_iter()
            .chain(secrets)
            .filter_map(open_directory),
    );
    found.dedup();
    found
}

/// What keeps the network side from starting: a key that others can read.
pub(crate) fn unsafe_key(config: &Config) -> Option<String> {
    private(&config.tls.key, "the agent's key")
}

/// A directory in which others could put files in place of those that are there.
fn open_directory(path: &Path) -> Option<String> {
    const STICKY: u32 = 0o1000;
    // One that is missing is named where it is needed.
    let mode = std::fs::metadata(path).ok()?.mode();
    let directory = path.display();
    (mode & 0o022 != 0 && mode & STICKY == 0).then(|| {
        format!(
            "the directory {directory} can be written by others than its owner; run: chmod go-w \
             {directory}"
        )
    })
}

/// Programs and directories of a service that are not there. Those within an application's
/// directory come and go with its releases.
fn missing_programs(config: &Config, name: &str, service: &Service) -> Vec<String> {
    let of_release = |path: &Path| config.apps.values().any(|app| path.starts_with(&app.root));
    let commands = [
        &service.argv,
        &service.start,
        &service.stop,
        &service.status,
    ];
    let commands = commands.into_iter().filter(|argv| !argv.is_empty());
    let missing = commands.filter_map(|argv| {
        let dir = service.dir.clone().filter(|_| *argv == service.argv);
        let program = dir.clone().unwrap_or_default().join(argv.first()?);
        if dir.as_deref().is_some_and(of_release) || of_release(&program) {
            return None;
        }
        let program = Program {
            argv: argv.clone(),
            dir,
            ..Program::default()
        };
        let no = program.check().err()?;
        Some(format!("[services.{name}]: {}", no.message))
    });
    missing.collect()
}

/// The names of all secrets that the configuration speaks of, each with where it is used first.
fn secrets(config: &Config) -> BTreeMap<&str, String> {
    let mut found = BTreeMap::new();
    for (name, database) in &config.postgres {
        let passwords = [&database.password, &database.migrate_password];
        for text in passwords.into_iter().flatten() {
            let secret = named(text).unwrap_or(text);
            found
                .entry(secret)
                .or_insert_with(|| format!("[postgres.{name}]"));
        }
    }
    for (name, app) in &config.apps {
        for secret in app.env.values().filter_map(|text| named(text)) {
            found
                .entry(secret)
                .or_insert_with(|| format!("[apps.{name}]"));
        }
    }
    if let Some(token) = config.vault.as_ref().and_then(|vault| named(&vault.token)) {
        found.entry(token).or_insert_with(|| "[vault]".to_owned());
    }
    for name in config.secrets.keys() {
        found
            .entry(name)
            .or_insert_with(|| format!("[secrets.{name}]"));
    }
    found
}

/// `policy check`: what the policy says of a compiled plan.
pub(crate) fn policy(config: &Config, plan: &Path, at: Option<Timestamp>) -> u8 {
    let policy = match Policy::load(config.policy_path()) {
        Ok(policy) => policy,
        Err(error) => {
            say(&chain(&error));
            return exit::USAGE;
        }
    };
    let opened = std::fs::read(plan)
        .map_err(|error| error.to_string())
        .and_then(|bytes| seal::open(bytes.trim_ascii_end()).map_err(|error| chain(&error)));
    let sealed = match opened {
        Ok(sealed) => sealed,
        Err(why) => {
            say(&format!(
                "cannot read the compiled plan {}: {why}",
                plan.display()
            ));
            say("hint: `lockstep compile` writes one from a plan file");
            return exit::USAGE;
        }
    };
    let at = at.unwrap_or_else(crate::exec::wall_clock);
    let explained = explain(sealed.plan(), config, &policy, at);
    // Whoever closes the pipe has read enough.
    let _ = std::io::stdout().write_all(explained.text.as_bytes());
    if explained.allowed {
        exit::DONE
    } else {
        exit::PROBLEMS
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
