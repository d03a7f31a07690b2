//! A controller in a thief's hands against a host that asks for sealed plans.

use std::path::Path;

use lockstep_proto::evidence;
use lockstep_proto::floor::{self, Floor, OTHERS, STATEMENT};
use lockstep_proto::ids::{Direction, Epoch, InstanceId, RolloutId, StepKey};
use lockstep_proto::order::{Binding, Fact};
use lockstep_proto::plan::CompiledPlan;
use lockstep_proto::report::{Failure, ReportBody, StepOutcome};
use lockstep_proto::seal::{self, SealedPlan};
use lockstep_proto::sshsig::SigningKey;
use lockstep_proto::values::Timestamp;
use serde_json::json;

use crate::support::{Controller, HOST, Host, Session, epoch, key, plan, rollout, wait_for};

fn signer(seed: u8) -> SigningKey {
    SigningKey::from_seed(&[seed; 32])
}

fn policy(seeds: &[u8]) -> String {
    let line = |seed: &u8| format!("'{} signer-{seed}'", signer(*seed).public());
    let keys: Vec<String> = seeds.iter().map(line).collect();
    format!(
        "[seal]\nfleet = 'prod'\nthreshold = 2\nkeys = [{}]\n[[allow]]\naction = 'exec.run'\n",
        keys.join(", ")
    )
}

/// A plan of two commands, each of which leaves a line on the host.
fn two_lines() -> SealedPlan {
    let append = |line: &str| {
        let script = format!("import sys; open(sys.argv[1], 'a').write('{line}\\n')");
        let argv = json!(["python3", "-c", script, "${host.root}/effects"]);
        ("exec.run", json!({"name": line, "argv": argv}))
    };
    plan(&[append("one"), append("two")])
}

fn with(change: impl FnOnce(&mut CompiledPlan)) -> SealedPlan {
    let mut plan = two_lines().plan().clone();
    plan.fleet_name = "prod".into();
    change(&mut plan);
    seal::seal(plan).unwrap()
}

fn serial(serial: u64) -> SealedPlan {
    with(|plan| plan.serial = serial)
}

fn sign(plan: &SealedPlan, seeds: &[u8]) -> Vec<String> {
    let message = seal::message(plan.digest());
    let sign = |seed: &u8| signer(*seed).sign(seal::NAMESPACE, message.as_bytes());
    seeds.iter().map(sign).collect()
}

fn effects(host: &Host) -> String {
    std::fs::read_to_string(host.path("effects")).unwrap_or_default()
}

async fn offer(
    controller: &Controller,
    session: &mut Session,
    rollout: &RolloutId,
    plan: &SealedPlan,
    signatures: Vec<String>,
) -> Result<(), String> {
    controller.keep(plan);
    session
        .offer_signed(rollout, plan.digest(), signatures, false)
        .await;
    match session.report().await {
        ReportBody::Consented { .. } => Ok(()),
        ReportBody::Declined { refusals, .. } => {
            let reasons: Vec<String> = refusals.into_iter().map(|it| it.reason).collect();
            Err(reasons.join("; "))
        }
        other => panic!("{other:?}"),
    }
}

fn do_key(of: u8, step: u16) -> StepKey {
    key(&rollout(of), step, Direction::Do, 1)
}

fn failed(outcome: StepOutcome) -> Failure {
    match outcome {
        StepOutcome::Failed(failure) => failure,
        other => panic!("{other:?} is no failure"),
    }
}

