//! Who may be: tokens that let hosts in, the certificates that hosts were given, and who is
//! suspended. Deciding reads and returns records; folding them is all that changes anything.
//!
//! ```text
//! admin: token for a host -> agent: token and key -> Enrolled -> certificate
//!                                  agent: certificate and new key -> Renewed -> the next one
//!        two new keys on one certificate -> the host is suspended: one of the two is a copy
//! admin: forget a host -> its certificates are void -> token -> Enrolled, which lifts a suspension
//! ```
//!
//! A certificate itself is in no record. What is signed follows from the [`Grant`], so an answer
//! that was lost is signed again, for the same key only.

use std::collections::{BTreeMap, BTreeSet};

use lockstep_proto::ids::{Digest, HostId, OperatorName};
use lockstep_proto::values::{Period, Timestamp};
use serde::{Deserialize, Serialize};

use crate::event::Refused;

mod fold;
mod names;
#[cfg(test)]
mod tests;
mod void;

pub use names::{InvalidSubject, Serial, Subject};

/// The longest life of a token.
pub const LONGEST_TOKEN_LIFE: Period = Period(10 * 60 * 1000);

/// How often a token may be tried in vain.
const TRIES: u8 = 3;

/// Certificates are valid from so long before they were made: clocks differ. Short ones less: what
/// they live for should be ahead of them.
const BACKDATED: Period = Period(5 * 60 * 1000);
const BACKDATED_PART: u64 = 20;

/// Tokens that wait for their hosts: a fleet in one go, and no more memory than that.
const MOST_TOKENS: usize = 10_000;

/// What is remembered of who may be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrustRecord {
    /// A token was made. Only its hash is known.
    TokenCreated {
        /// Its name.
        token: String,
        /// SHA-256 of the token.
        hash: Digest,
        /// The host that it lets in.
        host: HostId,
        /// When it ends.
        until: Timestamp,
        /// Who made it.
        operator: OperatorName,
    },
    /// Whoever has the token asked for what it does not give.
    TokenTried {
        /// Its name.
        token: String,
        /// What was wrong.
        why: String,
    },
    /// A token lets nobody in any more.
    TokenRevoked {
        /// Its name.
        token: String,
        /// Who said so.
        operator: OperatorName,
    },
    /// A token was used: its host has a certificate. Those that the name had before are void,
    /// whoever made them, and a suspension of the host is over: it was the other machine's.
    Enrolled {
        /// The token's name.
        token: String,
        /// What was granted.
        grant: Grant,
    },
    /// A host has its next certificate.
    Renewed {
        /// The certificate that it asked with.
        parent: Serial,
        /// When that one ends.
        parent_ends: Timestamp,
        /// What was granted.
        grant: Grant,
    },
    /// Somebody may do nothing any more.
    Suspended {
        /// Who.
        subject: Subject,
        /// Why.
        reason: String,
        /// Who said so; none if the controller did.
        operator: Option<OperatorName>,
    },
    /// Somebody may do again what was allowed before.
    Unsuspended {
        /// Who.
        subject: Subject,
        /// Who said so.
        operator: OperatorName,
    },
}

/// The right to a certificate: everything in it but the key itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// The host that it names.
    pub host: HostId,
    /// SHA-256 of its public key.
    pub key: Digest,
    /// Its serial number.
    pub serial: Serial,
    /// When it begins.
    pub not_before: Timestamp,
    /// When it ends.
    pub not_after: Timestamp,
}

/// What an agent asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// The host that the certificate is to name.
    pub host: HostId,
    /// SHA-256 of the public key.
    pub key: Digest,
    /// A serial number that nobody can foretell, made by the driver.
    pub serial: Serial,
    /// How long it is to be valid.
    pub life: Period,
}

/// What becomes of a wish: what is remembered of it, and the answer.
#[derive(Debug, PartialEq, Eq)]
pub struct Decided {
    /// None: nothing changes.
    pub record: Option<TrustRecord>,
    /// The grant, or why there is none.
    pub answer: Result<Grant, Refused>,
}

impl Decided {
    fn refused(why: impl Into<String>) -> Self {
        Self {
            record: None,
            answer: Err(Refused::NotAllowed(why.into())),
        }
    }
}

