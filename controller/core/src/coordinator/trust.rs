//! Who may be, among everything else that the coordinator knows: see [`crate::trust`].

use lockstep_proto::ids::{Digest, HostId, OperatorName};
use lockstep_proto::values::Timestamp;

use super::Coordinator;
use crate::event::{Answer, Effects, Event, Refused, TrustCall};
use crate::record::Record;
use crate::trust::{Decided, Subject, Trust, TrustRecord, Wanted};

impl Coordinator {
    /// Who may be.
    pub fn trust(&self) -> &Trust {
        &self.trust
    }

    /// Whether a name belongs to a host that nobody has forgotten, however it got in.
    fn is_known(&self, host: &HostId) -> bool {
        self.hosts.get(host).is_some_and(|info| !info.forgotten)
    }

    /// An agent asks for a certificate.
    pub(super) fn handle_wish(&mut self, now: Timestamp, event: Event, effects: &mut Effects) {
        let decided = match event {
            Event::Join { token, wanted } => self.decide_join(now, token, *wanted),
            Event::Renew {
                host,
                parent,
                parent_ends,
                wanted,
            } => {
                let trust = &self.trust;
                trust.decide_renewal(now, &host, &parent, parent_ends, *wanted)
            }
            _ => unreachable!("only agents' wishes come here"),
        };
        if let Some(record) = decided.record {
            self.commit(now, Record::Trust(record), effects);
        }
        effects.answer = Some(decided.answer.map(|grant| Answer::Granted(Box::new(grant))));
    }

    fn decide_join(
        &self,
        now: Timestamp,
        token: Digest,
        wanted: Result<Wanted, String>,
    ) -> Decided {
        let known = wanted
            .as_ref()
            .is_ok_and(|wanted| self.is_known(&wanted.host));
        self.trust.decide_join(now, token, wanted, known)
    }

    /// Somebody may do nothing any more, at the word of whoever starts the controller.
    pub fn suspend(&mut self, now: Timestamp, subject: Subject, reason: &str) -> Effects {
        let mut effects = Effects::default();
        if !self.trust.banned().subjects.contains_key(&subject) {
            let record = TrustRecord::Suspended {
                subject,
                reason: reason.to_owned(),
                operator: None,
            };
            self.commit(now, Record::Trust(record), &mut effects);
        }
        effects
    }

    /// An admin's word on who may be.
    pub(super) fn handle_trust(
        &mut self,
        now: Timestamp,
        operator: &OperatorName,
        call: TrustCall,
        effects: &mut Effects,
    ) -> Result<Answer, Refused> {
        let trust = &self.trust;
        let record = match call {
            TrustCall::CreateToken { host, hash, life } => {
                let known = self.is_known(&host);
                trust.decide_token(now, operator, hash, &host, life, known)?
            }
            TrustCall::RevokeToken { token } => trust.decide_revocation(now, operator, &token)?,
            TrustCall::Suspend { subject, reason } => {
                trust.decide_suspension(operator, subject, reason)?
            }
            TrustCall::Unsuspend { subject } => trust.decide_unsuspension(operator, subject)?,
        };
        let answer = match &record {
            TrustRecord::TokenCreated { token, until, .. } => Answer::Token {
                token: token.clone(),
                until: *until,
            },
            _ => Answer::Done,
        };
        self.commit(now, Record::Trust(record), effects);
        Ok(answer)
    }
}
