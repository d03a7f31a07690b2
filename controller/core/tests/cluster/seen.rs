//! The promises, checked against the journal as it grows: an account of our own, folded from the
//! records alone, that shares nothing with the coordinator's.

use super::*;

/// What is known of a rollout from its records.
#[derive(Default)]
pub(super) struct Seen {
    /// The newest attempt of each step, by host and direction.
    newest: BTreeMap<(HostId, StepRef, Direction), u16>,
    finished: BTreeMap<StepKey, StepOutcome>,
    started: BTreeSet<StepKey>,
    not_after: BTreeMap<StepKey, u64>,
    late: BTreeSet<StepKey>,
    /// Steps that are done, by a report or by a person's word.
    done: BTreeSet<(HostId, StepRef)>,
    /// Attempts that a person has settled: whether they were done.
    resolved: BTreeMap<StepKey, bool>,
    /// The hosts elected for groups, the newest last.
    elected: BTreeMap<Vec<String>, Vec<HostId>>,
    pub(super) quarantined: BTreeSet<HostId>,
    /// Hosts whose newest attempt forward failed, by the step.
    failed: BTreeMap<HostId, StepRef>,
    /// The step that each host was last ordered forward.
    last: BTreeMap<HostId, StepRef>,
    paused: bool,
    rolling_back: bool,
    /// The stage whose wave was opened last.
    open: Option<(u16, usize)>,
    /// How many records there were when a person last said `resume`, `resume --failed` or
    /// `rollback`, and when each attempt was over.
    resumed: usize,
    resumed_failed: usize,
    over_at: BTreeMap<StepKey, usize>,
    records: usize,
    /// Undos in a rollback in the order in which they were ordered first.
    undos: Vec<(HostId, StepRef)>,
    /// The stage that is being undone.
    undoing: Option<(bool, Reverse<(u16, usize)>)>,
}

impl World {
    /// Checks a record against those before it, and folds it. `back` are the hosts in quarantine
    /// after a `resume --failed`.
    pub(super) fn see(&mut self, record: &Record, back: &BTreeSet<HostId>) {
        let seen = &mut self.seen;
        seen.records += 1;
        match record {
            Record::Dispatched {
                at,
                direction,
                attempt,
                hosts,
                not_after,
                ..
            } => {
                for host in hosts {
                    let key = StepKey {
                        rollout: self.rollout.clone(),
                        host: host.clone(),
                        at: *at,
                        direction: *direction,
                        attempt: *attempt,
                    };
                    self.check_dispatched(&key);
                    let seen = &mut self.seen;
                    seen.not_after.insert(key.clone(), not_after.0);
                    seen.failed.remove(host);
                    if *direction == Direction::Do {
                        seen.last.insert(host.clone(), *at);
                    }
                    seen.newest
                        .insert((host.clone(), *at, *direction), *attempt);
                }
                // Checked together: they were ordered together.
                if *direction == Direction::Do {
                    self.check_budget(&self.seen.failed);
                }
            }
            Record::Reported { host, body, .. } => seen.see_report(host, body, self.now),
            Record::GivenUp {
                at,
                direction,
                attempt,
                host,
                ..
            } => {
                assert!(!seen.is_finished(host, *at, *direction, *attempt));
                seen.failed.insert(host.clone(), *at);
            }
            Record::WaveOpened { phase, stage, .. } => {
                seen.open = Some((*phase, usize::from(*stage)));
            }
            Record::Resolved {
                at,
                direction,
                attempt,
                host,
                done,
                ..
            } => {
                let key = StepKey {
                    rollout: self.rollout.clone(),
                    host: host.clone(),
                    at: *at,
                    direction: *direction,
                    attempt: *attempt,
                };
                if *direction == Direction::Do {
                    seen.failed.remove(host);
                    if *done {
                        seen.done.insert((host.clone(), *at));
                    }
                }
                seen.resolved.insert(key, *done);
                // A host whose chain stood still catches up with the others.
                seen.undoing = None;
            }
            Record::Elected { groups, host, .. } => {
                let elected = seen.elected.entry(groups.clone()).or_default();
                assert!(
                    elected
                        .last()
                        .is_none_or(|before| seen.quarantined.contains(before)),
                    "INV-7: one_of elects once"
                );
                elected.push(host.clone());
            }
            Record::Quarantined { host, .. } => {
                seen.quarantined.insert(host.clone());
                self.check_quarantine(host);
            }
            Record::Paused { .. } => seen.paused = true,
            Record::Resumed { failed, .. } => {
                seen.paused = false;
                seen.resumed = seen.records;
                seen.undoing = None;
                if *failed {
                    seen.resumed_failed = seen.records;
                    self.see_who_is_back(back);
                } else {
                    // A late word that it was done counts from now on.
                    let done = seen.done.clone();
                    let left = seen.quarantined.clone();
                    seen.failed.retain(|host, at| {
                        left.contains(host) || !done.contains(&(host.clone(), *at))
                    });
                }
            }
            Record::RollbackStarted { operator, .. } => {
                seen.paused = false;
                seen.rolling_back = true;
                seen.undoing = None;
                if operator.is_some() {
                    seen.resumed = seen.records;
                }
            }
            Record::Ended { .. } => seen.paused = false,
            _ => {}
        }
    }

