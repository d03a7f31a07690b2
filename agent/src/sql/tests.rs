use super::cluster::Bench;
use super::*;

#[tokio::test]
async fn a_session_carries_the_attempt_and_its_limits() {
    let bench = Bench::new().await;
    let cx = bench.cx(3, vec![]);
    let session = Database::find(&cx, "staff")
        .unwrap()
        .connect(&cx)
        .await
        .unwrap();
    let sql =
        "SELECT current_setting('application_name') || ' ' || current_setting('lock_timeout')";
    let row = session.one("test", sql, &[]).await.unwrap();
    let expected = format!("lockstep:{}:0.3:do:{} 5s", cx.key.rollout, cx.key.attempt);
    assert_eq!(row.get::<_, String>(0), expected);
    assert!(session.major() >= 15);
}

#[tokio::test]
async fn failures_to_connect_say_what_to_do() {
    let mut bench = Bench::new().await;
    let base = bench.host.config.postgres["staff"].clone();
    let variants = [
        (
            "password",
            Postgres {
                password: Some("wrong".into()),
                ..base.clone()
            },
        ),
        (
            "secret",
            Postgres {
                password: Some("none".into()),
                ..base.clone()
            },
        ),
        (
            "nothing",
            Postgres {
                password: None,
                ..base.clone()
            },
        ),
        (
            "dbname",
            Postgres {
                dbname: Some("no_such".into()),
                ..base.clone()
            },
        ),
        (
            "socket",
            Postgres {
                host: "/nowhere".into(),
                ..base.clone()
            },
        ),
        (
            "port",
            Postgres {
                host: "127.0.0.1".into(),
                port: 1,
                ..base
            },
        ),
    ];
    let variants = variants.map(|(name, config)| (name.to_owned(), config));
    bench.host.config.postgres.extend(variants);
    for (name, message, hint) in [
        (
            "password",
            "password authentication failed",
            "check the secret `wrong`",
        ),
        ("secret", "there is no secret `none`", "put it into"),
        ("nothing", "password", "name its secret as `password`"),
        (
            "dbname",
            "\"no_such\" does not exist",
            "create the database no_such",
        ),
        ("socket", "/nowhere", "check that PostgreSQL runs"),
        ("port", "127.0.0.1:1", "check that PostgreSQL runs"),
        ("missing", "no database `missing`", "[postgres.missing]"),
    ] {
        let failed = bench
            .try_session(name)
            .await
            .err()
            .expect("it cannot connect");
        assert_eq!(failed.cause, Cause::Host, "{name}: {failed:?}");
        assert!(failed.message.contains(message), "{name}: {failed:?}");
        let given = failed.hint.unwrap_or_default();
        assert!(given.contains(hint), "{name}: {given}");
    }
}

#[tokio::test]
async fn sessions_of_earlier_attempts_are_ended_and_no_others() {
    let bench = Bench::new().await;
    let (old, other) = (bench.cx(1, vec![]), bench.cx(11, vec![]));
    let database = Database::find(&old, "staff").unwrap();
    let left = database.connect(&old).await.unwrap();
    let neighbour = database.connect(&other).await.unwrap();
    let busy = tokio::spawn(async move { left.run("test", "SELECT pg_sleep(60)").await });
    let cx = bench.cx(1, vec![]);
    let session = database.connect(&cx).await.unwrap();
    assert_eq!(session.end_left_over(&cx).await.unwrap(), 1);
    assert_eq!(session.end_left_over(&cx).await.unwrap(), 0);
    let ended = busy.await.unwrap().unwrap_err();
    assert!(ended.message.contains("57P01"), "{ended:?}");
    neighbour.run("test", "SELECT 1").await.unwrap();
}

