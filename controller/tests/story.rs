//! One rollout through a real controller, with an agent that only speaks the protocol: consent,
//! orders, reports, output, a restart in the middle, and what operators see of it.

#[allow(dead_code, reason = "other tests of this crate use the rest of it")]
#[path = "support/agent.rs"]
mod agent;
#[allow(dead_code, reason = "other tests of this crate use the rest of it")]
mod support;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use agent::{Agent, fetch, plan};
use lockstep_proto::action::Action;
use lockstep_proto::action::gate::{Approval, Lock, OnTimeout};
use lockstep_proto::ids::{Direction, StepRef};
use lockstep_proto::plan::{Step, Target, Undo};
use lockstep_proto::report::ReportBody;
use lockstep_proto::seal;
use lockstep_proto::values::Period;
use lockstep_proto::wire::agent_v1::{LogChunk, down};
use lockstep_proto::wire::control_v1::{self as control, EventKind};
use support::{Place, SOON, hello};
use tonic::{Code, Streaming};

const LINES: &[u8] = b"\x1b[31mfirst\x1b[0m line\nsecond line\nlast";

async fn next(events: &mut Streaming<control::RolloutEvent>) -> control::RolloutEvent {
    let event = tokio::time::timeout(SOON, events.message()).await;
    event.expect("an event in time").unwrap().expect("an event")
}

/// The events from a number on, until the stream ends.
async fn all(client: &mut support::Api, rollout: &str, after: u64) -> Vec<control::RolloutEvent> {
    let rollout = rollout.to_owned();
    let request = control::WatchRequest { rollout, after };
    let mut stream = client.watch(request).await.unwrap().into_inner();
    let mut events = Vec::new();
    while let Ok(Some(event)) = tokio::time::timeout(SOON, stream.message())
        .await
        .expect("the stream ends in time")
    {
        events.push(event);
    }
    events.retain(|event| event.kind() != EventKind::Heartbeat);
    events
}

async fn output(client: &mut support::Api, rollout: &str) -> Vec<(String, String)> {
    let request = control::LogsRequest {
        rollout: rollout.to_owned(),
        ..control::LogsRequest::default()
    };
    let mut stream = client.logs(request).await.unwrap().into_inner();
    let mut lines = Vec::new();
    while let Some(line) = stream.message().await.unwrap() {
        lines.push((line.key, line.text));
    }
    lines
}

