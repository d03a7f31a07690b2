use super::*;
use crate::sql::cluster::Bench;

fn only(table: &str, columns: &[&str]) -> Which {
    let columns = columns.iter().map(|&name| name.to_owned()).collect();
    Which::Of([(table.to_owned(), columns)].into())
}

async fn lines(bench: &Bench, moment: Option<Moment>, which: &Which) -> Vec<String> {
    let session = bench.session("staff").await;
    since(&session, moment, which).await.unwrap().lines()
}

#[tokio::test]
async fn what_was_written_changed_or_deleted_since_is_counted_to_the_row() {
    let bench = Bench::with_rows().await;
    bench
        .sql("CREATE UNLOGGED TABLE public.cache (a int); INSERT INTO public.cache VALUES (1)")
        .await;
    let session = bench.session("staff").await;
    let then = moment(&session).await.unwrap();
    let was = since(&session, then, &Which::All).await.unwrap();
    assert_eq!(was.lines_and_gone(&was.tally()), Vec::<String>::new());
    bench
        .sql(
            "INSERT INTO public.users VALUES (301, 'new'), (302, 'new'); \
             UPDATE public.users SET name = 'x' WHERE id IN (1, 2, 3); \
             UPDATE public.users SET name = 'y' WHERE id = 1; \
             DELETE FROM hr.notes WHERE id > 95; \
             TRUNCATE public.cache; \
             CREATE TABLE public.more (a int); INSERT INTO public.more VALUES (1)",
        )
        .await;
    let now = since(&session, then, &Which::All).await.unwrap();
    let expected = [
        "cache: 1 row of the 1 of before changed or deleted",
        "hr.notes: 5 rows of the 100 of before changed or deleted",
        "more: 1 row written since",
        "users: 5 rows written since, 3 rows of the 200 of before changed or deleted",
    ];
    assert_eq!(now.lines_and_gone(&was.tally()), expected);
    assert_eq!(
        now.lines(),
        ["more: 1 row written since", "users: 5 rows written since"]
    );
    bench.sql("DROP TABLE hr.notes").await;
    let now = since(&session, then, &Which::All).await.unwrap();
    let gone = "hr.notes: gone, with 100 rows".to_owned();
    assert!(now.lines_and_gone(&was.tally()).contains(&gone), "INV-6");
}

#[tokio::test]
async fn transactions_under_way_count_and_those_of_other_databases_do_not() {
    let bench = Bench::with_rows().await;
    // Its part has a number of its own, which no snapshot shows.
    let open = bench.session("as_owner").await;
    open.run(
        "",
        "BEGIN; INSERT INTO public.users VALUES (401, 'first'); SAVEPOINT part; \
         INSERT INTO public.users VALUES (402, 'second')",
    )
    .await
    .unwrap();
    let elsewhere = bench.session("maintenance").await;
    elsewhere
        .run("", "BEGIN; SELECT pg_current_xact_id()")
        .await
        .unwrap();
    bench
        .sql("INSERT INTO public.users VALUES (403, 'late')")
        .await;
    let session = bench.session("staff").await;
    let then = moment(&session).await.unwrap();
    open.run("", "COMMIT").await.unwrap();
    let found = lines(&bench, then, &Which::All).await;
    assert_eq!(found, ["users: 3 rows written since"], "never too few");
    // Now only the other database's is left, which is older than what follows.
    bench
        .sql("INSERT INTO public.users VALUES (404, 'x')")
        .await;
    let then = moment(&session).await.unwrap();
    assert_eq!(lines(&bench, then, &Which::All).await, Vec::<String>::new());
    elsewhere.run("", "ROLLBACK").await.unwrap();
}

#[tokio::test]
async fn freezing_changes_nothing() {
    let bench = Bench::with_rows().await;
    let session = bench.session("staff").await;
    let then = moment(&session).await.unwrap();
    bench
        .sql("INSERT INTO public.users VALUES (501, 'x')")
        .await;
    session
        .run("", "VACUUM (FREEZE) public.users")
        .await
        .unwrap();
    let expected = ["users: 1 row written since"];
    assert_eq!(lines(&bench, then, &Which::All).await, expected);
    // Nor does a rewrite, but for what it cannot know.
    session.run("", "VACUUM FULL public.users").await.unwrap();
    assert_eq!(lines(&bench, then, &Which::All).await, expected);
}

