//! Who goes on where two controllers could (INV-4): take-over, copies of one state, backups, a
//! controller that was stopped and wakes up; and what happens on a full disk.

#[allow(dead_code, reason = "other tests of this crate use the rest of it")]
#[path = "support/agent.rs"]
mod agent;
#[allow(dead_code, reason = "other tests of this crate use the rest of it")]
mod support;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use agent::{Agent, plan};
use lockstep_proto::report::ReportBody;
use lockstep_proto::wire::agent_v1::{Epoch, Hello};
use lockstep_proto::wire::control_v1 as control;
use lockstep_tests::disk::SmallDisk;
use rustix::process::Signal;
use support::{Controller, Identity, Place, SOON, hello};
use tonic::Code;

/// Longer than a second: terms that take over in one second could be the same.
const LATER: Duration = Duration::from_millis(1100);

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// The same installation on another machine: certificates, configuration, and a copy of the state.
fn copy_of(place: &Place) -> Place {
    let dir = tempfile::tempdir().unwrap();
    copy(place.path(), dir.path());
    Place { dir }
}

fn known(highest: Epoch, reports: u64) -> Hello {
    let mut hello = hello("app-1");
    hello.labels.insert("role".to_owned(), "app".to_owned());
    hello.highest_epoch = Some(highest);
    (hello.last_report, hello.acknowledged) = (reports, reports);
    hello
}

async fn submit(controller: &Controller, operator: &Identity, serial: u64) -> String {
    let mut client = controller.control(operator).await;
    let request = control::SubmitRequest {
        compiled_plan: plan(serial).bytes().to_vec().into(),
        ..control::SubmitRequest::default()
    };
    client.submit(request).await.unwrap().into_inner().rollout
}

async fn state(controller: &Controller, operator: &Identity, rollout: &str) -> serde_json::Value {
    let mut client = controller.control(operator).await;
    let rollout = rollout.to_owned();
    let request = control::GetRolloutRequest { rollout };
    let found = client.get_rollout(request).await.unwrap().into_inner();
    serde_json::from_slice(&found.document_json).unwrap()
}

