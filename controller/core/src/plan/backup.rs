//! Checks of backups: their own arguments, and that what needs one comes after it.

use std::collections::{BTreeMap, BTreeSet};

use lockstep_proto::action::postgres::{Backup, Level, VerifyBackup};

use super::args::Args;
use super::draft::DraftStep;
use super::finding::Code;
use super::reader::Reader;

impl Args<'_> {
    pub(super) fn backup(&self, args: &Backup) {
        self.database(&args.database);
        for (index, copy) in args.copies.iter().enumerate() {
            self.absolute(copy, &["copies".into(), index.into()]);
        }
        if args.keep == 0 {
            let message = "this would keep no backup, not even this rollout's";
            self.report(Code::WrongValue, &["keep".into()], message, "at least 1");
        }
    }

    pub(super) fn verify_backup(&self, args: &VerifyBackup) {
        self.database(&args.database);
        self.not_empty(&args.compare, &["compare".into()], "aspects to compare");
        // A level that stands in the plan is reached, or it would promise what nothing proves.
        let is_named = self.reader.tree.get(self.args, "level").is_some();
        if is_named && args.reaches() < args.level {
            let message = format!("this does not reach {}: not all is compared", args.level);
            let hint = "leave `compare` out, or ask for level 3";
            self.report(Code::WrongValue, &["level".into()], message, hint);
        }
    }
}

/// The backups that the steps before have made and proven, by database.
#[derive(Debug, Default)]
pub(super) struct Backups<'a> {
    made: BTreeSet<&'a str>,
    proven: BTreeMap<&'a str, Level>,
}

impl<'a> Backups<'a> {
    /// A step makes one.
    pub(super) fn made(&mut self, args: &'a Backup) {
        self.made.insert(&args.database);
    }

    /// A step proves the newest.
    pub(super) fn proven(&mut self, args: &'a VerifyBackup) {
        self.proven.insert(&args.database, args.reaches());
    }

    /// Reports a step that needs a backup, if none is made before it.
    pub(super) fn need(&self, reader: &Reader<'_>, step: &DraftStep, database: &str) {
        if !self.made.contains(database) {
            let name = step.info.name;
            let message =
                format!("`{name}` needs a backup of `{database}`, and no earlier step takes one");
            let hint = format!("add `postgres.backup: {{database: {database}}}` before it");
            reader.report(Code::MissingBackup, step.node, message, Some(hint));
        }
    }

    /// Reports a step that needs a proven one, if none is proven that far before it (INV-7).
    pub(super) fn need_proven(
        &self,
        reader: &Reader<'_>,
        step: &DraftStep,
        (database, asked): (&str, Level),
        other: &str,
    ) {
        let name = step.info.name;
        let (message, hint) = match self.proven.get(database) {
            None => (
                format!("`{name}` needs a verified backup of `{database}` before it (INV-7)"),
                format!(
                    "add `postgres.backup` and `postgres.verify_backup` of `{database}`{other}"
                ),
            ),
            Some(reached) if *reached < asked => (
                format!(
                    "`{name}` needs a backup of `{database}` that is proven to {asked}, and the \
                     step before it proves {reached} (INV-7)"
                ),
                "raise the `level` of `postgres.verify_backup`, and let it compare all".to_owned(),
            ),
            Some(_) => return,
        };
        reader.report(Code::MissingBackup, step.node, message, Some(hint));
    }
}
