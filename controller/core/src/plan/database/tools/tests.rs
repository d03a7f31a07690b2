use super::*;

/// The words of a command; `_` stands for a space within a word, `~` for `_`.
fn words(command: &str) -> Vec<String> {
    let words = command.split(' ');
    words
        .map(|word| word.replace('_', " ").replace('~', "_"))
        .collect()
}

#[test]
fn what_destroys_is_found_behind_whatever_starts_it() {
    for (command, word) in [
        ("dropdb shop", "dropdb"),
        (
            "sudo -u postgres /usr/bin/dropdb --if-exists shop",
            "/usr/bin/dropdb",
        ),
        ("psql -d shop -c DROP_DATABASE_shop", "DROP DATABASE shop"),
        (
            "psql shop --command=drop__schema_public_cascade",
            "--command=drop  schema public cascade",
        ),
        ("psql -cDROP_OWNED_BY_shop", "-cDROP OWNED BY shop"),
        ("psql -tAc drop_database_shop", "drop database shop"),
        (
            "psql -c SELECT_1;DROP_DATABASE_shop",
            "SELECT 1;DROP DATABASE shop",
        ),
        ("pg~restore --clean -d shop x.dump", "--clean"),
        ("pg~restore -c -d shop x.dump", "-c"),
        ("venv/bin/alembic downgrade base", "base"),
        ("python3 -m alembic -c a.ini downgrade base", "base"),
        ("npx prisma migrate reset --force --skip-seed", "reset"),
        ("npx --yes prisma migrate dev", "dev"),
        ("npx prisma@6 migrate reset", "reset"),
        ("yarn prisma db push", "push"),
        ("docker compose run --rm backend npx prisma db push", "push"),
        ("diesel database reset", "reset"),
        ("diesel migration redo", "redo"),
        ("cargo sqlx database drop -y", "drop"),
        ("kubectl exec deploy/web -- sqlx database reset", "reset"),
    ] {
        let argv = words(command);
        let faults = faults(&argv);
        let fault = faults.iter().find(|fault| fault.code == Code::DestroysData);
        let fault = fault.unwrap_or_else(|| panic!("nothing in `{command}`: {faults:?}"));
        assert_eq!(argv[fault.at], word, "{command}");
    }
}

fn misused(argv: &[&str]) -> Vec<(usize, String)> {
    let argv: Vec<String> = argv.iter().map(|&word| word.to_owned()).collect();
    let faults = faults(&argv).into_iter();
    let misused = faults.inspect(|fault| assert_eq!(fault.code, Code::MisusedTool, "{fault:?}"));
    misused.map(|fault| (fault.at, fault.message)).collect()
}

#[test]
fn tools_that_do_something_else_than_they_seem_to_are_named() {
    let cases: &[(&[&str], usize, &str)] = &[
        (&["createdb", "shop"], 0, "grants"),
        (&["psql", "-d", "shop", "-f", "up.sql"], 4, "goes on"),
        (&["psql", "-c", "select 1", "-c", "select 2"], 4, "goes on"),
        (
            &["psql", "-v", "ON_ERROR_STOP=0", "-f", "up.sql"],
            4,
            "goes on",
        ),
        (
            &["psql", "-v", "ON_ERROR_STOP=1", "-f", "backup_1.sql"],
            4,
            "doubles",
        ),
        (&["psql", "-W", "-c", "select 1"], 1, "password"),
        (&["pg_dump", "-Fc", "-f", "x.dump", "shop"], 0, "no backup"),
        (&["pg_restore", "-d", "shop", "pre.sql"], 3, "plain SQL"),
        (&["pg_restore", "--list", "x.dump"], 1, "cut in half"),
        (&["pg_restore", "-d", "shop", "x*.dump"], 3, "expands"),
        (&["pg_restore", "-d", "shop", "x.dump"], 0, "goes on"),
        (&["alembic", "downgrade", "-1"], 2, "second try"),
        (&["alembic", "downgrade", "ae1"], 1, "rollout's own"),
        (&["alembic", "upgrade", "head", "--sql"], 3, "very first"),
        (&["alembic", "upgrade", "head"], 1, "twice"),
        (&["alembic", "stamp", "head"], 1, "without migrating"),
        (&["alembic", "current"], 1, "exits with 0"),
        (
            &["npx", "prisma", "migrate", "resolve", "--rolled-back", "m"],
            4,
            "undoes nothing",
        ),
        (
            &["prisma", "migrate", "deploy", "--skip-verify"],
            3,
            "has no",
        ),
        (&["prisma", "migrate", "deploy"], 2, "twice"),
        (&["prisma", "db", "execute", "--stdin"], 2, "throws results"),
        (&["npx", "prisma", "validate"], 2, "never asks"),
        (&["diesel", "migration", "revert"], 2, "last one"),
        (&["diesel", "migration", "run"], 2, "twice"),
        (&["sqlx", "migrate", "run"], 2, "twice"),
        (&["sqlx", "migrate", "revert"], 2, "last one"),
        (&["ls", "-lh", "/b/pre_migration_1.sql"], 2, "says nothing"),
        (
            &["kubectl", "run", "m", "--", "true", "-n", "prod"],
            5,
            "behind `--`",
        ),
    ];
    for (argv, at, why) in cases {
        let faults = misused(argv);
        let [(place, message)] = faults.as_slice() else {
            panic!("{argv:?}: {faults:?}");
        };
        assert!(
            place == at && message.contains(why),
            "{argv:?}: {place} {message}"
        );
    }
}

#[test]
fn what_only_looks_like_it_is_left_alone() {
    for command in [
        "psql -c select",
        "psql -v ON~ERROR~STOP=1 -f up.sql",
        "psql -Xv ON~ERROR~STOP=1 -f up.sql",
        "psql --set=ON~ERROR~STOP=on -c a -c b",
        "psql -c select_drop,_database",
        "alembic upgrade a1:head --sql",
        "alembic current --check-heads",
        "alembic history",
        "prisma generate",
        "prisma migrate status",
        "prisma migrate resolve --applied m",
        "diesel migration list",
        "sqlx migrate info",
        "sqlx database create",
        "grep dropdb runbook.md",
        "echo prisma migrate reset",
        "npm run build",
        "npm ci",
        "pg~dump --version",
        "python3 -m venv venv",
        "venv/bin/pip install -r requirements.txt",
        "docker compose up -d",
        "ls -l /var/www",
        "kubectl run m -n prod -- true",
        "pgrep psql",
    ] {
        let argv = words(command);
        assert!(faults(&argv).is_empty(), "{command}: {:?}", faults(&argv));
    }
}

/// A hint does not send people to an action that does not know their tool.
#[test]
fn migration_apply_is_named_for_tools_that_it_knows() {
    for (command, tool) in [
        (["alembic", "upgrade", "head"], "alembic"),
        (["prisma", "migrate", "deploy"], "prisma"),
        (["diesel", "migration", "run"], "diesel"),
        (["sqlx", "migrate", "run"], "sqlx"),
    ] {
        let known = serde_json::from_value::<Tool>(tool.into()).is_ok();
        let argv = command.map(str::to_owned);
        let hint = &faults(&argv)[0].hint;
        assert_eq!(hint.contains("use `migration.apply`"), known, "{hint}");
    }
}
