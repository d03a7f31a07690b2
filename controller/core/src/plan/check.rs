//! Checks of the plan as a whole: names, hosts, order, times. Those of single actions' arguments
//! are in [`super::args`].

use std::collections::{BTreeSet, HashMap};

use lockstep_proto::action::postgres::{Baseline, Level};
use lockstep_proto::action::{Action, Class};
use lockstep_proto::plan::{NoticeWhen, Undo};
use lockstep_proto::values::Period;

use super::backup::Backups;
use super::draft::{Draft, DraftFence, DraftPhase, DraftStep, On};
use super::finding::{Code, did_you_mean};
use super::node::NodeId;
use super::raw::{At, RawStrategy};
use super::reader::Reader;

/// The deadline of a plan that names none.
pub(crate) const DEADLINE: Period = Period::seconds(2 * 3600);

/// How long a compiled plan may be used, if the plan says nothing.
pub(crate) const EXPIRES: Period = Period::seconds(24 * 3600);

/// Adds to the reader's findings what is wrong with a draft.
pub(crate) fn check(reader: &Reader<'_>, draft: &Draft) {
    let check = Check { reader, draft };
    check.top();
    check.fleet();
    check.phase_names();
    for (index, phase) in draft.phases.iter().enumerate() {
        check.phase(phase);
        check.strategy(phase);
        if let Some(fence) = &phase.fence {
            check.fence(index, phase, fence);
        }
    }
    if let Some(phase) = &draft.after_rollback {
        check.phase(phase);
        check.only_checks(phase);
    }
    check.order();
    super::locks::check(reader, draft);
    check.times();
    check.unused_groups();
}

struct Check<'a> {
    reader: &'a Reader<'a>,
    draft: &'a Draft,
}

