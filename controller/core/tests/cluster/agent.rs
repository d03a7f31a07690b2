//! A simulated agent: it holds for one rollout, does what it is told once, one step at a time, and
//! remembers what it reported. What it really did goes to a ledger that nobody else writes.

use super::*;

/// What agents really did, in the order in which it was over.
pub(super) struct Deed {
    pub(super) key: StepKey,
    /// Something was, or may have been, changed.
    pub(super) effect: bool,
    pub(super) ok: bool,
}

#[derive(Default)]
pub(super) struct Agent {
    pub(super) up: bool,
    /// Its machine stands still until then: it neither reads nor reports.
    pub(super) stalled: u64,
    pub(super) mailbox: VecDeque<Message>,
    pub(super) holds: bool,
    release_later: bool,
    pub(super) reports: Vec<ReportBody>,
    seen: BTreeSet<StepKey>,
    /// The step that runs, and until when.
    pub(super) running: Option<(u64, StepKey)>,
}

impl Agent {
    pub(super) fn new() -> Self {
        Self {
            up: true,
            ..Self::default()
        }
    }

    fn refuse(&mut self, key: StepKey, why: &str) {
        self.finish(key, failure(Cause::Refused, why.into(), false));
    }

    fn finish(&mut self, key: StepKey, outcome: StepOutcome) {
        self.reports.push(ReportBody::Finished {
            key,
            outcome,
            facts: vec![],
            signatures: vec![],
            took: Period::seconds(1),
        });
    }

    /// Gets a message; `acknowledged` is the newest of its reports that is durable.
    pub(super) fn receive(
        &mut self,
        now: u64,
        message: Message,
        acknowledged: u64,
        dice: &mut Dice,
    ) {
        match message {
            Message::Offer { rollout, plan, .. } => {
                let known = |body: &ReportBody| matches!(body, ReportBody::Consented { .. });
                if !self.reports.iter().any(known) {
                    self.holds = true;
                    self.reports.push(ReportBody::Consented {
                        rollout,
                        plan,
                        state: vec![],
                        round: 0,
                    });
                }
            }
            Message::Order(order) => self.order(now, order, acknowledged, dice),
            Message::Survey { rollout, .. } => {
                let let_go = Fact::Note {
                    name: "not surveyed".into(),
                    value: HOLDS_NOT.into(),
                };
                let state = if self.holds { vec![] } else { vec![let_go] };
                self.reports.push(ReportBody::Surveyed { rollout, state });
            }
            Message::Cancel { .. } => {
                if let Some((end, _)) = &mut self.running {
                    *end = now;
                }
            }
            Message::Release { .. } => {
                self.release_later = true;
                self.let_go();
            }
            Message::Acknowledged(_) => {}
        }
    }

    fn order(&mut self, now: u64, order: Order, acknowledged: u64, dice: &mut Dice) {
        let key = order.key;
        if !self.seen.insert(key.clone()) {
            let index = self.reports.iter().position(
                |body| matches!(body, ReportBody::Finished { key: known, .. } if *known == key),
            );
            // What is durable at the controller is said once more; the rest is on its way.
            if let Some(index) = index.filter(|index| (*index as u64) < acknowledged) {
                self.reports.push(self.reports[index].clone());
            }
            return;
        }
        if !self.holds {
            return self.refuse(key, "this host holds for no rollout");
        }
        if now > order.not_after.0 {
            return self.refuse(key, "the order came too late");
        }
        if self.running.is_some() {
            return self.refuse(key, "another step is still running");
        }
        self.reports.push(ReportBody::Started { key: key.clone() });
        self.running = Some((now + (1 + dice.roll(20)) * 1000, key));
    }

    /// A step that is over is in the ledger, whether or not anybody hears of it.
    pub(super) fn work(
        &mut self,
        now: u64,
        faults: Faults,
        dice: &mut Dice,
        ledger: &mut Vec<Deed>,
    ) {
        let Some((_, key)) = self.running.take_if(|(end, _)| *end <= now) else {
            return;
        };
        let undo = key.direction == Direction::Undo;
        let roll = dice.roll(100);
        let outcome = if roll < faults.fail / if undo { 4 } else { 1 } {
            let cause = if dice.percent(50) {
                Cause::Step
            } else {
                Cause::Interrupted
            };
            let message = "no".repeat(1 + usize::try_from(dice.roll(5000)).unwrap());
            failure(cause, message, dice.percent(50))
        } else if roll < faults.fail + faults.unknown {
            StepOutcome::Unknown {
                why: "no proof".into(),
            }
        } else {
            StepOutcome::Ok {
                changed: dice.percent(80),
                summary: "done".into(),
            }
        };
        let effect = match &outcome {
            StepOutcome::Ok { changed, .. } => *changed,
            StepOutcome::Failed(failure) => failure.changed,
            StepOutcome::Unknown { .. } => true,
        };
        let ok = matches!(outcome, StepOutcome::Ok { .. });
        ledger.push(Deed {
            key: key.clone(),
            effect,
            ok,
        });
        self.finish(key, outcome);
        self.let_go();
    }

    fn let_go(&mut self) {
        if self.release_later && self.running.is_none() {
            self.holds = false;
        }
    }
}

fn failure(cause: Cause, message: String, changed: bool) -> StepOutcome {
    StepOutcome::Failed(Failure {
        cause,
        message,
        hint: None,
        last_lines: vec![],
        changed,
    })
}
