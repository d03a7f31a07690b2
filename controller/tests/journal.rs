//! `lockstep journal` as a process: beside a controller, after it, and on another machine.

#[allow(dead_code, reason = "other tests of this crate use the rest of it")]
mod support;

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use lockstep_tests::wait;
use serde_json::Value;
use support::{Place, SOON, hello};

struct Said {
    code: i32,
    out: String,
    err: String,
}

fn said(output: Output) -> Said {
    Said {
        code: output.status.code().unwrap(),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

fn journal(arguments: &[&str], state: &Path, input: Option<&Path>) -> Said {
    let input = input.map_or_else(Stdio::null, |path| fs::File::open(path).unwrap().into());
    let mut command = Command::new(env!("CARGO_BIN_EXE_lockstep"));
    command.arg("journal").args(arguments).arg("--dir");
    said(command.arg(state).stdin(input).output().unwrap())
}

/// A place whose configuration names another state directory.
fn moved(place: &Place) -> std::path::PathBuf {
    let config = place.path().join("controller.toml");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replace("\"state\"", "\"moved\"")).unwrap();
    place.path().join("moved")
}

#[tokio::test]
async fn a_journal_moves_to_another_directory_and_the_old_controller_is_refused() {
    let place = Place::new();
    let state = place.path().join("state");
    let controller = place.start();
    let agent = place.agent("app-1");
    let first = controller.session(&agent, hello("app-1")).await.unwrap();
    for command in ["verify", "export"] {
        let refused = journal(&[command], &state, None);
        assert_eq!(refused.code, 12, "{}", refused.err);
        assert!(refused.err.contains("another controller runs"));
        assert_eq!(refused.out, "");
    }
    assert_eq!(controller.terminate(), Some(0));

    let verified = journal(&["verify", "--output", "json"], &state, None);
    assert_eq!(verified.code, 0, "{}", verified.err);
    let verified: Value = serde_json::from_str(&verified.out).unwrap();
    assert_eq!(verified["whole"], true);
    assert_eq!(verified["last"], verified["acknowledged"]);
    let exported = journal(&["export"], &state, None);
    assert_eq!(exported.code, 0, "{}", exported.err);
    let file = place.path().join("journal.jsonl");
    fs::write(&file, &exported.out).unwrap();
    let head = verified["last"]["hash"].as_str().unwrap();
    assert!(exported.err.contains(head), "{}", exported.err);

    let refused = journal(&["import"], &state, Some(&file));
    assert_eq!(refused.code, 2, "{}", refused.err);
    assert!(refused.err.contains("hint:"), "{}", refused.err);
    let new = moved(&place);
    let imported = journal(&["import"], &new, Some(&file));
    assert_eq!(imported.code, 0, "{}", imported.err);
    assert!(imported.out.contains(head), "{}", imported.out);
    let found = journal(&["verify", "--output", "json"], &new, None);
    let found: Value = serde_json::from_str(&found.out).unwrap();
    assert_eq!(found["journal"], verified["journal"]);
    let records = |of: &Value| of["records"].as_u64().unwrap();
    assert_eq!(records(&found), records(&verified) + 2);

    // An agent has seen the new controller; then somebody starts the old one again (INV-4).
    let controller = place.start();
    let mut known = hello("app-1");
    known.highest_epoch = Some(first.epoch);
    let taken_over = controller.session(&agent, known.clone()).await.unwrap();
    assert!(taken_over.epoch.counter > first.epoch.counter + 1);
    known.highest_epoch = Some(taken_over.epoch);
    assert_eq!(controller.terminate(), Some(0));
    let config = place.path().join("controller.toml");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, text.replace("\"moved\"", "\"state\"")).unwrap();
    let mut old = place.start();
    assert!(old.session(&agent, known).await.is_err());
    assert_eq!(old.wait(), Some(12));
    assert!(place.log().contains("took over"), "{}", place.log());
}

