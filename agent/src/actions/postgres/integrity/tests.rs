use lockstep_proto::action::postgres::{Baseline, Compare, Rows};
use lockstep_proto::values::ByteSize;

use super::*;
use crate::sql::cluster::{Bench, as_owner};

const NULL: Value = Value::Null;

fn look() -> Integrity {
    Integrity {
        database: "staff".into(),
        values_up_to: None,
    }
}

fn compare(except: &[(&str, Rows)]) -> Compare {
    let except = except
        .iter()
        .map(|(name, rows)| ((*name).to_owned(), *rows));
    Compare {
        database: "staff".into(),
        with: Baseline::Integrity,
        tables: vec![],
        rows: Rows::Unchanged,
        except: except.collect(),
    }
}

/// A database with two tables, an index, a sequence, and what was found in it.
async fn seen() -> (Bench, Vec<Fact>) {
    let bench = Bench::with_rows().await;
    bench
        .sql(
            "CREATE TABLE public.orders (id serial PRIMARY KEY, cents int); \
             INSERT INTO public.orders (cents) SELECT n FROM generate_series(1, 10) n; \
             CREATE TABLE public.alembic_version (version_num text); \
             INSERT INTO public.alembic_version VALUES ('a1')",
        )
        .await;
    let done = look().apply(&bench.cx(0, vec![]), &NULL).await.unwrap();
    (bench, done.facts)
}

/// What a comparison says: its summary, or what is wrong.
async fn compared(bench: &Bench, facts: &[Fact], act: &Compare) -> Result<String, String> {
    let done = act.apply(&bench.cx(1, facts.to_vec()), &NULL).await;
    done.map(|done| done.summary)
        .map_err(|failed| failed.message)
}

#[tokio::test]
async fn what_is_as_before_is_found_as_before() {
    let (bench, facts) = seen().await;
    let [
        Fact::Integrity { digest, id, .. },
        Fact::Rows { tables, .. },
        Fact::Note { value, .. },
    ] = facts.as_slice()
    else {
        panic!("{facts:?}");
    };
    let text = fs::read(file(&bench.cx(0, vec![]), id)).unwrap();
    assert_eq!(Digest::of(&text), *digest);
    assert!(tables.contains(&("users".to_owned(), 200)), "{tables:?}");
    assert!(
        value.contains("4 tables with 311 rows, 1 foreign keys"),
        "{value}"
    );
    assert!(value.ends_with("revision a1: nothing amiss"), "{value}");
    let said = compared(&bench, &facts, &compare(&[])).await.unwrap();
    assert_eq!(said, "4 tables of `staff` are as before");
    // Who owns the database can look, too, and finds the same.
    let cx = as_owner(bench.cx(2, facts.clone()));
    compare(&[]).apply(&cx, &NULL).await.unwrap();
}

#[tokio::test]
async fn a_migration_that_adds_is_as_before_and_says_what_it_added() {
    let (bench, facts) = seen().await;
    bench
        .sql(
            "ALTER TABLE public.users ADD COLUMN mail text DEFAULT 'x@y.z' NOT NULL; \
             CREATE TABLE public.teams (id int PRIMARY KEY); \
             INSERT INTO public.teams VALUES (1); \
             ALTER TABLE public.users ALTER COLUMN id TYPE bigint; \
             CREATE INDEX ON public.users (name); \
             UPDATE public.alembic_version SET version_num = 'b2'",
        )
        .await;
    let cx = bench.cx(1, facts.clone());
    let was = newest(&cx, "staff").unwrap();
    let database = Database::find(&cx, "staff").unwrap();
    let is = Holdings::take(&cx, &database, None, Some(&was))
        .await
        .unwrap();
    let found = differences(&was, &is, |_| Rows::Unchanged);
    assert_eq!(found.wrong, Vec::<String>::new());
    let said = found.said.join("; ");
    for one in [
        "teams is new, with 1 rows",
        "users has got the columns mail",
        "the schema's fingerprint is",
        "the revision is b2, and was a1",
    ] {
        assert!(said.contains(one), "{one}: {said}");
    }
    assert!(compared(&bench, &facts, &compare(&[])).await.is_ok());
}

