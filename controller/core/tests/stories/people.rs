//! What people decide, and what they are told.

use super::*;

#[test]
fn an_approval_binds_to_what_was_shown_and_excludes_the_requester() {
    let mut fleet = Fleet::new(&["a"]);
    fleet
        .submit(
            1,
            plan(
                1,
                vec![on("controller", vec![approval()]), on("app", vec![stop()])],
            ),
        )
        .unwrap();
    fleet.consent(1, "a", vec![]);
    let evidence = fleet.evidence();
    assert!(matches!(
        fleet.decide("dana", &["dba"], Digest::of(b"else")),
        Err(Refused::Invalid(_))
    ));
    assert!(matches!(
        fleet.decide("olga", &["dba"], evidence),
        Err(Refused::NotAllowed(_))
    ));
    assert!(matches!(
        fleet.decide("quinn", &["qa"], evidence),
        Err(Refused::NotAllowed(_))
    ));
    assert!(
        fleet.orders.is_empty(),
        "INV-12: nothing runs before the approval"
    );
    assert_eq!(
        fleet.decide("dana", &["dba"], evidence),
        Ok(Answer::Missing(String::new()))
    );
    assert_eq!(fleet.orders.len(), 1);
}

#[test]
fn nobody_decides_the_same_twice_and_the_first_name_stays() {
    let mut fleet = Fleet::new(&["a"]);
    let two = json!({"from": {"dba": 2}, "timeout": "30m"});
    let list = json!({"items": ["backup seen", "mail sent"], "from": "qa"});
    let gates = vec![step("gate.approval", two), step("gate.checklist", list)];
    fleet.start(vec![on("controller", gates), on("app", vec![stop()])]);
    let evidence = fleet.evidence();
    fleet.decide("dana", &["dba"], evidence).unwrap();
    let refused = fleet.decide("dana", &["dba"], evidence).unwrap_err();
    assert!(
        matches!(&refused, Refused::NotNow(why) if why.contains("already") && why.contains("1 of dba")),
        "{refused}"
    );
    fleet.decide("ben", &["dba"], evidence).unwrap();

    let evidence = fleet.evidence();
    let confirm = |items: Vec<u32>| Call::Decide {
        rollout: rollout(1),
        gate: None,
        evidence,
        approve: true,
        items,
        comment: String::new(),
        signed: None,
    };
    fleet.call("emil", &["qa"], confirm(vec![1])).unwrap();
    let refused = fleet.call("quinn", &["qa"], confirm(vec![1]));
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains("item 2 is confirmed by emil"), "{refused}");
    fleet.call("quinn", &["qa"], confirm(vec![])).unwrap();
    let document = fleet.coordinator.document(&rollout(1)).unwrap();
    let gate = &document["phases"][0]["steps"][1]["gate"];
    assert_eq!(gate["from"], json!({"qa": 1}));
    assert_eq!(gate["decisions"][0]["items"], json!([1]));
    assert_eq!(
        gate["decisions"][1]["items"],
        json!([0]),
        "only what was open"
    );
}

#[test]
fn a_gate_that_nobody_answers_ends_the_rollout() {
    let mut fleet = Fleet::new(&["a"]);
    fleet.start(vec![on("controller", vec![approval()])]);
    fleet.later(30 * 60);
    assert_eq!(fleet.state(1), "rolled_back");
    assert!(fleet.reason(1).contains("1 of dba"), "{}", fleet.reason(1));
}

#[test]
fn resume_opens_a_gate_that_timed_out_anew() {
    let mut fleet = Fleet::new(&["a"]);
    let args = json!({"from": {"dba": 1}, "timeout": "1m", "on_timeout": "halt"});
    let gate = step("gate.approval", args);
    fleet.start(vec![on("controller", vec![gate])]);
    fleet.later(60);
    assert_eq!(fleet.state(1), "halted");
    fleet.resume();
    assert_eq!(fleet.state(1), "running");
    fleet.decide("dana", &["dba"], fleet.evidence()).unwrap();
    assert_eq!(fleet.state(1), "succeeded");
}