    /// Hosts that failed in the open stage, and only those, take part again.
    fn see_who_is_back(&mut self, quarantined: &BTreeSet<HostId>) {
        let plan = self.plan.plan();
        let seen = &mut self.seen;
        for host in seen.quarantined.difference(quarantined) {
            let at = seen.last.get(host).copied();
            let stage = at.map(|at| (at.phase, plan.step(at).unwrap().stage));
            assert_eq!(stage, seen.open, "INV-3: {host} is back behind a barrier");
        }
        assert!(quarantined.is_subset(&seen.quarantined));
        seen.quarantined.clone_from(quarantined);
        seen.failed.retain(|host, _| quarantined.contains(host));
    }

    fn check_dispatched(&mut self, key: &StepKey) {
        assert!(
            !self.seen.paused,
            "a paused rollout sends nothing new: {key}"
        );
        self.check_attempt(key);
        match key.direction {
            Direction::Do => self.check_forward(key),
            Direction::Undo => self.check_undo(key),
            Direction::Probe => panic!("a probe in a real rollout"),
        }
    }

    /// INV-1: an attempt follows another one only where that one is proven, or a person has said
    /// what it did.
    fn check_attempt(&self, key: &StepKey) {
        let seen = &self.seen;
        let newest = seen.newest.get(&(key.host.clone(), key.at, key.direction));
        let newest = newest.copied().unwrap_or_default();
        // Saying an order again is no new attempt.
        if key.attempt == newest {
            return;
        }
        assert_eq!(key.attempt, newest + 1, "INV-1: {key}");
        if newest == 0 {
            return;
        }
        let before = StepKey {
            attempt: newest,
            ..key.clone()
        };
        if seen.resolved.get(&before) == Some(&false) {
            return;
        }
        let blind = format!("INV-1: {key} is retried blindly");
        // One undo may follow another that a later attempt needed.
        let undo = key.direction == Direction::Undo;
        match seen.finished.get(&before) {
            Some(StepOutcome::Failed(failure)) if failure.cause == Cause::Interrupted => {}
            Some(StepOutcome::Failed(_)) if seen.late.contains(&before) => {}
            Some(StepOutcome::Failed(failure)) => {
                let over = seen.over_at[&before];
                let checks = key.at.phase == self.plan.plan().after_rollback_index();
                if undo || checks {
                    assert!(over < seen.resumed, "{blind}");
                    return;
                }
                assert!(over < seen.resumed_failed, "{blind}: nobody said --failed");
                let step = self.plan.plan().step(key.at).unwrap().step;
                let restart = matches!(step.action, Action::ServiceRestart(_));
                if failure.changed && step.action.info().undo && !restart {
                    let undone = seen.undone_since(key, over);
                    assert!(undone, "INV-6: {key} begins on what {before} left");
                }
            }
            Some(StepOutcome::Unknown { .. }) => {
                // What only looks may be asked again.
                let step = self.plan.plan().step(key.at).unwrap().step;
                let looks = step.action.info().class == Class::Observing;
                let over = seen.over_at[&before];
                assert!((undo || looks) && over < seen.resumed, "{blind}");
            }
            Some(StepOutcome::Ok { .. }) => assert!(undo, "{blind}: it was done"),
            None => panic!("{blind}: nobody knows how {before} ended"),
        }
    }

