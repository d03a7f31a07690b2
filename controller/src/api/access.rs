//! Who may call what: one table, asked before any handler is reached.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use http::{Request, Response};
use tonic::Status;
use tonic::body::Body;
use tower::{Layer, Service};

use crate::identity::{Peer, Role};

/// Every call there is, and the one role that may make it. What is not here is refused.
const TABLE: &[(&str, Role)] = &[
    ("/lockstep.agent.v1.AgentService/Session", Role::Agent),
    ("/lockstep.agent.v1.AgentService/Logs", Role::Agent),
    ("/lockstep.agent.v1.AgentService/FetchBlob", Role::Agent),
    ("/lockstep.control.v1.ControlService/Submit", Role::Operator),
    ("/lockstep.control.v1.ControlService/Watch", Role::Operator),
    (
        "/lockstep.control.v1.ControlService/GetRollout",
        Role::Operator,
    ),
    (
        "/lockstep.control.v1.ControlService/ListRollouts",
        Role::Operator,
    ),
    ("/lockstep.control.v1.ControlService/Decide", Role::Operator),
    ("/lockstep.control.v1.ControlService/Pause", Role::Operator),
    ("/lockstep.control.v1.ControlService/Resume", Role::Operator),
    (
        "/lockstep.control.v1.ControlService/Resolve",
        Role::Operator,
    ),
    ("/lockstep.control.v1.ControlService/Cancel", Role::Operator),
    (
        "/lockstep.control.v1.ControlService/RollBack",
        Role::Operator,
    ),
    ("/lockstep.control.v1.ControlService/Close", Role::Operator),
    (
        "/lockstep.control.v1.ControlService/SignOff",
        Role::Operator,
    ),
    (
        "/lockstep.control.v1.ControlService/ListHosts",
        Role::Operator,
    ),
    (
        "/lockstep.control.v1.ControlService/ForgetHost",
        Role::Operator,
    ),
    ("/lockstep.control.v1.ControlService/Logs", Role::Operator),
];

/// Whether a peer may make a call now.
fn decide(peer: Option<&Peer>, path: &str) -> Result<(), Status> {
    let peer = peer.ok_or_else(|| Status::unauthenticated("no certificate"))?;
    let identity = peer.identity();
    if peer.remaining().is_zero() {
        let why = format!("the certificate of {identity} has ended");
        return Err(Status::unauthenticated(why));
    }
    match TABLE.iter().find(|(call, _)| *call == path) {
        Some((_, role)) if *role == identity.role() => Ok(()),
        _ => {
            tracing::warn!(peer = %peer.address(), %identity, path, "a call was refused");
            let why = format!("{identity} may not call {path}");
            Err(Status::permission_denied(why))
        }
    }
}

/// Puts the table in front of every service.
#[derive(Debug, Clone, Copy)]
pub(crate) struct AccessLayer;

impl<S> Layer<S> for AccessLayer {
    type Service = Access<S>;

    fn layer(&self, inner: S) -> Access<S> {
        Access { inner }
    }
}

/// A service behind the table.
#[derive(Debug, Clone)]
pub(crate) struct Access<S> {
    inner: S,
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
        match decide(request.extensions().get(), request.uri().path()) {
            Ok(()) => Box::pin(self.inner.call(request)),
            Err(status) => Box::pin(std::future::ready(Ok(status.into_http()))),
        }
    }
}

#[cfg(test)]
mod tests {
    use rustls::pki_types::CertificateDer;
    use rustls::pki_types::pem::PemObject as _;

    use super::*;
    use crate::pki;

    /// The calls of a service, read from its contract.
    fn calls(proto: &str) -> Vec<String> {
        let word = |line: &str, keyword: &str| {
            let rest = line.trim().strip_prefix(keyword)?;
            let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '.')?;
            Some(rest[..end].to_owned())
        };
        let find = |keyword| proto.lines().find_map(|line| word(line, keyword)).unwrap();
        let (package, service) = (find("package "), find("service "));
        let calls = proto.lines().filter_map(|line| word(line, "rpc "));
        calls
            .map(|call| format!("/{package}.{service}/{call}"))
            .collect()
    }

    #[test]
    fn every_call_is_for_exactly_one_role() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        pki::init(dir, "example.com").unwrap();
        let agent = pki::issue_agent(dir, "app-1", dir).unwrap();
        let operator = pki::issue_operator(dir, "dora", &[], dir).unwrap();
        let [agent, operator] = [agent, operator].map(|issued| {
            let certificate = CertificateDer::from_pem_file(issued.certificate).unwrap();
            Peer::new(&certificate, "example.com", "127.0.0.1:1".parse().unwrap()).unwrap()
        });
        let agents = include_str!("../../../proto/lockstep/agent/v1/agent.proto");
        let control = include_str!("../../../proto/lockstep/control/v1/control.proto");
        let (agents, control) = (calls(agents), calls(control));
        assert_eq!(agents.len() + control.len(), TABLE.len());
        for call in &agents {
            assert!(decide(Some(&agent), call).is_ok(), "{call}");
            assert!(decide(Some(&operator), call).is_err(), "{call}");
        }
        for call in &control {
            assert!(decide(Some(&agent), call).is_err(), "{call}");
            assert!(decide(Some(&operator), call).is_ok(), "{call}");
        }
        for peer in [&agent, &operator] {
            assert!(decide(Some(peer), "/grpc.health.v1.Health/Check").is_err());
        }
        assert!(decide(None, &agents[0]).is_err());
    }
}
