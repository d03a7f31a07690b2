//! Every action that runs on hosts, with the world that it finds.

use serde_json::{Value, json};

use super::lab::Lab;

/// What the kind's database holds before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Base {
    /// There is none.
    None,
    /// The schema of v0.9.5, with rows.
    First,
    /// The schema of v1.0.0, with rows.
    Second,
}

/// An action with its world.
pub(super) struct Kind {
    /// Its name; after a `:` the variant.
    pub(super) name: &'static str,
    pub(super) base: Base,
    /// Whether the service runs before.
    pub(super) service: bool,
    /// Whether the releases with alembic are there.
    pub(super) releases: bool,
    /// Steps that are done before, once.
    pub(super) setup: &'static [Setup],
    pub(super) args: fn(&Lab) -> Value,
    /// What an attempt after one that was killed may count once more: work that left nothing
    /// behind, or looks.
    pub(super) again: &'static [&'static str],
    /// Whether an attempt that was killed may be unknown: nothing can prove what it did.
    pub(super) may_be_unknown: bool,
}

impl Kind {
    /// Whether a run takes seconds.
    pub(super) fn takes_long(&self) -> bool {
        self.base != Base::None || self.action().starts_with("service.")
    }

    /// The action's name.
    pub(super) fn action(&self) -> &'static str {
        self.name.split(':').next().expect("a name")
    }
}

/// A step before the one that is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Setup {
    Fence,
    Backup,
    Verify,
    Fetch,
}

impl Setup {
    pub(super) fn step(self, lab: &Lab) -> (&'static str, Value) {
        match self {
            Self::Fence => ("postgres.fence", fence()),
            Self::Backup => ("postgres.backup", json!({"database": "staff"})),
            Self::Verify => ("postgres.verify_backup", json!({"database": "staff"})),
            Self::Fetch => ("release.fetch", fetch(lab)),
        }
    }
}

fn fence() -> Value {
    json!({"database": "staff", "roles": ["employee_app"]})
}

fn fetch(lab: &Lab) -> Value {
    let git = json!({"url": lab.at("../git"), "tag": "v1.0.0"});
    json!({"app": "shop", "release": "v1.0.0", "git": git})
}

fn service(lab: &Lab, what: &str) -> Value {
    let port = lab.port;
    let mut args = json!({"service": "web", "driver": "process", "within": "20s"});
    args[what] = json!([format!("127.0.0.1:{port}")]);
    args
}

/// A command that adds a line to a file.
fn note(lab: &Lab, line: &str) -> Value {
    let script = format!("open(__import__('sys').argv[1], 'a').write('{line}\\n')");
    json!([
        "/usr/bin/python3",
        "-S",
        "-E",
        "-c",
        script,
        lab.at("ledger.commands")
    ])
}

fn migration(release: &str, more: &Value) -> Value {
    let mut args =
        json!({"database": "staff", "app": "shop", "release": release, "dir": "backend"});
    let fields = args.as_object_mut().expect("an object");
    fields.extend(more.as_object().expect("an object").clone());
    args
}

/// The migration of a tool's files, which [`super::base`] makes.
fn of_files(tool: &str, dir: &str) -> Value {
    let dir = format!("files/{dir}");
    let more = json!({"tool": tool, "dir": dir, "apply": "sql", "backup": "none"});
    migration("v1.0.0", &more)
}

const PLAIN: Kind = Kind {
    name: "",
    base: Base::None,
    service: false,
    releases: false,
    setup: &[],
    args: |_| Value::Null,
    again: &[],
    may_be_unknown: false,
};

const DATA: Kind = Kind {
    base: Base::First,
    ..PLAIN
};

const MIGRATION: Kind = Kind {
    releases: true,
    ..DATA
};

