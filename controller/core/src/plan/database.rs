//! Mistakes around databases that real runbooks make, and that a plan can make too: what is not
//! wrong as a step, but as a step at this place, beside these others.
//!
//! What destroys is an error; what may be meant, a warning. Commands of database tools are in
//! [`tools`], statements in [`queries`].

use std::collections::HashMap;

use lockstep_proto::action::Action;
use lockstep_proto::action::migration::{Downgrade, RequiredBackup, Tool, UndoBy};
use lockstep_proto::action::postgres::{Baseline, Rows};

use super::args::is_known;
use super::draft::{Draft, DraftPhase, DraftStep, On};
use super::finding::Code;
use super::node::NodeId;
use super::reader::Reader;

mod points;
mod queries;
mod tools;

/// Adds to the reader's findings what is wrong around the databases of a draft.
pub(super) fn check(reader: &Reader<'_>, draft: &Draft) {
    let phases = || draft.phases.iter().chain(&draft.after_rollback);
    for step in phases().flat_map(|phase| &phase.steps) {
        queries::check(reader, step);
        copies(reader, step);
        if let Some(Action::MigrationDowngrade(args)) = &step.action {
            downgrade_target(reader, step, args);
        }
    }
    // A step whose arguments cannot be read may be the one that is looked for.
    if phases().any(|phase| phase.steps.iter().any(|step| step.action.is_none())) {
        return;
    }
    let mut so_far = SoFar {
        reader,
        databases: HashMap::new(),
        activated: vec![],
        applied: vec![],
    };
    for phase in &draft.phases {
        so_far.begin(phase);
        for step in &phase.steps {
            so_far.step(phase, step);
        }
    }
    so_far.never_verified();
}

/// What the steps so far have done.
struct SoFar<'a> {
    reader: &'a Reader<'a>,
    databases: HashMap<&'a str, Database<'a>>,
    /// Applications, releases and the lines that switched to them.
    activated: Vec<(&'a str, &'a str, usize)>,
    /// Databases and releases that were migrated, with the lines.
    applied: Vec<(&'a str, &'a str, usize)>,
}

#[derive(Default)]
struct Database<'a> {
    /// The newest backup.
    backup: Option<Backup<'a>>,
    /// Its step, as long as nobody has verified it.
    unproven: Option<NodeId>,
    /// The line of the newest look at all that it holds, and the fence that has been up since.
    looked: Option<(usize, Option<usize>)>,
    /// The newest restore point.
    point: Option<points::Point<'a>>,
    /// The fence that is up, by the line that raised it.
    fence: Option<usize>,
    /// The phase whose beginning lowers it.
    until: Option<&'a str>,
    /// The line and name of the first step that takes the data back.
    back: Option<(usize, &'static str)>,
}

struct Backup<'a> {
    line: usize,
    is_copied: bool,
    hosts: Option<&'a On>,
    /// The fence that was up, and has been since.
    fence: Option<usize>,
    /// The first step since that takes its time: its name and line.
    slow: Option<(&'static str, usize)>,
}

impl<'a> SoFar<'a> {
    /// Raises and lowers the fences of a phase.
    fn begin(&mut self, phase: &'a DraftPhase) {
        let name = phase.name.as_ref().map(|name| name.value.as_str());
        for database in self.databases.values_mut() {
            if database.until.is_some() && database.until == name {
                database.lower();
            }
        }
        if let Some(fence) = &phase.fence {
            let line = self.reader.tree.span(fence.node).line;
            let database = self.databases.entry(&fence.raw.database).or_default();
            database.fence = Some(line);
            database.until = Some(&fence.raw.until.value);
        }
    }

