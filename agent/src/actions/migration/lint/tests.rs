use super::*;

fn text(sql: &str, whole: bool) -> Vec<String> {
    let text = Text {
        file: "1_a.sql",
        sql,
        whole,
    };
    let found = lint(&[text]);
    found
        .iter()
        .map(|one| format!("{} {}", one.hazard, one.place))
        .collect()
}

/// The hazards of one statement in a transaction.
fn hazards(sql: &str) -> Vec<Hazard> {
    let text = Text {
        file: "",
        sql,
        whole: true,
    };
    lint(&[text]).iter().map(|one| one.hazard).collect()
}

#[test]
fn each_hazard_is_found_and_its_safe_way_is_not() {
    use Hazard::{Breaks, DataLoss, Fails, Lock, Rewrite};
    let cases: &[(&str, &[Hazard])] = &[
        ("CREATE INDEX i ON t (a)", &[Lock]),
        (
            "CREATE UNIQUE INDEX IF NOT EXISTS i ON ONLY public.t USING gin (a)",
            &[Lock],
        ),
        ("CREATE INDEX ON t (a)", &[Lock]),
        ("CREATE TABLE t (a int); CREATE INDEX i ON t (a)", &[]),
        (
            "CREATE TABLE public.\"T\" (a int); CREATE INDEX i ON \"T\" (a)",
            &[],
        ),
        (
            "CREATE TABLE \"T\" (a int); CREATE INDEX i ON t (a)",
            &[Lock],
        ),
        ("CREATE INDEX CONCURRENTLY i ON t (a)", &[Fails]),
        ("COMMIT; CREATE INDEX CONCURRENTLY i ON t (a); BEGIN", &[]),
        ("DROP INDEX i", &[Lock]),
        ("COMMIT; DROP INDEX CONCURRENTLY i", &[]),
        ("ALTER TABLE t ADD COLUMN a int", &[]),
        ("ALTER TABLE t ADD a int NOT NULL", &[Fails]),
        ("ALTER TABLE t ADD a int NOT NULL DEFAULT 0", &[]),
        (
            "ALTER TABLE t ADD a timestamptz NOT NULL DEFAULT now()",
            &[],
        ),
        ("ALTER TABLE t ADD a varchar(20) DEFAULT 'x'", &[]),
        (
            "ALTER TABLE t ADD a uuid NOT NULL DEFAULT gen_random_uuid()",
            &[Rewrite],
        ),
        ("ALTER TABLE t ADD a bigserial", &[Rewrite]),
        (
            "ALTER TABLE t ADD a int GENERATED ALWAYS AS (b * 2) STORED",
            &[Rewrite],
        ),
        ("ALTER TABLE t ADD a int REFERENCES u (id)", &[Lock]),
        ("ALTER TABLE t ADD a int DEFAULT 0 CHECK (a > 0)", &[Lock]),
        (
            "ALTER TABLE t ADD a int, ADD b int NOT NULL, DROP COLUMN c",
            &[Fails, DataLoss],
        ),
        (
            "ALTER TABLE t ADD CONSTRAINT k FOREIGN KEY (a) REFERENCES u (id)",
            &[Lock],
        ),
        (
            "ALTER TABLE t ADD FOREIGN KEY (a) REFERENCES u (id) NOT VALID",
            &[],
        ),
        ("ALTER TABLE t VALIDATE CONSTRAINT k", &[]),
        ("ALTER TABLE t ADD CHECK (a > 0)", &[Lock]),
        (
            "ALTER TABLE t ADD CONSTRAINT k CHECK (a > 0) NOT VALID",
            &[],
        ),
        ("ALTER TABLE t ADD CONSTRAINT k UNIQUE (a)", &[Lock]),
        ("ALTER TABLE t ADD CONSTRAINT k UNIQUE USING INDEX i", &[]),
        ("ALTER TABLE t ADD PRIMARY KEY (a)", &[Lock]),
        ("ALTER TABLE t ADD EXCLUDE USING gist (a WITH &&)", &[Lock]),
        ("ALTER TABLE IF EXISTS ONLY s.t DROP a", &[DataLoss]),
        ("ALTER TABLE t DROP CONSTRAINT k", &[]),
        ("ALTER TABLE t ALTER a TYPE bigint", &[Rewrite]),
        (
            "ALTER TABLE t ALTER COLUMN a SET DATA TYPE text USING a::text",
            &[Rewrite],
        ),
        ("ALTER TABLE t ALTER a SET NOT NULL", &[Lock]),
        ("ALTER TABLE t ALTER a SET DEFAULT random()", &[]),
        ("ALTER TABLE t ALTER a DROP NOT NULL", &[]),
        ("ALTER TABLE t RENAME a TO b", &[Breaks]),
        ("ALTER TABLE t RENAME TO u", &[Breaks]),
        ("ALTER TABLE t RENAME CONSTRAINT a TO b", &[]),
        ("ALTER VIEW t RENAME TO u", &[Breaks]),
        ("ALTER INDEX i RENAME TO j", &[]),
        ("ALTER TABLE t SET SCHEMA s", &[Breaks]),
        ("ALTER TABLE t SET TABLESPACE s", &[Rewrite]),
        ("ALTER TABLE t SET (fillfactor = 70)", &[]),
        ("ALTER TABLE t ATTACH PARTITION p DEFAULT", &[Lock]),
        ("ALTER TABLE t DETACH PARTITION p", &[Lock]),
        (
            "CREATE TABLE t (a int); ALTER TABLE t ADD b int NOT NULL, DROP a",
            &[],
        ),
        ("DROP TABLE IF EXISTS t CASCADE", &[DataLoss]),
        ("CREATE TEMP TABLE t (a int); DROP TABLE t", &[]),
        ("DROP SCHEMA s CASCADE", &[DataLoss]),
        ("DROP DATABASE d", &[DataLoss]),
        ("DROP OWNED BY r", &[DataLoss]),
        ("DROP FUNCTION f()", &[]),
        ("TRUNCATE TABLE ONLY t", &[DataLoss]),
        ("DELETE FROM t", &[DataLoss]),
        ("DELETE FROM t WHERE a = 1", &[]),
        (
            "UPDATE t SET a = (SELECT b FROM u WHERE u.id = t.id)",
            &[DataLoss],
        ),
        ("UPDATE t SET a = 1 WHERE b = 2", &[]),
        ("WITH x AS (SELECT 1 WHERE true) DELETE FROM t", &[DataLoss]),
        (
            "WITH x AS (DELETE FROM t RETURNING a) INSERT INTO u SELECT a FROM x WHERE a > 1",
            &[DataLoss],
        ),
        (
            "WITH x AS (DELETE FROM t WHERE a IN (1, 2) RETURNING a) UPDATE u SET a = 1",
            &[DataLoss],
        ),
        (
            "WITH x AS (DELETE FROM t WHERE a RETURNING a) INSERT INTO u SELECT a FROM x",
            &[],
        ),
        (
            "WITH x AS (SELECT 1 FROM t FOR UPDATE) INSERT INTO u SELECT * FROM x \
             ON CONFLICT (a) DO UPDATE SET b = 1",
            &[],
        ),
        (
            "ALTER TABLE t ADD CONSTRAINT k CHECK (a IN (1, 2)) NOT VALID",
            &[],
        ),
        (
            "WITH x AS (SELECT 1) UPDATE t SET a = 1 FROM x WHERE t.id = x.id",
            &[],
        ),
        (
            "INSERT INTO t VALUES (1) ON CONFLICT (a) DO UPDATE SET a = 2",
            &[],
        ),
        ("LOCK TABLE t IN SHARE MODE", &[Lock]),
        ("VACUUM t", &[Fails]),
        ("COMMIT; VACUUM (FULL, ANALYZE) t", &[Rewrite]),
        ("CLUSTER t USING i", &[Rewrite]),
        ("REINDEX TABLE t", &[Lock]),
        ("REFRESH MATERIALIZED VIEW v", &[Lock]),
        ("REFRESH MATERIALIZED VIEW CONCURRENTLY v", &[]),
        ("ALTER TYPE e ADD VALUE 'x'", &[]),
        (
            "ALTER TYPE e ADD VALUE IF NOT EXISTS 'x'; INSERT INTO t VALUES ('x')",
            &[Fails],
        ),
        (
            "ALTER TYPE e ADD VALUE 'x'; COMMIT; BEGIN; INSERT INTO t VALUES ('x')",
            &[],
        ),
        ("ALTER TYPE e RENAME VALUE 'x' TO 'y'", &[Breaks]),
        ("SELECT 'DROP TABLE t; DELETE FROM u'", &[]),
        ("-- DROP TABLE t;\n/* TRUNCATE u; */ SELECT 1", &[]),
        ("DO $$ BEGIN DELETE FROM t; END $$", &[]),
    ];
    for (sql, expected) in cases {
        assert_eq!(hazards(sql), *expected, "{sql}");
    }
}