/// All kinds, those that take longest first.
pub(super) const KINDS: &[Kind] = &[
    Kind {
        name: "migration.apply",
        args: |_| migration("v1.0.0", &json!({"backup": "none"})),
        ..MIGRATION
    },
    Kind {
        name: "migration.apply:sql",
        args: |_| of_files("sql", "sql"),
        ..MIGRATION
    },
    // It makes its index outside of a transaction.
    Kind {
        name: "migration.apply:concurrently",
        args: |_| of_files("sql", "concurrently"),
        may_be_unknown: true,
        ..MIGRATION
    },
    Kind {
        name: "migration.apply:sqlx",
        args: |_| of_files("sqlx", "sqlx"),
        ..MIGRATION
    },
    Kind {
        name: "migration.apply:diesel",
        args: |_| of_files("diesel", "diesel"),
        ..MIGRATION
    },
    Kind {
        name: "migration.apply:prisma",
        args: |_| of_files("prisma", "prisma"),
        ..MIGRATION
    },
    Kind {
        name: "migration.downgrade",
        base: Base::Second,
        setup: &[Setup::Backup, Setup::Verify],
        args: |_| migration("v1.0.0", &json!({"to": "0001_base"})),
        ..MIGRATION
    },
    Kind {
        name: "postgres.rehearse",
        setup: &[Setup::Backup],
        args: |_| migration("v1.0.0", &json!({"rows": "same_count"})),
        ..MIGRATION
    },
    Kind {
        name: "postgres.restore",
        setup: &[Setup::Fence, Setup::Backup, Setup::Verify],
        args: |_| json!({"database": "staff"}),
        ..DATA
    },
    Kind {
        name: "service.restart",
        service: true,
        args: |lab| service(lab, "listens"),
        ..PLAIN
    },
    Kind {
        name: "service.stop",
        service: true,
        args: |lab| service(lab, "refuses"),
        ..PLAIN
    },
    Kind {
        name: "service.start",
        args: |lab| service(lab, "listens"),
        ..PLAIN
    },
    Kind {
        name: "postgres.verify_backup",
        setup: &[Setup::Backup],
        args: |_| json!({"database": "staff"}),
        ..DATA
    },
    Kind {
        name: "postgres.backup",
        setup: &[Setup::Fence],
        args: |lab| json!({"database": "staff", "copies": [lab.at("copies")]}),
        ..DATA
    },
    Kind {
        name: "postgres.backup:open",
        args: |_| json!({"database": "staff"}),
        ..DATA
    },
    Kind {
        name: "release.fetch",
        args: fetch,
        ..PLAIN
    },
    Kind {
        name: "release.build",
        setup: &[Setup::Fetch],
        args: |lab| {
            let done = "open('built', 'w').write('built')";
            let built = json!(["/usr/bin/python3", "-S", "-E", "-c", done]);
            let run = json!([{"argv": note(lab, "build")}, {"argv": built}]);
            json!({"app": "shop", "release": "v1.0.0", "run": run})
        },
        // Commands run again in their directory until one run came to its end.
        again: &["commands: build"],
        ..PLAIN
    },
    Kind {
        name: "postgres.fence",
        args: |_| fence(),
        ..DATA
    },
    Kind {
        name: "postgres.unfence",
        setup: &[Setup::Fence],
        args: |_| fence(),
        ..DATA
    },
    Kind {
        name: "migration.plan",
        args: |_| migration("v1.0.0", &json!({})),
        ..MIGRATION
    },
    Kind {
        name: "migration.verify",
        args: |_| migration("v0.9.5", &json!({})),
        ..MIGRATION
    },
    Kind {
        name: "migration.current",
        args: |_| migration("v1.0.0", &json!({})),
        ..MIGRATION
    },
    Kind {
        name: "release.activate",
        setup: &[Setup::Fetch],
        args: |_| json!({"app": "shop", "release": "v1.0.0"}),
        ..PLAIN
    },
    Kind {
        name: "env.render",
        args: |lab| json!({"path": lab.at("world/app/shared/.env"), "set": {"A": "2", "B": "3"}}),
        ..PLAIN
    },
    Kind {
        name: "exec.run",
        args: |lab| json!({"name": "note", "argv": note(lab, "run")}),
        may_be_unknown: true,
        ..PLAIN
    },
    Kind {
        name: "check.http",
        args: |lab| {
            let base = format!("http://127.0.0.1:{}/things", lab.things.port);
            let thing = format!("{base}/${{capture.id}}");
            json!({
                "url": base, "method": "POST", "capture": {"id": "$.id"},
                "then": [{"url": thing}], "cleanup": [{"url": thing, "method": "DELETE"}],
            })
        },
        again: &["requests: "],
        may_be_unknown: true,
        ..PLAIN
    },
    Kind {
        name: "postgres.counts",
        args: |_| json!({"database": "staff", "tables": ["employees"]}),
        ..DATA
    },
    Kind {
        name: "postgres.compare",
        setup: &[Setup::Backup],
        args: |_| json!({"database": "staff", "tables": ["employees"]}),
        ..DATA
    },
    Kind {
        name: "postgres.integrity",
        args: |_| json!({"database": "staff"}),
        ..DATA
    },
    Kind {
        name: "postgres.assert",
        args: |_| {
            let check = json!({"sql": "SELECT count(*) > 5 FROM public.employees", "equals": "t"});
            json!({"database": "staff", "checks": [check]})
        },
        ..DATA
    },
    Kind {
        name: "postgres.restore_point",
        args: |_| json!({"database": "staff", "archived_within": "30s"}),
        ..DATA
    },
    Kind {
        name: "postgres.analyze",
        args: |_| json!({"database": "staff"}),
        ..DATA
    },
    Kind {
        name: "check.sql",
        args: |_| {
            let sql = "SELECT count(*) FROM public.employees";
            json!({"database": "staff", "sql": sql, "at_least": 5})
        },
        ..DATA
    },
    Kind {
        name: "service.status",
        service: true,
        args: |_| json!({"service": "web", "driver": "process"}),
        ..PLAIN
    },
    Kind {
        name: "check.process",
        service: true,
        args: |_| json!({"name": "python3"}),
        ..PLAIN
    },
    Kind {
        name: "check.command",
        args: |lab| json!({"argv": note(lab, "look")}),
        again: &["commands: look"],
        ..PLAIN
    },
    Kind {
        name: "release.previous",
        args: |_| json!({"app": "shop"}),
        ..PLAIN
    },
    Kind {
        name: "env.diff",
        args: |lab| json!({"path": lab.at("world/app/shared/.env"), "set": {"A": "2"}}),
        ..PLAIN
    },
    Kind {
        name: "check.tcp",
        args: |lab| json!({"address": lab.things.port}),
        ..PLAIN
    },
    Kind {
        name: "check.port",
        args: |lab| json!({"port": lab.things.port}),
        ..PLAIN
    },
    Kind {
        name: "check.disk",
        args: |_| json!({"path": "/", "free": "1MiB"}),
        ..PLAIN
    },
    Kind {
        name: "check.tls",
        args: |lab| {
            let address = format!("localhost:{}", lab.controller.address.port());
            json!({"address": address, "valid_for": "1d", "ca_file": lab.at("ca.pem")})
        },
        ..PLAIN
    },
    Kind {
        name: "check.log",
        args: |lab| json!({"path": lab.at("world/app.log"), "deny": ["ERROR"]}),
        ..PLAIN
    },
];

