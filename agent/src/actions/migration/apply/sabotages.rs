//! Twelve ways in which a file is no backup, each of which must stop the migration behind it; and
//! beside each what the usual runbook does to see whether its backup is good: `ls -lh` and
//! `pg_restore --list FILE | head -20`.

#![expect(clippy::print_stdout, reason = "people read what came of each")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use lockstep_proto::action::migration::{ProvenBackup, RequiredBackup};
use lockstep_proto::action::postgres::{Backup, Level, VerifyBackup};
use lockstep_proto::values::Period;

use super::stage::Stage;
use super::stage::apply;
use super::*;
use crate::sql::cluster::{PASSWORD, bin_dir};

const NULL: Value = Value::Null;

/// A stage whose backups are sabotaged, and what came of it.
struct Yard {
    stage: Stage,
    /// Where the next backup goes.
    store: PathBuf,
    /// What was sabotaged, whether the migration was stopped, whether the runbook saw nothing.
    seen: Vec<(&'static str, bool, bool)>,
}

/// A backup on the disk, and what its step has told.
struct Taken {
    facts: Vec<Fact>,
    archive: PathBuf,
}

impl Taken {
    fn bytes(&self) -> Vec<u8> {
        fs::read(&self.archive).unwrap()
    }

    /// Puts other bytes into the archive's place.
    fn put(&self, bytes: &[u8]) {
        fs::write(&self.archive, bytes).unwrap();
    }

    /// The same, with a manifest and facts that fit: the digest tells nothing then.
    fn put_and_fit(&mut self, bytes: &[u8]) {
        self.put(bytes);
        let manifest = self.archive.with_file_name("manifest.json");
        let mut made: Value = serde_json::from_slice(&fs::read(&manifest).unwrap()).unwrap();
        made["digest"] = json!(Digest::of(bytes));
        made["size"] = json!(bytes.len());
        fs::write(&manifest, made.to_string()).unwrap();
        for fact in &mut self.facts {
            if let Fact::Backup { digest, size, .. } = fact {
                (*digest, *size) = (Digest::of(bytes), bytes.len() as u64);
            }
        }
    }
}

impl Yard {
    async fn new() -> Self {
        let stage = Stage::new().await;
        // What hardly compresses: a small volume is soon full.
        let noise = "INSERT INTO public.departments (name) \
                     SELECT md5(n::text) || md5((n * 7)::text) FROM generate_series(1, 5000) n";
        stage.bench.sql(noise).await;
        Self {
            stage,
            store: PathBuf::new(),
            seen: vec![],
        }
    }

    /// Backups go into a directory of their own from now on.
    fn keep_in(&mut self, store: PathBuf) {
        fs::create_dir_all(&store).unwrap();
        self.store.clone_from(&store);
        let host = &mut self.stage.bench.host;
        host.config.postgres.get_mut("staff").unwrap().backup_dir = Some(store);
    }

    async fn backup(&self, more: Value) -> Result<Taken, Failure> {
        let mut args = json!({"database": "staff"});
        let more = more.as_object().unwrap().clone();
        args.as_object_mut().unwrap().extend(more);
        let act: Backup = serde_json::from_value(args).unwrap();
        let done = act.apply(&self.stage.bench.cx(2, vec![]), &NULL).await?;
        let id = done.facts.iter().find_map(|fact| match fact {
            Fact::Backup { id, .. } => Some(id.clone()),
            _ => None,
        });
        Ok(Taken {
            archive: self.store.join(id.unwrap()).join("archive"),
            facts: done.facts,
        })
    }

    async fn fresh(&mut self, more: Value) -> Taken {
        let store = self
            .stage
            .bench
            .host
            .path()
            .join(format!("s{}", self.seen.len()));
        self.keep_in(store);
        self.backup(more).await.unwrap()
    }

    /// Verifies what is there, and tries to migrate behind it.
    async fn migrate(&self, mut facts: Vec<Fact>, age: Period) -> Result<Done, Failure> {
        let verify: VerifyBackup = serde_json::from_value(json!({"database": "staff"})).unwrap();
        let cx = self.stage.bench.cx(3, facts.clone());
        match verify.apply(&cx, &NULL).await {
            Ok(done) => facts.extend(done.facts),
            Err(failed) => println!("    verify_backup: {}", failed.message),
        }
        tokio::time::sleep(Duration::from_millis(1100)).await;
        let act = Apply {
            backup: RequiredBackup::Proven(ProvenBackup {
                level: Level::Equal,
                age: Some(age),
            }),
            ..apply()
        };
        act.apply(&self.stage.cx(4, facts), &NULL).await
    }

