//! With the real tool on a real server: a migration there and back on the restored backup.

use std::fs;

use lockstep_proto::action::migration::Rehearse;
use lockstep_proto::action::postgres::Level;

use super::stage::{NEW, OLD};
use super::stage::{Stage, placed};
use super::*;

const NULL: Value = Value::Null;

fn rehearse(more: &Value) -> Rehearse {
    let mut args = json!({
        "database": "staff", "app": "employees", "release": "v1.0.0", "dir": "backend",
    });
    let fields = args.as_object_mut().unwrap();
    fields.extend(more.as_object().unwrap().clone());
    serde_json::from_value(args).unwrap()
}

/// A backup that nobody has verified.
async fn taken(stage: &Stage) -> Vec<Fact> {
    let mut facts = stage.backed_up().await;
    facts.retain(|fact| !matches!(fact, Fact::BackupVerified { .. }));
    facts
}

/// Lets the release's migration begin a way with this line.
fn begin(stage: &Stage, way: &str, line: &str) {
    let file = "app/releases/v1.0.0/backend/migrations/versions/0002_extended_fields.py";
    let file = stage.bench.host.path().join(file);
    let script = fs::read_to_string(&file).unwrap();
    let head = format!("def {way}():\n");
    fs::write(
        &file,
        script.replacen(&head, &format!("{head}    {line}\n"), 1),
    )
    .unwrap();
}

async fn scratch_databases(stage: &Stage) -> String {
    let sql = "SELECT count(*) FROM pg_database WHERE starts_with(datname, 'lockstep_verify_')";
    stage.bench.ask(sql).await
}

#[tokio::test]
async fn a_rehearsal_proves_the_backup_the_migration_and_the_way_back() {
    let stage = Stage::new().await;
    let facts = taken(&stage).await;
    let hold = "op.execute('LOCK employees'); op.execute('SELECT pg_sleep(0.4)')";
    begin(&stage, "upgrade", hold);
    let act = rehearse(&json!({}));
    let cx = placed(stage.bench.cx(7, facts));
    assert!(matches!(act.probe(&cx).await.unwrap(), Probe::Absent(_)));
    let done = act.apply(&cx, &NULL).await.unwrap();
    let level = done.facts.iter().find_map(|fact| match fact {
        Fact::BackupVerified { level, .. } => Some(*level),
        _ => None,
    });
    assert_eq!(level, Some(Level::Equal));
    let went = format!("its copy went from {OLD} to {NEW} in ");
    for said in [went.as_str(), " s, and back in "] {
        assert!(done.summary.contains(said), "{}", done.summary);
    }
    let notes = done.facts.iter().filter_map(|fact| match fact {
        Fact::Note { value, .. } => Some(value.as_str()),
        _ => None,
    });
    let notes: Vec<&str> = notes.collect();
    for said in [
        "employees: AccessExclusiveLock for about",
        " ms: SELECT pg_sleep(0.4)",
        "employees has got the columns hired_on",
    ] {
        assert!(notes.iter().any(|note| note.contains(said)), "{notes:?}");
    }
    // The database itself is where it was, and nothing is left.
    assert_eq!(stage.revision().await, OLD);
    assert_eq!(scratch_databases(&stage).await, "0");
    assert!(matches!(act.probe(&cx).await.unwrap(), Probe::Present(_)));
}

/// The outcomes of rehearsals with these options, one after the other, on a release that was spoilt.
async fn outcomes(spoil: (&str, &str), options: &[Value]) -> Vec<Result<Done, Failure>> {
    let stage = Stage::new().await;
    let facts = taken(&stage).await;
    begin(&stage, spoil.0, spoil.1);
    let mut outcomes = vec![];
    for more in options {
        let cx = placed(stage.bench.cx(7, facts.clone()));
        outcomes.push(rehearse(more).apply(&cx, &NULL).await);
    }
    assert_eq!(stage.revision().await, OLD);
    assert_eq!(scratch_databases(&stage).await, "0");
    outcomes
}

#[tokio::test]
async fn a_way_down_that_leads_elsewhere_fails_a_rehearsal_or_is_said() {
    let spoil = ("downgrade", "op.execute('CREATE TABLE left_over (a int)')");
    let options = [json!({}), json!({"downgrade": "if_possible"})];
    let outcomes = outcomes(spoil, &options).await;
    let [Err(failed), Ok(said)] = outcomes.as_slice() else {
        panic!("{outcomes:?}")
    };
    assert_eq!(failed.cause, Cause::CheckUnmet);
    for why in ["does not lead back", "the schema's fingerprint is"] {
        assert!(failed.message.contains(why), "{}", failed.message);
    }
    let without = "with no way back: ";
    assert!(said.summary.contains(without), "{}", said.summary);
}

#[tokio::test]
async fn a_rehearsal_finds_what_a_migration_would_change() {
    let spoil = (
        "upgrade",
        "op.execute('UPDATE departments SET name = upper(name)')",
    );
    let outcomes = outcomes(spoil, &[json!({})]).await;
    let [Err(failed)] = outcomes.as_slice() else {
        panic!("{outcomes:?}")
    };
    assert_eq!(failed.cause, Cause::CheckUnmet);
    let why = "departments has other values in name";
    assert!(failed.message.contains(why), "{}", failed.message);
}

#[tokio::test]
async fn a_migration_that_fails_fails_its_rehearsal_and_nothing_else() {
    let spoil = ("upgrade", "op.execute('SELECT 1/0')");
    let outcomes = outcomes(spoil, &[json!({})]).await;
    let [Err(failed)] = outcomes.as_slice() else {
        panic!("{outcomes:?}")
    };
    let why = "in the rehearsal, on the way up: ";
    assert!(failed.message.starts_with(why), "{}", failed.message);
    let why = "division by zero";
    assert!(failed.message.contains(why), "{}", failed.message);
    assert!(!failed.changed);
}
