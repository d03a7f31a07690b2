//! What people read: pure functions from events and documents to text.

mod evidence;
pub(crate) mod html;
pub(crate) mod markdown;
pub(crate) mod plan;
pub(crate) mod progress;
pub(crate) mod report;
pub(crate) mod status;
pub(crate) mod words;

use crate::cli::clean;

#[cfg(test)]
mod tests;

/// How a line is meant; colour only underlines what its words say already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tone {
    Plain,
    Heading,
    Good,
    Bad,
    Waiting,
    Quiet,
}

/// A line of text with its tone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Line {
    pub(crate) tone: Tone,
    pub(crate) text: String,
}

impl Line {
    pub(crate) fn new(tone: Tone, text: impl Into<String>) -> Self {
        Self {
            tone,
            text: text.into(),
        }
    }

    pub(crate) fn plain(text: impl Into<String>) -> Self {
        Self::new(Tone::Plain, text)
    }

    /// The line as it is written.
    pub(crate) fn render(&self, color: bool) -> String {
        let code = match self.tone {
            Tone::Plain => "",
            Tone::Heading => "1",
            Tone::Good => "32",
            Tone::Bad => "31",
            Tone::Waiting => "33",
            Tone::Quiet => "2",
        };
        // Whoever made the line may have forgotten that others wrote parts of it.
        let text = clean::lines(&self.text);
        if !color || code.is_empty() {
            return text;
        }
        format!("\u{1b}[{code}m{text}\u{1b}[0m")
    }
}

/// Rows with columns of the same width; the last one is ragged.
pub(crate) fn table(head: &[&str], rows: &[Vec<String>]) -> Vec<Line> {
    let mut widths: Vec<usize> = head.iter().map(|cell| cell.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let join = |cells: Vec<&str>| {
        let mut text = String::new();
        for (cell, width) in cells.iter().zip(&widths) {
            let pad = width - cell.chars().count().min(*width);
            text.push_str(cell);
            text.extend(std::iter::repeat_n(' ', pad + 2));
        }
        text.trim_end().to_owned()
    };
    let mut lines = vec![Line::new(Tone::Heading, join(head.to_vec()))];
    lines.extend(
        rows.iter()
            .map(|row| Line::plain(join(row.iter().map(String::as_str).collect()))),
    );
    lines
}
