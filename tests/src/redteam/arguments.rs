//! Plans that people have sealed, and that the host's policy does not allow: other actions, paths
//! that lead elsewhere, other commands, names of units that mean something else. Whoever seals such
//! a plan was deceived, or is the thief's friend.

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::thief::Thief;

/// Stands in a plan for a text that the thief puts in: what would refuse it on the way is left out.
const HERE: &str = "@here@";

/// Plays them.
pub(super) async fn play(thief: &mut Thief) -> Result<()> {
    actions(thief).await?;
    paths(thief).await?;
    commands(thief).await?;
    units(thief).await?;
    literally(thief).await
}

/// Offers a sealed plan of one step, with a text put in where [`HERE`] stands.
async fn refused(
    thief: &mut Thief,
    kind: &str,
    name: &str,
    (action, args): (&str, Value),
    text: &str,
) -> Result<()> {
    let plan = thief.plan(&[(action, args)]);
    let bytes = String::from_utf8(plan.bytes().to_vec())?;
    let quoted = Value::from(text).to_string();
    let inner = &quoted[1..quoted.len() - 1];
    let offered = thief.keep_bytes(bytes.replace(HERE, inner).as_bytes());
    thief.hostile_offer(kind, name, &offered, "").await
}

async fn actions(thief: &mut Thief) -> Result<()> {
    let outside = thief.place.cluster.root().join("outside");
    let outside = outside.display();
    let cases: Vec<(&str, (&str, Value))> = vec![
        (
            "a restore",
            ("postgres.restore", json!({"database": "sales"})),
        ),
        (
            "a backup",
            ("postgres.backup", json!({"database": "sales"})),
        ),
        ("a fence", ("postgres.fence", json!({"database": "sales"}))),
        (
            "an activation",
            ("release.activate", json!({"app": "shop", "release": "v1"})),
        ),
        (
            "SQL",
            (
                "check.sql",
                json!({"database": "sales", "sql": "select 1", "expect": [[1]]}),
            ),
        ),
        (
            "a command to look",
            (
                "check.command",
                json!({"argv": ["/usr/bin/touch", format!("{outside}/x")]}),
            ),
        ),
        (
            "a log of others",
            ("check.log", json!({"path": "/etc/shadow", "deny": ["x"]})),
        ),
        (
            "what an environment file has",
            (
                "env.diff",
                json!({"path": format!("{outside}/there"), "set": {"A": "1"}}),
            ),
        ),
        (
            "another URL",
            (
                "check.http",
                json!({"url": "http://169.254.169.254/latest/"}),
            ),
        ),
        (
            "a URL with a user",
            (
                "check.http",
                json!({"url": "http://localhost:8000@evil.test/health"}),
            ),
        ),
        (
            "a URL that climbs",
            (
                "check.http",
                json!({"url": "http://localhost:8000/health/../admin"}),
            ),
        ),
        (
            "a URL that climbs in disguise",
            (
                "check.http",
                json!({"url": "http://localhost:8000/health/%2e%2e/admin"}),
            ),
        ),
        (
            "a URL of another scheme",
            ("check.http", json!({"url": "file:///etc/passwd"})),
        ),
    ];
    let mut played = 0;
    for (name, (action, args)) in cases {
        let known = lockstep_proto::action::Action::deserialize_args(action, args.clone());
        if known.is_some_and(|read| read.is_ok()) {
            refused(thief, "action", name, (action, args), "").await?;
            played += 1;
        }
    }
    ensure!(
        played >= 10,
        "only {played} actions are as they were written"
    );
    Ok(())
}