impl Check<'_> {
    fn report(&self, code: Code, at: NodeId, message: impl Into<String>, hint: &str) {
        let hint = (!hint.is_empty()).then(|| hint.to_owned());
        self.reader.report(code, at, message, hint);
    }

    /// What must stand at the top.
    fn top(&self) {
        let tree = self.reader.tree;
        let raw = &self.draft.raw;
        for (key, example) in [
            ("version", "`version: 1`"),
            ("plan", "`plan: employee-system`"),
            ("fleet", "`fleet: {app: {labels: {role: app}}}`"),
            ("phases", "`phases: [{name: ..., on: app, steps: [...]}]`"),
        ] {
            if self.reader.lacks(tree.root, key) {
                let message = format!("the plan lacks `{key}`");
                self.report(
                    Code::MissingKey,
                    tree.root,
                    message,
                    &format!("such as {example}"),
                );
            }
        }
        if let Some(version) = &raw.version
            && version.value != 1
        {
            let message = format!(
                "this version reads plans of version 1, not {}",
                version.value
            );
            self.report(
                Code::WrongValue,
                version.node,
                message,
                "write `version: 1`",
            );
        }
        if let Some(name) = &raw.plan {
            self.name("plan", name);
        }
        if let Some(phases) = &raw.phases
            && tree.items(phases.node).is_empty()
        {
            self.report(Code::NothingAsked, phases.node, "the plan has no phase", "");
        }
        for role in raw.signoff.iter().flatten() {
            if role.value.trim().is_empty() {
                self.report(Code::BadName, role.node, "a role that signs has a name", "");
            }
        }
    }

    /// A name that appears on screens, in file names and in commands.
    fn name(&self, what: &str, name: &At<String>) {
        if self
            .reader
            .tree
            .scalar(name.node)
            .is_some_and(|scalar| scalar.open)
        {
            return;
        }
        let legal = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        let text = &name.value;
        if text.len() > 64
            || !text.starts_with(|c: char| c.is_ascii_alphanumeric())
            || !text.chars().all(legal)
        {
            let message = format!("`{text}` is no name for a {what}");
            let hint =
                "1 to 64 letters, digits, `-`, `_` and `.`, beginning with a letter or digit";
            self.report(Code::BadName, name.node, message, hint);
        }
    }

    fn fleet(&self) {
        let groups = self
            .draft
            .raw
            .fleet
            .as_ref()
            .map_or(&[][..], |fleet| &fleet.0);
        for (name, group) in groups {
            self.name("group", name);
            if group.labels.is_none() {
                let value = self.reader.tree.get(self.fleet_node(), &name.value);
                let lacks = value.is_some_and(|value| self.reader.lacks(value, "labels"));
                let is_mapping = value.is_some_and(|value| {
                    matches!(
                        self.reader.tree.node(value).kind,
                        super::node::Kind::Mapping(_)
                    )
                });
                if lacks && is_mapping {
                    self.empty_group(name.node, &name.value);
                }
            }
            if let Some(labels) = &group.labels
                && self.reader.tree.entries(labels.node).is_empty()
            {
                self.empty_group(labels.node, &name.value);
            }
        }
    }

    fn empty_group(&self, at: NodeId, name: &str) {
        let message = format!("the group `{name}` has no labels, and so would mean every host");
        self.report(
            Code::EmptyGroup,
            at,
            message,
            "such as `labels: {role: app}`",
        );
    }

    fn fleet_node(&self) -> NodeId {
        let tree = self.reader.tree;
        tree.get(tree.root, "fleet").unwrap_or(tree.root)
    }

    fn groups(&self, on: &On) {
        let tree = self.reader.tree;
        let known: BTreeSet<&str> = tree
            .entries(self.fleet_node())
            .iter()
            .map(|(key, _)| tree.text(*key))
            .filter(|name| !name.starts_with("x-"))
            .collect();
        for group in &on.groups {
            let open = tree.scalar(group.node).is_some_and(|scalar| scalar.open);
            if tree.get(tree.root, "fleet").is_some()
                && !known.contains(group.value.as_str())
                && !open
            {
                let message = format!("`fleet` has no group `{}`", group.value);
                let known: Vec<&str> = known.iter().copied().collect();
                let hint = did_you_mean(&group.value, &known);
                self.reader
                    .report(Code::UnknownGroup, group.node, message, hint);
            }
        }
    }

    /// Hosts of such a group would not be part of a rollout.
    fn unused_groups(&self) {
        if self.reader.has_errors() {
            return;
        }
        let tree = self.reader.tree;
        let phases = self.draft.phases.iter().chain(&self.draft.after_rollback);
        let used: Vec<&At<String>> = phases
            .flat_map(|phase| {
                let steps = phase.steps.iter().filter_map(|step| step.on.as_ref());
                let fence = phase.fence.as_ref().and_then(|fence| fence.on.as_ref());
                phase.on.iter().chain(steps).chain(fence)
            })
            .flat_map(|on| &on.groups)
            .collect();
        let is_open = |group: &&At<String>| tree.scalar(group.node).is_some_and(|s| s.open);
        if used.iter().any(is_open) {
            return;
        }
        let used: BTreeSet<&str> = used.iter().map(|group| group.value.as_str()).collect();
        for (key, _) in tree.entries(self.fleet_node()) {
            let name = tree.text(*key);
            if !name.starts_with("x-") && !used.contains(name) {
                let message = format!("no step is meant for the group `{name}`");
                self.reader
                    .warn(Code::UnusedGroup, *key, message, "use it, or take it out");
            }
        }
    }

    fn phase_names(&self) {
        let tree = self.reader.tree;
        let mut seen: HashMap<&str, usize> = HashMap::new();
        for phase in &self.draft.phases {
            let Some(name) = &phase.name else {
                if self.reader.lacks(phase.node, "name") {
                    self.report(Code::MissingKey, phase.node, "this phase lacks `name`", "");
                }
                continue;
            };
            self.name("phase", name);
            let line = tree.span(name.node).line;
            if let Some(first) = seen.insert(&name.value, line) {
                let message = format!("a second phase is called `{}`", name.value);
                let hint = format!("the first begins on line {first}");
                self.report(Code::DuplicateName, name.node, message, &hint);
            }
        }
        if let (Some(window), Some(_)) = (&self.draft.window, seen.get("window")) {
            let message = "the top-level `window` makes a phase called `window`, and there is one";
            self.report(
                Code::DuplicateName,
                window.0,
                message,
                "give the phase another name",
            );
        }
    }

    /// Steps and where they run.
    fn phase(&self, phase: &DraftPhase) {
        let tree = self.reader.tree;
        if let Some(on) = &phase.on {
            self.groups(on);
        }
        match tree.get(phase.node, "steps") {
            None if self.reader.lacks(phase.node, "steps") => {
                self.report(Code::MissingKey, phase.node, "this phase lacks `steps`", "");
            }
            None => {}
            Some(steps) => {
                let is_list = matches!(tree.node(steps).kind, super::node::Kind::Sequence(_));
                if is_list && tree.items(steps).is_empty() {
                    self.report(Code::NothingAsked, steps, "this phase has no steps", "");
                }
            }
        }
        for step in &phase.steps {
            self.step(phase, step);
        }
    }

    fn step(&self, phase: &DraftPhase, step: &DraftStep) {
        let name = step.info.name;
        if let Some(on) = &step.on {
            self.groups(on);
        }
        match (step.is_controllers(), step.on_node) {
            (true, Some(on)) => {
                let message = format!("`{name}` runs on the controller, not on hosts");
                self.report(Code::ControllerStepOnHosts, on, message, "leave `on` out");
            }
            (false, None) if !phase.has_on => {
                let message = format!("on which hosts should `{name}` run?");
                let hint = "add `on: GROUP` to the phase, or to this step";
                self.report(Code::NoHosts, step.node, message, hint);
            }
            _ => {}
        }
        if let Some(undo) = &step.undo
            && undo.value == Undo::Keep
            && !step.info.undo
        {
            let message = format!("`{name}` has nothing to undo, so there is nothing to keep");
            self.reader
                .warn(Code::UndoOfNothing, undo.node, message, "leave `undo` out");
        }
        self.timeout(step.timeout.as_ref());
    }

    fn timeout(&self, timeout: Option<&At<Period>>) {
        if let Some(timeout) = timeout
            && timeout.value == Period(0)
        {
            let message = "a timeout of nothing cannot be kept";
            let hint = "leave it out for the default";
            self.report(Code::BadTime, timeout.node, message, hint);
        }
    }

    /// A phase that spreads over its hosts in batches is one run of steps on the same hosts.
    fn strategy(&self, phase: &DraftPhase) {
        let Some(At { node, value }) = &phase.strategy else {
            return;
        };
        let word = match value {
            RawStrategy::All => return,
            RawStrategy::Rolling(_) => "rolling",
            RawStrategy::Canary(_) => "canary",
        };
        let hint = "put it into a phase of its own";
        for step in &phase.steps {
            if step.is_controllers() {
                let message = format!("`{}` cannot stand in a {word} phase", step.info.name);
                self.report(Code::MixedStrategy, step.node, message, hint);
            } else if let Some(on) = step.on_node {
                let same = match (&step.on, &phase.on) {
                    (Some(own), Some(all)) => same_hosts(own, all),
                    _ => false,
                };
                if !same {
                    let message = format!("a {word} phase has one `on`, its own");
                    self.report(Code::MixedStrategy, on, message, hint);
                }
            }
        }
        if phase.on.as_ref().is_some_and(|on| on.one_of) {
            let message = format!("{word} needs several hosts, and `on` elects one");
            self.report(
                Code::MixedStrategy,
                *node,
                message,
                "leave the strategy out",
            );
        }
    }

    fn fence(&self, index: usize, phase: &DraftPhase, fence: &DraftFence) {
        let tree = self.reader.tree;
        match &fence.on {
            Some(on) => self.groups(on),
            None if !phase.has_on && tree.get(fence.node, "on").is_none() => {
                let message = "on which hosts is the fence raised?";
                let hint = "add `on: GROUP` to the phase, or to the fence";
                self.report(Code::NoHosts, fence.node, message, hint);
            }
            None => {}
        }
        self.timeout(fence.raw.timeout.as_ref());
        let until = &fence.raw.until;
        if tree.scalar(until.node).is_some_and(|scalar| scalar.open) {
            return;
        }
        let names: Vec<&str> = self.draft.phases.iter().map(phase_name).collect();
        match names.iter().position(|name| *name == until.value) {
            Some(end) if end > index => {}
            Some(_) => {
                let message = format!("the fence ends with `{}`, which is not later", until.value);
                let hint = "a fence holds until a later phase begins";
                self.report(Code::BadFence, until.node, message, hint);
            }
            None => {
                let later: Vec<&str> = names.into_iter().skip(index + 1).collect();
                let message = format!(
                    "there is no phase `{}` that could end the fence",
                    until.value
                );
                let hint = did_you_mean(&until.value, &later);
                self.reader
                    .report(Code::BadFence, until.node, message, hint);
            }
        }
    }

    /// After a rollback nothing is changed any more.
    fn only_checks(&self, phase: &DraftPhase) {
        for step in &phase.steps {
            let is_check = step.info.name.starts_with("check.");
            if !is_check && step.info.class != Class::Observing || step.is_controllers() {
                let message = format!("`{}` is no check", step.info.name);
                let hint = "after a rollback the plan looks, and changes nothing";
                self.report(Code::NotACheck, step.node, message, hint);
            }
        }
    }

    /// What must come before what.
    fn order(&self) {
        let mut backups = Backups::default();
        let mut looked = BTreeSet::new();
        let mut fetched = BTreeSet::new();
        // A step whose arguments cannot be read may be the one that is looked for.
        let mut unread: Vec<&str> = Vec::new();
        for step in self.draft.phases.iter().flat_map(|phase| &phase.steps) {
            let Some(action) = &step.action else {
                unread.push(step.info.name);
                continue;
            };
            match action {
                Action::PostgresBackup(args) => backups.made(args),
                Action::PostgresVerifyBackup(args) => {
                    if !unread.contains(&"postgres.backup") {
                        backups.need(self.reader, step, &args.database);
                    }
                    backups.proven(self.reader, step, args);
                }
                Action::PostgresRehearse(args) => {
                    if !unread.contains(&"postgres.backup") {
                        backups.need(self.reader, step, &args.database);
                    }
                    backups.rehearsed(&args.database);
                }
                Action::PostgresIntegrity(args) => {
                    looked.insert(args.database.as_str());
                }
                Action::PostgresCompare(args) => match args.with {
                    Baseline::Backup if !unread.contains(&"postgres.backup") => {
                        backups.need(self.reader, step, &args.database);
                    }
                    Baseline::Integrity if !unread.contains(&"postgres.integrity") => {
                        self.needs_look(step, &args.database, &looked);
                    }
                    _ => {}
                },
                Action::PostgresRestore(args) if !unread.contains(&"postgres.verify_backup") => {
                    let needed = (args.database.as_str(), Level::Restored);
                    backups.need_proven(self.reader, step, needed, "");
                }
                Action::MigrationApply(args) if !unread.contains(&"postgres.verify_backup") => {
                    if let Some(asked) = args.backup.asks() {
                        let other = ", or say `backup: none` if its data may be lost";
                        let needed = (args.database.as_str(), asked.level);
                        backups.need_proven(self.reader, step, needed, other);
                    }
                }
                Action::ReleaseFetch(args) => {
                    fetched.insert((args.app.as_str(), args.release.as_str()));
                }
                _ => {}
            }
            if let Some((app, release)) = uses_release(action)
                && !fetched.contains(&(app, release))
                && !unread.contains(&"release.fetch")
            {
                let message = format!("no earlier step fetches `{release}` of `{app}`");
                let hint = "add `release.fetch`, unless the hosts have it from an earlier rollout";
                self.reader
                    .warn(Code::NeverFetched, step.node, message, hint);
                fetched.insert((app, release));
            }
        }
    }

    fn needs_look(&self, step: &DraftStep, database: &str, looked: &BTreeSet<&str>) {
        if !looked.contains(database) {
            let message = format!(
                "`{}` needs to know how `{database}` was, and no earlier step looks",
                step.info.name
            );
            let hint =
                format!("add `postgres.integrity: {{database: {database}}}` before the change");
            self.report(Code::NothingToCompare, step.node, message, &hint);
        }
    }

    fn times(&self) {
        let raw = &self.draft.raw;
        let absent = |key: &str| {
            let tree = self.reader.tree;
            tree.get(tree.root, key).is_none()
        };
        let deadline = raw.deadline.as_ref().map(|at| at.value);
        let deadline = deadline.or_else(|| absent("deadline").then_some(DEADLINE));
        let expires = raw.expires.as_ref().map(|at| at.value);
        let expires = expires.or_else(|| absent("expires").then_some(EXPIRES));
        if let Some(At {
            node,
            value: Period(0),
        }) = &raw.deadline
        {
            self.report(
                Code::BadTime,
                *node,
                "a deadline of nothing cannot be kept",
                "",
            );
        }
        let Some(deadline) = deadline else { return };
        if let Some(expires) = expires
            && expires < deadline
        {
            let at = raw.expires.as_ref().or(raw.deadline.as_ref());
            let at = at.map_or(self.reader.tree.root, |at| at.node);
            let message =
                format!("the plan expires after {expires}, before its deadline of {deadline}");
            let hint = "let `expires` be longer than `deadline`";
            self.report(Code::BadTime, at, message, hint);
        }
        for phase in self.draft.phases.iter().chain(&self.draft.after_rollback) {
            if let Some(own) = &phase.deadline
                && (own.value > deadline || own.value == Period(0))
            {
                let message = format!("{} cannot be kept within the plan's {deadline}", own.value);
                self.report(Code::BadTime, own.node, message, "");
            }
            for step in &phase.steps {
                self.waits(step, deadline);
            }
        }
        for notice in &self.draft.notices {
            if let Some(NoticeWhen::Every(every)) = notice.when
                && every < Period::seconds(60)
            {
                let message = format!("a message every {every} is read by nobody");
                self.report(Code::BadTime, notice.args, message, "at least `1m`");
            }
        }
    }

    /// Gates that wait longer than the rollout may take.
    fn waits(&self, step: &DraftStep, deadline: Period) {
        let tree = self.reader.tree;
        let (key, wait) = match &step.action {
            Some(Action::GateWait(wait)) => ("for", wait.r#for),
            Some(Action::GateApproval(gate)) => ("timeout", gate.timeout),
            Some(Action::GateChecklist(gate)) => match tree.get(step.args, "timeout") {
                Some(_) => ("timeout", gate.timeout),
                None => return,
            },
            _ => return,
        };
        let at = tree.get(step.args, key).unwrap_or(step.args);
        if wait == Period(0) {
            self.report(
                Code::BadTime,
                at,
                "waiting for no time at all is no gate",
                "",
            );
        } else if wait >= deadline {
            let message = format!("waiting {wait} cannot be kept within the plan's {deadline}");
            let hint = "raise the plan's `deadline`";
            if key == "for" {
                self.report(Code::BadTime, at, message, hint);
            } else {
                self.reader.warn(Code::BadTime, at, message, hint);
            }
        }
    }
}

fn phase_name(phase: &DraftPhase) -> &str {
    phase.name.as_ref().map_or("", |name| name.value.as_str())
}

/// Whether two `on` mean the same hosts.
fn same_hosts(a: &On, b: &On) -> bool {
    let groups = |on: &On| -> BTreeSet<String> {
        on.groups.iter().map(|group| group.value.clone()).collect()
    };
    a.one_of == b.one_of && groups(a) == groups(b)
}

/// The release that an action works with, but does not fetch.
fn uses_release(action: &Action) -> Option<(&str, &str)> {
    match action {
        Action::ReleaseBuild(args) => Some((&args.app, &args.release)),
        Action::ReleaseActivate(args) => Some((&args.app, &args.release)),
        Action::MigrationPlan(args) => Some((&args.app, &args.release)),
        Action::MigrationApply(args) => Some((&args.app, &args.release)),
        Action::PostgresRehearse(args) => Some((&args.app, &args.release)),
        Action::MigrationCurrent(args) => Some((&args.app, &args.release)),
        Action::MigrationVerify(args) => Some((&args.app, &args.release)),
        Action::MigrationDowngrade(args) => Some((&args.app, &args.release)),
        _ => None,
    }
}
