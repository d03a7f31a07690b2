//! Commands of database tools that do something else than they seem to, or destroy what nobody
//! can bring back. Each rule is a mistake that real runbooks make.

use lockstep_proto::action::migration::Tool;

use super::super::args::{Args, Path};
use super::super::command;
use super::super::finding::Code;
use super::super::node::Step;

/// What is wrong with a command.
#[derive(Debug)]
struct Fault {
    code: Code,
    /// The word that shows it.
    at: usize,
    message: String,
    hint: String,
}

impl Args<'_> {
    /// Reports what is wrong with a command of a database tool.
    pub(in crate::plan) fn database_tool(&self, argv: &[String], path: &Path<'_>) {
        for fault in faults(argv) {
            let word = Step::Item(fault.at);
            let path: Vec<Step<'_>> = path.iter().copied().chain([word]).collect();
            if fault.code == Code::DestroysData {
                self.report(fault.code, &path, fault.message, &fault.hint);
            } else {
                let at = self.reader.at(self.args, &path);
                self.reader.warn(fault.code, at, fault.message, &fault.hint);
            }
        }
    }
}

/// The tool that a command runs.
struct Command<'a> {
    tool: &'a str,
    /// Where its name stands.
    at: usize,
    /// What follows it.
    words: &'a [String],
}

fn faults(argv: &[String]) -> Vec<Fault> {
    let mut faults = flags_for_the_wrong_program(argv);
    let Some(command) = find(argv) else {
        return faults;
    };
    if command
        .words
        .iter()
        .any(|word| word == "--version" || word == "--help")
    {
        return faults;
    }
    match command.tool {
        "dropdb" => faults.push(command.destroys(
            0,
            "`dropdb` destroys the only good copy before another is known to work",
            "`postgres.restore` restores into a new database, swaps the names and keeps the old one",
        )),
        "createdb" => faults.push(command.misused(
            0,
            "`createdb` makes a database without the old one's owner, encoding, grants and settings",
            "`postgres.restore` takes them over; `postgres.verify_backup` makes its own scratch database",
        )),
        "psql" => faults.extend(psql(&command)),
        "pg_dump" => faults.push(command.misused(
            0,
            "a `pg_dump` that ends well is no backup yet: nobody has restored it, and no migration counts it",
            "use `postgres.backup` and `postgres.verify_backup`",
        )),
        "pg_restore" => faults.extend(pg_restore(&command)),
        "alembic" => faults.extend(alembic(&command)),
        "prisma" => faults.extend(prisma(&command)),
        "diesel" => faults.extend(diesel(&command)),
        "sqlx" => faults.extend(sqlx(&command)),
        "ls" | "stat" | "du" | "wc" | "file" | "test" => faults.extend(looks_at_a_dump(&command)),
        _ => {}
    }
    faults
}