    /// INV-3: every step of the stages before is done on every host that it means.
    fn check_forward(&self, key: &StepKey) {
        let seen = &self.seen;
        let plan = self.plan.plan();
        if key.at.phase == plan.after_rollback_index() {
            assert!(seen.rolling_back, "{key} is a check after a rollback");
            return;
        }
        assert!(!seen.rolling_back, "INV-6: {key} after a rollback began");
        assert!(!seen.quarantined.contains(&key.host), "{key} in quarantine");
        let mine = plan.step(key.at).unwrap();
        let before_it = plan.steps().filter(|placed| {
            (placed.at.phase, placed.stage) == (key.at.phase, mine.stage) && placed.at < key.at
        });
        for placed in before_it {
            let done = seen.done.contains(&(key.host.clone(), placed.at));
            assert!(done, "{key} was ordered before {}", placed.at);
        }
        let earlier = plan
            .steps()
            .filter(|placed| (placed.at.phase, placed.stage) < (key.at.phase, mine.stage));
        for placed in earlier {
            for host in self.required(placed) {
                assert!(
                    seen.done.contains(&(host.clone(), placed.at))
                        || seen.quarantined.contains(&host),
                    "INV-3: {key} was ordered before {host} closed {}",
                    placed.at
                );
            }
        }
    }

    /// INV-6: only what was done, in reverse, stage by stage.
    fn check_undo(&mut self, key: &StepKey) {
        let plan = self.plan.plan();
        let seen = &mut self.seen;
        let done = (key.host.clone(), key.at, Direction::Do);
        assert!(
            seen.newest.contains_key(&done),
            "INV-6: only touched hosts are undone: {key}"
        );
        if !seen.rolling_back {
            assert!(
                seen.resumed_failed > 0,
                "{key} is undone, and nobody asked for it"
            );
            return;
        }
        let place = (key.host.clone(), key.at);
        if seen.undos.contains(&place) {
            return;
        }
        // Restarts are undone at the very end.
        let last = |at: StepRef| {
            let action = &plan.step(at).unwrap().step.action;
            matches!(action, Action::ServiceRestart(_))
        };
        let on_host = |at: StepRef| (last(at), Reverse(at));
        let before = seen.undos.iter().rev().find(|(host, _)| *host == key.host);
        assert!(
            before.is_none_or(|(_, at)| on_host(*at) < on_host(key.at)),
            "INV-6: undo goes in reverse: {key}"
        );
        let stage = (
            last(key.at),
            Reverse((key.at.phase, plan.step(key.at).unwrap().stage)),
        );
        assert!(
            seen.undoing.is_none_or(|undoing| undoing <= stage),
            "INV-6: a stage is undone on all hosts before the one before it: {key}"
        );
        seen.undoing = Some(stage);
        seen.undos.push(place);
    }

    /// INV-5: nothing goes forward with more failed hosts than the plan allows.
    fn check_budget(&self, failed: &BTreeMap<HostId, StepRef>) {
        if self.seen.rolling_back {
            return;
        }
        let plan = self.plan.plan();
        let all = failed.len();
        let fleet = plan.max_failures.map_or(usize::MAX, |most| most as usize);
        assert!(
            all <= fleet,
            "INV-5: {all} failed, the fleet may have {fleet}"
        );
        let stage = |at: StepRef| (at.phase, plan.step(at).unwrap().stage);
        for at in failed.values() {
            let same = failed.values().filter(|other| stage(**other) == stage(*at));
            let (count, most) = (same.count(), budget(plan.step(*at).unwrap()));
            assert!(
                count <= most,
                "INV-5: {count} failed at {at}, it may have {most}"
            );
        }
    }

