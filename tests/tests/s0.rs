//! The runbook from end to end: v1.0.0 goes out, v1.1.0 comes back by itself.

use std::collections::BTreeSet;

use lockstep_tests::cluster::Cluster;
use lockstep_tests::example::{self, ledger};
use lockstep_tests::operator::{attempts, list, text};
use lockstep_tests::snapshot::Snapshot;
use lockstep_tests::story::deploy;

#[test]
fn v1_0_0_goes_out_and_v1_1_0_comes_back() {
    let cluster = Cluster::builder().start().unwrap();
    cluster.install().unwrap();
    let old = Snapshot::take(&cluster).unwrap();
    assert_eq!(old.tables["employees"].0, 200);

    // A dry run finds nothing that would fail, and changes nothing.
    let inputs = cluster.inputs(&example::plan(), "v1.0.0");
    let mut command = vec!["plan".to_owned(), example::plan().display().to_string()];
    for (name, value) in inputs {
        command.extend(["--input".to_owned(), format!("{name}={value}")]);
    }
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    let said = cluster.requester().run(&command).unwrap();
    assert_eq!(said.code, 0, "{}", said.text());
    assert!(
        said.text().contains("depends on an earlier step"),
        "{}",
        said.text()
    );
    let looked = Snapshot::take(&cluster).unwrap();
    assert_eq!(old.differences(&looked), Vec::<String>::new());

    let good = deploy(&cluster, "v1.0.0");
    assert_eq!(
        text(&good["state"]),
        "succeeded",
        "{}",
        cluster.explain(&good)
    );
    let new = Snapshot::take(&cluster).unwrap();
    for host in cluster.app_hosts() {
        assert_eq!(host.release(), "v1.0.0");
        assert!(
            new.health[&host.name].starts_with("200"),
            "{}",
            new.health[&host.name]
        );
    }
    assert_ne!(new.schema, old.schema);
    for table in ["users", "departments"] {
        assert_eq!(
            new.tables[table], old.tables[table],
            "the migration leaves {table} alone"
        );
    }
    let down = good["downtime"]["ms"]
        .as_u64()
        .expect("the downtime was measured");
    assert!(down > 0, "{}", good["downtime"]);

    let bad = deploy(&cluster, "v1.1.0");
    assert_eq!(
        text(&bad["state"]),
        "rolled_back",
        "{}",
        cluster.explain(&bad)
    );
    assert!(
        text(&bad["reason"]).contains("health"),
        "the reason says why: {}",
        bad["reason"]
    );
    let back = Snapshot::take(&cluster).unwrap();
    assert_eq!(
        new.differences(&back),
        Vec::<String>::new(),
        "{}",
        cluster.explain(&bad)
    );
    // Lockstep's own comparison: of every part that the rollout touched, on every host.
    let mut parts = BTreeSet::new();
    for compared in list(&bad["state_compared"]) {
        assert_eq!(compared["equal"], true, "{compared}");
        let name = text(&compared["name"]);
        let kind = name.split_once(' ').map_or(name, |(kind, _)| kind);
        parts.insert((text(&compared["host"]), kind));
    }
    for host in cluster.app_hosts() {
        for kind in ["release", "service", "file"] {
            let part = (host.name.as_str(), kind);
            assert!(parts.contains(&part), "{part:?} is not among {parts:?}");
        }
    }
    assert!(
        parts.iter().any(|(_, kind)| *kind == "database"),
        "{parts:?}"
    );

    // The application's own record: each effect once, on one host.
    let mut migrations: Vec<String> = vec![];
    for host in cluster.app_hosts() {
        migrations.extend(ledger(&host.migrations()));
    }
    assert_eq!(
        migrations,
        [
            "upgrade 0001_base",
            "upgrade 0002_extended_fields",
            "upgrade 0003_shifts",
            "downgrade 0003_shifts"
        ]
    );
    let through = ["start 0.9.5", "stop 0.9.5", "start 1.0.0", "stop 1.0.0"];
    let mut tried = 0;
    for host in cluster.app_hosts() {
        let effects = ledger(&host.effects());
        let new_tried = effects.contains(&"start 1.1.0".to_owned());
        let then: &[&str] = if new_tried {
            &["start 1.1.0", "stop 1.1.0", "start 1.0.0"]
        } else {
            &["start 1.0.0"]
        };
        assert_eq!(effects, [&through[..], then].concat(), "{}", host.name);
        tried += usize::from(new_tried);
    }
    assert_eq!(tried, 1, "the second host was never given v1.1.0");
    assert_eq!(
        attempts(&bad, "service.start")
            .iter()
            .filter(|a| a["outcome"] == "ok")
            .count(),
        2
    );
    assert!(example::plan().exists());
}
