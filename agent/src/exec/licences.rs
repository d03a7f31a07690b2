//! Which serials of sealed plans may still run here. Pure; part of what the journal says.
//!
//! Serials of one plan name only go up, and each licenses one rollout, for ever: a rollout that
//! has ended is not begun again, whoever asks for it.

use std::collections::BTreeMap;

use lockstep_proto::floor::{Floor, OTHERS};
use lockstep_proto::ids::RolloutId;
use serde::{Deserialize, Serialize};

/// One serial of a plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Serial {
    /// The plan's fleet.
    pub(crate) fleet: String,
    /// Its name.
    pub(crate) plan: String,
    /// Its number.
    pub(crate) number: u64,
}

/// What is known of all plans, by fleet and name.
#[derive(Debug, Default)]
pub(crate) struct Licences {
    plans: BTreeMap<(String, String), Known>,
    /// By fleet: the lowest serial of plans that are not among them.
    others: BTreeMap<String, u64>,
}

/// What is known of one plan.
#[derive(Debug, Default)]
struct Known {
    /// The lowest serial that may come.
    lowest: u64,
    /// The newest serial that was licensed.
    newest: Option<Licence>,
}

#[derive(Debug)]
struct Licence {
    serial: u64,
    rollout: RolloutId,
    /// The rollout has ended here.
    over: bool,
}

impl Licences {
    /// Refuses a serial that is too old, or that licenses another rollout.
    pub(crate) fn check(&self, of: &Serial, rollout: &RolloutId) -> Result<(), String> {
        let Serial {
            fleet,
            plan,
            number: serial,
        } = of;
        let known = self.plans.get(&(fleet.clone(), plan.clone()));
        let lowest = known.map_or(0, |known| known.lowest);
        let lowest = lowest.max(self.others.get(fleet).copied().unwrap_or(0));
        let next = "compile the plan again, and let it be signed anew";
        if *serial < lowest {
            return Err(format!(
                "the plan's serial is {serial}, and this host takes none of `{plan}` below \
                 {lowest}; {next}"
            ));
        }
        match known.and_then(|known| known.newest.as_ref()) {
            Some(newest) if newest.serial == *serial && newest.rollout != *rollout => Err(format!(
                "the plan's serial {serial} has licensed {} on this host, and licenses no other \
                 rollout; {next}",
                newest.rollout
            )),
            Some(newest) if newest.serial == *serial && newest.over => {
                Err(format!("{rollout} has ended on this host; {next}"))
            }
            _ => Ok(()),
        }
    }

    /// A serial licenses a rollout from now on.
    pub(super) fn license(&mut self, of: &Serial, rollout: &RolloutId) {
        let key = (of.fleet.clone(), of.plan.clone());
        let known = self.plans.entry(key).or_default();
        known.lowest = known.lowest.max(of.number);
        known.newest = Some(Licence {
            serial: of.number,
            rollout: rollout.clone(),
            over: false,
        });
    }

    /// A rollout has ended here.
    pub(super) fn end(&mut self, rollout: &RolloutId) {
        let newest = self.plans.values_mut().flat_map(|known| &mut known.newest);
        for licence in newest.filter(|licence| licence.rollout == *rollout) {
            licence.over = true;
        }
    }

    /// People have signed what may come next. Nothing that was known before is forgotten.
    pub(super) fn raise(&mut self, fleet: &str, serials: &BTreeMap<String, u64>) {
        for (plan, lowest) in serials {
            let known = if plan == OTHERS {
                self.others.entry(fleet.to_owned()).or_default()
            } else {
                let key = (fleet.to_owned(), plan.clone());
                &mut self.plans.entry(key).or_default().lowest
            };
            *known = (*known).max(*lowest);
        }
    }
}

/// What of a floor is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Raised {
    /// The fleet.
    pub(crate) fleet: String,
    /// The lowest serial of each plan.
    pub(crate) serials: BTreeMap<String, u64>,
}

impl From<Floor> for Raised {
    fn from(floor: Floor) -> Self {
        let Floor { fleet, serials, .. } = floor;
        Self { fleet, serials }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn serial(plan: &str, serial: u64) -> Serial {
        Serial {
            fleet: "prod".into(),
            plan: plan.into(),
            number: serial,
        }
    }

    fn rollout(byte: u8) -> RolloutId {
        RolloutId::from_random([byte; 6])
    }

    #[test]
    fn serials_go_up_and_each_licenses_one_rollout() {
        let mut licences = Licences::default();
        let five = serial("web", 5);
        licences.check(&five, &rollout(1)).unwrap();
        licences.license(&five, &rollout(1));
        let allowed = |licences: &Licences, of: &Serial, by| licences.check(of, &rollout(by));
        // The same again, as after a lost answer.
        allowed(&licences, &five, 1).unwrap();
        assert!(allowed(&licences, &five, 2).unwrap_err().contains("ro_01"));
        let why = allowed(&licences, &serial("web", 4), 2).unwrap_err();
        assert!(why.contains("below 5"), "{why}");
        allowed(&licences, &serial("web", 6), 2).unwrap();
        allowed(&licences, &serial("other", 1), 2).unwrap();
        let elsewhere = Serial {
            fleet: "test".into(),
            ..serial("web", 1)
        };
        allowed(&licences, &elsewhere, 2).unwrap();
        licences.end(&rollout(1));
        assert!(allowed(&licences, &five, 1).unwrap_err().contains("ended"));
    }

    #[test]
    fn a_floor_only_raises() {
        let mut licences = Licences::default();
        licences.license(&serial("web", 5), &rollout(1));
        let floor = [("web".to_owned(), 3), (OTHERS.to_owned(), 7)].into();
        licences.raise("prod", &floor);
        licences.raise("prod", &[(OTHERS.to_owned(), 2)].into());
        let allowed = |of: &Serial| licences.check(of, &rollout(2)).is_ok();
        // What stands for all others holds for a plan that is named, too, where it is higher.
        assert!(!allowed(&serial("web", 6)) && allowed(&serial("web", 7)));
        assert!(!allowed(&serial("new", 6)) && allowed(&serial("new", 7)));
        // The serial that has licensed a rollout does so for ever.
        licences.license(&serial("web", 9), &rollout(3));
        licences.raise("prod", &[("web".to_owned(), 9)].into());
        assert!(licences.check(&serial("web", 9), &rollout(4)).is_err());
    }
}
