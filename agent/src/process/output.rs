//! Output of programs on its way to the step's log: by line, bounded, without secrets.

use tokio::io::{AsyncRead, AsyncReadExt as _};

use crate::secrets::Secret;
use crate::step::StepLog;

/// The most of standard output that is kept for the caller, in bytes.
const MAX_KEPT: usize = 1 << 20;

/// A line without end is logged in pieces of about this many bytes.
const MAX_LINE: usize = 64 << 10;

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
    pub(crate) fn hide(&self, text: &str) -> String {
        let mut text = text.to_owned();
        for needle in &self.needles {
            if text.contains(needle.expose()) {
                text = text.replace(needle.expose(), HIDDEN);
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
pub(crate) struct Kept(String);

impl Kept {
    fn push(&mut self, text: &str) {
        let room = MAX_KEPT.saturating_sub(self.0.len()).min(text.len());
        self.0.push_str(head(text, room));
    }

    /// What was kept.
    pub(crate) fn into_string(self) -> String {
        self.0
    }
}

/// Copies a pipe to the log, and its beginning to `kept`, until it is closed.
pub(crate) async fn copy(
    pipe: Option<impl AsyncRead + Unpin>,
    redactor: &Redactor,
    log: &StepLog,
    mut kept: Option<&mut Kept>,
) {
    let Some(mut pipe) = pipe else { return };
    let mut pending: Vec<u8> = Vec::new();
    let mut chunk = vec![0; 16 << 10];
    loop {
        // An error on a pipe means what its end means: there is nothing more to read.
        let length = pipe.read(&mut chunk).await.unwrap_or(0);
        pending.extend_from_slice(&chunk[..length]);
        while let Some(text) = next_piece(&mut pending, redactor, length == 0) {
            if let Some(kept) = &mut kept {
                kept.push(&text);
            }
            log.line(&printable(&text));
        }
        if length == 0 {
            return;
        }
    }
}

/// Takes the next whole line, or as much of an overlong one as surely holds no part of a secret.
fn next_piece(pending: &mut Vec<u8>, redactor: &Redactor, last: bool) -> Option<String> {
    if let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
        let line: Vec<u8> = pending.drain(..=end).collect();
        return Some(redactor.hide(&String::from_utf8_lossy(&line)));
    }
    if last && !pending.is_empty() {
        return Some(redactor.hide(&String::from_utf8_lossy(&std::mem::take(pending))));
    }
    if pending.len() < MAX_LINE + redactor.overlap() {
        return None;
    }
    let hidden = redactor.hide(&String::from_utf8_lossy(pending));
    let safe = head(&hidden, hidden.len().saturating_sub(redactor.overlap())).len();
    *pending = hidden.as_bytes()[safe..].to_vec();
    Some(hidden[..safe].to_owned())
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
fn printable(text: &str) -> String {
    // Progress bars overwrite their line; only what would stand there at last is of interest.
    let text = text.trim_end_matches(['\n', '\r']);
    let text = text.rsplit('\r').next().unwrap_or(text);
    text.chars()
        .filter(|c| *c == '\t' || !c.is_control())
        .collect()
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

    #[test]
    fn output_cannot_pose_as_a_progress_mark() {
        assert_eq!(printable("\u{1}progress 1 done\n"), "progress 1 done");
        assert_eq!(printable("10%\r20%\r\n"), "20%");
        assert_eq!(printable("\u{1b}[31mred"), "[31mred");
    }
}
