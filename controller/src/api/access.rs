//! Who may call what: one table, asked before any handler is reached.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use http::{Request, Response};
use lockstep_core::refusal::Why;
use lockstep_proto::wire::CALLS;
use tonic::Status;
use tonic::body::Body;
use tower::{Layer, Service};

use crate::identity::{Identity, Peer};
use crate::pki::roles::Role::{Admin, Approver, Author, Operator};
use crate::pki::roles::{Role, Roles};
use crate::refusals::{OTHER, Refusals, caller};
use crate::suspensions::Suspensions;

/// Who may make a call.
#[derive(Debug, Clone, Copy)]
enum Who {
    /// Whoever has connected, also without a certificate; the handler looks for itself.
    Anybody,
    /// Agents, each for its own host.
    Agents,
    /// Operators with one of these roles.
    Operators(Roles),
}

const AGENTS: Who = Who::Agents;

/// Whatever an operator's role is, it reads.
const READERS: Who = Who::Operators(Roles::ANY);

const fn only(role: Role) -> Who {
    Who::Operators(Roles::of(&[role]))
}

/// Every call there is, and who may make it. A call of the contract that is not here fails the
/// build, below; what is in neither is refused.
const TABLE: &[(&str, Who)] = &[
    ("/lockstep.agent.v1.AgentService/Session", AGENTS),
    ("/lockstep.agent.v1.AgentService/Logs", AGENTS),
    ("/lockstep.agent.v1.AgentService/FetchBlob", AGENTS),
    ("/lockstep.control.v1.ControlService/Submit", only(Author)),
    ("/lockstep.control.v1.ControlService/Watch", READERS),
    ("/lockstep.control.v1.ControlService/GetRollout", READERS),
    ("/lockstep.control.v1.ControlService/ListRollouts", READERS),
    ("/lockstep.control.v1.ControlService/Decide", only(Approver)),
    (
        "/lockstep.control.v1.ControlService/BreakGlass",
        only(Approver),
    ),
    ("/lockstep.control.v1.ControlService/Pause", only(Operator)),
    ("/lockstep.control.v1.ControlService/Resume", only(Operator)),
    (
        "/lockstep.control.v1.ControlService/Resolve",
        only(Operator),
    ),
    (
        "/lockstep.control.v1.ControlService/AcceptLoss",
        only(Operator),
    ),
    ("/lockstep.control.v1.ControlService/Cancel", only(Operator)),
    (
        "/lockstep.control.v1.ControlService/RollBack",
        only(Operator),
    ),
    ("/lockstep.control.v1.ControlService/Close", only(Operator)),
    (
        "/lockstep.control.v1.ControlService/SignOff",
        only(Approver),
    ),
    ("/lockstep.control.v1.ControlService/ListHosts", READERS),
    (
        "/lockstep.control.v1.ControlService/ForgetHost",
        only(Admin),
    ),
    ("/lockstep.control.v1.ControlService/Logs", READERS),
    (
        "/lockstep.control.v1.ControlService/CreateToken",
        only(Admin),
    ),
    (
        "/lockstep.control.v1.ControlService/ListTokens",
        only(Admin),
    ),
    (
        "/lockstep.control.v1.ControlService/RevokeToken",
        only(Admin),
    ),
    ("/lockstep.control.v1.ControlService/Suspend", only(Admin)),
    ("/lockstep.control.v1.ControlService/Unsuspend", only(Admin)),
    (
        "/lockstep.control.v1.ControlService/ListSuspended",
        only(Admin),
    ),
    ("/lockstep.enroll.v1.EnrollService/Join", Who::Anybody),
    ("/lockstep.enroll.v1.EnrollService/Renew", AGENTS),
];

// The table and the contract name the same calls, each once.
const _: () = {
    assert!(
        TABLE.len() == CALLS.len(),
        "api/access.rs: a call has no row, or a row no call"
    );
    let mut call = 0;
    while call < CALLS.len() {
        assert!(
            has_row(CALLS[call]),
            "api/access.rs: a call of the contract has no row"
        );
        call += 1;
    }
};

const fn has_row(call: &str) -> bool {
    let mut row = 0;
    while row < TABLE.len() {
        if is_same(TABLE[row].0.as_bytes(), call.as_bytes()) {
            return true;
        }
        row += 1;
    }
    false
}

const fn is_same(one: &[u8], other: &[u8]) -> bool {
    let mut at = 0;
    while at < one.len() && at < other.len() && one[at] == other[at] {
        at += 1;
    }
    at == one.len() && at == other.len()
}

/// A call of the table by its own name; what is in none is not repeated.
fn name(path: &str) -> &'static str {
    let row = TABLE.iter().find(|(call, _)| *call == path);
    row.and_then(|(call, _)| call.rsplit('/').next())
        .unwrap_or(OTHER)
}

