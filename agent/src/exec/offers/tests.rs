use std::sync::Arc;

use lockstep_proto::seal::seal;
use lockstep_proto::values::Timestamp;
use lockstep_tests::played::compiled;
use tokio::sync::mpsc;
use tokio::task::LocalSet;

use super::super::look;
use super::*;
use crate::config::{Config, StepRunner};
use crate::testing;

const A: Epoch = Epoch { counter: 1, id: 1 };

fn rollout(byte: u8) -> RolloutId {
    RolloutId::from_random([byte; 6])
}

/// An agent in a session, and a plan for it that changes something.
fn connected(host: &testing::Host, steps: StepRunner) -> (Exec, SealedPlan) {
    let policy = host.path().join("policy.toml");
    std::fs::write(&policy, "[[allow]]\naction = 'env.*'\n").unwrap();
    let config = Config {
        policy: Some(policy),
        labels: [("role".to_owned(), "app".to_owned())].into(),
        steps,
        ..host.config.clone()
    };
    let logs = mpsc::channel(1).0;
    let config = Arc::new(config);
    let mut exec = Exec::open(&config, "/agent.toml".as_ref(), "example.org", logs).unwrap();
    let welcome = lockstep_proto::wire::Welcome {
        version: 1,
        epoch: A,
        clock: Timestamp(1000),
        acknowledged: 0,
        earlier: 0,
    };
    exec.handle_welcome(&welcome, mpsc::channel(9).0).unwrap();
    let args = serde_json::json!({"path": host.path().join("env"), "set": {"A": "1"}});
    let plan = seal(compiled(&[("env.render", args)])).unwrap();
    plans::store(&config.state_dir, plan.digest(), plan.bytes(), None).unwrap();
    (exec, plan)
}

fn offer(byte: u8, plan: &SealedPlan, dry_run: bool) -> Offer {
    Offer {
        rollout: rollout(byte),
        plan: plan.digest(),
        epoch: A,
        dry_run,
        signatures: vec![],
        round: 0,
    }
}

fn last_report(exec: &Exec) -> ReportBody {
    let (_, position) = *exec.memory.outstanding.back().expect("it has reported");
    match exec.journal.read(position).unwrap() {
        Record::Report { body, .. } => body,
        other => panic!("{other:?}"),
    }
}

/// Takes what the next task has found out.
async fn gathered(exec: &mut Exec) {
    let event = exec.events.recv().await.unwrap();
    exec.handle_event(event).unwrap();
}

#[tokio::test]
async fn whoever_offers_and_takes_back_has_the_host_look_at_a_few_things_at_a_time() {
    let host = testing::Host::new();
    let (mut exec, plan) = connected(&host, StepRunner::Session);
    let local = LocalSet::new();
    local
        .run_until(async {
            for number in 0..40 {
                exec.handle_offer(offer(number, &plan, true)).unwrap();
                exec.handle_release(rollout(number), A).unwrap();
            }
            assert_eq!((exec.gathering, exec.memory.last_report), (AWAITING, 24));
            let declined = format!("{:?}", last_report(&exec));
            assert!(declined.contains("too many plans"), "{declined}");
            for _ in 0..AWAITING {
                gathered(&mut exec).await;
            }
            assert_eq!(exec.memory.last_report, 24, "they were taken back");
            exec.handle_offer(offer(50, &plan, true)).unwrap();
            gathered(&mut exec).await;
            let consented = last_report(&exec);
            assert!(
                matches!(consented, ReportBody::Consented { .. }),
                "there is room again: {consented:?}"
            );
        })
        .await;
}

#[tokio::test]
async fn consent_to_a_round_tells_of_what_was_there_then() {
    let host = testing::Host::new();
    let (mut exec, plan) = connected(&host, StepRunner::Session);
    let local = LocalSet::new();
    local
        .run_until(async {
            let later = Offer {
                round: 1,
                ..offer(1, &plan, false)
            };
            exec.handle_offer(offer(1, &plan, false)).unwrap();
            exec.handle_offer(later).unwrap();
            let begun = exec.memory.last_report;
            gathered(&mut exec).await;
            assert_eq!(
                exec.memory.last_report, begun,
                "INV-6: it is an older state"
            );
            gathered(&mut exec).await;
            match last_report(&exec) {
                ReportBody::Consented { round: 1, .. } => {}
                other => panic!("{other:?}"),
            }
        })
        .await;
}

#[tokio::test]
async fn a_survey_that_is_repeated_is_answered_once() {
    let host = testing::Host::new();
    let (mut exec, plan) = connected(&host, StepRunner::Session);
    let local = LocalSet::new();
    local
        .run_until(async {
            exec.handle_offer(offer(1, &plan, false)).unwrap();
            gathered(&mut exec).await;
            assert!(exec.memory.hold.is_some());
            let begun = exec.memory.last_report;
            for _ in 0..40 {
                exec.handle_survey(rollout(1), A).unwrap();
            }
            gathered(&mut exec).await;
            assert!(exec.surveying.is_empty());
            assert_eq!(exec.memory.last_report, begun + 1);
            let surveyed = last_report(&exec);
            assert!(matches!(surveyed, ReportBody::Surveyed { .. }));

            // What is there now was asked for after something had happened.
            exec.handle_survey(rollout(1), A).unwrap();
            let other = offer(2, &plan, false);
            exec.handle_offer(other).unwrap();
            exec.handle_survey(rollout(1), A).unwrap();
            gathered(&mut exec).await;
            let declined = last_report(&exec);
            assert!(matches!(declined, ReportBody::Declined { .. }), "INV-6");
            gathered(&mut exec).await;
            assert_eq!(exec.memory.last_report, begun + 3);
            assert!(exec.surveying.is_empty());
            // A host that has let go says so at once.
            exec.handle_survey(rollout(1), A).unwrap();
            exec.handle_release(rollout(1), A).unwrap();
            exec.handle_survey(rollout(1), A).unwrap();
            assert!(format!("{:?}", last_report(&exec)).contains(HOLDS_NOT));
        })
        .await;
}

#[tokio::test]
async fn looks_of_surveys_and_dry_runs_wait_for_their_turn() {
    let host = testing::Host::new();
    let (mut exec, plan) = connected(&host, StepRunner::Session);
    let local = LocalSet::new();
    local
        .run_until(async {
            exec.handle_offer(offer(1, &plan, false)).unwrap();
            gathered(&mut exec).await;
        })
        .await;
    drop(exec);
    let (mut exec, plan) = connected(&host, StepRunner::Systemd);
    let crowd = look::crowd();
    let said = async |exec: &mut Exec| {
        gathered(exec).await;
        format!("{:?}", last_report(exec))
    };
    local
        .run_until(async {
            exec.handle_survey(rollout(1), A).unwrap();
            let surveyed = said(&mut exec).await;
            assert!(surveyed.contains("wait already"), "{surveyed}");
            exec.handle_offer(offer(2, &plan, true)).unwrap();
            let declined = said(&mut exec).await;
            assert!(declined.contains("wait already"), "{declined}");
            drop(crowd);
        })
        .await;
}
