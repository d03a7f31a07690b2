//! Hosts that join a cluster while it runs.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use super::Cluster;
use crate::hosts::{Host, Settings, quote, quote_path};
use crate::operator::{Operator, Said};

impl Cluster {
    /// An admin with a certificate.
    pub fn admin(&self) -> Result<Operator> {
        self.person("ada", &["--role", "admin"])
    }

    /// One more person, whose certificate is made with these arguments.
    pub fn person(&self, name: &str, arguments: &[&str]) -> Result<Operator> {
        let pki = self.pki();
        let text = pki.to_str().context("the path is UTF-8")?;
        let at = ["--dir", text, "--out", text];
        self.make_certificate(&[&["operator", name], arguments, &at].concat())?;
        let directory = self.root().join("operators").join(name);
        fs::create_dir_all(&directory)?;
        let profile = directory.join("profile.toml");
        let file = |name: &str| quote_path(&pki.join(name));
        let text = format!(
            "controller = {}\nca = {}\ncert = {}\nkey = {}\n",
            quote(self.address()),
            file("ca-controllers.crt"),
            file(&format!("operator-{name}.crt")),
            file(&format!("operator-{name}.key")),
        );
        fs::write(&profile, text)?;
        Ok(Operator {
            name: name.to_owned(),
            groups: vec![],
            binary: self.binaries().lockstep.clone(),
            profile,
        })
    }

    /// Runs `lockstep-agent join` with a token that the admin makes for the host, and more
    /// arguments.
    pub fn join(&self, admin: &Operator, host: &str, more: &[&str]) -> Result<Said> {
        let made = admin.json(&["token", "create", host])?;
        let secret = made["secret"].as_str().context("the token")?;
        let pin = made["ca_pin"].as_str().context("the pin")?;
        let token = self.root().join(format!("token-{host}"));
        fs::write(&token, secret)?;
        self.join_with(&token, pin, more)
    }

    /// Runs `lockstep-agent join` with a token in a file.
    pub fn join_with(&self, token: &PathBuf, pin: &str, more: &[&str]) -> Result<Said> {
        let output = Command::new(&self.binaries().agent)
            .args(["join", "--controller", self.address(), "--ca-pin", pin])
            .arg("--token-file")
            .arg(token)
            .args(more)
            .stdin(Stdio::null())
            .output()?;
        Ok(Said {
            code: output.status.code().unwrap_or(128),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        })
    }

    /// Adds a host that joins: its key is made by its agent.
    pub fn add_host(&mut self, admin: &Operator, name: &str, policy: &str) -> Result<()> {
        let root = self.root().join("hosts").join(name);
        let binary = self.binaries().agent.clone();
        let host = Host::new(root.clone(), name, "127.0.0.1".to_owned(), binary)?;
        let file = |name: &str| root.join("tls").join(name);
        let settings = Settings {
            controller: self.address().to_owned(),
            tls: [
                file("ca-controllers.crt"),
                file("agent.crt"),
                file("agent.key"),
            ],
            labels: [("role".to_owned(), "app".to_owned())].into(),
            vars: [(
                "effects_file".to_owned(),
                host.effects().display().to_string(),
            )]
            .into(),
            policy: Some(policy.to_owned()),
            ..Settings::default()
        };
        host.configure(&settings)?;
        let config = host.config().display().to_string();
        let said = self.join(admin, name, &["--config", &config])?;
        ensure!(said.code == 0, "{name} did not join: {}", said.text());
        self.hosts.insert(name.to_owned(), host);
        self.host_mut(name).start_agent()
    }
}
