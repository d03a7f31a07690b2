use lockstep_proto::action::Address;
use lockstep_proto::action::service::{Driver, Expected, Restart, Start, Status, Stop};
use lockstep_proto::order::Fact;
use lockstep_proto::values::Period;
use serde_json::Value;

use super::*;
use crate::actions::{Act, Probe};
use crate::testing::Host;

/// Not a test: what `supervisor` starts here instead of our own `main`.
#[test]
#[ignore = "the test program runs it as `lockstep-agent supervise`"]
fn entry_of_the_supervisor() {
    let Err(error) = supervise();
    panic!("{error}");
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

/// A host with a service `web`, and the end of whatever of it is left.
struct Web {
    host: Host,
    port: u16,
}

impl Web {
    fn new() -> Self {
        let port = free_port();
        let argv = [
            "python3",
            "-m",
            "http.server",
            "--bind",
            "127.0.0.1",
            &port.to_string(),
        ];
        Self::running(&argv.map(str::to_owned), port)
    }

    fn running(argv: &[String], port: u16) -> Self {
        let mut host = Host::new();
        let env_file = host.path().join("web.env");
        fs::write(&env_file, "GREETING=\"good day\"\n").unwrap();
        let service = config::Service {
            argv: argv.to_vec(),
            dir: Some(host.path().to_owned()),
            env_file: Some(env_file),
            ..config::Service::default()
        };
        host.config.services.insert("web".into(), service);
        Self { host, port }
    }

    fn address(&self) -> Vec<Address> {
        vec![Address(format!("localhost:{}", self.port))]
    }

    fn restart(&self) -> Restart {
        Restart {
            service: "web".into(),
            driver: Driver::Process,
            listens: self.address(),
            within: Period::seconds(20),
        }
    }

    fn start(&self) -> Start {
        Start {
            service: "web".into(),
            driver: Driver::Process,
            listens: self.address(),
            within: Period::seconds(20),
        }
    }

    fn stop(&self) -> Stop {
        Stop {
            service: "web".into(),
            driver: Driver::Process,
            refuses: self.address(),
            within: Period::seconds(10),
        }
    }

    fn note(&self) -> Option<Note> {
        let path = self.host.config.run_dir.join("services/web.json");
        serde_json::from_slice(&fs::read(path).ok()?).ok()
    }
}

impl Drop for Web {
    fn drop(&mut self) {
        if let Some(note) = self.note() {
            note.signal_members(Signal::KILL);
        }
    }
}

#[test]
fn a_process_is_told_apart_by_when_it_began() {
    let stat = Stat::of(rustix::process::getpid().as_raw_nonzero().get()).unwrap();
    assert!(stat.lives() && stat.started > 0);
    let odd = "7 (a) b) (c) S 1 7 6 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 12345 1 1";
    assert_eq!(
        Stat::parse(odd),
        Some(Stat {
            state: 'S',
            session: 6,
            started: 12345
        })
    );
    let mine = Note {
        pid: 1,
        started: u64::MAX,
        boot: boot_id(),
        output_from: 0,
    };
    assert!(!mine.is_alive(), "process 1 is another one");
    assert_eq!(mine.members(), Vec::<i32>::new());
}

#[tokio::test]
async fn a_service_is_started_found_stopped_and_put_back() {
    let web = Web::new();
    let cx = web.host.context();
    let (start, stop) = (web.start(), web.stop());
    let at_first = start.before(&cx).await.unwrap();
    assert!(matches!(start.probe(&cx).await.unwrap(), Probe::Absent(_)));
    assert!(matches!(stop.probe(&cx).await.unwrap(), Probe::Present(_)));
    let state = start.state(&cx).await.unwrap();

    assert!(start.apply(&cx, &at_first).await.unwrap().changed);
    assert!(matches!(start.probe(&cx).await.unwrap(), Probe::Present(_)));
    assert_ne!(start.state(&cx).await.unwrap(), state);
    let pid = web.note().unwrap().pid;
    assert_eq!(
        Stat::of(pid).unwrap().session,
        pid,
        "it has a session of its own"
    );
    let environ = fs::read(format!("/proc/{pid}/environ")).unwrap();
    let environ = String::from_utf8(environ).unwrap();
    assert!(
        environ.contains("GREETING=good day\0") && !environ.contains("CARGO"),
        "{environ}"
    );
    assert!(
        !start.apply(&cx, &at_first).await.unwrap().changed,
        "it ran already"
    );
    assert_eq!(web.note().unwrap().pid, pid);

    let running = stop.before(&cx).await.unwrap();
    let done = stop.apply(&cx, &running).await.unwrap();
    assert!(done.changed);
    assert_eq!(
        done.facts,
        [Fact::Refused {
            address: format!("localhost:{}", web.port)
        }]
    );
    assert!(
        !stop.apply(&cx, &running).await.unwrap().changed,
        "it was stopped already"
    );

    assert!(stop.undo(&cx, &running).await.unwrap().changed);
    assert!(
        !stop.undo(&cx, &running).await.unwrap().changed,
        "an undo may run again"
    );
    assert!(matches!(start.probe(&cx).await.unwrap(), Probe::Present(_)));
    assert!(start.undo(&cx, &at_first).await.unwrap().changed);
    assert!(!start.undo(&cx, &at_first).await.unwrap().changed);
    assert_eq!(start.state(&cx).await.unwrap(), state);
}

#[tokio::test]
async fn a_restart_leaves_a_receipt() {
    let web = Web::new();
    let cx = web.host.context();
    web.start().apply(&cx, &Value::Null).await.unwrap();
    let restart = web.restart();
    let cx = web.host.context();
    assert!(matches!(
        restart.probe(&cx).await.unwrap(),
        Probe::Absent(_)
    ));
    let pid = web.note().unwrap().pid;
    restart.apply(&cx, &Value::Null).await.unwrap();
    assert_ne!(web.note().unwrap().pid, pid);
    assert!(matches!(
        restart.probe(&cx).await.unwrap(),
        Probe::Present(_)
    ));
    // This one was killed before it could say so: the next one only waits.
    let pid = web.note().unwrap().pid;
    let next = web.host.context();
    restart.apply(&next, &Value::Null).await.unwrap();
    assert_eq!(
        web.note().unwrap().pid,
        pid,
        "INV-1: not restarted a second time"
    );
    assert!(matches!(
        restart.probe(&next).await.unwrap(),
        Probe::Present(_)
    ));
    // One that has said how it ended is not taken up again.
    fs::write(cx.dir.with_file_name("outcome.json"), "").unwrap();
    let another = web.host.context();
    assert!(matches!(
        restart.probe(&another).await.unwrap(),
        Probe::Absent(_)
    ));
    restart.apply(&another, &Value::Null).await.unwrap();
    assert_ne!(web.note().unwrap().pid, pid);
    // Nor is one that was undone.
    let running = restart.before(&another).await.unwrap();
    restart.undo(&another, &running).await.unwrap();
    let pid = web.note().unwrap().pid;
    let last = web.host.context();
    restart.apply(&last, &Value::Null).await.unwrap();
    assert_ne!(web.note().unwrap().pid, pid);
}

#[tokio::test]
async fn an_undo_that_was_killed_does_not_restart_again_what_it_restarted() {
    let web = Web::new();
    let started = web.host.context();
    web.start().apply(&started, &Value::Null).await.unwrap();
    let restart = web.restart();
    let cx = web.host.context();
    let running = restart.before(&cx).await.unwrap();
    restart.apply(&cx, &Value::Null).await.unwrap();
    let pid = web.note().unwrap().pid;
    restart.undo(&web.host.context(), &running).await.unwrap();
    let undone = web.note().unwrap().pid;
    assert_ne!(undone, pid, "it finds what was there before");
    restart.undo(&web.host.context(), &running).await.unwrap();
    assert_eq!(web.note().unwrap().pid, undone, "INV-1: only once");
    // After another restart there is another one to be undone.
    restart
        .apply(&web.host.context(), &Value::Null)
        .await
        .unwrap();
    let pid = web.note().unwrap().pid;
    restart.undo(&web.host.context(), &running).await.unwrap();
    assert!(![pid, undone].contains(&web.note().unwrap().pid));
}

#[tokio::test]
async fn a_service_that_crashes_fails_at_once_with_its_last_words() {
    let argv = [
        "python3",
        "-c",
        "import sys; print('no such table: users'); sys.exit(3)",
    ];
    let web = Web::running(&argv.map(str::to_owned), free_port());
    let cx = web.host.context();
    let began = Instant::now();
    let failed = web.start().apply(&cx, &Value::Null).await.unwrap_err();
    assert!(
        began.elapsed() < Duration::from_secs(8),
        "{:?}",
        began.elapsed()
    );
    assert!(
        failed.message.contains("service web did not stay up"),
        "{failed:?}"
    );
    assert_eq!(failed.last_lines, ["no such table: users"]);
    assert!(failed.changed);
}

#[tokio::test]
async fn what_cannot_be_executed_is_said_at_the_start() {
    let web = Web::running(&["/no/such/program".to_owned()], free_port());
    let failed = web
        .start()
        .apply(&web.host.context(), &Value::Null)
        .await
        .unwrap_err();
    assert!(
        failed.message.contains("cannot run `/no/such/program`"),
        "{failed:?}"
    );
    assert_eq!(web.note(), None);
}

#[tokio::test]
async fn a_stop_ends_the_whole_session_even_if_it_resists() {
    // Its child, in a group of its own, does not get the signal that the service itself ignores.
    let script = "import signal, subprocess, time\n\
         signal.signal(signal.SIGTERM, signal.SIG_IGN)\n\
         subprocess.Popen(['sleep', '60'], preexec_fn=__import__('os').setpgrp)\n\
         time.sleep(60)";
    let web = Web::running(&["python3", "-c", script].map(str::to_owned), free_port());
    let cx = web.host.context();
    Start {
        listens: vec![],
        ..web.start()
    }
    .apply(&cx, &Value::Null)
    .await
    .unwrap();
    let note = web.note().unwrap();
    let until = Instant::now() + TAKE_OFF;
    while note.members().len() < 2 {
        assert!(Instant::now() < until, "the service has started no child");
        sleep(PAUSE).await;
    }
    let stop = Stop {
        within: Period::seconds(3),
        ..web.stop()
    };
    assert!(stop.apply(&cx, &Value::Null).await.unwrap().changed);
    assert_eq!(note.members(), Vec::<i32>::new());
}

#[tokio::test]
async fn a_port_that_another_program_holds_is_named() {
    let web = Web::new();
    let other = std::net::TcpListener::bind(("127.0.0.1", web.port)).unwrap();
    let stop = Stop {
        within: Period(500),
        ..web.stop()
    };
    let failed = stop
        .apply(&web.host.context(), &Value::Null)
        .await
        .unwrap_err();
    assert_eq!(failed.cause, Cause::CheckUnmet);
    assert!(
        failed
            .message
            .contains(&format!("process {}", std::process::id())),
        "{failed:?}"
    );
    assert!(!failed.changed);
    drop(other);
}

#[tokio::test]
async fn status_is_held_against_what_is_expected() {
    let web = Web::new();
    let cx = web.host.context();
    let status = |expect| Status {
        service: "web".into(),
        driver: Driver::Process,
        expect,
    };
    let apply = async |expect| status(expect).apply(&cx, &Value::Null).await;
    assert_eq!(
        apply(Expected::Running).await.unwrap_err().message,
        "service web is stopped, not running"
    );
    assert!(apply(Expected::Stopped).await.is_ok());
    assert!(apply(Expected::Any).await.is_ok());
    let unknown = Status {
        service: "other".into(),
        ..status(Expected::Any)
    };
    let failed = unknown.apply(&cx, &Value::Null).await.unwrap_err();
    assert!(failed.hint.unwrap().contains("[services.other]"));
    let unfit = Status {
        service: "../web".into(),
        ..status(Expected::Any)
    };
    assert_eq!(
        unfit.apply(&cx, &Value::Null).await.unwrap_err().cause,
        Cause::Refused
    );
}

/// The driver `command`, with a file as the service.
#[tokio::test]
async fn commands_of_the_configuration_run_a_service() {
    let mut host = Host::new();
    let up = host.path().join("up").to_string_lossy().into_owned();
    let argv = |argv: &[&str]| argv.iter().map(|&argument| argument.to_owned()).collect();
    let status = format!("import os, sys; sys.exit(0 if os.path.exists({up:?}) else 3)");
    let service = config::Service {
        start: argv(&["touch", &up]),
        stop: argv(&["rm", &up]),
        status: argv(&["python3", "-c", &status]),
        ..config::Service::default()
    };
    host.config.services.insert("flag".into(), service);
    let cx = host.context();
    let start = Start {
        service: "flag".into(),
        driver: Driver::Command,
        listens: vec![],
        within: Period::seconds(20),
    };
    let before = start.before(&cx).await.unwrap();
    assert!(start.apply(&cx, &before).await.unwrap().changed);
    assert!(Path::new(&up).exists());
    assert!(start.undo(&cx, &before).await.unwrap().changed);
    assert!(!Path::new(&up).exists());
}

/// A service of commands whose status can be asked so often before it is broken.
fn forgetful(host: &mut Host, running: bool, answers: usize) -> PathBuf {
    let up = host.path().join("up");
    if running {
        fs::write(&up, "").unwrap();
    }
    fs::write(host.path().join("answers"), answers.to_string()).unwrap();
    let status = format!(
        "import os,sys\nleft=int(open('answers').read())\nopen('answers','w').write(str(left-1))\n\
         sys.exit(7 if left < 1 else 0 if os.path.exists({up:?}) else 3)"
    );
    let argv = |argv: &[&str]| argv.iter().map(|&argument| argument.to_owned()).collect();
    let service = config::Service {
        start: argv(&["touch", up.to_str().unwrap()]),
        stop: argv(&["rm", up.to_str().unwrap()]),
        status: argv(&["python3", "-c", &status]),
        dir: Some(host.path().to_owned()),
        ..config::Service::default()
    };
    host.config.services.insert("flag".into(), service);
    up
}

#[tokio::test]
async fn what_fails_after_the_effect_says_that_something_was_changed() {
    let mut host = Host::new();
    let stop = Stop {
        service: "flag".into(),
        driver: Driver::Command,
        refuses: vec![],
        within: Period::seconds(10),
    };
    let start = Start {
        service: "flag".into(),
        driver: Driver::Command,
        listens: vec![],
        within: Period::seconds(10),
    };
    let restart = Restart {
        service: "flag".into(),
        driver: Driver::Command,
        listens: vec![],
        within: Period::seconds(10),
    };
    let up = forgetful(&mut host, true, 1);
    let failed = stop.apply(&host.context(), &Value::Null).await.unwrap_err();
    assert!(failed.message.contains("exited with 7"), "{failed:?}");
    assert!(failed.changed && !up.exists());

    let up = forgetful(&mut host, false, 1);
    let failed = start
        .apply(&host.context(), &Value::Null)
        .await
        .unwrap_err();
    assert!(failed.changed && up.exists(), "{failed:?}");

    forgetful(&mut host, true, 1);
    let failed = restart
        .apply(&host.context(), &Value::Null)
        .await
        .unwrap_err();
    assert!(
        failed.message.contains("exited with 7") && failed.changed,
        "{failed:?}"
    );
    // Stopped, and then not started: the program is not there.
    forgetful(&mut host, true, 9);
    host.config.services.get_mut("flag").unwrap().start = vec!["/no/such/program".into()];
    let failed = restart
        .apply(&host.context(), &Value::Null)
        .await
        .unwrap_err();
    assert!(
        failed.message.contains("/no/such/program") && failed.changed,
        "{failed:?}"
    );

    // Both ways back.
    forgetful(&mut host, true, 2);
    let before = stop.before(&host.context()).await.unwrap();
    fs::remove_file(&up).unwrap();
    let failed = stop.undo(&host.context(), &before).await.unwrap_err();
    assert!(failed.changed && up.exists(), "{failed:?}");
    fs::remove_file(&up).unwrap();
    forgetful(&mut host, false, 2);
    let before = start.before(&host.context()).await.unwrap();
    fs::write(&up, "").unwrap();
    let failed = start.undo(&host.context(), &before).await.unwrap_err();
    assert!(failed.changed && !up.exists(), "{failed:?}");

    // Before the effect nothing was.
    forgetful(&mut host, true, 0);
    let failed = stop.apply(&host.context(), &Value::Null).await.unwrap_err();
    assert!(!failed.changed && up.exists(), "{failed:?}");
}
