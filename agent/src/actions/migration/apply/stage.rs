//! A database host and an application host, with the example application on it.

use std::fs;
use std::path::{Path, PathBuf};

use lockstep_proto::action::migration::{By, Guards, OnLongTx, RequiredBackup, Tool, UndoBy};
use lockstep_proto::action::postgres::{
    Aspect, Backup, Fence, FenceVia, Level, RestoreInto, VerifyBackup,
};
use lockstep_proto::values::{ByteSize, Period};

use super::*;
use crate::config::App;
use crate::sql::cluster::{Bench, as_owner};
use crate::testing::environment;

const NULL: Value = Value::Null;

/// The revision of the release of before, and that of the new one.
pub(super) const OLD: &str = "0001_base";
pub(super) const NEW: &str = "0002_extended_fields";

/// The migration of the new release.
pub(super) fn apply() -> Apply {
    Apply {
        tool: Tool::Alembic,
        database: "staff".into(),
        app: "employees".into(),
        release: "v1.0.0".into(),
        dir: "backend".into(),
        program: "venv/bin/alembic".into(),
        to: "head".into(),
        backup: RequiredBackup::Verified,
        undo_by: UndoBy::Downgrade,
        max_tx_age: Period::seconds(60),
        on_long_tx: OnLongTx::Wait,
        guards: Guards::default(),
        apply: By::Tool,
        lock_timeout: Period::seconds(5),
        statement_timeout: Period::seconds(60),
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().flatten() {
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// The attempt's files where other attempts at its step look for them.
pub(super) fn placed(mut cx: Context) -> Context {
    let steps = cx.config.state_dir.join("steps");
    cx.dir = steps.join(cx.key.to_string()).join("files");
    fs::create_dir_all(&cx.dir).unwrap();
    cx
}

/// A database host and an application host in one, with the releases v0.9.5 and v1.0.0 and rows
/// of the former.
pub(super) struct Stage {
    pub(super) bench: Bench,
    ledger: PathBuf,
}

impl Stage {
    pub(super) async fn new() -> Self {
        let mut bench = Bench::new().await;
        let root = bench.host.path().join("app");
        let example =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/examples/employee-system/app");
        let venv = environment(&example.join("base/backend/requirements.txt"));
        for release in ["v0.9.5", "v1.0.0"] {
            let backend = root.join("releases").join(release).join("backend");
            copy(&example.join("base/backend"), &backend);
            if release == "v1.0.0" {
                copy(&example.join("v1.0.0/backend"), &backend);
            }
            std::os::unix::fs::symlink(&venv, backend.join("venv")).unwrap();
        }
        let ledger = bench.host.path().join("ledger");
        let env = [("MIGRATION_LEDGER".to_owned(), ledger.display().to_string())];
        let app = App {
            root,
            user: None,
            env: env.into(),
        };
        bench.host.config.apps.insert("employees".into(), app);
        let stage = Self { bench, ledger };
        stage
            .free(&Apply {
                release: "v0.9.5".into(),
                ..apply()
            })
            .await
            .unwrap();
        stage
            .bench
            .sql(
                "INSERT INTO public.departments (name) SELECT 'd' || n FROM generate_series(1, 5) n; \
                 INSERT INTO public.employees (first_name, last_name, department_id) \
                 SELECT 'f' || n, 'l' || n, 1 + n % 5 FROM generate_series(1, 200) n",
            )
            .await;
        stage
    }

    /// What the application host sees.
    pub(super) fn cx(&self, step: u16, facts: Vec<Fact>) -> Context {
        placed(as_owner(self.bench.cx(step, facts)))
    }

    pub(super) fn undo(&self, step: u16, facts: Vec<Fact>) -> Context {
        placed(as_owner(self.bench.undo(step, facts)))
    }

    /// Applies without asking for a backup.
    pub(super) async fn free(&self, act: &Apply) -> Result<Done, Failure> {
        let act = Apply {
            backup: RequiredBackup::None,
            ..act.clone()
        };
        act.apply(&self.cx(50, vec![]), &NULL).await
    }

    pub(super) fn fence(&self) -> Fence {
        Fence {
            database: "staff".into(),
            via: FenceVia::Connect,
            roles: vec![self.bench.app()],
        }
    }

    /// A backup and its proof.
    pub(super) async fn backed_up(&self) -> Vec<Fact> {
        let backup: Backup = serde_json::from_value(json!({"database": "staff"})).unwrap();
        let mut facts = backup
            .apply(&self.bench.cx(2, vec![]), &NULL)
            .await
            .unwrap()
            .facts;
        let verify = VerifyBackup {
            database: "staff".into(),
            restore_into: RestoreInto::Scratch,
            from: None,
            level: Level::Equal,
            compare: vec![Aspect::RowCounts],
            min_size: ByteSize(0),
        };
        let cx = self.bench.cx(3, facts.clone());
        facts.extend(verify.apply(&cx, &NULL).await.unwrap().facts);
        facts
    }

    pub(super) async fn revision(&self) -> String {
        revision(&self.bench.session("staff").await, Tool::Alembic)
            .await
            .unwrap()
    }

    /// What the application's own record says of migrations since the first.
    pub(super) fn ledger(&self) -> Vec<String> {
        let text = fs::read_to_string(&self.ledger).unwrap();
        let words = |line: &str| {
            line.split_whitespace()
                .take(2)
                .collect::<Vec<_>>()
                .join(" ")
        };
        text.lines().skip(1).map(words).collect()
    }
}
