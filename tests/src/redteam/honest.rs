//! Honest agents beside the hostile: how long they wait for an answer, and whether they lose a
//! session.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use lockstep_proto::ids::RolloutId;
use lockstep_proto::order::Fact;
use lockstep_proto::report::ReportBody;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::played::{Agent, Dial, hello};

/// Between two reports of one agent.
const PACE: Duration = Duration::from_millis(20);

/// Longer than this nobody waits: a timeout.
const LONGEST: Duration = Duration::from_secs(10);

/// What the agents have seen.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// Milliseconds from a report to its acknowledgement: it is durable by then.
    pub(super) waits: Vec<f64>,
    pub(super) timeouts: u64,
    /// Sessions that were lost.
    pub(super) lost: Vec<String>,
}

/// Agents that report and wait, and report again.
pub(super) struct Honest {
    seen: Arc<Mutex<Seen>>,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl Honest {
    pub(super) async fn begin(dials: Vec<(String, Dial)>) -> Result<Self> {
        let honest = Self {
            seen: Arc::default(),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
        };
        for (host, dial) in dials {
            let agent = session(&host, &dial).await?;
            let (seen, stop) = (honest.seen.clone(), honest.stop.clone());
            honest.tasks.spawn(async move {
                tokio::select! {
                    () = stop.cancelled() => {}
                    () = work(host, agent, &seen) => {}
                }
            });
        }
        honest.tasks.close();
        Ok(honest)
    }

    /// What was seen since the last time.
    pub(super) fn take(&self) -> Seen {
        std::mem::take(&mut *self.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) async fn end(self) {
        self.stop.cancel();
        self.tasks.wait().await;
    }
}

/// A session of an agent that has lost no report.
pub(super) async fn session(host: &str, dial: &Dial) -> Result<Agent> {
    let mut hello = hello(host, 3)?;
    hello.last_report = 1 << 40;
    Ok(Agent::begin(dial.channel().await?, hello.into()).await?)
}

async fn work(host: String, mut agent: Agent, seen: &Mutex<Seen>) {
    let note = |change: &dyn Fn(&mut Seen)| {
        change(&mut seen.lock().unwrap_or_else(PoisonError::into_inner));
    };
    // Of a rollout that nobody knows: it is written, acknowledged, and means nothing.
    let rollout = RolloutId::from_random([0xaa; 6]);
    let state = vec![Fact::Note {
        name: "honest".into(),
        value: "x".repeat(200),
    }];
    loop {
        let begun = Instant::now();
        let number = agent.number;
        let body = ReportBody::Surveyed {
            rollout: rollout.clone(),
            state: state.clone(),
        };
        agent.report(body).await;
        match tokio::time::timeout(LONGEST, agent.acknowledged(number)).await {
            Ok(Ok(())) => {
                let waited = begun.elapsed().as_secs_f64() * 1000.0;
                note(&|seen| seen.waits.push(waited));
            }
            Ok(Err(error)) => {
                note(&|seen| seen.lost.push(format!("{host}: {error:#}")));
                return;
            }
            Err(_) => {
                note(&|seen| seen.timeouts += 1);
                return;
            }
        }
        tokio::time::sleep(PACE).await;
    }
}

/// The value that 99 of 100 do not exceed.
pub(super) fn p99(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = (sorted.len() * 99).div_ceil(100).saturating_sub(1);
    sorted.get(at).copied().unwrap_or(f64::INFINITY)
}

pub(super) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
        .get(sorted.len() / 2)
        .copied()
        .unwrap_or(f64::INFINITY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_hundred_one_may_be_worse() {
        let values: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert!((p99(&values) - 99.0).abs() < 1e-9);
        assert!((median(&values) - 51.0).abs() < 1e-9);
        assert!(p99(&[]).is_infinite());
    }
}