    /// Holds one sabotage: the migration is refused, and the database is where it was.
    async fn holds(&mut self, name: &'static str, facts: Vec<Fact>, age: Period, file: &Path) {
        println!("{name}");
        let was = self.stage.revision().await;
        let went = self.migrate(facts, age).await;
        let stopped = went
            .as_ref()
            .is_err_and(|failed| failed.cause == Cause::Refused)
            && self.stage.revision().await == was
            && self.stage.ledger().is_empty();
        if let Err(failed) = went {
            println!("    migration.apply: {}", failed.message);
        }
        self.seen.push((name, stopped, runbook_accepts(file)));
    }

    /// A dump of one of the server's databases, as the runbook takes it, by any pg_dump.
    fn dump(&self, dbname: &str, pg_dump: &Path, args: &[&str], into: &Path) {
        let config = &self.stage.bench.host.config.postgres["maintenance"];
        let port = config.port.to_string();
        let mut shell = Command::new("sh");
        shell.args(["-c", "f=$1; shift; \"$0\" \"$@\" > \"$f\""]);
        shell.arg(pg_dump).arg(into).args(args);
        shell.args(["-h", &config.host, "-p", &port, "-U", "postgres", dbname]);
        let dumped = shell.env("PGPASSWORD", PASSWORD).output().unwrap();
        print!("{}", String::from_utf8_lossy(&dumped.stderr));
    }
}

/// Whether nothing is wrong with a file by the runbook's own commands: they succeed, it is not
/// empty, and something is listed.
fn runbook_accepts(file: &Path) -> bool {
    let bin = bin_dir();
    let mut shell = Command::new("sh");
    shell.args([
        "-c",
        "ls -lh \"$1\" && \"$0\"/pg_restore --list \"$1\" | head -20",
    ]);
    let said = shell.arg(&bin).arg(file).output().unwrap();
    let lines = String::from_utf8_lossy(&said.stdout).lines().count();
    let is_empty = fs::metadata(file).is_ok_and(|found| found.len() == 0);
    said.status.success() && !is_empty && lines > 1
}

/// A small volume, mounted as long as this value lives.
struct Volume(PathBuf);

impl Volume {
    fn new(path: PathBuf) -> Self {
        fs::create_dir_all(&path).unwrap();
        let mut mount = Command::new("mount");
        mount
            .args(["-t", "tmpfs", "-o", "size=96k", "none"])
            .arg(&path);
        let mounted = mount.status().unwrap();
        assert!(
            mounted.success(),
            "this test mounts a volume: run it as root"
        );
        Self(path)
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[tokio::test]
#[ignore = "mounts a volume: `make test` runs it as root"]
async fn twelve_sabotages_of_a_backup_stop_the_migration() {
    let mut yard = Yard::new().await;
    let pg_dump = bin_dir().join("pg_dump");
    let name = yard.stage.bench.name.clone();
    let path = |yard: &Yard, name: &str| yard.stage.bench.host.path().join(name);
    let minute = Period::seconds(900);

    let taken = yard.fresh(json!({})).await;
    let whole = taken.bytes();
    taken.put(&whole[..whole.len() / 2]);
    yard.holds("truncated", taken.facts, minute, &taken.archive)
        .await;

    let taken = yard.fresh(json!({})).await;
    taken.put(b"");
    yard.holds("empty", taken.facts, minute, &taken.archive)
        .await;

    let mut taken = yard.fresh(json!({})).await;
    let other = path(&yard, "other.dump");
    yard.dump("postgres", &pg_dump, &["-Fc"], &other);
    taken.put_and_fit(&fs::read(&other).unwrap());
    yard.holds("wrong database", taken.facts, minute, &taken.archive)
        .await;

    let mut taken = yard.fresh(json!({})).await;
    yard.dump(&name, &pg_dump, &[], &other);
    taken.put_and_fit(&fs::read(&other).unwrap());
    yard.holds(
        "plain text under a .dump name",
        taken.facts,
        minute,
        &taken.archive,
    )
    .await;

    // It would do its work, and leave out what it does not know of.
    let old = path(&yard, "old");
    fs::create_dir(&old).unwrap();
    let real = pg_dump.display();
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = --version ] && exec echo 'pg_dump (PostgreSQL) 14.13'\nexec {real} \"$@\"\n"
    );
    fs::write(old.join("pg_dump"), script).unwrap();
    Command::new("chmod")
        .arg("0755")
        .arg(old.join("pg_dump"))
        .status()
        .unwrap();
    let file = path(&yard, "old.dump");
    yard.dump(&name, &old.join("pg_dump"), &["-Fc"], &file);
    let store = path(&yard, "of-old");
    yard.keep_in(store);
    let section = |yard: &mut Yard, bin: Option<PathBuf>| {
        let config = &mut yard.stage.bench.host.config;
        config.postgres.get_mut("staff").unwrap().bin_dir = bin;
    };
    section(&mut yard, Some(old));
    let failed = yard.backup(json!({})).await.err().expect("it is too old");
    assert!(
        failed.message.contains("of version 14.13"),
        "{}",
        failed.message
    );
    section(&mut yard, None);
    yard.holds("a pg_dump older than the server", vec![], minute, &file)
        .await;