async fn wait_for_state(
    controller: &Controller,
    operator: &Identity,
    rollout: &str,
    wanted: &str,
) -> serde_json::Value {
    let deadline = Instant::now() + SOON;
    loop {
        let found = state(controller, operator, rollout).await;
        if found["state"] == wanted {
            return found;
        }
        assert!(Instant::now() < deadline, "not {wanted}: {found:#}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn a_stopped_controller_that_wakes_up_beside_its_successor_does_nothing_more() {
    let place = Place::new();
    let operator = place.operator("olga", &[]);
    let identity = place.agent("app-1");
    let mut old = place.start();
    let mut agent = Agent::connect(&old, identity.clone(), 0).await;
    let first = agent.session.epoch;
    let rollout = submit(&old, &operator, 1).await;
    agent.consent(&old, &plan(1)).await;
    let key = agent.order().await;
    agent.report(ReportBody::Started { key: key.clone() }).await;

    old.signal(Signal::STOP);
    let next = copy_of(&place);
    let successor = next.start_with(&["--take-over"]);
    let mut elsewhere =
        Agent::introduce(&successor, identity.clone(), known(first, agent.reported))
            .await
            .unwrap();
    let second = elsewhere.session.epoch;
    assert!(second.counter > first.counter + 1_000_000, "{second:?}");
    // The running step is asked for again, and no attempt is given twice.
    assert_eq!(elsewhere.order().await, key);
    elsewhere.finish(key).await;
    let then = elsewhere.order().await;
    assert_eq!((then.at.step, then.attempt), (1, 1));

    old.signal(Signal::CONT);
    // The session that it had was never closed: an order would come through here.
    let quiet = tokio::time::timeout(Duration::from_secs(3), agent.next()).await;
    assert!(quiet.is_err(), "the old one says {quiet:?}");
    let met = known(second, elsewhere.reported);
    assert!(Agent::introduce(&old, identity, met).await.is_err());
    assert_eq!(old.wait(), Some(12), "{}", place.log());
    for words in ["took over", "sends nothing more", "--take-over"] {
        assert!(place.log().contains(words), "{words}: {}", place.log());
    }

    elsewhere.finish(then).await;
    wait_for_state(&successor, &operator, &rollout, "succeeded").await;
}

#[tokio::test]
async fn of_two_controllers_from_one_copy_an_agent_obeys_the_first_and_both_are_told() {
    let place = Place::new();
    place.start().terminate();
    let other = copy_of(&place);
    let (mut one, mut two) = (place.start(), other.start());
    let fleet = ["app-1", "app-2", "app-3", "app-4"].map(|name| (name, place.agent(name)));
    let (mine, others) = fleet.split_at(2);
    let mut obeyed = Vec::new();
    for (controller, hosts) in [(&one, mine), (&two, others)] {
        for (name, identity) in hosts {
            let session = controller.session(identity, hello(name)).await.unwrap();
            obeyed.push(session.epoch);
        }
    }
    assert_eq!(obeyed[0].counter, obeyed[2].counter);
    assert_ne!(obeyed[0].id, obeyed[2].id);

    for (controller, hosts, epoch) in [(&two, mine, obeyed[0]), (&one, others, obeyed[2])] {
        for (name, identity) in hosts {
            let mut met = hello(name);
            met.highest_epoch = Some(epoch);
            assert!(controller.session(identity, met).await.is_err());
        }
    }
    for (controller, place) in [(&mut one, &place), (&mut two, &other)] {
        assert_eq!(controller.wait(), Some(12), "{}", place.log());
        assert!(
            place.log().contains("copies of one state"),
            "{}",
            place.log()
        );
    }
}

#[tokio::test]
async fn of_two_controllers_that_take_over_the_later_one_wins_for_good() {
    let place = Place::new();
    let agent = place.agent("app-1");
    let begun = place.start();
    let first = begun.session(&agent, hello("app-1")).await.unwrap().epoch;
    begun.kill();
    let other = copy_of(&place);

    let mut one = place.start_with(&["--take-over"]);
    let of_one = one.session(&agent, known(first, 0)).await.unwrap().epoch;
    tokio::time::sleep(LATER).await;
    let two = other.start_with(&["--take-over"]);
    let of_two = two.session(&agent, known(of_one, 0)).await.unwrap().epoch;
    assert!(of_two.counter > of_one.counter);
    // The one that lost does not step over again: it ends, and so it does when it is started.
    assert!(one.session(&agent, known(of_two, 0)).await.is_err());
    assert_eq!(one.wait(), Some(12), "{}", place.log());
    let mut again = place.start();
    assert!(again.session(&agent, known(of_two, 0)).await.is_err());
    assert_eq!(again.wait(), Some(12), "{}", place.log());
    two.session(&agent, known(of_two, 0)).await.unwrap();
    // Nobody has to say it again.
    two.kill();
    let two = other.start();
    let later = two.session(&agent, known(of_two, 0)).await.unwrap().epoch;
    assert_eq!(later.counter, of_two.counter + 1);
}

#[tokio::test]
async fn an_older_state_is_refused_and_with_take_over_it_names_what_it_lacks() {
    let place = Place::new();
    let (identity, other) = (place.agent("app-1"), place.agent("app-2"));
    let controller = place.start();
    let mut agent = Agent::connect(&controller, identity.clone(), 0).await;
    let first = agent.session.epoch;
    let mut second_host = hello("app-2");
    second_host.highest_epoch = Some(first);
    controller
        .session(&other, second_host.clone())
        .await
        .unwrap();
    let backup = copy_of(&place);
    let operator = place.operator("olga", &[]);
    let rollout = submit(&controller, &operator, 1).await;
    agent.consent(&controller, &plan(1)).await;
    let key = agent.order().await;
    agent.report(ReportBody::Started { key: key.clone() }).await;
    agent.finish(key).await;
    let reported = agent.reported;
    assert_eq!(reported, 3);
    controller.kill();

    // Its term would be above the one that it was copied in: only what agents were told shows it.
    let mut restored = backup.start();
    let mut also = second_host.clone();
    (also.last_report, also.acknowledged) = (5, 5);
    // One host alone may lie.
    assert!(restored.session(&other, also).await.is_err());
    assert!(
        restored
            .session(&identity, known(first, reported))
            .await
            .is_err()
    );
    assert_eq!(restored.wait(), Some(10), "{}", backup.log());
    for words in ["app-1 was told", "older copy", "up to 3", "--take-over"] {
        assert!(backup.log().contains(words), "{words}: {}", backup.log());
    }

    let restored = backup.start_with(&["--take-over"]);
    let mut held = known(first, reported);
    held.held_rollout.clone_from(&rollout);
    let mut agent = Agent::introduce(&restored, identity.clone(), held)
        .await
        .unwrap();
    assert_eq!(
        agent.session.acknowledged, reported,
        "what is lost is skipped"
    );
    for words in [
        "reports of this host are lost",
        "from=1",
        "to=3",
        rollout.as_str(),
    ] {
        assert!(backup.log().contains(words), "{words}: {}", backup.log());
    }
    // The host is freed of a rollout that nobody knows any more, and its next report counts.
    assert!(matches!(
        agent.next().await,
        lockstep_proto::wire::agent_v1::down::Message::Cancel(_)
    ));
    let taken_over = agent.session.epoch;
    let again = submit(&restored, &operator, 2).await;
    let lockstep_proto::wire::agent_v1::down::Message::Release(_) = agent.next().await else {
        panic!("the hold is not freed");
    };
    agent.consent(&restored, &plan(2)).await;
    for _ in 0..2 {
        let key = agent.order().await;
        agent.finish(key).await;
    }
    wait_for_state(&restored, &operator, &again, "succeeded").await;
    restored.kill();

    // A host that comes later, after a plain start, has lost its reports in the same way; one that
    // has obeyed this controller has not.
    let mut restored = backup.start();
    (second_host.last_report, second_host.acknowledged) = (5, 5);
    let session = restored.session(&other, second_host.clone()).await;
    assert_eq!(session.unwrap().acknowledged, 5);
    second_host.highest_epoch = Some(taken_over);
    (second_host.last_report, second_host.acknowledged) = (6, 6);
    let more = agent.reported + 1;
    assert!(restored.session(&other, second_host).await.is_err());
    assert!(
        restored
            .session(&identity, known(taken_over, more))
            .await
            .is_err()
    );
    assert_eq!(restored.wait(), Some(10), "{}", backup.log());
}

#[tokio::test]
async fn one_host_that_lies_stops_nobody() {
    let place = Place::new();
    let admin = place.admin();
    let (thief, honest) = (place.agent("app-1"), place.agent("app-2"));
    let controller = place.start();
    let first = controller.session(&thief, hello("app-1")).await.unwrap();
    controller.session(&honest, hello("app-2")).await.unwrap();
    let above = |counter| Epoch { counter, id: 1 };
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let now = now.unwrap().as_secs();
    let lies = [
        known(above(first.epoch.counter + 1), 0),
        known(above(first.epoch.counter), 0),
        known(above(now), 0),
        known(above(u64::MAX), 0),
        known(first.epoch, 1_000_000_000),
        known(first.epoch, u64::MAX),
    ];
    for lie in &lies {
        let refused = controller.session(&thief, lie.clone()).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused:?}");
    }
    for words in ["one host alone", "which no controller can have told it"] {
        assert!(place.log().contains(words), "{words}: {}", place.log());
    }
    // Everybody else goes on, and there is somebody to ask for a suspension.
    controller.session(&honest, hello("app-2")).await.unwrap();
    let suspend = control::SuspendRequest {
        subject: "host:app-1".to_owned(),
        reason: "stolen".to_owned(),
    };
    let mut client = controller.control(&admin).await;
    client.suspend(suspend).await.unwrap();
    // What a suspended host has said counts no more: this is the only one that says so.
    let third = place.agent("app-3");
    let mut lie = hello("app-3");
    lie.highest_epoch = Some(above(now));
    controller.session(&third, lie.clone()).await.unwrap_err();
    controller.session(&honest, hello("app-2")).await.unwrap();

    // Nor does one stop a controller that took over, and skips what hosts say they were told.
    controller.kill();
    let controller = place.start_with(&["--take-over"]);
    lie.highest_epoch = None;
    (lie.last_report, lie.acknowledged) = (u64::MAX, u64::MAX);
    controller.session(&third, lie).await.unwrap_err();
    controller.session(&third, hello("app-3")).await.unwrap();
    controller.session(&honest, hello("app-2")).await.unwrap();
}

#[tokio::test]
async fn an_agent_that_served_another_controller_is_refused_and_ends_nobody() {
    let place = Place::new();
    let controller = place.start();
    let identity = place.agent("app-1");
    let refused = controller
        .session(&identity, known(Epoch::default(), 9))
        .await;
    let refused = refused.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused:?}");
    assert!(refused.message().contains("--take-over"), "{refused:?}");
    let operator = place.operator("olga", &[]);
    controller.control(&operator).await;
    controller.session(&identity, hello("app-1")).await.unwrap();
}