    fn step(&mut self, phase: &'a DraftPhase, step: &'a DraftStep) {
        let Some(action) = &step.action else { return };
        let line = self.reader.tree.span(step.node).line;
        let hosts = step.on.as_ref().or(phase.on.as_ref());
        if takes_its_time(action) {
            for database in self.databases.values_mut() {
                if let Some(backup) = &mut database.backup {
                    backup.slow = backup.slow.or(Some((step.info.name, line)));
                }
            }
        }
        match action {
            Action::PostgresBackup(args) => {
                let database = self.databases.entry(&args.database).or_default();
                database.unproven = Some(step.node);
                database.backup = Some(Backup {
                    line,
                    is_copied: self.reader.tree.get(step.args, "copies").is_some(),
                    hosts,
                    fence: database.fence,
                    slow: None,
                });
            }
            Action::PostgresFence(args) => {
                self.databases.entry(&args.database).or_default().fence = Some(line);
            }
            Action::PostgresUnfence(args) => {
                self.databases.entry(&args.database).or_default().lower();
            }
            Action::PostgresVerifyBackup(args) => {
                self.same_host(step, &args.database, hosts);
                self.databases.entry(&args.database).or_default().unproven = None;
            }
            Action::PostgresRestore(args) => {
                self.same_host(step, &args.database, hosts);
                self.back(step, line, &args.database);
                self.leave_point(&args.database, line);
            }
            Action::PostgresRestorePoint(args) => {
                let database = self.databases.entry(&args.database).or_default();
                database.point = Some(points::Point {
                    line,
                    hosts,
                    recoverable: args.recoverable,
                    fence: database.fence,
                    left: None,
                });
            }
            Action::PostgresIntegrity(args) => {
                let database = self.databases.entry(&args.database).or_default();
                database.looked = Some((line, database.fence));
            }
            Action::PostgresCompare(args)
                if matches!(args.rows, Rows::Unchanged | Rows::SameCount) =>
            {
                self.even(step, &args.database, args.with);
            }
            Action::ReleaseActivate(args) => {
                self.activated.push((&args.app, &args.release, line));
            }
            Action::MigrationApply(args) => {
                match args.undo_by {
                    UndoBy::Restore => self.same_host(step, &args.database, hosts),
                    UndoBy::Recover => self.recovery(step, &args.database, hosts),
                    UndoBy::Downgrade | UndoBy::Keep => {}
                }
                self.code_first(step, &args.app, &args.release);
                self.applied.push((&args.database, &args.release, line));
                if args.backup != RequiredBackup::None {
                    self.window(step, &args.database);
                }
                self.leave_point(&args.database, line);
            }
            Action::MigrationDowngrade(args) => {
                self.back(step, line, &args.database);
                self.leave_point(&args.database, line);
                self.release_of_a_downgrade(step, args);
            }
            _ => {}
        }
    }

    /// A migration whose backup does not hold what was written last.
    fn window(&self, step: &DraftStep, name: &str) {
        let Some(backup) = self.backup(name) else {
            return;
        };
        if backup.fence.is_some() {
            return;
        }
        let fence = self.databases.get(name).and_then(|of| of.fence);
        let line = backup.line;
        let message = match (fence, backup.slow) {
            (Some(fence), _) => format!(
                "the backup of `{name}` on line {line} is older than the fence on line {fence}: \
                 what was written between them is in no backup"
            ),
            (None, Some((slow, at))) => format!(
                "between the backup of `{name}` on line {line} and this migration, \
                 `{slow}` on line {at} takes its time, and no fence is up: what is written \
                 meanwhile is in no backup"
            ),
            (None, None) => format!(
                "no fence is up between the backup of `{name}` on line {line} and this migration: \
                 what is written meanwhile is in no backup"
            ),
        };
        let hint = format!(
            "raise it with the backup: `fence: {{database: {name}, roles: [...], until: ...}}` on \
             its phase"
        );
        self.reader
            .warn(Code::LossWindow, step.node, message, &hint);
    }

    /// A comparison that is only right while nobody writes.
    fn even(&self, step: &DraftStep, name: &str, with: Baseline) {
        let Some(database) = self.databases.get(name) else {
            return;
        };
        let backup = database.backup.as_ref();
        let (what, since) = match with {
            Baseline::Backup => ("the backup", backup.map(|it| (it.line, it.fence))),
            Baseline::Integrity => ("the look", database.looked),
        };
        if let Some((line, None)) = since {
            let message = format!(
                "the rows of `{name}` are held against those of {what} on line {line}, and no \
                 fence has been up since: applications may have written"
            );
            let hint = "raise a fence before it, or say how rows may differ, such as `rows: grown`";
            self.reader
                .warn(Code::UnevenComparison, step.node, message, hint);
        }
    }

