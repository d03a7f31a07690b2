//! With the real tool on a real server: what people saw is what runs (INV-12).

use std::fs;

use lockstep_proto::action::migration::{By, Plan, RequiredBackup};

use super::stage::{NEW, OLD, Stage, apply};
use super::*;
use crate::actions::migration::alike;

const NULL: Value = Value::Null;

fn plan(to: &str) -> Plan {
    alike::plan(apply(), to)
}

#[tokio::test]
async fn what_was_approved_is_what_runs() {
    let stage = Stage::new().await;
    let one = plan("head")
        .apply(&stage.cx(0, vec![]), &NULL)
        .await
        .unwrap();
    let two = plan(NEW).apply(&stage.cx(0, vec![]), &NULL).await.unwrap();
    assert_eq!(one.facts, two.facts, "rendering is deterministic");
    let [
        Fact::SqlPlan {
            from,
            to,
            sql,
            opaque,
            ..
        },
    ] = one.facts.as_slice()
    else {
        panic!("{:?}", one.facts)
    };
    assert_eq!((from.as_str(), to.as_str()), (OLD, NEW));
    assert!(
        sql.contains("CREATE TABLE employee_fields") && sql.ends_with("COMMIT;\n"),
        "{sql}"
    );
    assert!(one.facts[0].is_of_sql(Digest::of(sql.as_bytes())) && opaque.is_empty());
    let free = Apply {
        backup: RequiredBackup::None,
        ..apply()
    };
    // Somebody changes the release after people have seen the SQL.
    let file = "app/releases/v1.0.0/backend/migrations/versions/0002_extended_fields.py";
    let file = stage.bench.host.path().join(file);
    let script = fs::read_to_string(&file).unwrap();
    fs::write(&file, script.replace("employee_fields", "employee_field")).unwrap();
    // As a controller of an earlier release keeps it.
    let mut forgotten = one.facts.clone();
    if let [Fact::SqlPlan { tool, files, .. }] = forgotten.as_mut_slice() {
        (*tool, *files) = (None, None);
    }
    for facts in [&one.facts, &forgotten] {
        let failed = free.apply(&stage.cx(4, facts.clone()), &NULL).await;
        let failed = failed.unwrap_err();
        assert_eq!(failed.cause, Cause::Refused, "INV-12");
        let why = "its digest is";
        assert!(failed.message.contains(why), "{}", failed.message);
    }
    fs::write(&file, script).unwrap();
    free.apply(&stage.cx(4, forgotten), &NULL).await.unwrap();
    let nothing = plan("head")
        .apply(&stage.cx(0, vec![]), &NULL)
        .await
        .unwrap();
    assert!(matches!(&nothing.facts[..], [Fact::SqlPlan { sql, .. }] if sql.is_empty()));
    // From another revision than was shown.
    free.undo(&stage.undo(4, vec![]), &json!({"revision": ""}))
        .await
        .unwrap();
    let failed = free
        .apply(&stage.cx(4, one.facts), &NULL)
        .await
        .unwrap_err();
    assert!(
        failed.message.contains("would go from no revision"),
        "{}",
        failed.message
    );
}

#[tokio::test]
async fn code_that_no_sql_shows_is_called_opaque_and_bound_all_the_same() {
    let stage = Stage::new().await;
    let home = stage
        .bench
        .host
        .path()
        .join("app/releases/v1.0.0/backend/migrations");
    let file = home.join("versions/0002_extended_fields.py");
    let script = fs::read_to_string(&file).unwrap();
    let head = "def upgrade():\n";
    let free = Apply {
        backup: RequiredBackup::None,
        ..apply()
    };
    let own = Apply {
        apply: By::Sql,
        ..free.clone()
    };
    for (lines, why) in [
        // Without a database there is nothing to talk to, and the tool fails to show its SQL.
        (
            "    op.get_bind().exec_driver_sql('SELECT 1')\n",
            "`alembic upgrade --sql` cannot say what would run",
        ),
        (
            "    from alembic import context\n    if not context.is_offline_mode():\n        \
             op.execute('UPDATE employees SET first_name = NULL')\n",
            "0002_extended_fields.py: it does something else when its SQL is shown",
        ),
    ] {
        fs::write(&file, script.replacen(head, &format!("{head}{lines}"), 1)).unwrap();
        let done = plan("head")
            .apply(&stage.cx(0, vec![]), &NULL)
            .await
            .unwrap();
        assert!(
            done.summary.contains("by code that cannot be shown"),
            "{}",
            done.summary
        );
        let [Fact::SqlPlan { opaque, sql, .. }] = done.facts.as_slice() else {
            panic!("{:?}", done.facts)
        };
        assert!(opaque[0].contains(why), "{opaque:?}");
        assert!(done.facts[0].is_of_sql(Digest::of(sql.as_bytes())));
        let refused = own.apply(&stage.cx(4, vec![]), &NULL).await.unwrap_err();
        assert_eq!(refused.cause, Cause::Refused);
        assert!(refused.message.contains(why), "{}", refused.message);
        // What people could not see is bound by its files: those that run beside it, too.
        for other in [&file, &home.join("env.py")] {
            let text = fs::read_to_string(other).unwrap();
            fs::write(other, format!("{text}\n# changed\n")).unwrap();
            let cx = stage.cx(4, done.facts.clone());
            let refused = free.apply(&cx, &NULL).await.unwrap_err();
            assert!(
                refused.message.contains("its digest is"),
                "{}",
                refused.message
            );
            fs::write(other, text).unwrap();
        }
        assert_eq!(stage.revision().await, OLD);
    }
}

#[tokio::test]
async fn the_shown_sql_runs_without_the_tool() {
    let stage = Stage::new().await;
    // What builds an index outside of a transaction, too.
    let file = "app/releases/v1.0.0/backend/migrations/versions/0002_extended_fields.py";
    let file = stage.bench.host.path().join(file);
    let script = fs::read_to_string(&file).unwrap();
    let concurrently = "def upgrade():\n    with op.get_context().autocommit_block():\n        \
                        op.execute('CREATE INDEX CONCURRENTLY early ON employees (id)')\n";
    fs::write(&file, script.replacen("def upgrade():\n", concurrently, 1)).unwrap();
    let act = Apply {
        apply: By::Sql,
        backup: RequiredBackup::None,
        ..apply()
    };
    let shown = plan("head").apply(&stage.cx(0, vec![]), &NULL).await;
    let done = act
        .apply(&stage.cx(4, shown.unwrap().facts), &NULL)
        .await
        .unwrap();
    assert!(done.changed);
    assert_eq!(stage.revision().await, NEW);
    assert_eq!(
        stage.ledger(),
        Vec::<String>::new(),
        "none of the application's code ran"
    );
    let session = stage.bench.session("as_owner").await;
    for there in ["early", "employee_fields"] {
        let sql = format!("SELECT '{there}'::regclass");
        assert_eq!(session.value("", &sql).await.unwrap().unwrap(), there);
    }
}