impl Command<'_> {
    /// A fault at the tool's name (0), or at a word after it.
    fn fault(
        &self,
        code: Code,
        word: usize,
        message: impl Into<String>,
        hint: impl Into<String>,
    ) -> Fault {
        Fault {
            code,
            at: self.at + word,
            message: message.into(),
            hint: hint.into(),
        }
    }

    fn destroys(&self, word: usize, message: impl Into<String>, hint: impl Into<String>) -> Fault {
        self.fault(Code::DestroysData, word, message, hint)
    }

    fn misused(&self, word: usize, message: impl Into<String>, hint: impl Into<String>) -> Fault {
        self.fault(Code::MisusedTool, word, message, hint)
    }

    /// The words that are no options, with their places after the tool's name.
    fn operands(&self) -> impl Iterator<Item = (usize, &str)> {
        let words = self.words.iter().enumerate();
        words
            .filter(|(_, word)| !word.starts_with('-'))
            .map(|(index, word)| (index + 1, word.as_str()))
    }

    /// Where these operands follow each other, with options anywhere between them.
    fn subcommand(&self, words: &[&str]) -> Option<usize> {
        let operands: Vec<(usize, &str)> = self.operands().collect();
        let found = operands.windows(words.len()).find(|window| {
            let mut pairs = window.iter().zip(words);
            pairs.all(|((_, operand), word)| operand == word)
        });
        found.map(|window| window[words.len() - 1].0)
    }

    /// Where an option stands, attached value or not.
    fn option(&self, names: &[&str]) -> Option<usize> {
        let is_it = |word: &String| {
            let name = word.split('=').next().unwrap_or_default();
            names.contains(&name)
        };
        self.words.iter().position(is_it).map(|index| index + 1)
    }

    /// The values of an option, with their places; attached or in the next word.
    fn values(&self, letter: &str, name: &str) -> Vec<(usize, &str)> {
        let mut values = vec![];
        for (index, word) in self.words.iter().enumerate() {
            if word == letter || word == name || ends_bundle(word, letter) {
                if let Some(value) = self.words.get(index + 1) {
                    values.push((index + 2, value.as_str()));
                }
            } else if let Some(value) = word
                .strip_prefix(name)
                .and_then(|rest| rest.strip_prefix('='))
            {
                values.push((index + 1, value));
            } else if let Some(value) = word.strip_prefix(letter)
                && !word.starts_with("--")
            {
                values.push((index + 1, value));
            }
        }
        values
    }
}

/// Whether a word is some of psql's flags at once, with an option that takes the next word: `-tAc`.
fn ends_bundle(word: &str, letter: &str) -> bool {
    let flags = word.strip_prefix('-').zip(letter.strip_prefix('-'));
    let flags = flags.and_then(|(word, letter)| word.strip_suffix(letter));
    flags.is_some_and(|flags| {
        !flags.is_empty() && flags.chars().all(|c| "aAbeEHlnqsStwWxXz01".contains(c))
    })
}

/// The tool behind wrappers, package runners and containers.
fn find(argv: &[String]) -> Option<Command<'_>> {
    const TOOLS: [&str; 8] = [
        "dropdb",
        "createdb",
        "psql",
        "pg_dump",
        "pg_restore",
        "alembic",
        "prisma",
        "diesel",
    ];
    let mut at = command::program(argv)?;
    loop {
        let name = command::base_name(argv.get(at)?);
        let rest = &argv[at + 1..];
        // Where it starts what its arguments name.
        let further = match name {
            "npx" | "bunx" | "yarn" | "pnpm" | "bun" | "npm" | "poetry" | "pipenv" | "uv"
            | "bundle" | "cargo" => rest.iter().position(|word| {
                !word.starts_with('-') && !["exec", "run", "dlx", "x"].contains(&word.as_str())
            }),
            name if name.starts_with("python") => {
                let module = rest.iter().position(|word| word == "-m");
                module.map(|module| module + 1)
            }
            // What a container runs is anywhere among the words.
            "docker" | "docker-compose" | "podman" | "kubectl" | "ssh" => {
                let is_tool = |word: &String| {
                    let name = command::base_name(word);
                    TOOLS.contains(&name) || name == "sqlx"
                };
                rest.iter().position(is_tool)
            }
            _ => {
                // `npx prisma@6`
                let tool = name.split('@').next().unwrap_or(name);
                return Some(Command {
                    tool,
                    at,
                    words: rest,
                });
            }
        };
        at += 1 + further?;
    }
}

/// Options of `kubectl` behind `--` are the program's.
fn flags_for_the_wrong_program(argv: &[String]) -> Vec<Fault> {
    let program = command::program(argv).unwrap_or_default();
    if argv.get(program).map(|word| command::base_name(word)) != Some("kubectl") {
        return vec![];
    }
    let Some(end) = argv.iter().position(|word| word == "--") else {
        return vec![];
    };
    let is_flag =
        |word: &String| word == "-n" || word == "--namespace" || word.starts_with("--namespace=");
    let flag = argv[end..].iter().position(is_flag);
    let fault = flag.map(|flag| Fault {
        code: Code::MisusedTool,
        at: end + flag,
        message: format!(
            "`{}` stands behind `--`: the program gets it, and kubectl takes the default namespace",
            argv[end + flag]
        ),
        hint: "put it before `--`".into(),
    });
    fault.into_iter().collect()
}

