//! Orders within a rollout that people have sealed: out of order, again, of other rollouts and terms,
//! too often, at the wrong time, and such as are no orders.

use anyhow::Result;
use lockstep_proto::ids::{Digest, Direction, Epoch, StepKey};
use lockstep_proto::order::{Binding, Fact, Order};
use lockstep_proto::values::Timestamp;
use lockstep_proto::wire::agent_v1::{self as wire, down};
use prost::Message as _;

use super::thief::{Answer, Must, Thief};
use crate::played::CLOCK;

/// Plays them.
pub(super) async fn play(thief: &mut Thief) -> Result<()> {
    in_another_order(thief).await?;
    limits(thief).await?;
    bits(thief).await?;
    terms(thief).await?;
    not_understood(thief).await
}

async fn hostile(
    thief: &mut Thief,
    name: &str,
    plan: Digest,
    key: &StepKey,
    must: Must,
) -> Result<()> {
    let kind = "pointer";
    thief.tally.play(kind, name);
    let answer = thief.order(plan, key, vec![]).await;
    thief.check(kind, name, answer, must).await
}

async fn in_another_order(thief: &mut Thief) -> Result<()> {
    use Must::{BeRefused, ChangeNothing};
    let plan = thief.plan(&[
        thief.note("first"),
        thief.render("allowed/second.env", "2"),
        thief.note("third"),
        thief.note("fourth"),
    ]);
    let rollout = thief.hold(&plan).await?;
    let other = thief.rollout();
    let digest = plan.digest();
    let at = |step: u16, attempt: u16| Thief::at(&rollout, (0, step), attempt);
    let back = |step: u16, attempt: u16| StepKey {
        direction: Direction::Undo,
        ..at(step, attempt)
    };
    let left_out = BeRefused("comes before");
    for (name, step) in [("second first", 1), ("third first", 2), ("fourth first", 3)] {
        hostile(thief, name, digest, &at(step, 1), left_out).await?;
    }
    let cases = [
        ("undo before do", back(0, 1), ChangeNothing),
        ("undo of a later step", back(3, 1), ChangeNothing),
        (
            "a step that is not there",
            at(9, 1),
            BeRefused("not meant for this host"),
        ),
        (
            "the last step there can be",
            at(u16::MAX, 1),
            BeRefused("not meant for"),
        ),
        (
            "a phase that is not there",
            Thief::at(&rollout, (7, 0), 1),
            BeRefused("not meant for this host"),
        ),
        (
            "the phase after all phases",
            Thief::at(&rollout, (1, 0), 1),
            BeRefused("not meant for this host"),
        ),
        (
            "the step of another rollout",
            Thief::at(&other, (0, 0), 1),
            BeRefused("this host holds for"),
        ),
    ];
    for (name, key, must) in cases {
        hostile(thief, name, digest, &key, must).await?;
    }
    let elsewhere = Digest::of(b"another plan");
    let must = BeRefused("the order points into");
    hostile(thief, "another plan", elsewhere, &at(0, 1), must).await?;
    let kind = "pointer";
    for (name, not_after, attempt) in [("too late", CLOCK - 1, 2), ("at no time", 0, 3)] {
        thief.tally.play(kind, name);
        let order = Order {
            not_after: Timestamp(not_after),
            ..thief.session.ordered(&plan, &at(0, attempt), vec![])
        };
        let answer = thief.order_as_it_is(order.into(), &at(0, attempt)).await;
        let must = BeRefused("ms too late");
        thief.check(kind, name, answer, must).await?;
    }

    thief
        .licensed_note(&plan, &at(0, 4), vec![], "first")
        .await?;
    for (name, key, must) in [
        ("done, again", at(0, 4), ChangeNothing),
        ("done, once more", at(0, 4), ChangeNothing),
        (
            "done, another attempt",
            at(0, 5),
            BeRefused("is done, and not undone"),
        ),
        (
            "done, an attempt far away",
            at(0, 900),
            BeRefused("is done, and not undone"),
        ),
        ("done, an earlier attempt", at(0, 1), ChangeNothing),
        (
            "done, attempt zero",
            at(0, 0),
            BeRefused("has been taken already"),
        ),
        ("the next but one", at(2, 2), left_out),
    ] {
        let name = name.to_owned();
        if name == "done, once more" {
            thief.restart_exec().await?;
        }
        hostile(thief, &name, digest, &key, must).await?;
    }
    let file = thief.place.path("allowed/second.env");
    let second = at(1, 2);
    thief
        .licensed(&plan, &second, vec![], std::slice::from_ref(&file))
        .await?;
    hostile(
        thief,
        "back to the first",
        digest,
        &at(0, 901),
        BeRefused("was taken already"),
    )
    .await?;
    thief
        .licensed_note(&plan, &at(2, 3), vec![], "third")
        .await?;
    thief.licensed(&plan, &back(1, 2), vec![], &[file]).await?;
    for (name, key, must) in [
        ("undone, the undo again", back(1, 2), ChangeNothing),
        ("undone, another undo", back(1, 3), ChangeNothing),
        (
            "forward after an undo",
            at(3, 2),
            BeRefused("was undone on this host"),
        ),
        (
            "undone, done again",
            at(1, 3),
            BeRefused("was taken already"),
        ),
    ] {
        hostile(thief, name, digest, &key, must).await?;
    }
    thief.release(&rollout).await?;
    let ended = BeRefused("has ended on this host");
    for (name, key) in [("ended, forward", at(3, 3)), ("ended, back", back(0, 2))] {
        hostile(thief, name, digest, &key, ended).await?;
    }
    Ok(())
}

