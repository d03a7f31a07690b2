use super::*;
use crate::plan::{Findings, Plan};

const HEAD: &str = "version: 1\nplan: p\nfleet:\n  app: {labels: {role: app}}\n  db: {labels: {role: db}}\nphases:\n";
const BACKUP: &str = "      - postgres.backup: {database: shop, on: db}
      - postgres.verify_backup: {database: shop, on: db}
";
const APPLY: &str =
    "      - migration.apply: {database: shop, app: shop, release: v2, dir: ., on: app}\n";
const FENCE: &str = "    fence: {database: shop, roles: [shop], until: end, on: db}\n";

/// Kinds and lines of what is found, but for releases that nobody fetches and groups that nobody uses.
fn found(phases: &str) -> Vec<(Code, usize)> {
    let text = format!(
        "{HEAD}{phases}  - name: end\n    on: app\n    steps: [{{check.port: {{port: 1}}}}]\n"
    );
    let findings = match Plan::parse("p.yaml", &text) {
        Ok(plan) => plan.warnings().clone(),
        Err(findings) => findings,
    };
    let shown = |findings: &Findings| -> Vec<(Code, usize)> {
        let all = findings.iter().map(|finding| (finding.code, finding.line));
        all.filter(|(code, _)| ![Code::NeverFetched, Code::UnusedGroup].contains(code))
            .collect()
    };
    shown(&findings)
}

/// One phase of these steps, the first of them on line 9; with a fence, on line 10.
fn steps(fence: &str, steps: &str) -> Vec<(Code, usize)> {
    found(&format!("  - name: a\n{fence}    steps:\n{steps}"))
}

#[test]
fn a_migration_has_its_backup_behind_a_fence() {
    assert_eq!(steps(FENCE, &format!("{BACKUP}{APPLY}")), []);
    assert_eq!(
        steps("", &format!("{BACKUP}{APPLY}")),
        [(Code::LossWindow, 11)]
    );
    let own = "      - postgres.fence: {database: shop, roles: [shop], on: db}\n";
    assert_eq!(steps("", &format!("{own}{BACKUP}{APPLY}")), []);
    // One that is raised later, or lowered before, is none.
    assert_eq!(
        steps("", &format!("{BACKUP}{own}{APPLY}")),
        [(Code::LossWindow, 12)]
    );
    let lower = "      - postgres.unfence: {database: shop, roles: [shop], on: db}\n";
    assert_eq!(
        steps("", &format!("{own}{BACKUP}{lower}{own}{APPLY}")),
        [(Code::LossWindow, 14)]
    );
    // One of another database, too.
    let other = FENCE.replace("shop,", "other,");
    assert_eq!(
        steps(&other, &format!("{BACKUP}{APPLY}")),
        [(Code::LossWindow, 12)]
    );
    let lost = APPLY.replace("dir: .", "dir: ., backup: none");
    assert_eq!(steps("", &lost), []);
}

#[test]
fn a_fence_ends_where_its_last_phase_begins() {
    let until = |phase: &str| {
        found(&format!(
            "  - name: a\n{}    steps:\n{BACKUP}  - name: b\n    steps:\n{APPLY}",
            FENCE.replace("until: end", &format!("until: {phase}"))
        ))
    };
    assert_eq!(until("end"), []);
    assert_eq!(until("b"), [(Code::LossWindow, 14)]);
}

#[test]
fn what_takes_its_time_after_a_backup_is_named() {
    let text =
        format!("{HEAD}  - name: a\n    steps:\n{BACKUP}      - gate.wait: {{for: 5m}}\n{APPLY}");
    let plan = Plan::parse("p.yaml", &text).unwrap();
    let window = plan.warnings().iter().find(|f| f.code == Code::LossWindow);
    let message = &window.unwrap().message;
    assert!(message.contains("`gate.wait` on line 11"), "{message}");
}