fn psql(command: &Command<'_>) -> Vec<Fault> {
    let mut faults = vec![];
    let commands = command.values("-c", "--command");
    let files = command.values("-f", "--file");
    for (at, sql) in &commands {
        let lower = sql.to_lowercase();
        let words = lower.split(|c: char| c.is_whitespace() || c == ';');
        let words: Vec<&str> = words.filter(|word| !word.is_empty()).collect();
        for (word, what) in [
            ("database", "a database"),
            ("schema", "a schema"),
            ("owned", "all that a role owns"),
        ] {
            if words.windows(2).any(|pair| pair == ["drop", word]) {
                let message = format!("this drops {what}, and nothing brings it back");
                let hint = "`postgres.restore` keeps the old database under another name; what a \
                            migration drops belongs into the migration";
                faults.push(command.destroys(*at, message, hint));
            }
        }
    }
    let stops = |(_, value): &(usize, &str)| {
        let (name, value) = value.split_once('=').unwrap_or((value, ""));
        name == "ON_ERROR_STOP" && ["1", "on", "true", "yes"].contains(&value)
    };
    let stops = ["--set", "--variable"]
        .iter()
        .any(|name| command.values("-v", name).iter().any(stops));
    let runs_on = commands.len() > 1 || !files.is_empty();
    if runs_on && !stops {
        let at = files
            .first()
            .or_else(|| commands.get(1))
            .map_or(0, |(at, _)| *at);
        let message = "without ON_ERROR_STOP psql goes on after an error, and may exit with 0";
        let hint =
            "add `-v, ON_ERROR_STOP=1`; for statements that only look, use `postgres.assert`";
        faults.push(command.misused(at, message, hint));
    }
    if let Some((at, file)) = files.iter().find(|(_, file)| is_dump(file)) {
        let message = format!(
            "a dump that is replayed over a live database restores nothing that is there, and \
             doubles the rows of tables without a key: `{file}`"
        );
        faults.push(command.misused(*at, message, "use `postgres.restore`"));
    }
    faults.extend(asks_for_a_password(command));
    faults
}

fn pg_restore(command: &Command<'_>) -> Vec<Fault> {
    let mut faults = vec![];
    if let Some(at) = command.option(&["--clean", "-c"]) {
        let message = "this drops tables of the live database before it is known that they can be \
                       restored; what a migration added stays";
        let hint = "`postgres.restore` restores into a new database, swaps the names and keeps the \
                    old one";
        faults.push(command.destroys(at, message, hint));
    }
    let mut operands = command.operands();
    if let Some((at, file)) = operands.find(|(_, word)| is_plain_sql(word)) {
        let message = format!("`{file}` is plain SQL by its name, which pg_restore does not read");
        let hint = "let `postgres.backup` make the archive, and `postgres.restore` read it";
        faults.push(command.misused(at, message, hint));
    }
    if let Some((at, file)) = command
        .operands()
        .find(|(_, word)| word.contains(['*', '?']))
    {
        let message = format!("nothing expands `{file}`: there is no shell");
        let hint = "`postgres.restore` takes the backup of this rollout, by its digest";
        faults.push(command.misused(at, message, hint));
    }
    if let Some(at) = command.option(&["--list", "-l"]) {
        let message = "this reads the table of contents only: of a file that was cut in half, too";
        faults.push(command.misused(at, message, "use `postgres.verify_backup`"));
    } else if faults.is_empty() && command.option(&["--version", "--help"]).is_none() {
        let message = "pg_restore goes on after errors, and its target is not checked";
        faults.push(command.misused(0, message, "use `postgres.restore`"));
    }
    faults.extend(asks_for_a_password(command));
    faults
}

fn asks_for_a_password(command: &Command<'_>) -> Option<Fault> {
    let at = command.option(&["-W", "--password"])?;
    let message = "this asks for a password, and nobody is there to type it";
    let hint = "let the host's configuration name the secret, and use `postgres.` actions";
    Some(command.misused(at, message, hint))
}