#[tokio::test]
async fn whoever_holds_the_controller_gets_no_consent_without_the_seal() {
    let mut controller = Controller::start().await;
    let mut host = Host::new(&controller, &policy(&[1, 2, 3]));
    host.start();
    let mut session = controller.accept(epoch(1), 0).await;
    let five = serial(5);

    let mut flipped = sign(&five, &[1, 2]);
    let middle = flipped[1].len() / 2;
    let other = if flipped[1].as_bytes()[middle] == b'A' {
        "B"
    } else {
        "A"
    };
    flipped[1].replace_range(middle..=middle, other);
    let elsewhere = with(|plan| {
        plan.serial = 5;
        plan.fleet_name = "test".into();
    });
    let longer = with(|plan| {
        plan.serial = 5;
        plan.expires = Timestamp(plan.expires.0 + 1);
    });
    let expired = with(|plan| plan.expires = Timestamp(1_000));
    let purpose = signer(2).sign("lockstep-floor", seal::message(five.digest()).as_bytes());
    let cases = [
        (&five, vec![], "0 of 2 signatures"),
        (&five, sign(&five, &[1]), "1 of 2 signatures"),
        (&five, sign(&five, &[1, 1]), "another one by signer-1"),
        (&five, sign(&five, &[1, 9]), "not trusted"),
        (&five, flipped, "not counted: signature 2"),
        (
            &five,
            vec![sign(&five, &[1]).remove(0), purpose],
            "was made for",
        ),
        (&elsewhere, sign(&elsewhere, &[1, 2]), "of the fleet `test`"),
        (
            &longer,
            sign(&five, &[1, 2]),
            "does not match what was signed",
        ),
        (&expired, sign(&expired, &[1, 2]), "expired"),
    ];
    for (plan, signatures, words) in cases {
        let refused = offer(&controller, &mut session, &rollout(1), plan, signatures).await;
        let why = refused.expect_err(words);
        assert!(why.contains(words), "{words}: {why}");
        // An order has nothing to point into.
        session.order(plan, &do_key(1, 0)).await;
        let refused = failed(session.outcome(&do_key(1, 0)).await);
        assert!(
            refused.message.contains("holds for no rollout"),
            "{refused:?}"
        );
    }
    assert_eq!(effects(&host), "");

    // Two of three are enough, whoever they are.
    offer(
        &controller,
        &mut session,
        &rollout(1),
        &five,
        sign(&five, &[3, 2]),
    )
    .await
    .unwrap();
    session.order(&five, &do_key(1, 0)).await;
    assert!(matches!(
        session.outcome(&do_key(1, 0)).await,
        StepOutcome::Ok { .. }
    ));
    assert_eq!(effects(&host), "one\n");
    session.release(&rollout(1)).await;

    // Neither again, nor for another rollout, nor anything older; also after a restart.
    for restarted in [false, true] {
        if restarted {
            host.kill();
            drop(session);
            host.start();
            session = controller.accept_all(epoch(1)).await;
        }
        let four = serial(4);
        for (of, plan, words) in [
            (1, &five, "has ended on this host"),
            (2, &five, "has licensed ro_01"),
            (2, &four, "none of `test` below 5"),
        ] {
            let signatures = sign(plan, &[1, 2]);
            session
                .offer_signed(&rollout(of), plan.digest(), signatures.clone(), true)
                .await;
            let dry = session.report().await;
            let declined = matches!(dry, ReportBody::Declined { .. });
            assert!(declined, "a dry run is verified, too: {dry:?}");
            let refused = offer(&controller, &mut session, &rollout(of), plan, signatures).await;
            let why = refused.expect_err(words);
            assert!(why.contains(words), "{words}: {why}");
        }
    }
    let six = serial(6);
    offer(
        &controller,
        &mut session,
        &rollout(3),
        &six,
        sign(&six, &[1, 2]),
    )
    .await
    .unwrap();
    assert_eq!(effects(&host), "one\n");
}

#[tokio::test]
async fn steps_are_taken_from_a_plan_whose_seal_holds_now() {
    let mut controller = Controller::start().await;
    let mut host = Host::new(&controller, &policy(&[1, 2, 3]));
    host.start();
    let mut session = controller.accept(epoch(1), 0).await;
    let five = serial(5);
    offer(
        &controller,
        &mut session,
        &rollout(1),
        &five,
        sign(&five, &[1, 2]),
    )
    .await
    .unwrap();
    session.order(&five, &do_key(1, 0)).await;
    assert!(matches!(
        session.outcome(&do_key(1, 0)).await,
        StepOutcome::Ok { .. }
    ));

    // A signer who is not trusted any more.
    let repair = |seeds: &[u8]| std::fs::write(host.path("policy.toml"), policy(seeds)).unwrap();
    repair(&[2, 3]);
    session.order(&five, &do_key(1, 1)).await;
    let refused = failed(session.outcome(&do_key(1, 1)).await);
    assert!(
        refused.message.contains("1 of 2 signatures (by signer-2)"),
        "{refused:?}"
    );
    repair(&[1, 2, 3]);

    // The stored plan is gone: what cannot be verified again is not run.
    host.kill();
    drop(session);
    let stored = host
        .path("state/plans")
        .join(format!("{}.json", five.digest().hex()));
    let bytes = std::fs::read(&stored).unwrap();
    std::fs::remove_file(&stored).unwrap();
    host.start();
    let mut session = controller.accept_all(epoch(1)).await;
    let again = key(&rollout(1), 1, Direction::Do, 2);
    session.order(&five, &again).await;
    let refused = failed(session.outcome(&again).await);
    assert!(refused.message.contains("0 of 2 signatures"), "{refused:?}");
    assert!(host.log().contains("count as not sealed"));

    // With it, the rollout goes on after a restart.
    host.kill();
    drop(session);
    std::fs::write(&stored, bytes).unwrap();
    host.start();
    let mut session = controller.accept_all(epoch(1)).await;
    let again = key(&rollout(1), 1, Direction::Do, 3);
    session.order(&five, &again).await;
    assert!(matches!(
        session.outcome(&again).await,
        StepOutcome::Ok { .. }
    ));
    assert_eq!(effects(&host), "one\ntwo\n");
}

