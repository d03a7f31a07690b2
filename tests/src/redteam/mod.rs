//! What a thief of the controller, a hostile host, and strangers on the network can do.
//!
//! ```text
//! thief   all of a controller's keys --orders--> a real agent: nothing happens that people did not
//!         seal and the host does not allow, and every refusal is on record
//! liar    one host's certificate    --reports--> a real controller: nothing is believed but what is
//!         its own to say, and what it says is shown harmlessly
//! flood   malformed frames, slow connections --> both: nobody crashes, nobody else waits
//! ```
//!
//! An effect is what has changed on the host, seen from outside. Some orders are licensed and must
//! have theirs exactly once: an agent that refuses everything does not pass.

use anyhow::Result;
use serde_json::Value;

mod arguments;
mod flood;
mod frames;
mod honest;
mod liar;
mod load;
mod place;
mod pointers;
mod seals;
mod tally;
mod thief;
mod watch;
mod words;

pub use flood::{Much, SAMPLE, WHOLE, hostile_load};
pub use liar::hostile_host;
use place::{HOST, Place};
use thief::Thief;

/// What the thief of a controller gets a real agent to do. The figures, and whether they are good.
pub fn stolen_controller() -> Result<(Value, Result<()>)> {
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let place = Place::start()?;
        let mut thief = Thief::begin(place).await?;
        let played = play(&mut thief).await;
        let judged = played
            .and_then(|()| thief.audit())
            .and_then(|()| thief.tally.judge());
        let last_words = |error: anyhow::Error| error.context(thief.place.cluster.last_words());
        Ok((thief.tally.report(), judged.map_err(last_words)))
    })
}

async fn play(thief: &mut Thief) -> Result<()> {
    seals::play(thief).await?;
    pointers::play(thief).await?;
    words::play(thief).await?;
    arguments::play(thief).await?;
    left_behind(thief).await
}

/// What comes later than its answer is an effect all the same; and so is what still runs.
async fn left_behind(thief: &mut Thief) -> Result<()> {
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    thief.unlicensed("all", "some time later");
    let host = thief.place.cluster.host(HOST);
    for process in host.step_processes() {
        let line = process.line();
        thief.tally.effects.push(format!("still runs: {line}"));
    }
    // What hosts are told stands in their log as one line each.
    let log = std::fs::read_to_string(host.agent_log())?;
    let raw = |c: char| c.is_control() && c != '\n';
    for line in log.lines().filter(|line| line.contains(raw)) {
        let line = line.escape_debug();
        thief.tally.wrong.push(format!("raw in the log: {line}"));
    }
    Ok(())
}
