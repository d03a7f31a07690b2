//! `lockstep journal`: a controller's journal while no controller runs on it. Each command says in
//! its help what it needs, and `docs/recovery.md` when to use which.

use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};

use lockstep_proto::values::Period;
use serde_json::json;

use super::error::CliError;
use super::exit::Exit;
use super::printer::Printer;
use super::render::{Line, Tone};
use crate::journal::archive::{ArchiveFound, ArchiveState};
use crate::journal::compact::{self, Which};
use crate::journal::offline::{self, ExportError, Imported, Inspection};
use crate::journal::{FORMAT, Layout};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Journal {
    /// Say whether a journal is whole, and which record is the first that is not
    ///
    /// Reads a copy, made beside the journal for the time being, and changes nothing. Archives
    /// that a compacted journal goes back to are verified too, those that are still beside it.
    /// Ends with 0 if all is whole, 10 if something is broken, 12 if a controller runs on it.
    Verify {
        #[command(flatten)]
        state: State,
    },
    /// Write a whole journal to stdout as JSON lines, each with its hash
    ///
    /// The text holds every record, and no secret values. It does not hold the compiled plans that
    /// records name: they are the files in STATE/blobs, and a controller does not start without
    /// them. Ends with 10 if the journal is broken, 12 if a controller runs on it.
    Export {
        #[command(flatten)]
        state: State,
    },
    /// Take rollouts that have ended out of a journal, into an archive beside it
    ///
    /// The archive is a file in STATE/archive, in the format of an export, with every record up to
    /// now. The journal goes on from its last hash, and keeps what a controller still needs:
    /// serials that are used up, hosts, and every rollout that goes on or waits for a person.
    /// Nothing is deleted but what the archive has; a compaction that is ended in the middle has
    /// changed nothing. Ends with 10 if the journal or the archive is broken, 12 if a controller
    /// runs on it.
    Compact {
        #[command(flatten)]
        state: State,
        #[command(flatten)]
        ended: Ended,
    },
    /// Make a journal from an export on stdin
    ///
    /// The state directory must be empty, but for `blobs`, `logs` and `archive` of the old one:
    /// without the compiled plans in `blobs` no controller starts on it. The chain is verified,
    /// the journal keeps its id, and two records are added: a term that takes over, as with
    /// `lockstep serve --take-over`. Agents that have seen a controller of the new journal refuse
    /// the old one. Ends with 10 if a record
    /// of the export is missing or changed; then there is no journal.
    Import {
        #[command(flatten)]
        state: State,
        /// Begin a term above this one: where the clock is not to be trusted
        #[arg(
            long,
            value_name = "EPOCH",
            default_value_t = 0,
            value_parser = clap::value_parser!(u64).range(..u64::MAX)
        )]
        epoch_above: u64,
    },
}

