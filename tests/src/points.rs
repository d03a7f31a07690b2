//! Points at which a process may be killed, one before and one after each of its writes.
//!
//! ```text
//! the code under test:  points::reached("journal.append: written");     with `faults` only
//! LOCKSTEP_POINTS=list:FILE      each point is a line of the file
//! LOCKSTEP_POINTS=kill:N         SIGKILL at the N-th point, from 1
//! LOCKSTEP_POINTS=ask:SOCKET     says the point, and goes on once it is answered
//! ```
//!
//! A step process counts on its own: `LOCKSTEP_STEP_POINTS` is its variable, which the agent
//! hands on.

use std::cell::RefCell;
use std::fs::OpenOptions;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Mutex, OnceLock};

/// What is done at each point.
#[derive(Debug)]
enum Plan {
    List(PathBuf),
    Kill { at: u64, passed: u64 },
    Ask(BufReader<UnixStream>),
}

static PLAN: OnceLock<Option<Mutex<Plan>>> = OnceLock::new();

type Watcher = Box<dyn FnMut(&str)>;

thread_local! {
    static WATCHER: RefCell<Option<Watcher>> = const { RefCell::new(None) };
}

/// Has `watcher` called at each point that this thread reaches, in place of the environment's
/// plan; none ends it.
pub fn watch(watcher: Option<Watcher>) {
    WATCHER.set(watcher);
}

/// The environment variable of this process's plan: step processes have one of their own.
fn variable() -> &'static str {
    let step = std::env::args().nth(1).is_some_and(|word| word == "step");
    if step {
        "LOCKSTEP_STEP_POINTS"
    } else {
        "LOCKSTEP_POINTS"
    }
}

fn plan() -> Option<Plan> {
    let text = std::env::var(variable()).ok()?;
    let (what, argument) = text.split_once(':').expect("a plan such as kill:3");
    Some(match what {
        "list" => Plan::List(argument.into()),
        "kill" => Plan::Kill {
            at: argument.parse().expect("a number"),
            passed: 0,
        },
        "ask" => {
            let stream = UnixStream::connect(argument).expect("the test listens");
            Plan::Ask(BufReader::new(stream))
        }
        other => panic!("`{other}` is no plan"),
    })
}

/// The process has come to a point.
pub fn reached(point: &str) {
    let watched =
        WATCHER.with_borrow_mut(|watcher| watcher.as_mut().map(|watcher| watcher(point)).is_some());
    if watched {
        return;
    }
    let Some(plan) = PLAN.get_or_init(|| plan().map(Mutex::new)) else {
        return;
    };
    match &mut *plan.lock().expect("no point panics") {
        Plan::List(path) => {
            let file = OpenOptions::new().create(true).append(true).open(path);
            let line = format!("{point}\n");
            let written = file.and_then(|mut file| file.write_all(line.as_bytes()));
            written.expect("the list can be written");
        }
        Plan::Kill { at, passed } => {
            *passed += 1;
            if at == passed {
                let own = rustix::process::getpid();
                rustix::process::kill_process(own, rustix::process::Signal::KILL)
                    .expect("a process may kill itself");
                // The signal comes before this returns to anybody.
                loop {
                    std::thread::park();
                }
            }
        }
        Plan::Ask(stream) => {
            // A test that is gone asks nothing any more.
            let _ = writeln!(stream.get_mut(), "{point}");
            let _ = stream.read_line(&mut String::new());
        }
    }
}