#[tokio::test]
async fn whatever_is_lost_is_found() {
    for (change, why) in [
        (
            "DELETE FROM hr.notes WHERE id = 1",
            "hr.notes has 99 rows, and had 100",
        ),
        ("DROP TABLE hr.notes", "hr.notes is gone, with 100 rows"),
        (
            "INSERT INTO public.users VALUES (900, 'x')",
            "users has 201 rows, and had 200",
        ),
        (
            "UPDATE public.users SET name = 'x' WHERE id = 7",
            "users has other values in name",
        ),
        (
            // The same names, but other people's.
            "UPDATE public.users u SET name = o.name FROM public.users o \
             WHERE (u.id, o.id) IN ((1, 2), (2, 1))",
            "users has the same values in other rows",
        ),
        (
            "ALTER TABLE hr.notes DROP COLUMN user_id; \
             UPDATE hr.notes SET body = '' WHERE id = 3",
            "hr.notes has other values in body",
        ),
        (
            "ALTER SEQUENCE public.orders_id_seq RESTART WITH 10",
            "the sequence public.orders_id_seq gives 10 next, and public.orders.id has 10 already",
        ),
    ] {
        let (bench, facts) = seen().await;
        bench.sql(change).await;
        let wrong = compared(&bench, &facts, &compare(&[])).await.unwrap_err();
        assert!(wrong.contains(why), "{change}: {wrong}");
    }
}

#[tokio::test]
async fn what_a_superuser_can_break_is_found() {
    let (bench, facts) = seen().await;
    let session = bench.session("staff").await;
    session
        .run(
            "",
            "SET session_replication_role = replica; \
             DELETE FROM public.users WHERE id < 4; \
             UPDATE pg_catalog.pg_index SET indisvalid = false \
             WHERE indexrelid = 'hr.notes_pkey'::regclass; \
             ALTER TABLE public.users ADD CONSTRAINT named CHECK (name <> '') NOT VALID",
        )
        .await
        .unwrap();
    let users = [("users", Rows::Any)];
    let wrong = compared(&bench, &facts, &compare(&users))
        .await
        .unwrap_err();
    assert!(!wrong.contains("users has"), "{wrong}");
    for why in [
        "3 rows have no parent by notes_user_id_fkey of hr.notes, and 0 had none",
        "the index hr.notes_pkey is not valid",
    ] {
        assert!(wrong.contains(why), "{why}: {wrong}");
    }
    // What was amiss before is no fault of what happened since, and is said.
    let found = look().apply(&bench.cx(2, vec![]), &NULL).await.unwrap();
    assert!(
        found.summary.ends_with(": 3 things amiss"),
        "{}",
        found.summary
    );
    compared(&bench, &found.facts, &compare(&[])).await.unwrap();
    session
        .run(
            "",
            "SET session_replication_role = replica; DELETE FROM public.users WHERE id = 4",
        )
        .await
        .unwrap();
    let wrong = compared(&bench, &found.facts, &compare(&users))
        .await
        .unwrap_err();
    assert!(wrong.contains("4 rows have no parent"), "{wrong}");
    assert!(!wrong.contains("notes_pkey"), "{wrong}");
}

#[tokio::test]
async fn rules_hold_for_single_tables() {
    let (bench, facts) = seen().await;
    bench
        .sql("UPDATE public.users SET name = upper(name); DROP TABLE public.orders")
        .await;
    let rules = [("users", Rows::SameCount), ("orders", Rows::Any)];
    compared(&bench, &facts, &compare(&rules)).await.unwrap();
    for rules in [&rules[..1], &rules[1..]] {
        compared(&bench, &facts, &compare(rules)).await.unwrap_err();
    }
    let misspelt = compared(&bench, &facts, &compare(&[("user", Rows::Any)])).await;
    assert!(misspelt.unwrap_err().contains("no table user"));
    // Only the tables that are named count, but every fault does.
    let named = |tables: &[&str]| Compare {
        tables: tables.iter().map(|&name| name.to_owned()).collect(),
        ..compare(&[])
    };
    compared(&bench, &facts, &named(&["hr.notes"]))
        .await
        .unwrap();
    let gone = compared(&bench, &facts, &named(&["public.orders"])).await;
    assert!(gone.unwrap_err().contains("public.orders is not in both"));
}

