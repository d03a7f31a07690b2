//! Bindings: the facts that earlier steps reported and that an order carries along.

use std::collections::BTreeMap;

use lockstep_proto::action::Action;
use lockstep_proto::approval::{Signature, Signed};
use lockstep_proto::ids::{Direction, HostId, StepKey, StepRef};
use lockstep_proto::order::{Binding, Fact, Order, controller_host};

use super::state::Resolved;
use super::{Attempt, Gate, Member, Rollout};
use crate::ascending::Ascending;
use crate::coordinator::Config;

impl Rollout {
    /// The facts of all attempts, in plan order, with the step that reported each.
    pub(crate) fn facts(&self) -> impl Iterator<Item = (StepKey, &Fact)> {
        self.signed_facts().map(|(origin, fact, _)| (origin, fact))
    }

    /// The same with their hosts' signatures.
    fn signed_facts(&self) -> impl Iterator<Item = (StepKey, &Fact, Option<&String>)> {
        self.attempts
            .iter()
            .flat_map(move |((at, direction), hosts)| {
                hosts.iter().flat_map(move |(host, attempts)| {
                    let counts = attempts.iter().filter(|attempt| !attempt.stale);
                    counts.flat_map(move |attempt| {
                        let key = self.key(*at, *direction, host, attempt.number);
                        let facts = attempt.result.iter().flat_map(|result| {
                            let facts = result.facts.iter().enumerate();
                            facts.map(|(index, fact)| (fact, result.signatures.get(index)))
                        });
                        facts.map(move |(fact, signature)| (key.clone(), fact, signature))
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

    /// The order of each of these hosts' last attempt at a step.
    pub(crate) fn orders<'a>(
        &'a self,
        config: &'a Config,
        at: StepRef,
        direction: Direction,
        hosts: &'a [HostId],
    ) -> impl Iterator<Item = (&'a HostId, Order)> {
        let mut attempts = Ascending::new(self.attempts.get(&(at, direction)));
        let mut members = Ascending::new(Some(&self.members));
        hosts.iter().filter_map(move |host| {
            let attempt = attempts.get(host)?.last()?;
            let member = members.get(host);
            let order = self.order_of(config, at, direction, (host, member), attempt);
            Some((host, order))
        })
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
        let member = self.members.get(host);
        self.order_of(config, at, direction, (host, member), attempt)
    }

    fn order_of(
        &self,
        config: &Config,
        at: StepRef,
        direction: Direction,
        (host, member): (&HostId, Option<&Member>),
        attempt: &Attempt,
    ) -> Order {
        Order {
            key: self.key(at, direction, host, attempt.number),
            plan: self.plan.digest(),
            epoch: config.epoch,
            not_after: attempt.not_after,
            bindings: self
                .resolutions(at, direction, (host, member))
                .chain(self.accepted_losses(at, direction, host))
                .chain(self.bindings(&self.placed(at).step.action, host))
                .chain(self.approvals(&self.placed(at).step.action, at))
                .collect(),
        }
    }

    /// What people have said of earlier attempts at the step, and, going forward, of steps before
    /// it that count as done by that: the host has no other proof that none was left out.
    fn resolutions(
        &self,
        at: StepRef,
        direction: Direction,
        (host, member): (&HostId, Option<&Member>),
    ) -> impl Iterator<Item = Binding> {
        let earlier = move |&(other, way): &(StepRef, Direction)| {
            (way, direction) == (Direction::Do, Direction::Do) && other < at
        };
        // Of hardly any host, and every order asks.
        let spoken_for = member.is_some_and(|member| member.spoken_for);
        let attempts = spoken_for.then(|| self.attempts.iter());
        let said = attempts
            .into_iter()
            .flatten()
            .filter_map(move |(place, hosts)| {
                let own = *place == (at, direction);
                (own || earlier(place)).then_some((*place, own, hosts.get(host)?))
            });
        said.flat_map(move |((place, way), own, attempts)| {
            attempts.iter().filter_map(move |attempt| {
                let Resolved {
                    done,
                    by,
                    signature,
                    ..
                } = *attempt.resolved.clone()?;
                (own || done).then(|| Binding {
                    origin: self.key(place, way, host, attempt.number),
                    fact: Fact::Resolved { done, by },
                    signature,
                })
            })
        })
    }

    /// What people have accepted to lose by undoing a step.
    fn accepted_losses(
        &self,
        at: StepRef,
        direction: Direction,
        host: &HostId,
    ) -> impl Iterator<Item = Binding> {
        // Only undos are refused because of a loss, and every order asks.
        let is_undo = direction == Direction::Undo;
        let attempts = is_undo.then(|| self.attempts_at(at, direction, host));
        let attempts = attempts.into_iter().flatten();
        attempts.filter_map(move |attempt| {
            let accepted = attempt.accepted.as_ref()?;
            Some(Binding {
                origin: self.key(at, direction, host, attempt.number),
                fact: Fact::LossAccepted {
                    loss: accepted.loss.clone(),
                    by: accepted.by.clone(),
                },
                signature: accepted.signature.clone(),
            })
        })
    }

    /// What an action gets to know at run time: the newest fact of each kind about its database. Of
    /// what lies on a host its own comes first: databases of one name may be several, and where it is
    /// not clear whose backup is meant, there is none. Of proofs it is the strongest one of the very
    /// backup.
    fn bindings(&self, action: &Action, host: &HostId) -> Vec<Binding> {
        let Some(database) = database(action) else {
            return vec![];
        };
        let mut of_kind: BTreeMap<&'static str, Vec<Known<'_>>> = BTreeMap::new();
        for (origin, fact, signature) in self.signed_facts() {
            let (kind, about) = match fact {
                Fact::Backup { database, .. } => ("backup", database),
                Fact::BackupVerified { database, .. } => ("verified", database),
                Fact::Integrity { database, .. } => ("integrity", database),
                Fact::Fenced { database, .. } => ("fenced", database),
                Fact::Revision { database, .. } => ("revision", database),
                Fact::SqlPlan { database, .. } => ("sql", database),
                // The counts of the backup's own snapshot, not those of later looks.
                Fact::Rows { database, .. } if is_backup(self, &origin) => ("rows", database),
                _ => continue,
            };
            if about == database {
                of_kind
                    .entry(kind)
                    .or_default()
                    .push((origin, fact, signature));
            }
        }
        let backups = of_kind.get("backup");
        let backup = backups.and_then(|all| the_one(all, host));
        let chosen = of_kind.iter().filter_map(|(kind, all)| match *kind {
            "revision" | "sql" => all.last(),
            "backup" | "rows" => the_one(all, host),
            "verified" if backups.is_some() => strongest(all, backup?),
            _ => own_first(all, host),
        });
        let bound = chosen.map(|(origin, fact, signature)| Binding {
            origin: origin.clone(),
            fact: fact.as_bound(),
            signature: signature.filter(|it| !it.is_empty()).cloned(),
        });
        bound.collect()
    }

    /// Who approved before a step: all approvals for what works on a database, and those that
    /// people have signed for every step.
    fn approvals(&self, action: &Action, at: StepRef) -> Vec<Binding> {
        let gates = self.gates.range(..at).filter(|(gate, state)| {
            let met = matches!(state.closed, Some((_, true, _)));
            met && matches!(self.placed(**gate).step.action, Action::GateApproval(_))
        });
        let bindings = gates.filter_map(|(gate, state)| {
            let signed = self.signed(*gate, state);
            if signed.is_none() && database(action).is_none() {
                return None;
            }
            Some(Binding {
                origin: self.key(*gate, Direction::Do, &controller_host(), 1),
                fact: Fact::Approved {
                    by: state
                        .decisions
                        .iter()
                        .map(|decision| decision.operator.clone())
                        .collect(),
                    evidence: state.evidence,
                    signed: signed.map(Box::new),
                },
                signature: None,
            })
        });
        bindings.collect()
    }

    /// The signatures at a gate, with what they were made over.
    fn signed(&self, at: StepRef, gate: &Gate) -> Option<Signed> {
        let approvals = gate.decisions.iter().filter(|decision| decision.approve);
        let signatures: Vec<_> = approvals.filter_map(|it| it.signed.clone()).collect();
        let broken: Vec<_> = broken(gate).collect();
        let none = signatures.is_empty() && broken.is_empty();
        (!none).then(|| self.signed_by(at, signatures, broken))
    }

    fn signed_by(&self, at: StepRef, signatures: Vec<Signature>, broken: Vec<Signature>) -> Signed {
        Signed {
            hosts: self.members.keys().cloned().collect(),
            sql: self.sql_shown(Some(at)),
            requester: self.requester.clone(),
            signatures,
            broken,
        }
    }

    /// How large the signed approvals at a gate are with one more, in bytes: they travel with
    /// every order after the gate.
    pub(crate) fn size_with(&self, at: StepRef, one: &Signature) -> usize {
        let gate = self.gates.get(&at);
        let decisions = gate.into_iter().flat_map(|gate| &gate.decisions);
        let had = decisions.filter_map(|decision| decision.signed.clone());
        let broken = gate.into_iter().flat_map(broken).collect();
        let signed = self.signed_by(at, had.chain([one.clone()]).collect(), broken);
        serde_json::to_vec(&signed).map_or(usize::MAX, |json| json.len())
    }
}

/// The signatures of people who broke the glass of a gate.
fn broken(gate: &Gate) -> impl Iterator<Item = Signature> {
    gate.glass.iter().filter_map(|word| word.signed.clone())
}

/// A fact with where it comes from, and its signature.
type Known<'a> = (StepKey, &'a Fact, Option<&'a String>);

/// The newest of a host's own facts; of all, if it has none.
fn own_first<'a, 'b>(all: &'b [Known<'a>], host: &HostId) -> Option<&'b Known<'a>> {
    let own = all.iter().rfind(|(origin, ..)| origin.host == *host);
    own.or_else(|| all.last())
}

/// The same, if it is clear whose it is: of several others' nobody knows which one is meant.
fn the_one<'a, 'b>(all: &'b [Known<'a>], host: &HostId) -> Option<&'b Known<'a>> {
    let (newest, ..) = all.last()?;
    let of_one = all.iter().all(|(origin, ..)| origin.host == newest.host);
    let own = own_first(all, host)?;
    (of_one || own.0.host == *host).then_some(own)
}

/// The newest of those proofs of a backup that reach highest.
fn strongest<'a, 'b>(all: &'b [Known<'a>], (_, backup, _): &Known<'_>) -> Option<&'b Known<'a>> {
    let Fact::Backup {
        id: made,
        digest: of,
        ..
    } = backup
    else {
        return None;
    };
    let reached = |(_, fact, _): &&Known<'_>| match fact {
        Fact::BackupVerified {
            id, digest, level, ..
        } if (id, digest) == (made, of) => Some(*level),
        _ => None,
    };
    let proofs = all.iter().filter(|known| reached(known).is_some());
    proofs.max_by_key(reached)
}

fn is_backup(rollout: &Rollout, origin: &StepKey) -> bool {
    matches!(
        rollout.placed(origin.at).step.action,
        Action::PostgresBackup(_)
    )
}

/// The database that an action works on.
fn database(action: &Action) -> Option<&String> {
    match action {
        Action::PostgresBackup(args) => Some(&args.database),
        Action::PostgresVerifyBackup(args) => Some(&args.database),
        Action::PostgresRehearse(args) => Some(&args.database),
        Action::PostgresRestore(args) => Some(&args.database),
        Action::PostgresCounts(args) => Some(&args.database),
        Action::PostgresIntegrity(args) => Some(&args.database),
        Action::PostgresCompare(args) => Some(&args.database),
        Action::PostgresAssert(args) => Some(&args.database),
        Action::PostgresAnalyze(args) => Some(&args.database),
        Action::PostgresRestorePoint(args) => Some(&args.database),
        Action::PostgresExternalBackup(args) => Some(&args.database),
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
