//! Checks of actions' arguments that their types alone cannot make: names, URLs,
//! expressions, and the variables and secrets in them.

use std::collections::BTreeSet;

use lockstep_proto::action::gate::{MOST_APPROVALS, Window};
use lockstep_proto::action::migration::{RequiredBackup, UndoBy};
use lockstep_proto::action::postgres::{Assertion, Kind, System};
use lockstep_proto::action::{Action, Site};
use lockstep_proto::ids::RolloutId;
use regex::Regex;

use super::command::holds_password;
use super::draft::{Draft, DraftStep};
use super::finding::{Code, did_you_mean};
use super::inputs::{LATER, cause};
use super::node::{NodeId, Step};
use super::reader::Reader;

/// What `${rollout.}` can be.
const ROLLOUT: [&str; 6] = ["id", "plan", "state", "reason", "elapsed", "phase"];

/// Keys whose values may hold a secret: they reach neither an argv nor a log.
const SECRET_HOLDERS: [&str; 4] = ["headers", "form", "env", "set"];

/// Adds to the reader's findings what is wrong with the arguments of a draft's actions.
pub(crate) fn check(reader: &Reader<'_>, draft: &Draft) {
    for phase in draft.phases.iter().chain(&draft.after_rollback) {
        for step in &phase.steps {
            let args = Args {
                reader,
                args: step.args,
            };
            args.variables(step.info.site, step.info.name);
            args.secrets();
            match &step.action {
                Some(action) => args.action(action),
                None => args.unread_argv(),
            }
        }
        if let Some(fence) = &phase.fence {
            let args = Args {
                reader,
                args: fence.node,
            };
            args.database(&fence.raw.database);
            args.not_empty(&fence.raw.roles, &["roles".into()], "roles");
        }
    }
    for notice in &draft.notices {
        let args = Args {
            reader,
            args: notice.args,
        };
        args.variables(Site::Controller, "notify");
        args.secrets();
        if let Some(action) = &notice.action {
            args.action(action);
        }
    }
    if let Some((node, Action::GateWindow(window))) = &draft.window {
        Args {
            reader,
            args: *node,
        }
        .window(window);
    }
    elsewhere(reader, draft);
}

/// Outside the steps, nobody puts variables in later.
fn elsewhere(reader: &Reader<'_>, draft: &Draft) {
    let steps: BTreeSet<NodeId> = draft
        .phases
        .iter()
        .chain(&draft.after_rollback)
        .flat_map(|phase| &phase.steps)
        .map(|step: &DraftStep| step.node)
        .chain(
            draft
                .notices
                .iter()
                .filter_map(|n| Some(reader.tree.node(n.args).parent?.0)),
        )
        .collect();
    let root = reader.tree.root;
    for (key, value) in reader.tree.entries(root) {
        let name = reader.tree.text(*key);
        if name == "inputs" || name.starts_with("x-") {
            continue;
        }
        reader.tree.each_scalar(*value, &mut |id, scalar| {
            let mut here = Some(id);
            while let Some(node) = here {
                let is_note = reader
                    .tree
                    .key_of(node)
                    .is_some_and(|key| key.starts_with("x-"));
                if is_note || steps.contains(&node) {
                    return;
                }
                here = reader.tree.node(node).parent.map(|(parent, _)| parent);
            }
            for name in later_names(&scalar.text) {
                let message = format!("nobody puts `${{{name}}}` in here");
                let hint = "it works in the arguments of steps".to_owned();
                reader.report(Code::MisplacedVariable, id, message, Some(hint));
            }
        });
    }
}

/// The names in `${...}` that are put in later.
pub(super) fn later_names(text: &str) -> impl Iterator<Item = &str> {
    let after = text.split("${").skip(1);
    let names = after.filter_map(|rest| rest.split_once('}').map(|(name, _)| name));
    names.filter(|name| LATER.iter().any(|family| name.starts_with(family)))
}

