use std::os::unix::fs::symlink;

use lockstep_proto::action::Action;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::exec::policy::Policy;

/// A host with units, programs and links of its own.
struct Place {
    root: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path);
        for directory in ["etc/units", "lib/units", "bin", "secret", "srv"] {
            std::fs::create_dir_all(at(directory)).unwrap();
        }
        for file in [
            "lib/units/ssh.service",
            "lib/units/getty@.service",
            "bin/remove",
            "secret/key",
        ] {
            std::fs::write(at(file), "").unwrap();
        }
        symlink(at("lib/units/ssh.service"), at("etc/units/sshd.service")).unwrap();
        symlink("sshd.service", at("etc/units/remote.service")).unwrap();
        symlink("getty@.service", at("lib/units/autovt@.service")).unwrap();
        symlink("/dev/null", at("etc/units/masked.service")).unwrap();
        symlink(at("secret"), at("srv/link")).unwrap();
        symlink("link/key", at("srv/inner")).unwrap();
        symlink("remove", at("bin/rm2")).unwrap();
        symlink("loop", at("srv/loop")).unwrap();
        Self { root }
    }

    fn path(&self, path: &str) -> String {
        self.root.path().join(path).display().to_string()
    }

    /// A policy that allows everything and denies this; `%` stands for the place.
    fn policy(&self, deny: &str) -> Policy {
        let deny = deny.replace('%', &self.path(""));
        let text = format!("[[allow]]\naction = '*'\nwhere = {{}}\n[[deny]]\n{deny}");
        let mut policy = Policy::parse(Path::new("policy.toml"), &text).unwrap();
        policy.names = Names {
            units: vec![self.path("etc/units").into(), self.path("lib/units").into()],
            programs: vec![self.path("bin").into()],
        };
        policy
    }
}

fn action(name: &str, args: Value) -> Action {
    Action::deserialize_args(name, args).unwrap().unwrap()
}

#[test]
fn a_unit_is_denied_by_each_of_its_names() {
    let place = Place::new();
    let denied = |deny: &str, service: &str| {
        let policy = place.policy(&format!(
            "action = 'service.*'\nwhere = {{ service = ['{deny}'] }}"
        ));
        policy
            .check(&action("service.stop", json!({"service": service})))
            .is_err()
    };
    for (deny, service) in [
        ("ssh", "sshd"),
        ("sshd", "ssh"),
        ("ssh.service", "remote"),
        ("remote", "sshd.service"),
        ("remo*", "ssh"),
        ("getty@tty1", "autovt@tty1"),
        ("autovt@*", "getty@tty7.service"),
    ] {
        assert!(denied(deny, service), "{deny} {service}");
    }
    for (deny, service) in [
        ("ssh", "web"),
        ("ssh", "ssh.socket"),
        ("getty@tty1", "autovt@tty2"),
        ("masked", "web"),
        ("web", "masked"),
    ] {
        assert!(!denied(deny, service), "{deny} {service}");
    }
}

#[test]
fn a_file_is_denied_by_each_path_that_leads_to_it() {
    let place = Place::new();
    let denied = |deny: &str, path: &str| {
        let policy = place.policy(&format!(
            "action = 'check.log'\nwhere = {{ path = ['{deny}'] }}"
        ));
        policy
            .check(&action("check.log", json!({"path": place.path(path)})))
            .is_err()
    };
    for (deny, path) in [
        ("%secret/*", "srv/link/key"),
        ("%secret/key", "srv/inner"),
        ("%srv/link/*", "secret/key"),
        ("%srv/inner", "secret/key"),
        ("%secret/*", "srv/link/./not/there/yet"),
        ("*/secret/*", "srv/inner"),
    ] {
        assert!(denied(deny, path), "{deny} {path}");
    }
    for (deny, path) in [
        ("%secret/*", "srv/other"),
        ("%secret/key", "secret/key2"),
        ("%srv/link", "secret/key"),
        ("%srv/loop", "secret/key"),
        ("%secret/*", "srv/loop"),
    ] {
        assert!(!denied(deny, path), "{deny} {path}");
    }
}

