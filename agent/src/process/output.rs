//! Output of programs on its way to the step's log: by line, bounded, without secrets.

use std::borrow::Cow;

use tokio::io::{AsyncRead, AsyncReadExt as _};

use crate::secrets::Secret;
use crate::step::{LAST_LINES, StepLog};

/// The most of standard output that is kept for the caller, in bytes.
const MAX_KEPT: usize = 1 << 20;

/// A line without end is logged in pieces of about this many bytes.
const MAX_LINE: usize = 64 << 10;

/// What a pipe holds, in bytes: no read brings more.
const PIPE: usize = 64 << 10;

/// What stands in a secret's place.
const HIDDEN: &str = "***";

/// Values shorter than this are not searched for: they would blot out ordinary text, and a line
/// of a longer secret that short gives nothing away.
const MIN_PART: usize = 4;

/// Takes secrets out of texts.
#[derive(Debug, Clone, Default)]
pub(crate) struct Redactor {
    /// Longest first, so that a secret which contains another goes as a whole.
    needles: Vec<Secret>,
}

impl Redactor {
    /// Hides these values, and, as output is read by line, each line of those that have several.
    pub(crate) fn new(secrets: &[Secret]) -> Self {
        let mut needles: Vec<Secret> = Vec::new();
        for secret in secrets.iter().filter(|secret| !secret.expose().is_empty()) {
            needles.push(secret.clone());
            let parts = secret
                .expose()
                .lines()
                .map(str::trim)
                .filter(|part| part.len() >= MIN_PART);
            needles.extend(parts.map(Secret::from));
        }
        needles.sort_by_key(|needle| std::cmp::Reverse(needle.expose().len()));
        needles.dedup();
        Self { needles }
    }

    /// The text without them.
    pub(crate) fn hide<'a>(&self, text: &'a str) -> Cow<'a, str> {
        let mut text = Cow::Borrowed(text);
        for needle in &self.needles {
            if text.contains(needle.expose()) {
                text = Cow::Owned(text.replace(needle.expose(), HIDDEN));
            }
        }
        text
    }

    /// The longest prefix of a secret that can stand at a text's end, in bytes.
    fn overlap(&self) -> usize {
        self.needles
            .first()
            .map_or(0, |needle| needle.expose().len() - 1)
    }
}

/// The beginning of an output.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    text: String,
    /// Something did not fit, and nothing after it is kept.
    full: bool,
}

impl Kept {
    fn push(&mut self, text: &str) {
        let fitting = head(text, MAX_KEPT - self.text.len());
        self.text.push_str(fitting);
        self.full = fitting.len() < text.len();
    }

    /// What was kept.
    pub(crate) fn into_string(self) -> String {
        self.text
    }
}

/// Copies a pipe to the log, and its beginning to `kept`, until it is closed. What has come at once
/// is handed on at once: a program that prints without end is not to cost a write for each line.
pub(crate) async fn copy(
    pipe: Option<impl AsyncRead + Unpin>,
    redactor: &Redactor,
    log: &StepLog,
    mut kept: Option<&mut Kept>,
) {
    let Some(mut pipe) = pipe else { return };
    let mut pending: Vec<u8> = Vec::new();
    loop {
        let begun = pending.len();
        pending.reserve(PIPE);
        // An error on a pipe means what its end means: there is nothing more to read.
        let length = pipe.read_buf(&mut pending).await.unwrap_or(0);
        if length == 0 {
            hand_on(&pending, redactor, log, kept);
            return;
        }
        if let Some(end) = pending[begun..].iter().rposition(|byte| *byte == b'\n') {
            let end = begun + end + 1;
            hand_on(&pending[..end], redactor, log, kept.as_deref_mut());
            pending.drain(..end);
        }
        while let Some(piece) = cut_endless(&mut pending, redactor) {
            // Nothing of it is left to hide.
            let hidden = Redactor::default();
            hand_on(piece.as_bytes(), &hidden, log, kept.as_deref_mut());
        }
    }
}

/// Takes as much of a line without end as surely holds no part of a secret that goes on behind it.
fn cut_endless(pending: &mut Vec<u8>, redactor: &Redactor) -> Option<String> {
    if pending.len() < MAX_LINE + redactor.overlap() {
        return None;
    }
    let mut hidden = redactor
        .hide(&String::from_utf8_lossy(pending))
        .into_owned();
    let safe = head(&hidden, hidden.len().saturating_sub(redactor.overlap())).len();
    *pending = hidden.as_bytes()[safe..].to_vec();
    hidden.truncate(safe);
    Some(hidden)
}

/// Hands lines on to whoever still takes them.
fn hand_on(lines: &[u8], redactor: &Redactor, log: &StepLog, kept: Option<&mut Kept>) {
    if let Some(kept) = kept {
        for line in lines.split_inclusive(|byte| *byte == b'\n') {
            if kept.full {
                break;
            }
            kept.push(&redactor.hide(&String::from_utf8_lossy(line)));
        }
    }
    if log.is_full() {
        log.add(&newest(lines, redactor));
        return;
    }
    let mut text = String::with_capacity(lines.len() + 1);
    for line in lines.split_inclusive(|byte| *byte == b'\n') {
        add_clean(line, redactor, &mut text);
    }
    log.add(&text);
}

/// The last lines, as many as a failure shows: nobody sees the others.
fn newest(lines: &[u8], redactor: &Redactor) -> String {
    let mut found = vec![];
    for line in lines.rsplit(|byte| *byte == b'\n') {
        let mut text = String::new();
        add_clean(line, redactor, &mut text);
        if !text.is_empty() {
            found.push(text);
        }
        if found.len() == LAST_LINES {
            break;
        }
    }
    found.reverse();
    found.concat()
}