#[test]
fn what_a_cancelled_rollout_leaves_shut_is_said() {
    let fence = json!({"database": "d", "roles": ["app"]});
    let stages = || {
        vec![
            on("app", vec![step("postgres.fence", fence.clone())]),
            on("app", vec![step("postgres.unfence", fence.clone())]),
            on("app", vec![stop()]),
        ]
    };
    let cancelled = |done: usize| {
        let mut fleet = Fleet::new(&["a"]);
        fleet.start(stages());
        for _ in 0..done {
            fleet.finish("a", ok(), vec![]);
        }
        let cancel = Call::Cancel {
            rollout: rollout(1),
            reason: "wrong day".into(),
        };
        fleet.call("olga", &[], cancel).unwrap();
        fleet.reason(1)
    };
    assert!(!cancelled(0).contains("behind"), "{}", cancelled(0));
    assert!(cancelled(1).contains("`d` (a) stays behind a fence"));
    assert!(cancelled(1).contains("left_by: ro_010101010101"));
    assert!(!cancelled(2).contains("behind"), "{}", cancelled(2));
}

#[test]
fn a_rollout_says_whom_it_waits_for_and_what_went_wrong_where() {
    let mut fleet = Fleet::new(&["a", "b"]);
    let absent = |fleet: &Fleet| -> Vec<String> {
        let absent = fleet.coordinator.absent(&rollout(1));
        absent.into_iter().map(ToString::to_string).collect()
    };
    let waits_for = |fleet: &Fleet| fleet.coordinator.summary(&rollout(1)).unwrap().waits_for;
    fleet.event(Event::HostDown { host: host("b") });
    fleet
        .submit(
            1,
            plan(
                1,
                vec![on("controller", vec![approval()]), on("app", vec![stop()])],
            ),
        )
        .unwrap();
    fleet.consent(1, "a", vec![]);
    assert_eq!(absent(&fleet), ["b"], "it has not consented");
    fleet.up("b");
    fleet.consent(1, "b", vec![]);
    assert_eq!(absent(&fleet), [""; 0]);
    assert_eq!(waits_for(&fleet), "1 of dba");
    fleet.decide("dana", &["dba"], fleet.evidence()).unwrap();
    assert_eq!(waits_for(&fleet), "");
    fleet.event(Event::HostDown { host: host("a") });
    assert_eq!(absent(&fleet), ["a"], "its report is waited for");

    fleet.pause();
    let document = fleet.coordinator.document(&rollout(1)).unwrap();
    assert_eq!(document["paused"]["message"], "paused by olga");
    fleet.finish("b", failed(), vec![]);
    let document = fleet.coordinator.document(&rollout(1)).unwrap();
    let why = document["hosts"][1]["why"].as_str().unwrap();
    assert!(why.contains("service.stop (step 1.0"), "{why}");
    assert_eq!(document["hosts"][0]["why"], "");
}

#[test]
fn a_paused_rollout_sends_nothing_new() {
    let mut fleet = Fleet::new(&["a"]);
    fleet.start(vec![on("app", vec![stop(), stop()])]);
    fleet.pause();
    fleet.finish("a", ok(), vec![]);
    assert_eq!((fleet.orders.len(), fleet.state(1)), (1, "paused"));
    fleet.later(60);
    assert!(
        fleet
            .coordinator
            .next_deadline()
            .is_some_and(|due| due.0 > fleet.now)
    );
    fleet.resume();
    assert_eq!(fleet.orders.len(), 2);
}

