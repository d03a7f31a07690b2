//! `lockstep report`: what happened, for whoever asks a year later.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use lockstep_proto::ids::RolloutId;

use super::error::CliError;
use super::exit::Exit;
use super::render::{html, markdown, report as build};
use super::{Session, clean, document, fetch};

#[derive(Debug, clap::Args)]
pub(crate) struct Report {
    /// The rollout
    rollout: RolloutId,
    /// How it is written [default: by the file's name, else md]
    #[arg(long, value_enum)]
    format: Option<Format>,
    /// Where to; stdout if absent
    #[arg(short = 'o', long = "out", value_name = "FILE")]
    file: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// Markdown.
    Md,
    /// One HTML page without anything from elsewhere.
    Html,
    /// The document `lockstep.rollout/1`.
    Json,
}

/// `lockstep report`.
pub(crate) async fn report(arguments: Report, session: &Session) -> Result<Exit, CliError> {
    let client = session.connect().await?;
    let (document, bytes) = fetch(&client, &arguments.rollout).await?;
    let by_name = arguments.file.as_deref().and_then(format_of);
    let format = match arguments.format.or(by_name) {
        Some(format) => format,
        None if session.printer.is_json() => Format::Json,
        None => Format::Md,
    };
    let text = match format {
        Format::Md => markdown::markdown(&build::report(&document)),
        Format::Html => html::html(&build::report(&document)),
        Format::Json => {
            let value: serde_json::Value =
                serde_json::from_slice(&bytes).map_err(document::InvalidDocument::Unreadable)?;
            clean::json(&format!("{value:#}\n"))
        }
    };
    match &arguments.file {
        None => session.printer.text(&text)?,
        Some(path) => {
            write(path, &text)?;
            session.printer.say(format!("wrote {}", path.display()));
        }
    }
    Ok(Exit::Done)
}

fn format_of(path: &Path) -> Option<Format> {
    match path.extension()?.to_str()? {
        "md" => Some(Format::Md),
        "html" | "htm" => Some(Format::Html),
        "json" => Some(Format::Json),
        _ => None,
    }
}

fn write(path: &Path, text: &str) -> Result<(), CliError> {
    let attempt = || {
        let mut file = File::create(path)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    };
    attempt().map_err(|source| CliError::File {
        path: path.to_owned(),
        verb: "written",
        source,
    })
}