#[test]
fn a_broken_journal_is_named_and_left_as_it_is() {
    let place = Place::new();
    let state = place.path().join("state");
    for _ in 0..3 {
        place.start().terminate();
    }
    let store = state.join("journal/store/db");
    let before = fs::read(&store).unwrap();
    let at = before.windows(10).rposition(|bytes| bytes == b"term_began");
    let mut broken = before.clone();
    broken[at.unwrap()] ^= 1;
    fs::write(&store, &broken).unwrap();
    let verified = journal(&["verify"], &state, None);
    assert_eq!(verified.code, 10, "{}", verified.err);
    assert!(verified.out.contains("whole        no"), "{}", verified.out);
    assert!(verified.err.contains("hint:"), "{}", verified.err);
    let exported = journal(&["export"], &state, None);
    assert_eq!(exported.code, 10, "{}", exported.err);
    assert_eq!(exported.out, "");
    assert_eq!(fs::read(&store).unwrap(), broken);
    let names: Vec<_> = fs::read_dir(&state).unwrap().map(Result::unwrap).collect();
    let left = names.iter().any(|entry| {
        let name = entry.file_name();
        name.to_string_lossy().starts_with("journal.")
    });
    assert!(!left, "no copy is left behind");
    let nowhere = journal(&["verify"], &place.path().join("nowhere"), None);
    assert_eq!(nowhere.code, 2, "{}", nowhere.err);
    assert!(nowhere.err.contains("there is no journal in"));
}

#[test]
fn a_cut_export_makes_no_journal() {
    let place = Place::new();
    let state = place.path().join("state");
    place.start().terminate();
    place.start().terminate();
    let exported = journal(&["export"], &state, None);
    let lines: Vec<&str> = exported.out.lines().collect();
    let file = place.path().join("cut.jsonl");
    fs::write(&file, lines[..lines.len() - 1].join("\n")).unwrap();
    let new = place.path().join("new");
    let imported = journal(&["import"], &new, Some(&file));
    assert_eq!(imported.code, 10, "{}", imported.err);
    assert!(imported.err.contains("the export ends before it"));
    assert!(!new.join("journal").exists());
}

/// Ends at whatever moment: the journal is whole, and says what it said or what is left of it.
#[test]
fn a_compaction_that_is_killed_leaves_a_whole_journal() {
    let fixtures = lockstep_tests::repository().join("tests/fixtures/journals/controller-1");
    for turn in 0..12_u64 {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        copy(&fixtures, &state);
        let mut child = Command::new(env!("CARGO_BIN_EXE_lockstep"))
            .args(["journal", "compact", "--keep", "0", "--dir"])
            .arg(&state)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(turn * 25));
        let _ = child.kill();
        child.wait().unwrap();
        let found = journal(&["verify", "--output", "json"], &state, None);
        assert_eq!(found.code, 0, "turn {turn}: {}", found.err);
        let found: Value = serde_json::from_str(&found.out).unwrap();
        if found["begins_after"].is_null() {
            assert_eq!(found["records"], 696, "turn {turn}");
            assert_eq!(found["store_format"], 1, "it keeps its own");
        } else {
            assert_eq!(found["store_format"], 2, "it is made anew");
            assert_eq!(found["archives"][0]["whole"], true, "turn {turn}");
        }
        let again = journal(
            &["compact", "--keep", "0", "--output", "json"],
            &state,
            None,
        );
        assert_eq!(again.code, 0, "turn {turn}: {}", again.err);
    }
}

#[tokio::test]
async fn a_compacted_rollout_is_said_to_be_in_its_archive() {
    use lockstep_proto::wire::control_v1 as control;

    let place = Place::new();
    let state = place.path().join("state");
    let fixtures = lockstep_tests::repository().join("tests/fixtures/journals/controller-1");
    copy(&fixtures, &state);
    let compacted = journal(
        &["compact", "--keep", "1", "--output", "json"],
        &state,
        None,
    );
    assert_eq!(compacted.code, 0, "{}", compacted.err);
    let compacted: Value = serde_json::from_str(&compacted.out).unwrap();
    assert!(compacted["records"].as_u64().unwrap() < 696 / 2);
    assert!(compacted["bytes_after"].as_u64() > Some(0), "{compacted}");
    let rollouts = compacted["rollouts"].as_array().unwrap();
    assert_eq!(rollouts.len(), 2);
    let nothing = journal(&["compact", "--keep", "1"], &state, None);
    assert!(
        nothing.err.contains("nothing to compact"),
        "{}",
        nothing.err
    );

    let controller = place.start();
    let mut client = controller.control(&place.operator("olga", &[])).await;
    let rollout = rollouts[0].as_str().unwrap().to_owned();
    let request = control::GetRolloutRequest {
        rollout: rollout.clone(),
    };
    let refused = client.get_rollout(request).await.unwrap_err();
    let archive = "archive/journal-1-696.jsonl";
    assert!(refused.message().contains(archive), "{refused:?}");
    assert!(refused.message().contains(&rollout), "{refused:?}");
    assert!(state.join(archive).exists());
    let refused = journal(&["compact", "--keep", "0"], &state, None);
    assert_eq!(refused.code, 12, "{}", refused.err);
}

