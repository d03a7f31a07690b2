//! A person who looks at the controller, over one connection that stays: a command line for each
//! look would cost more than what is measured.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use lockstep_proto::wire::control_v1::control_service_client::ControlServiceClient;
use lockstep_proto::wire::control_v1::{
    EventKind, Host, ListHostsRequest, ListRolloutsRequest, WatchRequest,
};
use lockstep_tests::cluster::REQUESTER;
use tokio::runtime::Runtime;
use tonic::transport::Channel;

use crate::clock;
use crate::dial::Place;

/// Between two looks at a rollout. It is read without its document, which costs the controller
/// next to nothing.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Longer than any rollout here.
const PATIENCE: Duration = Duration::from_mins(4);

/// An answer with 10,000 hosts is about 1 MB.
const LARGEST: usize = 32 << 20;

/// Somebody with a certificate and a connection.
pub(crate) struct Person {
    runtime: Runtime,
    client: ControlServiceClient<Channel>,
}

impl Person {
    /// The one who submits rollouts.
    pub(crate) fn new(place: &Place) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let dial = place.operator(REQUESTER)?;
        let channel = runtime.block_on(dial.channel())?;
        let client = ControlServiceClient::new(channel).max_decoding_message_size(LARGEST);
        Ok(Self { runtime, client })
    }

    /// Every host that the controller knows.
    pub(crate) fn hosts(&self) -> Result<Vec<Host>> {
        let mut client = self.client.clone();
        let listed = self
            .runtime
            .block_on(client.list_hosts(ListHostsRequest {}));
        Ok(listed?.into_inner().hosts)
    }

    /// Waits until a rollout has ended, which must be the newest, and in success.
    pub(crate) fn succeeded(&self, rollout: &str) -> Result<()> {
        let begun = Instant::now();
        while begun.elapsed() < PATIENCE {
            let mut client = self.client.clone();
            let newest = ListRolloutsRequest {
                limit: 1,
                open: false,
            };
            let listed = self.runtime.block_on(client.list_rollouts(newest))?;
            let newest = listed.into_inner().rollouts.pop();
            let newest = newest.context("the controller knows no rollout")?;
            ensure!(
                newest.rollout == rollout,
                "another rollout has begun meanwhile"
            );
            if newest.ended_ms != 0 {
                ensure!(
                    newest.state == "succeeded",
                    "the rollout is {}: {}",
                    newest.state,
                    newest.reason
                );
                return Ok(());
            }
            thread::sleep(LOOK_EVERY);
        }
        bail!("{rollout} has not ended within {PATIENCE:?}")
    }

    /// Watches a rollout of one step in each phase until its end, with this host among others.
    pub(crate) fn watches(&self, rollout: &str, host: &str) -> Result<Told> {
        let mut client = self.client.clone();
        let rollout = rollout.to_owned();
        self.runtime.block_on(async {
            let watch = WatchRequest { rollout, after: 0 };
            let mut events = client.watch(watch).await?.into_inner();
            let (mut told, mut ordered) = (Told::default(), 0);
            while let Some(event) = events.message().await? {
                let own = event.host == host;
                match event.kind() {
                    EventKind::StepOrdered if own => ordered = event.at_ms,
                    EventKind::StepOk => {
                        // There is a phase of rest between two of them.
                        if event.step == format!("{}.0", 2 * told.first.len()) {
                            told.first.push(clock::now());
                        }
                        if own {
                            told.own.push((event.at_ms - ordered) as f64);
                        }
                    }
                    _ => {}
                }
            }
            Ok(told)
        })
    }
}

/// What somebody was told who watched a rollout, for each of its phases.
#[derive(Debug, Default)]
pub(crate) struct Told {
    /// When the first result came, on the machine's clock.
    pub(crate) first: Vec<u64>,
    /// From the one host's order to its result, in milliseconds of the controller's clock.
    pub(crate) own: Vec<f64>,
}