#[tokio::test]
async fn on_a_full_disk_running_steps_are_recorded_and_nothing_new_begins() {
    let place = Place::new();
    let Some(disk) = SmallDisk::mount(place.path().join("state"), 96) else {
        return;
    };
    let operator = place.operator("olga", &[]);
    let identity = place.agent("app-1");
    let controller = place.start();
    let mut agent = Agent::connect(&controller, identity.clone(), 0).await;
    let rollout = submit(&controller, &operator, 1).await;
    agent.consent(&controller, &plan(1)).await;
    let key = agent.order().await;
    agent.report(ReportBody::Started { key: key.clone() }).await;

    disk.fill(0);
    agent.finish(key).await;
    let found = wait_for_state(&controller, &operator, &rollout, "paused").await;
    let said = found.to_string();
    assert!(
        said.contains("the disk of its state directory is full"),
        "{found:#}"
    );
    let mut client = controller.control(&operator).await;
    let refused = client
        .submit(control::SubmitRequest {
            compiled_plan: plan(2).bytes().to_vec().into(),
            dry_run: true,
            signatures: vec![],
            ..control::SubmitRequest::default()
        })
        .await
        .unwrap_err();
    assert!(refused.message().contains("disk"), "{refused:?}");
    for failed in [false, true] {
        let rollout = rollout.clone();
        let resume = control::ResumeRequest { rollout, failed };
        let refused = client.resume(resume).await.unwrap_err();
        assert!(refused.message().contains("make room"), "{refused:?}");
    }
    let quiet = tokio::time::timeout(Duration::from_secs(2), agent.next()).await;
    assert!(
        quiet.is_err(),
        "an order without room for its report: {quiet:?}"
    );

    // A restart on the full disk goes on the same way.
    let reported = agent.reported;
    let epoch = agent.session.epoch;
    controller.kill();
    let controller = place.start();
    let mut agent = Agent::introduce(&controller, identity, known(epoch, reported))
        .await
        .unwrap();
    let quiet = tokio::time::timeout(Duration::from_secs(2), agent.next()).await;
    assert!(
        quiet.is_err(),
        "an order without room for its report: {quiet:?}"
    );

    disk.free();
    let key = agent.order().await;
    assert_eq!((key.at.step, key.attempt), (1, 1));
    agent.finish(key).await;
    let found = wait_for_state(&controller, &operator, &rollout, "succeeded").await;
    assert!(found.to_string().contains("goes on by itself"), "{found:#}");
    assert_eq!(controller.terminate(), Some(0));
}
