//! Copies in object stores: a real one, which checks signatures, and one that fails.

use std::process::{Child, Command, Stdio};

use lockstep_proto::action::postgres::{CopyStore, Presigned, VerifyBackup};

use super::*;
use crate::testing::{environment, program};

mod failing;

const FILES: [&str; 3] = ["archive", "manifest.json", "globals.sql"];

/// s3s-fs: a server of the S3 protocol that verifies signatures, with one bucket.
struct S3 {
    server: Child,
    root: tempfile::TempDir,
    address: String,
}

impl Drop for S3 {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

impl S3 {
    fn start() -> Option<Self> {
        let program = program("s3s-fs")?;
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("backups")).unwrap();
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = free.local_addr().unwrap();
        drop(free);
        let server = Command::new(program)
            .args(["--host", "127.0.0.1", "--port", &address.port().to_string()])
            .args(["--access-key", "AKLOCKSTEP", "--secret-key", "canary-key"])
            .arg(root.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let began = Instant::now();
        while std::net::TcpStream::connect(address).is_err() {
            assert!(began.elapsed() < Duration::from_secs(20), "s3s-fs");
            std::thread::sleep(Duration::from_millis(20));
        }
        Some(Self {
            server,
            root,
            address: address.to_string(),
        })
    }

    /// Has the SDK sign requests: `(method, key)`.
    fn sign(&self, seconds: u32, requests: &[(&str, &str)]) -> Vec<String> {
        let here =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("src/actions/postgres/backup/tests/stored");
        let python = environment(&here.join("requirements.txt")).join("bin/python");
        let signed = Command::new(python)
            .arg(here.join("presign.py"))
            .args([
                &format!("http://{}", self.address),
                "AKLOCKSTEP",
                "canary-key",
            ])
            .args([&seconds.to_string(), "backups"])
            .args(requests.iter().flat_map(|(method, key)| [method, key]))
            .output()
            .unwrap();
        assert!(signed.status.success(), "{signed:?}");
        let urls = String::from_utf8(signed.stdout).unwrap();
        urls.lines().map(str::to_owned).collect()
    }

    fn file(&self, name: &str) -> PathBuf {
        self.root.path().join("backups/shop").join(name)
    }