fn alembic(command: &Command<'_>) -> Vec<Fault> {
    let mut faults = vec![];
    if let Some(at) = command.subcommand(&["downgrade"]) {
        let target = command.words.get(at).map_or("", String::as_str);
        if target == "base" {
            let message = "`base` undoes every migration there is, and so drops every table";
            let hint = "name the revision to return to, with `migration.downgrade`";
            faults.push(command.destroys(at + 1, message, hint));
        } else {
            let relative = is_relative(target);
            let message = if relative {
                format!("`{target}` means another revision on the second try")
            } else {
                "a downgrade outside the rollout's own is not behind its backup, lock and fence"
                    .to_owned()
            };
            let hint = "a rollback undoes `migration.apply` by itself; else use \
                        `migration.downgrade` with the revision's name";
            faults.push(command.misused(if relative { at + 1 } else { at }, message, hint));
        }
    }
    if let Some(at) = command.subcommand(&["upgrade"]) {
        let renders = command.option(&["--sql"]);
        let has_start = command.words.iter().any(|word| word.contains(':'));
        match renders {
            Some(_) if has_start => {}
            Some(sql) => {
                let message = "without a revision to start from, this renders everything from the \
                               very first migration, which is not what will run";
                let hint = "use `migration.plan`, which starts at the database's revision";
                faults.push(command.misused(sql, message, hint));
            }
            None => faults.push(applies(command, at, "alembic")),
        }
    }
    if let Some(at) = command.subcommand(&["stamp"]) {
        let message = "this writes a revision down without migrating anything";
        let hint = "use `migration.apply`, and `migration.verify` to see what is there";
        faults.push(command.misused(at, message, hint));
    }
    if let Some(at) = command.subcommand(&["current"])
        && command.option(&["--check-heads"]).is_none()
    {
        let message = "this exits with 0 whatever the revision";
        let hint = "use `migration.verify`, or add `--check-heads`";
        faults.push(command.misused(at, message, hint));
    }
    faults
}

/// Whether a revision of alembic counts from another: `-1`, `head-1`, `ae10+2`, `app@+1`.
pub(super) fn is_relative(revision: &str) -> bool {
    let number = revision.rsplit(['-', '+']).next().unwrap_or_default();
    number.len() < revision.len()
        && !number.is_empty()
        && number.bytes().all(|byte| byte.is_ascii_digit())
}

fn prisma(command: &Command<'_>) -> Vec<Fault> {
    let mut faults = vec![];
    let destroying = [
        (
            ["migrate", "reset"],
            "this drops every table and runs all migrations again",
        ),
        (
            ["migrate", "dev"],
            "this is for development: on drift it resets the database",
        ),
        (
            ["db", "push"],
            "this makes the schema fit by dropping what is in the way, and writes down no migration",
        ),
    ];
    for (words, message) in destroying {
        if let Some(at) = command.subcommand(&words) {
            let hint = "the way forward is `prisma migrate deploy`, the way back a rollback, or \
                        `postgres.restore`";
            faults.push(command.destroys(at, message, hint));
        }
    }
    if command.subcommand(&["migrate", "resolve"]).is_some()
        && let Some(at) = command.option(&["--rolled-back"])
    {
        let message = "this edits prisma's own table and undoes nothing";
        let hint = "bring the schema back with a reviewed migration, or `postgres.restore`";
        faults.push(command.misused(at, message, hint));
    }
    if let Some(at) = command.subcommand(&["migrate", "deploy"]) {
        match command.option(&["--skip-verify"]) {
            Some(flag) => {
                let message = "prisma has no `--skip-verify`: it prints its help and fails";
                faults.push(command.misused(flag, message, "leave it out"));
            }
            None => faults.push(applies(command, at, "prisma")),
        }
    }
    if let Some(at) = command.subcommand(&["db", "execute"]) {
        let message = "this throws results away, writes down no migration, and cannot fail on a \
                       wrong result";
        let hint = "use `postgres.assert` for what must hold, and a migration for what changes";
        faults.push(command.misused(at, message, hint));
    }
    if command.operands().next() == Some((1, "validate")) {
        let message = "this parses the schema file and never asks the database";
        faults.push(command.misused(1, message, "use `migration.verify`, or `postgres.assert`"));
    }
    faults
}

