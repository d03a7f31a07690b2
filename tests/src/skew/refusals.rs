//! What an older release does not know: a state that a newer one has written.
//!
//! An older release may go on with it, and then nothing is forgotten; or it refuses in words, and
//! then nothing is changed, and the newer one goes on where it was.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use lockstep_proto::ids::Digest;
use serde_json::Value;

use super::{Releases, Story};
use crate::binaries::Binaries;
use crate::cluster::Cluster;
use crate::operator::{list, text};
use crate::story::run_plan;
use crate::wait;

pub(super) const ALL: [Story; 3] = [
    Story {
        name: "quick: a controller that goes back, after a rollout and after a compaction",
        run: small_goes_back,
    },
    Story {
        name: "an agent's journal with a record of a kind that is not known yet",
        run: unknown_to_agents,
    },
    Story {
        name: "an export with a record of a kind that is not known yet",
        run: unknown_to_controllers,
    },
];

/// A record that no release writes.
const UNKNOWN: &[u8] = br#"{"of_tomorrow":{"number":1}}"#;

/// The words of a refusal: what it is that this release does not know or cannot read, or that it
/// takes the journal for broken and leaves it alone.
const REFUSALS: [&str; 3] = ["this release", "format", "quarantined"];

/// Starts the old controller on what the new one has written, and then on what the new one has
/// compacted.
pub(super) fn controller_goes_back(
    cluster: &mut Cluster,
    releases: &Releases,
) -> Result<Vec<String>> {
    let written = old_controller_on(cluster, releases)?;
    let code = cluster.stop_controller();
    ensure!(code == Some(0), "the new controller ended with {code:?}");
    let state = cluster.root().join("controller/state");
    let compact = ["journal", "compact", "--keep", "1", "--dir"];
    let said = cluster.requester().run(
        &[
            &compact[..],
            &[state.to_str().context("the path is UTF-8")?],
        ]
        .concat(),
    )?;
    ensure!(said.code == 0, "compact: {}", said.text());
    cluster.start_controller()?;
    let compacted = old_controller_on(cluster, releases)?;
    Ok(vec![
        format!("the old controller on what the new one wrote: {written}"),
        format!("the old controller on what the new one compacted: {compacted}"),
    ])
}

fn small_goes_back(releases: &Releases) -> Result<Vec<String>> {
    let mut cluster = small(&releases.old.binaries)?;
    cluster.stop_controller();
    cluster.install_controller(&releases.new.lockstep);
    cluster.install_cli(&releases.new.lockstep);
    cluster.start_controller()?;
    all_connected(&mut cluster)?;
    do_something(&cluster)?;
    controller_goes_back(&mut cluster, releases)
}

/// The rollouts that a controller knows, with their states.
fn history(cluster: &Cluster) -> Result<BTreeMap<String, String>> {
    let history = cluster.requester().json(&["history"])?;
    let rollouts = list(&history["rollouts"]);
    Ok(rollouts
        .map(|rollout| {
            let word = |key: &str| text(&rollout[key]).to_owned();
            (word("rollout"), word("state"))
        })
        .collect())
}

fn all_connected(cluster: &mut Cluster) -> Result<()> {
    let names: Vec<String> = cluster.hosts().map(|host| host.name.clone()).collect();
    cluster.wait_connected(&names)
}

/// Puts the old controller in the new one's place, and the new one back. What the old one did.
fn old_controller_on(cluster: &mut Cluster, releases: &Releases) -> Result<String> {
    let known = history(cluster)?;
    ensure!(!known.is_empty(), "the new controller knows no rollout");
    let code = cluster.stop_controller();
    ensure!(code == Some(0), "the new controller ended with {code:?}");
    let journal = cluster.root().join("controller/state/journal");
    let before = contents(&journal)?;
    cluster.install_controller(&releases.old.binaries.lockstep);
    let did = match cluster.start_controller() {
        Ok(()) => {
            all_connected(cluster)?;
            same_history(&known, &history(cluster)?)?;
            cluster.stop_controller();
            "goes on with it".to_owned()
        }
        Err(error) => {
            let said = format!("{error:#}");
            let clear = said.contains("exit status: 10")
                && REFUSALS.iter().any(|words| said.contains(words));
            ensure!(clear, "it does not say why it refuses: {said}");
            ensure!(
                contents(&journal)? == before,
                "it refuses, and has changed files: {said}"
            );
            let last = said.lines().last().unwrap_or_default();
            let why = last.split_once("error=").map_or(last, |(_, why)| why);
            format!("refuses and changes nothing: {why}")
        }
    };
    cluster.install_controller(&releases.new.lockstep);
    cluster.start_controller()?;
    all_connected(cluster)?;
    same_history(&known, &history(cluster)?)?;
    Ok(did)
}