#[test]
fn a_program_is_denied_by_its_name_and_its_paths() {
    let place = Place::new();
    let denied = |deny: &str, program: &str| {
        let policy = place.policy(&format!(
            "action = 'exec.run'\nwhere = {{ argv = [['{deny}', '**']] }}"
        ));
        let program = program.replace('%', &place.path(""));
        let run = action(
            "exec.run",
            json!({"name": "x", "argv": [program, "-r", "y"]}),
        );
        policy.check(&run).is_err()
    };
    for (deny, program) in [
        ("%bin/remove", "remove"),
        ("%bin/remove", "rm2"),
        ("%bin/remove", "%bin/rm2"),
        ("%bin/remove", "%bin/../bin/remove"),
        ("%bin/rm2", "remove"),
        ("remove", "%bin/remove"),
        ("remove", "%bin/rm2"),
    ] {
        assert!(denied(deny, program), "{deny} {program}");
    }
    for (deny, program) in [
        ("%bin/remove", "other"),
        ("remove", "%bin/other"),
        ("x", "y"),
    ] {
        assert!(!denied(deny, program), "{deny} {program}");
    }
}

#[test]
fn a_star_leads_nowhere_through_links() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    for name in ["in/sub", "out"] {
        std::fs::create_dir_all(at(name)).unwrap();
    }
    symlink("../out", at("in/away")).unwrap();
    symlink("sub", at("in/current")).unwrap();
    symlink("in", at("by")).unwrap();
    let allowed = |pattern: &str, path: &str| {
        let rule = format!(
            "[[allow]]\naction = 'env.render'\nwhere = {{ path = ['{}'] }}\n",
            at(pattern)
        );
        let policy = Policy::parse(Path::new("p"), &rule).unwrap();
        let args = json!({"path": at(path), "set": {}});
        policy.check(&action("env.render", args)).is_ok()
    };
    for path in ["in/x", "in/sub/x", "in/current/x", "in/new/x"] {
        assert!(allowed("in/*", path), "{path}");
    }
    for path in ["in/away/x", "in/away", "in/./away/x", "in//away/x"] {
        assert!(!allowed("in/*", path), "{path}");
    }
    // Where the directory itself is reached by a link, and where the path stands there as it is.
    assert!(allowed("by/*", "by/x") && !allowed("by/*", "by/away/x"));
    assert!(allowed("in/away/x", "in/away/x") && allowed("in/away/*", "in/away/x"));
}

proptest! {
    /// Whatever else a policy says, what a rule denies by its very words is refused; and no rule
    /// allows what its pattern does not stand for.
    #[test]
    fn deny_always_wins_and_patterns_stand_for_themselves_only(
        text in "[a-z/.@*=:-]{0,12}",
        pattern in "[a-z/.@*=:-]{0,8}",
    ) {
        let read = |text: &str| Policy::parse(Path::new("p"), text).unwrap();
        let stop = action("service.stop", json!({"service": text.clone()}));
        let rule = |kind: &str, value: &str| {
            format!("[[{kind}]]\naction = 'service.stop'\nwhere = {{ service = ['{value}'] }}\n")
        };
        let both = read(&(rule("allow", "*") + &rule("allow", &text) + &rule("deny", &text)));
        prop_assert!(both.check(&stop).is_err());
        // A regular expression says what a pattern means.
        let words: Vec<String> = pattern.split('*').map(regex::escape).collect();
        let meant = regex::Regex::new(&format!("^(?s:{})$", words.join(".*"))).unwrap();
        let climbs = text.split(['/', '=', ':']).any(|part| part == "..");
        let expected = if climbs { pattern == text } else { meant.is_match(&text) };
        let allowed = read(&rule("allow", &pattern)).check(&stop).is_ok();
        prop_assert_eq!(allowed, expected, "{} {}", pattern, text);
        // Of what a rule would allow by its pattern, a rule that denies leaves nothing.
        if allowed {
            let denied = read(&(rule("allow", "*") + &rule("deny", &pattern)));
            prop_assert!(denied.check(&stop).is_err());
        }
    }
}