#[tokio::test]
async fn a_rollout_survives_the_controllers_death() {
    let place = Place::new();
    let identity = place.agent("app-1");
    let dora = place.operator("dora", &["dba"]);
    let plan = Arc::new(plan(7));
    let controller = place.start();
    let mut agent = Agent::connect(&controller, identity.clone(), 0).await;
    let mut client = controller.control(&dora).await;

    // Nothing is readable before it is offered, and not by others afterwards.
    let early = fetch(&controller, &identity, &plan).await;
    assert_eq!(early, Err(Code::NotFound));
    let request = control::SubmitRequest {
        compiled_plan: plan.bytes().to_vec().into(),
        source: "plan: ports".into(),
        dry_run: false,
        signatures: vec![],
    };
    let submitted = client.submit(request.clone()).await.unwrap().into_inner();
    assert_eq!(submitted.plan_digest, plan.digest().to_string());
    let again = client.submit(request).await.unwrap_err();
    assert_eq!(again.code(), Code::AlreadyExists, "{again:?}");
    let rollout = submitted.rollout;

    agent.consent(&controller, &plan).await;
    let stranger = fetch(&controller, &place.agent("app-2"), &plan).await;
    assert_eq!(stranger, Err(Code::NotFound));
    let first = agent.order().await;
    assert_eq!(
        (first.at, first.attempt),
        (StepRef { phase: 0, step: 0 }, 1)
    );
    let watch = control::WatchRequest {
        rollout: rollout.clone(),
        after: 0,
    };
    let mut events = client.watch(watch).await.unwrap().into_inner();
    assert_eq!(next(&mut events).await.kind(), EventKind::Submitted);

    // Output and progress come while the step runs; progress is never kept.
    let chunk = LogChunk {
        key: first.to_string(),
        offset: 0,
        data: LINES.to_vec().into(),
        progress_permille: Some(500),
        progress_text: "half\u{1b}[2J way".into(),
    };
    let elsewhere = LogChunk {
        key: first.to_string().replace("app-1", "app-2"),
        ..chunk.clone()
    };
    let mut output_client = controller.agents(&identity).await;
    let kept = output_client.logs(tokio_stream::once(chunk)).await.unwrap();
    assert_eq!(kept.into_inner().kept_bytes, LINES.len() as u64);
    let refused = output_client.logs(tokio_stream::once(elsewhere)).await;
    assert_eq!(refused.unwrap_err().code(), Code::PermissionDenied);
    let progress = loop {
        let event = next(&mut events).await;
        if event.kind() == EventKind::StepProgress {
            break event;
        }
    };
    assert_eq!(
        (progress.number, progress.progress_permille),
        (0, Some(500))
    );
    assert_eq!(
        (progress.message.as_str(), progress.phase.as_str()),
        ("half way", "look")
    );

    agent.finish(first.clone()).await;
    let second = agent.order().await;
    let key = second.clone();
    agent.report(ReportBody::Started { key }).await;
    let reported = agent.reported;
    controller.kill();
    drop(agent);

    // The same rollout, the same attempt; what was reported is not asked for again.
    let controller = place.start();
    let mut agent = Agent::connect(&controller, identity.clone(), reported).await;
    assert_eq!(agent.session.acknowledged, reported);
    let again = agent.order().await;
    assert_eq!(again, second, "the order is said again, as it was");
    assert_eq!(again.direction, Direction::Do);
    agent.finish(again).await;
    let down::Message::Release(release) = agent.next().await else {
        panic!("the hold is not released");
    };
    assert_eq!(release.rollout, rollout);

    let mut client = controller.control(&dora).await;
    let events = all(&mut client, &rollout, 0).await;
    let end = events.last().unwrap();
    assert_eq!(
        (end.kind(), end.state.as_str()),
        (EventKind::Ended, "succeeded")
    );
    let ok = events
        .iter()
        .filter(|event| event.kind() == EventKind::StepOk);
    assert_eq!(ok.count(), 2);
    assert!(events.is_sorted_by(|one, other| one.number < other.number));
    let middle = events[events.len() / 2].number;
    let tail = all(&mut client, &rollout, middle).await;
    assert_eq!(tail, events[events.len() / 2 + 1..]);

    assert_eq!(
        output(&mut client, &rollout).await,
        [
            (first.to_string(), "first line\nsecond line\n".to_owned()),
            (first.to_string(), "last\n".to_owned())
        ]
    );
    let request = control::GetRolloutRequest {
        rollout: rollout.clone(),
    };
    let found = client.get_rollout(request).await.unwrap().into_inner();
    assert_eq!(
        (found.state.as_str(), found.requester.as_str()),
        ("succeeded", "dora")
    );
    let document: serde_json::Value = serde_json::from_slice(&found.document_json).unwrap();
    assert_eq!(document["source"], "plan: ports");
    let hosts = client
        .list_hosts(control::ListHostsRequest {})
        .await
        .unwrap();
    let hosts = hosts.into_inner().hosts;
    assert_eq!((hosts.len(), hosts[0].connected), (1, true));
    assert_eq!(hosts[0].locked_by, "");
}

#[tokio::test]
async fn an_agent_that_lost_its_journal_in_a_rollout_is_refused() {
    let place = Place::new();
    let identity = place.agent("app-1");
    let controller = place.start();
    let mut agent = Agent::connect(&controller, identity.clone(), 0).await;
    let mut client = controller.control(&place.operator("dora", &[])).await;
    let plan = plan(8);
    let request = control::SubmitRequest {
        compiled_plan: plan.bytes().to_vec().into(),
        ..control::SubmitRequest::default()
    };
    let rollout = client.submit(request).await.unwrap().into_inner().rollout;
    agent.consent(&controller, &plan).await;
    drop(agent);
    let mut lost = hello("app-1");
    lost.labels.insert("role".to_owned(), "app".to_owned());
    // The older session may still be on its way out.
    let refused = loop {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let refused = controller.session(&identity, lost.clone()).await;
        let refused = refused.unwrap_err();
        if refused.code() != Code::AlreadyExists {
            break refused;
        }
    };
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused:?}");
    assert!(refused.message().contains(&rollout), "{refused:?}");
}

// With threads of its own, so that the client goes on while the test waits for the process.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watchers_are_sent_away_when_the_controller_drains() {
    let place = Place::new();
    let identity = place.agent("app-1");
    let controller = place.start();
    let _agent = Agent::connect(&controller, identity, 0).await;
    let mut client = controller.control(&place.operator("dora", &[])).await;
    let plan = plan(9);
    let request = control::SubmitRequest {
        compiled_plan: plan.bytes().to_vec().into(),
        ..control::SubmitRequest::default()
    };
    let rollout = client.submit(request).await.unwrap().into_inner().rollout;
    let request = control::WatchRequest { rollout, after: 0 };
    let mut events = client.watch(request).await.unwrap().into_inner();
    assert_eq!(next(&mut events).await.kind(), EventKind::Submitted);
    // Nothing else happens, and that is said.
    while next(&mut events).await.kind() != EventKind::Heartbeat {}
    let begun = std::time::Instant::now();
    assert_eq!(controller.terminate(), Some(0), "{}", place.log());
    assert!(begun.elapsed() < Duration::from_secs(2), "{}", place.log());
    let end = loop {
        match events.message().await {
            Ok(Some(_)) => {}
            other => break other,
        }
    };
    assert_eq!(end.unwrap_err().code(), Code::Unavailable);
}