fn same_history(known: &BTreeMap<String, String>, now: &BTreeMap<String, String>) -> Result<()> {
    ensure!(known == now, "the rollouts were {known:?}, and are {now:?}");
    Ok(())
}

/// The files below a directory, by path, with their digests.
fn contents(directory: &Path) -> Result<BTreeMap<String, Digest>> {
    let mut found = BTreeMap::new();
    let mut left = vec![directory.to_owned()];
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(&directory)? {
            let path = entry?.path();
            if path.is_dir() {
                left.push(path);
            } else {
                found.insert(path.display().to_string(), Digest::of(&fs::read(&path)?));
            }
        }
    }
    Ok(found)
}

/// Puts the old agent in the new one's place, and the new one back.
pub(super) fn agent_goes_back(cluster: &mut Cluster, releases: &Releases) -> Result<Vec<String>> {
    let did = other_agent(cluster, "app-2", &releases.old.binaries, &releases.new)?;
    Ok(vec![format!(
        "the old agent on what the new one wrote: {did}"
    )])
}

/// Stops a host's agent, starts another release on its state directory, and goes back to `then`.
fn other_agent(
    cluster: &mut Cluster,
    name: &str,
    other: &Binaries,
    then: &Binaries,
) -> Result<String> {
    cluster.host_mut(name).stop_agent();
    gone(cluster, name)?;
    let did = start_agent(cluster, name, other)?;
    cluster.host_mut(name).stop_agent();
    gone(cluster, name)?;
    let host = cluster.host_mut(name);
    host.install(&then.agent);
    host.start_agent()?;
    cluster.wait_connected(&[name.to_owned()])?;
    Ok(did.unwrap_or_else(|refusal| format!("refuses and changes nothing: {refusal}")))
}

