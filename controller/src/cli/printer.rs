//! Where words go: data to stdout, talk to stderr.

use std::io::{self, IsTerminal as _, Write as _};

use serde_json::Value;

use super::clean;
use super::render::{Line, Tone};

/// What `--output` asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub(crate) enum Output {
    // For people.
    #[default]
    Text,
    // For programs: one versioned document, or one per line where there are several.
    Json,
}

/// What `--color` asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub(crate) enum Color {
    // On a terminal, unless NO_COLOR is set.
    #[default]
    Auto,
    Always,
    Never,
}

/// Writes what commands say.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Printer {
    output: Output,
    color_out: bool,
    color_err: bool,
}

impl Printer {
    pub(crate) fn new(output: Output, color: Color) -> Self {
        let allowed = |is_terminal: bool| match color {
            Color::Always => true,
            Color::Never => false,
            Color::Auto => is_terminal && !is_set("NO_COLOR") && !is_dumb(),
        };
        Self {
            output,
            color_out: allowed(io::stdout().is_terminal()),
            color_err: allowed(io::stderr().is_terminal()),
        }
    }

    /// Whether programs read this.
    pub(crate) fn is_json(self) -> bool {
        self.output == Output::Json
    }

    /// Whether the last lines of stderr may be drawn anew.
    pub(crate) fn is_live(self) -> bool {
        !self.is_json() && io::stderr().is_terminal() && !is_dumb()
    }

    /// Whether somebody is there to answer questions.
    pub(crate) fn can_ask() -> bool {
        io::stdin().is_terminal() && io::stderr().is_terminal()
    }

    /// Data for people.
    pub(crate) fn lines(self, lines: &[Line]) -> io::Result<()> {
        let mut out = io::stdout().lock();
        for line in lines {
            writeln!(out, "{}", line.render(self.color_out))?;
        }
        out.flush()
    }

    /// Data as it is.
    #[expect(
        clippy::unused_self,
        reason = "whoever prints, prints through a printer"
    )]
    pub(crate) fn text(self, text: &str) -> io::Result<()> {
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes())?;
        if !text.ends_with('\n') {
            out.write_all(b"\n")?;
        }
        out.flush()
    }

    /// One document, for programs and for people who look.
    pub(crate) fn json(self, value: &Value) -> io::Result<()> {
        self.text(&clean::json(&format!("{value:#}")))
    }

    /// One document of several, on a line of its own.
    pub(crate) fn json_line(self, value: &Value) -> io::Result<()> {
        self.text(&clean::json(&value.to_string()))
    }

    /// A line as stderr gets it.
    pub(crate) fn talk_text(self, line: &Line) -> String {
        line.render(self.color_err)
    }

    /// Talk. If nobody can hear it, the command goes on.
    pub(crate) fn talk(self, lines: &[Line]) {
        let mut err = io::stderr().lock();
        for line in lines {
            let _ = writeln!(err, "{}", self.talk_text(line));
        }
    }

    /// A plain line of talk.
    pub(crate) fn say(self, text: impl Into<String>) {
        self.talk(&[Line::new(Tone::Plain, text)]);
    }

    /// Asks a question that only `y` or `yes` answers with yes.
    #[expect(clippy::unused_self, reason = "whoever asks, asks through a printer")]
    pub(crate) fn ask(self, question: &str) -> io::Result<bool> {
        let mut err = io::stderr().lock();
        write!(err, "{question} [y/N] ")?;
        err.flush()?;
        let mut answer = String::new();
        io::stdin().read_line(&mut answer)?;
        Ok(matches!(answer.trim().to_lowercase().as_str(), "y" | "yes"))
    }
}

fn is_set(name: &str) -> bool {
    std::env::var_os(name).is_some_and(|value| !value.is_empty())
}

fn is_dumb() -> bool {
    std::env::var_os("TERM").is_some_and(|term| term == "dumb")
}