fn statement(instance: &InstanceId, serials: &[(&str, u64)]) -> Floor {
    Floor {
        statement: STATEMENT.into(),
        fleet: "prod".into(),
        host: HOST.parse().unwrap(),
        instance: instance.clone(),
        serials: serials
            .iter()
            .map(|(plan, from)| ((*plan).into(), *from))
            .collect(),
        expires: Timestamp(u64::from(u32::MAX) * 1000),
    }
}

/// Runs `anchor`; its exit code and what it says.
fn anchor(host: &Host, floor: &[u8], signatures: &str) -> (Option<i32>, String) {
    let write = |name: &str, bytes: &[u8]| {
        let path = host.path(name);
        std::fs::write(&path, bytes).unwrap();
        path
    };
    let (floor, sig) = (
        write("floor.json", floor),
        write("floor.json.sig", signatures.as_bytes()),
    );
    let output = host
        .command("anchor")
        .args([Path::new("--floor"), &floor, Path::new("--sig"), &sig])
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    (output.status.code(), said)
}

fn sign_floor(floor: &[u8], seeds: &[u8]) -> String {
    let sign = |seed: &u8| signer(*seed).sign(floor::NAMESPACE, floor);
    seeds.iter().map(sign).collect()
}

#[tokio::test]
async fn a_host_that_lost_its_journal_waits_for_a_signed_floor() {
    const TERM: Epoch = Epoch { counter: 1, id: 77 };
    let mut controller = Controller::start().await;
    let mut host = Host::new(&controller, &policy(&[1, 2, 3]));
    host.start();
    // It is new, and the controller has had reports of an agent of this host.
    let mut session = controller.accept_anew(TERM, 7).await;
    let instance = session.hello.instance.clone();
    assert!(session.next().await.is_none());
    // It stays so, whatever a controller says later.
    let mut session = controller.accept(TERM, 0).await;
    assert!(session.next().await.is_none());
    host.stop();
    let floor = statement(&instance, &[("test", 7)]).encode();
    let (code, said) = anchor(&host, &floor, &sign_floor(&floor, &[1, 3]));
    assert_eq!(code, Some(0), "{said}");
    host.start();
    let mut session = controller.accept_anew(TERM, 7).await;
    for (number, taken) in [(6, false), (7, true)] {
        let plan = serial(number);
        let signed = sign(&plan, &[1, 2]);
        let offered = offer(&controller, &mut session, &rollout(1), &plan, signed).await;
        assert_eq!(offered.is_ok(), taken, "{number}: {offered:?}");
    }
}