/// Whether a peer may make a call now; otherwise what it is told, and what the journal has.
fn decide(peer: Option<&Peer>, path: &str, suspensions: &Suspensions) -> Result<(), (Why, Status)> {
    let peer = peer.ok_or_else(|| {
        let status = Status::unauthenticated("no certificate");
        (Why::Certificate, status)
    })?;
    let identity = peer.identity();
    if peer.remaining().is_zero() {
        let why = format!("the certificate of {identity} has ended");
        return Err((Why::Ended, Status::unauthenticated(why)));
    }
    if let Some(why) = suspensions.why(identity, peer.serial()) {
        tracing::warn!(peer = %peer.address(), %identity, path, why, "a call was refused");
        let status = Status::permission_denied(format!("{identity}: {why}"));
        return Err((Why::Suspended, status));
    }
    // For as long as the connection is still up: its issuer is trusted no more, say.
    if peer.is_cut() {
        return Err((Why::Suspended, peer.cut_status()));
    }
    let row = TABLE.iter().find(|(call, _)| *call == path);
    let why = match (row.map(|(_, who)| who), identity) {
        (Some(Who::Anybody), _) | (Some(Who::Agents), Identity::Agent(_)) => return Ok(()),
        (_, Identity::Nobody) => {
            tracing::warn!(peer = %peer.address(), path, "a call without a certificate was refused");
            let status = Status::unauthenticated("this takes a certificate");
            return Err((Why::Certificate, status));
        }
        (Some(Who::Operators(roles)), Identity::Operator { .. }) => {
            if identity.roles().meets(*roles) {
                return Ok(());
            }
            let call = path.rsplit('/').next().unwrap_or(path);
            format!(
                "{identity} may not call {call}: that takes the role {roles}, and the certificate \
                 has {}",
                Some(identity.roles().to_string())
                    .filter(|roles| !roles.is_empty())
                    .as_deref()
                    .unwrap_or("none")
            )
        }
        _ => format!("{identity} may not call {path}"),
    };
    tracing::warn!(peer = %peer.address(), %identity, path, "a call was refused");
    let kind = row.map_or(Why::NoSuchCall, |_| Why::Role);
    Err((kind, Status::permission_denied(why)))
}

/// Puts the table in front of every service.
#[derive(Debug, Clone)]
pub(crate) struct AccessLayer {
    /// Who may do nothing.
    pub(crate) suspensions: Arc<Suspensions>,
    /// Where it is noted who was refused what.
    pub(crate) refusals: Refusals,
}

impl<S> Layer<S> for AccessLayer {
    type Service = Access<S>;

    fn layer(&self, inner: S) -> Access<S> {
        Access {
            inner,
            suspensions: Arc::clone(&self.suspensions),
            refusals: self.refusals.clone(),
        }
    }
}

/// A service behind the table.
#[derive(Debug, Clone)]
pub(crate) struct Access<S> {
    inner: S,
    suspensions: Arc<Suspensions>,
    refusals: Refusals,
}

type Answer = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

impl<S> Service<Request<Body>> for Access<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Answer;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Answer {
        let path = request.uri().path();
        let (peer, call) = (request.extensions().get::<Peer>().cloned(), name(path));
        let refusals = self.refusals.clone();
        if let Err((why, status)) = decide(peer.as_ref(), path, &self.suspensions) {
            let identity = peer.as_ref().map_or(&Identity::Nobody, Peer::identity);
            refusals.note(caller(identity), call, why);
            return Box::pin(std::future::ready(Ok(status.into_http())));
        }
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await?;
            // What a handler refuses is an answer that is nothing but its status.
            if let (Some(peer), Some(status)) = (peer, Status::from_header_map(answer.headers())) {
                refusals.note_answer(&peer, call, &status);
            }
            Ok(answer)
        })
    }
}

#[cfg(test)]
mod tests {
    use rustls::pki_types::CertificateDer;
    use rustls::pki_types::pem::PemObject as _;

    use super::*;
    use crate::pki;

    fn peer(issued: &pki::Issued) -> Peer {
        let certificate = CertificateDer::from_pem_file(&issued.certificate).unwrap();
        Peer::new(
            &[certificate],
            "example.com",
            "127.0.0.1:1".parse().unwrap(),
        )
        .unwrap()
    }

    // Every call and every kind of peer meet the real server in tests/access.rs; this is about
    // what no client can ask.
    #[test]
    fn what_is_not_in_the_table_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        pki::init(dir, "example.com").unwrap();
        let agent = peer(&pki::issue_agent(dir, "app-1", dir).unwrap());
        let mut person = pki::Person::new("dora", &[]);
        person.roles = Roles::ANY;
        let operator = peer(&pki::issue_operator(dir, &person, dir).unwrap());
        let nobody = Suspensions::default();
        for peer in [&agent, &operator] {
            for path in [
                "/grpc.health.v1.Health/Check",
                "",
                "/",
                TABLE[0].0.trim_end_matches('n'),
            ] {
                assert!(decide(Some(peer), path, &nobody).is_err(), "{path}");
            }
        }
        for (call, _) in TABLE {
            assert!(decide(None, call, &nobody).is_err(), "{call}");
        }
    }

    #[test]
    fn a_role_that_is_missing_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        pki::init(dir, "example.com").unwrap();
        let mut person = pki::Person::new("ada", &[]);
        person.roles = Roles::of(&[Admin]);
        let admin = peer(&pki::issue_operator(dir, &person, dir).unwrap());
        let call = "/lockstep.control.v1.ControlService/Decide";
        let refused = decide(Some(&admin), call, &Suspensions::default());
        let (why, refused) = refused.unwrap_err();
        assert_eq!(why, Why::Role);
        assert_eq!(
            refused.message(),
            "operator ada may not call Decide: that takes the role approver, and the certificate \
             has admin"
        );
    }
}