/// Which rollouts go into the archive.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = true)]
pub(crate) struct Ended {
    /// Those that ended longer ago than this, such as `90d`
    #[arg(long, value_name = "AGE")]
    older_than: Option<Period>,
    /// All but this many, the newest
    #[arg(long, value_name = "COUNT")]
    keep: Option<usize>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct State {
    /// The controller's state directory, `state_dir` in its configuration
    #[arg(long, value_name = "STATE")]
    pub(super) dir: PathBuf,
}

/// `lockstep journal`.
pub(crate) fn run(command: &Journal, printer: Printer) -> Result<Exit, CliError> {
    match command {
        Journal::Verify { state } => verify(&state.dir, printer),
        Journal::Export { state } => export(&state.dir, printer),
        Journal::Compact { state, ended } => compact(&state.dir, ended, printer),
        Journal::Import { state, epoch_above } => import(&state.dir, *epoch_above, printer),
    }
}

fn verify(state: &Path, printer: Printer) -> Result<Exit, CliError> {
    let found = offline::inspect(state)?;
    if printer.is_json() {
        printer.json(&document(&found))?;
    } else {
        let lines: Vec<Line> = lines(&found).into_iter().map(Line::plain).collect();
        printer.lines(&lines)?;
    }
    let archives = found.archives.iter();
    let broken_archive = archives.filter_map(|archive| match &archive.state {
        ArchiveState::Broken(why) => Some(format!("the archive {} is broken: {why}", archive.name)),
        ArchiveState::Whole | ArchiveState::Elsewhere => None,
    });
    let broken = found.broken.iter();
    let broken = broken.map(|broken| format!("the journal is broken: {broken}"));
    let Some(broken) = broken.chain(broken_archive).next() else {
        return Ok(Exit::Done);
    };
    printer.talk(&[
        Line::new(Tone::Bad, format!("error: {broken}")),
        Line::plain(
            "  hint: nothing was changed; keep a copy of the whole state directory, then see \
             docs/recovery.md",
        ),
    ]);
    Ok(Exit::State)
}

fn document(found: &Inspection) -> serde_json::Value {
    let head = |head: Option<crate::journal::Head>| {
        head.map(|head| json!({"number": head.number, "hash": head.hash}))
    };
    json!({
        "format": "lockstep.journal-check/1",
        "journal": found.id.map(|id| id.to_string()),
        "journal_format": FORMAT,
        "store_format": found.layout.map(Layout::format),
        "begins_after": head(found.begins_after),
        "archives": found.archives.iter().map(archive_document).collect::<Vec<_>>(),
        "records": found.last.map(|last| last.number),
        "last": head(found.last),
        "acknowledged": head(found.acknowledged),
        "whole": found.broken.is_none(),
        "first_broken": found.broken.as_ref().and_then(|broken| broken.record),
        "why": found.broken.as_ref().map(|broken| &broken.what),
    })
}

fn archive_document(found: &ArchiveFound) -> serde_json::Value {
    json!({
        "name": found.name,
        "last": {"number": found.last.number, "hash": found.last.hash},
        "whole": match found.state {
            ArchiveState::Whole => Some(true),
            ArchiveState::Broken(_) => Some(false),
            ArchiveState::Elsewhere => None,
        },
    })
}

fn lines(found: &Inspection) -> Vec<String> {
    let or_unknown = |text: Option<String>| text.unwrap_or_else(|| "not readable".to_owned());
    let mut lines = vec![
        format!(
            "journal      {}",
            or_unknown(found.id.map(|id| id.to_string()))
        ),
        format!("format       {FORMAT}"),
        format!(
            "store        {}",
            or_unknown(found.layout.map(|layout| layout.format().to_string()))
        ),
        format!(
            "records      {}",
            or_unknown(found.last.map(|last| last.number.to_string()))
        ),
        format!(
            "last         {}",
            or_unknown(found.last.map(|last| last.to_string()))
        ),
        format!(
            "acknowledged {}",
            or_unknown(found.acknowledged.map(|head| head.to_string()))
        ),
    ];
    lines.extend(
        found
            .begins_after
            .map(|head| format!("begins after {head}")),
    );
    lines.extend(found.archives.iter().map(|archive| {
        let how = match &archive.state {
            ArchiveState::Whole => "whole",
            ArchiveState::Elsewhere => "not here",
            ArchiveState::Broken(_) => "broken",
        };
        format!("archive      {} {how}", archive.name)
    }));
    lines.push(match &found.broken {
        None => "whole        yes".to_owned(),
        Some(broken) => match broken.record {
            Some(record) => format!("whole        no, broken from record {record} on"),
            None => "whole        no".to_owned(),
        },
    });
    lines
}

fn export(state: &Path, printer: Printer) -> Result<Exit, CliError> {
    let mut out = BufWriter::new(io::stdout().lock());
    let head = offline::export(state, &mut out).map_err(failed)?;
    printer.say(format!("exported {} records; head {head}", head.number));
    printer.say(format!(
        "  the plans that they name are in {}; copy them too",
        state.join("blobs").display()
    ));
    Ok(Exit::Done)
}

/// Why records cannot be read or written out.
pub(super) fn failed(error: ExportError) -> CliError {
    match error {
        ExportError::Open(error) => CliError::Journal(error),
        ExportError::Output(error) => CliError::Output(error),
        error @ ExportError::Record { .. } => CliError::Export(error),
    }
}

fn compact(state: &Path, ended: &Ended, printer: Printer) -> Result<Exit, CliError> {
    let which = Which {
        older_than: ended.older_than,
        keep: ended.keep,
    };
    let done = compact::compact(state, which)?;
    if printer.is_json() {
        printer.json(&json!({
            "format": "lockstep.journal-compacted/1",
            "archive": done.archive,
            "archived": {"number": done.archived.number, "hash": done.archived.hash},
            "rollouts": done.rollouts,
            "records": done.records,
            "bytes_before": done.bytes_before,
            "bytes_after": done.bytes_after,
        }))?;
        return Ok(Exit::Done);
    }
    let Some(archive) = &done.archive else {
        printer.say("nothing to compact: no rollout has ended that long ago");
        return Ok(Exit::Done);
    };
    printer.lines(&[
        Line::plain(format!("archive      {}", archive.display())),
        Line::plain(format!("archived     {}", done.archived)),
        Line::plain(format!("rollouts     {} went into it", done.rollouts.len())),
        Line::plain(format!("records      {}", done.records)),
        Line::plain(format!(
            "bytes        {} before, {} now",
            done.bytes_before, done.bytes_after
        )),
    ])?;
    printer.say("  keep the archive: nothing else has these records; you may move it elsewhere");
    Ok(Exit::Done)
}

fn import(state: &Path, epoch_above: u64, printer: Printer) -> Result<Exit, CliError> {
    let imported = offline::import(state, &mut io::stdin().lock(), epoch_above)?;
    let Imported {
        id,
        exported,
        term,
        missing_plans,
    } = &imported;
    if printer.is_json() {
        printer.json(&json!({
            "format": "lockstep.journal-imported/1",
            "journal": id.to_string(),
            "records": exported.number,
            "head": exported.hash,
            "term": term.counter,
            "missing_plans": missing_plans,
        }))?;
    } else {
        printer.lines(&[
            Line::plain(format!("journal      {id}")),
            Line::plain(format!("imported     {exported}")),
            Line::plain(format!("term         {} begins", term.counter)),
        ])?;
    }
    if !missing_plans.is_empty() {
        let mut said = vec![Line::new(
            Tone::Waiting,
            format!(
                "warning: {} plans that records name are missing in {}",
                missing_plans.len(),
                state.join("blobs").display()
            ),
        )];
        said.extend(
            missing_plans
                .iter()
                .map(|plan| Line::plain(format!("  {plan}"))),
        );
        said.push(Line::plain(
            "  hint: copy the files of the old state directory's `blobs`, each named by its \
             digest; no controller starts here before",
        ));
        printer.talk(&said);
    }
    printer.say(
        "  never start a controller on the old journal again: this one has taken over, and what \
         the old one recorded since the export is not in it",
    );
    Ok(Exit::Done)
}
