//! Output of steps, on a stream of its own that exists only while there is output.

use std::convert::Infallible;
use std::time::Duration;

use lockstep_proto::wire::agent_v1::agent_service_client::AgentServiceClient;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use crate::exec::LogPiece;

/// Pieces on their way into the stream; those that wait longer wait in exec's channel, and those
/// that find no room there are dropped.
const PIECES: usize = 4;

/// A stream without output ends after this.
const IDLE: Duration = Duration::from_secs(10);

/// After a failure: output is not worth more.
const PAUSE: Duration = Duration::from_secs(5);

/// For the controller's last word on a stream.
const SUMMARY_WITHIN: Duration = Duration::from_secs(5);

/// Carries output for as long as the session lasts.
pub(super) async fn forward(
    client: AgentServiceClient<Channel>,
    pieces: &mut mpsc::Receiver<LogPiece>,
) -> Infallible {
    loop {
        let Some(first) = pieces.recv().await else {
            return std::future::pending().await;
        };
        if let Err(status) = stream(client.clone(), first, pieces).await {
            tracing::info!(code = ?status.code(), why = status.message(), "output is dropped");
            sleep(PAUSE).await;
        }
    }
}

async fn stream(
    mut client: AgentServiceClient<Channel>,
    first: LogPiece,
    pieces: &mut mpsc::Receiver<LogPiece>,
) -> Result<(), tonic::Status> {
    let (up, chunks) = mpsc::channel(PIECES);
    let feed = async move {
        let mut next = Some(first);
        while let Some(piece) = next {
            if up.send(piece.into()).await.is_err() {
                break;
            }
            next = timeout(IDLE, pieces.recv()).await.ok().flatten();
        }
    };
    let call = client.logs(ReceiverStream::new(chunks));
    tokio::pin!(call, feed);
    tokio::select! {
        result = &mut call => return result.map(|_| ()),
        () = &mut feed => {}
    }
    match timeout(SUMMARY_WITHIN, call).await {
        Ok(result) => result.map(|_| ()),
        Err(_) => Ok(()),
    }
}