#[tokio::test]
async fn only_rows_that_hold_a_value_in_a_column_are_counted_for_it() {
    let bench = Bench::with_rows().await;
    let session = bench.session("staff").await;
    bench
        .sql("CREATE TYPE public.pair AS (a int, b int); ALTER TABLE public.users ADD note json, ADD p public.pair")
        .await;
    let then = moment(&session).await.unwrap();
    bench
        .sql(
            "INSERT INTO public.users VALUES (601, 'x', NULL), (602, 'x', '{}'); \
             INSERT INTO public.users VALUES (603, 'x', NULL, ROW(NULL, NULL))",
        )
        .await;
    let which = only("users", &["note"]);
    assert_eq!(
        lines(&bench, then, &which).await,
        ["users: 1 row written since"]
    );
    let which = only("users", &["note", "p"]);
    assert_eq!(
        lines(&bench, then, &which).await,
        ["users: 2 rows written since"]
    );
    let which = only("users", &[]);
    assert_eq!(
        lines(&bench, then, &which).await,
        ["users: 3 rows written since"]
    );
    let which = only("hr.notes", &[]);
    assert_eq!(lines(&bench, then, &which).await, Vec::<String>::new());
}

#[tokio::test]
async fn what_cannot_be_counted_is_said() {
    let bench = Bench::with_rows().await;
    let owner = bench.session("as_owner").await;
    let then = moment(&owner).await.unwrap();
    bench
        .session("staff")
        .await
        .run(
            "",
            "CREATE TABLE public.closed (a int); SELECT lo_create(0)",
        )
        .await
        .unwrap();
    bench
        .sql("INSERT INTO public.users VALUES (701, 'x')")
        .await;
    let found = since(&owner, then, &Which::All).await.unwrap().lines();
    let starts = [
        "closed: cannot be counted: ",
        "large objects: cannot be counted: only a superuser",
        "users: 1 row written since",
    ];
    assert_eq!(found.len(), starts.len(), "{found:?}");
    for (line, start) in found.iter().zip(starts) {
        assert!(line.starts_with(start), "{line}");
    }
    assert!(found[0].contains("permission denied"), "{}", found[0]);
    // A superuser counts them.
    let found = lines(&bench, then, &Which::All).await;
    assert_eq!(found[0], "large objects: 1 row written since");
    // Of an attempt of an older release nothing is known.
    let which = only("users", &[]);
    let found = lines(&bench, None, &which).await;
    assert_eq!(
        found,
        ["users: cannot be counted: the moment was not recorded"]
    );
    let long_ago = then.map(|Moment { xid }| Moment {
        xid: xid + (1 << 32),
    });
    let found = lines(&bench, long_ago, &which).await;
    assert_eq!(
        found,
        ["users: cannot be counted: too many transactions have passed since"]
    );
}

#[tokio::test]
async fn a_wraparound_hides_no_row() {
    let bench = Bench::new().await;
    // The next transaction is number 10 of the second round; the moment was 20 before.
    let is_new = is_new((1 << 32) + 10, 20);
    let sql = format!(
        "SELECT string_agg(t.xmin::text, ' ' ORDER BY n) FROM (VALUES (1, '4294967285'::xid), \
         (2, '4294967286'), (3, '4294967295'), (4, '0'), (5, '1'), (6, '2'), (7, '3'), (8, '9'), \
         (9, '10'), (10, '2147483700')) t(n, xmin) WHERE {is_new}"
    );
    assert_eq!(bench.ask(&sql).await, "4294967286 4294967295 3 9");
}

#[tokio::test]
async fn what_is_taken_of_a_parent_is_counted_in_its_children() {
    let bench = Bench::with_rows().await;
    bench
        .sql(
            "CREATE TABLE public.more () INHERITS (public.users); \
             CREATE TABLE public.parts (a int) PARTITION BY LIST (a); \
             CREATE TABLE public.part PARTITION OF public.parts DEFAULT",
        )
        .await;
    let session = bench.session("staff").await;
    let then = moment(&session).await.unwrap();
    bench
        .sql("INSERT INTO public.more VALUES (801, 'x'); INSERT INTO public.parts VALUES (1)")
        .await;
    let found = lines(&bench, then, &only("users", &["name"])).await;
    assert!(
        found.contains(&"more: 1 row written since".to_owned()),
        "INV-6: {found:?}"
    );
    let found = lines(&bench, then, &only("part", &[])).await;
    assert_eq!(found, ["part: 1 row written since"]);
}

#[tokio::test]
async fn counting_many_tables_leaves_no_savepoint_open() {
    let bench = Bench::with_rows().await;
    let session = bench.session("staff").await;
    session.run("", "BEGIN").await.unwrap();
    for (sql, is_counted) in [("SELECT 1::int8, 0::int8", true), ("SELECT 1/0", false)] {
        assert_eq!(count(&session, "t", sql).await.unwrap().is_ok(), is_counted);
        // The server has forgotten it: there is nothing left to go back to.
        session.run("", "SAVEPOINT mine").await.unwrap();
        session.run("", "ROLLBACK TO one").await.unwrap_err();
        session.run("", "ROLLBACK TO mine").await.unwrap();
    }
}
