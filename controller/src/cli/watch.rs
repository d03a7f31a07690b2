//! `lockstep watch`, and what `apply` does after it has submitted: follow a rollout to its end.
//! The controller may go away meanwhile; the rollout is in its journal, and goes on when it is
//! back, and so does this.

use std::time::Duration;

use lockstep_proto::ids::RolloutId;
use lockstep_proto::wire::control_v1 as wire;
use serde_json::json;
use tokio::time::{Instant, MissedTickBehavior};

use super::client::{Client, ClientError};
use super::document::Document;
use super::error::CliError;
use super::event::Event;
use super::exit::{Exit, is_end};
use super::live::Live;
use super::printer::Printer;
use super::render::progress::Progress;
use super::render::{Line, Tone, status, words};

/// A stream on which not even heartbeats come is dead, whatever the connection says.
const DEAF: Duration = Duration::from_secs(30);

/// After the end, a controller may have more to say about it, but need not close the stream.
const AFTER_THE_END: Duration = Duration::from_secs(2);

/// How long to wait for one answer: that a plan is taken, the last word about a rollout.
const PATIENCE: Duration = Duration::from_mins(1);

/// Waits between attempts to reach a controller that went away: at most so long, with full jitter.
const FIRST_WAIT: Duration = Duration::from_millis(250);
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// Follows a rollout to its end, and says how it ended.
pub(crate) async fn watch(
    client: &Client,
    rollout: &RolloutId,
    printer: Printer,
) -> Result<Exit, CliError> {
    if let Followed::Interrupted = follow(client, rollout, printer, Voice::Aloud).await? {
        printer.say(format!("detached; {rollout} goes on without you"));
        printer.say(format!("  come back with: lockstep watch {rollout}"));
        return Ok(Exit::Detached);
    }
    let (document, _) = fetch_patiently(client, rollout).await?;
    let exit = Exit::of_state(&document.state);
    if printer.is_json() {
        printer.json_line(&json!({
            "format": "lockstep.result/1",
            "rollout": document.rollout,
            "state": document.state,
            "reason": document.reason,
            "exit_code": exit as u8,
        }))?;
    } else {
        printer.lines(&status::ending(&document))?;
    }
    Ok(exit)
}

/// The document of a rollout that has ended, even if the controller went away just then.
pub(crate) async fn fetch_patiently(
    client: &Client,
    rollout: &RolloutId,
) -> Result<(Document, bytes::Bytes), CliError> {
    let mut outage = Outage::begin();
    loop {
        match super::fetch(client, rollout).await {
            Err(CliError::Client(error)) if error.is_passing() && !outage.is_too_long() => {
                tokio::time::sleep(outage.next_wait()).await;
            }
            other => return other,
        }
    }
}

/// How following came to its end.
pub(crate) enum Followed {
    /// The rollout has ended.
    Ended,
    /// The operator has had enough.
    Interrupted,
}

/// Whether events are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Voice {
    /// Each.
    Aloud,
    /// Only what is waited for.
    Quiet,
}

/// Follows a rollout until it ends or Ctrl-C is pressed.
pub(crate) async fn follow(
    client: &Client,
    rollout: &RolloutId,
    printer: Printer,
    voice: Voice,
) -> Result<Followed, CliError> {
    let mut follower = Follower::new(client, rollout, printer, voice);
    let interrupted = tokio::select! {
        biased;
        _ = tokio::signal::ctrl_c() => true,
        followed = follower.run() => {
            followed?;
            false
        }
    };
    follower.live.clear();
    Ok(if interrupted {
        Followed::Interrupted
    } else {
        Followed::Ended
    })
}

struct Follower<'a> {
    client: &'a Client,
    rollout: &'a RolloutId,
    printer: Printer,
    voice: Voice,
    live: Live,
    progress: Progress,
    /// The newest event that was shown: after an outage, only later ones are asked for.
    seen: u64,
    /// The controller's clock, and when it showed that.
    clock: (u64, Instant),
}

impl<'a> Follower<'a> {
    fn new(client: &'a Client, rollout: &'a RolloutId, printer: Printer, voice: Voice) -> Self {
        Self {
            client,
            rollout,
            printer,
            voice,
            live: Live::new(printer),
            progress: Progress::new(rollout.as_str(), printer.is_live()),
            seen: 0,
            clock: (0, Instant::now()),
        }
    }

    async fn run(&mut self) -> Result<(), CliError> {
        let mut outage: Option<Outage> = None;
        loop {
            let error = match self.listen(&mut outage).await? {
                Heard::End => return Ok(()),
                Heard::Nothing(error) => error,
            };
            let outage = outage.get_or_insert_with(Outage::begin);
            if !std::mem::replace(&mut outage.said, true) {
                let lost = format!("lost the controller: {}", cause(&error));
                self.say(&Line::new(Tone::Waiting, lost));
                self.say(&Line::plain(
                    "  the rollout does not depend on this command; trying again",
                ));
            }
            self.draw(&format!(
                "… {} without the controller {}; trying again",
                words::since(millis(outage.since.elapsed())),
                self.client.address()
            ));
            tokio::time::sleep(outage.next_wait()).await;
        }
    }

