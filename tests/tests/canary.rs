//! No secret leaves its host: not in an argument, a log, a journal, a report or an event (INV-10).
//! Every secret of the cluster is a word that stands nowhere else, and is looked for everywhere.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use lockstep_tests::cluster::Cluster;
use lockstep_tests::operator::text;
use lockstep_tests::processes;
use lockstep_tests::story::{deploy, files_with};

/// Where secrets belong: the hosts' own files of secrets, and what `env.render` was told to write.
fn belongs(path: &Path) -> bool {
    let in_secrets = path
        .parent()
        .is_some_and(|parent| parent.ends_with("secrets"));
    let rendered = path.ends_with("shared/.env");
    // The harness's own way into the database.
    let own = path.ends_with("postgres/pgpass");
    in_secrets || rendered || own
}

/// The programs that may have secrets in their environment: those that were started to use them.
fn may_have_environment(program: &str) -> bool {
    !["lockstep", "lockstep-agent", "postgres", "setpriv"]
        .iter()
        .any(|own| program.ends_with(own))
}

#[test]
fn no_secret_is_found_anywhere() {
    let cluster = Cluster::builder().start().unwrap();
    let canaries: Vec<String> = cluster.secrets.values().cloned().collect();
    let ended = AtomicBool::new(false);
    let (looks, leaks, documents) = std::thread::scope(|scope| {
        let sampler = scope.spawn(|| {
            let (mut looks, mut leaks) = (0, BTreeSet::new());
            while !ended.load(Ordering::Relaxed) {
                for process in processes::of(cluster.root()) {
                    looks += 1;
                    let program = process.argv.first().map(String::as_str).unwrap_or_default();
                    for canary in &canaries {
                        if process.argv.iter().any(|word| word.contains(canary)) {
                            leaks.insert(format!("argv of {}", process.line()));
                        }
                        let environ = String::from_utf8_lossy(&process.environ);
                        if environ.contains(canary) && !may_have_environment(program) {
                            leaks.insert(format!("environment of {}", process.line()));
                        }
                    }
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            (looks, leaks)
        });
        let installed = cluster.install();
        let documents =
            installed.map(|()| [deploy(&cluster, "v1.0.0"), deploy(&cluster, "v1.1.0")]);
        ended.store(true, Ordering::Relaxed);
        let (looks, leaks) = sampler.join().unwrap();
        (looks, leaks, documents.unwrap())
    });
    assert!(looks > 1000, "only {looks} looks at processes");
    assert_eq!(leaks, BTreeSet::new());
    let states = documents
        .each_ref()
        .map(|document| text(&document["state"]));
    assert_eq!(
        states,
        ["succeeded", "rolled_back"],
        "{}",
        cluster.explain(&documents[1])
    );

    for document in &documents {
        let rollout = text(&document["rollout"]);
        let operator = cluster.requester();
        for command in [
            &["report", rollout, "--format", "md"][..],
            &["report", rollout, "--format", "html"],
            &["report", rollout, "--format", "json"],
            &["status", rollout, "--output", "json"],
            &["logs", rollout],
        ] {
            let said = operator.run(command).unwrap();
            assert_eq!(said.code, 0, "{command:?}: {}", said.text());
            assert!(!said.stdout.is_empty(), "{command:?} says nothing");
            for canary in &canaries {
                assert!(!said.text().contains(canary), "{command:?} shows a secret");
            }
        }
    }
    // Journals, attempts, logs, backups, the database's own files: everything there is.
    for canary in &canaries {
        let found = files_with(cluster.root(), canary, &belongs);
        assert_eq!(
            found,
            Vec::<String>::new(),
            "they hold {}",
            &canary[..canary.len() - 8]
        );
    }
    for message in cluster.mailbox.messages() {
        assert!(
            !canaries.iter().any(|canary| message.contains(canary)),
            "a mail shows a secret"
        );
    }
}