/// Waits until the controller misses a host.
fn gone(cluster: &Cluster, name: &str) -> Result<()> {
    wait::until(&format!("{name} to be gone"), wait::SOON, || {
        let gone = connected(cluster, name).map(|connected| !connected);
        match gone {
            Ok(true) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
}

fn connected(cluster: &Cluster, name: &str) -> Result<bool> {
    let hosts = cluster.requester().json(&["hosts"])?;
    let mut hosts = list(&hosts["hosts"]);
    Ok(hosts.any(|host| host["host"] == name && host["connected"] == Value::Bool(true)))
}

/// Starts a release of the agent. `Ok` inside: it has connected. `Err` inside: it refuses, in its
/// own words, and its journal is as it was.
fn start_agent(
    cluster: &mut Cluster,
    name: &str,
    binaries: &Binaries,
) -> Result<Result<String, String>> {
    let log = cluster.host(name).agent_log();
    let said_before = fs::read_to_string(&log).unwrap_or_default().len();
    let state = cluster.host(name).root.join("state");
    let journal = |state: &Path| -> Result<[Digest; 2]> {
        let of = |file: &str| anyhow::Ok(Digest::of(&fs::read(state.join(file))?));
        Ok([of("journal")?, of("head")?])
    };
    let before = journal(&state)?;
    let host = cluster.host_mut(name);
    host.install(&binaries.agent);
    host.start_agent()?;
    let did = wait::until("the agent to connect or to refuse", wait::SOON, || {
        let said = fs::read_to_string(&log).unwrap_or_default();
        let said = said.get(said_before..).unwrap_or_default();
        let refusal = said
            .lines()
            .find(|line| REFUSALS.iter().any(|words| line.contains(words)));
        if let Some(refusal) = refusal {
            return Ok(Err(refusal.to_owned()));
        }
        match connected(cluster, name) {
            Ok(true) => Ok(Ok("goes on with it".to_owned())),
            _ => Err(said.to_owned()),
        }
    })?;
    if let Err(refusal) = &did {
        ensure!(
            journal(&state)? == before,
            "it refuses, and has changed its journal: {refusal}"
        );
    }
    Ok(did)
}

/// A fleet of one host and no database, where something has been done.
fn small(binaries: &Binaries) -> Result<Cluster> {
    let policy = "[[allow]]\naction = \"exec.run\"\nwhere = { argv = [[\"true\"]] }\n";
    let cluster = Cluster::builder()
        .without_database()
        .hosts(&[("app-1", "app")])
        .policy("app-1", Some(policy))
        .binaries(binaries)
        .start()?;
    do_something(&cluster)?;
    Ok(cluster)
}

fn do_something(cluster: &Cluster) -> Result<()> {
    let plan = "version: 1\nplan: small\nfleet: {app: {labels: {role: app}}}\nphases:\n  \
                - name: work\n    on: app\n    steps:\n      \
                - exec.run: {name: work, argv: [\"true\"]}\n";
    let document = run_plan(cluster, plan);
    let state = text(&document["state"]);
    ensure!(state == "succeeded", "{}", cluster.explain(&document));
    Ok(())
}

fn both(releases: &Releases) -> [(&'static str, &Binaries); 2] {
    [("old", &releases.old.binaries), ("new", &releases.new)]
}

/// Neither release takes it for its own, cuts it off, or starts over.
fn unknown_to_agents(releases: &Releases) -> Result<Vec<String>> {
    let mut saw = vec![];
    for (which, binaries) in both(releases) {
        let mut cluster = small(binaries)?;
        cluster.host_mut("app-1").stop_agent();
        gone(&cluster, "app-1")?;
        append_to_agent(&cluster.host("app-1").root.join("state"))?;
        match start_agent(&mut cluster, "app-1", binaries)? {
            Ok(did) => bail!("the {which} agent {did}"),
            Err(refusal) => saw.push(format!("the {which} agent: {refusal}")),
        }
        ensure!(
            !connected(&cluster, "app-1")?,
            "the {which} agent is connected"
        );
    }
    Ok(saw)
}

/// Appends an unknown record to a journal, and has both slots of its head name it: format 1.
fn append_to_agent(state: &Path) -> Result<()> {
    const FRAME: usize = 4 + 8 + 32;
    const SLOT: usize = 4096;
    let path = state.join("journal");
    let mut journal = fs::read(&path)?;
    let (mut at, mut number, mut hash) = (0, 0_u64, [0; 32]);
    while let Some(frame) = journal.get(at..at + FRAME) {
        let length = u32::from_le_bytes(frame[..4].try_into()?) & !(1 << 31);
        number = u64::from_le_bytes(frame[4..12].try_into()?);
        hash = frame[12..].try_into()?;
        at += FRAME + usize::try_from(length)?;
    }
    ensure!(
        at == journal.len() && number > 0,
        "not a journal of format 1"
    );
    let length = u32::try_from(UNKNOWN.len())?.to_le_bytes();
    let number = (number + 1).to_le_bytes();
    let hash = Digest::of(&[&hash[..], &length, &number, UNKNOWN].concat()).0;
    journal.extend([&length[..], &number, &hash, UNKNOWN].concat());
    fs::write(&path, journal)?;
    let mut slot = [&b"LSHEAD1\n"[..], &number, &hash].concat();
    let check = Digest::of(&slot).0;
    slot.extend(check);
    let mut head = vec![0; SLOT + slot.len()];
    head[..slot.len()].copy_from_slice(&slot);
    head[SLOT..].copy_from_slice(&slot);
    Ok(fs::write(state.join("head"), head)?)
}

/// The export of a controller with one record more, given to either release.
fn unknown_to_controllers(releases: &Releases) -> Result<Vec<String>> {
    let mut saw = vec![];
    for (which, binaries) in both(releases) {
        let mut cluster = small(binaries)?;
        let code = cluster.stop_controller();
        ensure!(
            code == Some(0),
            "the {which} controller ended with {code:?}"
        );
        let requester = cluster.requester();
        let state = cluster.root().join("controller/state");
        let state = state.to_str().context("the path is UTF-8")?;
        let said = requester.run(&["journal", "export", "--dir", state])?;
        ensure!(said.code == 0, "export: {}", said.text());
        let (export, number) = append_to_export(&said.stdout)?;
        let file = cluster.root().join("export.jsonl");
        fs::write(&file, export)?;
        let fresh = cluster.root().join("imported");
        fs::create_dir(&fresh)?;
        let output = requester
            .command()
            .args(["journal", "import", "--dir"])
            .arg(&fresh)
            .stdin(fs::File::open(&file)?)
            .output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        let clear = output.status.code() == Some(10)
            && said.contains(&format!("record {number}"))
            && REFUSALS.iter().any(|words| said.contains(words));
        ensure!(clear, "{}, and it does not say why: {said}", output.status);
        let made = fs::read_dir(&fresh)?.count();
        ensure!(made == 0, "it refuses, and has made {made} files: {said}");
        let named = said
            .lines()
            .find(|line| line.contains(&format!("record {number}")));
        let why = named.unwrap_or_default().trim();
        saw.push(format!("the {which} controller: {why}"));
    }
    Ok(saw)
}

/// An export with an unknown record at its end, and that record's number.
fn append_to_export(export: &str) -> Result<(String, u64)> {
    let (header, records) = export.split_once('\n').context("an export has lines")?;
    let mut header: Value = serde_json::from_str(header)?;
    let last: Value = serde_json::from_str(records.lines().last().context("records")?)?;
    let number = last["number"].as_u64().context("a number")? + 1;
    let before: Digest = text(&last["hash"]).parse()?;
    let hash = Digest::of(&[&before.0[..], &number.to_be_bytes(), UNKNOWN].concat());
    let payload = str::from_utf8(UNKNOWN)?;
    let record = serde_json::json!({
        "number": number, "hash": hash.to_string(), "payload": payload,
    });
    header["records"] = number.into();
    header["head"] = hash.to_string().into();
    Ok((format!("{header}\n{records}{record}\n"), number))
}
