//! Bindings: the facts that earlier steps reported and that an order carries along.

use std::collections::BTreeMap;

use lockstep_proto::action::Action;
use lockstep_proto::ids::{Direction, HostId, StepKey, StepRef};
use lockstep_proto::order::{Binding, Fact, Order, controller_host};

use super::{Attempt, Rollout};
use crate::coordinator::Config;

impl Rollout {
    /// The facts of all attempts, in plan order, with the step that reported each.
    pub(crate) fn facts(&self) -> impl Iterator<Item = (StepKey, &Fact)> {
        self.attempts
            .iter()
            .flat_map(move |((at, direction), hosts)| {
                hosts.iter().flat_map(move |(host, attempts)| {
                    attempts.iter().flat_map(move |attempt| {
                        let key = self.key(*at, *direction, host, attempt.number);
                        let facts = attempt.result.iter().flat_map(|result| &result.facts);
                        facts.map(move |fact| (key.clone(), fact))
                    })
                })
            })
    }

    fn key(&self, at: StepRef, direction: Direction, host: &HostId, attempt: u16) -> StepKey {
        StepKey {
            rollout: self.id.clone(),
            host: host.clone(),
            at,
            direction,
            attempt,
        }
    }

    /// The order of an attempt. It is made from what is recorded, so it is the same whenever it is
    /// said again.
    pub(crate) fn order(
        &self,
        config: &Config,
        at: StepRef,
        direction: Direction,
        host: &HostId,
        attempt: &Attempt,
    ) -> Order {
        Order {
            key: self.key(at, direction, host, attempt.number),
            plan: self.plan.digest(),
            epoch: config.epoch,
            not_after: attempt.not_after,
            bindings: self
                .resolutions(at, direction, host)
                .chain(self.bindings(&self.placed(at).step.action, at))
                .collect(),
        }
    }

    /// What people have said of earlier attempts.
    fn resolutions(
        &self,
        at: StepRef,
        direction: Direction,
        host: &HostId,
    ) -> impl Iterator<Item = Binding> {
        let attempts = self
            .attempts
            .get(&(at, direction))
            .and_then(|hosts| hosts.get(host));
        attempts.into_iter().flatten().filter_map(move |attempt| {
            let (done, by) = attempt.resolved.clone()?;
            Some(Binding {
                origin: self.key(at, direction, host, attempt.number),
                fact: Fact::Resolved { done, by },
            })
        })
    }

    /// What an action gets to know at run time: the newest fact of each kind about its database,
    /// and who approved.
    fn bindings(&self, action: &Action, at: StepRef) -> Vec<Binding> {
        let Some(database) = database(action) else {
            return vec![];
        };
        let mut newest: BTreeMap<&'static str, Binding> = BTreeMap::new();
        for (origin, fact) in self.facts() {
            let (kind, about) = match fact {
                Fact::Backup { database, .. } => ("backup", database),
                Fact::BackupVerified { database, .. } => ("verified", database),
                Fact::Fenced { database, .. } => ("fenced", database),
                Fact::Revision { database, .. } => ("revision", database),
                Fact::SqlPlan { database, .. } => ("sql", database),
                // The counts of the backup's own snapshot, not those of later looks.
                Fact::Rows { database, .. } if is_backup(self, &origin) => ("rows", database),
                _ => continue,
            };
            if about == database {
                let fact = without_sql(fact.clone());
                newest.insert(kind, Binding { origin, fact });
            }
        }
        let approvals = self
            .gates
            .iter()
            .filter(|(gate, _)| **gate < at)
            .filter_map(|(gate, state)| {
                let (_, met, _) = state.closed.as_ref()?;
                let is_approval = matches!(self.placed(*gate).step.action, Action::GateApproval(_));
                (*met && is_approval).then(|| Binding {
                    origin: self.key(*gate, Direction::Do, &controller_host(), 1),
                    fact: Fact::Approved {
                        by: state
                            .decisions
                            .iter()
                            .map(|decision| decision.operator.clone())
                            .collect(),
                        evidence: state.evidence,
                    },
                })
            });
        newest.into_values().chain(approvals).collect()
    }
}

fn is_backup(rollout: &Rollout, origin: &StepKey) -> bool {
    matches!(
        rollout.placed(origin.at).step.action,
        Action::PostgresBackup(_)
    )
}

/// The digest is what binds; the text was for people.
fn without_sql(fact: Fact) -> Fact {
    match fact {
        Fact::SqlPlan {
            database,
            from,
            to,
            digest,
            ..
        } => Fact::SqlPlan {
            database,
            from,
            to,
            digest,
            sql: String::new(),
        },
        other => other,
    }
}

/// The database that an action works on.
fn database(action: &Action) -> Option<&String> {
    match action {
        Action::PostgresBackup(args) => Some(&args.database),
        Action::PostgresVerifyBackup(args) => Some(&args.database),
        Action::PostgresRestore(args) => Some(&args.database),
        Action::PostgresCounts(args) => Some(&args.database),
        Action::PostgresCompare(args) => Some(&args.database),
        Action::PostgresAssert(args) => Some(&args.database),
        Action::PostgresFence(args) => Some(&args.database),
        Action::PostgresUnfence(args) => Some(&args.database),
        Action::MigrationCurrent(args) => Some(&args.database),
        Action::MigrationPlan(args) => Some(&args.database),
        Action::MigrationApply(args) => Some(&args.database),
        Action::MigrationVerify(args) => Some(&args.database),
        Action::MigrationDowngrade(args) => Some(&args.database),
        _ => None,
    }
}