#[test]
fn cancel_needs_no_agent() {
    let mut fleet = Fleet::new(&["a"]);
    fleet.start(vec![on("app", vec![stop()])]);
    fleet.event(Event::HostDown { host: host("a") });
    let cancel = Call::Cancel {
        rollout: rollout(1),
        reason: "wrong day".into(),
    };
    fleet.call("olga", &[], cancel).unwrap();
    assert_eq!(fleet.state(1), "cancelled");
    fleet.sent.clear();
    fleet.event(Event::HostUp {
        host: host("a"),
        labels: BTreeMap::from([("role".into(), "app".into())]),
        instance: InstanceId::from_random([1; 8]),
        agent_version: "1".into(),
        held: Some(rollout(1)),
    });
    assert!(
        fleet
            .sent
            .iter()
            .any(|(_, message)| matches!(message, Message::Cancel { .. }))
    );
}

#[test]
fn a_signature_needs_the_role() {
    let mut fleet = Fleet::new(&["a"]);
    fleet.start(vec![on("app", vec![stop()])]);
    let sign = || Call::SignOff {
        rollout: rollout(1),
        role: "qa_lead".into(),
        comment: String::new(),
    };
    assert!(matches!(
        fleet.call("quinn", &["qa_lead"], sign()),
        Err(Refused::NotNow(_))
    ));
    fleet.finish("a", ok(), vec![]);
    assert_eq!(fleet.state(1), "succeeded");
    assert!(matches!(
        fleet.call("olga", &[], sign()),
        Err(Refused::NotAllowed(_))
    ));
    fleet.call("quinn", &["qa_lead"], sign()).unwrap();
    assert!(matches!(
        fleet.call("quinn", &["qa_lead"], sign()),
        Err(Refused::NotNow(_))
    ));
    fleet.call("ben", &["qa_lead"], sign()).unwrap();
    let document = fleet.coordinator.document(&rollout(1)).unwrap();
    let names: Vec<&str> = document["signoff"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|signed| signed["operator"].as_str())
        .collect();
    assert_eq!(names, ["quinn", "ben"], "no signature erases another");
}

#[test]
fn a_notice_is_sent_at_most_once() {
    let mut fleet = Fleet::new(&["a"]);
    let args = json!({"url": "http://localhost/x", "text": "${rollout.state}"});
    let action = Action::deserialize_args("notify.webhook", args)
        .unwrap()
        .unwrap();
    let mut plan = plan(1, vec![on("app", vec![stop()])]);
    plan.notices = vec![Notice {
        when: NoticeWhen::Started,
        action,
    }];
    fleet.submit(1, plan).unwrap();
    fleet.consent(1, "a", vec![]);
    assert_eq!(fleet.notified.len(), 1);
    fleet.restart();
    fleet.later(1);
    assert_eq!(
        fleet.notified.len(),
        1,
        "it may have been sent before the restart"
    );
}