    /// New code that runs on the old schema.
    fn code_first(&self, step: &DraftStep, app: &str, release: &str) {
        let mut activated = self.activated.iter();
        if let Some((_, _, line)) = activated.find(|(of, to, _)| (*of, *to) == (app, release)) {
            let message = format!(
                "`{release}` of `{app}` is active since line {line}, and meets the schema of the \
                 release before until this migration has run"
            );
            let hint = "migrate first, then `release.activate`; what the old release still needs \
                        goes away in a later migration";
            self.reader.warn(Code::CodeFirst, step.node, message, hint);
        }
    }

    /// A second way back for the same data.
    fn back(&mut self, step: &DraftStep, line: usize, name: &'a str) {
        let database = self.databases.entry(name).or_default();
        let Some((first, action)) = database.back else {
            database.back = Some((line, step.info.name));
            return;
        };
        if action == step.info.name {
            return;
        }
        let message = format!(
            "`{action}` on line {first} takes `{name}` back, and this would take it back again"
        );
        let hint = "choose one: a restored database is at its old revision already, and a \
                    downgrade from there drops what is older";
        self.reader
            .report(Code::TwoWaysBack, step.node, message, Some(hint.to_owned()));
    }

    /// A downgrade with the files of a release that does not know the revision to undo.
    fn release_of_a_downgrade(&self, step: &DraftStep, args: &Downgrade) {
        let at = self.at(step, "release");
        let hint = "name the release that is undone: only its files hold the way down";
        let applied = self.applied.iter().rev();
        let mut applied = applied.filter(|(database, ..)| *database == args.database);
        if let Some((_, release, line)) = applied.next() {
            if *release != args.release {
                let message = format!(
                    "line {line} migrates with `{release}`, and `{}` does not know its revisions",
                    args.release
                );
                self.reader.warn(Code::BadDowngrade, at, message, hint);
            }
            return;
        }
        let mut activated = self.activated.iter();
        let back = (args.app.as_str(), args.release.as_str());
        if let Some((_, _, line)) = activated.find(|(app, release, _)| (*app, *release) == back) {
            let message = format!(
                "line {line} goes back to `{}`, which does not know the revisions of the release \
                 after it",
                args.release
            );
            self.reader.warn(Code::BadDowngrade, at, message, hint);
        }
    }

    /// Backups that are taken last, and that nobody restores: perhaps they cannot be.
    fn never_verified(&self) {
        for (name, database) in &self.databases {
            if let Some(step) = database.unproven {
                let message =
                    format!("nobody restores this backup of `{name}`: perhaps it cannot be");
                let hint = format!("add `postgres.verify_backup: {{database: {name}}}` after it");
                self.reader.warn(Code::NeverVerified, step, message, &hint);
            }
        }
    }

    /// A backup that is looked for on hosts that have not made it.
    fn same_host(&self, step: &DraftStep, name: &str, hosts: Option<&On>) {
        // One that names a directory finds a copy there, if there is one.
        if self.reader.tree.get(step.args, "from").is_some() {
            if let Some(backup) = self.backup(name).filter(|backup| !backup.is_copied) {
                let line = backup.line;
                let message = format!(
                    "this looks for a copy, and the backup of `{name}` on line {line} has none"
                );
                let hint = "let its `copies` name the volume that these hosts have, too";
                self.reader
                    .warn(Code::ElsewhereLookedFor, step.node, message, hint);
            }
            return;
        }
        if let Some(backup) = self.backup(name) {
            self.elsewhere(step, ("backup", name), (backup.line, backup.hosts), hosts);
        }
    }

