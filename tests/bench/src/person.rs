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

    /// Watches a rollout of one step in each phase until its end; when the first result of each
    /// phase was told, on the machine's clock.
    pub(crate) fn first_results(&self, rollout: &str) -> Result<Vec<u64>> {
        let mut client = self.client.clone();
        let rollout = rollout.to_owned();
        self.runtime.block_on(async {
            let watch = WatchRequest { rollout, after: 0 };
            let mut events = client.watch(watch).await?.into_inner();
            let mut first = vec![];
            while let Some(event) = events.message().await? {
                let of_next = event.step == format!("{}.0", first.len());
                if event.kind() == EventKind::StepOk && of_next {
                    first.push(clock::now());
                }
            }
            Ok(first)
        })
    }
}
