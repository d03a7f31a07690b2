//! Checks of backups: their own arguments, and that what needs one comes after it.

use std::collections::BTreeMap;

use lockstep_proto::action::postgres::{
    Aspect, Backup, Compress, Compression, CopyStore, CopyTo, Format, Level, VerifyBackup,
};

use super::args::{Args, is_known};
use super::draft::DraftStep;
use super::finding::Code;
use super::reader::Reader;

impl Args<'_> {
    pub(super) fn backup(&self, args: &Backup) {
        self.database(&args.database);
        for (index, copy) in args.copies.iter().enumerate() {
            match copy {
                CopyTo::Directory(path) => self.absolute(path, &["copies".into(), index.into()]),
                CopyTo::Command(to) => {
                    for (key, argv) in [("command", &to.command), ("read_back", &to.read_back)] {
                        self.argv(argv, &["copies".into(), index.into(), key.into()]);
                    }
                }
                CopyTo::Store(to) => self.copy_store(to, index, args.globals),
            }
        }
        let is_one_file = |to: &CopyTo| !matches!(to, CopyTo::Directory(_));
        if args.format == Format::Directory && args.copies.iter().any(is_one_file) {
            let message = "a command or a store takes one file, and this archive has many";
            let hint = "say `format: custom`, or name a directory";
            self.report(Code::WrongValue, &["copies".into()], message, hint);
        }
        if args.jobs.is_some() && args.format == Format::Custom {
            let message = "only a directory is dumped by several processes";
            let hint = "say `format: directory`, or leave `jobs` out";
            self.report(Code::WrongValue, &["jobs".into()], message, hint);
        }
        if args.jobs == Some(0) {
            let message = "no process would dump anything";
            self.report(Code::WrongValue, &["jobs".into()], message, "at least 1");
        }
        self.compress(args.compress);
        if args.role_passwords && !args.globals {
            let message = "no roles are kept, and so none of their passwords";
            self.report(
                Code::WrongValue,
                &["role_passwords".into()],
                message,
                "add `globals: true`",
            );
        }
        if args.min_ratio_prev.0 > 100 {
            let message = format!(
                "no archive would be {} of the one before it",
                args.min_ratio_prev
            );
            self.report(
                Code::WrongValue,
                &["min_ratio_prev".into()],
                message,
                "at most 100%",
            );
        }
        if args.keep == 0 {
            let message = "this would keep no backup, not even this rollout's";
            self.report(Code::WrongValue, &["keep".into()], message, "at least 1");
        }
    }

    /// A store: the place stands in the plan, and whoever may write there does not.
    fn copy_store(&self, to: &CopyStore, index: usize, globals: bool) {
        let at = |key: &'static str| ["copies".into(), index.into(), key.into()];
        self.url(&to.store, &at("store"));
        if is_known(&to.store) && (!to.store.ends_with('/') || to.store.contains(['?', '#'])) {
            let message = format!("`{}` is no place with files below it", to.store);
            let hint = "it ends with `/`, and what signs a request is a secret";
            self.report(Code::BadUrl, &at("store"), message, hint);
        }
        for (key, request) in to.requests() {
            for (verb, url) in [("put", &request.put), ("get", &request.get)] {
                if is_known(url) && !url.starts_with("secret://") {
                    let message = "whoever has a presigned URL may do what it says";
                    let hint = "name a secret of the host that holds it: `secret://NAME`";
                    let path = ["copies".into(), index.into(), key.into(), verb.into()];
                    self.report(Code::WrongValue, &path, message, hint);
                }
            }
        }
        match (&to.globals, globals) {
            (None, true) => {
                let message = "`globals.sql` has no requests, and goes with the backup";
                let hint = "add `globals: {put: secret://NAME, get: secret://NAME}`";
                let at = ["copies".into(), index.into()];
                self.report(Code::WrongValue, &at, message, hint);
            }
            (Some(_), false) => {
                let message = "no roles are kept, so there is nothing to send";
                self.report(
                    Code::WrongValue,
                    &at("globals"),
                    message,
                    "add `globals: true`",
                );
            }
            _ => {}
        }
        if let Some(file) = &to.ca_file {
            self.absolute(file, &at("ca_file"));
        }
    }

    fn compress(&self, compress: Compress) {
        let highest = match compress.method {
            Compression::Gzip => 9,
            Compression::Lz4 => 12,
            Compression::Zstd => 22,
            Compression::None => 0,
        };
        if let Some(level) = compress.level
            && !(1..=highest).contains(&level)
        {
            let message = format!("{level} is no level of this method");
            let hint = match highest {
                0 => "leave it out".to_owned(),
                highest => format!("1 to {highest}"),
            };
            self.report(
                Code::WrongValue,
                &["compress".into(), "level".into()],
                message,
                &hint,
            );
        }
    }

    pub(super) fn verify_backup(&self, args: &VerifyBackup) {
        self.database(&args.database);
        self.not_empty(&args.compare, &["compare".into()], "aspects to compare");
        if let Some(from) = &args.from {
            self.absolute(from, &["from".into()]);
        }
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
    made: BTreeMap<&'a str, &'a [Aspect]>,
    proven: BTreeMap<&'a str, Level>,
}

impl<'a> Backups<'a> {
    /// A step makes one.
    pub(super) fn made(&mut self, args: &'a Backup) {
        self.made.insert(&args.database, &args.measure);
    }

    /// A step proves the newest; what it compares must have been measured.
    pub(super) fn proven(&mut self, reader: &Reader<'_>, step: &DraftStep, args: &'a VerifyBackup) {
        let measured = self.made.get(args.database.as_str());
        let is_missing = |aspect| measured.is_some_and(|measured| !measured.contains(aspect));
        if args.compared().iter().any(is_missing) {
            let message = "this compares what the backup before it does not measure";
            let hint =
                "leave `measure` of `postgres.backup` out, or compare less: level 3 needs none";
            reader.report(
                Code::MissingBackup,
                step.node,
                message,
                Some(hint.to_owned()),
            );
        }
        self.proven.insert(&args.database, args.reaches());
    }

    /// Reports a step that needs a backup, if none is made before it.
    pub(super) fn need(&self, reader: &Reader<'_>, step: &DraftStep, database: &str) {
        if !self.made.contains_key(database) {
            let name = step.info.name;
            let message =
                format!("`{name}` needs a backup of `{database}`, and no earlier step takes one");
            let hint = format!("add `postgres.backup: {{database: {database}}}` before it");
            reader.report(Code::MissingBackup, step.node, message, Some(hint));
        }
    }

    /// A step rehearses a migration on the newest, and proves all but its indexes.
    pub(super) fn rehearsed(&mut self, database: &'a str) {
        self.proven.insert(database, Level::Equal);
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
