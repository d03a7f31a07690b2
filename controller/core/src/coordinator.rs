//! All rollouts, hosts and deadlines as one value: events in, effects out.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use lockstep_proto::ids::{Direction, Epoch, HostId, InstanceId, PlanDigest, RolloutId, StepRef};
use lockstep_proto::report::{Report, ReportBody};
use lockstep_proto::seal::SealedPlan;
use lockstep_proto::values::Timestamp;

use crate::event::{Answer, Effects, Event, Message, Notify};
use crate::record::{Archived, End, Entry, Record};
use crate::rollout::{HELD_BACK_BY, Rollout, order_life};
use crate::trust::Trust;

mod archive;
mod calls;
mod fold;
mod gates;
mod read;
mod settle;
mod trust;

pub use read::Summary;

/// What the coordinator is told at its start.
#[derive(Debug, Clone)]
pub struct Config {
    /// The term of this controller.
    pub epoch: Epoch,
    /// The group two of whom may break the glass of a gate; none: nobody may.
    pub break_glass: Option<String>,
}

/// A journal that cannot be folded.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    /// A plan that a record names is not in the store.
    #[error("the compiled plan {plan} of {rollout} is missing from the store")]
    PlanMissing {
        /// The rollout.
        rollout: RolloutId,
        /// Its plan.
        plan: PlanDigest,
    },
    /// A record that does not fit to those before it.
    #[error("record {number} does not fit to those before it: {why}")]
    Illegal {
        /// The record's number, from 1.
        number: u64,
        /// What is wrong.
        why: String,
    },
}

/// A host as the controller knows it.
#[derive(Debug, Clone, PartialEq)]
pub struct HostInfo {
    /// Whether its session is up.
    pub connected: bool,
    /// When something was last heard of it.
    pub last_seen: Timestamp,
    /// The installation of its agent.
    pub instance: InstanceId,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its agent's release.
    pub agent_version: String,
    /// The newest durable report of this installation.
    pub acknowledged: u64,
    /// How many of its reports answered nothing that was asked of it. A few come from agents that
    /// say again what is known, or report to a controller that came from a backup.
    pub unasked: u64,
    /// The newest of the installations before it.
    earlier: u64,
    /// When its session began, if one is up.
    since: Timestamp,
    /// Plans mean it no more, until it is seen again. Its reports go on where they were.
    forgotten: bool,
}

impl HostInfo {
    fn is_as_in(&self, record: &Record) -> bool {
        matches!(
            record,
            Record::HostSeen { instance, labels, agent_version, .. }
                if !self.forgotten
                    && self.instance == *instance
                    && self.labels == *labels
                    && self.agent_version == *agent_version
        )
    }
}

/// The coordinator.
#[derive(Debug)]
pub struct Coordinator {
    config: Config,
    hosts: BTreeMap<HostId, HostInfo>,
    rollouts: BTreeMap<RolloutId, Rollout>,
    /// In the order of their submission, and where each stands in it.
    order: Vec<RolloutId>,
    places: BTreeMap<RolloutId, usize>,
    /// Rollouts of which something may become due, by their place in that order, and when they are
    /// looked at at the latest; none where only events matter.
    awake: BTreeMap<usize, Option<Timestamp>>,
    /// Something was taken that anything may follow from.
    unsettled: bool,
    /// Serials that are used up.
    serials: BTreeMap<u64, RolloutId>,
    /// When this controller began: nothing is given up before hosts had time to come back.
    floor: Timestamp,
    /// When something was last decided.
    now: Timestamp,
    /// When the newest record was written.
    last_at: Timestamp,
    /// Hosts that were asked for their state in their present session.
    surveyed: BTreeSet<(RolloutId, HostId)>,
    last_epoch: Option<Epoch>,
    /// The newest term that took over.
    took_over: Option<Epoch>,
    /// Rollouts that are in an archive.
    archived: BTreeMap<RolloutId, Archived>,
    /// Who may be.
    trust: Trust,
}

