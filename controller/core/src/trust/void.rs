//! Which certificates count no more.

use std::collections::BTreeSet;

use lockstep_proto::ids::HostId;
use lockstep_proto::values::Timestamp;

use super::{Banned, Certificate, Serial, Subject, Trust};

impl Certificate {
    /// What counts no more since this does not: itself, and the one that it was renewed from,
    /// which may have been made elsewhere.
    pub(super) fn voided(&self) -> impl Iterator<Item = &Serial> {
        let serials = self
            .replaced
            .then_some([Some(&self.grant.serial), self.parent.as_ref()]);
        serials.into_iter().flatten().flatten()
    }
}

impl Trust {
    /// Whoever is not let in.
    pub fn banned(&self) -> Banned {
        let reasons = self.suspended.iter();
        let certificates = self.hosts.values().flatten();
        Banned {
            subjects: reasons
                .map(|(subject, suspension)| (subject.clone(), suspension.reason.clone()))
                .collect(),
            replaced: certificates
                .flat_map(Certificate::voided)
                .cloned()
                .collect(),
        }
    }

    /// The names under which a machine has joined with a token.
    pub fn joined(&self) -> impl Iterator<Item = &HostId> {
        self.joined.iter()
    }

    /// The only certificates that a host may have; none if a machine never joined under its name
    /// with a token, so that others may have made some.
    pub fn granted(&self, host: &HostId) -> Option<BTreeSet<Serial>> {
        let certificates = self.hosts.get(host).into_iter().flatten();
        let left = certificates.filter(|certificate| !certificate.replaced);
        self.joined.contains(host).then(|| {
            left.map(|certificate| certificate.grant.serial.clone())
                .collect()
        })
    }

    /// Whether a host's certificate counts no more, or never did.
    pub(super) fn is_void(&self, host: &HostId, serial: &Serial) -> bool {
        let mut certificates = self.hosts.get(host).into_iter().flatten();
        certificates.any(|certificate| certificate.voided().any(|void| void == serial))
            || self
                .granted(host)
                .is_some_and(|granted| !granted.contains(serial))
    }

    /// The agents' certificates that are void and have not ended, as far as they are known: those
    /// of suspended hosts, those that are suspended themselves, and those that were replaced.
    pub fn revoked(&self, now: Timestamp) -> BTreeSet<Serial> {
        let mut revoked = BTreeSet::new();
        for (host, certificates) in &self.hosts {
            let suspended = self.suspended.contains_key(&Subject::Host(host.clone()));
            let own = certificates.iter().filter(|certificate| {
                (suspended || certificate.replaced) && certificate.grant.not_after > now
            });
            revoked.extend(own.map(|certificate| certificate.grant.serial.clone()));
            let live = certificates
                .iter()
                .filter(|certificate| certificate.until > now);
            let parents = live.flat_map(|certificate| certificate.voided().skip(1));
            revoked.extend(parents.cloned());
        }
        let named = self.suspended.keys().filter_map(|subject| match subject {
            Subject::Serial(serial) => Some(serial.clone()),
            Subject::Host(_) | Subject::Operator(_) => None,
        });
        revoked.extend(named);
        revoked
    }
}
