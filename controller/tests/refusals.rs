//! Who was refused what, in the controller's journal (INV-11), and what a flood of it costs.

#[allow(dead_code, reason = "other tests of this crate use the rest of it")]
mod support;

use std::process::Command;
use std::time::Duration;

use lockstep_proto::wire::control_v1 as wire;
use serde_json::{Value, json};
use support::pki::roles::Role;
use support::{Place, hello};
use tonic::Code;

/// The records of refusals, without their times.
fn refused(place: &Place) -> Vec<Value> {
    let state = place.path().join("state");
    let exported = Command::new(env!("CARGO_BIN_EXE_lockstep"))
        .args(["audit", "export", "--dir"])
        .arg(&state)
        .output()
        .unwrap();
    assert!(exported.status.success(), "{exported:?}");
    let text = String::from_utf8(exported.stdout).unwrap();
    let records = text.lines().map(|line| {
        let line: Value = serde_json::from_str(line).unwrap();
        line["record"]["calls_refused"].clone()
    });
    let found = records.filter(|record| !record.is_null());
    found
        .map(|mut record| {
            assert!(record["since"].as_u64().unwrap() > 0);
            record.as_object_mut().unwrap().remove("since");
            record
        })
        .collect()
}

fn record(who: &Value, call: &str, why: &str, count: u64) -> Value {
    json!({"who": who, "call": call, "why": why, "count": count})
}

/// To a client, TLS 1.3 is up before the server has looked at its certificate: what was dialled last
/// is turned away a moment later, and the log says so.
async fn turned_away(place: &Place, why: &str, times: usize) {
    for _ in 0..600 {
        let log = place.log();
        let said = log
            .lines()
            .filter(|line| line.contains(why) && line.contains("address"));
        if said.count() >= times {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("`{why}` is not there {times} times:\n{}", place.log());
}

#[tokio::test]
async fn the_journal_says_who_was_refused_what() {
    let place = Place::enrolling("1h");
    let controller = place.start();
    let viewer = place.with_roles("vera", &[Role::Viewer]);
    let mut api = controller.control(&viewer).await;
    let cancel = wire::CancelRequest {
        rollout: "ro_000000000001".to_owned(),
        reason: "because\u{1b}[31m".to_owned(),
    };
    let status = api.cancel(cancel.clone()).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);

    // One that may call it, and is refused by what the call is about.
    let admin = place.admin();
    let mut api = controller.control(&admin).await;
    let forget = wire::ForgetHostRequest {
        host: "nobody".to_owned(),
    };
    api.forget_host(forget).await.unwrap_err();

    // An agent that speaks for another host.
    let agent = place.agent("app-1");
    let status = controller.session(&agent, hello("app-2")).await;
    assert_eq!(status.unwrap_err().code(), Code::PermissionDenied);

    // Suspended, and known by the certificate.
    let suspend = wire::SuspendRequest {
        subject: "host:app-1".to_owned(),
        reason: "lost".to_owned(),
    };
    api.suspend(suspend).await.unwrap();
    let _ = controller.dial(Some(&agent)).await;

    // Of another installation: it claims a name that is known here, which counts for nothing.
    let elsewhere = Place::new();
    for stranger in [elsewhere.agent("app-1"), elsewhere.operator("ada", &[])] {
        let _ = controller.dial(Some(&stranger)).await;
    }
    turned_away(&place, "a handshake was refused", 3).await;
    assert_eq!(controller.terminate(), Some(0));

    let found = refused(&place);
    let vera = json!({"operator": "vera"});
    let app = json!({"agent": "app-1"});
    for wanted in [
        record(&vera, "Cancel", "role", 1),
        record(&json!({"operator": "ada"}), "ForgetHost", "invalid", 1),
        record(&app, "Session", "not_allowed", 1),
        record(&app, "handshake", "suspended", 1),
    ] {
        assert!(found.contains(&wanted), "{wanted} is not in {found:#?}");
    }
    // Both strangers, in one record or in two.
    let strangers = found.iter().filter(|it| it["who"] == "unverified");
    let strangers: Vec<_> = strangers
        .map(|it| (&it["call"], &it["why"], it["count"].as_u64().unwrap()))
        .collect();
    let handshakes = strangers
        .iter()
        .all(|(call, why, _)| (*call, *why) == (&json!("handshake"), &json!("certificate")));
    assert!(handshakes, "{found:#?}");
    let count: u64 = strangers.iter().map(|(.., count)| count).sum();
    assert_eq!(count, 2, "{found:#?}");
    let who: Vec<&Value> = found.iter().map(|record| &record["who"]).collect();
    assert!(!who.contains(&&json!({"operator": "app-1"})), "{found:#?}");
}

#[tokio::test]
async fn whoever_is_refused_without_end_costs_a_few_records() {
    let place = Place::enrolling("1h");
    let controller = place.start();
    let viewer = place.with_roles("vera", &[Role::Viewer]);
    let mut api = controller.control(&viewer).await;
    for _ in 0..300 {
        api.pause(wire::PauseRequest::default()).await.unwrap_err();
    }
    let elsewhere = Place::new();
    let stranger = elsewhere.operator("vera", &[]);
    for _ in 0..30 {
        let _ = controller.dial(Some(&stranger)).await;
    }
    turned_away(&place, "a handshake was refused", 30).await;
    assert_eq!(controller.terminate(), Some(0));

    let found = refused(&place);
    assert!(found.len() <= 6, "{found:#?}");
    let count = |who: &Value| {
        let mine = found.iter().filter(|record| record["who"] == *who);
        mine.map(|record| record["count"].as_u64().unwrap())
            .sum::<u64>()
    };
    assert_eq!(count(&json!({"operator": "vera"})), 300);
    assert_eq!(count(&json!("unverified")), 30);
}

#[tokio::test]
async fn one_with_too_many_connections_is_refused_in_the_journal() {
    let place = Place::new();
    let controller = place.start();
    let agent = place.agent("app-1");
    // More than one agent may have.
    let mut open = vec![];
    for _ in 0..12 {
        open.push(controller.dial(Some(&agent)).await);
    }
    turned_away(&place, "too many connections", 4).await;
    drop(open);
    assert_eq!(controller.terminate(), Some(0));
    let found = refused(&place);
    let mine = found.iter().filter(|record| {
        record["who"] == json!({"agent": "app-1"})
            && record["call"] == "handshake"
            && record["why"] == "rate"
    });
    let count: u64 = mine.map(|record| record["count"].as_u64().unwrap()).sum();
    assert_eq!(count, 4, "{found:#?}");
}
