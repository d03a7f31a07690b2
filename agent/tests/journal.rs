//! `lockstep-agent journal verify` as a process, over a journal that a real agent wrote.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use rustix::fs::{FlockOperation, flock};

fn place() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let config = "host = \"app-1\"\ncontroller = \"localhost:7443\"\nstate_dir = \"state\"\n\
                  run_dir = \"run\"\n[tls]\ncontroller_ca = \"ca\"\ncert = \"crt\"\nkey = \"key\"\n";
    let state = dir.path().join("state").display().to_string();
    let config = config.replace("\"state\"", &format!("\"{state}\""));
    fs::write(dir.path().join("agent.toml"), config).unwrap();
    let fixture = lockstep_tests::repository().join("tests/fixtures/journals/agent-1/app-1");
    fs::create_dir(&state).unwrap();
    for name in ["journal", "head"] {
        fs::copy(fixture.join(name), Path::new(&state).join(name)).unwrap();
    }
    dir
}

/// Exit code, standard output, standard error.
fn verify(place: &Path) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_lockstep-agent"))
        .args(["journal", "verify", "--config"])
        .arg(place.join("agent.toml"))
        .output()
        .unwrap();
    (
        output.status.code().unwrap(),
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

#[test]
fn a_journal_is_whole_or_its_first_broken_record_is_named() {
    let place = place();
    let (code, out, err) = verify(place.path());
    assert_eq!(code, 0, "{err}");
    for line in ["records       290", "format        1", "whole         yes"] {
        assert!(out.contains(line), "{out}");
    }

    let path = place.path().join("state/journal");
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    let (code, out, err) = verify(place.path());
    assert_eq!(code, 10, "{err}");
    assert!(out.contains("no, broken from record"), "{out}");
    assert!(err.contains("290 were written"), "{err}");
    assert!(err.contains("hint:"), "{err}");
    assert_eq!(fs::read(&path).unwrap(), whole[..whole.len() - 1]);

    fs::write(&path, &whole).unwrap();
    fs::write(place.path().join("state/head"), []).unwrap();
    let (code, out, _) = verify(place.path());
    assert_eq!(code, 10);
    assert!(out.contains("head          not readable"), "{out}");
}

#[test]
fn a_journal_that_an_agent_uses_or_that_is_not_there_is_refused() {
    let place = place();
    let lock = File::create(place.path().join("state/lock")).unwrap();
    flock(&lock, FlockOperation::NonBlockingLockExclusive).unwrap();
    let (code, _, err) = verify(place.path());
    assert_eq!(code, 3, "{err}");
    assert!(err.contains("another agent runs"), "{err}");
    drop(lock);
    fs::remove_dir_all(place.path().join("state")).unwrap();
    let (code, _, err) = verify(place.path());
    assert_eq!(code, 2, "{err}");
    assert!(!place.path().join("state").exists(), "nothing is made");
}