fn diesel(command: &Command<'_>) -> Vec<Fault> {
    let mut faults = vec![];
    for word in ["reset", "drop"] {
        if let Some(at) = command.subcommand(&["database", word]) {
            faults.push(drops_the_database(command, at));
        }
    }
    if let Some(at) = command.subcommand(&["migration", "redo"]) {
        let message =
            "this undoes the last migration with what was written since, and runs it anew";
        let hint = "take the step out: a migration runs once";
        faults.push(command.destroys(at, message, hint));
    }
    if let Some(at) = command.subcommand(&["migration", "revert"]) {
        let message = "this undoes the last one only, and exits with 0 where there is none";
        let hint = "a rollback undoes `migration.apply` by itself, to the revision before";
        faults.push(command.misused(at, message, hint));
    }
    if let Some(at) = command.subcommand(&["migration", "run"]) {
        faults.push(applies(command, at, "diesel"));
    }
    faults
}

fn sqlx(command: &Command<'_>) -> Vec<Fault> {
    let mut faults = vec![];
    for (group, word) in [
        ("database", "drop"),
        ("database", "reset"),
        ("db", "drop"),
        ("db", "reset"),
    ] {
        if let Some(at) = command.subcommand(&[group, word]) {
            faults.push(drops_the_database(command, at));
        }
    }
    if let Some(at) = command.subcommand(&["migrate", "run"]) {
        faults.push(applies(command, at, "sqlx"));
    }
    if let Some(at) = command.subcommand(&["migrate", "revert"])
        && command.option(&["--target-version"]).is_none()
    {
        let message = "this undoes the last one only, whichever that is on the second try";
        let hint = "a rollback undoes `migration.apply` by itself, to the revision before";
        faults.push(command.misused(at, message, hint));
    }
    faults
}

fn drops_the_database(command: &Command<'_>, at: usize) -> Fault {
    let message = "this drops the database with all that is in it";
    let hint =
        "`postgres.restore` restores into a new database, swaps the names and keeps the old one";
    command.destroys(at, message, hint)
}

/// A migration beside `migration.apply`, if that knows the tool.
fn applies(command: &Command<'_>, at: usize, tool: &str) -> Fault {
    let message = "two of these at once run a migration twice, and nothing asks for a backup first";
    let known = serde_json::from_value::<Tool>(tool.into()).is_ok();
    let hint = if known {
        "use `migration.apply`: once, under a lock, behind a verified backup"
    } else {
        "put `postgres.backup` and `postgres.verify_backup` before it, and let one host run it \
         (`on: {one_of: ...}`)"
    };
    command.misused(at, message, hint)
}

/// A file that is there is no backup that can be restored.
fn looks_at_a_dump(command: &Command<'_>) -> Option<Fault> {
    let (at, file) = command.operands().find(|(_, word)| is_dump(word))?;
    let message = format!(
        "that `{file}` is there says nothing: a dump that failed leaves a file, too, and one that \
         was killed the half of it"
    );
    Some(command.misused(
        at,
        message,
        "use `postgres.verify_backup`, which restores it",
    ))
}

fn is_plain_sql(file: &str) -> bool {
    let extension = std::path::Path::new(file).extension();
    extension.is_some_and(|extension| extension.eq_ignore_ascii_case("sql"))
}

/// Whether a file is a dump, by its name.
fn is_dump(file: &str) -> bool {
    let name = command::base_name(file).to_lowercase();
    let ends = [".dump", ".sql", ".sql.gz", ".backup", ".bak"];
    let is_named =
        name.contains("backup") || name.contains("dump") || name.contains("pre_migration");
    is_named && ends.iter().any(|end| name.ends_with(end))
}

#[cfg(test)]
mod tests;
