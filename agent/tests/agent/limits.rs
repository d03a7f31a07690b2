//! How often and when the policy lets steps begin, over rollouts and restarts.

use std::time::{SystemTime, UNIX_EPOCH};

use lockstep_proto::ids::{Direction, StepKey};
use lockstep_proto::report::{Cause, StepOutcome};
use serde_json::{Value, json};

use crate::support::{Controller, Host, epoch, key, plan, rollout, wait_for};

fn render(value: &str) -> (&'static str, Value) {
    let args = json!({"path": "${host.root}/env", "set": {"A": value}});
    ("env.render", args)
}

fn refused(outcome: StepOutcome) -> String {
    match outcome {
        StepOutcome::Failed(failure) => {
            assert_eq!(failure.cause, Cause::Refused);
            assert!(!failure.changed);
            failure.message
        }
        other => panic!("{other:?} is no refusal"),
    }
}

fn first(number: u8, direction: Direction) -> StepKey {
    key(&rollout(number), 0, direction, 1)
}

#[tokio::test]
async fn a_rate_holds_over_rollouts_and_restarts_and_an_undo_at_any_time() {
    let mut controller = Controller::start().await;
    let mut host = Host::new(&controller, "[[allow]]\naction = 'env.*'\nper_hour = 2\n");
    host.start();
    let mut session = controller.accept(epoch(1), 0).await;
    for number in [1, 2] {
        let plan = plan(&[render(&number.to_string())]);
        session
            .consented(&controller, &rollout(number), &plan)
            .await;
        let key = first(number, Direction::Do);
        session.order(&plan, &key).await;
        let outcome = session.outcome(&key).await;
        assert!(
            matches!(outcome, StepOutcome::Ok { changed: true, .. }),
            "{outcome:?}"
        );
        if number == 2 {
            // Twice within the hour: what was done goes back all the same.
            let undo = first(number, Direction::Undo);
            session.order(&plan, &undo).await;
            let outcome = session.outcome(&undo).await;
            assert!(
                matches!(outcome, StepOutcome::Ok { changed: true, .. }),
                "{outcome:?}"
            );
        }
        session.release(&rollout(number)).await;
        wait_for("release", || {
            let left = std::fs::read_dir(host.path("state/steps")).unwrap().count();
            (left == 0).then_some(())
        })
        .await;
    }
    let env = std::fs::read_to_string(host.path("env")).unwrap();
    assert!(env.contains("A=1"), "{env}");

    host.kill();
    drop(session);
    host.start();
    let mut session = controller.accept(epoch(1), 8).await;
    let plan = plan(&[render("3")]);
    session.consented(&controller, &rollout(3), &plan).await;
    let key = first(3, Direction::Do);
    session.order(&plan, &key).await;
    let why = refused(session.outcome(&key).await);
    assert!(
        why.contains("2 have begun within the hour, 2 may; again from") && why.contains("min"),
        "{why}"
    );
    assert_eq!(std::fs::read_to_string(host.path("env")).unwrap(), env);
}

#[tokio::test]
async fn outside_its_window_a_step_is_refused_with_the_time_and_a_plan_that_never_fits_as_a_whole()
{
    let mut controller = Controller::start().await;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let hour = (now.as_secs() / 3600 + 12) % 24;
    let policy = format!(
        "[[allow]]\naction = 'env.*'\nper_hour = 1\nwindows = [{{ utc = '{hour:02}:00-{hour:02}:59' }}]\n"
    );
    let mut host = Host::new(&controller, &policy);
    host.start();
    let mut session = controller.accept(epoch(1), 0).await;
    let one = plan(&[render("1")]);
    session.consented(&controller, &rollout(1), &one).await;
    let key = first(1, Direction::Do);
    session.order(&one, &key).await;
    let why = refused(session.outcome(&key).await);
    assert!(
        why.contains(&format!("{hour:02}:00-{hour:02}:59 UTC; again from")),
        "{why}"
    );
    assert!(!host.path("env").exists());
    session.release(&rollout(1)).await;

    let two = plan(&[render("1"), render("2")]);
    controller.keep(&two);
    session.offer(&rollout(2), &two, false).await;
    let declined = format!("{:?}", session.report().await);
    assert!(
        declined.contains("once in an hour") && declined.contains("2nd"),
        "{declined}"
    );

    // The same without a controller.
    let file = host.path("plan.json");
    std::fs::write(&file, two.bytes()).unwrap();
    let check = |file: &std::path::Path, time: &str| {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_lockstep-agent"))
            .args(["policy", "check", "--rollout-time", time, "--config"])
            .arg(&host.config)
            .arg(file)
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        (output.status.code(), text)
    };
    let open = format!("2026-11-24T{hour:02}:30Z");
    let (code, text) = check(&file, &open);
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("1 of 2 steps are allowed"), "{text}");
    std::fs::write(&file, one.bytes()).unwrap();
    let (code, text) = check(&file, &open);
    assert_eq!(code, Some(0), "{text}");
    let (code, text) = check(&file, &format!("2026-11-24T{:02}:30Z", (hour + 1) % 24));
    assert_eq!(code, Some(1), "{text}");
    std::fs::write(&file, "{}").unwrap();
    assert_eq!(check(&file, &open).0, Some(2));
}
