//! A host, and its agent as far as rollouts see it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use lockstep_core::Message;
use lockstep_proto::ids::{Digest, Direction, HostId, PlanDigest, RolloutId, StepKey};
use lockstep_proto::order::Fact;
use lockstep_proto::report::{Failure, HOLDS_NOT, ReportBody, StepOutcome};
use lockstep_proto::seal::SealedPlan;
use lockstep_proto::values::Period;

use crate::plans::Dice;

/// A host: what it really is, and what its agent does.
#[derive(Default)]
pub(crate) struct Host {
    pub(crate) up: bool,
    /// Another number after each change; an undo brings the one before back.
    pub(crate) state: u64,
    pub(crate) changes: u64,
    pub(crate) before: BTreeMap<RolloutId, u64>,
    pub(crate) holds: Option<(RolloutId, u32)>,
    pub(crate) ended: BTreeSet<RolloutId>,
    pub(crate) changed: BTreeSet<RolloutId>,
    pub(crate) done: BTreeMap<StepKey, StepOutcome>,
    pub(crate) reports: Vec<ReportBody>,
    pub(crate) mailbox: VecDeque<Message>,
}

impl Host {
    pub(crate) fn facts(&self) -> Vec<Fact> {
        let text = self.state.to_string();
        vec![Fact::State {
            name: "web".into(),
            digest: Digest::of(text.as_bytes()),
            text,
        }]
    }

    pub(crate) fn receive(
        &mut self,
        host: &HostId,
        message: Message,
        dice: &mut Dice,
        plans: &BTreeMap<PlanDigest, Arc<SealedPlan>>,
    ) {
        match message {
            Message::Offer {
                rollout,
                plan,
                round,
                ..
            } => {
                if self.ended.contains(&rollout) {
                    return;
                }
                if let Some((held, old)) = &self.holds {
                    assert!(
                        *held == rollout,
                        "{host} is offered {rollout}, and holds for {held}"
                    );
                    if *old == round {
                        return;
                    }
                }
                self.holds = Some((rollout.clone(), round));
                self.reports.push(ReportBody::Consented {
                    rollout,
                    plan,
                    state: self.facts(),
                    round,
                });
            }
            Message::Release {
                rollout,
                comes_back,
                ..
            } => {
                self.holds.take_if(|(held, _)| *held == rollout);
                if comes_back {
                    assert!(!self.changed.contains(&rollout), "{host} was changed");
                } else {
                    self.ended.insert(rollout);
                }
            }
            Message::Survey { rollout, .. } => {
                let held = self
                    .holds
                    .as_ref()
                    .is_some_and(|(held, _)| *held == rollout);
                let let_go = Fact::Note {
                    name: "not surveyed".into(),
                    value: HOLDS_NOT.into(),
                };
                let state = if held { self.facts() } else { vec![let_go] };
                self.reports.push(ReportBody::Surveyed { rollout, state });
            }
            Message::Order(order) => {
                let key = order.key;
                if self.done.contains_key(&key) {
                    return;
                }
                let held = self.holds.as_ref().map(|(held, _)| held);
                assert_eq!(held, Some(&key.rollout), "{host}: {key} without a hold");
                let changes = plans[&order.plan].plan().step(key.at).unwrap();
                let changes = changes.step.action.changes();
                // What it looks at shows SQL, which goes by its state.
                let sql = Fact::SqlPlan {
                    database: "d".into(),
                    from: "1".into(),
                    to: "2".into(),
                    digest: Digest::of(&self.state.to_be_bytes()),
                    sql: String::new(),
                    tool: None,
                    files: None,
                    opaque: vec![],
                    hazards: vec![],
                };
                let facts = if changes { vec![] } else { vec![sql] };
                let outcome = if dice.percent(3) {
                    StepOutcome::Failed(Failure {
                        cause: lockstep_proto::report::Cause::Step,
                        message: "no".into(),
                        hint: None,
                        last_lines: vec![],
                        changed: false,
                    })
                } else {
                    if key.direction == Direction::Undo {
                        let before = self.before.remove(&key.rollout);
                        self.state = before.unwrap_or(self.state);
                    } else if changes {
                        self.changed.insert(key.rollout.clone());
                        self.before.insert(key.rollout.clone(), self.state);
                        self.changes += 1;
                        self.state = self.changes;
                    }
                    StepOutcome::Ok {
                        changed: changes,
                        summary: String::new(),
                    }
                };
                self.done.insert(key.clone(), outcome.clone());
                self.reports.push(ReportBody::Finished {
                    key,
                    outcome,
                    facts,
                    signatures: vec![],
                    took: Period(1),
                });
            }
            Message::Cancel { .. } | Message::Acknowledged(_) => {}
        }
    }
}
