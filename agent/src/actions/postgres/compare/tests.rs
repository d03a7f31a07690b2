use std::collections::BTreeMap;

use lockstep_proto::ids::Digest;
use lockstep_proto::order::Fact;
use lockstep_proto::values::{Percent, Timestamp};

use super::*;
use crate::sql::cluster::Bench;

const NULL: Value = Value::Null;

fn compare(with: Baseline, rows: Rows) -> Compare {
    Compare {
        database: "staff".into(),
        with,
        tables: vec![],
        rows,
        except: BTreeMap::new(),
    }
}

#[tokio::test]
async fn rows_that_nobody_knows_are_not_equal() {
    let bench = Bench::with_rows().await;
    let act = compare(Baseline::Backup, Rows::Unchanged);
    let refused = async |facts| {
        let failed = act.apply(&bench.cx(0, facts), &NULL).await.unwrap_err();
        assert_eq!(failed.cause, Cause::Refused, "{failed:?}");
        failed.message
    };
    assert!(refused(vec![]).await.contains("has no backup"));
    // It was made elsewhere, and its rows were not counted, or are too many for a fact.
    let backup = Fact::Backup {
        database: "staff".into(),
        id: "bk_1".into(),
        digest: Digest::of(b"x"),
        size: 1,
        taken_at: Timestamp(1),
        fence: None,
    };
    let unknown = refused(vec![backup]).await;
    assert!(unknown.contains("is not known here"), "{unknown}");
}

#[tokio::test]
async fn rows_are_compared_with_those_of_the_backup() {
    let bench = Bench::with_rows().await;
    let backup = |users| Fact::Rows {
        database: "staff".into(),
        tables: vec![("users".into(), users), ("hr.notes".into(), 100)],
    };
    let run = async |act: Compare, facts| act.apply(&bench.cx(0, facts), &NULL).await;
    let of = |rows| compare(Baseline::Backup, rows);
    assert!(run(of(Rows::Unchanged), vec![backup(200)]).await.is_ok());
    let failed = run(of(Rows::Unchanged), vec![backup(199)]).await;
    let failed = failed.unwrap_err().message;
    assert!(
        failed.contains("users has 200 rows, and had 199"),
        "{failed}"
    );
    assert!(run(of(Rows::Grown), vec![backup(199)]).await.is_ok());
    let failed = run(of(Rows::Grown), vec![backup(201)]).await.unwrap_err();
    assert_eq!(failed.cause, Cause::CheckUnmet);
    // 5 % of 190 are 9 rows, of 191 too.
    let within = of(Rows::Within(Percent(5)));
    assert!(run(within.clone(), vec![backup(191)]).await.is_ok());
    let failed = run(within, vec![backup(190)]).await.unwrap_err().message;
    assert!(failed.contains("more than 5% apart"), "{failed}");
    let except = |name: &str, rows| Compare {
        except: BTreeMap::from([(name.to_owned(), rows)]),
        ..of(Rows::Unchanged)
    };
    for name in ["users", "public.users"] {
        let act = except(name, Rows::Grown);
        assert!(run(act, vec![backup(199)]).await.is_ok(), "{name}");
    }
    let failed = run(except("user", Rows::Grown), vec![backup(199)]).await;
    assert!(failed.unwrap_err().message.contains("no table user"));
    bench.sql("DROP TABLE hr.notes").await;
    let failed = run(of(Rows::Grown), vec![backup(200)]).await;
    let failed = failed.unwrap_err().message;
    assert!(failed.contains("hr.notes is gone"), "{failed}");
    let act = except("hr.notes", Rows::Any);
    assert!(run(act, vec![backup(200)]).await.is_ok());
    let failed = run(of(Rows::Grown), vec![]).await.unwrap_err();
    assert_eq!(failed.cause, Cause::Refused);
}