#[test]
fn rows_are_the_same_only_while_a_fence_is_up() {
    let compare = "      - postgres.compare: {database: shop, on: db}\n";
    assert_eq!(steps(FENCE, &format!("{BACKUP}{compare}")), []);
    assert_eq!(
        steps("", &format!("{BACKUP}{compare}")),
        [(Code::UnevenComparison, 11)]
    );
    for rows in ["grown", "any", "{within: 5%}"] {
        let loose = compare.replace("shop,", &format!("shop, rows: {rows},"));
        assert_eq!(steps("", &format!("{BACKUP}{loose}")), [], "{rows}");
    }
    let look = "      - postgres.integrity: {database: shop, on: db}\n";
    let compare = compare.replace("shop,", "shop, with: integrity,");
    assert_eq!(steps(FENCE, &format!("{look}{compare}")), []);
    assert_eq!(
        steps("", &format!("{look}{compare}")),
        [(Code::UnevenComparison, 10)]
    );
    assert_eq!(steps("", &compare), [(Code::NothingToCompare, 9)]);
    // A backup is no look.
    let found = steps(FENCE, &format!("{BACKUP}{compare}"));
    assert_eq!(found, [(Code::NothingToCompare, 12)]);
}

#[test]
fn code_is_activated_after_its_migration() {
    let activate = "      - release.activate: {app: shop, release: v2, on: app}\n";
    let before = steps(FENCE, &format!("{BACKUP}{activate}{APPLY}"));
    assert_eq!(before, [(Code::CodeFirst, 13)]);
    assert_eq!(steps(FENCE, &format!("{BACKUP}{APPLY}{activate}")), []);
    let other = activate.replace("app: shop", "app: web");
    assert_eq!(steps(FENCE, &format!("{BACKUP}{other}{APPLY}")), []);
}

#[test]
fn data_goes_back_one_way() {
    let restore = "      - postgres.restore: {database: shop, on: db}\n";
    let down = "      - migration.downgrade: {database: shop, app: shop, release: v2, dir: ., to: a1, on: app}\n";
    let both = steps(FENCE, &format!("{BACKUP}{restore}{down}"));
    assert_eq!(both, [(Code::TwoWaysBack, 13)]);
    let both = steps(FENCE, &format!("{BACKUP}{down}{restore}"));
    assert_eq!(both, [(Code::TwoWaysBack, 13)]);
    let other = down.replace("database: shop", "database: other");
    assert_eq!(steps(FENCE, &format!("{BACKUP}{restore}{other}")), []);
    assert_eq!(steps(FENCE, &format!("{BACKUP}{down}{down}")), []);
}

#[test]
fn a_downgrade_names_its_revision_and_the_release_that_is_undone() {
    let down = |to: &str, release: &str| {
        format!(
            "      - migration.downgrade: {{database: shop, app: shop, release: {release}, dir: ., to: {to}, on: app}}\n"
        )
    };
    for to in ["head", "heads", "head-1", "ae10+2"] {
        assert_eq!(
            steps("", &down(to, "v2")),
            [(Code::BadDowngrade, 9)],
            "{to}"
        );
    }
    assert_eq!(steps("", &down("base", "v2")), [(Code::DestroysData, 9)]);
    for to in ["ae1027a6acf", "add-column", "v1-a"] {
        assert_eq!(steps("", &down(to, "v2")), [], "{to}");
    }
    let after = |release| steps(FENCE, &format!("{BACKUP}{APPLY}{}", down("a1", release)));
    assert_eq!(after("v2"), []);
    assert_eq!(after("v1"), [(Code::BadDowngrade, 13)]);
    let back = "      - release.activate: {app: shop, release: v1, on: app}\n";
    let rollback = |release| steps("", &format!("{back}{}", down("a1", release)));
    assert_eq!(rollback("v2"), []);
    assert_eq!(rollback("v1"), [(Code::BadDowngrade, 10)]);
}

