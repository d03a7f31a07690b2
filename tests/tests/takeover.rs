//! A controller that was stopped in the middle of a rollout wakes up beside its successor: real
//! agents obey one of the two, and every effect is there once (INV-1, INV-4).

use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lockstep_tests::cluster::Cluster;
use lockstep_tests::daemon::{Daemon, Launch};
use lockstep_tests::operator::text;
use lockstep_tests::story::{effect, under_way};
use lockstep_tests::wait;
use rustix::process::{Signal, kill_process};

/// What agents and operators dial: it leads to one controller or another, as an address that moves.
#[derive(Clone)]
struct Relay {
    to: Arc<Mutex<SocketAddr>>,
    open: Arc<Mutex<Vec<TcpStream>>>,
}

impl Relay {
    fn start(listener: TcpListener, to: SocketAddr) -> Self {
        let relay = Self {
            to: Arc::new(Mutex::new(to)),
            open: Arc::default(),
        };
        let own = relay.clone();
        std::thread::spawn(move || {
            for inner in listener.incoming().flatten() {
                let Ok(outer) = TcpStream::connect(*own.to.lock().unwrap()) else {
                    continue;
                };
                for (from, to) in [(&inner, &outer), (&outer, &inner)] {
                    let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    own.open.lock().unwrap().push(from.try_clone().unwrap());
                    std::thread::spawn(move || {
                        let _ = std::io::copy(&mut from, &mut to);
                        let _ = to.shutdown(std::net::Shutdown::Both);
                    });
                }
            }
        });
        relay
    }

    /// Leads there from now on, and cuts what is open.
    fn lead_to(&self, to: SocketAddr) {
        *self.to.lock().unwrap() = to;
        for stream in self.open.lock().unwrap().drain(..) {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }
}

/// Where it listens is found out when it does: a port that is free now may be another one's then.
const ANYWHERE: &str = "127.0.0.1:0";

/// The address that a controller has written into its ready file.
fn address(ready: &Path) -> SocketAddr {
    let text = fs::read_to_string(ready).unwrap();
    text.trim().parse().unwrap()
}

/// Listens where another process has just stopped to.
fn take_place(at: SocketAddr) -> TcpListener {
    let bind = || TcpListener::bind(at).map_err(|error| error.to_string());
    wait::until("the address to be free", wait::SOON, bind).unwrap()
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

/// A successor from a copy of the controller's state, as it is at this moment.
fn successor(cluster: &Cluster) -> (Daemon, SocketAddr) {
    let old = cluster.root().join("controller");
    let new = cluster.root().join("successor");
    copy(&old.join("state"), &new.join("state"));
    let config = fs::read_to_string(old.join("controller.toml")).unwrap();
    let lines = config.lines().map(|line| match line.split_once(" = ") {
        Some(("listen", _)) => format!("listen = \"{ANYWHERE}\""),
        Some(("state_dir", _)) => format!("state_dir = \"{}\"", new.join("state").display()),
        _ => line.to_owned(),
    });
    let config = lines.collect::<Vec<_>>().join("\n");
    fs::write(new.join("controller.toml"), config).unwrap();
    let (file, ready) = (new.join("controller.toml"), new.join("ready"));
    let mut daemon = Daemon::spawn(Launch {
        name: "the successor",
        argv: vec![
            cluster.binaries().lockstep.clone().into_os_string(),
            "serve".into(),
            "--take-over".into(),
            "--config".into(),
            file.into_os_string(),
            "--ready-file".into(),
            ready.clone().into_os_string(),
        ],
        env: vec![("NO_COLOR".to_owned(), "1".into())],
        dir: &new,
        log: &new.join("log"),
        user: None,
        stop: Signal::TERM,
    })
    .unwrap();
    wait::until_true("the successor to be ready", wait::SOON, || {
        daemon.check().unwrap();
        fs::read_to_string(&ready).is_ok_and(|text| !text.trim().is_empty())
    })
    .unwrap();
    let address = address(&ready);
    (daemon, address)
}

fn plan() -> String {
    format!(
        "version: 1\nplan: take-over\nfleet:\n  app: {{labels: {{role: app}}}}\nphases:\n  \
         - name: one\n    on: app\n    steps:\n{}  - name: two\n    on: app\n    steps:\n{}{}",
        effect("first", 8),
        effect("second", 3),
        effect("third", 0),
    )
}

#[test]
fn a_stopped_controller_wakes_up_beside_its_successor_and_no_effect_is_its_own() {
    let names = ["app-1", "app-2", "app-3"];
    let mut builder = Cluster::builder()
        .without_database()
        .hosts(&names.map(|name| (name, "app")));
    for name in names {
        builder = builder.policy(name, Some("[[allow]]\naction = \"*\"\n"));
    }
    let mut cluster = builder.start().unwrap();

    // The address that everybody dials becomes a relay's; the controller moves behind it.
    let dialled: SocketAddr = cluster.address().parse().unwrap();
    assert_eq!(cluster.stop_controller(), Some(0));
    let file = cluster.root().join("controller/controller.toml");
    let config = fs::read_to_string(&file).unwrap();
    let behind = config.replacen(&dialled.to_string(), ANYWHERE, 1);
    fs::write(&file, behind).unwrap();
    let listener = take_place(dialled);
    cluster.start_controller().unwrap();
    let first = address(&cluster.root().join("controller/ready"));
    let relay = Relay::start(listener, first);
    cluster.wait_connected(&names.map(str::to_owned)).unwrap();

    let file = cluster.root().join("take-over.yaml");
    fs::write(&file, plan()).unwrap();
    let rollout = cluster.requester().submit(&file, &[]).unwrap();
    under_way(&cluster.requester(), &rollout, "exec.run", None);
    let old = cluster.controller_pid().unwrap();
    kill_process(old, Signal::STOP).unwrap();
    let (_successor, second) = successor(&cluster);
    relay.lead_to(second);
    cluster.wait_connected(&names.map(str::to_owned)).unwrap();

    // It wakes up alone: nobody dials it, and nothing happens.
    kill_process(old, Signal::CONT).unwrap();
    std::thread::sleep(Duration::from_secs(2));
    assert!(cluster.controller_pid().is_some());
    // Then agents come back to it.
    relay.lead_to(first);
    let log = cluster.controller_log();
    wait::until("the old controller to end", wait::SOON, || {
        let said = fs::read_to_string(&log).unwrap_or_default();
        // One host alone may lie: it ends at the word of the second.
        let met = said.contains("took over") && said.contains("the controller ends");
        if met { Ok(()) } else { Err(said) }
    })
    .unwrap();
    assert_eq!(cluster.stop_controller(), Some(12));
    relay.lead_to(second);

    let document = cluster.finish(&rollout).unwrap();
    assert_eq!(
        text(&document["state"]),
        "succeeded",
        "{}",
        cluster.explain(&document)
    );
    for host in cluster.hosts() {
        let effects = fs::read_to_string(host.effects()).unwrap();
        assert_eq!(effects, "first\nsecond\nthird\n", "{}", host.name);
    }
}