/// A controller whose journal has grown long makes it shorter by itself, and goes on meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_controller_compacts_its_journal_while_it_runs() {
    use lockstep_proto::wire::control_v1 as control;

    let place = Place::new();
    let state = place.path().join("state");
    let fixtures = lockstep_tests::repository().join("tests/fixtures/journals/controller-1");
    copy(&fixtures, &state);
    let config = place.path().join("controller.toml");
    let text = fs::read_to_string(&config).unwrap();
    fs::write(&config, format!("{text}[journal]\ncompact_above = 100\n")).unwrap();
    let controller = place.start();
    let mut client = controller.control(&place.operator("olga", &[])).await;
    let list = control::ListRolloutsRequest::default();
    let before = client.list_rollouts(list).await.unwrap();
    let before = before.into_inner().rollouts;
    assert_eq!(before.len(), 3);
    let agent = place.agent("web-9");
    let session = controller.session(&agent, hello("web-9")).await.unwrap();

    let said = || place.log().contains("went into an archive");
    wait::until_true("the compaction", 3 * SOON, said).unwrap();
    let after = client.list_rollouts(list).await.unwrap();
    let after = after.into_inner().rollouts;
    let [newest] = &after[..] else {
        panic!("{after:?}");
    };
    assert!(before.contains(newest), "as it was");
    let rollout = before.iter().find(|rollout| *rollout != newest).unwrap();
    let request = control::GetRolloutRequest {
        rollout: rollout.rollout.clone(),
    };
    let refused = client.get_rollout(request).await.unwrap_err();
    assert!(
        refused.message().contains("archive/journal-1-"),
        "{refused:?}"
    );
    // Whoever was there is still there, and whoever comes is let in.
    let hosts = client.list_hosts(control::ListHostsRequest {}).await;
    let hosts = hosts.unwrap().into_inner().hosts;
    let web = hosts.iter().find(|host| host.host == "web-9").unwrap();
    assert!(web.connected, "{web:?}");
    let other = place.agent("web-10");
    let joined = controller.session(&other, hello("web-10")).await.unwrap();
    assert_eq!(joined.epoch, session.epoch);

    controller.kill();
    let found = journal(&["verify", "--output", "json"], &state, None);
    assert_eq!(found.code, 0, "{}", found.err);
    let found: Value = serde_json::from_str(&found.out).unwrap();
    assert_eq!(found["archives"][0]["whole"], true);
    assert_eq!(
        found["store_format"], 1,
        "an earlier release can go back to it"
    );
    let archived = &found["begins_after"]["number"];
    let left = found["records"].as_u64().zip(archived.as_u64());
    assert!(left.is_some_and(|(all, archived)| all - archived < 696 / 2));
    let controller = place.start();
    let mut client = controller.control(&place.operator("olga", &[])).await;
    let next = client.list_rollouts(list).await.unwrap().into_inner();
    assert_eq!(next.rollouts, after);
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[test]
fn nobody_works_on_a_state_directory_that_another_user_owns() {
    // Only root can give a directory away, and it is root who would forget whose it is.
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let place = Place::new();
    assert_eq!(place.start().terminate(), Some(0));
    let state = place.path().join("state");
    std::os::unix::fs::chown(&state, Some(65_534), None).unwrap();
    for command in ["verify", "compact"] {
        let more: &[&str] = if command == "compact" {
            &["--keep", "1"]
        } else {
            &[]
        };
        let refused = journal(&[&[command], more].concat(), &state, None);
        assert_eq!(refused.code, 2, "{}", refused.err);
        assert!(
            refused.err.contains("belongs to the user 65534"),
            "{}",
            refused.err
        );
        assert!(refused.err.contains("runuser -u"), "{}", refused.err);
    }
    let (code, log) = place.fail();
    assert_eq!(code, Some(2), "{log}");
    assert!(log.contains("runuser -u"), "{log}");
}
