//! Every call of the contract, made by every kind of peer, over real TLS to the real controller.

#[allow(dead_code, reason = "other tests of this crate use the rest of it")]
mod support;

use std::collections::BTreeMap;
use std::time::Duration;

use lockstep_proto::wire::{CALLS, control_v1 as wire};
use support::pki::roles::{Role, Roles};
use support::{Identity, Place, pki};
use tonic::transport::Channel;
use tonic::{Code, Request};
use tonic_prost::ProstCodec;

/// What may become of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fate {
    /// The handler has answered, if only that nothing was asked for.
    Answered,
    /// The table refuses it.
    Refused,
    /// The peer does not get as far as the table.
    Outside,
}

/// Makes a call with an empty message; every kind of call begins with one on the wire.
async fn call(channel: &Channel, path: &'static str) -> Fate {
    let mut grpc = tonic::client::Grpc::new(channel.clone());
    if grpc.ready().await.is_err() {
        return Fate::Outside;
    }
    let codec = ProstCodec::<(), ()>::default();
    let messages = Request::new(tokio_stream::once(()));
    let path = http::uri::PathAndQuery::from_static(path);
    let answer = grpc.streaming(messages, path, codec);
    let answer = tokio::time::timeout(Duration::from_secs(20), answer).await;
    let Err(status) = answer.expect("an answer, or its beginning, in time") else {
        return Fate::Answered;
    };
    match status.code() {
        // Only what came over the wire has no source.
        _ if std::error::Error::source(&status).is_some() => Fate::Outside,
        Code::PermissionDenied
            if ["may not call", "is suspended"]
                .iter()
                .any(|words| status.message().contains(words)) =>
        {
            Fate::Refused
        }
        Code::Unauthenticated => Fate::Refused,
        Code::Unknown | Code::Unimplemented => panic!("{status:?}"),
        _ => Fate::Answered,
    }
}

/// What becomes of every call; one connection serves for all of them.
async fn calls(
    controller: &support::Controller,
    identity: Option<&Identity>,
) -> BTreeMap<&'static str, Fate> {
    let mut fates = BTreeMap::new();
    let channel = controller.dial(identity).await;
    for path in CALLS {
        let fate = match &channel {
            Ok(channel) => call(channel, path).await,
            Err(_) => Fate::Outside,
        };
        fates.insert(*path, fate);
    }
    fates
}

/// The name of a call without its service.
fn name(path: &str) -> &str {
    path.rsplit('/').next().unwrap()
}

/// What a role adds to reading, in the words of the documents.
fn of_role(role: Role) -> &'static [&'static str] {
    match role {
        Role::Viewer => &[],
        Role::Author => &["Submit"],
        Role::Approver => &["Decide", "BreakGlass", "SignOff"],
        Role::Operator => &[
            "Pause",
            "Resume",
            "Resolve",
            "AcceptLoss",
            "Cancel",
            "RollBack",
            "Close",
        ],
        Role::Admin => &[
            "ForgetHost",
            "CreateToken",
            "ListTokens",
            "RevokeToken",
            "Suspend",
            "Unsuspend",
            "ListSuspended",
        ],
    }
}

/// What whoever has a role reads.
const READ: &[&str] = &["Watch", "GetRollout", "ListRollouts", "ListHosts", "Logs"];

/// The one call that takes no certificate, and the agents' calls.
const JOIN: &str = "/lockstep.enroll.v1.EnrollService/Join";
const RENEW: &str = "/lockstep.enroll.v1.EnrollService/Renew";

fn is_for_agents(path: &str) -> bool {
    path.starts_with("/lockstep.agent.v1.AgentService/") || path == RENEW
}

fn is_for_operators(path: &str) -> bool {
    path.starts_with("/lockstep.control.v1.ControlService/")
}