#[test]
fn findings_name_file_and_line_and_what_to_write_instead() {
    let sql = "-- first\nALTER TABLE t\n  ADD a int;\n\nDROP\nTABLE t;\nTRUNCATE u;";
    assert_eq!(
        text(sql, true),
        ["data_loss 1_a.sql:5", "data_loss 1_a.sql:7"]
    );
    let rendered = Text {
        file: "",
        sql: "BEGIN;\nCREATE INDEX i ON t (a);\nCOMMIT;",
        whole: false,
    };
    let found = lint(&[rendered]);
    assert_eq!(
        found[0].to_string(),
        "lock at line 2: CREATE INDEX keeps writers away from t while it builds; say CREATE INDEX \
         CONCURRENTLY, outside of a transaction"
    );
}

#[test]
fn tables_of_an_earlier_file_are_nobodys_yet() {
    let [one, two] = [
        "CREATE TABLE t (a int)",
        "CREATE INDEX i ON t (a); DROP TABLE u",
    ];
    let text = |file, sql| Text {
        file,
        sql,
        whole: true,
    };
    let found = lint(&[text("1.sql", one), text("2.sql", two)]);
    let [only] = found.as_slice() else {
        panic!("{found:?}")
    };
    assert_eq!(
        (only.hazard, only.place.as_str()),
        (Hazard::DataLoss, "2.sql:1")
    );
}

#[test]
fn whatever_is_read_is_read_to_its_end() {
    // Every beginning of statements that hold everything there is.
    let all = "WITH a AS (SELECT 'x''y', E'\\'', $q$ ; $q$) DELETE FROM \"a\"\"b\".c; ALTER TABLE t \
               ADD CONSTRAINT k CHECK (a > (1)), ALTER COLUMN b SET DATA TYPE int; CREATE FUNCTION \
               f() RETURNS int BEGIN ATOMIC SELECT CASE WHEN 1 = 1 THEN 2 END; END; /* ä /* */";
    for end in 0..=all.len() {
        if let Some(beginning) = all.get(..end) {
            lint(&[Text {
                file: "",
                sql: beginning,
                whole: false,
            }]);
        }
    }
}