impl Coordinator {
    /// Folds the journal. `plan` finds a compiled plan by its digest. Afterwards, call
    /// [`Self::resume`] once.
    pub fn recover(
        config: Config,
        entries: impl IntoIterator<Item = Entry>,
        plan: impl Fn(PlanDigest) -> Option<Arc<SealedPlan>>,
    ) -> Result<Self, RecoverError> {
        let mut coordinator = Self {
            config,
            hosts: BTreeMap::new(),
            rollouts: BTreeMap::new(),
            order: Vec::new(),
            places: BTreeMap::new(),
            awake: BTreeMap::new(),
            unsettled: false,
            serials: BTreeMap::new(),
            floor: Timestamp::default(),
            now: Timestamp::default(),
            last_at: Timestamp::default(),
            surveyed: BTreeSet::new(),
            last_epoch: None,
            took_over: None,
            archived: BTreeMap::new(),
            trust: Trust::default(),
        };
        for (entry, number) in entries.into_iter().zip(1..) {
            if let Record::Submitted {
                rollout,
                plan: digest,
                ..
            } = &entry.record
            {
                let sealed = plan(*digest).ok_or_else(|| RecoverError::PlanMissing {
                    rollout: rollout.clone(),
                    plan: *digest,
                })?;
                coordinator.begin(&entry, sealed);
            } else {
                let illegal = |why: String| RecoverError::Illegal { number, why };
                coordinator.apply(&entry).map_err(illegal)?;
            }
        }
        coordinator.floor = coordinator.last_at;
        Ok(coordinator)
    }

    /// The term of this controller, once the journal has told which have been.
    pub fn begin_term(&mut self, epoch: Epoch) {
        self.config.epoch = epoch;
    }

    /// When the last record of the journal was written; the beginning of time if there is none.
    pub fn last_at(&self) -> Timestamp {
        self.last_at
    }

    /// The newest term in the journal.
    pub fn last_epoch(&self) -> Option<Epoch> {
        self.last_epoch
    }

    /// The newest term that took over; none if none has.
    pub fn took_over(&self) -> Option<Epoch> {
        self.took_over
    }

    /// What is known of a rollout that is in an archive.
    pub fn archived(&self, rollout: &RolloutId) -> Option<&Archived> {
        self.archived.get(rollout)
    }

    /// This term has taken over: what agents were told by terms before it may be more than is
    /// known here.
    pub fn take_over(&mut self, now: Timestamp) -> Effects {
        let mut effects = Effects::default();
        let epoch = self.config.epoch;
        self.commit(now, Record::TookOver { epoch }, &mut effects);
        effects
    }

    /// The controller was away, stopped by whatever, until now: hosts get time to come back
    /// before any of them is given up.
    pub fn was_away(&mut self, now: Timestamp) {
        self.floor = now;
    }

    /// An agent's reports up to this one were acknowledged by a term before the one that took
    /// over, and are not here.
    pub fn skip_lost_reports(&mut self, now: Timestamp, host: &HostId, through: u64) -> Effects {
        let mut effects = Effects::default();
        let after = self.hosts.get(host).map_or(0, |info| info.acknowledged);
        let record = Record::ReportsLost {
            host: host.clone(),
            after,
            through,
        };
        self.commit(now, record, &mut effects);
        effects
    }

    /// Holds back every rollout that goes on: nothing new is sent, and people read why.
    pub fn hold_back(&mut self, now: Timestamp, why: &str) -> Effects {
        let going = |rollout: &&Rollout| rollout.ended.is_none() && !rollout.paused;
        let going: Vec<RolloutId> = self
            .rollouts
            .values()
            .filter(going)
            .map(|rollout| rollout.id.clone())
            .collect();
        let mut effects = Effects::default();
        for rollout in going {
            let operator = format!("{HELD_BACK_BY}{why}");
            self.commit(now, Record::Paused { rollout, operator }, &mut effects);
        }
        effects
    }

    /// Lets rollouts go on that were held back, also before a restart, as they were. One that a
    /// person has paused stays paused.
    pub fn let_go(&mut self, now: Timestamp, why: &str) -> Effects {
        let mut effects = Effects::default();
        for id in self.order.clone() {
            let rollout = &self.rollouts[&id];
            if rollout.ended.is_some() || !rollout.is_held_back() {
                continue;
            }
            let record = Record::Unpaused {
                rollout: id.clone(),
                why: why.to_owned(),
            };
            self.commit(now, record, &mut effects);
            self.say_again(now, &id, &mut effects);
        }
        self.settle(now, &mut effects);
        effects
    }

