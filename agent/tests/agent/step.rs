//! The step process by itself: a claim is for ever (INV-1).

use std::io::{BufRead as _, BufReader};

use lockstep_proto::ids::Direction;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::support::{Controller, Host, key, rollout};

fn job(host: &Host, attempt: u16) -> std::path::PathBuf {
    let key = key(&rollout(1), 0, Direction::Do, attempt);
    let dir = host.path("state/steps").join(key.to_string());
    std::fs::create_dir_all(dir.join("files")).unwrap();
    let script = "import sys; open(sys.argv[1], 'a').write('x\\n')";
    let effects = host.path("effects");
    let job = json!({
        "key": key,
        "action": {"exec.run": {"name": "x", "argv": ["python3", "-c", script, effects]}},
        "before": null,
        "bindings": [],
        "timeout": "30s",
        "log_offsets": {},
    });
    std::fs::write(dir.join("job.json"), job.to_string()).unwrap();
    dir
}

fn run(host: &Host, attempt: u16) -> std::process::Command {
    let mut command = host.command("step");
    command.arg(key(&rollout(1), 0, Direction::Do, attempt).to_string());
    command
}

fn effects(host: &Host) -> usize {
    std::fs::read_to_string(host.path("effects")).map_or(0, |text| text.lines().count())
}

#[tokio::test]
async fn an_attempt_has_one_effect_however_often_it_is_started() {
    let controller = Controller::start().await;
    let host = Host::new(&controller, "");
    let dir = job(&host, 1);
    let racing: Vec<_> = (0..8).map(|_| run(&host, 1).spawn().unwrap()).collect();
    let codes: Vec<_> = racing
        .into_iter()
        .map(|mut child| child.wait().unwrap().code())
        .collect();
    assert_eq!(
        codes.iter().filter(|code| **code == Some(0)).count(),
        1,
        "{codes:?}"
    );
    assert_eq!(
        codes.iter().filter(|code| **code == Some(10)).count(),
        7,
        "{codes:?}"
    );
    assert_eq!(effects(&host), 1);
    let outcome = std::fs::read(dir.join("outcome.json")).unwrap();
    let outcome: Value = serde_json::from_slice(&outcome).unwrap();
    assert_eq!(outcome["outcome"]["ok"]["changed"], true, "{outcome}");
    assert_eq!(run(&host, 1).status().unwrap().code(), Some(10));
    assert_eq!(effects(&host), 1);
}

#[tokio::test]
async fn a_claim_without_an_outcome_is_not_carried_out_again() {
    let controller = Controller::start().await;
    let host = Host::new(&controller, "");
    let dir = job(&host, 1);
    std::fs::write(dir.join("claim"), "").unwrap();
    assert_eq!(run(&host, 1).status().unwrap().code(), Some(10));
    assert_eq!(effects(&host), 0);
    assert!(!dir.join("outcome.json").exists());
}

#[tokio::test]
async fn what_was_cancelled_before_it_began_does_nothing() {
    let controller = Controller::start().await;
    let host = Host::new(&controller, "");
    let dir = job(&host, 1);
    std::fs::write(dir.join("cancel"), "").unwrap();
    assert_eq!(run(&host, 1).status().unwrap().code(), Some(0));
    let outcome = std::fs::read(dir.join("outcome.json")).unwrap();
    let outcome: Value = serde_json::from_slice(&outcome).unwrap();
    let failed = &outcome["outcome"]["failed"];
    assert_eq!(failed["cause"], "cancelled", "{outcome}");
    assert_eq!(failed["changed"], false, "{outcome}");
    assert_eq!(effects(&host), 0);
}

/// Creates thing 7 when asked to, never answers to `/wait`, and tells what it was asked for.
const APP: &str = "
import http.server, os, threading, time
class App(http.server.BaseHTTPRequestHandler):
    def do_POST(self): self.answer(b'{\"id\": 7}')
    def do_DELETE(self): self.answer(b'')
    def do_GET(self):
        print('GET', flush=True)
        time.sleep(60)
    def answer(self, body):
        print(self.command, self.path, flush=True)
        self.send_response(200)
        self.send_header('content-length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args): pass
server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), App)
print(server.server_port, flush=True)
threading.Timer(90, os._exit, [0]).start()
server.serve_forever()";

#[tokio::test]
async fn a_check_that_is_terminated_removes_what_it_created() {
    let controller = Controller::start().await;
    let host = Host::new(&controller, "");
    let mut app = std::process::Command::new("python3")
        .args(["-c", APP])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(app.stdout.take().unwrap()).lines();
    let mut says = || said.next().unwrap().unwrap();
    let base = format!("http://127.0.0.1:{}", says());
    let dir = job(&host, 1);
    let text = std::fs::read(dir.join("job.json")).unwrap();
    let mut job: Value = serde_json::from_slice(&text).unwrap();
    job["action"] = json!({"check.http": {
        "url": format!("{base}/things"), "method": "POST", "capture": {"id": "$.id"},
        "timeout": "30s", "then": [{"url": format!("{base}/wait")}],
        "cleanup": [{"url": format!("{base}/things/${{capture.id}}"), "method": "DELETE"}],
    }});
    std::fs::write(dir.join("job.json"), job.to_string()).unwrap();
    let mut step = run(&host, 1).spawn().unwrap();
    assert_eq!([says(), says()], ["POST /things", "GET"]);
    kill_process(Pid::from_child(&step), Signal::TERM).unwrap();
    assert_eq!(step.wait().unwrap().code(), Some(0));
    app.kill().unwrap();
    app.wait().unwrap();
    assert_eq!(says(), "DELETE /things/7");
    let outcome = std::fs::read(dir.join("outcome.json")).unwrap();
    let outcome: Value = serde_json::from_slice(&outcome).unwrap();
    let failed = &outcome["outcome"]["failed"];
    assert_eq!(failed["cause"], "cancelled", "{outcome}");
    let message = failed["message"].as_str().unwrap();
    assert!(message.contains("host is shut down"), "{message}");
}

#[tokio::test]
async fn an_attempt_without_a_job_does_nothing() {
    let controller = Controller::start().await;
    let host = Host::new(&controller, "");
    let output = run(&host, 1).output().unwrap();
    assert_eq!(output.status.code(), Some(4));
}