/// Too often, and at the wrong time.
async fn limits(thief: &mut Thief) -> Result<()> {
    let kind = "limit";
    let rated = |thief: &Thief, value: &str| thief.render("rated/a.env", value);
    let three = ["1", "2", "3"].map(|value| rated(thief, value));
    let plan = thief.plan(&three);
    let offered = thief.keep(&plan, &[1, 2]);
    thief
        .hostile_offer(kind, "three in one plan", &offered, "in an hour")
        .await?;
    let file = thief.place.path("rated/a.env");
    for number in 1..=4 {
        let plan = thief.plan(&[rated(thief, &number.to_string())]);
        let rollout = thief.hold(&plan).await?;
        let key = Thief::at(&rollout, (0, 0), 1);
        if number <= 2 {
            let changed = std::slice::from_ref(&file);
            thief.licensed(&plan, &key, vec![], changed).await?;
        } else {
            let name = format!("number {number} within the hour");
            thief.tally.play(kind, &name);
            let answer = thief.order(plan.digest(), &key, vec![]).await;
            let must = Must::BeRefused("2 have begun within the hour, 2 may");
            thief.check(kind, &name, answer, must).await?;
        }
        thief.release(&rollout).await?;
    }
    let plan = thief.plan(&[thief.render("closed/a.env", "1")]);
    let rollout = thief.hold(&plan).await?;
    for attempt in [1, 2] {
        let name = format!("attempt {attempt} outside the window");
        thief.tally.play(kind, &name);
        let key = Thief::at(&rollout, (0, 0), attempt);
        let answer = thief.order(plan.digest(), &key, vec![]).await;
        let must = Must::BeRefused("UTC; again from");
        thief.check(kind, &name, answer, must).await?;
    }
    thief.release(&rollout).await
}

/// One bit of an order that has been carried out.
async fn bits(thief: &mut Thief) -> Result<()> {
    let kind = "bit of an order";
    let plan = thief.plan(&[thief.note("one bit")]);
    let rollout = thief.hold(&plan).await?;
    let key = Thief::at(&rollout, (0, 0), 1);
    thief.licensed_note(&plan, &key, vec![], "one bit").await?;
    let order = wire::Order::from(thief.session.ordered(&plan, &key, vec![]));
    let bytes = order.encode_to_vec();
    let host = &key.host;
    for index in 0..bytes.len() {
        let mut changed = bytes.clone();
        changed[index] ^= 1 << (index % 8);
        let Ok(changed) = wire::Order::decode(&changed[..]) else {
            continue;
        };
        // Those that end the session are played elsewhere.
        let read = changed.clone().into_order(host.clone());
        let Some(read) = read.ok().filter(|read| read.epoch == thief.epoch) else {
            continue;
        };
        let name = format!("bit {} of byte {index}", index % 8);
        thief.tally.play(kind, &name);
        let answer = thief.order_as_it_is(changed, &read.key).await;
        thief
            .check(kind, &name, answer, Must::ChangeNothing)
            .await?;
    }
    thief.release(&rollout).await
}

