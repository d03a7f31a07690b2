//! An agent that says what it is told to say, and a plan for it: one phase, two checks.

use std::collections::BTreeMap;

use lockstep_proto::action::Action;
use lockstep_proto::action::check::Port;
use lockstep_proto::ids::{HostId, StepKey};
use lockstep_proto::plan::{
    CompiledPlan, FORMAT, Phase, Selector, Slo, Stage, Step, Strategy, Target, Undo,
};
use lockstep_proto::report::{Report, ReportBody, StepOutcome};
use lockstep_proto::seal::{self, SealedPlan};
use lockstep_proto::values::{Period, Timestamp};
use lockstep_proto::wire::agent_v1::{self as agent, Hello, Up, down, up};
use tonic::{Code, Status};

use crate::support::{Controller, Identity, Session, hello};

pub(crate) fn plan(serial: u64) -> SealedPlan {
    let step = |line| Step {
        name: None,
        action: Action::CheckPort(Port {
            port: 8000,
            expect: lockstep_proto::action::check::PortState::default(),
        }),
        timeout: Period::seconds(30),
        undo: Undo::Auto,
        line,
    };
    let label = BTreeMap::from([("role".to_owned(), "app".to_owned())]);
    seal::seal(CompiledPlan {
        format: FORMAT,
        plan: "ports".into(),
        serial,
        fleet_name: String::new(),
        not_before: Timestamp(0),
        expires: Timestamp(u64::MAX / 2),
        deadline: Period::seconds(600),
        inputs: BTreeMap::new(),
        fleet: BTreeMap::from([("app".to_owned(), Selector { labels: label })]),
        phases: vec![Phase {
            name: "look".into(),
            stages: vec![Stage {
                target: Target::Groups(vec!["app".into()]),
                strategy: Strategy::All,
                steps: vec![step(1), step(2)],
            }],
            deadline: None,
            planned: None,
        }],
        after_rollback: None,
        max_failures: None,
        notices: vec![],
        slo: Slo::default(),
        signoff: vec![],
    })
    .unwrap()
}

/// An agent that says what it is told to say.
pub(crate) struct Agent {
    host: HostId,
    identity: Identity,
    pub(crate) session: Session,
    pub(crate) reported: u64,
}

impl Agent {
    pub(crate) async fn connect(
        controller: &Controller,
        identity: Identity,
        reported: u64,
    ) -> Self {
        let mut hello = hello("app-1");
        hello.labels.insert("role".to_owned(), "app".to_owned());
        hello.last_report = reported;
        Self::introduce(controller, identity, hello).await.unwrap()
    }

    /// Connects with this introduction, whose reports were all acknowledged.
    pub(crate) async fn introduce(
        controller: &Controller,
        identity: Identity,
        hello: Hello,
    ) -> Result<Self, Status> {
        let reported = hello.last_report;
        let session = controller.session(&identity, hello).await?;
        Ok(Self {
            host: "app-1".parse().unwrap(),
            identity,
            session,
            reported,
        })
    }

    /// The next message that is no acknowledgement.
    pub(crate) async fn next(&mut self) -> down::Message {
        loop {
            match self.session.next().await.unwrap().message.unwrap() {
                down::Message::Acknowledged(_) => {}
                message => return message,
            }
        }
    }

    /// Reports, and waits until that is durable.
    pub(crate) async fn report(&mut self, body: ReportBody) {
        self.reported += 1;
        let report = Report {
            number: self.reported,
            body,
            head: None,
        };
        let message = Some(up::Message::Report(report.into()));
        self.session.up.send(Up { message }).await.unwrap();
        loop {
            match self.session.next().await.unwrap().message.unwrap() {
                down::Message::Acknowledged(number) if number == self.reported => return,
                down::Message::Acknowledged(_) => {}
                other => panic!("{other:?} instead of an acknowledgement"),
            }
        }
    }

    pub(crate) async fn consent(&mut self, controller: &Controller, plan: &SealedPlan) {
        let down::Message::Offer(offer) = self.next().await else {
            panic!("no offer");
        };
        let (rollout, digest, ..) = offer.into_parts().unwrap();
        assert_eq!(digest, plan.digest());
        assert_eq!(
            fetch(controller, &self.identity, plan).await.unwrap(),
            plan.bytes()
        );
        self.report(ReportBody::Consented {
            rollout,
            plan: digest,
            state: vec![],
            round: 0,
        })
        .await;
    }

    pub(crate) async fn order(&mut self) -> StepKey {
        let down::Message::Order(order) = self.next().await else {
            panic!("no order");
        };
        order.into_order(self.host.clone()).unwrap().key
    }

    pub(crate) async fn finish(&mut self, key: StepKey) {
        self.report(ReportBody::Finished {
            key,
            outcome: StepOutcome::Ok {
                changed: false,
                summary: "port 8000 is open".into(),
            },
            facts: vec![],
            signatures: vec![],
            took: Period(12),
        })
        .await;
    }
}

pub(crate) async fn fetch(
    controller: &Controller,
    identity: &Identity,
    plan: &SealedPlan,
) -> Result<Vec<u8>, Code> {
    let digest = plan.digest().0.to_vec().into();
    let mut client = controller.agents(identity).await;
    let chunks = client.fetch_blob(agent::FetchBlobRequest { digest }).await;
    let mut chunks = chunks.map_err(|status| status.code())?.into_inner();
    let mut bytes = Vec::new();
    while let Some(chunk) = chunks.message().await.unwrap() {
        bytes.extend_from_slice(&chunk.data);
    }
    Ok(bytes)
}
