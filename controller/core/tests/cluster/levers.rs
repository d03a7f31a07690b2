//! What operators do, at any moment. Calls may be refused; what is taken has to hold.

use lockstep_core::{Answer, LeftState, Refused};

use super::*;

/// People tire: so many calls in one run.
const MOST_CALLS: u32 = 12;

impl World {
    pub(super) fn call(&mut self, call: Call) -> Result<Answer, Refused> {
        let event = Event::Operator {
            operator: "olga".into(),
            groups: vec![],
            call,
        };
        let before = self.journal.len();
        let mut effects = self.coordinator.handle(Timestamp(self.now), event);
        let answer = effects.answer.take().expect("a call is answered");
        let decided = effects.persist.first().map(|entry| entry.record.clone());
        self.take(effects);
        if answer.is_err() {
            let changed = self.journal[before..].iter();
            let by_people = |entry: &&Entry| {
                matches!(
                    entry.record,
                    Record::Paused { .. } | Record::Resumed { .. } | Record::Resolved { .. }
                )
            };
            assert_eq!(
                changed.filter(by_people).count(),
                0,
                "a refusal changes nothing"
            );
        } else {
            self.calls += 1;
            let again = matches!(
                decided,
                Some(Record::Resumed { .. } | Record::RollbackStarted { .. })
            );
            if again {
                self.ends_by = self.now + self.plan.plan().deadline.0 + 10_000;
            }
        }
        answer
    }

    /// Perhaps somebody does something.
    pub(super) fn people(&mut self) {
        let summary = self.coordinator.summary(&self.rollout).unwrap();
        let halted = summary.ended && summary.open;
        let often = if halted { 20 } else { self.faults.lever };
        if self.calls >= MOST_CALLS || !self.dice.percent(often) {
            return;
        }
        let rollout = self.rollout.clone();
        let reason = "as it pleases".to_owned();
        match self.dice.roll(24) {
            0..6 => drop(self.call(Call::Pause { rollout })),
            6..11 => drop(self.call(Call::Resume { rollout })),
            11..17 => drop(self.call(Call::ResumeFailed { rollout })),
            17..21 => self.resolve(),
            21 => drop(self.call(Call::RollBack { rollout, reason })),
            22 => drop(self.call(Call::Close { rollout, reason })),
            _ => {
                let was = summary.ended;
                let answer = self.call(Call::Cancel { rollout, reason });
                assert_eq!(answer.is_err(), was, "INV-8: cancel needs no agent");
                let state = self.coordinator.summary(&self.rollout).unwrap().state;
                assert!(
                    was || state == "cancelled",
                    "INV-8: cancel ends it at once: {state}"
                );
            }
        }
    }

    /// Somebody has looked at a host, and says what is true.
    fn resolve(&mut self) {
        let document = self.coordinator.document(&self.rollout).unwrap();
        let mut open: Vec<(HostId, StepRef, StepKey)> = Vec::new();
        for (phase, index) in document["phases"].as_array().unwrap().iter().zip(0..) {
            for (step, number) in phase["steps"].as_array().unwrap().iter().zip(0..) {
                for attempt in step["attempts"].as_array().unwrap() {
                    let unsettled = ["unknown", "agent lost"]
                        .contains(&attempt["cause"].as_str().unwrap())
                        || attempt["message"] == "no report in time";
                    if unsettled {
                        let host: HostId = attempt["host"].as_str().unwrap().parse().unwrap();
                        let at = StepRef {
                            phase: index,
                            step: number,
                        };
                        let key = StepKey {
                            rollout: self.rollout.clone(),
                            host: host.clone(),
                            at,
                            direction: if attempt["direction"] == "undo" {
                                Direction::Undo
                            } else {
                                Direction::Do
                            },
                            attempt: u16::try_from(attempt["attempt"].as_u64().unwrap()).unwrap(),
                        };
                        open.push((host, at, key));
                    }
                }
            }
        }
        if open.is_empty() {
            return;
        }
        let pick = usize::try_from(self.dice.roll(open.len() as u64)).unwrap();
        let (host, at, key) = open.swap_remove(pick);
        let agent = &self.agents[&host];
        let may_come = agent
            .mailbox
            .iter()
            .any(|message| matches!(message, Message::Order(_)));
        if agent.running.is_some() || may_come {
            return;
        }
        let done = self
            .ledger
            .iter()
            .any(|deed| deed.key == key && deed.effect);
        let _ = self.call(Call::Resolve {
            rollout: self.rollout.clone(),
            host,
            at,
            done,
            reason: "seen".into(),
            signed: None,
        });
    }

    /// What is said of hosts of an ended rollout is true: on one that has stopped nothing runs, and
    /// nothing ever will.
    pub(super) fn check_left(&mut self) {
        let ran = |world: &Self, host: &HostId| {
            world
                .ledger
                .iter()
                .filter(|deed| deed.key.host == *host)
                .count()
        };
        let all = self.coordinator.left(&self.rollout);
        for left in all.iter().filter(|left| left.state == LeftState::Stopped) {
            let host = &left.host;
            let running = &self.agents[host].running;
            assert!(
                running.is_none(),
                "{host} is said to have stopped: {running:?}"
            );
            let deeds = ran(self, host);
            let before = *self.stopped_at.entry(host.clone()).or_insert(deeds);
            assert_eq!(before, deeds, "{host} did something after it had stopped");
        }
    }

    /// A cancelled rollout: everybody comes back, and all of them let go.
    pub(super) fn check_let_go(&mut self) {
        let hosts: Vec<HostId> = self.agents.keys().cloned().collect();
        for host in hosts {
            let agent = self.agents.get_mut(&host).unwrap();
            agent.stalled = 0;
            if !agent.up {
                agent.up = true;
                self.connect(&host);
            }
        }
        let calm = Faults::default();
        for _ in 0..400 {
            self.second(calm);
            self.check_left();
            let open = self.coordinator.left(&self.rollout);
            let stopped = open.iter().all(|left| left.state == LeftState::Stopped);
            if stopped && self.agents.values().all(|agent| !agent.holds) {
                break;
            }
        }
        for (host, agent) in &self.agents {
            assert!(!agent.holds, "nothing stays locked: {host}");
        }
        let open = self.coordinator.left(&self.rollout);
        let open: Vec<_> = open
            .iter()
            .filter(|left| left.state != LeftState::Stopped)
            .collect();
        assert!(open.is_empty(), "everybody has answered, and yet: {open:?}");
    }
}