#[tokio::test]
async fn heartbeats_say_what_is_missing_at_a_gate() {
    let place = Place::new();
    let controller = place.start();
    let mut client = controller.control(&place.operator("dora", &["dba"])).await;
    let mut plan = plan(10).plan().clone();
    let from = BTreeMap::from([("dba".to_owned(), 1), ("qa".to_owned(), 1)]);
    plan.phases[0].stages[0].target = Target::Controller;
    plan.phases[0].stages[0].steps = vec![Step {
        name: None,
        action: Action::GateApproval(Approval {
            from,
            timeout: Period::seconds(600),
            on_timeout: OnTimeout::default(),
            title: Some("Go live".into()),
            lock: Lock::Hold,
        }),
        timeout: Period::seconds(600),
        undo: Undo::Auto,
        line: 1,
    }];
    let plan = seal::seal(plan).unwrap();
    let request = control::SubmitRequest {
        compiled_plan: plan.bytes().to_vec().into(),
        ..control::SubmitRequest::default()
    };
    let rollout = client.submit(request).await.unwrap().into_inner().rollout;
    let request = control::WatchRequest {
        rollout: rollout.clone(),
        after: 0,
    };
    let mut events = client.watch(request).await.unwrap().into_inner();
    let opened = next_of(&mut events, EventKind::GateOpened).await;
    let evidence = opened
        .detail
        .iter()
        .find_map(|line| line.strip_prefix("evidence "));
    let evidence = evidence.expect("evidence").to_owned();
    let beat = next_of(&mut events, EventKind::Heartbeat).await;
    assert_eq!((beat.number, beat.phase.as_str()), (0, "look"));
    assert_eq!(
        (beat.step, beat.action),
        (opened.step.clone(), opened.action)
    );
    assert_eq!(beat.message, "Go live: waiting for 1 of dba, 1 of qa");

    let mut other = controller.control(&place.operator("edna", &["dba"])).await;
    let decision = control::DecideRequest {
        rollout,
        gate: opened.step,
        evidence,
        approve: true,
        ..control::DecideRequest::default()
    };
    let decided = other.decide(decision).await.unwrap().into_inner();
    assert_eq!(decided.missing, "1 of qa");
    next_of(&mut events, EventKind::GateDecided).await;
    let beat = next_of(&mut events, EventKind::Heartbeat).await;
    assert_eq!(beat.message, "Go live: waiting for 1 of qa");
}

#[tokio::test]
async fn a_large_document_reaches_the_command_line() {
    let place = Place::new();
    let identity = place.agent("app-1");
    let controller = place.start();
    let _agent = Agent::connect(&controller, identity, 0).await;
    let mut client = controller.control(&place.operator("dora", &[])).await;
    let request = control::SubmitRequest {
        compiled_plan: plan(11).bytes().to_vec().into(),
        // Each is six characters in a document.
        source: "\u{1}".repeat(1 << 20),
        dry_run: false,
        signatures: vec![],
    };
    let rollout = client.submit(request).await.unwrap().into_inner().rollout;
    let profile = place.path().join("profile.toml");
    let text = format!(
        "controller = \"{}\"\nca = \"ca-controllers.crt\"\n\
         cert = \"operator-dora.crt\"\nkey = \"operator-dora.key\"\n",
        controller.address
    );
    std::fs::write(&profile, text).unwrap();
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_lockstep"));
    command.args(["status", &rollout, "--output", "json"]);
    let shown = command.env("LOCKSTEP_PROFILE", &profile).output().unwrap();
    let words = String::from_utf8_lossy(&shown.stderr);
    assert!(shown.status.success(), "{words}");
    // More than gRPC takes in one message by default.
    assert!(shown.stdout.len() > 6 << 20, "{} bytes", shown.stdout.len());
}

/// Skips events until one of a kind comes.
async fn next_of(
    events: &mut Streaming<control::RolloutEvent>,
    kind: EventKind,
) -> control::RolloutEvent {
    loop {
        let event = next(events).await;
        if event.kind() == kind {
            return event;
        }
    }
}