    /// The first effects after recovery: the term's record, orders that nobody has begun are said
    /// again with a later end, and whatever is due.
    pub fn resume(&mut self, now: Timestamp) -> Effects {
        self.floor = now;
        self.now = now;
        let mut effects = Effects::default();
        self.commit(
            now,
            Record::TermBegan {
                epoch: self.config.epoch,
            },
            &mut effects,
        );
        for id in self.order.clone() {
            self.say_again(now, &id, &mut effects);
        }
        // A message that was about to be sent may have been: it is not sent again.
        let unsure: Vec<Record> = self
            .rollouts
            .values()
            .flat_map(|rollout| {
                rollout
                    .notices
                    .iter()
                    .filter(|(_, state)| state.sent.is_none())
                    .map(|(which, _)| Record::NoticeSent {
                        rollout: rollout.id.clone(),
                        which: *which,
                        error: Some("the controller restarted while it was sent".into()),
                    })
            })
            .collect();
        for record in unsure {
            self.commit(now, record, &mut effects);
        }
        self.settle(now, &mut effects);
        effects
    }

    /// Takes one event, with all that follows. `now` never goes back.
    pub fn handle(&mut self, now: Timestamp, event: Event) -> Effects {
        let mut effects = Effects::default();
        self.take(now, event, &mut effects);
        self.settle_up(now, &mut effects);
        effects
    }

    /// What follows from events that were taken.
    pub fn settle_up(&mut self, now: Timestamp, effects: &mut Effects) {
        if self.unsettled {
            self.settle(now, effects);
        }
    }

    /// Takes one event. What follows from a report may be left to [`Self::settle_up`], so that it costs
    /// once what many of them make due; whatever else is taken meets what has followed.
    pub fn take(&mut self, now: Timestamp, event: Event, effects: &mut Effects) {
        self.now = now;
        if !matches!(event, Event::Report { .. }) {
            self.settle_up(now, effects);
        }
        match event {
            Event::HostUp {
                host,
                instance,
                labels,
                agent_version,
                held,
            } => {
                let seen = Record::HostSeen {
                    host: host.clone(),
                    instance,
                    labels,
                    agent_version,
                };
                self.handle_host_up(now, &host, seen, held, effects);
                self.unsettled |= self.is_awaited_back(&host);
                return;
            }
            Event::HostDown { host } => {
                if let Some(info) = self.hosts.get_mut(&host) {
                    info.connected = false;
                    info.last_seen = now;
                }
                // Whoever is gone may come back: only time gives it up.
                return;
            }
            Event::Report { host, report } => {
                self.handle_report(now, &host, report, effects);
                return;
            }
            Event::NoticeSent {
                rollout,
                which,
                error,
            } => {
                let known = |rollout: &Rollout| rollout.notices.contains_key(&which);
                if self.rollouts.get(&rollout).is_some_and(known) {
                    self.commit(
                        now,
                        Record::NoticeSent {
                            rollout,
                            which,
                            error,
                        },
                        effects,
                    );
                }
            }
            Event::Operator {
                operator,
                groups,
                call,
            } => {
                let answer = self.handle_call(now, &operator, groups, call, effects);
                effects.answer = Some(answer);
            }
            Event::Join { .. } | Event::Renew { .. } => {
                self.handle_wish(now, event, effects);
            }
            Event::CallsRefused(refused) => {
                self.commit(now, Record::CallsRefused(refused), effects);
            }
            Event::Tick => {}
        }
        self.settle(now, effects);
        // Only now is it known what is still missing at the gate.
        if let Some(Ok(Answer::Missing(gate))) = &mut effects.answer {
            *gate = self.missing(gate, now);
        }
    }

    /// Orders that nobody has begun are given again, with a later end: after what follows from
    /// failures, for a rollout that goes back gives no order forward new life.
    fn say_again(&mut self, now: Timestamp, id: &RolloutId, effects: &mut Effects) {
        loop {
            let up = |host: &HostId| self.is_up(host);
            let due = self.rollouts[id].due_failures(now, self.floor, &up);
            if due.is_empty() {
                break;
            }
            for record in due {
                self.commit(now, record, effects);
            }
        }
        let rollout = &self.rollouts[id];
        let unstarted = rollout.outstanding().filter(|(at, direction, _, attempt)| {
            attempt.started.is_none() && rollout.may_say(*at, *direction)
        });
        let again: Vec<Record> = unstarted
            .map(|(at, direction, host, attempt)| Record::Dispatched {
                rollout: rollout.id.clone(),
                at,
                direction,
                attempt: attempt.number,
                hosts: vec![host.clone()],
                not_after: now.plus(order_life(direction)),
            })
            .collect();
        for record in again {
            self.commit(now, record, effects);
        }
    }

