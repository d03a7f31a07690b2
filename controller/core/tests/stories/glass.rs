//! Two people break the glass of a gate.

use super::*;

impl Fleet {
    pub(super) fn break_glass(
        &mut self,
        operator: &str,
        groups: &[&str],
    ) -> Result<Answer, Refused> {
        self.break_glass_for(operator, groups, Period::seconds(900))
    }

    fn break_glass_for(
        &mut self,
        operator: &str,
        groups: &[&str],
        life: Period,
    ) -> Result<Answer, Refused> {
        let call = Call::BreakGlass {
            rollout: rollout(1),
            gate: None,
            evidence: self.evidence(),
            reason: format!("{operator} says the shop is down"),
            life,
            signature: None,
        };
        self.call(operator, groups, call)
    }

    fn waiting(gate: Step) -> Self {
        let mut fleet = Self::new(&["a"]);
        fleet.start(vec![on("controller", vec![gate]), on("app", vec![stop()])]);
        assert!(fleet.orders.is_empty());
        fleet
    }

    fn document(&self) -> serde_json::Value {
        self.coordinator.document(&rollout(1)).unwrap()
    }
}

const GROUP: &[&str] = &["incident"];

#[test]
fn two_people_of_the_group_meet_a_gate_and_everybody_reads_of_it() {
    let mut fleet = Fleet::waiting(approval());
    assert!(fleet.document().get("break_glass").is_none());
    let first = fleet.break_glass("ira", GROUP).unwrap();
    assert_eq!(
        first,
        Answer::Missing("1 of dba".into()),
        "one is not enough"
    );
    assert!(fleet.orders.is_empty());
    assert_eq!(
        fleet.break_glass("joe", GROUP).unwrap(),
        Answer::Missing(String::new())
    );
    assert_eq!(fleet.orders.len(), 1);
    let document = fleet.document();
    assert_eq!(document["break_glass"].as_array().unwrap().len(), 2);
    let why = document["phases"][0]["steps"][0]["gate"]["why"]
        .as_str()
        .unwrap();
    assert!(
        why.starts_with("BREAK-GLASS by ira and joe, without 1 of dba"),
        "{why}"
    );
    let events = fleet.coordinator.events(&rollout(1), 0).unwrap();
    let loud = events
        .iter()
        .filter(|it| it.message.starts_with("BREAK-GLASS"));
    assert_eq!(loud.count(), 3, "both words, and the gate");
    fleet.restart();
    for part in ["break_glass", "state"] {
        assert_eq!(fleet.document()[part], document[part], "INV-2");
    }
}

#[test]
fn who_may_not_break_it_is_told_why() {
    let mut fleet = Fleet::waiting(approval());
    let requester = fleet.break_glass("olga", GROUP).unwrap_err();
    assert!(requester.to_string().contains("two others"), "{requester}");
    let stranger = fleet.break_glass("dana", &["dba"]).unwrap_err();
    assert!(stranger.to_string().contains("not of the group incident"));
    for life in [Period(0), Period::seconds(3601)] {
        let long = fleet.break_glass_for("ira", GROUP, life).unwrap_err();
        assert!(long.to_string().contains("1h at most"), "{long}");
    }
    fleet.break_glass("ira", GROUP).unwrap();
    let twice = fleet.break_glass("ira", GROUP).unwrap_err();
    assert!(twice.to_string().contains("second person"), "{twice}");
    let call = Call::BreakGlass {
        rollout: rollout(1),
        gate: None,
        evidence: Digest::of(b"else"),
        reason: "x".into(),
        life: Period::seconds(60),
        signature: None,
    };
    let other = fleet.call("joe", GROUP, call).unwrap_err();
    assert!(other.to_string().contains("look again"), "INV-12: {other}");
    assert!(fleet.orders.is_empty());
    // A controller that is told of no group.
    fleet.restart();
    fleet.up("a");
    let nobody = fleet.break_glass("joe", GROUP).unwrap_err();
    assert!(nobody.to_string().contains("[break_glass]"), "{nobody}");
}

#[test]
fn a_word_ends_by_itself() {
    let mut fleet = Fleet::waiting(approval());
    fleet.break_glass("ira", GROUP).unwrap();
    fleet.later(901);
    let alone = fleet.break_glass("joe", GROUP).unwrap();
    assert!(fleet.orders.is_empty(), "the first word has ended");
    assert_eq!(alone, Answer::Missing("1 of dba".into()));
    let events = fleet.coordinator.events(&rollout(1), 0).unwrap();
    let said = &events.last().unwrap().message;
    assert!(said.contains("a second person"), "{said}");
    assert_eq!(
        fleet.document()["phases"][0]["steps"][0]["gate"]["missing"],
        "1 of dba"
    );
    fleet.break_glass("ira", GROUP).unwrap();
    assert_eq!(fleet.orders.len(), 1);
}

#[test]
fn a_window_opens_for_two_people_and_a_no_stays_a_no() {
    // It began at 00:16 on a Thursday.
    let window = json!({"days": ["tue"], "utc": "14:00-18:00"});
    let mut fleet = Fleet::waiting(step("gate.window", window));
    fleet.break_glass("ira", GROUP).unwrap();
    fleet.break_glass("joe", GROUP).unwrap();
    assert_eq!(fleet.orders.len(), 1);

    let mut fleet = Fleet::waiting(approval());
    fleet.break_glass("ira", GROUP).unwrap();
    let no = Call::Decide {
        rollout: rollout(1),
        gate: None,
        evidence: fleet.evidence(),
        approve: false,
        items: vec![],
        comment: "never".into(),
        signed: None,
    };
    fleet.call("dana", &["dba"], no).unwrap();
    assert!(fleet.break_glass("joe", GROUP).is_err());
    assert!(fleet.orders.is_empty());
}

#[test]
fn messages_to_people_say_so_and_one_more_is_sent_for_each_word() {
    let mut plan = plan(
        1,
        vec![on("controller", vec![approval()]), on("app", vec![stop()])],
    );
    plan.notices = vec![Notice {
        when: NoticeWhen::Waiting,
        action: step(
            "notify.slack",
            json!({"webhook": "secret://slack", "text": "${rollout.id} waits"}),
        )
        .action,
    }];
    let mut fleet = Fleet::new(&["a"]);
    fleet.submit(1, plan).unwrap();
    fleet.consent(1, "a", vec![]);
    assert_eq!(fleet.notified.len(), 1);
    fleet.break_glass("ira", GROUP).unwrap();
    assert_eq!(fleet.notified.len(), 2);
}
