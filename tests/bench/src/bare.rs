//! The baseline: a bare gRPC fan-out. tonic, the same TLS and messages of the same size; no store,
//! no logic, nothing written.
//!
//! ```text
//! rounds N   one order to every agent, N times, each after the last result of the one before
//! ```

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context as _, Result};
use lockstep_proto::ids::{Digest, Direction, Epoch, HostId, StepKey, StepRef};
use lockstep_proto::order::Order;
use lockstep_proto::values::Timestamp;
use lockstep_proto::wire::agent_v1::{Down, down};
use lockstep_tests::played::{Controller, Downs, Keys};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::sync::{Mutex, Notify};

use crate::clock;
use crate::dial::Place;

/// What the baseline says.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Said {
    /// It listens here.
    Listens(String),
    /// A round, in nanoseconds: until the last order was handed over, and until the last result.
    Round { handed: u64, took: u64 },
}

fn say(said: &Said) {
    println!("{}", serde_json::to_string(said).expect("it is JSON"));
}

#[derive(Default)]
struct Fleet {
    /// Those that are connected, by the number of their session.
    agents: Mutex<BTreeMap<u64, Downs>>,
    results: AtomicUsize,
    /// Somebody has answered last.
    whole: Notify,
}

/// Serves until standard input ends.
pub(crate) fn run(place: &Place) -> Result<()> {
    let keys = Keys {
        certificate: place.read("controller-main.crt")?,
        key: place.read("controller-main.key")?,
        agents: place.read("ca-agents.crt")?,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(serve(keys))
}

async fn serve(keys: Keys) -> Result<()> {
    let mut controller = Controller::start(&keys, "127.0.0.1:0".parse()?).await;
    say(&Said::Listens(controller.address.to_string()));
    let fleet = Arc::new(Fleet::default());
    let term = Epoch { counter: 1, id: 1 };
    let accepting = Arc::clone(&fleet);
    tokio::spawn(async move {
        for number in 0.. {
            let mut session = controller.dialled().await;
            session.welcome(term, session.hello.last_report, 0).await;
            let (mut ups, downs) = session.split();
            accepting.agents.lock().await.insert(number, downs);
            let fleet = Arc::clone(&accepting);
            tokio::spawn(async move {
                while let Ok(Some(_)) = ups.message().await {
                    if fleet.results.fetch_sub(1, Ordering::AcqRel) == 1 {
                        fleet.whole.notify_one();
                    }
                }
                fleet.agents.lock().await.remove(&number);
            });
        }
    });
    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    let mut number = 0;
    while let Some(line) = lines.next_line().await? {
        let rounds = line
            .strip_prefix("rounds ")
            .context("rounds, and how many")?;
        for _ in 0..rounds.parse::<usize>()? {
            number += 1;
            round(&fleet, number, term).await?;
        }
    }
    Ok(())
}

async fn round(fleet: &Fleet, number: u16, term: Epoch) -> Result<()> {
    let agents = fleet.agents.lock().await;
    let order = Order {
        key: StepKey {
            rollout: "ro_010203040506".parse()?,
            host: "any".parse::<HostId>()?,
            at: StepRef {
                phase: number,
                step: 0,
            },
            direction: Direction::Do,
            attempt: 1,
        },
        plan: Digest([9; 32]),
        epoch: term,
        not_after: Timestamp(1_800_000_000_000),
        bindings: vec![],
    };
    let down = Down {
        message: Some(down::Message::Order(order.into())),
        head: None,
    };
    fleet.results.store(agents.len(), Ordering::Release);
    let began = clock::now();
    for agent in agents.values() {
        let _ = agent.try_send(Ok(down.clone()));
    }
    let handed = clock::now() - began;
    fleet.whole.notified().await;
    say(&Said::Round {
        handed,
        took: clock::now() - began,
    });
    Ok(())
}