    fn handle_host_up(
        &mut self,
        now: Timestamp,
        host: &HostId,
        seen: Record,
        held: Option<RolloutId>,
        effects: &mut Effects,
    ) {
        if !self
            .hosts
            .get(host)
            .is_some_and(|info| info.is_as_in(&seen))
        {
            self.commit(now, seen, effects);
        }
        let info = self.hosts.get_mut(host).expect("it was just seen");
        info.connected = true;
        info.since = now;
        info.last_seen = now;
        for place in self.awake.keys() {
            let asked = (self.order[*place].clone(), host.clone());
            self.surveyed.remove(&asked);
        }
        // It lets go before it is asked to hold for another one.
        if let Some(rollout) = held {
            self.send_release(host.clone(), rollout, effects);
        }
        let epoch = self.config.epoch;
        for place in self.awake.keys() {
            let rollout = &self.rollouts[&self.order[*place]];
            let Some(member) = rollout.members.get(host) else {
                continue;
            };
            if rollout.ended.is_none() && member.consent.is_none() {
                effects.send.push((host.clone(), rollout.offer(epoch)));
            }
            for (at, direction, attempt) in rollout.outstanding_of(host) {
                let begun = attempt.started.is_some() || rollout.may_say(at, direction);
                if rollout.ended.is_none() && begun {
                    let order = rollout.order(&self.config, at, direction, host, attempt);
                    effects.send.push((host.clone(), Message::Order(order)));
                }
            }
        }
    }

    /// Tells a host that holds itself for a rollout to let go, if that has ended. What still runs
    /// there is stopped only if people cancelled it, or nobody knows it.
    fn send_release(&self, host: HostId, rollout: RolloutId, effects: &mut Effects) {
        let known = self.rollouts.get(&rollout);
        let comes_back = known.is_some_and(|it| it.ended.is_none() && it.lock.released);
        if known.is_some_and(|it| !comes_back && (it.ended.is_none() || it.is_locking())) {
            return;
        }
        let epoch = self.config.epoch;
        let archived = self.archived.get(&rollout);
        let cancelled = match known {
            Some(rollout) => rollout.is_cancelled(),
            None => archived.is_none_or(|archived| archived.end == End::Cancelled),
        };
        if cancelled {
            let cancel = Message::Cancel {
                rollout: rollout.clone(),
                epoch,
            };
            effects.send.push((host.clone(), cancel));
        }
        let release = Message::Release {
            rollout,
            epoch,
            comes_back,
        };
        effects.send.push((host, release));
    }

    /// Reports come in order and without gaps. One that is known is acknowledged again; one with
    /// a gap before it is not taken: the agent repeats from the acknowledged one.
    fn handle_report(
        &mut self,
        now: Timestamp,
        host: &HostId,
        report: Report,
        effects: &mut Effects,
    ) {
        let Some(info) = self.hosts.get_mut(host) else {
            return;
        };
        info.last_seen = now;
        let (mut acknowledged, before) = (info.acknowledged, info.unasked);
        let mut follows = None;
        if acknowledged.checked_add(1) == Some(report.number) {
            let record = Record::Reported {
                host: host.clone(),
                number: report.number,
                body: report.body,
                head: report.head,
            };
            let consented = match &record {
                Record::Reported {
                    body: ReportBody::Consented { rollout, .. },
                    ..
                } => Some(rollout.clone()),
                _ => None,
            };
            self.may_ask_again(host, &record);
            let committed = effects.persist.len();
            self.commit(now, record, effects);
            let info = &self.hosts[host];
            acknowledged = info.acknowledged;
            let unasked = info.unasked;
            if unasked > before {
                effects.unasked.push((committed, unasked));
            } else {
                follows = self.follows(now, host, &effects.persist[committed].record);
            }
            // A consent that was under way when its rollout ended, and has come since; or for one
            // that only a controller before this one knew.
            let over = |rollout: &RolloutId| {
                let known = self.rollouts.get(rollout);
                known.is_none_or(|it| it.ended.is_some())
            };
            if let Some(rollout) = consented.filter(over) {
                self.send_release(host.clone(), rollout, effects);
            }
        }
        effects
            .send
            .push((host.clone(), Message::Acknowledged(acknowledged)));
        if let Some((rollout, follows)) = follows {
            self.settle_report(now, host, &rollout, follows, effects);
        }
    }

