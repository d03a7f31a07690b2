use lockstep_proto::action::Address;
use lockstep_proto::action::service::{Driver, Restart, Start, Stop};
use lockstep_proto::order::Fact;
use lockstep_proto::values::Period;
use serde_json::Value;
use zbus::Variant;

use super::*;
use crate::actions::{Act, Probe};
use crate::testing::Host;

fn properties(rows: &[(&str, Variant<'_>)]) -> Properties {
    rows.iter()
        .map(|(name, value)| ((*name).to_owned(), value.try_to_owned().unwrap()))
        .collect()
}

#[test]
fn a_units_properties_become_its_state() {
    let unit = properties(&[
        ("ActiveState", "active".into()),
        ("SubState", "running".into()),
        ("UnitFileState", "enabled".into()),
        ("InvocationID", vec![0xab_u8, 0x01].into()),
    ]);
    let service = properties(&[
        ("Result", "success".into()),
        ("ExecMainStatus", 0_i32.into()),
    ]);
    let running = state(&unit, &service);
    assert_eq!(running.phase, Phase::Running);
    assert_eq!(running.words, "active (running), enabled");
    assert_eq!(running.run.as_deref(), Some("ab01"));
    assert_eq!(running.trouble, None);

    let unit = properties(&[
        ("ActiveState", "activating".into()),
        ("SubState", "auto-restart".into()),
    ]);
    let service = properties(&[
        ("Result", "exit-code".into()),
        ("ExecMainStatus", 3_i32.into()),
        ("NRestarts", 2_u32.into()),
    ]);
    let crashing = state(&unit, &service);
    assert_eq!(crashing.phase, Phase::Changing);
    assert_eq!(
        crashing.trouble.as_deref(),
        Some("result exit-code, exit status 3, 2 restarts")
    );
}

#[test]
fn a_unit_that_systemd_is_about_to_change_is_not_as_it_looks() {
    let phase = |active: &str, job: u32| {
        let path = OwnedObjectPath::try_from(format!("/org/freedesktop/systemd1/job/{job}"));
        let unit = properties(&[
            ("ActiveState", active.into()),
            ("Job", Variant::from((job, path.unwrap()))),
        ]);
        state(&unit, &Properties::new()).phase
    };
    assert_eq!(phase("active", 0), Phase::Running);
    assert_eq!(phase("inactive", 0), Phase::Stopped);
    assert_eq!(phase("failed", 0), Phase::Failed);
    for active in ["active", "inactive", "failed", "deactivating", "activating"] {
        let phase = phase(active, 7);
        assert_eq!(phase, Phase::Changing, "{active}");
        // INV-6: what undoes a stop does not take it for one that stays up.
        assert!(phase.needs_start());
    }
    assert_eq!(phase("reloading", 7), Phase::Running);
}

#[test]
fn names_are_escaped_for_units() {
    assert_eq!(escape("web-1 a"), "web\\x2d1\\x20a");
}
/// Where the tests with a real systemd put their units: a directory that it reads, such as
/// `/run/systemd/system`. They are run by hand and on the hosts of the fleet, with `--ignored`.
/// `DBUS_SYSTEM_BUS_ADDRESS` may name another bus than the system's.
const UNIT_DIR: &str = "LOCKSTEP_TEST_UNIT_DIR";

/// A unit of a real systemd, removed with the value.
struct RealUnit {
    name: String,
    file: std::path::PathBuf,
}

impl RealUnit {
    async fn new(name: &str, service: &str) -> Self {
        let dir = std::env::var_os(UNIT_DIR).expect("LOCKSTEP_TEST_UNIT_DIR names a directory");
        let name = format!("lockstep-test-{name}-{}", std::process::id());
        let file = std::path::Path::new(&dir).join(format!("{name}.service"));
        std::fs::write(&file, format!("[Service]\n{service}\n")).unwrap();
        manager(&connect().await.unwrap(), "Reload", &())
            .await
            .unwrap();
        Self { name, file }
    }

    fn start(&self, listens: &[Address]) -> Start {
        let (service, listens) = (self.name.clone(), listens.to_vec());
        Start {
            service,
            driver: Driver::Systemd,
            listens,
            within: Period::seconds(20),
        }
    }

    fn stop(&self, refuses: &[Address]) -> Stop {
        let (service, refuses) = (self.name.clone(), refuses.to_vec());
        Stop {
            service,
            driver: Driver::Systemd,
            refuses,
            within: Period::seconds(20),
        }
    }

    async fn remove(self) {
        let stop = self.stop(&[]);
        stop.apply(&Host::new().context(), &Value::Null)
            .await
            .unwrap();
        std::fs::remove_file(&self.file).unwrap();
        manager(&connect().await.unwrap(), "Reload", &())
            .await
            .unwrap();
    }
}

#[tokio::test]
#[ignore = "needs a systemd that this user may command: `make fleet` runs it"]
async fn a_real_unit_is_started_restarted_stopped_and_put_back() {
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let address = [Address(format!("localhost:{port}"))];
    let command = format!("ExecStart=/usr/bin/env python3 -m http.server --bind 127.0.0.1 {port}");
    let unit = RealUnit::new("web", &command).await;
    let host = Host::new();
    let cx = host.context();
    let (start, stop) = (unit.start(&address), unit.stop(&address));
    let at_first = start.before(&cx).await.unwrap();
    let state = start.state(&cx).await.unwrap();
    let Fact::State { text, .. } = &state[0] else {
        panic!("{state:?}")
    };
    assert_eq!(text, "inactive (dead), static");
    assert!(matches!(start.probe(&cx).await.unwrap(), Probe::Absent(_)));

    assert!(start.apply(&cx, &at_first).await.unwrap().changed);
    assert!(matches!(start.probe(&cx).await.unwrap(), Probe::Present(_)));
    assert!(!start.apply(&cx, &at_first).await.unwrap().changed);

    let restart = Restart {
        service: unit.name.clone(),
        driver: Driver::Systemd,
        listens: address.to_vec(),
        within: Period::seconds(20),
    };
    assert!(matches!(
        restart.probe(&cx).await.unwrap(),
        Probe::Absent(_)
    ));
    restart.apply(&cx, &Value::Null).await.unwrap();
    assert!(matches!(
        restart.probe(&cx).await.unwrap(),
        Probe::Present(_)
    ));

    let running = stop.before(&cx).await.unwrap();
    let done = stop.apply(&cx, &running).await.unwrap();
    assert!(done.changed);
    assert_eq!(
        done.facts,
        [Fact::Refused {
            address: address[0].0.clone()
        }]
    );
    assert!(!stop.apply(&cx, &running).await.unwrap().changed);
    assert!(stop.undo(&cx, &running).await.unwrap().changed);
    assert!(matches!(start.probe(&cx).await.unwrap(), Probe::Present(_)));
    assert!(start.undo(&cx, &at_first).await.unwrap().changed);
    assert_eq!(start.state(&cx).await.unwrap(), state);
    unit.remove().await;
}

#[tokio::test]
#[ignore = "needs a systemd that this user may command: `make fleet` runs it"]
async fn a_real_unit_that_fails_says_so_at_once_and_leaves_no_mark_after_the_undo() {
    let host = Host::new();
    let cx = host.context();
    let services = [
        "ExecStart=/bin/sh -c 'echo no such table; exit 3'",
        "Restart=always\nRestartSec=5\nExecStart=/bin/sh -c 'echo no such table; exit 3'",
    ];
    for (name, service) in ["fails", "loops"].into_iter().zip(services) {
        let unit = RealUnit::new(name, service).await;
        // It is awaited longer than a crash takes.
        let start = unit.start(&[Address("localhost:1".into())]);
        let before = start.before(&cx).await.unwrap();
        let state = start.state(&cx).await.unwrap();
        let began = Instant::now();
        let failed = start.apply(&cx, &before).await.unwrap_err();
        assert!(
            began.elapsed() < Duration::from_secs(10),
            "{name}: {:?}",
            began.elapsed()
        );
        assert!(
            failed.message.contains("result exit-code, exit status 3"),
            "{}",
            failed.message
        );
        let lines = failed.last_lines.join("\n");
        assert!(lines.contains("no such table"), "{name}: {lines}");
        start.undo(&cx, &before).await.unwrap();
        assert_eq!(start.state(&cx).await.unwrap(), state, "{name}");
        unit.remove().await;
    }
}

#[tokio::test]
#[ignore = "needs a systemd that this user may command: `make fleet` runs it"]
async fn a_unit_that_is_still_stopping_is_started_again_by_the_undo() {
    let resists = "ExecStart=/bin/sh -c 'trap \"\" TERM; while :; do sleep 1; done'\n\
                   TimeoutStopSec=5";
    let unit = RealUnit::new("resists", resists).await;
    let host = Host::new();
    let cx = host.context();
    unit.start(&[]).apply(&cx, &Value::Null).await.unwrap();
    let stop = Stop {
        within: Period::seconds(1),
        ..unit.stop(&[])
    };
    let running = stop.before(&cx).await.unwrap();
    let failed = stop.apply(&cx, &running).await.unwrap_err();
    assert!(
        failed.cause == Cause::TimedOut && failed.changed,
        "{failed:?}"
    );
    // An attempt that was killed here has begun something, which goes on by itself.
    assert!(matches!(stop.probe(&cx).await.unwrap(), Probe::Partial(_)));
    assert!(stop.undo(&cx, &running).await.unwrap().changed);
    let start = unit.start(&[]);
    assert!(matches!(start.probe(&cx).await.unwrap(), Probe::Present(_)));
    unit.remove().await;
}

#[tokio::test]
#[ignore = "needs a systemd that this user may command: `make fleet` runs it"]
async fn a_unit_that_is_not_there_is_named() {
    let host = Host::new();
    let stop = Stop {
        service: "no-such-unit".into(),
        driver: Driver::Systemd,
        refuses: vec![],
        within: Period::seconds(5),
    };
    let failed = stop.probe(&host.context()).await.unwrap_err();
    assert_eq!(
        failed.message,
        "there is no unit no-such-unit.service on this host"
    );
}

#[tokio::test]
#[ignore = "needs a systemd that this user may command: `make fleet` runs it"]
async fn a_process_is_taken_into_a_scope_of_its_own() {
    let mut child = tokio::process::Command::new("sleep")
        .arg("60")
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let pid = child.id().unwrap();
    adopt("web-1", pid).await.unwrap();
    let cgroup = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    assert!(
        cgroup.contains(&format!("lockstep-service-web\\x2d1-{pid}.scope")),
        "{cgroup}"
    );
    child.kill().await.unwrap();
}
