//! Points at which a process may be killed, one before and one after each of its writes.
//!
//! ```text
//! the code under test:  points::reached("journal.append: written");     with `faults` only
//! LOCKSTEP_POINTS=list:FILE      each point is a line of the file
//! LOCKSTEP_POINTS=kill:N         SIGKILL at the N-th point, from 1
//! LOCKSTEP_POINTS=ask:SOCKET     says the point, and goes on once it is answered
//! LOCKSTEP_POINTS=hold:N:FILE    at the N-th point it adds its pid to the file, and goes on once
//!                                there is a file of that name with the ending `go`
//! LOCKSTEP_POINTS=@FILE          one of these, read from the file when the process comes to its
//!                                first point; none if there is no file. Who is killed removes it
//!                                first, so that the next process goes on.
//! ```
//!
//! A step process counts on its own: `LOCKSTEP_STEP_POINTS` is its variable, which the agent
//! hands on.

use std::cell::RefCell;
use std::fs::OpenOptions;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

/// What is done at each point.
#[derive(Debug)]
enum Plan {
    List(PathBuf),
    Kill {
        at: u64,
        passed: u64,
        consumed: Option<PathBuf>,
    },
    Ask(BufReader<UnixStream>),
    Hold {
        at: u64,
        passed: u64,
        file: PathBuf,
    },
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
    let mut text = std::env::var(variable()).ok()?;
    let file = text.strip_prefix('@').map(PathBuf::from);
    if let Some(file) = &file {
        text = std::fs::read_to_string(file).ok()?;
    }
    let (what, argument) = text.split_once(':').expect("a plan such as kill:3");
    Some(match what {
        "list" => Plan::List(argument.into()),
        "kill" => Plan::Kill {
            at: argument.parse().expect("a number"),
            passed: 0,
            consumed: file,
        },
        "hold" => {
            let (at, file) = argument.split_once(':').expect("a number and a file");
            Plan::Hold {
                at: at.parse().expect("a number"),
                passed: 0,
                file: file.into(),
            }
        }
        "ask" => {
            let stream = UnixStream::connect(argument).expect("the test listens");
            Plan::Ask(BufReader::new(stream))
        }
        other => panic!("`{other}` is no plan"),
    })
}

/// Adds a line to a file.
fn add(path: &Path, line: &str) {
    let file = OpenOptions::new().create(true).append(true).open(path);
    let written = file.and_then(|mut file| file.write_all(format!("{line}\n").as_bytes()));
    written.expect("the list can be written");
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
        Plan::List(path) => add(path, point),
        Plan::Hold { at, passed, file } => {
            *passed += 1;
            if at == passed {
                add(file, &std::process::id().to_string());
                let go = file.with_extension("go");
                while !go.exists() {
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
        }
        Plan::Kill {
            at,
            passed,
            consumed,
        } => {
            *passed += 1;
            if at == passed {
                if let Some(file) = consumed {
                    std::fs::remove_file(file).expect("nobody else removes the plan");
                }
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