    /// Whoever was asked for its state before, and has not answered in time, is asked once more.
    pub(crate) fn ask_for_states_again(&mut self, rollout: &RolloutId) {
        self.surveyed.retain(|(asked, _)| asked != rollout);
    }

    /// A host that has said its state may be asked for it again, after a resume; one whose step has
    /// ended after the rollout, so that it lets go only now, too.
    fn may_ask_again(&mut self, host: &HostId, record: &Record) {
        let Record::Reported { body, .. } = record else {
            return;
        };
        let Some(id) = record.rollout() else { return };
        let ended = self
            .rollouts
            .get(id)
            .is_some_and(|rollout| rollout.ended.is_some());
        let again = match body {
            ReportBody::Surveyed { .. } => !ended,
            ReportBody::Finished { .. } => ended,
            _ => false,
        };
        if again {
            self.surveyed.remove(&(id.clone(), host.clone()));
        }
    }

    /// Since when a host is connected; none if it is not.
    fn since(&self, host: &HostId) -> Option<Timestamp> {
        let info = self.hosts.get(host);
        info.filter(|info| info.connected).map(|info| info.since)
    }

    pub(crate) fn is_up(&self, host: &HostId) -> bool {
        self.hosts.get(host).is_some_and(|info| info.connected)
    }

    /// Folds a record that was just decided, and collects what follows from it.
    fn commit(&mut self, now: Timestamp, mut record: Record, effects: &mut Effects) {
        record.shorten();
        let published = record
            .rollout()
            .and_then(|id| self.rollouts.get(id))
            .map_or(0, |r| r.events.len());
        let entry = Entry { at: now, record };
        if let Err(why) = self.apply(&entry) {
            // Decided from the very state that it does not fit: a bug, and no state to go on from.
            unreachable!("{why}: {:?}", entry.record);
        }
        if let Some(rollout) = entry.record.rollout().and_then(|id| self.rollouts.get(id)) {
            let news = rollout.events.get(published..).unwrap_or_default();
            effects
                .published
                .extend(news.iter().map(|event| (rollout.id.clone(), event.clone())));
        }
        self.follow(now, &entry.record, effects);
        effects.persist.push(entry);
    }

    /// Messages that follow from a record. None is lost by a crash: they are made again from the
    /// state when the host is up.
    fn follow(&self, now: Timestamp, record: &Record, effects: &mut Effects) {
        match record {
            Record::Dispatched {
                rollout,
                at,
                direction,
                hosts,
                ..
            } => {
                let rollout = &self.rollouts[rollout];
                let orders = rollout.orders(&self.config, *at, *direction, hosts);
                let orders = orders.map(|(host, order)| (host.clone(), Message::Order(order)));
                effects.send.extend(orders);
            }
            Record::NoticeOrdered { rollout, which } => {
                if let Some(action) = self.rollouts[rollout].notice(*which, now) {
                    effects.notify.push(Notify {
                        rollout: rollout.clone(),
                        which: *which,
                        action,
                    });
                }
            }
            Record::LockTaken { rollout, .. } => {
                let rollout = &self.rollouts[rollout];
                let asked = rollout.members.iter();
                let asked = asked.filter(|(_, member)| member.consent.is_none());
                let offer = rollout.offer(self.config.epoch);
                effects
                    .send
                    .extend(asked.map(|(host, _)| (host.clone(), offer.clone())));
            }
            Record::LockReleased { rollout, .. }
            | Record::Ended { rollout, .. }
            | Record::Closed { rollout, .. } => {
                for host in self.rollouts[rollout].members.keys() {
                    self.send_release(host.clone(), rollout.clone(), effects);
                }
            }
            _ => {}
        }
    }
}

impl Rollout {
    /// Whether an order that nobody has begun may still be given: nothing while paused, and no
    /// step forward once the rollout goes back.
    fn may_say(&self, at: StepRef, direction: Direction) -> bool {
        self.ended.is_none() && !self.paused && !self.is_of_the_past(at, direction)
    }

    fn offer(&self, epoch: Epoch) -> Message {
        Message::Offer {
            rollout: self.id.clone(),
            plan: self.plan.digest(),
            epoch,
            dry_run: self.dry_run,
            signatures: Arc::clone(&self.signatures),
            round: self.lock.round,
        }
    }
}
