//! Answers whose messages are encoded already, because many get the same.
//!
//! tonic encodes every message of a stream anew for each who gets it. A handler that has bytes to
//! pass on puts them beside an empty answer, and once tonic has made a response of that, they come
//! into the place of its body. What is sent is what tonic would have sent.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::HeaderMap;
use http_body::Frame;
use tokio::sync::mpsc;
use tonic::body::Body;
use tonic::{Response, Status};

/// Messages of gRPC, each with its prefix, several at once.
pub(super) type Encoded = mpsc::Receiver<Result<Bytes, Status>>;

/// The type of an answer that is empty by itself.
pub(super) type Nothing<T> = tokio_stream::Empty<Result<T, Status>>;

/// What stands beside an answer. Taken once; only what can be cloned may stand there.
#[derive(Debug, Clone)]
struct Beside(Arc<Mutex<Option<Encoded>>>);

/// An answer of messages that are encoded already.
pub(super) fn answer<T>(encoded: Encoded) -> Response<Nothing<T>> {
    let mut answer = Response::new(tokio_stream::empty());
    let beside = Beside(Arc::new(Mutex::new(Some(encoded))));
    answer.extensions_mut().insert(beside);
    answer
}

/// Puts what stands beside an answer into the place of its body.
pub(crate) fn in_its_place(mut response: http::Response<Body>) -> http::Response<Body> {
    if let Some(Beside(encoded)) = response.extensions_mut().remove()
        && let Some(encoded) = encoded
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    {
        *response.body_mut() = Body::new(Stream {
            encoded,
            over: false,
        });
    }
    response
}

/// The body: a frame for each part, and then how it ended.
struct Stream {
    encoded: Encoded,
    over: bool,
}

impl http_body::Body for Stream {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.over {
            return Poll::Ready(None);
        }
        let status = match ready!(self.encoded.poll_recv(cx)) {
            Some(Ok(bytes)) => return Poll::Ready(Some(Ok(Frame::data(bytes)))),
            Some(Err(status)) => status,
            None => Status::ok(""),
        };
        self.over = true;
        let mut trailers = HeaderMap::new();
        let added = status.add_header(&mut trailers);
        Poll::Ready(Some(added.map(|()| Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.over
    }
}

#[cfg(test)]
mod tests {
    use http_body::Body as _;
    use lockstep_proto::wire::control_v1::{EventKind, RolloutEvent};
    use tonic::codec::{Codec as _, EncodeBody};

    use super::*;
    use crate::hub::Piece;

    /// All bytes of a body, and its trailers.
    async fn read<B>(body: B) -> (Vec<u8>, HeaderMap)
    where
        B: http_body::Body<Data = Bytes, Error = Status>,
    {
        let mut body = std::pin::pin!(body);
        let mut bytes = vec![];
        loop {
            let frame = std::future::poll_fn(|cx| body.as_mut().poll_frame(cx)).await;
            let frame = frame.expect("trailers come last").unwrap();
            match frame.into_data() {
                Ok(data) => bytes.extend(data),
                Err(frame) => return (bytes, frame.into_trailers().unwrap()),
            }
        }
    }

    fn events() -> Vec<RolloutEvent> {
        let step = |number| RolloutEvent {
            number,
            at_ms: 1_800_000_000_000,
            kind: EventKind::StepOk.into(),
            state: "running".into(),
            step: "0.3".into(),
            host: format!("app-{number}"),
            attempt: 1,
            detail: vec!["one".into(), String::new(), "z\u{fc}rich".into()],
            ..RolloutEvent::default()
        };
        let progress = RolloutEvent {
            progress_permille: Some(0),
            ..RolloutEvent::default()
        };
        let mut events: Vec<_> = (1..=300).map(step).collect();
        events.extend([progress, RolloutEvent::default()]);
        events
    }

    #[tokio::test]
    async fn what_is_sent_is_what_tonic_would_have_sent() {
        for end in [
            None,
            Some(Status::unavailable("the controller stops: z\u{fc}rich")),
        ] {
            let plain = events().into_iter().map(Ok).chain(end.clone().map(Err));
            let encoder =
                tonic_prost::ProstCodec::<RolloutEvent, RolloutEvent>::default().encoder();
            let stream = tokio_stream::iter(plain);
            let plain = EncodeBody::new_server(
                encoder,
                stream,
                None,
                tonic::codec::SingleMessageCompressionOverride::default(),
                None,
            );

            let (sender, encoded) = mpsc::channel(64);
            for piece in Piece::pack(events()) {
                sender.try_send(Ok(piece.after(0).unwrap().0)).unwrap();
            }
            if let Some(status) = end {
                sender.try_send(Err(status)).unwrap();
            }
            drop(sender);
            // As tonic makes a response of an answer.
            let (_, _, extensions) = answer::<RolloutEvent>(encoded).into_parts();
            let mut response = http::Response::new(Body::empty());
            *response.extensions_mut() = extensions;
            let response = in_its_place(response);
            assert_eq!(read(response.into_body()).await, read(plain).await);
        }
    }

    #[tokio::test]
    async fn other_answers_stay_as_they_are() {
        let response = in_its_place(Status::not_found("it is gone").into_http());
        assert!(Status::from_header_map(response.headers()).is_some());
        assert!(response.body().is_end_stream());
    }
}
