//! `lockstep audit`: a controller's journal as auditors read it (INV-11), while no controller runs
//! on it.

use std::fs;
use std::path::PathBuf;

use lockstep_proto::witness::{self, Judgement, Witness};
use serde_json::json;

use super::error::CliError;
use super::exit::Exit;
use super::journal::{self, State};
use super::printer::Printer;
use super::render::{Line, Tone};
use crate::journal::audit::Chain;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Audit {
    /// Say whether the journal is what was written, and what agents were told of it
    ///
    /// Whoever can change a journal can also chain it anew, so that it is whole by itself. Agents
    /// keep heads of it in journals of their own: `lockstep-agent audit heads` prints them.
    /// Records after the newest such head are unwitnessed. Ends with 0 if nothing speaks against
    /// the journal, 10 if something does or if records are not here, 12 if a controller runs on it.
    Verify {
        #[command(flatten)]
        state: State,
        /// Heads that agents have written down, one in JSON on each line; may be repeated
        #[arg(long, value_name = "HEADS")]
        witness: Vec<PathBuf>,
        /// Archives of earlier records are kept elsewhere: verify what is here
        #[arg(long)]
        archives_elsewhere: bool,
    },
    /// Print the heads of agents' journals that this one has, for `lockstep-agent audit verify`
    Heads {
        #[command(flatten)]
        state: State,
    },
    /// Print every record as JSON lines, with its number, hash and time
    Export {
        #[command(flatten)]
        state: State,
    },
}

/// `lockstep audit`.
pub(crate) fn run(command: &Audit, printer: Printer) -> Result<Exit, CliError> {
    match command {
        Audit::Verify {
            state,
            witness,
            archives_elsewhere,
        } => {
            let witnesses = read(witness)?;
            let chain = Chain::read(&state.dir).map_err(journal::failed)?;
            verify(&chain, &witnesses, *archives_elsewhere, printer)
        }
        Audit::Heads { state } => {
            let chain = Chain::read(&state.dir).map_err(journal::failed)?;
            for head in chain.heads() {
                printer.json_line(&json!(head))?;
            }
            Ok(Exit::Done)
        }
        Audit::Export { state } => {
            let chain = Chain::read(&state.dir).map_err(journal::failed)?;
            for (head, entry) in &chain.records {
                printer.json_line(&json!({
                    "number": head.number,
                    "hash": head.hash,
                    "at": entry.at,
                    "record": entry.record,
                }))?;
            }
            Ok(Exit::Done)
        }
    }
}

fn read(files: &[PathBuf]) -> Result<Vec<Witness>, CliError> {
    let mut witnesses = vec![];
    for path in files {
        let text = fs::read_to_string(path).map_err(|source| CliError::File {
            verb: "read",
            path: path.clone(),
            source,
        })?;
        let read = witness::read(&text).map_err(|error| CliError::Usage {
            what: format!("{}: {error}", path.display()),
            hint: "a file of heads is what `lockstep-agent audit heads` prints".to_owned(),
        })?;
        witnesses.extend(read);
    }
    Ok(witnesses)
}

fn verify(
    chain: &Chain,
    witnesses: &[Witness],
    archives_elsewhere: bool,
    printer: Printer,
) -> Result<Exit, CliError> {
    let judgement = chain.judge(witnesses);
    if printer.is_json() {
        printer.json(&document(chain, &judgement))?;
    } else {
        let mut lines = vec![
            ("journal", chain.id.to_string()),
            ("records", judgement.last.to_string()),
        ];
        lines.extend(judgement.lines());
        let lines = lines.into_iter();
        let lines: Vec<Line> = lines
            .map(|(name, words)| Line::plain(format!("{name:<12} {words}")))
            .collect();
        printer.lines(&lines)?;
    }
    let Some(why) = judgement.why() else {
        if judgement.not_here == 0 || archives_elsewhere {
            return Ok(Exit::Done);
        }
        printer.talk(&[
            Line::new(
                Tone::Bad,
                format!(
                    "error: records 1 to {} are neither in the journal nor in an archive beside it",
                    judgement.not_here
                ),
            ),
            Line::plain(
                "  hint: put the archives that were kept elsewhere into `archive` of the state \
                 directory; --archives-elsewhere verifies the rest without them",
            ),
        ]);
        return Ok(Exit::State);
    };
    printer.talk(&[
        Line::new(
            Tone::Bad,
            format!("error: the journal is not what was written: {why}"),
        ),
        Line::plain(
            "  hint: nothing was changed; keep a copy of the whole state directory and of the \
             heads, then see docs/recovery.md",
        ),
    ]);
    Ok(Exit::State)
}

fn document(chain: &Chain, judgement: &Judgement) -> serde_json::Value {
    json!({
        "format": "lockstep.audit/1",
        "journal": chain.id.to_string(),
        "records": judgement.last,
        "not_here_through": judgement.not_here,
        "witnesses_not_held": judgement.not_held,
        "witnesses": judgement.by,
        "witnessed_through": judgement.through,
        "unwitnessed_from": judgement.unwitnessed_from(),
        "superseded": judgement.superseded,
        "against": judgement.against,
        "why": judgement.why(),
    })
}