/// Adds a line as the log has it, unless nothing of it is to be seen.
fn add_clean(line: &[u8], redactor: &Redactor, text: &mut String) {
    let line = String::from_utf8_lossy(line);
    let line = redactor.hide(&line);
    let line = printable(&line);
    if !line.is_empty() {
        text.push_str(&line);
        text.push('\n');
    }
}

/// The text's beginning: at most so many bytes, in whole characters.
pub(crate) fn head(text: &str, bytes: usize) -> &str {
    let mut end = bytes.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// Without control characters: they would move the reader's cursor, or pose as a progress mark.
fn printable(text: &str) -> Cow<'_, str> {
    // Progress bars overwrite their line; only what would stand there at last is of interest.
    let text = text.trim_end_matches(['\n', '\r']);
    let text = text.rsplit('\r').next().unwrap_or(text);
    let shown = |c: char| c == '\t' || !c.is_control();
    if text.chars().all(shown) {
        return Cow::Borrowed(text);
    }
    Cow::Owned(text.chars().filter(|c| shown(*c)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn redactor(secrets: &[&str]) -> Redactor {
        Redactor::new(
            &secrets
                .iter()
                .map(|&secret| Secret::from(secret))
                .collect::<Vec<_>>(),
        )
    }

    #[test]
    fn secrets_are_hidden_longest_first_and_line_by_line() {
        let hide = redactor(&["abc", "abcdef", "first line\nsecond line", ""]);
        assert_eq!(hide.hide("x abcdef abc y"), "x *** *** y");
        assert_eq!(hide.hide("got second line"), "got ***");
        assert_eq!(hide.hide("nothing"), "nothing");
    }

    #[tokio::test]
    async fn a_secret_across_the_pieces_of_an_endless_line_is_hidden() {
        let secret = "s3cr3t-s3cr3t-s3cr3t";
        let hide = redactor(&[secret]);
        for shift in 0..40 {
            let mut line = "x".repeat(MAX_LINE - 30 + shift);
            line.push_str(secret);
            line.push_str(&"y".repeat(MAX_LINE));
            let mut kept = Kept::default();
            let log = StepLog::nowhere();
            copy(Some(line.as_bytes()), &hide, &log, Some(&mut kept)).await;
            let text = kept.into_string();
            assert_eq!(text, line.replace(secret, HIDDEN), "shift {shift}");
        }
    }

    #[tokio::test]
    async fn what_is_kept_has_a_bound_and_whole_characters() {
        let text = "ä".repeat(MAX_KEPT);
        let mut kept = Kept::default();
        copy(
            Some(text.as_bytes()),
            &redactor(&[]),
            &StepLog::nowhere(),
            Some(&mut kept),
        )
        .await;
        let kept = kept.into_string();
        assert!(kept.len() <= MAX_KEPT && kept.len() > MAX_KEPT - 4);
        assert!(kept.chars().all(|c| c == 'ä'));
    }

    /// A pipe that brings what it has in pieces of any size.
    struct Pieces<'a>(&'a [u8], usize);

    impl AsyncRead for Pieces<'_> {
        fn poll_read(
            mut self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
            buffer: &mut tokio::io::ReadBuf<'_>,
        ) -> std::task::Poll<std::io::Result<()>> {
            self.1 = self.1 % 97 + 13;
            let length = self.1.min(self.0.len()).min(buffer.remaining());
            let (now, later) = self.0.split_at(length);
            buffer.put_slice(now);
            self.0 = later;
            std::task::Poll::Ready(Ok(()))
        }
    }

    #[tokio::test]
    async fn lines_arrive_whole_however_they_come() {
        let lines: Vec<String> = (0..200).map(|n| format!("line {n} s3cr3t ä")).collect();
        let text = lines.join("\n\n\r\n");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let log = StepLog::to_file(path.clone());
        let mut kept = Kept::default();
        let hide = redactor(&["s3cr3t"]);
        copy(
            Some(Pieces(text.as_bytes(), 0)),
            &hide,
            &log,
            Some(&mut kept),
        )
        .await;
        let seen = |text: &str| text.replace("s3cr3t", HIDDEN);
        let logged = std::fs::read_to_string(&path).unwrap();
        assert_eq!(logged, seen(&lines.join("\n")) + "\n");
        assert_eq!(kept.into_string(), seen(&text));
        assert_eq!(log.last_lines().last(), Some(&seen(&lines[199])));
    }

    /// The first lines are in the file, the last ones are told, and those between cost nothing.
    #[tokio::test]
    async fn of_a_flood_the_log_has_its_beginning_and_the_last_lines() {
        let flood: Vec<u8> = (0..90_000)
            .flat_map(|n| format!("{n:06}{}\n\n", "x".repeat(1017)).into_bytes())
            .collect();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let log = StepLog::to_file(path.clone());
        copy(Some(&flood[..]), &redactor(&["s3cr3t"]), &log, None).await;
        let logged = std::fs::read_to_string(&path).unwrap();
        assert_eq!(logged.len(), 64 << 20);
        assert!(logged.ends_with(&format!("{:06}{}\n", (64 << 10) - 1, "x".repeat(1017))));
        let last = log.last_lines();
        let numbers = last.iter().map(|line| line[..6].parse::<u32>().unwrap());
        assert!(numbers.eq(89_980..90_000), "{last:?}");
    }

    #[test]
    fn output_cannot_pose_as_a_progress_mark() {
        assert_eq!(printable("\u{1}progress 1 done\n"), "progress 1 done");
        assert_eq!(printable("10%\r20%\r\n"), "20%");
        assert_eq!(printable("\u{1b}[31mred"), "[31mred");
    }
}