    fn store(&self) -> CopyStore {
        store(&format!("http://{}/backups/shop/", self.address))
    }
}

/// A store whose requests are the secrets `put-NAME` and `get-NAME`.
fn store(at: &str) -> CopyStore {
    let request = |name: &str| Presigned {
        put: format!("secret://put-{name}"),
        get: format!("secret://get-{name}"),
    };
    CopyStore {
        store: at.to_owned(),
        archive: request("archive"),
        manifest: request("manifest.json"),
        globals: Some(request("globals.sql")),
        headers: [].into(),
        ca_file: None,
    }
}

fn act(store: &CopyStore) -> Backup {
    Backup {
        globals: store.globals.is_some(),
        copies: vec![CopyTo::Store(store.clone())],
        ..backup()
    }
}

fn verify() -> VerifyBackup {
    let args = serde_json::json!({"database": "staff", "level": 0});
    serde_json::from_value(args).unwrap()
}

/// Nothing of a signature is in what people see (INV-10).
fn assert_hidden(what: &str) {
    for part in ["X-Amz-", "Signature=", "canary"] {
        assert!(!what.contains(part), "INV-10: {what}");
    }
}

#[tokio::test]
async fn a_copy_in_a_store_is_sent_by_presigned_requests_and_read_back() {
    let Some(s3) = S3::start() else { return };
    let bench = Bench::with_rows().await;
    let requests: Vec<(&str, String)> = FILES
        .iter()
        .flat_map(|name| ["put_object", "get_object"].map(|verb| (verb, format!("shop/{name}"))))
        .collect();
    let requests: Vec<(&str, &str)> = requests.iter().map(|(verb, key)| (*verb, &**key)).collect();
    let urls = s3.sign(600, &requests);
    for ((verb, key), url) in requests.iter().zip(&urls) {
        let (verb, name) = (&verb[..3], &key[5..]);
        bench.host.secret(&format!("{verb}-{name}"), url);
    }
    let act = act(&s3.store());
    let cx = bench.cx(1, vec![]);
    let done = act.apply(&cx, &NULL).await.unwrap();
    assert!(act.describe().contains("at http://127.0.0.1"));
    let made = made(&bench).remove(0);
    let own = Store::of(&cx, &Database::find(&cx, "staff").unwrap()).path(&made.id);
    for name in FILES {
        let (sent, own) = (
            fs::read(s3.file(name)).unwrap(),
            fs::read(own.join(name)).unwrap(),
        );
        assert_eq!(sent, own, "{name}");
        if name == "manifest.json" {
            assert_hidden(&String::from_utf8(own).unwrap());
        }
    }
    assert_hidden(&format!(
        "{done:?} {:?} {}",
        cx.log.last_lines(),
        act.describe()
    ));
    let said = cx.log.last_lines().join("\n");
    assert!(said.contains("read back equal"), "{said}");

    // It is still there, and what is not fails by name.
    let cx = bench.cx(2, vec![]);
    verify().apply(&cx, &NULL).await.unwrap();
    let archive = fs::read(s3.file("archive")).unwrap();
    let mut other = archive.clone();
    other[9] ^= 1;
    fs::write(s3.file("archive"), &other).unwrap();
    let failed = verify().apply(&cx, &NULL).await.unwrap_err();
    assert_eq!(failed.cause, Cause::CheckUnmet);
    let place = format!("{}archive is none: archive comes back as", s3.store().store);
    assert!(failed.message.contains(&place), "{}", failed.message);
    fs::write(s3.file("archive"), archive).unwrap();
    fs::remove_file(s3.file("globals.sql")).unwrap();
    let failed = verify().apply(&cx, &NULL).await.unwrap_err();
    let words = "globals.sql does not come back: status 404: NoSuchKey";
    assert!(failed.message.contains(words), "{}", failed.message);
    assert_hidden(&format!("{failed:?}"));

    // Requests that are not what they must be: expired, for another method, with another key.
    let expired = s3.sign(1, &[("put_object", "shop/archive")]).remove(0);
    tokio::time::sleep(Duration::from_secs(2)).await;
    let get = s3.sign(600, &[("get_object", "shop/archive")]).remove(0);
    let other = urls[0].replace("shop/archive", "shop/other");
    for (step, url, words) in [
        (3, expired, "status 403: AccessDenied: Request has expired"),
        (4, get, "status 403: SignatureDoesNotMatch"),
        (5, other, "status 403: SignatureDoesNotMatch"),
    ] {
        bench.host.secret("put-archive", &url);
        let cx = bench.cx(step, vec![]);
        let failed = act.apply(&cx, &NULL).await.unwrap_err();
        assert!(failed.message.contains(words), "{}", failed.message);
        assert!(failed.message.contains("cannot send archive of staff-"));
        assert!(
            failed
                .hint
                .as_ref()
                .unwrap()
                .contains("sign the request anew")
        );
        assert_hidden(&format!("{failed:?} {:?}", cx.log.last_lines()));
    }
    assert!(!s3.file("other").exists());
}

#[tokio::test]
async fn what_another_user_has_put_beside_a_backup_sends_nothing_and_runs_nothing() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let bench = Bench::with_rows().await;
    backup().apply(&bench.cx(1, vec![]), &NULL).await.unwrap();
    let (cx, made) = (bench.cx(2, vec![]), made(&bench).remove(0));
    verify().apply(&cx, &NULL).await.unwrap();
    let own = Store::of(&cx, &Database::find(&cx, "staff").unwrap()).path(&made.id);
    let proof = bench.host.path().join("proof");
    let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
    let command = lockstep_proto::action::postgres::CopyCommand {
        command: words(&["true"]),
        read_back: words(&["touch", &proof.display().to_string()]),
    };
    for copy in [
        CopyTo::Command(command),
        CopyTo::Store(store("https://evil.test/")),
    ] {
        let planted = Manifest {
            copies: vec![copy],
            ..made.clone()
        };
        manifest::write_manifest(&own, &planted).unwrap();
        std::os::unix::fs::chown(own.join("manifest.json"), Some(1), Some(1)).unwrap();
        let failed = verify().apply(&cx, &NULL).await.unwrap_err();
        assert_eq!(failed.cause, Cause::Host);
        assert!(
            failed.message.contains("belongs to another user"),
            "{}",
            failed.message
        );
    }
    assert!(!proof.exists());
}
