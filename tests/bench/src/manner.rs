//! How simulated agents behave.

use std::time::Duration;

use lockstep_proto::ids::StepKey;
use lockstep_proto::wire::CHUNK;
use lockstep_proto::wire::agent_v1::LogChunk;
use lockstep_proto::wire::agent_v1::agent_service_client::AgentServiceClient;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

/// All agents of a load behave alike.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Manner {
    /// It reports at once.
    #[default]
    Prompt,
    /// It consents, takes orders, and never answers one.
    Stuck,
    /// Its steps print as much as may leave a host, and do not end.
    Loud,
    /// Its connection answers pings at once, and it reads each message after [`LATE`].
    Late,
}

/// How long a late agent leaves a message lying.
pub(crate) const LATE: Duration = Duration::from_mins(1);

/// The agent's own bounds: so many pieces in one interval leave a host.
const INTERVAL: Duration = Duration::from_millis(200);
const PIECES: usize = 4;

impl Manner {
    /// The label by which plans select such agents.
    pub(crate) fn role(self) -> &'static str {
        match self {
            Self::Prompt => "app",
            Self::Stuck => "stuck",
            Self::Loud => "loud",
            Self::Late => "late",
        }
    }
}

/// Prints for a step until nobody takes it any more.
pub(crate) async fn print(channel: Channel, key: StepKey) {
    let (pieces, stream) = mpsc::channel(PIECES);
    let feed = async move {
        let line =
            b"what a step prints when it prints all that it can, over and over again, or so\n";
        let data: Vec<u8> = line.iter().copied().cycle().take(CHUNK).collect();
        let mut offset = 0;
        loop {
            for _ in 0..PIECES {
                let piece = LogChunk {
                    key: key.to_string(),
                    offset,
                    data: data.clone().into(),
                    progress_permille: None,
                    progress_text: String::new(),
                };
                offset += CHUNK as u64;
                if pieces.send(piece).await.is_err() {
                    return;
                }
            }
            tokio::time::sleep(INTERVAL).await;
        }
    };
    let mut client = AgentServiceClient::new(channel);
    let call = client.logs(ReceiverStream::new(stream));
    let (result, ()) = tokio::join!(call, feed);
    if let Err(status) = result {
        eprintln!("load: output is not taken: {status}");
    }
}