#[tokio::test]
async fn a_host_that_was_put_back_waits_for_a_signed_floor() {
    const TERM: Epoch = Epoch { counter: 1, id: 77 };
    let mut controller = Controller::start().await;
    let mut host = Host::new(&controller, &policy(&[1, 2, 3]));
    host.start();
    let mut session = controller.accept(TERM, 0).await;
    let instance = session.hello.instance.clone();
    let five = serial(5);
    offer(
        &controller,
        &mut session,
        &rollout(1),
        &five,
        sign(&five, &[1, 2]),
    )
    .await
    .unwrap();
    drop(session);

    // The controller has had more reports than the journal knows of.
    let ended = controller.accept(TERM, 50).await.next().await;
    assert!(ended.is_none(), "{ended:?}");
    wait_for("the quarantine", || {
        host.log().contains("--instance").then_some(())
    })
    .await;
    assert_eq!(host.stop(), Some(0));

    // That stays, whatever a controller says later.
    host.start();
    let mut session = controller.accept(TERM, 1).await;
    session.order(&five, &do_key(1, 0)).await;
    assert!(session.next().await.is_none());
    assert_eq!(
        anchor(&host, b"", "").0,
        Some(3),
        "not while the agent runs"
    );
    host.stop();

    let floor = statement(&instance, &[("test", 7), (OTHERS, 100)]).encode();
    let both = sign_floor(&floor, &[1, 3]);
    let foreign = statement(&InstanceId::from_random([9; 8]), &[(OTHERS, 1)]).encode();
    let expired = Floor {
        expires: Timestamp(5),
        ..statement(&instance, &[])
    };
    let expired = expired.encode();
    for (floor, signatures, words) in [
        (&floor, sign_floor(&floor, &[1]), "1 of 2 signatures"),
        (&floor, sign_floor(&foreign, &[1, 2]), "0 of 2 signatures"),
        (&foreign, sign_floor(&foreign, &[1, 2]), "for the instance"),
        (&expired, sign_floor(&expired, &[1, 2]), "expired"),
        (&[&floor[..], b" "].concat(), both.clone(), "canonical"),
    ] {
        let (code, said) = anchor(&host, floor, &signatures);
        assert_eq!(code, Some(2), "{said}");
        assert!(said.contains(words), "{words}: {said}");
    }
    host.start();
    assert!(controller.accept(TERM, 1).await.next().await.is_none());
    host.stop();

    let (code, said) = anchor(&host, &floor, &both);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("signer-1, signer-3"), "{said}");
    let (code, said) = anchor(&host, &floor, &both);
    assert_eq!(code, Some(2), "a floor serves once: {said}");
    host.start();
    let mut session = controller.accept(TERM, 0).await;
    assert_ne!(session.hello.instance, instance);
    assert_eq!(
        (session.hello.last_report, session.hello.acknowledged),
        (0, 0)
    );
    assert_eq!(
        session.hello.held_rollout, None,
        "what was held before is over"
    );
    let new = |serial| {
        with(|plan| {
            plan.plan = "new".into();
            plan.serial = serial;
        })
    };
    for (of, plan, words) in [
        (3, five, "below 100"),
        (2, serial(99), "below 100"),
        (2, new(99), "below 100"),
    ] {
        let signatures = sign(&plan, &[1, 2]);
        let refused = offer(&controller, &mut session, &rollout(of), &plan, signatures).await;
        assert!(
            refused.as_ref().is_err_and(|why| why.contains(words)),
            "{refused:?}"
        );
    }
    let next = new(100);
    offer(
        &controller,
        &mut session,
        &rollout(2),
        &next,
        sign(&next, &[1, 2]),
    )
    .await
    .unwrap();
}

#[tokio::test]
async fn nothing_is_taken_from_an_order_that_nobody_has_signed() {
    let mut controller = Controller::start().await;
    let key_of_db = signer(8).public();
    let policy = format!(
        "bindings = 'signed'\n[[evidence]]\nhost = 'db-1'\nkey = '{key_of_db}'\n[[allow]]\naction = \
         'exec.run'\n"
    );
    let mut host = Host::new(&controller, &policy);
    host.start();
    let mut session = controller.accept(epoch(1), 0).await;
    let plan = two_lines();
    session.consented(&controller, &rollout(1), &plan).await;
    let bound = |from: &str, signature: Option<String>| Binding {
        origin: StepKey {
            host: from.parse().unwrap(),
            ..do_key(1, 0)
        },
        fact: Fact::Fenced {
            database: "sales".into(),
            fence: "t".into(),
        },
        signature,
    };
    let sign = |seed: u8| {
        let binding = bound("db-1", None);
        let statement = evidence::statement(plan.digest(), &binding.origin, &binding.fact);
        let signature = signer(seed).sign_bare(evidence::NAMESPACE, &statement);
        Some(hex::encode(signature))
    };
    for (attempt, binding, words) in [
        (1, bound("db-1", None), "not signed by its host"),
        (2, bound("db-1", sign(9)), "not what db-1 has signed"),
        (3, bound("db-2", sign(8)), "`[[evidence]]` for db-2"),
        (4, bound(HOST, sign(8)), "not what app-1 has signed"),
    ] {
        let of = key(&rollout(1), 0, Direction::Do, attempt);
        session.order_with(&plan, &of, vec![binding]).await;
        let refused = failed(session.outcome(&of).await);
        assert!(refused.message.contains(words), "{words}: {refused:?}");
    }
    assert_eq!(effects(&host), "");
    let of = key(&rollout(1), 0, Direction::Do, 5);
    session
        .order_with(&plan, &of, vec![bound("db-1", sign(8))])
        .await;
    assert!(matches!(session.outcome(&of).await, StepOutcome::Ok { .. }));
    assert_eq!(effects(&host), "one\n");
}
