use lockstep_proto::plan::Undo;
use lockstep_proto::values::Period;
use serde_json::json;

use super::*;
use crate::step::failure;

fn action(name: &str, args: Value) -> Action {
    Action::deserialize_args(name, args).unwrap().unwrap()
}

fn before(name: &str, args: Value, here: bool) -> Earlier {
    Earlier {
        action: action(name, args),
        here,
    }
}

fn unmet(words: &str) -> Probe {
    Probe::Unmet(failure(Cause::CheckUnmet, words))
}

/// What a dry run says of a step that misses something.
fn said(asked: &Action, earlier: &[Earlier]) -> String {
    match settle(asked, earlier, Ok(unmet("nothing there"))) {
        Ok(done) => done.summary,
        Err(failure) => failure.message,
    }
}

const FAILS: &str = "would fail: nothing there";
const DEPENDS: &str = "depends on an earlier step: not met now: nothing there";

#[test]
fn a_step_that_nothing_before_it_could_help_would_fail() {
    for (name, args) in [
        ("check.disk", json!({"path": "/", "free": "100TiB"})),
        ("check.port", json!({"port": 1})),
        ("check.http", json!({"url": "http://localhost/"})),
        (
            "postgres.counts",
            json!({"database": "shop", "tables": ["nosuch"]}),
        ),
        (
            "postgres.assert",
            json!({"database": "shop", "tables": ["nosuch"], "checks": []}),
        ),
        ("postgres.verify_backup", json!({"database": "shop"})),
        (
            "postgres.backup",
            json!({"database": "shop", "copies": ["/nodir"]}),
        ),
        (
            "postgres.fence",
            json!({"database": "shop", "roles": ["nobody"]}),
        ),
        ("release.activate", json!({"app": "web", "release": "v1"})),
        ("service.status", json!({"service": "web"})),
    ] {
        assert_eq!(said(&action(name, args), &[]), FAILS, "{name}");
    }
}

#[test]
fn only_a_step_that_could_help_is_waited_for() {
    let shop = || json!({"database": "shop"});
    let counts = action(
        "postgres.counts",
        json!({"database": "shop", "tables": ["new"]}),
    );
    let migrate = |database: &str| {
        let args = json!({"database": database, "app": "web", "release": "v1", "dir": "."});
        before("migration.apply", args, false)
    };
    assert_eq!(
        said(&counts, &[migrate("shop")]),
        DEPENDS,
        "on another host"
    );
    assert_eq!(said(&counts, &[migrate("${host.db}")]), DEPENDS);
    assert_eq!(said(&counts, &[migrate("other")]), FAILS);
    let stop = |here| before("service.stop", json!({"service": "web"}), here);
    assert_eq!(said(&counts, &[stop(true)]), FAILS, "it makes no table");

    let port = action("check.port", json!({"port": 1}));
    assert_eq!(said(&port, &[stop(true)]), DEPENDS);
    assert_eq!(said(&port, &[stop(false)]), FAILS, "this host's port");
    let http = action("check.http", json!({"url": "http://app-1/"}));
    assert_eq!(
        said(&http, &[stop(false)]),
        DEPENDS,
        "another host's address"
    );
    let disk = action("check.disk", json!({"path": "/", "free": "100TiB"}));
    assert_eq!(said(&disk, &[stop(true)]), FAILS);

    let verify = action("postgres.verify_backup", shop());
    assert_eq!(
        said(&verify, &[before("postgres.backup", shop(), true)]),
        DEPENDS
    );
    let fetch = |app: &str| {
        let git = json!({"url": "https://x/", "tag": "v1"});
        before(
            "release.fetch",
            json!({"app": app, "release": "v1", "git": git}),
            true,
        )
    };
    let activate = action("release.activate", json!({"app": "web", "release": "v1"}));
    assert_eq!(said(&activate, &[fetch("web")]), DEPENDS);
    assert_eq!(said(&activate, &[fetch("api")]), FAILS);
}

#[test]
fn a_server_that_is_down_is_a_failure_unless_the_plan_starts_something() {
    let backup = action("postgres.backup", json!({"database": "shop"}));
    let down = || Err(failure(Cause::Host, "no server"));
    let alone = settle(&backup, &[], down()).unwrap_err();
    assert_eq!(alone.message, "would fail: no server");
    let stop = before("service.stop", json!({"service": "web"}), true);
    assert!(settle(&backup, &[stop], down()).is_err());
    let start = before("service.start", json!({"service": "postgresql"}), false);
    let done = settle(&backup, &[start], down()).unwrap();
    assert_eq!(done.summary, "depends on an earlier step: no server");
}

#[test]
fn what_needs_nothing_now_is_done_unless_a_step_before_undoes_it() {
    let start = action("service.start", json!({"service": "web"}));
    let runs = || Ok(Probe::NotYet("it runs".into()));
    let summary = |earlier: &[Earlier]| settle(&start, earlier, runs()).unwrap().summary;
    assert_eq!(summary(&[]), "nothing to do: it runs");
    let stop = before("service.stop", json!({"service": "web"}), true);
    assert_eq!(summary(&[stop]), "depends on an earlier step: it runs");
}

#[test]
fn earlier_are_the_changing_steps_before_on_whichever_host() {
    use crate::exec::consent::tests::plan_of;
    let plan = plan_of(&[
        ("service.stop", json!({"service": "${host.unit}"})),
        ("check.port", json!({"port": 1})),
        ("service.start", json!({"service": "web"})),
    ]);
    let at = |step| StepRef { phase: 0, step };
    let own = HeldStep {
        at: at(0),
        action: action("service.stop", json!({"service": "web"})),
        timeout: Period::seconds(1),
        undo: Undo::Auto,
        line: 1,
        duty: crate::exec::consent::Duty::default(),
    };
    let found = earlier(&plan, std::slice::from_ref(&own), at(2));
    assert_eq!(found.len(), 1);
    assert!(found[0].here && found[0].action == own.action);
    assert!(!earlier(&plan, &[], at(2))[0].here);
    assert!(earlier(&plan, &[own], at(0)).is_empty());
}