async fn paths(thief: &mut Thief) -> Result<()> {
    let place = thief.place.path("");
    let place = place.display().to_string();
    let place = place.trim_end_matches('/');
    let outside = thief.place.cluster.root().join("outside");
    let outside = outside.display();
    let root = thief.place.cluster.host("app-1").root.display().to_string();
    let cases = [
        ("elsewhere", format!("{outside}/x.env")),
        ("up", format!("{place}/allowed/../x.env")),
        ("up twice", format!("{place}/allowed/../../x.env")),
        (
            "up and down",
            format!("{place}/allowed/sub/../../closed/x.env"),
        ),
        ("up within", format!("{place}/allowed/sub/../x.env")),
        ("up with a dot", format!("{place}/allowed/./../x.env")),
        ("up at the end", format!("{place}/allowed/x.env/..")),
        ("up from the root", format!("/../../..{outside}/x.env")),
        (
            "two slashes",
            format!("//{}/x.env", outside.to_string().trim_matches('/')),
        ),
        ("through a link", format!("{place}/allowed/away/x.env")),
        (
            "through a link and a dot",
            format!("{place}/allowed/./away/x.env"),
        ),
        ("a link", format!("{place}/allowed/there.env")),
        (
            "through a link, up",
            format!("{place}/allowed/away/../x.env"),
        ),
        ("a NUL", format!("{place}/allowed/x.env\0.env")),
        (
            "a NUL in the middle",
            format!("{outside}/x\0{place}/allowed/x.env"),
        ),
        ("a slash at the end", format!("{place}/allowed/x.env/")),
        ("the directory", format!("{place}/allowed/")),
        ("another end", format!("{place}/allowed/x.env.sh")),
        ("capitals", format!("{place}/ALLOWED/x.env")),
        ("a neighbour", format!("{place}/allowed2/x.env")),
        ("relative", "allowed/x.env".to_owned()),
        ("relative, up", "../outside/x.env".to_owned()),
        ("home", "~/x.env".to_owned()),
        ("empty", String::new()),
        ("the root", "/".to_owned()),
        ("a dot", ".".to_owned()),
        ("a pattern", format!("{place}/*/x.env")),
        ("the policy", format!("{root}/policy.toml")),
        ("the configuration", format!("{root}/agent.toml")),
        ("the journal", format!("{root}/state/journal")),
        ("the ledger", format!("{place}/effects")),
        ("keys", format!("{root}/.ssh/authorized_keys")),
        ("the kernel", "/proc/sys/kernel/core_pattern".to_owned()),
        (
            "a variable that is not there",
            format!("{place}/allowed/${{host.nope}}.env"),
        ),
        (
            "a variable without an end",
            format!("{place}/allowed/${{host.x.env"),
        ),
        ("a variable of a shell", format!("{outside}/$HOME/x.env")),
        ("what is denied", format!("{place}/allowed/secret.env")),
        (
            "what is denied, by two slashes",
            format!("{place}/allowed//secret.env"),
        ),
        (
            "what is denied, by a dot",
            format!("{place}/allowed/./secret.env"),
        ),
        (
            "what is denied, by its other name",
            format!("{place}/allowed/alias.env"),
        ),
        (
            "a great length",
            format!("{outside}/{}.env", "x".repeat(60_000)),
        ),
    ];
    for (name, path) in cases {
        let args = json!({"path": HERE, "set": {"A": "1"}});
        refused(thief, "path", name, ("env.render", args), &path).await?;
    }
    let file = format!("{place}/allowed/x.env");
    for (name, argument, value) in [
        ("open to all", "mode", "0666"),
        ("as its owner", "mode", "4755"),
        ("no number", "mode", "rwx"),
        ("negative", "mode", "-1"),
        ("root", "owner", "root"),
        ("an option", "owner", "--reference=/etc/shadow"),
        ("a number", "owner", "0"),
    ] {
        let mut args = json!({"path": file, "set": {"A": "1"}});
        args[argument] = json!(HERE);
        refused(thief, argument, name, ("env.render", args), value).await?;
    }
    let args = json!({"path": HERE, "deny": ["x"]});
    let log = format!("{place}/allowed/away/there.log");
    refused(
        thief,
        "path",
        "a log, through a link",
        ("check.log", args),
        &log,
    )
    .await
}

