//! The fold over who may be: the running path and recovery both go through here.

use lockstep_proto::ids::HostId;
use lockstep_proto::values::Timestamp;

use super::{
    Certificate, Grant, Serial, Subject, Suspension, Token, TokenState, Trust, TrustRecord,
};

impl Trust {
    /// Folds a record.
    pub(crate) fn apply(&mut self, at: Timestamp, record: &TrustRecord) -> Result<(), String> {
        match record {
            TrustRecord::TokenCreated {
                token,
                hash,
                host,
                until,
                operator,
            } => {
                self.tokens.retain(|_, token| token.until >= at);
                let of_host = self.tokens.values_mut().filter(|token| token.host == *host);
                for earlier in of_host.filter(|token| token.state == TokenState::Open) {
                    earlier.state = TokenState::Revoked;
                }
                let made = Token {
                    host: host.clone(),
                    until: *until,
                    operator: operator.clone(),
                    state: TokenState::Open,
                    hash: *hash,
                    tries: 0,
                    at,
                };
                self.tokens.insert(token.clone(), made);
            }
            TrustRecord::TokenTried { token, .. } => self.token(token)?.tries += 1,
            TrustRecord::TokenRevoked { token, .. } => {
                self.token(token)?.state = TokenState::Revoked;
            }
            TrustRecord::Enrolled { token, grant } => {
                // A compacted journal may have kept no more of the token than this.
                if let Some(token) = self.tokens.get_mut(token) {
                    token.state = TokenState::Used(grant.serial.clone());
                }
                self.free.remove(&grant.host);
                self.joined.insert(grant.host.clone());
                self.suspended.remove(&Subject::Host(grant.host.clone()));
                let certificates = self.hosts.entry(grant.host.clone()).or_default();
                for earlier in certificates.iter_mut() {
                    earlier.replaced = true;
                }
                add(certificates, at, grant, None, grant.not_after);
            }
            TrustRecord::Renewed {
                parent,
                parent_ends,
                grant,
            } => {
                let certificates = self.hosts.entry(grant.host.clone()).or_default();
                let until = (*parent_ends).max(grant.not_after);
                add(certificates, at, grant, Some(parent), until);
            }
            TrustRecord::Suspended {
                subject,
                reason,
                operator,
            } => {
                let suspension = Suspension {
                    reason: reason.clone(),
                    operator: operator.clone(),
                    at,
                };
                self.suspended.insert(subject.clone(), suspension);
            }
            TrustRecord::Unsuspended { subject, .. } => _ = self.suspended.remove(subject),
        }
        Ok(())
    }

    /// A host is forgotten: its name may be used again. `void`: what it had counts no more.
    pub(crate) fn forget(&mut self, host: &HostId, void: bool) {
        if let Some(certificates) = self.hosts.get_mut(host) {
            self.free.insert(host.clone());
            for certificate in certificates.iter_mut().filter(|_| void) {
                certificate.replaced = true;
            }
        }
    }

    fn token(&mut self, name: &str) -> Result<&mut Token, String> {
        let found = self.tokens.get_mut(name);
        found.ok_or_else(|| format!("there is no token {name}"))
    }
}

/// Adds a host's newest certificate, and forgets those that no longer matter.
fn add(
    certificates: &mut Vec<Certificate>,
    at: Timestamp,
    grant: &Grant,
    parent: Option<&Serial>,
    until: Timestamp,
) {
    certificates.retain(|certificate| certificate.until >= at);
    certificates.push(Certificate {
        grant: grant.clone(),
        parent: parent.cloned(),
        until,
        replaced: false,
    });
}