/// What a host sees whose migrations have a role of their own: the database's owner.
fn migrating(bench: &Bench, mut cx: Context, user: &str) -> Context {
    let config = std::sync::Arc::make_mut(&mut cx.config);
    let section = config.postgres.get_mut("staff").unwrap();
    section.user = user.to_owned();
    section.migrate_as = Some(format!("{}_owner", bench.name));
    section.migrate_password = Some("db".to_owned());
    cx
}

#[tokio::test]
async fn whoever_takes_an_attempts_name_keeps_his_session() {
    let bench = Bench::new().await;
    let log = bench.host.path().join("log");
    let mut cx = migrating(&bench, bench.cx(1, vec![]), "postgres");
    cx.log = crate::step::StepLog::to_file(log.clone());
    let faked = format!("SET application_name = '{}'", application_name(&cx.key));
    let app = bench.session("as_app").await;
    app.run("test", &faked).await.unwrap();
    let earlier = migrating(&bench, bench.cx(1, vec![]), "postgres");
    let migrates = Database::migrating(&earlier, "staff").unwrap();
    let _left = migrates.connect(&earlier).await.unwrap();
    let other = Database::find(&earlier, "staff").unwrap();
    let other = other.connect(&earlier).await.unwrap();
    // The role of migrations ends its own, and whoever makes backups those of both.
    let session = migrates.connect(&cx).await.unwrap();
    assert_eq!(session.end_left_over(&cx).await.unwrap(), 1);
    other.run("test", "SELECT 1").await.unwrap();
    drop(session);
    let session = Database::find(&cx, "staff").unwrap();
    let session = session.connect(&cx).await.unwrap();
    let _left = migrates.connect(&earlier).await.unwrap();
    assert_eq!(session.end_left_over(&cx).await.unwrap(), 2);
    app.run("test", "SELECT 1").await.unwrap();
    let log = std::fs::read_to_string(log).unwrap();
    assert!(log.contains("left alone, though they carry"), "{log}");
    assert!(log.contains(&format!("({})", bench.app())), "{log}");
}

#[tokio::test]
async fn a_left_over_that_the_role_cannot_end_is_an_error_with_the_grant() {
    let bench = Bench::new().await;
    let cx = migrating(&bench, bench.cx(1, vec![]), &bench.app());
    let migrates = Database::migrating(&cx, "staff").unwrap();
    let _left = migrates.connect(&cx).await.unwrap();
    let session = Database::find(&cx, "staff").unwrap();
    let session = session.connect(&cx).await.unwrap();
    let failed = session.end_left_over(&cx).await.unwrap_err();
    let grant = format!("GRANT \"{0}_owner\" TO \"{0}_app\"", bench.name);
    assert_eq!(failed.hint.as_deref(), Some(&*grant), "{failed:?}");
}

#[tokio::test]
async fn a_plans_statement_cannot_write_nor_leave_its_transaction() {
    let bench = Bench::with_rows().await;
    let session = bench.session("staff").await;
    let value = session
        .value("test", "SELECT count(*) FROM users")
        .await
        .unwrap();
    assert_eq!(value.as_deref(), Some("200"));
    assert_eq!(
        session.value("test", "SELECT NULL::int").await.unwrap(),
        None
    );
    for (sql, why) in [
        ("DELETE FROM users RETURNING id", "read-only transaction"),
        ("COMMIT; DROP TABLE hr.notes", "multiple commands"),
        ("COMMIT", "0 columns"),
        ("COPY users TO PROGRAM 'cat'", "0 columns"),
        ("SELECT id FROM users", "200 rows"),
        ("SELECT id FROM users WHERE false", "no row"),
        ("SELECT 1, 2", "2 columns"),
        ("SELEC 1", "syntax error"),
    ] {
        let failed = session.value("test", sql).await.unwrap_err();
        assert!(failed.message.contains(why), "{sql}: {}", failed.message);
    }
    assert_eq!(
        bench
            .session("staff")
            .await
            .value("", "SELECT count(*) FROM hr.notes")
            .await
            .unwrap()
            .unwrap(),
        "100"
    );
}