    /// Listens to one stream until it ends or breaks.
    async fn listen(&mut self, outage: &mut Option<Outage>) -> Result<Heard, CliError> {
        let request = wire::WatchRequest {
            rollout: self.rollout.to_string(),
            after: self.seen,
        };
        let opened = self
            .client
            .call(|mut api| async move { api.watch(request).await })
            .await;
        let mut stream = match opened {
            Ok(stream) => stream,
            Err(error) => return broken(error),
        };
        let mut second = tokio::time::interval(Duration::from_secs(1));
        second.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut heard = Instant::now();
        let mut kept = Instant::now();
        loop {
            let ended = is_end(self.progress.state());
            let message = tokio::select! {
                message = stream.message() => message,
                _ = second.tick() => {
                    if ended && kept.elapsed() > AFTER_THE_END {
                        return Ok(Heard::End);
                    }
                    if heard.elapsed() > DEAF {
                        let silent = format!("no word for {} s", DEAF.as_secs());
                        return broken(self.client.explain(tonic::Status::unavailable(silent)));
                    }
                    self.tick();
                    continue;
                }
            };
            match message {
                Ok(Some(event)) => {
                    heard = Instant::now();
                    if let Some(outage) = outage.take().filter(|outage| outage.said) {
                        let away = words::since(millis(outage.since.elapsed()));
                        self.say(&Line::plain(format!("the controller is back after {away}")));
                    }
                    let event = Event::from(event);
                    // One that was shown already does not come twice, whatever the server does.
                    if event.number > 0 && event.number <= self.seen {
                        continue;
                    }
                    if event.number > 0 {
                        kept = Instant::now();
                    }
                    self.take(&event)?;
                }
                Ok(None) | Err(_) if ended => return Ok(Heard::End),
                Ok(None) => {
                    let closed = tonic::Status::unavailable("it closed the stream");
                    return broken(self.client.explain(closed));
                }
                Err(status) => return broken(self.client.explain(status)),
            }
        }
    }

    fn take(&mut self, event: &Event) -> Result<(), CliError> {
        if event.at_ms > 0 {
            self.clock = (event.at_ms, Instant::now());
        }
        self.seen = self.seen.max(event.number);
        let lines = self.progress.take(event);
        match self.voice {
            Voice::Aloud if self.printer.is_json() => {
                self.printer
                    .json_line(&event.to_json(self.rollout.as_str()))?;
            }
            Voice::Aloud => self.live.say(&lines),
            Voice::Quiet => {}
        }
        self.tick();
        Ok(())
    }

    /// Shows that time passes.
    fn tick(&mut self) {
        let now = self.clock.0 + millis(self.clock.1.elapsed());
        if self.printer.is_json() || is_end(self.progress.state()) || self.clock.0 == 0 {
            return;
        }
        if self.printer.is_live() {
            let waiting = self.progress.waiting(now);
            self.draw(&waiting);
        } else if let Some(line) = self.progress.remind(now) {
            self.live.say(&[line]);
        }
    }

    fn draw(&mut self, waiting: &str) {
        let bars = self.progress.bars(Live::room());
        self.live.draw(&bars, waiting);
    }

    fn say(&self, line: &Line) {
        self.live.say(std::slice::from_ref(line));
    }
}

/// A fault that may pass is waited out; others are not.
fn broken(error: ClientError) -> Result<Heard, CliError> {
    if error.is_passing() {
        Ok(Heard::Nothing(error))
    } else {
        Err(error.into())
    }
}

/// What came of listening.
enum Heard {
    /// The rollout has ended.
    End,
    /// The stream broke, or could not be opened.
    Nothing(ClientError),
}

/// A time without the controller.
pub(crate) struct Outage {
    since: Instant,
    longest: Duration,
    said: bool,
}

impl Outage {
    pub(crate) fn begin() -> Self {
        Self {
            since: Instant::now(),
            longest: FIRST_WAIT,
            said: false,
        }
    }

    /// Whether it has lasted longer than anybody waits for one answer.
    pub(crate) fn is_too_long(&self) -> bool {
        self.since.elapsed() > PATIENCE
    }

    /// Full jitter: many watchers of one controller do not come back at the same moment.
    pub(crate) fn next_wait(&mut self) -> Duration {
        let wait = self.longest.mul_f64(rand::random::<f64>().max(0.1));
        self.longest = (self.longest * 2).min(LONGEST_WAIT);
        wait
    }
}

fn cause(error: &ClientError) -> String {
    use std::error::Error as _;
    error.source().map_or_else(
        || error.to_string(),
        |source| super::clean::line(&source.to_string()),
    )
}

fn millis(period: Duration) -> u64 {
    u64::try_from(period.as_millis()).unwrap_or(u64::MAX)
}
