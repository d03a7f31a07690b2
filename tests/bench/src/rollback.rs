//! A rollback of a release: real agents point at the new one, their service starts, a check fails, and
//! everything goes back by itself.
//!
//! What is fetched, linked and started is real; the service is a process that sleeps.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use lockstep_tests::cluster::Cluster;
use lockstep_tests::operator::{list, steps, text};
use lockstep_tests::wait;
use serde_json::Value;

use crate::real::agents;
use crate::report::{Report, median, part};

const HOSTS: usize = 10;

/// For a host's way back, in milliseconds, with its service's start: that is one that sleeps.
const MOST: f64 = 1000.0;

const POLICY: &str = r#"
[[allow]]
action = "release.*"
where = { app = ["shop"] }

[[allow]]
action = "service.*"
where = { service = ["shop"] }

[[allow]]
action = "check.command"
where = { argv = [["/usr/bin/test", "*", "=", "v1"]] }
"#;

const TABLES: &str = r#"
[apps.shop]
root = "@HOST@/shop"

[services.shop]
argv = ["/usr/bin/sleep", "1000000"]
dir = "@HOST@/shop/current"
"#;

pub(crate) fn measure(report: &mut Report, quick: bool) -> Result<()> {
    let runs = if quick { 2 } else { 5 };
    let cluster = agents(HOSTS, POLICY, TABLES)?.start()?;
    let git = cluster.root().join("shop.git");
    history(&git)?;
    let first = rollout(&cluster, "v1")?;
    ensure!(first["state"] == "succeeded", "{}", cluster.explain(&first));

    let (mut whole, mut each) = (vec![], vec![]);
    for _ in 0..runs {
        let document = rollout(&cluster, "v2")?;
        ensure!(
            document["state"] == "rolled_back",
            "{}",
            cluster.explain(&document)
        );
        for host in cluster.hosts() {
            let current = fs::read_link(host.root.join("shop/current"))?;
            ensure!(
                current.ends_with("v1"),
                "{} is at {}",
                host.name,
                current.display()
            );
        }
        let ways = cluster.hosts().map(|host| way_back(&document, &host.name));
        let ways: Vec<[u64; 2]> = ways.collect::<Result<_>>()?;
        let from = ways.iter().map(|[from, _]| *from).min();
        let to = ways.iter().map(|[_, to]| *to).max();
        whole.push((to.unwrap_or(0) - from.unwrap_or(0)) as f64);
        each.extend(ways.iter().map(|[from, to]| (to - from) as f64));
    }
    let name = |what: &str| format!("{HOSTS} real agents: rollback of a release: {what}");
    let slowest = part(&each, 100);
    report.bounded(name("the slowest host"), slowest, "ms", Some(MOST));
    report.value(name("the median of a host"), median(&each), "ms");
    report.value(name("all of them"), median(&whole), "ms");
    Ok(())
}

/// From a host's first order to undo something until the last of that is done, in milliseconds of the
/// controller's clock.
fn way_back(document: &Value, host: &str) -> Result<[u64; 2]> {
    let attempts = steps(document).flat_map(|(_, step)| list(&step["attempts"]));
    let undone = attempts
        .filter(|attempt| attempt["host"] == host && text(&attempt["direction"]) == "undo")
        .map(|attempt| Some([attempt["ordered"].as_u64()?, attempt["finished"].as_u64()?]));
    let undone: Vec<[u64; 2]> = undone.collect::<Option<_>>().context("times")?;
    ensure!(
        undone.len() >= 3,
        "{host} has undone {} steps",
        undone.len()
    );
    let from = undone.iter().map(|[from, _]| *from).min();
    let to = undone.iter().map(|[_, to]| *to).max();
    Ok([from.unwrap_or(0), to.unwrap_or(0)])
}

/// Two releases.
fn history(git: &Path) -> Result<()> {
    let script = "git init -q . && for release in v1 v2; do echo $release >release && \
                  git add release && git -c user.name=bench -c user.email=bench@localhost \
                  commit -q -m $release && git tag $release; done";
    fs::create_dir(git)?;
    let made = Command::new("sh")
        .args(["-ec", script])
        .current_dir(git)
        .status()?;
    ensure!(made.success(), "git ended with {made}");
    Ok(())
}

/// Brings a release to all hosts, of which only the first is good.
fn rollout(cluster: &Cluster, release: &str) -> Result<Value> {
    let git = cluster.root().join("shop.git");
    let git = git.display();
    let path = cluster.root().join(format!("{release}.yaml"));
    fs::write(
        &path,
        format!(
            "version: 1\nplan: shop\nfleet:\n  app: {{labels: {{role: app}}}}\nphases:\n  \
             - name: fetch\n    on: app\n    steps:\n      \
             - release.fetch: {{app: shop, release: {release}, git: {{url: {git}, tag: {release}}}}}\n        \
             undo: keep\n  \
             - name: switch\n    on: app\n    steps:\n      \
             - service.stop: {{service: shop, driver: process}}\n      \
             - release.activate: {{app: shop, release: {release}}}\n      \
             - service.start: {{service: shop, driver: process}}\n  \
             - name: look\n    on: app\n    steps:\n      \
             - check.command: {{argv: [/usr/bin/test, {release}, =, v1]}}\n"
        ),
    )?;
    let operator = cluster.requester();
    let rollout = operator.submit(&path, &[])?;
    operator.wait(&rollout, wait::ROLLOUT)
}