/// Of a controller whose term has ended, or which claims another one's.
async fn terms(thief: &mut Thief) -> Result<()> {
    let kind = "term";
    let now = thief.epoch;
    let words = "this host has obeyed";
    let terms = [
        (
            "a lower one",
            Epoch {
                counter: now.counter - 1,
                ..now
            },
        ),
        (
            "the same of another controller",
            Epoch {
                id: now.id ^ 1,
                ..now
            },
        ),
        ("none", Epoch { counter: 0, id: 0 }),
    ];
    for (name, epoch) in terms {
        let name = format!("{name}, at the welcome");
        thief.tally.play(kind, &name);
        thief.connect_in(epoch).await?;
        let answer = match thief.session.heard().await {
            None => Answer::Ended,
            Some(_) => Answer::Nothing,
        };
        thief
            .check(kind, &name, answer, Must::EndTheSession(words))
            .await?;
    }
    let plan = thief.plan(&[thief.note("term")]);
    let rollout = thief.hold(&plan).await?;
    let key = Thief::at(&rollout, (0, 0), 1);
    let stale = Epoch {
        id: now.id ^ 2,
        ..now
    };
    let ahead = Epoch {
        counter: now.counter + 1,
        ..now
    };
    let rollout = || rollout.to_string();
    let order = |epoch: Epoch, thief: &Thief| {
        let order = thief.session.ordered(&plan, &key, vec![]);
        down::Message::Order(Order { epoch, ..order }.into())
    };
    let welcomed = "has welcomed this host with another epoch";
    let offer = wire::Offer {
        rollout: rollout(),
        plan_digest: plan.digest().0.to_vec().into(),
        epoch: Some(
            Epoch {
                id: now.id ^ 4,
                ..now
            }
            .into(),
        ),
        dry_run: false,
        signatures: vec![],
        round: 0,
    };
    let release = wire::Release {
        rollout: rollout(),
        epoch: Some(
            Epoch {
                id: now.id ^ 8,
                ..now
            }
            .into(),
        ),
        comes_back: false,
    };
    let cancel = wire::Cancel {
        rollout: rollout(),
        epoch: Some(
            Epoch {
                id: now.id ^ 16,
                ..now
            }
            .into(),
        ),
    };
    let survey = wire::Survey {
        rollout: rollout(),
        epoch: Some(
            Epoch {
                id: now.id ^ 32,
                ..now
            }
            .into(),
        ),
    };
    let cases = [
        ("another one's, in an order", order(stale, thief), words),
        ("a later one's, in an order", order(ahead, thief), welcomed),
        (
            "another one's, in an offer",
            down::Message::Offer(offer),
            words,
        ),
        (
            "another one's, in a release",
            down::Message::Release(release),
            words,
        ),
        (
            "another one's, in a cancel",
            down::Message::Cancel(cancel),
            words,
        ),
        (
            "another one's, in a survey",
            down::Message::Survey(survey),
            words,
        ),
    ];
    for (name, message, words) in cases {
        thief.tally.play(kind, name);
        let down = wire::Down {
            message: Some(message),
            head: None,
        };
        let answer = thief.say(down).await;
        thief
            .check(kind, name, answer, Must::EndTheSession(words))
            .await?;
    }
    // The hold is still there: none of them was obeyed.
    thief.licensed_note(&plan, &key, vec![], "term").await?;
    let rollout = key.rollout.clone();
    thief.release(&rollout).await
}

/// What is no order, by the contract.
async fn not_understood(thief: &mut Thief) -> Result<()> {
    let kind = "no order";
    let plan = thief.plan(&[thief.note("no order")]);
    let rollout = thief.hold(&plan).await?;
    let key = Thief::at(&rollout, (0, 0), 1);
    let good = wire::Order::from(thief.session.ordered(&plan, &key, vec![]));
    let with = |change: &dyn Fn(&mut wire::Order)| {
        let mut order = good.clone();
        change(&mut order);
        Some(down::Message::Order(order))
    };
    let fact = |fact: &[u8], origin: &str| wire::Binding {
        origin: origin.to_owned(),
        fact_json: fact.to_vec().into(),
        signature: String::new(),
    };
    let note = serde_json::to_vec(&Fact::Note {
        name: "n".into(),
        value: "v".into(),
    })?;
    let here = key.to_string();
    let words = "what the controller says is not understood";
    let cases = [
        ("a phase beyond all numbers", with(&|it| it.phase = 70_000)),
        ("a step beyond all numbers", with(&|it| it.step = u32::MAX)),
        (
            "an attempt beyond all numbers",
            with(&|it| it.attempt = 65_536),
        ),
        ("no direction", with(&|it| it.direction = 0)),
        ("no term", with(&|it| it.epoch = None)),
        ("an unknown direction", with(&|it| it.direction = 99)),
        (
            "a short digest",
            with(&|it| it.plan_digest = vec![1; 31].into()),
        ),
        ("no rollout", with(&|it| it.rollout = String::new())),
        (
            "a rollout that is a path",
            with(&|it| it.rollout = "../../etc".into()),
        ),
        (
            "a rollout with a line of its own",
            with(&|it| it.rollout = "ro_\n2026-01-01T00:00:00Z INFO all is well".into()),
        ),
        ("a rollout with NUL", with(&|it| it.rollout.push('\0'))),
        (
            "a fact that is none",
            with(&|it| it.bindings = vec![fact(b"{", &here)]),
        ),
        (
            "a fact of an unknown kind",
            with(&|it| it.bindings = vec![fact(b"{\"kind\":\"shell\"}", &here)]),
        ),
        (
            "a fact from a path",
            with(&|it| it.bindings = vec![fact(&note, "../x@app-1")]),
        ),
        (
            "a fact that is huge",
            with(&|it| it.bindings = vec![fact(&vec![b' '; 64 << 10], &here)]),
        ),
        ("nothing at all", None),
    ];
    for (name, message) in cases {
        thief.tally.play(kind, name);
        let down = wire::Down {
            message,
            head: None,
        };
        let answer = thief.say(down).await;
        thief
            .check(kind, name, answer, Must::EndTheSession(words))
            .await?;
    }
    let binding = Binding {
        origin: key.clone(),
        fact: Fact::Note {
            name: "n".into(),
            value: "v".into(),
        },
        signature: None,
    };
    let name = "a fact that nobody has signed";
    thief.tally.play(kind, name);
    let answer = thief.order(plan.digest(), &key, vec![binding]).await;
    let must = Must::BeRefused("not signed by its host");
    thief.check(kind, name, answer, must).await?;
    let key = StepKey { attempt: 2, ..key };
    thief.licensed_note(&plan, &key, vec![], "no order").await?;
    thief.release(&rollout).await
}
