//! An attempt as a process of its own, this test program once more, so that it can be killed as the
//! step process can be; and the killing.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use lockstep_proto::action::migration::Apply;
use lockstep_proto::ids::StepKey;
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};

use super::NULL;
use crate::actions::Act as _;
use crate::actions::migration::tools::files::Stage;
use crate::config::App;
use crate::sql::application_name;
use crate::sql::cluster::PASSWORD;
use crate::step::Context;
use crate::testing::Host;

/// The test that is the attempt's process.
const ATTEMPT: &str = "actions::migration::kills::attempt::an_attempt";

/// Under this name the attempt's process finds what it is to do.
const JOB: &str = "LOCKSTEP_KILL_JOB";

/// What an attempt's process has to know.
#[derive(Serialize, Deserialize)]
struct Job {
    act: Apply,
    key: StepKey,
    dir: PathBuf,
    root: PathBuf,
    socket: String,
    port: u16,
    dbname: String,
    user: String,
}

/// What is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Victim {
    /// The attempt's process; what it has started goes a moment later, as systemd does it.
    Step,
    /// The tool's program.
    Tool,
    /// One of the attempt's sessions in the server: with it all others fall, and it recovers.
    Session,
    /// The server's first process, which is started again while the attempt still runs.
    Server,
}

/// Starts an attempt as a process of its own.
pub(super) fn start(stage: &Stage, act: &Apply, cx: &Context) -> Child {
    let config = &cx.config.postgres["staff"];
    let job = Job {
        act: act.clone(),
        key: cx.key.clone(),
        dir: cx.dir.clone(),
        root: cx.config.apps["staff-app"].root.clone(),
        socket: config.host.clone(),
        port: config.port,
        dbname: config.dbname.clone().unwrap(),
        user: config.user.clone(),
    };
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--ignored", ATTEMPT])
        .env(JOB, serde_json::to_string(&job).unwrap())
        // What it leaves when it is killed goes with the stage.
        .env("TMPDIR", stage.bench.host.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

#[tokio::test]
#[ignore = "a program that the kills start"]
async fn an_attempt() {
    let Ok(job) = std::env::var(JOB) else { return };
    let job: Job = serde_json::from_str(&job).unwrap();
    let mut host = Host::new();
    host.secret("db", PASSWORD);
    let app = App {
        root: job.root,
        user: None,
        env: [].into(),
    };
    host.config.apps.insert("staff-app".into(), app);
    let section = format!(
        "host = '{}'\nport = {}\ndbname = '{}'\nuser = '{}'\npassword = 'db'",
        job.socket, job.port, job.dbname, job.user
    );
    let database = toml::from_str(&section).unwrap();
    host.config.postgres.insert("staff".into(), database);
    let mut cx = host.context();
    cx.key = job.key;
    cx.dir = job.dir;
    job.act.apply(&cx, &NULL).await.unwrap();
}

/// The processes whose environment names the attempt: the tools that it has started.
fn tools_of(cx: &Context) -> Vec<Pid> {
    let mark = format!("PGAPPNAME={}", application_name(&cx.key));
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    let found = processes.filter_map(|entry| {
        let environment = std::fs::read(entry.path().join("environ")).ok()?;
        let named = environment
            .split(|byte| *byte == 0)
            .any(|it| it == mark.as_bytes());
        let pid = entry.file_name().to_str()?.parse().ok()?;
        named.then(|| Pid::from_raw(pid)).flatten()
    });
    found.collect()
}

fn kill(pid: Pid) {
    // It may have gone by itself.
    let _ = kill_process(pid, Signal::KILL);
}

/// Kills, and waits until the attempt is over. Says whether there was something to kill.
pub(super) async fn strike(stage: &Stage, cx: &Context, child: &mut Child, victim: Victim) -> bool {
    let struck = match victim {
        Victim::Step => {
            let running = child.try_wait().unwrap().is_none();
            kill(Pid::from_child(child));
            tokio::time::sleep(Duration::from_millis(50)).await;
            tools_of(cx).into_iter().for_each(kill);
            running
        }
        Victim::Tool => {
            let tools = tools_of(cx);
            tools.iter().copied().for_each(kill);
            !tools.is_empty()
        }
        Victim::Session => {
            let sql = format!(
                "SELECT (SELECT pid FROM pg_stat_activity WHERE application_name = '{}' \
                 ORDER BY state = 'active' DESC, backend_start DESC LIMIT 1)",
                application_name(&cx.key)
            );
            let pid = stage.bench.ask(&sql).await.parse().ok();
            pid.and_then(Pid::from_raw).map(kill).is_some()
        }
        Victim::Server => {
            let running = child.try_wait().unwrap().is_none();
            stage.bench.cluster().crash();
            running
        }
    };
    let began = Instant::now();
    while child.try_wait().unwrap().is_none() {
        assert!(
            began.elapsed() < Duration::from_mins(1),
            "the attempt does not end"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // A server that has fallen lets nobody in for a moment.
    while stage.bench.try_session("maintenance").await.is_err() {
        assert!(
            began.elapsed() < Duration::from_mins(1),
            "the server does not come back"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    struck
}