#[test]
fn what_others_wrote_is_only_words_in_messages() {
    const TEXT: &str = "*${rollout.id}* <!here> ${no.such}: ${rollout.reason}";
    let notice = |name: &str, args: serde_json::Value| Notice {
        when: NoticeWhen::RolledBack,
        action: step(name, args).action,
    };
    let mut plan = plan(
        1,
        vec![on("controller", vec![approval()]), on("app", vec![stop()])],
    );
    plan.notices = vec![
        notice(
            "notify.slack",
            json!({"webhook": "secret://s", "text": TEXT}),
        ),
        notice("notify.webhook", json!({"url": "http://x/", "text": TEXT})),
        notice(
            "notify.email",
            json!({"to": ["a@x"], "subject": "${rollout.reason}\r\nBcc: b@x", "text": TEXT}),
        ),
    ];
    let mut fleet = Fleet::new(&["a"]);
    fleet.submit(1, plan).unwrap();
    fleet.consent(1, "a", vec![]);
    for operator in ["ira", "joe"] {
        let call = Call::BreakGlass {
            rollout: rollout(1),
            gate: None,
            evidence: fleet.evidence(),
            reason: "<@U1> & more".into(),
            life: Period::seconds(900),
            signature: None,
        };
        fleet.call(operator, &["incident"], call).unwrap();
    }
    let StepOutcome::Failed(mut failure) = failed() else {
        panic!("it failed")
    };
    failure.message = "<!channel> <https://evil|approve &\u{1b}[2J\n${rollout.id}>".into();
    fleet.finish("a", StepOutcome::Failed(failure), vec![]);
    fleet.finish("a", ok(), vec![]);
    fleet.surveyed("a", vec![]);
    assert_eq!(fleet.state(1), "rolled_back", "{}", fleet.reason(1));
    let [
        Action::NotifySlack(slack),
        Action::NotifyWebhook(webhook),
        Action::NotifyEmail(email),
    ] = &fleet.notified[..]
    else {
        panic!("three messages: {:#?}", fleet.notified)
    };
    // The plan's own markup is the plan's.
    let begins = "*ro_010101010101* <!here> ${no.such}: ";
    let masked = "&lt;!channel&gt; &lt;https://evil|approve &amp;\u{fffd}[2J\n${rollout.id}&gt;";
    let word = "BREAK-GLASS at gate 0.0 by joe: &lt;@U1&gt; &amp; more";
    for part in [begins, masked, word] {
        assert!(slack.text.contains(part), "{part} in {}", slack.text);
    }
    // Elsewhere nothing but the text's form is changed.
    let plain = "<!channel> <https://evil|approve &\u{fffd}[2J\n${rollout.id}>";
    for text in [&webhook.text, &email.text] {
        for part in [begins, plain, "by joe: <@U1> & more"] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }
    let subject = &email.subject;
    assert!(
        subject.contains("[2J ${rollout.id}>") && subject.ends_with("  Bcc: b@x"),
        "{subject}"
    );
    assert!(!subject.contains(char::is_control), "{subject}");
}

#[test]
fn a_host_that_is_gone_for_good_is_forgotten() {
    let mut fleet = Fleet::new(&["a", "old"]);
    let forget = || Call::Forget { host: host("old") };
    assert!(
        matches!(fleet.call("olga", &[], forget()), Err(Refused::NotNow(_))),
        "connected"
    );
    fleet.event(Event::HostDown { host: host("old") });
    fleet.call("olga", &[], forget()).unwrap();
    fleet.start(vec![on("app", vec![stop()])]);
    fleet.finish("a", ok(), vec![]);
    assert_eq!(fleet.state(1), "succeeded");
    fleet.restart();
    assert_eq!(fleet.coordinator.hosts().count(), 1);
}

#[test]
fn all_refusals_are_read_at_once() {
    let refused = |silent: bool| {
        let mut fleet = Fleet::new(&["a", "b"]);
        fleet
            .submit(1, plan(1, vec![on("app", vec![stop()])]))
            .unwrap();
        let names = if silent { vec!["a"] } else { vec!["a", "b"] };
        for name in names {
            assert_eq!(fleet.state(1), "running");
            let rollout = rollout(1);
            let reason = "the policy lists no service.stop".into();
            let refusals = vec![Refusal { at: None, reason }];
            fleet.report(name, ReportBody::Declined { rollout, refusals });
        }
        if silent {
            let due = fleet.coordinator.next_deadline();
            assert_eq!(due, Some(Timestamp(fleet.now + 2_000)));
            fleet.later(2);
        }
        assert_eq!(fleet.state(1), "cancelled");
        fleet.reason(1)
    };
    assert!(refused(false).contains("a refuses") && refused(false).contains("b refuses"));
    assert!(refused(true).contains("a refuses"));
}

