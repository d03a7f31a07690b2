//! `make demo`: a controller, three agents, PostgreSQL and a real application on this machine;
//! one release that goes out, and one that comes back by itself.
#![allow(clippy::print_stdout, reason = "a demonstration talks")]

use std::fs;
use std::io::{BufRead as _, BufReader, Read};
use std::path::Path;
use std::process::{ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use lockstep_tests::cluster::{Cluster, REQUESTER};
use lockstep_tests::operator::{Gate, Operator, answer_gates, attempts, text};
use lockstep_tests::snapshot::Snapshot;
use lockstep_tests::timeline::timeline;
use lockstep_tests::{example, processes, target, wait};
use serde_json::Value;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("\nThe demo failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let begun = Instant::now();
    let reports = target().join("demo");
    let _ = fs::remove_dir_all(&reports);
    fs::create_dir_all(&reports)?;

    title("A fleet on this machine: controller, db-1, app-1, app-2");
    let mut cluster = Cluster::builder().start()?;
    say(&format!(
        "controller at {}, mutual TLS, three agents connected",
        cluster.address()
    ));
    say(&format!(
        "PostgreSQL at 127.0.0.1:{}",
        cluster.postgres().port
    ));
    let root = cluster.root().to_owned();
    let result = show(&cluster, &reports);
    if result.is_err() {
        say(&cluster.last_words());
    }

    title("The end");
    let services = cluster.stop()?;
    say(&format!(
        "the hosts were shut down, and with them {} services",
        services.len()
    ));
    drop(cluster);
    let left = processes::of(&root);
    ensure!(left.is_empty(), "processes stay behind: {:?}", left[0].argv);
    ensure!(!root.exists(), "{} stays behind", root.display());
    say("no process and no file of the demo stays behind, but the reports");
    result?;
    say(&format!("{} seconds in all", begun.elapsed().as_secs()));
    Ok(())
}

fn show(cluster: &Cluster, reports: &Path) -> Result<()> {
    title("The employee system, v0.9.5");
    cluster.install()?;
    let old = Snapshot::take(cluster)?;
    tell(&old);

    title("v1.0.0: the whole runbook");
    let (good, code) = deploy(cluster, "v1.0.0")?;
    ensure!(code == 0, "`lockstep apply` exited with {code}");
    expect_state(cluster, &good, "succeeded")?;
    let new = Snapshot::take(cluster)?;
    tell(&new);
    ensure!(
        new.releases.values().all(|release| release == "v1.0.0"),
        "not every host runs v1.0.0"
    );
    sign(cluster, &good)?;
    write_reports(cluster, &good, reports, "v1.0.0")?;

    title("v1.1.0: its health check fails, and it comes back by itself");
    let (bad, code) = deploy(cluster, "v1.1.0")?;
    ensure!(code == 1, "`lockstep apply` exited with {code}");
    expect_state(cluster, &bad, "rolled_back")?;
    let back = Snapshot::take(cluster)?;
    tell(&back);
    let differences = new.differences(&back);
    ensure!(
        differences.is_empty(),
        "not as before: {}",
        differences.join("; ")
    );
    say(
        "schema, rows, releases, environment files and answers: equal to before, by pg_dump and eye",
    );
    let migrated = attempts(&bad, "migration.apply").len();
    ensure!(
        migrated > 1,
        "v1.1.0 never migrated, so there was nothing to take back"
    );
    write_reports(cluster, &bad, reports, "v1.1.0")?;

    for (release, document) in [("v1.0.0", &good), ("v1.1.0", &bad)] {
        title(&format!("Timeline of {release}"));
        for line in timeline(document) {
            say(&line);
        }
    }
    title("Mail that was sent");
    for subject in cluster.mailbox.subjects() {
        say(&subject);
    }
    title("Reports");
    let mut files: Vec<_> = fs::read_dir(reports)?
        .flatten()
        .map(|entry| entry.path())
        .collect();
    files.sort();
    for file in files {
        say(&file.display().to_string());
    }
    Ok(())
}

/// Applies the plan as the requester does, while other people answer the gates.
fn deploy(cluster: &Cluster, release: &str) -> Result<(Value, i32)> {
    let requester = cluster.requester();
    let mut command = requester.command();
    command.arg("apply").arg(example::plan());
    for (name, value) in cluster.inputs(&example::plan(), release) {
        command.arg("--input").arg(format!("{name}={value}"));
    }
    say(&format!(
        "$ lockstep apply plan.yaml --input release={release}      ({REQUESTER})"
    ));
    let known = newest(&requester)?;
    let mut apply = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let (stdout, stderr) = (apply.stdout.take(), apply.stderr.take());
    let document = std::thread::scope(|scope| {
        scope.spawn(|| copy(stdout));
        scope.spawn(|| copy(stderr));
        let rollout = wait::until(
            "the rollout to begin",
            Duration::from_mins(1),
            || match newest(&requester) {
                Ok(now) if now != known => now.ok_or_else(|| "none".to_owned()),
                Ok(_) => Err("none yet".to_owned()),
                Err(error) => Err(format!("{error:#}")),
            },
        )?;
        let people = cluster.approvers();
        let people: Vec<&Operator> = people.iter().collect();
        answer_gates(&people, &rollout, wait::ROLLOUT, |person, gate| {
            announce(person, gate);
        })
    });
    let code = apply.wait()?.code().unwrap_or(128);
    Ok((document?, code))
}

/// The newest rollout, if there is one.
fn newest(operator: &Operator) -> Result<Option<String>> {
    let history = operator.json(&["history"])?;
    let first = history["rollouts"]
        .get(0)
        .map(|rollout| text(&rollout["rollout"]).to_owned());
    Ok(first)
}

fn announce(person: &Operator, gate: &Gate) {
    let groups = person.groups.join(", ");
    let what = match gate.items.len() {
        0 => "approves what was shown".to_owned(),
        items => format!("confirms the {items} items"),
    };
    say(&format!(
        ">>> {} ({groups}) {what} at gate {} of phase `{}`",
        person.name, gate.at, gate.phase
    ));
}

fn copy(from: Option<impl Read>) {
    let Some(from) = from else { return };
    for line in BufReader::new(from).lines().map_while(Result::ok) {
        say(&format!("| {line}"));
    }
}

fn expect_state(cluster: &Cluster, document: &Value, state: &str) -> Result<()> {
    if text(&document["state"]) == state {
        return Ok(());
    }
    bail!("expected `{state}`: {}", cluster.explain(document))
}

fn sign(cluster: &Cluster, document: &Value) -> Result<()> {
    let rollout = text(&document["rollout"]);
    for role in ["dev_lead", "qa_lead", "devops_lead", "product_manager"] {
        let people = cluster.approvers();
        let person = people
            .iter()
            .find(|person| person.groups.iter().any(|group| group == role));
        let person = person.with_context(|| format!("nobody is in {role}"))?;
        let said = person.run(&["signoff", rollout, "--role", role, "--comment", "seen"])?;
        ensure!(
            said.code == 0,
            "{} cannot sign as {role}: {}",
            person.name,
            said.text()
        );
        say(&format!(">>> {} signs as {role}", person.name));
    }
    Ok(())
}

fn write_reports(cluster: &Cluster, document: &Value, reports: &Path, release: &str) -> Result<()> {
    let rollout = text(&document["rollout"]);
    for format in ["md", "html", "json"] {
        let said = cluster
            .requester()
            .run(&["report", rollout, "--format", format])?;
        ensure!(said.code == 0, "no report as {format}: {}", said.text());
        ensure!(
            said.stdout.contains(rollout),
            "the report as {format} is not about {rollout}"
        );
        fs::write(reports.join(format!("{release}.{format}")), said.stdout)?;
    }
    Ok(())
}

fn tell(snapshot: &Snapshot) {
    for line in snapshot.lines() {
        say(&line);
    }
}

fn title(text: &str) {
    println!("\n== {text}");
}

fn say(text: &str) {
    for line in text.lines() {
        println!("   {line}");
    }
}