#[tokio::test]
async fn each_call_is_for_those_whom_the_documents_name() {
    let place = Place::enrolling("1h");
    let controller = place.start();

    for (path, fate) in calls(&controller, None).await {
        let expected = if path == JOIN {
            Fate::Answered
        } else {
            Fate::Refused
        };
        assert_eq!(fate, expected, "no certificate: {path}");
    }
    let agent = place.agent("app-1");
    for (path, fate) in calls(&controller, Some(&agent)).await {
        let expected = if is_for_agents(path) || path == JOIN {
            Fate::Answered
        } else {
            Fate::Refused
        };
        assert_eq!(fate, expected, "agent: {path}");
    }
    let sets = Role::ALL.map(|role| (role.as_str(), Roles::of(&[role]), vec![role]));
    let before = Role::ALL[..4].to_vec();
    let none = ("before-roles", Roles::default(), before);
    for (who, roles, means) in sets.into_iter().chain([none]) {
        let mut person = pki::Person::new(who, &[]);
        person.roles = roles;
        let identity = place.person(&person);
        for (path, fate) in calls(&controller, Some(&identity)).await {
            let named = |role: &Role| of_role(*role).contains(&name(path));
            let may =
                is_for_operators(path) && (READ.contains(&name(path)) || means.iter().any(named));
            let expected = if may || path == JOIN {
                Fate::Answered
            } else {
                Fate::Refused
            };
            assert_eq!(fate, expected, "{who}: {path}");
        }
    }
    // Whoever is not told of roles is not told off without the people who mind the machine hearing.
    assert!(
        place.log().contains("says nothing of roles"),
        "{}",
        place.log()
    );
}

#[tokio::test]
async fn whoever_is_not_known_gets_nowhere() {
    let place = Place::new();
    let controller = place.start();
    let elsewhere = Place::new();
    let aged = |issuer: &str, name: &str, ends: i64| Some(place.aged(issuer, name, ends));
    let day = 24 * 3600;
    let strangers = [
        ("no certificate", None),
        ("foreign operator", Some(elsewhere.operator("dora", &[]))),
        ("foreign agent", Some(elsewhere.agent("app-1"))),
        ("expired operator", aged("operators", "operator/old", -day)),
        ("expired agent", aged("agents", "agent/old", -day)),
        ("agents' issuer", aged("agents", "operator/eve", day)),
        ("operators' issuer", aged("operators", "agent/eve", day)),
        ("no such kind", aged("operators", "admin/eve", day)),
    ];
    for (who, identity) in strangers {
        for (path, fate) in calls(&controller, identity.as_ref()).await {
            assert_eq!(fate, Fate::Outside, "{who}: {path}");
        }
    }
}

#[tokio::test]
async fn whoever_is_suspended_or_revoked_makes_no_call() {
    let place = Place::enrolling("1h");
    let controller = place.start();
    let admin = place.admin();
    let (agent, olga) = (place.agent("app-1"), place.operator("olga", &[]));
    let serial = place.agent("app-2");
    let subjects = [
        ("host:app-1".to_owned(), &agent),
        ("operator:olga".to_owned(), &olga),
        (format!("serial:{}", serial.serial()), &serial),
    ];
    let mut api = controller.control(&admin).await;
    for (subject, identity) in &subjects {
        // Connected before, so that each call is asked about, not only the handshake.
        let before = controller.dial(Some(identity)).await.unwrap();
        let path = if identity.key == olga.key {
            "/lockstep.control.v1.ControlService/ListHosts"
        } else {
            RENEW
        };
        assert_eq!(call(&before, path).await, Fate::Answered, "{subject}");
        let request = wire::SuspendRequest {
            subject: subject.clone(),
            reason: "lost".to_owned(),
        };
        api.suspend(request).await.unwrap();
        assert_ne!(call(&before, path).await, Fate::Answered, "{subject}");
        for (path, fate) in calls(&controller, Some(identity)).await {
            assert_eq!(fate, Fate::Outside, "{subject}: {path}");
        }
    }
    assert!(
        place.log().contains("a handshake was refused"),
        "{}",
        place.log()
    );
}