    /// A host stays behind only within the budget, and only if it failed. Others that failed in the
    /// same moment have their turn after it.
    fn check_quarantine(&self, host: &HostId) {
        let seen = &self.seen;
        assert!(
            seen.failed.contains_key(host),
            "INV-5: {host} has not failed"
        );
        let mut behind = seen.failed.clone();
        behind.retain(|host, _| seen.quarantined.contains(host));
        self.check_budget(&behind);
    }

    /// What an order that is sent must be: one that was written down; and none forward in a
    /// rollback, but to ask what became of it.
    pub(super) fn check_sent(&self, order: &Order) {
        let key = &order.key;
        let place = (key.host.clone(), key.at, key.direction);
        let newest = self.seen.newest.get(&place);
        assert_eq!(
            newest,
            Some(&key.attempt),
            "INV-2: {key} was not written down"
        );
        let checks = key.at.phase == self.plan.plan().after_rollback_index();
        if self.seen.rolling_back && key.direction == Direction::Do && !checks {
            assert!(
                self.seen.started.contains(key),
                "INV-6: {key} in a rollback"
            );
        }
    }

    /// The hosts on which a step has to be done. For `one_of`, the one that did it: another is
    /// elected later only if that one stays behind and changed nothing.
    fn required(&self, placed: Placed<'_>) -> Vec<HostId> {
        let seen = &self.seen;
        match placed.target {
            Target::Controller => vec![],
            Target::OneOf(groups) => {
                let elected = seen.elected.get(groups).map_or(&[][..], Vec::as_slice);
                let did = |host: &&HostId| seen.done.contains(&((*host).clone(), placed.at));
                let one = elected.iter().find(did).or_else(|| elected.last());
                one.cloned().into_iter().collect()
            }
            target @ Target::Groups(_) => {
                let means = |host: &&HostId| self.plan.plan().targets(target, &labels(host));
                self.agents.keys().filter(means).cloned().collect()
            }
        }
    }

    pub(super) fn check_end(&self) {
        let summary = self.coordinator.summary(&self.rollout).unwrap();
        let keys: BTreeSet<&StepKey> = self.ledger.iter().map(|deed| &deed.key).collect();
        assert_eq!(
            keys.len(),
            self.ledger.len(),
            "INV-1: one effect for each key"
        );
        let behind = self.seen.quarantined.len();
        match summary.state {
            "succeeded" => {
                assert_eq!(behind, 0, "INV-5: nobody leaves the denominator");
                let checks = self.plan.plan().after_rollback_index();
                let steps = self.plan.plan().steps();
                for placed in steps.filter(|placed| placed.at.phase < checks) {
                    for host in self.required(placed) {
                        let done = self.seen.done.contains(&(host.clone(), placed.at));
                        assert!(done, "INV-5: {host} {}", placed.at);
                    }
                }
            }
            "partial" => {
                assert!(
                    behind > 0 && !summary.reason.is_empty(),
                    "INV-8: names who stays behind"
                );
                let most = self
                    .plan
                    .plan()
                    .max_failures
                    .map_or(usize::MAX, |most| most as usize);
                assert!(behind <= most, "INV-5: the fleet's budget");
            }
            "rolled_back" => self.check_rolled_back(),
            "halted" | "cancelled" => {
                assert!(!summary.reason.is_empty(), "INV-8: names what blocked it");
            }
            other => panic!("INV-8: {other} is no end"),
        }
    }