#[test]
fn copies_are_in_different_places() {
    let backup = |copies: &str| {
        steps(
            "",
            &format!(
                "      - postgres.backup: {{database: shop, copies: [{copies}], on: db}}\n\
                 \x20     - postgres.verify_backup: {{database: shop, on: db}}\n"
            ),
        )
    };
    assert_eq!(backup("/a, /b, /a/"), [(Code::CopiesTogether, 9)]);
    assert_eq!(backup("/a/b, /a"), [(Code::CopiesTogether, 9)]);
    assert_eq!(backup("/a, /ab, '${host.backups}'"), []);
}

#[test]
fn a_backup_is_looked_for_where_it_was_made() {
    let verify = |on: &str| {
        steps(
            "",
            &format!("{BACKUP}      - postgres.verify_backup: {{database: shop, on: {on}}}\n"),
        )
    };
    assert_eq!(verify("db"), []);
    assert_eq!(verify("[app, db]"), []);
    assert_eq!(verify("app"), [(Code::ElsewhereLookedFor, 11)]);
    // A migration whose undo restores it, too.
    let fenced = |apply: &str| steps(FENCE, &format!("{BACKUP}{apply}"));
    let restores = APPLY.replace("on: app", "undo_by: restore, on: app");
    assert_eq!(fenced(&restores), [(Code::ElsewhereLookedFor, 12)]);
    assert_eq!(fenced(&restores.replace("on: app", "on: db")), []);
    // By a copy anywhere, if there is one.
    let copied = |copies: &str| {
        let backup = format!("      - postgres.backup: {{database: shop, on: db{copies}}}\n");
        let verify = "      - postgres.verify_backup: {database: shop, from: /mnt, on: app}\n";
        steps("", &format!("{backup}{verify}"))
    };
    assert_eq!(copied(", copies: [/backups]"), []);
    assert_eq!(copied(""), [(Code::ElsewhereLookedFor, 10)]);
}

#[test]
fn a_backup_is_verified() {
    let backup = "      - postgres.backup: {database: shop, on: db}\n";
    assert_eq!(steps("", backup), [(Code::NeverVerified, 9)]);
    assert_eq!(steps("", BACKUP), []);
    // The newest counts, and each database's own.
    let again = steps("", &format!("{BACKUP}{backup}"));
    assert_eq!(again, [(Code::NeverVerified, 11)]);
    let other = backup.replace("shop", "other");
    let found = steps("", &format!("{other}{BACKUP}"));
    assert_eq!(found, [(Code::NeverVerified, 9)]);
}

#[test]
fn a_recovery_has_a_point_that_it_leads_to_and_takes_all_databases_along() {
    let apply = APPLY
        .replace("dir: .", "dir: ., undo_by: recover")
        .replace("on: app", "on: db");
    let point = "      - postgres.restore_point: {database: shop, recoverable: true, on: db}\n";
    let to = |point: &str, apply: &str| steps(FENCE, &format!("{BACKUP}{point}{apply}"));
    assert_eq!(to(point, &apply), [(Code::WholeServer, 13)]);
    assert_eq!(to("", &apply), [(Code::NoPointToRecover, 12)]);
    let plain = point.replace(", recoverable: true", "");
    assert_eq!(to(&plain, &apply), [(Code::NoPointToRecover, 13)]);
    let other = point.replace("shop", "other");
    assert_eq!(to(&other, &apply), [(Code::NoPointToRecover, 13)]);
    // On another host nobody knows what there was.
    let elsewhere = apply.replace("on: db", "on: app");
    let found = to(point, &elsewhere);
    assert_eq!(
        found,
        [(Code::ElsewhereLookedFor, 13), (Code::WholeServer, 13)]
    );
    assert_eq!(to(point, APPLY), []);
}

/// What an unread step would have done is not known.
#[test]
fn nothing_follows_from_a_step_that_cannot_be_read() {
    let broken = "      - postgres.fence: {database: shop, rols: [shop], on: db}\n";
    let found = steps("", &format!("{broken}{BACKUP}{APPLY}"));
    assert!(
        found.iter().all(|(code, _)| *code != Code::LossWindow),
        "{found:?}"
    );
}
