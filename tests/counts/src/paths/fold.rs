//! The coordinator, as the driver leads it through the reports of a large fleet.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::sync::Arc;

use lockstep_core::{Call, Config, Coordinator, Effects, Event, Message};
use lockstep_proto::action::Action;
use lockstep_proto::ids::{HostId, InstanceId, StepKey};
use lockstep_proto::order::Order;
use lockstep_proto::plan::{
    CompiledPlan, Phase, Selector, Slo, Stage, Step, Strategy, Target, Undo,
};
use lockstep_proto::report::{Report, ReportBody};
use lockstep_proto::seal::{SealedPlan, seal};
use lockstep_proto::values::{Period, Timestamp};
use serde_json::json;

use super::number;
use super::values::{EPOCH, NOW, finished, host, rollout};

const HOSTS: usize = 1000;

/// So many hosts report before the driver settles what follows. TIMES is a multiple of it.
const BATCH: usize = 100;

/// So many hosts say of the step in flight that it has begun, and then that it is done.
pub(super) fn fold_reports(times: u32) {
    let (mut coordinator, orders) = at_work();
    let reports = orders.into_iter().map(|order| {
        let key = order.key;
        let begun = ReportBody::Started { key: key.clone() };
        [
            reported(&key, 2, begun),
            reported(&key, 3, finished(key.clone())),
        ]
    });
    let reports: Vec<[Event; 2]> = reports.collect();
    assert_eq!(reports.len(), HOSTS, "each has an order");
    let mut reports = reports.into_iter();
    for _ in 0..number(times) / BATCH {
        let mut effects = Effects::default();
        for event in reports.by_ref().take(BATCH).flatten() {
            coordinator.take(black_box(NOW), event, &mut effects);
        }
        coordinator.settle_up(NOW, &mut effects);
        assert!(effects.unasked.is_empty(), "each was asked for");
        black_box(effects);
    }
    // What would be dropped here depends on TIMES.
    std::mem::forget((coordinator, reports));
}

fn reported(key: &StepKey, number: u64, body: ReportBody) -> Event {
    Event::Report {
        host: key.host.clone(),
        report: Report {
            number,
            body,
            head: None,
        },
    }
}

/// A coordinator whose hosts all have the first of two steps to do, and the orders.
fn at_work() -> (Coordinator, Vec<Order>) {
    let config = Config {
        epoch: EPOCH,
        break_glass: None,
    };
    let coordinator = Coordinator::recover(config, [], |_| None);
    let mut coordinator = coordinator.expect("an empty journal");
    let mut effects = coordinator.resume(NOW);
    let hosts: Vec<HostId> = (0..HOSTS).map(host).collect();
    for host in &hosts {
        coordinator.take(NOW, up(host), &mut effects);
    }
    let plan = Arc::new(plan());
    let call = Call::Submit {
        rollout: rollout(),
        plan: plan.clone(),
        dry_run: false,
        signatures: vec![],
    };
    let submit = Event::Operator {
        operator: "olga".into(),
        groups: vec![],
        call,
    };
    coordinator.take(NOW, submit, &mut effects);
    for host in &hosts {
        let body = ReportBody::Consented {
            rollout: rollout(),
            plan: plan.digest(),
            state: vec![],
            round: 0,
        };
        let report = Report {
            number: 1,
            body,
            head: None,
        };
        let host = host.clone();
        coordinator.take(NOW, Event::Report { host, report }, &mut effects);
    }
    coordinator.settle_up(NOW, &mut effects);
    let orders = effects.send.into_iter();
    let orders = orders.filter_map(|(_, message)| match message {
        Message::Order(order) => Some(order),
        _ => None,
    });
    (coordinator, orders.collect())
}

fn up(host: &HostId) -> Event {
    Event::HostUp {
        host: host.clone(),
        labels: labels(),
        instance: InstanceId::from_random([1; 8]),
        agent_version: "1".into(),
        held: None,
    }
}

fn labels() -> BTreeMap<String, String> {
    BTreeMap::from([("role".into(), "app".into())])
}

fn plan() -> SealedPlan {
    let step = |name: &str| Step {
        name: None,
        action: Action::deserialize_args(name, json!({"service": "employee-backend"}))
            .expect("an action by that name")
            .expect("its arguments"),
        timeout: Period::seconds(300),
        undo: Undo::Auto,
        line: 7,
    };
    let stage = Stage {
        target: Target::Groups(vec!["app".into()]),
        strategy: Strategy::All,
        steps: vec![step("service.stop"), step("service.start")],
    };
    let phase = Phase {
        name: "restart".into(),
        stages: vec![stage],
        deadline: None,
        planned: None,
    };
    let plan = CompiledPlan {
        format: 1,
        plan: "employee-system".into(),
        serial: 1,
        fleet_name: String::new(),
        not_before: Timestamp(0),
        expires: Timestamp(u64::MAX),
        deadline: Period::seconds(7200),
        inputs: BTreeMap::new(),
        fleet: BTreeMap::from([("app".into(), Selector { labels: labels() })]),
        phases: vec![phase],
        after_rollback: None,
        max_failures: None,
        notices: vec![],
        slo: Slo::default(),
        signoff: vec![],
    };
    seal(plan).expect("a small plan")
}
