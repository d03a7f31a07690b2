//! The employee system of `deploy/examples`: its files, its history, its own ledger of effects.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::daemon::PATH;
use crate::postgres::Postgres;

/// The database's name, on the server and in plans.
pub const DATABASE: &str = "employee_system";

/// The service's name.
pub const SERVICE: &str = "employee-backend";

/// The application's name, and its directory's.
pub const APP: &str = "employee-system";

/// The port that the application listens on.
pub const PORT: u16 = 8000;

/// The example's directory.
pub fn directory() -> PathBuf {
    crate::repository().join("deploy/examples/employee-system")
}

/// The runbook as a plan.
pub fn plan() -> PathBuf {
    directory().join("plan.yaml")
}

/// The plan that brings the first release onto empty hosts.
pub fn install_plan() -> PathBuf {
    directory().join("install.yaml")
}

/// Builds the application's git repository, with one tag per release.
pub fn make_history(destination: &Path) -> Result<()> {
    let made = Command::new("sh")
        .arg(directory().join("app/make-history.sh"))
        .arg(destination)
        .env_clear()
        .env("PATH", PATH)
        .output()?;
    let said = String::from_utf8_lossy(&made.stderr);
    ensure!(made.status.success(), "make-history.sh failed: {said}");
    Ok(())
}

/// Makes the roles and the empty database.
pub fn make_database(postgres: &Postgres, migrator: &str, application: &str) -> Result<()> {
    let passwords = BTreeMap::from([
        ("MIGRATOR_PASSWORD", migrator.to_owned()),
        ("APP_PASSWORD", application.to_owned()),
    ]);
    postgres
        .run_file(&directory().join("app/db/setup.sql"), &passwords)
        .context("the example's roles cannot be made")
}

/// A line of the application's own record: `start v1.0.0`, `upgrade 0002_extended_fields`.
/// Process numbers and times are left out.
pub fn ledger(file: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    text.lines()
        .map(|line| line.split(' ').take(2).collect::<Vec<_>>().join(" "))
        .collect()
}

/// The variables and files by which this machine's pip and npm reach their indexes; builds on the
/// hosts of a cluster have nothing else of the environment.
pub fn package_indexes() -> BTreeMap<String, String> {
    let proxies = ["http_proxy", "https_proxy", "no_proxy"];
    let more = ["NODE_EXTRA_CA_CERTS", "REQUESTS_CA_BUNDLE"];
    std::env::vars()
        .filter(|(name, _)| {
            name.starts_with("PIP_")
                || name.to_ascii_lowercase().starts_with("npm_config_")
                || proxies.contains(&name.to_ascii_lowercase().as_str())
                || more.contains(&name.as_str())
        })
        .collect()
}