    /// Every effect that can be undone was undone afterwards, on every host.
    fn check_rolled_back(&self) {
        for (deed, index) in self.ledger.iter().zip(1..) {
            let key = &deed.key;
            let step = self.plan.plan().step(key.at).unwrap().step;
            if key.direction != Direction::Do || !step.action.info().undo || !deed.effect {
                continue;
            }
            let undoes = |other: &StepKey| {
                other.direction == Direction::Undo && other.at == key.at && other.host == key.host
            };
            let later = &self.ledger[index..];
            let undone = later.iter().any(|later| later.ok && undoes(&later.key));
            let word = |(key, done): (&StepKey, &bool)| *done && undoes(key);
            assert!(
                undone || self.seen.resolved.iter().any(word),
                "INV-6: {key} stays, and the rollout says rolled_back"
            );
        }
    }
}

impl Seen {
    fn see_report(&mut self, host: &HostId, body: &ReportBody, now: u64) {
        match body {
            ReportBody::Started { key } => {
                self.started.insert(key.clone());
            }
            ReportBody::Finished { key, outcome, .. } => {
                // Said once more.
                if self.finished.insert(key.clone(), outcome.clone()).is_some() {
                    return;
                }
                self.over_at.insert(key.clone(), self.records);
                let place = (host.clone(), key.at, key.direction);
                if self.newest.get(&place) != Some(&key.attempt) {
                    return;
                }
                if self.resolved.contains_key(key) {
                    return;
                }
                // It had been given up, and its host's chain may have stood still because of it.
                if key.direction == Direction::Do && self.failed.get(host) == Some(&key.at) {
                    self.undoing = None;
                }
                self.see_outcome(key, outcome, now);
            }
            _ => {}
        }
    }

    fn see_outcome(&mut self, key: &StepKey, outcome: &StepOutcome, now: u64) {
        let refused = |failure: &Failure| failure.cause == Cause::Refused;
        let late = now > self.not_after[key] && !self.started.contains(key);
        if matches!(outcome, StepOutcome::Failed(failure) if refused(failure)) && late {
            self.late.insert(key.clone());
        }
        match outcome {
            StepOutcome::Ok { .. } if key.direction == Direction::Do => {
                self.done.insert((key.host.clone(), key.at));
            }
            StepOutcome::Ok { .. } => {}
            _ if self.is_repeated(key) => {}
            _ => {
                self.failed.insert(key.host.clone(), key.at);
            }
        }
    }

    /// Whether an attempt was cut off, or came too late, for less than the third time.
    fn is_repeated(&self, key: &StepKey) -> bool {
        let interrupted = |key: &StepKey| matches!(&self.finished[key], StepOutcome::Failed(f) if f.cause == Cause::Interrupted);
        let same = |other: &&StepKey| {
            (&other.host, other.at, other.direction) == (&key.host, key.at, key.direction)
        };
        let attempts = || self.finished.keys().filter(same);
        let cut_off = attempts().filter(|key| interrupted(key)).count();
        let late = attempts().filter(|key| self.late.contains(*key)).count();
        (interrupted(key) && cut_off < 3) || (self.late.contains(key) && late < 3)
    }

    fn is_finished(&self, host: &HostId, at: StepRef, direction: Direction, attempt: u16) -> bool {
        self.finished.keys().any(|key| {
            key.host == *host
                && key.at == at
                && key.direction == direction
                && key.attempt == attempt
        })
    }

    /// Whether a step was undone on its host after a record.
    fn undone_since(&self, key: &StepKey, record: usize) -> bool {
        let undo = |other: &StepKey| {
            other.direction == Direction::Undo && other.at == key.at && other.host == key.host
        };
        let reported = self.finished.iter().any(|(other, outcome)| {
            let ok = matches!(outcome, StepOutcome::Ok { .. });
            ok && undo(other) && self.over_at[other] > record
        });
        let word = |(other, done): (&StepKey, &bool)| *done && undo(other);
        reported || self.resolved.iter().any(word)
    }
}

fn budget(placed: Placed<'_>) -> usize {
    match placed.target {
        // What one host does for all is not done by leaving that host behind.
        Target::OneOf(_) => 0,
        _ => placed.phase.stages[placed.stage].strategy.max_failures() as usize,
    }
}
