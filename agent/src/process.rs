//! The one way in which Lockstep starts other programs: argv, never a shell.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use lockstep_proto::report::Failure;

use crate::step::Context;

/// A program to run.
#[derive(Debug, Clone, Default)]
pub(crate) struct Program {
    /// Program and arguments. No secret may stand here: everybody on the host can read it.
    pub(crate) argv: Vec<String>,
    /// The directory it runs in.
    pub(crate) dir: Option<PathBuf>,
    /// Its environment, which is otherwise only PATH, HOME, LANG=C.UTF-8, LC_ALL=C.UTF-8 and the user.
    pub(crate) env: BTreeMap<String, String>,
    /// Who it runs as. Default: whoever the agent runs as.
    pub(crate) user: Option<String>,
    /// At most this long, and never longer than the step's deadline; then its process group is
    /// ended, first politely.
    pub(crate) timeout: Option<Duration>,
    /// Values that are taken out of its output before it is logged or returned.
    pub(crate) secrets: Vec<String>,
}

/// How a program ended.
#[derive(Debug, Clone)]
pub(crate) struct Ended {
    /// Its exit code; 128 and the signal's number if a signal ended it.
    pub(crate) code: i32,
    /// The first MiB of its standard output. Standard error goes to the step's log only.
    pub(crate) stdout: String,
}

impl Program {
    /// Runs it, its output going to the step's log line by line. Fails if it cannot be started
    /// (with a hint about a missing tool) or takes too long; an exit code other than 0 is no
    /// failure here.
    pub(crate) async fn run(&self, cx: &Context) -> Result<Ended, Failure> {
        let _ = cx;
        unimplemented!("written by the actions' author")
    }

    /// Runs it, and fails unless it exits with 0; the failure carries the last lines.
    pub(crate) async fn succeed(&self, cx: &Context) -> Result<Ended, Failure> {
        let _ = cx;
        unimplemented!("written by the actions' author")
    }
}