/// A token, without itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// The host that it lets in.
    pub host: HostId,
    /// When it ends.
    pub until: Timestamp,
    /// Who made it.
    pub operator: OperatorName,
    /// What became of it.
    pub state: TokenState,
    hash: Digest,
    tries: u8,
    /// When it was made.
    at: Timestamp,
}

/// What became of a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenState {
    /// It waits for its host.
    Open,
    /// It was taken back, or another one was made for the host.
    Revoked,
    /// It was used: the certificate with this serial number came of it.
    Used(Serial),
}

/// A suspension.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Suspension {
    /// Why.
    pub reason: String,
    /// Who said so; none if the controller did.
    pub operator: Option<OperatorName>,
    /// Since when.
    pub at: Timestamp,
}

/// A certificate of a host.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Certificate {
    grant: Grant,
    parent: Option<Serial>,
    /// Until when it matters: until it and its parent have ended.
    until: Timestamp,
    /// The name was forgotten, or given to another machine, since.
    replaced: bool,
}

/// Whoever is not let in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Banned {
    /// By name, with the reason.
    pub subjects: BTreeMap<Subject, String>,
    /// Certificates of hosts whose name was forgotten, or given to another machine.
    pub replaced: BTreeSet<Serial>,
}

/// Who may be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Trust {
    tokens: BTreeMap<String, Token>,
    /// Hosts that were ever enrolled, and their certificates.
    hosts: BTreeMap<HostId, Vec<Certificate>>,
    /// Of those, the names that may be used again.
    free: BTreeSet<HostId>,
    /// Of those, the names under which a machine has joined with a token: they have no
    /// certificates but those that were granted.
    joined: BTreeSet<HostId>,
    suspended: BTreeMap<Subject, Suspension>,
}

impl Trust {
    /// The tokens that are remembered, by name.
    pub fn tokens(&self) -> impl Iterator<Item = (&String, &Token)> {
        self.tokens.iter()
    }

    /// Who is suspended.
    pub fn suspended(&self) -> impl Iterator<Item = (&Subject, &Suspension)> {
        self.suspended.iter()
    }

    /// Whether a name belongs to a host that was enrolled, and that nobody has forgotten.
    pub fn is_enrolled(&self, host: &HostId) -> bool {
        self.hosts.contains_key(host) && !self.free.contains(host)
    }

    /// What is left of this once everything is forgotten that had ended by then.
    #[must_use]
    pub fn as_of(&self, at: Timestamp) -> Self {
        let mut left = self.clone();
        for certificates in left.hosts.values_mut() {
            certificates.retain(|certificate| certificate.until >= at);
        }
        // Of a machine that has never joined with a token nothing else is known.
        let joined = &left.joined;
        left.hosts
            .retain(|host, certificates| !certificates.is_empty() || joined.contains(host));
        let hosts = &left.hosts;
        left.free.retain(|host| hosts.contains_key(host));
        left.tokens.retain(|_, token| token.until >= at);
        left
    }

    /// Whether a record still says something at a time.
    pub fn is_of_use(&self, record: &TrustRecord, at: Timestamp) -> bool {
        match record {
            TrustRecord::TokenCreated { until, .. } => *until >= at,
            TrustRecord::TokenTried { token, .. } | TrustRecord::TokenRevoked { token, .. } => self
                .tokens
                .get(token)
                .is_some_and(|token| token.until >= at),
            TrustRecord::Renewed {
                parent_ends, grant, ..
            } => (*parent_ends).max(grant.not_after) >= at,
            TrustRecord::Enrolled { .. }
            | TrustRecord::Suspended { .. }
            | TrustRecord::Unsuspended { .. } => true,
        }
    }