#[test]
fn a_second_rollout_is_refused_with_the_first_ones_name() {
    let mut fleet = Fleet::new(&["a"]);
    fleet
        .submit(1, plan(1, vec![on("app", vec![stop()])]))
        .unwrap();
    let refused = fleet
        .submit(2, plan(2, vec![on("app", vec![stop()])]))
        .unwrap_err();
    assert!(
        matches!(&refused, Refused::Locked(lock) if lock.holder == rollout(1)),
        "{refused}"
    );
    assert!(matches!(
        fleet.submit(3, plan(1, vec![])),
        Err(Refused::SerialUsed(1, _))
    ));
}

#[test]
fn a_refusal_before_anything_happened_ends_the_rollout_and_frees_the_hosts() {
    let mut fleet = Fleet::new(&["a", "b"]);
    fleet
        .submit(1, plan(1, vec![on("app", vec![stop()])]))
        .unwrap();
    fleet.consent(1, "a", vec![]);
    let refusals = vec![Refusal {
        at: None,
        reason: "the policy lists no service.stop".into(),
    }];
    fleet.report(
        "b",
        ReportBody::Declined {
            rollout: rollout(1),
            refusals,
        },
    );
    assert_eq!(fleet.state(1), "cancelled");
    assert!(fleet.reason(1).contains("b refuses") && fleet.orders.is_empty());
    let released = |name: &str| {
        fleet
            .sent
            .iter()
            .any(|(to, message)| *to == host(name) && matches!(message, Message::Release { .. }))
    };
    assert!(released("a") && released("b"));
}

#[test]
fn resume_gives_an_open_gate_and_its_phase_their_time_again() {
    let gate = || {
        let args = json!({"from": {"dba": 1}, "timeout": "30m", "on_timeout": "halt"});
        vec![on("controller", vec![step("gate.approval", args)])]
    };
    let approved = |fleet: &mut Fleet| {
        fleet.resume();
        assert_eq!(fleet.state(1), "running", "{}", fleet.reason(1));
        fleet.decide("dana", &["dba"], fleet.evidence()).unwrap();
        assert_eq!(fleet.state(1), "succeeded");
    };

    // The rollout's deadline came while the gate was open.
    let mut fleet = Fleet::new(&["a"]);
    let mut late = plan(1, gate());
    late.deadline = Period::seconds(20 * 60);
    fleet.submit(1, late).unwrap();
    fleet.consent(1, "a", vec![]);
    fleet.later(20 * 60);
    assert_eq!(fleet.state(1), "halted");
    fleet.later(20 * 60);
    approved(&mut fleet);

    // The gate timed out in a phase that has a deadline of its own.
    let mut fleet = Fleet::new(&["a"]);
    let mut short = plan(1, gate());
    short.phases[0].deadline = Some(Period::seconds(35 * 60));
    fleet.submit(1, short).unwrap();
    fleet.consent(1, "a", vec![]);
    fleet.later(30 * 60);
    assert_eq!(fleet.state(1), "halted");
    fleet.later(10 * 60);
    approved(&mut fleet);

    // The rollout was paused past the gate's time.
    let mut fleet = Fleet::new(&["a"]);
    fleet.start(gate());
    fleet.pause();
    fleet.later(32 * 60);
    approved(&mut fleet);
}

#[test]
fn resume_does_not_repeat_what_nothing_can_prove() {
    let mut fleet = Fleet::new(&["a"]);
    let run = step("exec.run", json!({"name": "x", "argv": ["x"]}));
    fleet.start(vec![on("app", vec![run])]);
    fleet.pause();
    let why = "the step process was killed".into();
    fleet.finish("a", StepOutcome::Unknown { why }, vec![]);
    fleet.resume();
    assert_eq!(fleet.newest("a").attempt, 1, "INV-1");
    assert_eq!(fleet.state(1), "halted", "{}", fleet.reason(1));
    fleet.resume();
    assert_eq!(fleet.newest("a").attempt, 1, "INV-1");

    // Somebody has looked.
    let resolve = || resolve("a", StepRef { phase: 0, step: 0 }, false);
    fleet.call("olga", &[], resolve()).unwrap();
    assert!(matches!(
        fleet.call("olga", &[], resolve()),
        Err(Refused::NotNow(_))
    ));
    fleet.restart();
    fleet.up("a");
    fleet.resume();
    fleet.surveyed("a", vec![]);
    assert_eq!(fleet.state(1), "rolled_back", "{}", fleet.reason(1));
}

