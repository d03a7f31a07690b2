//! What users install on hosts: certificates, PostgreSQL, the controller, agents, the application.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::machine::Stage;
use super::{ADMIN, CONTROL, Fleet, PORT, effects, faults};
use crate::cluster::PEOPLE;
use crate::hosts::{quote, quote_path};
use crate::operator::text;
use crate::{example, repository};

/// How long hosts' certificates live here: each is renewed while the fleet is at work.
const LIFE: &str = "3m";

impl Fleet {
    fn pki(&self) -> PathBuf {
        self.work.path().join("pki")
    }

    pub(super) fn make_certificates(&self) -> Result<()> {
        let pki = self.pki();
        let pki = pki
            .to_str()
            .context("the temporary directory's path is UTF-8")?;
        let make = |arguments: &[&str]| {
            let output = Command::new(&self.binaries.lockstep)
                .arg("pki")
                .args(arguments)
                .output()?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(
                output.status.success(),
                "lockstep pki {arguments:?}: {said}"
            );
            Ok(())
        };
        let at = ["--dir", pki, "--out", pki];
        make(&["init", "--dir", pki, "--domain", "example.com"])?;
        let address = &self.addresses[CONTROL];
        let names = [
            "controller",
            CONTROL,
            "--address",
            CONTROL,
            "--address",
            address,
        ];
        make(&[&names[..], &at].concat())?;
        for (name, groups) in PEOPLE {
            let groups = groups.iter().flat_map(|group| ["--group", group]);
            let mut arguments = vec!["operator", name];
            arguments.extend(groups);
            arguments.extend(at);
            make(&arguments)?;
        }
        make(&[&["operator", ADMIN, "--role", "admin"][..], &at].concat())
    }

    pub(super) fn install_database(&self) -> Result<()> {
        let as_postgres = ["runuser", "-u", "postgres", "--"];
        self.on("db-1", &["systemctl", "enable", "--now", "postgresql"])?;
        self.on("db-1", &["systemctl", "start", "postgresql@15-main"])?;
        let psql = [
            &as_postgres[..],
            &["psql", "-X", "-v", "ON_ERROR_STOP=1", "-f", "-"],
        ]
        .concat();
        let setup = fs::read_to_string(example::directory().join("app/db/setup.sql"))?;
        let passwords = format!(
            "\\setenv MIGRATOR_PASSWORD {}\n\\setenv APP_PASSWORD {}\n",
            self.secrets["migrator"], self.secrets["app"]
        );
        self.on_with("db-1", &psql, &format!("{passwords}{setup}"))?;
        self.on_with("db-1", &psql, "ALTER SYSTEM SET listen_addresses = '*'")?;
        let files = example::directory().join("hosts/db");
        for name in ["pg_hba.conf", "pg_ident.conf"] {
            let installed = format!("/etc/postgresql/15/main/{name}");
            let ours = fs::read_to_string(files.join(name))?;
            let theirs = self.on("db-1", &["cat", &installed])?;
            self.on_with("db-1", &["tee", &installed], &format!("{ours}{theirs}"))?;
        }
        self.on("db-1", &["systemctl", "restart", "postgresql@15-main"])?;
        let private = ["install", "-d", "-m", "700"];
        let copies = ["/backups", "/backups/production"];
        self.on("db-1", &[&private[..], &copies].concat())?;
        let backups = ["-o", "postgres", "-g", "postgres", "/var/backups/lockstep"];
        self.on("db-1", &[&private[..], &backups].concat())?;
        Ok(())
    }

    pub(super) fn install_controller(&self) -> Result<()> {
        let stage = Stage::new(self.work.path().join("stage").join(CONTROL))?;
        let deploy = repository().join("deploy/systemd");
        stage.copy(&self.binaries.lockstep, "usr/bin/lockstep", 0o755)?;
        stage.copy(
            &deploy.join("lockstep-sysusers.conf"),
            "usr/lib/sysusers.d/lockstep.conf",
            0o644,
        )?;
        let unit = "lockstep-controller.service";
        stage.copy(
            &deploy.join(unit),
            &format!("etc/systemd/system/{unit}"),
            0o644,
        )?;
        let example = fs::read_to_string(deploy.join("controller.toml"))?;
        let lives = format!("[enroll]\nlife = \"{LIFE}\"\n");
        let configuration = example.replacen("[enroll]\n", &lives, 1);
        ensure!(configuration != example, "the example lets hosts enrol");
        stage.write("etc/lockstep/controller.toml", &configuration, 0o640)?;
        let certificate = |kind: &str| self.pki().join(format!("controller-{CONTROL}.{kind}"));
        stage.copy(
            &certificate("crt"),
            "etc/lockstep/tls/controller.crt",
            0o644,
        )?;
        stage.copy(
            &certificate("key"),
            "etc/lockstep/tls/controller.key",
            0o640,
        )?;
        for (file, mode) in [
            ("ca-agents.crt", 0o644),
            ("ca-operators.crt", 0o644),
            ("ca-controllers.crt", 0o644),
            ("ca-agents.key", 0o640),
        ] {
            let to = format!("etc/lockstep/tls/{file}");
            stage.copy(&self.pki().join(file), &to, mode)?;
        }
        stage.put(CONTROL)?;
        self.on(CONTROL, &["systemd-sysusers"])?;
        self.on(
            CONTROL,
            &["install", "-d", "-m", "750", "/etc/lockstep/secrets"],
        )?;
        self.on(CONTROL, &["chgrp", "-R", "lockstep", "/etc/lockstep"])?;
        // Python's own mail server, which prints what it gets into its journal.
        let mail = [
            "systemd-run",
            "--unit=mail",
            "/usr/bin/python3",
            "-u",
            "-m",
            "smtpd",
            "-n",
        ];
        self.on(
            CONTROL,
            &[&mail[..], &["-c", "DebuggingServer", "127.0.0.1:25"]].concat(),
        )?;
        self.on(CONTROL, &["systemctl", "daemon-reload"])?;
        self.on(
            CONTROL,
            &["systemctl", "enable", "--now", "lockstep-controller"],
        )?;
        Ok(())
    }