#[tokio::test]
async fn of_large_tables_rows_are_counted_only() {
    let bench = Bench::with_rows().await;
    let act = Integrity {
        values_up_to: Some(ByteSize(1)),
        ..look()
    };
    let done = act.apply(&bench.cx(0, vec![]), &NULL).await.unwrap();
    assert!(
        done.summary.contains("(2 of them only counted)"),
        "{}",
        done.summary
    );
    bench.sql("UPDATE public.users SET name = ''").await;
    let said = compared(&bench, &done.facts, &compare(&[])).await.unwrap();
    assert!(said.contains("2 things that may differ"), "{said}");
    bench.sql("DELETE FROM public.users WHERE id > 150").await;
    compared(&bench, &done.facts, &compare(&[]))
        .await
        .unwrap_err();
}

#[tokio::test]
async fn what_was_written_down_is_the_rollout_s_own_and_unchanged() {
    let (bench, facts) = seen().await;
    let refused = compare(&[]).apply(&bench.cx(1, vec![]), &NULL).await;
    assert_eq!(refused.unwrap_err().cause, Cause::Refused);
    let mut cx = bench.cx(1, vec![]);
    cx.dry_run = true;
    let probe = compare(&[]).probe(&cx).await.unwrap();
    assert!(matches!(probe, Probe::Unmet(_)), "{probe:?}");
    let Fact::Integrity { id, .. } = &facts[0] else {
        unreachable!("it is the first")
    };
    let path = file(&bench.cx(1, vec![]), id);
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("\"rows\": 200", "\"rows\": 199")).unwrap();
    let altered = compared(&bench, &facts, &compare(&[])).await.unwrap_err();
    assert!(
        altered.ends_with("is not what was written down"),
        "{altered}"
    );
    fs::remove_file(&path).unwrap();
    let failed = compare(&[]).apply(&bench.cx(1, facts.clone()), &NULL).await;
    let hint = failed.unwrap_err().hint.unwrap();
    assert!(hint.contains("the host that ran"), "{hint}");
}

#[tokio::test]
async fn the_oldest_of_other_rollouts_go() {
    let (bench, facts) = seen().await;
    let cx = bench.cx(0, vec![]);
    let other = |n: u32| directory(&cx).join(format!("staff-2026010{n}T000000Z-ro_0-x.json"));
    for n in 1..=8 {
        fs::write(other(n), "").unwrap();
    }
    let strange = directory(&cx).join("staff_2-20260101T000000Z-ro_0-x.json");
    fs::write(&strange, "").unwrap();
    look().apply(&bench.cx(1, vec![]), &NULL).await.unwrap();
    let left: Vec<u32> = (1..=8).filter(|n| other(*n).exists()).collect();
    assert_eq!(left, [4, 5, 6, 7, 8]);
    assert!(strange.exists());
    let Fact::Integrity { id, .. } = &facts[0] else {
        unreachable!("it is the first")
    };
    assert!(file(&cx, id).exists(), "this rollout's own stay");
}

#[test]
fn shares_are_of_the_rows_before() {
    let within = |share| Rows::Within(lockstep_proto::values::Percent(share));
    for (rule, had, rows, met) in [
        (within(5), 100, 105, true),
        (within(5), 100, 95, true),
        (within(5), 100, 106, false),
        (within(5), 100, 94, false),
        (within(5), 19, 20, false),
        (within(0), 7, 7, true),
        (within(200), u64::MAX, 0, true),
        (Rows::Grown, 5, 5, true),
        (Rows::Grown, 5, 4, false),
        (Rows::SameCount, 5, 6, false),
        (Rows::Any, 5, 0, true),
    ] {
        assert_eq!(
            unmet(rule, had, rows).is_none(),
            met,
            "{rule:?} {had} {rows}"
        );
    }
}
