//! The turn itself: the server is stopped, its files change places with the copy, and it is started.

use std::time::Duration;

use lockstep_proto::order::Fact;
use lockstep_proto::report::{Cause, Failure};
use tokio::time::{Instant, sleep};

use super::record::End;
use super::server::Server;
use super::target::{TRIES, Target};
use super::{Recovered, check_able, place};
use crate::actions::postgres::restore::Baseline;
use crate::actions::postgres::{fence, points, written};
use crate::faults::reached;
use crate::sql::Session;
use crate::step::{changed, failure, hinted};

/// How long the server may take to stop: what it has to write out, a checkpoint has written just
/// before.
const STOPPED: Duration = Duration::from_mins(3);

/// How long the server may take to be started.
const STARTED: Duration = Duration::from_mins(1);

/// How much of the step's time must be left when the server is stopped: to stop it, exchange the
/// files, and have it start.
const ROOM: Duration = Duration::from_mins(4);

/// How long the log may take to be archived.
const ARCHIVED: Duration = Duration::from_mins(1);

/// How often the server is asked.
const LOOK: Duration = Duration::from_millis(200);

/// How many looks in a row must find the server gone before it counts as given up.
const GONE: u32 = 10;

/// The state of a server that was shut down in order.
const SHUT_DOWN: &str = "shut down";

/// Why a server that is to be up does not answer.
pub(super) enum Silent {
    /// It was started, and does not stay up: neither it nor its service runs.
    GivenUp(Failure),
    /// It may be on its way: this proves nothing.
    NotYet(Failure),
}

impl Silent {
    fn into_failure(self) -> Failure {
        match self {
            Self::GivenUp(why) | Self::NotYet(why) => why,
        }
    }
}

/// An order to start the server.
struct Order {
    /// Whether it came while the old server was still there.
    beside_old: bool,
    failed: Option<Failure>,
}