    pub(super) fn install_host(&self, name: &str, role: &str) -> Result<()> {
        let stage = Stage::new(self.work.path().join("stage").join(name))?;
        let deploy = repository().join("deploy/systemd");
        stage.copy(&self.binaries.agent, "usr/bin/lockstep-agent", 0o755)?;
        stage.copy(
            &deploy.join("lockstep-agent-sysusers.conf"),
            "usr/lib/sysusers.d/lockstep-agent.conf",
            0o644,
        )?;
        for unit in [
            "lockstep-agent.service",
            "lockstep-link.service",
            "lockstep-steps.slice",
        ] {
            stage.copy(
                &deploy.join(unit),
                &format!("etc/systemd/system/{unit}"),
                0o644,
            )?;
        }
        let files = example::directory().join("hosts").join(role);
        let policy = fs::read_to_string(files.join("policy.toml"))?;
        effects::stage(&stage, &policy, &faults::services())?;
        stage.write(
            "etc/lockstep/agent.toml",
            &configuration(&files, name)?,
            0o644,
        )?;
        if role == "app" {
            self.stage_app(&stage, &files)?;
        }
        stage.put(name)?;
        self.on(name, &["chmod", "755", "/etc/lockstep"])?;
        if role == "app" {
            self.on(name, &["chmod", "700", "/etc/lockstep/secrets"])?;
        }
        if role == "app" {
            let user = ["useradd", "--system", "--create-home", "employee"];
            self.on(name, &user)?;
            let own = ["install", "-d", "-o", "employee", "-g", "employee"];
            let places = ["/var/www/employee-system", "/var/log/employee-system"];
            self.on(name, &[&own[..], &places].concat())?;
            // git gives a repository to nobody but its owner.
            self.on(name, &["chown", "-R", "employee:", "/srv/git"])?;
        }
        self.on(name, &["systemd-sysusers"])?;
        self.on(name, &["systemctl", "daemon-reload"])?;
        self.join(name)
    }

    /// What makes a machine a host: a token, then these two commands.
    fn join(&self, name: &str) -> Result<()> {
        let made = self.operator(ADMIN).json(&["token", "create", name])?;
        let controller = format!("{CONTROL}:{PORT}");
        let join = ["lockstep-agent", "join", "--controller", &controller];
        let token = ["--ca-pin", text(&made["ca_pin"]), "--token-file", "-"];
        self.on_with(name, &[join, token].concat(), text(&made["secret"]))?;
        self.on(name, &["systemctl", "enable", "--now", "lockstep-agent"])?;
        Ok(())
    }

    fn stage_app(&self, stage: &Stage, files: &Path) -> Result<()> {
        let unit = "employee-backend.service";
        stage.copy(
            &files.join(unit),
            &format!("etc/systemd/system/{unit}"),
            0o644,
        )?;
        example::make_history(&stage.directory.join("srv/git/employee-system"))?;
        let url = |user: &str, password: &str| {
            format!("postgresql://{user}:{password}@db-1/{}", example::DATABASE)
        };
        let secret = |name: &str| self.secrets[name].as_str();
        for (name, value) in [
            ("migrator_password", secret("migrator").to_owned()),
            (
                "migrator_database_url",
                url("employee_migrator", secret("migrator")),
            ),
            ("app_database_url", url("employee_app", secret("app"))),
            ("secret_key", secret("secret_key").repeat(2)),
            ("admin_password", secret("admin").to_owned()),
        ] {
            stage.write(&format!("etc/lockstep/secrets/{name}"), &value, 0o600)?;
        }
        Ok(())
    }

    pub(super) fn make_profiles(&self) -> Result<()> {
        for name in PEOPLE.map(|(name, _)| name).into_iter().chain([ADMIN]) {
            let profile = self.operator(name).profile;
            fs::create_dir_all(profile.parent().expect("a profile has a directory"))?;
            let pki = self.pki();
            let text = format!(
                "controller = {}\nca = {}\ncert = {}\nkey = {}\n",
                quote(&format!("{}:{PORT}", self.addresses[CONTROL])),
                quote_path(&pki.join("ca-controllers.crt")),
                quote_path(&pki.join(format!("operator-{name}.crt"))),
                quote_path(&pki.join(format!("operator-{name}.key"))),
            );
            fs::write(profile, text)?;
        }
        Ok(())
    }
}

/// The example's configuration with this host's name, and how this machine reaches packages.
fn configuration(files: &Path, name: &str) -> Result<String> {
    let text = fs::read_to_string(files.join("agent.toml"))?;
    let mut out = String::new();
    for line in text.lines() {
        if line.starts_with("host = ") && !out.contains('[') {
            write!(out, "host = {}", quote(name))?;
        } else if let Some((key, file)) = line.split_once(" = \"tls/") {
            // Where the link may write, for it renews them.
            write!(out, "{key} = \"/var/lib/lockstep-link/tls/{file}")?;
        } else {
            out.push_str(line);
        }
        out.push('\n');
        if line == "[apps.employee-system.env]" {
            for (variable, value) in example::package_indexes() {
                writeln!(out, "{variable} = {}", quote(&value))?;
            }
        }
    }
    Ok(out)
}