    /// Whether a token may be made. `known`: the name belongs to a host already.
    pub fn decide_token(
        &self,
        now: Timestamp,
        operator: &OperatorName,
        hash: Digest,
        host: &HostId,
        life: Period,
        known: bool,
    ) -> Result<TrustRecord, Refused> {
        if life == Period(0) || life > LONGEST_TOKEN_LIFE {
            let why = format!("a token lives for at most {LONGEST_TOKEN_LIFE}");
            return Err(Refused::Invalid(why));
        }
        if known || self.is_enrolled(host) {
            return Err(Refused::NotNow(taken(host)));
        }
        let open = self.tokens.values().filter(|token| token.until >= now);
        if open.count() >= MOST_TOKENS {
            let why = format!("{MOST_TOKENS} tokens are open; wait until some have ended");
            return Err(Refused::NotNow(why));
        }
        let token = token_name(hash);
        if self.tokens.contains_key(&token) {
            return Err(Refused::NotNow(
                "the token's name is taken; try again".to_owned(),
            ));
        }
        Ok(TrustRecord::TokenCreated {
            token,
            hash,
            host: host.clone(),
            until: now.plus(life),
            operator: operator.clone(),
        })
    }

    /// Whether a token may be taken back.
    pub fn decide_revocation(
        &self,
        now: Timestamp,
        operator: &OperatorName,
        token: &str,
    ) -> Result<TrustRecord, Refused> {
        let found = self.tokens.get(token).filter(|token| token.until >= now);
        match found.map(|token| &token.state) {
            None => Err(Refused::Invalid(format!("there is no token {token}"))),
            Some(TokenState::Open) => Ok(TrustRecord::TokenRevoked {
                token: token.to_owned(),
                operator: operator.clone(),
            }),
            Some(TokenState::Revoked) => {
                Err(Refused::NotNow(format!("{token} was taken back already")))
            }
            Some(TokenState::Used(serial)) => Err(Refused::NotNow(format!(
                "{token} was used already; the certificate that came of it is suspended with: \
                 lockstep suspend serial:{serial} --reason TEXT"
            ))),
        }
    }

    /// Whether a token lets a host in. A second answer to the same key is the same as the first.
    /// `known`: the name belongs to a host already. An `Err` in `wanted` is a request that
    /// nothing can be granted for.
    pub fn decide_join(
        &self,
        now: Timestamp,
        hash: Digest,
        wanted: Result<Wanted, String>,
        known: bool,
    ) -> Decided {
        // Whoever has no token learns nothing here.
        let name = token_name(hash);
        let Some(token) = self.tokens.get(&name).filter(|token| token.hash == hash) else {
            return Decided::refused(
                "this token is not known: it has ended, or it was never made here",
            );
        };
        if let TokenState::Used(serial) = &token.state {
            let first = self.certificate(&token.host, serial);
            let again = wanted.is_ok_and(|wanted| {
                first.is_some_and(|first| wanted.key == first.grant.key && !first.replaced)
            });
            return match first.filter(|first| again && first.grant.not_after > now) {
                Some(first) => Decided {
                    record: None,
                    answer: Ok(first.grant.clone()),
                },
                None => Decided::refused("this token was used already"),
            };
        }
        if token.state == TokenState::Revoked {
            return Decided::refused("this token was taken back, or another one was made since");
        }
        if token.until < now {
            return Decided::refused("this token has ended; an admin makes another one");
        }
        if token.tries >= TRIES {
            return Decided::refused("this token was tried in vain too often");
        }
        let host = &token.host;
        let tried = |why: String| Decided {
            record: Some(TrustRecord::TokenTried {
                token: name.clone(),
                why: why.clone(),
            }),
            answer: Err(Refused::Invalid(why)),
        };
        let wanted = match wanted {
            Ok(wanted) if wanted.host != *host => {
                return tried(format!("the token is for {host}, not for {}", wanted.host));
            }
            Ok(wanted) => wanted,
            Err(why) => return tried(why),
        };
        if known || self.is_enrolled(host) {
            return Decided::refused(taken(host));
        }
        // Whoever made the token knew of a suspension only if that was there before.
        if let Some(suspension) = self.suspension(host)
            && suspension.at >= token.at
        {
            return Decided::refused(format!(
                "{host} was suspended since this token was made; an admin makes another one"
            ));
        }
        let grant = grant(now, wanted);
        Decided {
            record: Some(TrustRecord::Enrolled {
                token: name,
                grant: grant.clone(),
            }),
            answer: Ok(grant),
        }
    }

