//! Files as requests and answers: of any size, in bounded memory.

use std::fs::File;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_LENGTH, EXPECT, HeaderValue};
use http::{HeaderMap, Method, Uri};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::{Body, Frame, SizeHint};
use tokio::io::AsyncRead as _;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

use super::{Connection, addressed, exchange};

/// How much is read of a file at a time, in bytes.
const PIECE: usize = 256 << 10;

/// How much of an answer that is no file is kept, in bytes: what a store says of an error is shorter.
const SAID: usize = 16 << 10;

/// How long the other side may take to say that it wants a file. Some never do, and take it.
const WANTED: Duration = Duration::from_secs(1);

/// Nothing came or went for so long: the connection is gone, and nobody said so.
const STALLED: Duration = Duration::from_secs(if cfg!(test) { 2 } else { 120 });

/// What a store said.
pub(crate) struct Said {
    pub(crate) status: u16,
    /// The beginning of it, where it is no file.
    pub(crate) body: Vec<u8>,
}

/// Sends a file of so many bytes, once the other side wants it: one that refuses says so before, and
/// its words are not lost among what was still being sent. The error says in words what went wrong.
pub(crate) async fn put(
    uri: &Uri,
    mut headers: HeaderMap,
    file: File,
    size: u64,
    connection: Connection,
) -> Result<Said, String> {
    headers.insert(CONTENT_LENGTH, size.into());
    headers.insert(EXPECT, HeaderValue::from_static("100-continue"));
    let (wanted, moved) = (Arc::new(Notify::new()), Arc::new(AtomicU64::new(0)));
    let body = FileBody {
        wanted: Some(Box::pin({
            let wanted = wanted.clone();
            async move {
                let _ = timeout(WANTED, wanted.notified()).await;
            }
        })),
        file: file.into(),
        left: size,
        moved: moved.clone(),
    };
    let mut request = addressed(uri, Method::PUT, headers, body.boxed_unsync())?;
    hyper::ext::on_informational(&mut request, move |response| {
        if response.status() == http::StatusCode::CONTINUE {
            wanted.notify_one();
        }
    });
    let mut body = vec![];
    let status = exchange(connection, request, |_, data| Ok(keep(&mut body, data)));
    let status = moving(&moved, status).await?;
    Ok(Said { status, body })
}

/// Asks for a file. `taken` gets its pieces, if the answer is one; what it says of them ends it.
pub(crate) async fn get(
    uri: &Uri,
    headers: HeaderMap,
    connection: Connection,
    mut taken: impl FnMut(&[u8]) -> Result<(), String>,
) -> Result<Said, String> {
    let nothing = Empty::new().map_err(|never| match never {});
    let request = addressed(uri, Method::GET, headers, nothing.boxed_unsync())?;
    let (moved, mut body) = (AtomicU64::new(0), vec![]);
    let status = exchange(connection, request, |status, data| {
        moved.fetch_add(1, Ordering::Relaxed);
        if status == 200 {
            return taken(data).map(|()| true);
        }
        Ok(keep(&mut body, data))
    });
    let status = moving(&moved, status).await?;
    Ok(Said { status, body })
}

/// Keeps the beginning, and says whether more is wanted.
fn keep(body: &mut Vec<u8>, data: &[u8]) -> bool {
    let room = SAID - body.len();
    body.extend_from_slice(&data[..room.min(data.len())]);
    body.len() < SAID
}

/// Ends what has stopped moving.
async fn moving<T>(
    moved: &AtomicU64,
    work: impl Future<Output = Result<T, String>>,
) -> Result<T, String> {
    let mut work = std::pin::pin!(work);
    loop {
        let before = moved.load(Ordering::Relaxed);
        tokio::select! {
            done = &mut work => return done,
            () = sleep(STALLED) => {
                if moved.load(Ordering::Relaxed) == before {
                    return Err(format!("nothing has moved for {STALLED:?}"));
                }
            }
        }
    }
}

/// A file as a body, read as the other side takes it.
struct FileBody {
    /// Ends when the other side wants it.
    wanted: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    file: tokio::fs::File,
    /// How many bytes are still to be sent.
    left: u64,
    /// Counts the pieces.
    moved: Arc<AtomicU64>,
}

impl Body for FileBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        if let Some(wanted) = &mut self.wanted {
            ready!(wanted.as_mut().poll(cx));
            self.wanted = None;
        }
        if self.left == 0 {
            return Poll::Ready(None);
        }
        let most = usize::try_from(self.left).unwrap_or(PIECE).min(PIECE);
        let mut piece = BytesMut::zeroed(most);
        let mut buffer = tokio::io::ReadBuf::new(&mut piece);
        ready!(Pin::new(&mut self.file).poll_read(cx, &mut buffer))?;
        let length = buffer.filled().len();
        if length == 0 {
            let error = "the file is shorter than it was";
            return Poll::Ready(Some(Err(io::Error::other(error))));
        }
        piece.truncate(length);
        self.left -= length as u64;
        self.moved.fetch_add(1, Ordering::Relaxed);
        Poll::Ready(Some(Ok(Frame::data(piece.freeze()))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left)
    }
}
