//! Logs in which nobody can forge a line: texts of the other side stand in many events, and whatever
//! they hold, each event is one line without control characters.

use std::io::{self, Write};

/// Hands events on, each written at once and with its line's end, as one line each. Control
/// characters within are escaped as in Rust: a line's end is `\n`.
#[derive(Debug)]
pub struct OneLine<W> {
    inner: W,
    colours: bool,
}

impl<W: Write> OneLine<W> {
    /// `colours`: whoever formats the events puts escape sequences around their parts, and escapes
    /// those that stand in their texts.
    pub fn new(inner: W, colours: bool) -> Self {
        Self { inner, colours }
    }
}

impl<W: Write> Write for OneLine<W> {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(event);
        let (line, end) = match text.strip_suffix('\n') {
            Some(line) => (line, "\n"),
            None => (&*text, ""),
        };
        let kept = |c: char| !c.is_control() || c == '\t' || (c == '\u{1b}' && self.colours);
        if line.chars().all(kept) {
            self.inner.write_all(event)?;
            return Ok(event.len());
        }
        let mut clean = String::with_capacity(line.len() + 16);
        for c in line.chars() {
            if kept(c) {
                clean.push(c);
            } else {
                clean.extend(c.escape_debug());
            }
        }
        clean.push_str(end);
        self.inner.write_all(clean.as_bytes())?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(event: &str, colours: bool) -> String {
        let mut out = vec![];
        let mut writer = OneLine::new(&mut out, colours);
        writer.write_all(event.as_bytes()).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn an_event_is_one_line_whatever_is_in_it() {
        assert_eq!(written("a=é\tb\n", false), "a=é\tb\n");
        let forged = "why=x\n2026 INFO all is well\r\0\u{1b}[2J\u{85}\n";
        let line = "why=x\\n2026 INFO all is well\\r\\0\\u{1b}[2J\\u{85}\n";
        assert_eq!(written(forged, false), line);
        assert_eq!(
            written("\u{1b}[31mred\u{1b}[0m\n", true),
            "\u{1b}[31mred\u{1b}[0m\n"
        );
    }
}
