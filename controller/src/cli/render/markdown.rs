//! A report as Markdown.

use std::fmt::Write as _;

use super::report::Block;

/// Writes blocks down.
pub(crate) fn markdown(blocks: &[Block]) -> String {
    let mut text = String::new();
    for block in blocks {
        match block {
            Block::Heading(level, title) => {
                let marks = "#".repeat(usize::from(*level));
                let _ = writeln!(text, "{marks} {}\n", escape(title));
            }
            Block::Fields(fields) => {
                let rows: Vec<Vec<String>> = fields
                    .iter()
                    .map(|(name, value)| vec![name.clone(), value.clone()])
                    .collect();
                table(&mut text, &["", ""], &rows);
            }
            Block::Table { head, rows } => table(&mut text, head, rows),
            Block::Lines(lines) => {
                let fence = "`".repeat(longest_run(lines).max(2) + 1);
                let _ = writeln!(text, "{fence}text\n{}\n{fence}\n", lines.trim_end());
            }
        }
    }
    let end = text.trim_end().len();
    text.truncate(end);
    text.push('\n');
    text
}

fn table(text: &mut String, head: &[&str], rows: &[Vec<String>]) {
    let _ = writeln!(text, "| {} |", head.join(" | "));
    let _ = writeln!(text, "|{}", "---|".repeat(head.len()));
    for row in rows {
        let cells: Vec<String> = row.iter().map(|cell| escape(cell)).collect();
        let _ = writeln!(text, "| {} |", cells.join(" | "));
    }
    text.push('\n');
}

/// Text in which nothing is markup, on one line. Brackets alone and underscores within words are
/// none, and boxes such as `[x]` stay readable.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        let is_link = c == ']' && matches!(rest.peek(), Some('(' | '[' | ':'));
        match c {
            '\n' => escaped.push(' '),
            '\\' | '`' | '*' | '<' | '|' | '~' | '&' => escaped.extend(['\\', c]),
            c if is_link => escaped.extend(['\\', c]),
            c => escaped.push(c),
        }
    }
    // A line of underscores is to be written on; elsewhere two of them could make words bold.
    if escaped.trim_matches('_').is_empty() {
        escaped
    } else {
        escaped.replace("__", "\\_\\_")
    }
}

/// The longest run of backticks: a fence must be longer.
fn longest_run(text: &str) -> usize {
    text.split(|c| c != '`').map(str::len).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_leaves_its_cell_or_its_fence() {
        let text = markdown(&[
            Block::Table {
                head: vec!["A"],
                rows: vec![vec!["x | y\n<script>[a](b) __c__".into()]],
            },
            Block::Lines("```\n# not a heading".into()),
        ]);
        assert!(
            text.contains("| x \\| y \\<script>[a\\](b) \\_\\_c\\_\\_ |"),
            "{text}"
        );
        assert!(
            text.contains("````text\n```\n# not a heading\n````"),
            "{text}"
        );
    }
}