/// Kinds that are only run when they are asked for.
pub(super) const ASKED_FOR: &[Kind] = &[
    // Its program has its effect only after the step process was killed, if nobody ends it.
    Kind {
        name: "exec.run:slow",
        args: |lab| {
            let mut argv = note(lab, "run");
            let script = argv[4].as_str().expect("a script").to_owned();
            argv[4] = json!(format!("__import__('time').sleep(1.5); {script}"));
            json!({"name": "note", "argv": argv})
        },
        may_be_unknown: true,
        ..PLAIN
    },
];

/// The kinds of a sample: one of each class, and what is quick.
pub(super) const SAMPLE: &[&str] = &[
    "env.render",
    "release.activate",
    "service.restart",
    "exec.run",
    "check.command",
];

#[cfg(test)]
mod tests {
    use lockstep_proto::action::{CATALOGUE, Site};

    use super::*;

    /// Actions that need more than a host and its database, and who kills them instead.
    const ELSEWHERE: &[&str] = &[
        // A backup system with a stanza of the server: the tests beside the action have one.
        "postgres.external_backup",
    ];

    #[test]
    fn every_action_of_hosts_is_a_kind() {
        let kinds: Vec<&str> = KINDS.iter().map(Kind::action).collect();
        let hosts = CATALOGUE.iter().filter(|row| row.site == Site::Host);
        let left_out: Vec<&str> = hosts
            .map(|row| row.name)
            .filter(|name| !kinds.contains(name) && !ELSEWHERE.contains(name))
            .collect();
        assert!(left_out.is_empty(), "{left_out:?}");
    }
}
