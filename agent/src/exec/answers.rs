//! Answers to what began nothing: refusals, declines, states, dry runs, and reports that are asked
//! for again.
//!
//! Whoever has the controller decides how often it asks. A controller takes a report only under the
//! next number, so that each answer is a record, for ever. These have bounds therefore, of time and
//! of space, and leave what is set aside for the ends of attempts that began. Beyond, the session
//! ends.

use std::time::Duration;

use lockstep_proto::report::ReportBody;
use tokio::time::Instant;

use super::hold::Recorded;
use super::{Exec, ExecError, Refusal};
use crate::errors::chain;
use crate::journal::{AppendError, Need, Record};

/// What answers may take of the journal at once, in bytes: some thousand refusals, such as dry runs
/// of many plans bring.
const AT_ONCE: u64 = 4 << 20;

/// What comes back of that in a minute: 32 short answers. A controller repeats an order to a host a
/// few times a minute at most; whoever goes on for ever writes less than 50 MB a day.
const A_MINUTE: u64 = 32 << 10;

/// In microseconds.
const MINUTE: u64 = 60_000_000;

/// What an answer counts at least, for each is synced.
const LEAST: u64 = 1 << 10;

/// What may be answered now. It is exec's: a controller that connects anew has no more.
#[derive(Debug)]
pub(super) struct Allowance {
    /// In bytes.
    pub(super) left: u64,
    /// Up to when it has come back.
    at: Instant,
}

impl Allowance {
    /// All of it.
    pub(super) fn new(now: Instant) -> Self {
        Self {
            left: AT_ONCE,
            at: now,
        }
    }

    /// Takes what an answer of so many bytes counts; false if there is not so much left.
    fn take(&mut self, now: Instant, bytes: usize) -> bool {
        let micros = u64::try_from((now - self.at).as_micros()).unwrap_or(u64::MAX);
        let back = micros.saturating_mul(A_MINUTE) / MINUTE;
        // Parts of a byte are not lost to whoever asks often.
        self.at += Duration::from_micros(back * MINUTE / A_MINUTE);
        self.left = self.left.saturating_add(back).min(AT_ONCE);
        let counts = u64::try_from(bytes).unwrap_or(u64::MAX).max(LEAST);
        let left = self.left.checked_sub(counts);
        self.left = left.unwrap_or(self.left);
        left.is_some()
    }
}

impl Exec {
    /// Makes an answer durable, as a report; or ends the session, and nothing is answered.
    pub(super) fn answer(&mut self, body: ReportBody) -> Result<(), ExecError> {
        let record = self.numbered(body);
        let bytes = serde_json::to_vec(&record).map_or(usize::MAX, |json| json.len());
        if !self.allowance.take(Instant::now(), bytes) {
            let why = "it asks too often for what is refused, or answered already: this host \
                       answers again in a minute";
            self.end_session(Refusal::Unanswered, why.to_owned());
            return Ok(());
        }
        match self.commit(vec![record], Need::Answers) {
            Err(error @ AppendError::Full(_)) => {
                let why = format!(
                    "an answer cannot be recorded: {}; make room in the agent's state directory",
                    chain(&error)
                );
                self.end_session(Refusal::Unanswered, why);
                Ok(())
            }
            done => Ok(done?),
        }
    }

    /// Sends a report once more, for the sake of a controller that asks again.
    pub(super) fn send_again(&mut self, recorded: Recorded) -> Result<(), ExecError> {
        if recorded.number > self.memory.acknowledged {
            // It is on its way, or goes out after the next reconnect.
            return Ok(());
        }
        match self.journal.read(recorded.position)? {
            Record::Report { body, .. } => self.answer(body),
            other => unreachable!("{other:?} stands where a report was written"),
        }
    }
}

#[cfg(test)]
mod tests;