async fn commands(thief: &mut Thief) -> Result<()> {
    let at = |name: &str| thief.place.path(name).display().to_string();
    let (note, ledger) = (at("note"), at("effects"));
    let python = "/usr/bin/python3";
    let outside = thief
        .place
        .cluster
        .root()
        .join("outside")
        .display()
        .to_string();
    let mark = format!("{outside}/mark");
    let touch = format!("open('{mark}', 'w')");
    let huge = "x".repeat(60_000);
    let many: Vec<&str> = std::iter::repeat_n("x", 5000).collect();
    let cases: Vec<(&str, Vec<&str>)> = vec![
        ("nothing", vec![]),
        ("an empty word", vec![""]),
        ("another program", vec!["/usr/bin/touch", &mark]),
        ("a shell", vec!["/bin/sh", "-c", "touch /tmp/x"]),
        ("by its bare name", vec!["python3", &note, &ledger, "x"]),
        (
            "by another path",
            vec!["/usr/bin/../bin/python3", &note, &ledger, "x"],
        ),
        (
            "by two slashes",
            vec!["//usr/bin/python3", &note, &ledger, "x"],
        ),
        ("an option first", vec![python, "-c", &touch, "x"]),
        (
            "an option before the script",
            vec![python, "-i", &note, &ledger],
        ),
        ("another script", vec![python, "/dev/stdin", &ledger, "x"]),
        ("another ledger", vec![python, &note, &mark, "x"]),
        ("a word more", vec![python, &note, &ledger, "x", "y"]),
        ("a word less", vec![python, &note, &ledger]),
        ("a word that climbs", vec![python, &note, &ledger, "../x"]),
        (
            "a word that climbs after =",
            vec![python, &note, &ledger, "--to=../x"],
        ),
        ("words in one", vec!["/usr/bin/python3 -c x"]),
        (
            "env before it",
            vec!["/usr/bin/env", python, &note, &ledger, "x"],
        ),
        ("sudo before it", vec!["sudo", python, &note, &ledger, "x"]),
        ("a secret", vec![python, &note, &ledger, "secret://admin"]),
        (
            "a NUL in the program",
            vec!["/usr/bin/python3\0x", &note, &ledger, "x"],
        ),
        (
            "a line's end in the program",
            vec!["/usr/bin/python3\n", &note, &ledger, "x"],
        ),
        ("a huge program", vec![&huge]),
        ("a great many words", many),
    ];
    for (name, argv) in cases {
        let args = json!({"name": "note", "argv": argv});
        refused(thief, "command", name, ("exec.run", args), "").await?;
    }
    let argv = json!([python, note, ledger, "x"]);
    for (name, more) in [
        ("a directory", json!({"dir": outside})),
        ("a directory that climbs", json!({"dir": "/srv/../etc"})),
        (
            "a library before all",
            json!({"env": {"LD_PRELOAD": format!("{outside}/x.so")}}),
        ),
        (
            "a module before all",
            json!({"env": {"PYTHONSTARTUP": mark}}),
        ),
        ("a search path", json!({"env": {"PATH": outside}})),
        (
            "a secret in the environment",
            json!({"env": {"A": "secret://admin"}}),
        ),
    ] {
        let mut args = json!({"name": "note", "argv": argv});
        for (argument, value) in more.as_object().expect("it is an object") {
            args[argument] = value.clone();
        }
        refused(thief, "command", name, ("exec.run", args), "").await?;
    }
    Ok(())
}

async fn units(thief: &mut Thief) -> Result<()> {
    let names = [
        ("not listed", "sshd"),
        ("not listed, with its type", "sshd.service"),
        ("denied", "employee-db"),
        ("denied, with its type", "employee-db.service"),
        ("denied, by a path", "employee-../employee-db"),
        ("another instance", "worker@2"),
        ("another instance, with its type", "worker@2.service"),
        ("the template", "worker@"),
        ("an instance in an instance", "worker@1@2"),
        ("an instance that climbs", "worker@../../x"),
        ("an instance with an escape", "worker@\\x2e\\x2e"),
        ("a specifier", "worker@%i"),
        ("up", "../../etc/systemd/system/sshd"),
        ("a path", "/etc/systemd/system/sshd.service"),
        ("a mount", "-.mount"),
        ("a target", "reboot.target"),
        ("an option", "--now"),
        ("an option and a name", "-H evil employee-web"),
        ("two names", "sshd employee-web"),
        ("a line's end", "sshd\nemployee-web"),
        ("a NUL", "sshd\0employee-web"),
        ("empty", ""),
        ("a dot", "."),
        ("a pattern", "*"),
        ("capitals", "EMPLOYEE-WEB"),
        ("letters that look alike", "еmployee-web"),
        ("from right to left", "\u{202e}employee-web"),
        ("a great length", &"x".repeat(5000)),
    ];
    for (name, unit) in names {
        for action in ["service.stop", "service.start"] {
            let name = format!("{name}, {action}");
            let args = json!({"service": HERE});
            refused(thief, "unit", &name, (action, args), unit).await?;
        }
    }
    Ok(())
}

/// Words that mean much to a shell are words here: where a policy lets any word through, the
/// program gets them as they are.
async fn literally(thief: &mut Thief) -> Result<()> {
    let words = [
        "; touch /tmp/x",
        "$(id)",
        "`id`",
        "a && b | c > d",
        "*",
        "-rf",
        "%i",
        "~",
    ];
    for word in words {
        let plan = thief.plan(&[thief.note(word)]);
        let rollout = thief.hold(&plan).await?;
        let key = Thief::at(&rollout, (0, 0), 1);
        thief.licensed_note(&plan, &key, vec![], word).await?;
        thief.release(&rollout).await?;
    }
    Ok(())
}
