//! A program that is run for what it prints, which may be a secret.

use std::process::Stdio;

use rustix::process::Pid;
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::time::timeout;
use zeroize::Zeroizing;

use super::{Cause, Failure, Group, Program, exit_code, stop};

/// How a program ended, and what it printed.
pub(crate) struct Captured {
    /// Its exit code; 128 and the signal's number if a signal ended it.
    pub(crate) code: i32,
    /// The beginning of its standard output.
    pub(crate) stdout: Zeroizing<Vec<u8>>,
}

impl Program {
    /// Runs it, keeping so many bytes of its standard output, and nothing else of what it says: no
    /// log, no failure has any of it. Its `timeout` must be set.
    pub(crate) async fn capture(&self, most: usize) -> Result<Captured, Failure> {
        let mut child = self.spawn(Stdio::null(), Stdio::piped())?;
        let group = Group(child.id().and_then(|id| Pid::from_raw(id.cast_signed())));
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let limit = self.timeout.unwrap_or_default();
        let run = async {
            // A program that fills a pipe would wait for us.
            let (stdout, _) = tokio::join!(keep(stdout, most), keep(stderr, 0));
            (stdout, child.wait().await)
        };
        let ended = timeout(limit, run).await;
        let (stdout, status) = match ended {
            Ok((stdout, Ok(status))) => (stdout, status),
            Ok((_, Err(error))) => {
                return Err(self.failure(Cause::Step, format!("cannot be waited for: {error}")));
            }
            Err(_) => {
                stop(&mut child, &group).await;
                group.forget();
                let what = format!("took longer than {limit:?} and was ended");
                return Err(self.failure(Cause::TimedOut, what));
            }
        };
        group.forget();
        Ok(Captured {
            code: exit_code(status),
            stdout,
        })
    }
}

/// Reads a pipe to its end, and keeps its beginning.
async fn keep(pipe: Option<impl AsyncRead + Unpin>, most: usize) -> Zeroizing<Vec<u8>> {
    // With all its room from the start: a buffer that grows leaves its content behind.
    let mut kept = Zeroizing::new(Vec::with_capacity(most));
    let mut chunk = Zeroizing::new(vec![0; 4096]);
    let Some(mut pipe) = pipe else { return kept };
    // An error on a pipe means what its end means: there is nothing more to read.
    while let Ok(length @ 1..) = pipe.read(&mut chunk).await {
        let room = most - kept.len();
        kept.extend_from_slice(&chunk[..length.min(room)]);
    }
    kept
}
