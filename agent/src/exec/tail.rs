//! Follows a step's log while it runs: output and progress go to the controller, bounded, lossy,
//! and with offsets that show what was dropped.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::PathBuf;
use std::time::Duration;

use lockstep_proto::ids::StepKey;
use lockstep_proto::wire::CHUNK;
use tokio::sync::mpsc;

use super::seam::LogPiece;
use crate::process::head;

/// Five times a second: people watch it.
const INTERVAL: Duration = Duration::from_millis(200);

/// Pieces in one interval: 1.25 MiB/s at most leave the host. More is dropped.
const PIECES: usize = 4;

/// Marks a line that says how far the step is.
const MARK: &[u8] = b"\x01progress ";

/// Follows one log.
pub(crate) struct Tail {
    key: StepKey,
    path: PathBuf,
    file: Option<File>,
    /// Where the next line begins in the file.
    read: u64,
    /// The output before it: the file without its progress lines.
    offset: u64,
    pieces: mpsc::Sender<LogPiece>,
}

impl Tail {
    pub(crate) fn new(key: StepKey, path: PathBuf, pieces: mpsc::Sender<LogPiece>) -> Self {
        Self {
            key,
            path,
            file: None,
            read: 0,
            offset: 0,
            pieces,
        }
    }

    /// Follows until it is dropped; then call [`Tail::catch_up`] for the rest.
    pub(crate) async fn follow(&mut self) -> std::convert::Infallible {
        loop {
            tokio::time::sleep(INTERVAL).await;
            self.catch_up();
        }
    }

    /// Sends what is new, as far as there is room.
    pub(crate) fn catch_up(&mut self) {
        for _ in 0..PIECES {
            match self.piece() {
                Ok(Some(piece)) => {
                    // Nobody may be there to take it: then it is dropped, and its offset shows it.
                    let _ = self.pieces.try_send(piece);
                }
                Ok(None) => return,
                Err(error) => {
                    tracing::debug!(%error, step = %self.key, "the step's log cannot be read");
                    return;
                }
            }
        }
        self.skip();
    }

    /// The next whole lines, as many as a piece holds.
    fn piece(&mut self) -> std::io::Result<Option<LogPiece>> {
        let Some(bytes) = self.next_bytes()? else {
            return Ok(None);
        };
        let (data, progress) = split(&bytes);
        let piece = LogPiece {
            key: self.key.clone(),
            offset: self.offset,
            data,
            progress,
        };
        self.read += bytes.len() as u64;
        self.offset += piece.data.len() as u64;
        Ok(Some(piece))
    }

    fn next_bytes(&mut self) -> std::io::Result<Option<Vec<u8>>> {
        if self.file.is_none() {
            match File::open(&self.path) {
                Ok(file) => self.file = Some(file),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        let Some(file) = &mut self.file else {
            return Ok(None);
        };
        file.seek(SeekFrom::Start(self.read))?;
        let mut bytes = Vec::new();
        file.take(CHUNK as u64).read_to_end(&mut bytes)?;
        // A line that is longer than a piece is sent in parts.
        let end = match bytes.iter().rposition(|byte| *byte == b'\n') {
            Some(at) => at + 1,
            None if bytes.len() == CHUNK => bytes.len(),
            None => 0,
        };
        bytes.truncate(end);
        Ok((end > 0).then_some(bytes))
    }

    /// Passes over what there was no room for, but for the newest lines.
    fn skip(&mut self) {
        let length = |file: &File| file.metadata().map_or(0, |metadata| metadata.len());
        while self.file.as_ref().map_or(0, length) > self.read + CHUNK as u64 {
            let Ok(Some(bytes)) = self.next_bytes() else {
                return;
            };
            self.read += bytes.len() as u64;
            self.offset += split(&bytes).0.len() as u64;
        }
    }
}

/// Output without progress lines, and the newest progress.
fn split(bytes: &[u8]) -> (Vec<u8>, Option<(u32, String)>) {
    let mut data = Vec::with_capacity(bytes.len());
    let mut progress = None;
    for line in bytes.split_inclusive(|byte| *byte == b'\n') {
        match line.strip_prefix(MARK) {
            Some(mark) => progress = parse_progress(mark).or(progress),
            None => data.extend_from_slice(line),
        }
    }
    (data, progress)
}

fn parse_progress(mark: &[u8]) -> Option<(u32, String)> {
    let text = std::str::from_utf8(mark).ok()?.trim_end();
    let (fraction, words) = text.split_once(' ').unwrap_or((text, ""));
    let fraction: f64 = fraction.parse().ok()?;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "clamped to 0..=1000"
    )]
    let permille = (fraction.clamp(0.0, 1.0) * 1000.0).round() as u32;
    Some((permille, head(words, 200).to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use lockstep_proto::ids::{Direction, RolloutId, StepRef};
    use std::io::Write as _;

    fn tail(path: PathBuf, room: usize) -> (Tail, mpsc::Receiver<LogPiece>) {
        let key = StepKey {
            rollout: RolloutId::from_random([1; 6]),
            host: "a".parse().unwrap(),
            at: StepRef { phase: 0, step: 0 },
            direction: Direction::Do,
            attempt: 1,
        };
        let (pieces, received) = mpsc::channel(room);
        (Tail::new(key, path, pieces), received)
    }

    #[test]
    fn output_and_progress_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let (mut tail, mut pieces) = tail(path.clone(), 8);
        tail.catch_up();
        let mut log = File::create(&path).unwrap();
        write!(log, "one\n\u{1}progress 0.250 copying\ntwo\nhal").unwrap();
        tail.catch_up();
        let piece = pieces.try_recv().unwrap();
        assert_eq!(
            (piece.offset, piece.data.as_slice()),
            (0, &b"one\ntwo\n"[..])
        );
        assert_eq!(piece.progress, Some((250, "copying".into())));
        writeln!(log, "f").unwrap();
        tail.catch_up();
        let piece = pieces.try_recv().unwrap();
        assert_eq!((piece.offset, piece.data.as_slice()), (8, &b"half\n"[..]));
        assert_eq!(piece.progress, None);
    }

    #[test]
    fn a_flood_is_dropped_and_the_offsets_say_how_much() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let line = "x".repeat(99);
        let mut log = std::io::BufWriter::new(File::create(&path).unwrap());
        for _ in 0..100_000 {
            writeln!(log, "{line}").unwrap();
        }
        log.flush().unwrap();
        let (mut tail, mut pieces) = tail(path, 64);
        tail.catch_up();
        tail.catch_up();
        let mut received = vec![];
        while let Ok(piece) = pieces.try_recv() {
            received.push(piece);
        }
        let bytes: usize = received.iter().map(|piece| piece.data.len()).sum();
        assert!(bytes < 10 * CHUNK, "{bytes} bytes were sent");
        let last = received.last().unwrap();
        assert_eq!(last.offset + last.data.len() as u64, 10_000_000);
    }
}
