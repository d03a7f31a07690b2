//! What steps proved, as a part of a report.

use lockstep_proto::order::Fact;

use super::report::Block;
use super::words;
use crate::cli::clean;
use crate::cli::document::Document;

/// Every fact of every attempt, and the SQL that was shown to people.
pub(super) fn evidence(document: &Document) -> Vec<Block> {
    let mut rows = Vec::new();
    let mut sql_shown = Vec::new();
    for (_, step) in document.steps() {
        for attempt in &step.attempts {
            let facts = attempt.facts();
            for fact in &facts {
                if let Some((what, value)) = fact_words(fact) {
                    rows.push(vec![
                        step.at.clone(),
                        attempt.place(),
                        what,
                        clean::line(&value),
                    ]);
                }
                if let Fact::SqlPlan {
                    database,
                    sql,
                    digest,
                    ..
                } = fact
                {
                    let title = format!("SQL that was shown for {database}, {digest}");
                    sql_shown.push((title, sql.clone()));
                }
            }
            for fact in attempt.unknown_facts() {
                let what = fact["kind"].as_str().unwrap_or("fact").to_owned();
                rows.push(vec![
                    step.at.clone(),
                    attempt.place(),
                    what,
                    clean::line(&fact.to_string()),
                ]);
            }
        }
    }
    let mut blocks = Vec::new();
    if !rows.is_empty() {
        blocks.push(Block::Table {
            head: vec!["Step", "Host", "Evidence", "Value"],
            rows,
        });
    }
    for (title, sql) in sql_shown {
        blocks.push(Block::Heading(3, title));
        blocks.push(Block::Lines(sql));
    }
    blocks
}

/// A fact in words; none for those that stand elsewhere in the report.
fn fact_words(fact: &Fact) -> Option<(String, String)> {
    let revision = |text: &str| {
        if text.is_empty() {
            "none".to_owned()
        } else {
            text.to_owned()
        }
    };
    let (what, value) = match fact {
        Fact::Backup {
            database,
            id,
            digest,
            size,
            taken_at,
            fence,
        } => {
            let fence = fence
                .as_ref()
                .map_or("no fence was up", |_| "a fence was up");
            let (size, at) = (words::size(*size), words::moment(taken_at.0));
            (
                format!("backup of {database}"),
                format!("{id}, {size}, {digest}, of {at}, {fence}"),
            )
        }
        Fact::BackupVerified {
            database,
            id,
            digest,
            level,
            ..
        } => (
            format!("verified backup of {database}"),
            format!("{id} is proven to {level}, {digest}"),
        ),
        Fact::Integrity {
            database,
            id,
            digest,
            ..
        } => (
            format!("integrity of {database}"),
            format!("{id}, {digest}"),
        ),
        Fact::RestorePoint {
            database,
            name,
            lsn,
            archived,
            ..
        } => (
            format!("restore point of {database}"),
            format!("{name} at {lsn}, archived in {archived}"),
        ),
        Fact::ExternalBackup {
            database,
            label,
            holds,
            from,
            to,
        } => (
            format!("physical backup of {database}"),
            format!("{label} ({holds}), log from {from} to {to}"),
        ),
        Fact::Fenced { database, .. } => (format!("fence of {database}"), "up".to_owned()),
        Fact::Revision {
            database,
            before,
            after,
        } => (
            format!("revision of {database}"),
            format!("{} -> {}", revision(before), revision(after)),
        ),
        Fact::SqlPlan {
            database,
            from,
            to,
            digest,
            opaque,
            hazards,
            ..
        } => {
            let opaque = opaque.iter().map(|what| format!("; opaque: {what}"));
            let hazards = hazards.iter().map(|what| format!("; hazard: {what}"));
            let more: String = opaque.chain(hazards).collect();
            let way = format!("{} -> {}", revision(from), revision(to));
            (
                format!("SQL for {database}"),
                format!("{way}, {digest}{more}"),
            )
        }
        Fact::Approved { by, evidence, .. } => (
            "approval".to_owned(),
            format!("{}, of {evidence}", by.join(", ")),
        ),
        Fact::PreviousRelease { app, release } => {
            (format!("previous release of {app}"), revision(release))
        }
        Fact::Rows { database, tables } => {
            let one = |(table, rows): &(String, u64)| format!("{table} {rows}");
            let tables: Vec<String> = tables.iter().map(one).collect();
            (format!("rows of {database}"), tables.join(", "))
        }
        Fact::Refused { address } => (
            "refusal".to_owned(),
            format!("{address} refuses connections"),
        ),
        Fact::Healthy { url } => ("health".to_owned(), format!("{url} is healthy")),
        Fact::Note { name, value } => (name.clone(), value.clone()),
        // The one stands at the attempt itself; before and after are compared under `Rollback`.
        Fact::Resolved { .. } | Fact::LossAccepted { .. } | Fact::State { .. } => return None,
    };
    Some((clean::line(&what), value))
}
