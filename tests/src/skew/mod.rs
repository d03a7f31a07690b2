//! Two releases in one fleet: what an upgrade goes through, and what a downgrade finds.
//!
//! ```text
//! stories    the runbook with the previous release on one side, or on some hosts; the upgrade in
//!            the middle of a step
//! refusals   what an older release does not know: it says so, and changes nothing
//! ```

use std::collections::BTreeMap;
use std::thread;

use anyhow::{Result, bail, ensure};
use serde_json::Value;

use crate::binaries::Binaries;
use crate::cluster::Cluster;
use crate::example::{self, ledger};
use crate::operator::{Operator, answer_gates, text};
use crate::previous::Previous;
use crate::snapshot::Snapshot;
use crate::wait;

pub mod refusals;
pub mod stories;

/// The two releases.
#[derive(Debug)]
pub struct Releases {
    /// The one before, with its commit.
    pub old: Previous,
    /// This one.
    pub new: Binaries,
}

/// A story: what it shows, and how. It says what it saw beside.
pub struct Story {
    /// Its name in the report.
    pub name: &'static str,
    /// What happens.
    pub run: fn(&Releases) -> Result<Vec<String>>,
}

/// All of them.
pub fn all() -> Vec<Story> {
    stories::ALL.into_iter().chain(refusals::ALL).collect()
}

/// Something that is done while a rollout runs.
type Interfere = fn(&mut Cluster, &Releases, &Operator, &str) -> Result<()>;

/// Runs the runbook for a release to its end, with people at the gates, while `interfere` does
/// what it does; fails unless it ends in `state`.
fn deploy(
    cluster: &mut Cluster,
    releases: &Releases,
    release: &str,
    state: &str,
    interfere: Option<Interfere>,
) -> Result<Value> {
    let rollout = cluster.submit(&example::plan(), release)?;
    let people = cluster.approvers();
    let watcher = cluster.requester();
    let (document, interfered) = thread::scope(|scope| {
        let answers = scope.spawn(|| {
            let people: Vec<&Operator> = people.iter().collect();
            answer_gates(&people, &rollout, wait::ROLLOUT, |_, _| {})
        });
        let interfered = interfere.map_or(Ok(()), |interfere| {
            interfere(cluster, releases, &watcher, &rollout)
        });
        let document = answers.join().expect("nobody at the gates panics");
        (document, interfered)
    });
    interfered.map_err(|error| error.context(cluster.last_words()))?;
    let document = document.map_err(|error| error.context(cluster.last_words()))?;
    if text(&document["state"]) != state {
        bail!("{release} is not {state}: {}", cluster.explain(&document));
    }
    Ok(document)
}

/// v0.9.5 is there, v1.0.0 goes out, v1.1.0 comes back, each effect once (INV-1, INV-6).
fn out_and_back(
    cluster: &mut Cluster,
    releases: &Releases,
    out: Interfere,
    between: fn(&mut Cluster, &Releases) -> Result<()>,
    back: Option<Interfere>,
) -> Result<()> {
    cluster.install()?;
    deploy(cluster, releases, "v1.0.0", "succeeded", Some(out))?;
    between(cluster, releases)?;
    let before = Snapshot::take(cluster)?;
    let document = deploy(cluster, releases, "v1.1.0", "rolled_back", back)?;
    let differences = before.differences(&Snapshot::take(cluster)?);
    ensure!(
        differences.is_empty(),
        "not as before: {}\n{}",
        differences.join("; "),
        cluster.explain(&document)
    );
    each_effect_once(cluster)
}

/// The application's own record of it all.
fn each_effect_once(cluster: &Cluster) -> Result<()> {
    let mut migrations = BTreeMap::<String, usize>::new();
    let mut tried = 0;
    for host in cluster.app_hosts() {
        for line in ledger(&host.migrations()) {
            *migrations.entry(line).or_default() += 1;
        }
        let effects = ledger(&host.effects());
        let mut expected = vec!["start 0.9.5", "stop 0.9.5", "start 1.0.0", "stop 1.0.0"];
        if effects.iter().any(|effect| effect == "start 1.1.0") {
            tried += 1;
            expected.extend(["start 1.1.0", "stop 1.1.0"]);
        }
        expected.push("start 1.0.0");
        ensure!(
            effects == expected,
            "the application's record on {}: {effects:?}",
            host.name
        );
    }
    ensure!(tried == 1, "{tried} hosts were given v1.1.0");
    let once = [
        "downgrade 0003_shifts",
        "upgrade 0001_base",
        "upgrade 0002_extended_fields",
        "upgrade 0003_shifts",
    ];
    let expected: BTreeMap<String, usize> = once.map(|migration| (migration.to_owned(), 1)).into();
    ensure!(
        migrations == expected,
        "the migrations' record: {migrations:?}"
    );
    Ok(())
}