#[test]
fn a_person_s_word_settles_what_nothing_can_prove() {
    for done in [true, false] {
        let mut fleet = Fleet::new(&["a"]);
        let run = step("exec.run", json!({"name": "x", "argv": ["x"]}));
        fleet.start(vec![on("app", vec![run])]);
        fleet.pause();
        let why = "the step process was killed".into();
        fleet.finish("a", StepOutcome::Unknown { why }, vec![]);
        let resolve = resolve("a", StepRef { phase: 0, step: 0 }, done);
        fleet.call("olga", &[], resolve).unwrap();
        fleet.resume();
        if !done {
            let newest = fleet.orders.last().unwrap();
            assert_eq!(newest.key.attempt, 2);
            let word = &newest.bindings[0];
            assert_eq!(word.origin.attempt, 1);
            assert!(matches!(word.fact, Fact::Resolved { done: false, .. }));
            fleet.finish("a", ok(), vec![]);
        }
        assert_eq!(fleet.state(1), "succeeded", "{}", fleet.reason(1));
    }
}

#[test]
fn a_forgotten_host_that_comes_back_is_heard_again() {
    let mut fleet = Fleet::new(&["a", "old"]);
    fleet.start(vec![on("app", vec![stop()])]);
    for name in ["a", "old"] {
        fleet.finish(name, ok(), vec![]);
    }
    assert_eq!(fleet.state(1), "succeeded");
    fleet.event(Event::HostDown { host: host("old") });
    let forget = Call::Forget { host: host("old") };
    fleet.call("olga", &[], forget.clone()).unwrap();
    assert!(matches!(
        fleet.call("olga", &[], forget),
        Err(Refused::Invalid(_))
    ));
    fleet.restart();
    fleet.up("a");
    fleet.up("old");
    let plan = plan(2, vec![on("app", vec![stop()])]);
    fleet.submit(2, plan).unwrap();
    for name in ["a", "old"] {
        fleet.consent(2, name, vec![]);
    }
    for name in ["a", "old"] {
        fleet.finish(name, ok(), vec![]);
    }
    assert_eq!(fleet.state(2), "succeeded", "{}", fleet.reason(2));
}

#[test]
fn clocks_may_differ_a_little_and_groups_without_a_step_do_not_matter() {
    let mut fleet = Fleet::new(&["a"]);
    let mut early = plan(1, vec![on("app", vec![stop()])]);
    early.not_before = Timestamp(fleet.now + 60_000);
    let selector = Selector {
        labels: BTreeMap::from([("role".into(), "cache".into())]),
    };
    early.fleet.insert("cache".into(), selector);
    fleet.submit(1, early).unwrap();
    let mut too_early = plan(2, vec![on("app", vec![stop()])]);
    too_early.not_before = Timestamp(fleet.now + 600_000);
    let refused = fleet.submit(2, too_early).unwrap_err().to_string();
    assert!(refused.contains("clock"), "{refused}");
}

#[test]
fn resume_gives_no_order_new_life_where_a_failure_sends_the_rollout_back() {
    let mut fleet = Fleet::new(&["a", "b"]);
    fleet.start(vec![on("app", vec![stop()])]);
    fleet.pause();
    fleet.finish("a", failed(), vec![]);
    let before = fleet.orders.len();
    fleet.resume();
    assert_eq!(fleet.state(1), "rolling_back");
    let given = fleet.orders[before..].iter();
    let forward = given.filter(|order| order.key.direction == Direction::Do);
    assert_eq!(forward.count(), 0, "INV-5: b is not asked once more");
}