    /// What is looked for on hosts that have not made it.
    fn elsewhere(
        &self,
        step: &DraftStep,
        (what, name): (&str, &str),
        (line, made): (usize, Option<&On>),
        asked: Option<&On>,
    ) {
        let groups = |on: Option<&On>| -> Vec<String> {
            let groups = on.iter().flat_map(|on| &on.groups);
            let groups = groups.map(|group| group.value.clone());
            groups.filter(|group| is_known(group)).collect()
        };
        let (made, asked) = (groups(made), groups(asked));
        if made.is_empty() || asked.is_empty() || made.iter().any(|group| asked.contains(group)) {
            return;
        }
        let message = format!(
            "the {what} of `{name}` on line {line} is on the hosts of `{}`, and this looks for it on \
             those of `{}`",
            made.join("`, `"),
            asked.join("`, `")
        );
        let hint = match step.action {
            Some(Action::PostgresVerifyBackup(_)) => format!(
                "add `on: {}`, or `from: DIRECTORY` with a copy that these hosts have",
                made[0]
            ),
            _ => format!("add `on: {}`", made[0]),
        };
        self.reader
            .warn(Code::ElsewhereLookedFor, step.node, message, &hint);
    }

    fn backup(&self, name: &str) -> Option<&Backup<'a>> {
        self.databases.get(name)?.backup.as_ref()
    }

    fn at(&self, step: &DraftStep, key: &str) -> NodeId {
        self.reader.tree.get(step.args, key).unwrap_or(step.args)
    }
}

impl Database<'_> {
    fn lower(&mut self) {
        self.fence = None;
        self.until = None;
        if let Some(point) = &mut self.point {
            point.fence = None;
        }
        if let Some(backup) = &mut self.backup {
            backup.fence = None;
        }
        if let Some((_, fence)) = &mut self.looked {
            *fence = None;
        }
    }
}

/// Whether a step waits, or works for minutes, while others write.
fn takes_its_time(action: &Action) -> bool {
    matches!(
        action,
        Action::GateApproval(_)
            | Action::GateChecklist(_)
            | Action::GateWindow(_)
            | Action::GateWait(_)
            | Action::ReleaseFetch(_)
            | Action::ReleaseBuild(_)
            | Action::ExecRun(_)
    )
}

/// Copies that would be lost together. They are read from the file, whatever a copy may be.
fn copies(reader: &Reader<'_>, step: &DraftStep) {
    if step.info.name != "postgres.backup" {
        return;
    }
    let Some(list) = reader.tree.get(step.args, "copies") else {
        return;
    };
    let mut seen: Vec<&str> = vec![];
    for item in reader.tree.items(list) {
        let directory = reader.tree.text(*item).trim_end_matches('/');
        if directory.is_empty() {
            continue;
        }
        let holds = |outer: &str, inner: &str| {
            let rest = inner.strip_prefix(outer);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        let with = |other: &&&str| holds(other, directory) || holds(directory, other);
        if let Some(other) = seen.iter().find(with) {
            let message =
                format!("`{directory}` and `{other}` are one place: both copies are lost together");
            let hint = "name directories on volumes, or hosts, of their own";
            reader.warn(Code::CopiesTogether, *item, message, hint);
        }
        seen.push(directory);
    }
}

/// A downgrade to nowhere, or by steps that nobody has counted.
fn downgrade_target(reader: &Reader<'_>, step: &DraftStep, args: &Downgrade) {
    let at = reader.tree.get(step.args, "to").unwrap_or(step.args);
    let hint = "name the revision that the database was at before the migration";
    let to = args.to.as_str();
    if args.tool == Tool::Alembic && to == "base" {
        let message = "`base` undoes every migration there is, and so drops every table";
        reader.report(Code::DestroysData, at, message, Some(hint.to_owned()));
    } else if ["head", "heads"].contains(&to) {
        let message = format!("`{to}` is the newest revision: a downgrade to it goes nowhere");
        reader.report(Code::BadDowngrade, at, message, Some(hint.to_owned()));
    } else if args.tool == Tool::Alembic && tools::is_relative(to) && !to.starts_with(['-', '+']) {
        let message = format!("`{to}` means another revision on the second try");
        reader.report(Code::BadDowngrade, at, message, Some(hint.to_owned()));
    }
}

#[cfg(test)]
mod tests;
