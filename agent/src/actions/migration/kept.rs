//! What an attempt at a migration keeps beside its outcome, so that an undo knows what it would
//! lose: the columns that there were, and the moments when it began and when it was through.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use lockstep_proto::json;
use lockstep_proto::report::{Cause, Failure};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::actions::files::{self, OrFailed as _};
use crate::actions::postgres::look::Tally;
use crate::actions::postgres::restore::Baseline;
use crate::actions::postgres::written::{self, Columns, Ledgers, Moment, Which};
use crate::sql::Session;
use crate::step::{Context, failure};

const BEGAN: &str = "migration-began.json";
const THROUGH: &str = "migration-through.json";

/// What there was before the tool started.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Began {
    /// When; `None` if the server is too old to say.
    pub(super) moment: Option<Moment>,
    /// The columns of all tables.
    pub(super) columns: Columns,
    /// The rows of all tables, if the plan keeps what the migration does; releases of before did
    /// not count.
    #[serde(default)]
    pub(super) rows: Option<Tally>,
}

/// What there was when the tool was through.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct Through {
    /// When; `None` if the server is too old to say.
    pub(super) moment: Option<Moment>,
    /// The rows of all tables: if they were counted behind the fence of the backup, or if the plan
    /// keeps what the migration does. For a recovery with those of the catalogue.
    pub(super) rows: Option<Tally>,
    /// What migration tools had written down; for a recovery.
    #[serde(default)]
    pub(super) ledgers: Option<Ledgers>,
}

/// What attempts at a step have kept.
#[derive(Debug, Default)]
pub(super) struct Kept {
    /// Of the first one: what it found was there without any of them.
    pub(super) began: Option<Began>,
    /// Of the last one that was through.
    pub(super) through: Option<Through>,
}

impl Kept {
    /// Reads what the attempts of the context's step have kept. What is there and cannot be read is
    /// not nothing.
    pub(super) fn of(cx: &Context) -> Result<Self, Failure> {
        let dirs = files::attempts(cx);
        let began: Vec<Began> = all(&dirs, BEGAN)?;
        let through: Vec<Through> = all(&dirs, THROUGH)?;
        Ok(Self {
            began: began.into_iter().min_by_key(|began| began.moment),
            through: through.into_iter().max_by_key(|through| through.moment),
        })
    }

    /// Since when rows were not written by the migration itself; if that is not known, since it
    /// began, for then its own count, too.
    pub(super) fn moment(&self) -> Option<Moment> {
        let through = self.through.as_ref().and_then(|through| through.moment);
        through.or_else(|| self.began.as_ref().and_then(|began| began.moment))
    }

    /// What a restore is held against, unless it is the backup itself.
    pub(super) fn baseline(&self) -> Option<Baseline> {
        let through = self.through.as_ref()?;
        Some(Baseline {
            moment: through.moment,
            rows: through.rows.clone()?,
            ledgers: through.ledgers.clone(),
        })
    }
}

/// Keeps what there is before the tool starts; the rows, too, if they are asked for.
pub(super) async fn begin(cx: &Context, session: &Session, count: bool) -> Result<(), Failure> {
    let moment = written::moment(session).await?;
    let which = count.then_some(Which::All);
    let began = Began {
        moment,
        columns: written::columns(session).await?,
        rows: rows(session, moment, which).await?,
    };
    write(&cx.dir, BEGAN, &began)
}

/// Keeps what there is once the tool is through; the rows, too, if some are asked for.
pub(super) async fn end(
    cx: &Context,
    session: &Session,
    which: Option<Which>,
) -> Result<(), Failure> {
    let moment = written::moment(session).await?;
    let ledgers = match which {
        Some(Which::Files) => Some(written::ledgers(session).await?),
        _ => None,
    };
    let through = Through {
        moment,
        rows: rows(session, moment, which).await?,
        ledgers,
    };
    write(&cx.dir, THROUGH, &through)
}

/// The rows of all tables that can be counted. A server too old to say the moment counts none.
async fn rows(
    session: &Session,
    moment: Option<Moment>,
    which: Option<Which>,
) -> Result<Option<Tally>, Failure> {
    let Some(which) = which.filter(|_| moment.is_some()) else {
        return Ok(None);
    };
    let now = written::since(session, moment, &which).await?;
    Ok(Some(now.tally()))
}

fn all<T: DeserializeOwned>(dirs: &[PathBuf], name: &str) -> Result<Vec<T>, Failure> {
    let found = dirs.iter().map(|dir| read(&dir.join(name)));
    found.filter_map(Result::transpose).collect()
}

fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, Failure> {
    let unreadable = |why: String| {
        let message = format!(
            "what the migration has kept for its undo cannot be read: {}: {why}",
            path.display()
        );
        failure(Cause::Host, message)
    };
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(unreadable(error.to_string())),
    };
    json::read(&text).map_err(|error| unreadable(error.to_string()))
}

fn write(dir: &Path, name: &str, value: &impl Serialize) -> Result<(), Failure> {
    let text = serde_json::to_vec(value).expect("texts and numbers are JSON");
    files::write(&dir.join(name), &text, 0o600, None)
        .or_failed(|| "keep what an undo of the migration has to know")
}