impl Target<'_> {
    /// Puts the restored copy into the server's place, with nothing lost. Returns whether it is
    /// there now; it is not if somebody wrote in the server's last moment.
    pub(super) async fn take_back(
        &self,
        session: Session,
        server: &Server,
        since: Option<&Baseline>,
        stopped: &mut u32,
    ) -> Result<bool, Failure> {
        let cx = self.cx;
        let next = match self.make_ready(session, server, since).await {
            Ok(next) => next,
            Err(failure) => {
                // Nobody needs the copy any more, and it is as large as the server.
                let _ = self.place.discard().await;
                return Err(failure);
            }
        };
        cx.log.progress(0.6, "stopping the server");
        let exchanged = self.stop_and_exchange(next).await;
        match exchanged {
            Ok(true) => Ok(true),
            Ok(false) => {
                self.bring_up().await?;
                let _ = self.place.discard().await;
                *stopped += 1;
                if *stopped < TRIES {
                    return Ok(false);
                }
                Err(hinted(
                    Cause::Refused,
                    format!(
                        "somebody wrote to the server of `{}` in its last moment, {TRIES} times; it \
                         runs as it did before",
                        self.database.name
                    ),
                    "find out by whom (its autovacuum counts, too), and try again",
                ))
            }
            // It was exchanged, and something failed afterwards.
            Err(failure) if self.place.is_copy() => {
                cx.log.line(&failure.message);
                Ok(true)
            }
            Err(failure) => {
                self.bring_up().await?;
                let _ = self.place.discard().await;
                let message = format!("{}; the server runs as it did before", failure.message);
                Err(Failure { message, ..failure })
            }
        }
    }

    /// Restores the copy, looks once more, and has the log archived. Returns the server's next
    /// transaction.
    async fn make_ready(
        &self,
        session: Session,
        server: &Server,
        since: Option<&Baseline>,
    ) -> Result<u64, Failure> {
        let cx = self.cx;
        check_able(cx, &session, &self.database).await?;
        self.check_same(server)?;
        let base = self.base().await?;
        // What a killed attempt has left takes the room of the copy.
        self.place.discard().await?;
        self.check_room(&session).await?;
        self.nothing_lost(&session, since).await?;
        self.place.restore(&self.tool, &base, &self.record).await?;
        // What is written out now the server need not write while it stops.
        session.run("writing a checkpoint", "CHECKPOINT").await?;
        let next = self.last_look(&session, since, &base).await?;
        // Somebody may have changed them while the copy was restored.
        self.place.renew_settings(&self.tool, &self.record).await?;
        if cx.stop.is_cancelled() {
            let message = "the server was not stopped yet";
            return Err(failure(Cause::Cancelled, message));
        }
        if cx.deadline.saturating_duration_since(Instant::now()) < ROOM {
            let message = "too little of the step's time is left to stop and start the server";
            return Err(hinted(
                Cause::TimedOut,
                message,
                "raise the step's `timeout`",
            ));
        }
        Ok(next)
    }

    /// Counts for the last time, and has the log archived up to here, under a name by which the
    /// server could be taken forward again. Returns the server's next transaction.
    async fn last_look(
        &self,
        session: &Session,
        since: Option<&Baseline>,
        base: &str,
    ) -> Result<u64, Failure> {
        let cx = self.cx;
        for _ in 0..TRIES {
            let (next, accepted) = self.nothing_lost(session, since).await?;
            let name = End::name(cx, next);
            let archived = points::archived_point(cx, session, &name, ARCHIVED).await;
            let archived = archived.map_err(|failure| Failure {
                changed: false,
                ..failure
            })?;
            // The name stands behind all that was counted, and before nothing else.
            if written::next(session).await? == next {
                End::keep(cx, name, &archived.lsn, base, accepted)?;
                return Ok(next);
            }
            cx.log
                .line("somebody wrote while the log was archived; counting again");
        }
        Err(self.never_quiet())
    }

    /// Whether the copy has taken the place: only if nobody has written since the count.
    pub(super) async fn stop_and_exchange(&self, next: u64) -> Result<bool, Failure> {
        reached("recovery: to be stopped");
        self.stop().await?;
        reached("recovery: stopped");
        let control = self.place.control().await?;
        if control.state != SHUT_DOWN || control.timeline != self.record.timeline {
            let message = format!(
                "the server was not shut down in order: it is {}",
                control.state
            );
            return Err(failure(Cause::Step, message));
        }
        if control.next != next {
            self.cx.log.line(&format!(
                "somebody wrote in the server's last moment: its next transaction is {}, and was \
                 {next}",
                control.next
            ));
            return Ok(false);
        }
        self.place.exchange()?;
        Ok(true)
    }

    /// Stops the server. Returns once neither it nor its service runs, so that nothing starts it.
    async fn stop(&self) -> Result<(), Failure> {
        let switch = self.switch().await?;
        let until = Instant::now() + STOPPED;
        let is_down = async || {
            if self.place.is_running() {
                return Ok(false);
            }
            switch.is_down().await
        };
        let stopped = switch.stop(until).await;
        if is_down().await? {
            // A service that is down may refuse to be stopped.
            return Ok(());
        }
        stopped?;
        while !is_down().await? {
            if Instant::now() > until {
                return Err(failure(Cause::Step, "the server does not stop"));
            }
            sleep(LOOK).await;
        }
        Ok(())
    }

    /// Starts the server and waits until it answers. A copy that cannot recover gives the place back
    /// to the files of before; never one that is only not heard of yet.
    pub(super) async fn bring_up(&self) -> Result<(), Failure> {
        let why = match self.start().await {
            Ok(()) => return Ok(()),
            Err(Silent::NotYet(why)) => return Err(self.down(why)),
            Err(Silent::GivenUp(why)) => why,
        };
        let is_stuck = || self.place.is_copy() && self.place.has_to_recover();
        if !is_stuck() {
            return Err(self.down(why));
        }
        self.cx
            .log
            .line("the copy does not recover; putting the files of before back");
        let down = |failure| self.down(failure);
        // Its supervisor may have been about to try once more, or have got it through meanwhile.
        self.stop().await.map_err(down)?;
        let goes_back = is_stuck();
        if goes_back {
            self.place.exchange().map_err(down)?;
        }
        let started = self.start().await;
        started.map_err(|silent| self.down(silent.into_failure()))?;
        if !goes_back {
            return Ok(());
        }
        Err(Failure {
            message: format!(
                "the copy of the server of `{}` did not recover to {}, and the server runs as it \
                 did before: {}",
                self.database.name, self.record.name, why.message
            ),
            changed: false,
            ..why
        })
    }

    /// Says that the server is not there.
    fn down(&self, failure: Failure) -> Failure {
        changed(Failure {
            message: format!(
                "the server of `{}` does NOT ANSWER: {}",
                self.database.name, failure.message
            ),
            hint: Some(format!(
                "its log says why; its files are in {}, those of before or of the copy beside \
                 them; start it, or let `lockstep rollback` try again",
                self.place.data().display()
            )),
            ..failure
        })
    }

    /// Starts the server, and waits until it lets somebody in.
    pub(super) async fn start(&self) -> Result<(), Silent> {
        let switch = self.switch().await.map_err(Silent::NotYet)?;
        self.cx.log.progress(0.7, "starting the server");
        reached("recovery: to be started");
        let mut until = Instant::now() + STARTED;
        // One that runs may be on its way down, as an earlier attempt has ordered.
        let runs = switch.runs().await.is_ok_and(|(runs, _)| runs);
        let mut ordered: Option<Order> = None;
        let mut gone = 0;
        loop {
            let Err(refused) = self.database.connect(self.cx).await else {
                return Ok(());
            };
            let alive = self.place.is_running();
            let is_due = match &ordered {
                None => !alive || !runs,
                // The old server was in its way.
                Some(order) => order.beside_old && !alive,
            };
            if is_due {
                until = (Instant::now() + STARTED).min(self.cx.deadline);
                let failed = switch.start(until).await.err();
                reached("recovery: started");
                gone = 0;
                ordered = Some(Order {
                    beside_old: alive,
                    failed,
                });
                continue;
            }
            gone = if alive { 0 } else { gone + 1 };
            // It may be on its way up: the service says when it has given up.
            if gone > GONE && switch.runs().await.is_ok_and(|(runs, _)| !runs) {
                let why = ordered.and_then(|order| order.failed).unwrap_or(refused);
                return Err(Silent::GivenUp(Failure {
                    last_lines: switch.last_lines().await,
                    ..failure(Cause::Step, format!("it does not stay up: {}", why.message))
                }));
            }
            // Whoever leaves before a server that stops is gone leaves it to nobody to start it.
            let stops = alive && self.place.is_stopping();
            if !stops || Instant::now() >= self.cx.deadline {
                self.may_wait().map_err(Silent::NotYet)?;
            }
            // One that runs, has nothing to recover and lets nobody in will not do so later.
            if alive && !stops && !self.place.has_to_recover() && Instant::now() > until {
                return Err(Silent::NotYet(refused));
            }
            sleep(LOOK).await;
        }
    }

    /// Waits until a server that recovers has come to its end.
    pub(super) async fn wait(&self, session: &Session) -> Result<(), Failure> {
        let sql = "SELECT pg_is_in_recovery(), pg_last_wal_replay_lsn()::text";
        loop {
            let Ok(row) = session
                .one("asking how far the recovery is", sql, &[])
                .await
            else {
                // Who has died is seen by the next look.
                return Ok(());
            };
            if !row.get::<_, bool>(0) {
                return Ok(());
            }
            let at: Option<&str> = row.get(1);
            let at = at.unwrap_or("its beginning");
            self.cx.log.progress(0.8, &format!("recovering, at {at}"));
            self.may_wait()?;
            sleep(LOOK).await;
        }
    }

    /// Fails when there is no time to wait any longer for a server that was started.
    pub(super) fn may_wait(&self) -> Result<(), Failure> {
        let name = &self.database.name;
        let cause = if self.cx.stop.is_cancelled() {
            Cause::Cancelled
        } else if Instant::now() >= self.cx.deadline {
            Cause::TimedOut
        } else {
            return Ok(());
        };
        Err(changed(hinted(
            cause,
            format!("the server of `{name}` is started, and is not ready yet"),
            "it goes on by itself; `lockstep rollback` looks again, and finishes what is left",
        )))
    }

    /// Looks whether the recovered server is what it was at the point, and tidies up.
    pub(super) async fn settle(&self, session: Session) -> Result<Recovered, Failure> {
        let record = &self.record;
        for setting in place::TARGET {
            let sql = format!("ALTER SYSTEM RESET {setting}");
            session
                .run("taking the recovery's end out of the settings", &sql)
                .await
                .map_err(changed)?;
        }
        let fence = fence::raised(&session).await.map_err(changed)?;
        let fence = fence.map(|raised| raised.token);
        let broken = match &record.fence {
            Some(token) => fence::broken(&session, token).await.map_err(changed)?,
            None => None,
        };
        if fence != record.fence || broken.is_some() {
            let why = broken.unwrap_or_else(|| "its fence is another one".to_owned());
            return Err(changed(failure(
                Cause::Step,
                format!(
                    "the server of `{}` is back at {}, but not as it was: {why}",
                    self.database.name, record.name
                ),
            )));
        }
        let kept = self.place.tidy().await.map_err(changed)?;
        let kept: Vec<String> = kept.iter().map(|path| path.display().to_string()).collect();
        let name = &self.database.name;
        let mut value = format!("all of its databases are back at {}", record.name);
        let mut accepted = None;
        if let Some(end) = End::last(self.cx) {
            let command = self
                .tool
                .restore_command(&end.name, &end.base, record.timeline);
            value = format!(
                "{value}; to take it forward again, to where it was stopped: stop it, run \
                 `{command}` as its user, start it"
            );
            accepted = end.accepted;
        }
        let mut facts = vec![Fact::Note {
            name: format!("server of {name}"),
            value,
        }];
        if !kept.is_empty() {
            facts.push(Fact::Note {
                name: format!("files of the server of {name} before"),
                value: format!("{}; remove them when nobody needs them", kept.join(", ")),
            });
        }
        facts.extend(accepted);
        Ok(Recovered {
            session,
            facts,
            point: record.name.clone(),
        })
    }
}