    // The room looks enough by the backup before it, and is not.
    let before = yard.fresh(json!({})).await;
    let volume = Volume::new(path(&yard, "volume"));
    let made = before.archive.parent().unwrap();
    let small = volume.0.join(made.file_name().unwrap());
    fs::create_dir(&small).unwrap();
    let text = fs::read(made.join("manifest.json")).unwrap();
    let mut manifest: Value = serde_json::from_slice(&text).unwrap();
    manifest["size"] = json!(1000);
    fs::write(small.join("manifest.json"), manifest.to_string()).unwrap();
    yard.keep_in(volume.0.clone());
    let failed = yard.backup(json!({})).await.err().expect("it does not fit");
    assert!(failed.message.contains("No space left"), "{failed:?}");
    fs::remove_dir_all(small).unwrap();
    let file = volume.0.join("runbook.dump");
    yard.dump(&name, &pg_dump, &["-Fc", "-Z0"], &file);
    yard.holds("full disk", vec![], minute, &file).await;
    drop(volume);

    let mut taken = yard.fresh(json!({})).await;
    yard.dump(&name, &pg_dump, &["-Fc", "-T", "public.employees"], &other);
    taken.put_and_fit(&fs::read(&other).unwrap());
    yard.holds("missing table", taken.facts, minute, &taken.archive)
        .await;

    let mut taken = yard.fresh(json!({})).await;
    yard.stage
        .bench
        .sql("DELETE FROM public.employees WHERE id <= 10")
        .await;
    yard.dump(&name, &pg_dump, &["-Fc"], &other);
    taken.put_and_fit(&fs::read(&other).unwrap());
    yard.holds("dropped rows", taken.facts, minute, &taken.archive)
        .await;

    let taken = yard.fresh(json!({})).await;
    let mut bytes = taken.bytes();
    let at = bytes.len() * 3 / 4;
    bytes[at] ^= 1;
    taken.put(&bytes);
    yard.holds(
        "flipped byte in compressed data",
        taken.facts,
        minute,
        &taken.archive,
    )
    .await;

    // pg_restore reads it without a word: only the values tell.
    let mut taken = yard.fresh(json!({"compress": {"method": "none"}})).await;
    let mut bytes = taken.bytes();
    let value = b"\tl150\t";
    let at = bytes
        .windows(value.len())
        .position(|it| it == value)
        .expect("it is not compressed");
    bytes[at + 2] ^= 1;
    taken.put_and_fit(&bytes);
    yard.holds(
        "flipped byte in raw data",
        taken.facts,
        minute,
        &taken.archive,
    )
    .await;

    let copies = path(&yard, "copies");
    fs::create_dir(&copies).unwrap();
    let taken = yard
        .fresh(json!({"copies": [copies.display().to_string()]}))
        .await;
    fs::remove_dir_all(&copies).unwrap();
    fs::create_dir(&copies).unwrap();
    yard.holds("lost copy", taken.facts, minute, &taken.archive)
        .await;

    let taken = yard.fresh(json!({})).await;
    yard.holds(
        "stale file",
        taken.facts,
        Period::seconds(1),
        &taken.archive,
    )
    .await;

    let taken = yard.fresh(json!({})).await;
    let mut bytes = taken.bytes();
    bytes.extend(b"appended");
    taken.put(&bytes);
    yard.holds("changed after hashing", taken.facts, minute, &taken.archive)
        .await;

    // What nobody has touched lets the migration begin.
    let taken = yard.fresh(json!({})).await;
    yard.migrate(taken.facts, minute).await.unwrap();
    tell(&yard.seen);
}

/// Prints what came of it; the two flipped bytes are one sabotage, of two archives.
fn tell(seen: &[(&'static str, bool, bool)]) {
    let mut kinds: Vec<(&str, bool, bool)> = vec![];
    for (name, stopped, accepted) in seen {
        println!("{name}: stopped {stopped}, accepted by the runbook {accepted}");
        let kind = name.split(" in ").next().unwrap_or(name);
        match kinds.iter_mut().find(|(known, ..)| *known == kind) {
            Some(known) => *known = (kind, known.1 && *stopped, known.2 && *accepted),
            None => kinds.push((kind, *stopped, *accepted)),
        }
    }
    let stopped = kinds.iter().filter(|kind| kind.1).count();
    let accepted = kinds.iter().filter(|kind| kind.2).count();
    let report =
        json!({"sabotages": kinds.len(), "stopped": stopped, "accepted_by_runbook": accepted});
    println!("{report}");
    if let Some(directory) = std::env::var_os("LOCKSTEP_DATABASE_REPORT_DIR") {
        let file = Path::new(&directory).join("sabotages.json");
        fs::write(file, format!("{report}\n")).unwrap();
    }
    assert_eq!((kinds.len(), stopped), (12, 12), "{seen:?}");
}