    /// Whether a host gets its next certificate. `parent` is the one that it asks with, which the
    /// handshake has verified.
    pub fn decide_renewal(
        &self,
        now: Timestamp,
        host: &HostId,
        parent: &Serial,
        parent_ends: Timestamp,
        wanted: Wanted,
    ) -> Decided {
        if wanted.host != *host {
            let why = format!("the certificate is {host}'s, and asks for {}", wanted.host);
            return Decided::refused(why);
        }
        // The connection that it comes over may have been let in before.
        if let Some(suspension) = self.suspension(host) {
            return Decided::refused(format!("{host} is suspended: {}", suspension.reason));
        }
        if self.is_void(host, parent) {
            let why = format!(
                "the certificate with serial number {parent} is void: {host} was forgotten, or \
                 another machine has joined under its name"
            );
            return Decided::refused(why);
        }
        let certificates = self.hosts.get(host).into_iter().flatten();
        let mut children = certificates.filter(|other| other.parent.as_ref() == Some(parent));
        if let Some(child) = children.next() {
            if child.grant.key == wanted.key {
                return Decided {
                    record: None,
                    answer: Ok(child.grant.clone()),
                };
            }
            let reason = format!(
                "two machines have the certificate with serial number {parent}: it was renewed as \
                 {}, and then with another key. Find out which of the two is {host}; then, without \
                 lifting the suspension: lockstep forget {host}, lockstep token create {host}, and \
                 let that one join",
                child.grant.serial
            );
            return Decided {
                answer: Err(Refused::NotAllowed(format!(
                    "{host} is suspended: {reason}"
                ))),
                record: Some(TrustRecord::Suspended {
                    subject: Subject::Host(host.clone()),
                    reason,
                    operator: None,
                }),
            };
        }
        let grant = grant(now, wanted);
        Decided {
            record: Some(TrustRecord::Renewed {
                parent: parent.clone(),
                parent_ends,
                grant: grant.clone(),
            }),
            answer: Ok(grant),
        }
    }

    /// Whether somebody may be suspended.
    pub fn decide_suspension(
        &self,
        operator: &OperatorName,
        subject: Subject,
        reason: String,
    ) -> Result<TrustRecord, Refused> {
        if reason.trim().is_empty() {
            return Err(Refused::Invalid("a suspension needs a reason".to_owned()));
        }
        if subject == Subject::Operator(operator.clone()) {
            let why = format!("{operator} cannot suspend {operator}: another admin can");
            return Err(Refused::Invalid(why));
        }
        if let Some(since) = self.suspended.get(&subject) {
            let why = format!("{subject} is suspended already: {}", since.reason);
            return Err(Refused::NotNow(why));
        }
        Ok(TrustRecord::Suspended {
            subject,
            reason,
            operator: Some(operator.clone()),
        })
    }

    /// Whether a suspension may be lifted.
    pub fn decide_unsuspension(
        &self,
        operator: &OperatorName,
        subject: Subject,
    ) -> Result<TrustRecord, Refused> {
        if !self.suspended.contains_key(&subject) {
            return Err(Refused::Invalid(format!("{subject} is not suspended")));
        }
        Ok(TrustRecord::Unsuspended {
            subject,
            operator: operator.clone(),
        })
    }

    /// Why a host is suspended, and since when; none if it is not.
    pub fn suspension(&self, host: &HostId) -> Option<&Suspension> {
        self.suspended.get(&Subject::Host(host.clone()))
    }

    fn certificate(&self, host: &HostId, serial: &Serial) -> Option<&Certificate> {
        let mut certificates = self.hosts.get(host)?.iter();
        certificates.find(|certificate| certificate.grant.serial == *serial)
    }
}

fn grant(now: Timestamp, wanted: Wanted) -> Grant {
    let Wanted {
        host,
        key,
        serial,
        life,
    } = wanted;
    let backdated = BACKDATED.min(Period(life.0 / BACKDATED_PART));
    Grant {
        host,
        key,
        serial,
        not_before: Timestamp(now.0.saturating_sub(backdated.0)),
        not_after: now.plus(life),
    }
}

/// What people call a token: nothing of it can be learnt from that.
fn token_name(hash: Digest) -> String {
    format!("tk_{}", hash.short())
}

fn taken(host: &HostId) -> String {
    format!(
        "{host} is the name of a host already. If that is gone for good: lockstep forget {host}; \
         its certificates are void from then on"
    )
}