/// The arguments of one action.
#[derive(Clone, Copy)]
pub(super) struct Args<'a> {
    pub(super) reader: &'a Reader<'a>,
    pub(super) args: NodeId,
}

pub(super) type Path<'p> = [Step<'p>];

/// Whether a text is known in full already.
pub(super) fn is_known(text: &str) -> bool {
    !text.contains("${")
}

impl Args<'_> {
    pub(super) fn report(
        &self,
        code: Code,
        path: &Path<'_>,
        message: impl Into<String>,
        hint: &str,
    ) {
        let at = self.reader.at(self.args, path);
        let hint = (!hint.is_empty()).then(|| hint.to_owned());
        self.reader.report(code, at, message, hint);
    }

    fn action(&self, action: &Action) {
        match action {
            Action::ServiceStop(args) => self.service(&args.service),
            Action::ServiceStart(args) => self.service(&args.service),
            Action::ServiceRestart(args) => self.service(&args.service),
            Action::ServiceStatus(args) => self.service(&args.service),
            Action::ReleaseFetch(args) => {
                self.release(&args.app, &args.release);
                self.not_a_flag(&args.git.url, &["git".into(), "url".into()], "a repository");
                self.no_password(&args.git.url, &["git".into(), "url".into()]);
                self.file_name(&args.git.tag, &["git".into(), "tag".into()], "a tag", true);
                if let Some(commit) = &args.git.commit {
                    self.commit(commit);
                }
            }
            Action::ReleaseBuild(args) => {
                self.release(&args.app, &args.release);
                self.not_empty(&args.run, &["run".into()], "commands");
                for (index, command) in args.run.iter().enumerate() {
                    let entry = [Step::Key("run"), index.into(), "argv".into()];
                    self.argv(&command.argv, &entry);
                    let dir = [Step::Key("run"), index.into(), "in".into()];
                    self.inner_path(&command.within_dir, &dir);
                }
            }
            Action::ReleaseActivate(args) => self.release(&args.app, &args.release),
            Action::ReleasePrevious(args) => self.plain_name(&args.app, "app", "an application"),
            Action::EnvDiff(args) => self.absolute(&args.path, &["path".into()]),
            Action::EnvRender(args) => {
                self.absolute(&args.path, &["path".into()]);
                let octal = |c: char| ('0'..='7').contains(&c);
                if !(3..=4).contains(&args.mode.len()) || !args.mode.chars().all(octal) {
                    let message = format!("`{}` is no octal mode", args.mode);
                    self.report(
                        Code::WrongValue,
                        &["mode".into()],
                        message,
                        "such as `0600`",
                    );
                }
            }
            Action::PostgresBackup(args) => self.backup(args),
            Action::PostgresVerifyBackup(args) => self.verify_backup(args),
            Action::PostgresRehearse(a) => {
                self.migration(&a.database, &a.app, &a.release, &a.dir);
                self.revision(&a.to);
            }
            Action::PostgresRestore(args) => self.database(&args.database),
            Action::PostgresCounts(args) => self.database(&args.database),
            Action::PostgresIntegrity(args) => self.database(&args.database),
            Action::PostgresCompare(args) => self.database(&args.database),
            Action::PostgresAssert(args) => {
                self.database(&args.database);
                if args.checks.is_empty() && args.tables.is_empty() && !args.foreign_keys {
                    let message = "this asserts nothing";
                    let hint = "give `checks`, `tables` or `foreign_keys: true`";
                    self.report(Code::NothingAsked, &["checks".into()], message, hint);
                }
                for (index, check) in args.checks.iter().enumerate() {
                    self.assertion(check, &["checks".into(), index.into()]);
                }
            }
            Action::PostgresAnalyze(args) => self.database(&args.database),
            Action::PostgresRestorePoint(args) => self.database(&args.database),
            Action::PostgresExternalBackup(args) => {
                self.database(&args.database);
                let kind = self.reader.tree.get(self.args, "kind");
                if args.system == System::Barman && kind.is_some() && args.kind != Kind::Full {
                    let message = "Barman's backups are full";
                    let hint = "leave `kind` out; what it reuses stands in its own configuration";
                    self.report(Code::WrongValue, &["kind".into()], message, hint);
                }
            }
            Action::PostgresFence(args) => {
                self.database(&args.database);
                self.not_empty(&args.roles, &["roles".into()], "roles");
            }
            Action::PostgresUnfence(args) => {
                self.database(&args.database);
                if let Some(left_by) = &args.left_by
                    && is_known(left_by)
                    && left_by.parse::<RolloutId>().is_err()
                {
                    let message = format!("`{left_by}` is no rollout");
                    let hint = "such as `ro_0123456789ab`; the refusal of the fence names it";
                    self.report(Code::WrongValue, &["left_by".into()], message, hint);
                }
                self.not_empty(&args.roles, &["roles".into()], "roles");
            }
            Action::MigrationCurrent(a) => self.migration(&a.database, &a.app, &a.release, &a.dir),
            Action::MigrationPlan(a) => {
                self.migration(&a.database, &a.app, &a.release, &a.dir);
                self.revision(&a.to);
            }
            Action::MigrationApply(a) => {
                self.migration(&a.database, &a.app, &a.release, &a.dir);
                self.revision(&a.to);
                if a.undo_by == UndoBy::Restore && a.backup == RequiredBackup::None {
                    let message = "without a backup there is nothing to restore";
                    let hint = "leave `backup: none` out, or say `undo_by: downgrade`";
                    self.report(Code::WrongValue, &["undo_by".into()], message, hint);
                }
            }
            Action::MigrationVerify(a) => {
                self.migration(&a.database, &a.app, &a.release, &a.dir);
                self.revision(&a.to);
            }
            Action::MigrationDowngrade(a) => {
                self.migration(&a.database, &a.app, &a.release, &a.dir);
                self.revision(&a.to);
            }
            Action::CheckHttp(args) => self.http(args),
            Action::CheckDisk(args) => self.absolute(&args.path, &["path".into()]),
            Action::CheckSql(args) => {
                self.database(&args.database);
                self.expects_a_value();
            }
            Action::CheckLog(args) => {
                self.absolute(&args.path, &["path".into()]);
                for (key, patterns) in [("deny", &args.deny), ("require", &args.require)] {
                    for (index, pattern) in patterns.iter().enumerate() {
                        self.regex(pattern, &[key.into(), index.into()]);
                    }
                }
                if args.deny.is_empty() && args.require.is_empty() {
                    let hint = "give `deny` or `require`";
                    self.report(
                        Code::NothingAsked,
                        &[],
                        "this asks nothing of the log",
                        hint,
                    );
                }
            }
            Action::CheckCommand(args) => {
                self.argv(&args.argv, &["argv".into()]);
                self.some_regex(args.matches.as_deref(), &["matches".into()]);
            }
            Action::ExecRun(args) => {
                self.argv(&args.argv, &["argv".into()]);
                self.some_regex(args.matches.as_deref(), &["matches".into()]);
            }
            Action::GateApproval(args) => {
                if args.from.is_empty() {
                    let message = "nobody is asked to approve";
                    self.report(
                        Code::NothingAsked,
                        &["from".into()],
                        message,
                        "such as `{dba: 1}`",
                    );
                }
                for (group, people) in &args.from {
                    if *people > MOST_APPROVALS {
                        let message = format!("{people} people of `{group}` are asked to approve");
                        let hint = format!("at most {MOST_APPROVALS}");
                        let at = ["from".into(), group.as_str().into()];
                        self.report(Code::WrongValue, &at, message, &hint);
                    }
                }
                for (group, _) in args.from.iter().filter(|(_, people)| **people == 0) {
                    let message = format!("no approval of `{group}` is asked for");
                    let hint = "at least 1, or leave the group out";
                    self.report(
                        Code::NothingAsked,
                        &["from".into(), group.as_str().into()],
                        message,
                        hint,
                    );
                }
            }
            Action::GateChecklist(args) => self.not_empty(&args.items, &["items".into()], "items"),
            Action::GateWindow(args) => self.window(args),
            Action::NotifyWebhook(args) => self.target_url(&args.url, "url"),
            Action::NotifySlack(args) => self.target_url(&args.webhook, "webhook"),
            Action::NotifyEmail(args) => {
                self.not_empty(&args.to, &["to".into()], "addresses");
                for (index, address) in args.to.iter().enumerate() {
                    if is_known(address) && !address.contains('@') {
                        let message = format!("`{address}` is no e-mail address");
                        self.report(Code::WrongValue, &["to".into(), index.into()], message, "");
                    }
                }
            }
            Action::CheckTcp(_)
            | Action::CheckPort(_)
            | Action::CheckProcess(_)
            | Action::CheckTls(_)
            | Action::GateWait(_) => {}
        }
    }

    /// What is wrong with a command's words does not wait until the rest of its action is right.
    fn unread_argv(&self) {
        let tree = self.reader.tree;
        let Some(argv) = tree.get(self.args, "argv") else {
            return;
        };
        let words: Vec<String> = tree
            .items(argv)
            .iter()
            .map(|id| tree.text(*id).to_owned())
            .collect();
        if !words.is_empty() {
            self.argv(&words, &["argv".into()]);
        }
    }

    pub(super) fn not_empty<T>(&self, items: &[T], path: &Path<'_>, what: &str) {
        // A list of which nothing could be read is not empty.
        let at = self.reader.at(self.args, path);
        if items.is_empty() && self.reader.tree.items(at).is_empty() {
            self.report(
                Code::NothingAsked,
                path,
                format!("there are no {what} here"),
                "",
            );
        }
    }

    /// A check asks for a value, or for no row.
    fn assertion(&self, check: &Assertion, path: &Path<'_>) {
        let of_value =
            check.equals.is_some() || check.at_least.is_some() || check.at_most.is_some();
        if check.empty && of_value {
            let message = "where no row may be returned, there is no value";
            let hint = "give `empty: true`, or what the value must be";
            self.report(Code::WrongValue, path, message, hint);
        } else if !check.empty && !of_value && !self.has_unread(path) {
            let message = "this asks nothing of the statement";
            let hint = "give `equals`, `at_least`, `at_most` or `empty: true`";
            self.report(Code::NothingAsked, path, message, hint);
        }
    }

    /// Whether what stands here says more than could be read.
    fn has_unread(&self, path: &Path<'_>) -> bool {
        let at = self.reader.at(self.args, path);
        let keys = ["equals", "at_least", "at_most"];
        keys.iter()
            .any(|key| self.reader.tree.get(at, key).is_some())
    }

    /// A statement that nothing is asked of would always be well.
    fn expects_a_value(&self) {
        let tree = self.reader.tree;
        let keys = ["equals", "at_least", "at_most"];
        if keys.iter().all(|key| tree.get(self.args, key).is_none()) {
            let message = "this asks nothing of the statement's value";
            let hint = "give `equals`, `at_least` or `at_most`";
            self.report(Code::NothingAsked, &[], message, hint);
        }
    }

    /// A value that reaches a tool as one argument, and must not be taken for an option.
    fn not_a_flag(&self, text: &str, path: &Path<'_>, what: &str) {
        if is_known(text) && (text.is_empty() || text.starts_with('-')) {
            let message = format!("`{text}` is no name for {what}");
            let hint = "it is not empty and does not begin with `-`";
            self.report(Code::BadName, path, message, hint);
        }
    }

    fn plain_name(&self, text: &str, key: &str, what: &str) {
        self.file_name(text, &[key.into()], what, false);
    }

    /// A name that becomes part of a path; a tag may have slashes.
    fn file_name(&self, text: &str, path: &Path<'_>, what: &str, slashes: bool) {
        let odd = |c: char| c.is_whitespace() || c.is_control() || (c == '/' && !slashes);
        let dots = text.split('/').any(|part| part == "." || part == "..");
        if is_known(text)
            && (text.is_empty() || text.starts_with('-') || dots || text.contains(odd))
        {
            let message = format!("`{}` is no name for {what}", text.escape_debug());
            let hint = "not empty, not beginning with `-`, without spaces and `/`";
            self.report(Code::BadName, path, message, hint);
        }
    }

    fn service(&self, service: &str) {
        self.plain_name(service, "service", "a service");
    }

    pub(super) fn database(&self, database: &str) {
        self.plain_name(database, "database", "a database");
    }

    fn release(&self, app: &str, release: &str) {
        self.plain_name(app, "app", "an application");
        self.plain_name(release, "release", "a release");
    }

    fn migration(&self, database: &str, app: &str, release: &str, dir: &str) {
        self.database(database);
        self.release(app, release);
        self.inner_path(dir, &["dir".into()]);
    }

    fn revision(&self, to: &str) {
        if is_known(to) && (to.is_empty() || to.starts_with(['-', '+'])) {
            let message = format!("`{to}` is no revision");
            let hint = "name it: a relative one means another revision on the second try";
            self.report(Code::BadName, &["to".into()], message, hint);
        }
    }

    fn commit(&self, commit: &str) {
        let hexadecimal = commit.len() >= 40 && commit.chars().all(|c| c.is_ascii_hexdigit());
        if is_known(commit) && !hexadecimal {
            let message = format!("`{commit}` is no full commit");
            let hint = "all 40 hexadecimal digits, as `git rev-parse` prints them";
            self.report(
                Code::BadName,
                &["git".into(), "commit".into()],
                message,
                hint,
            );
        }
    }

    /// A path below a release.
    fn inner_path(&self, path: &str, at: &Path<'_>) {
        let leaves = path.starts_with('/') || path.split('/').any(|part| part == "..");
        if is_known(path) && leaves {
            let message = format!("`{path}` leaves the release");
            self.report(
                Code::BadName,
                at,
                message,
                "write it relative to the release",
            );
        }
    }

    pub(super) fn absolute(&self, path: &str, at: &Path<'_>) {
        if is_known(path) && !path.starts_with('/') {
            let message = format!("`{path}` is no absolute path");
            self.report(Code::BadName, at, message, "it begins with `/`");
        }
    }

    fn regex(&self, pattern: &str, path: &Path<'_>) {
        if let Err(error) = Regex::new(pattern)
            && is_known(pattern)
        {
            let message = format!("the expression does not compile: {}", cause(&error));
            self.report(Code::BadRegex, path, message, "");
        }
    }

    pub(super) fn some_regex(&self, pattern: Option<&str>, path: &Path<'_>) {
        if let Some(pattern) = pattern {
            self.regex(pattern, path);
        }
    }

    fn window(&self, window: &Window) {
        self.not_empty(&window.days, &["days".into()], "days");
        if is_known(&window.utc) && window_minutes(&window.utc).is_none() {
            let message = format!("`{}` is no window", window.utc);
            let hint = "such as `14:00-18:00`, in UTC, and not over midnight";
            self.report(Code::WrongValue, &["utc".into()], message, hint);
        }
    }

    /// A repository may name a user, as ssh does, but no password.
    fn no_password(&self, url: &str, path: &Path<'_>) {
        if holds_password(url) {
            let hint = "let git on the hosts know it, for example through a credential helper";
            self.report(Code::BadUrl, path, "this URL holds a password", hint);
        }
    }

    /// Where a notice goes: a URL, or a secret that holds one.
    fn target_url(&self, url: &str, key: &str) {
        if !url.starts_with("secret://") {
            self.url(url, &[key.into()]);
        }
    }

    pub(super) fn url(&self, url: &str, path: &Path<'_>) {
        // A variable may stand for the beginning, too.
        if url.starts_with("${") {
            return;
        }
        let rest = url
            .strip_prefix("http://")
            .or_else(|| url.strip_prefix("https://"));
        let authority = rest.and_then(|rest| rest.split(['/', '?', '#']).next());
        match authority {
            None | Some("") => {
                let message = format!("`{url}` is no absolute URL");
                let hint = "it begins with `http://` or `https://` and a host";
                self.report(Code::BadUrl, path, message, hint);
            }
            Some(authority) if authority.contains('@') => {
                let message = "this URL holds a user, and perhaps a password";
                let hint = "send it in `headers`, from a `secret://`";
                self.report(Code::BadUrl, path, message, hint);
            }
            Some(_) => {}
        }
    }

    /// Variables that are put in later stand only where somebody puts them in.
    fn variables(&self, site: Site, action: &str) {
        self.reader.tree.each_scalar(self.args, &mut |id, scalar| {
            for name in later_names(&scalar.text) {
                let (family, rest) = name.split_once('.').unwrap_or((name, ""));
                let hint = match (family, site) {
                    ("host", Site::Host) => continue,
                    ("host", Site::Controller) => "this runs on the controller",
                    ("capture", _) if action == "check.http" => continue,
                    ("capture", _) => "captures are for the requests of a `check.http`",
                    _ if action.starts_with("notify") => {
                        if !ROLLOUT.contains(&rest) {
                            let message = format!("a rollout has no `{rest}`");
                            let hint = did_you_mean(rest, &ROLLOUT);
                            self.reader.report(Code::UnknownVariable, id, message, hint);
                        }
                        continue;
                    }
                    _ => "this is for notices",
                };
                let message = format!("nobody puts `${{{name}}}` in here");
                self.reader
                    .report(Code::MisplacedVariable, id, message, Some(hint.to_owned()));
            }
        });
    }

    /// Secrets stand only where they are never seen.
    fn secrets(&self) {
        let tree = self.reader.tree;
        tree.each_scalar(self.args, &mut |id, scalar| {
            if !scalar.text.contains("secret://") {
                return;
            }
            let holder = tree
                .node(id)
                .parent
                .and_then(|(parent, _)| tree.key_of(parent));
            let is_target = matches!(tree.key_of(id), Some("webhook" | "url"))
                && scalar.text.starts_with("secret://")
                && tree
                    .node(id)
                    .parent
                    .is_some_and(|(parent, _)| parent == self.args)
                && tree
                    .key_of(self.args)
                    .is_some_and(|name| name.starts_with("notify."));
            // Presigned requests of a copy: the agent sends them, and shows of them where they go.
            let is_presigned = matches!(tree.key_of(id), Some("put" | "get"))
                && holder.is_some_and(|key| matches!(key, "archive" | "manifest" | "globals"))
                && tree.key_of(self.args) == Some("postgres.backup");
            if is_target || is_presigned || holder.is_some_and(|key| SECRET_HOLDERS.contains(&key))
            {
                return;
            }
            let message = "a secret cannot stand here: others would see its value";
            let hint = "secrets work in `env`, `set`, `headers` and `form`".to_owned();
            self.reader
                .report(Code::MisplacedSecret, id, message, Some(hint));
        });
    }
}

/// The beginning and end of a window, in minutes of the day; it does not pass midnight.
fn window_minutes(text: &str) -> Option<(u32, u32)> {
    let minutes = |clock: &str| -> Option<u32> {
        let (hours, minutes) = clock.split_once(':')?;
        let digits = |text: &str| text.len() == 2 && text.bytes().all(|b| b.is_ascii_digit());
        if !digits(hours) || !digits(minutes) {
            return None;
        }
        let (hours, minutes): (u32, u32) = (hours.parse().ok()?, minutes.parse().ok()?);
        let in_day = hours < 24 && minutes < 60 || (hours, minutes) == (24, 0);
        in_day.then_some(hours * 60 + minutes)
    };
    let (from, until) = text.split_once('-')?;
    let (from, until) = (minutes(from)?, minutes(until)?);
    (from < until).then_some((from, until))
}
