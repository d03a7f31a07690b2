//! Every source of secrets, in every place that a plan or a host's configuration has for one: the
//! value reaches what it is meant for, and is found nowhere else (INV-10).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lockstep_tests::cluster::Cluster;
use lockstep_tests::operator::text;
use lockstep_tests::processes;
use lockstep_tests::story::{failures, files_with, run_plan};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// A source each; `stored` has no table.
const SOURCES: [&str; 6] = [
    "stored",
    "file",
    "credential",
    "variable",
    "command",
    "vault",
];

/// A word that stands nowhere else.
fn canary(source: &str) -> String {
    use std::hash::{BuildHasher as _, Hasher as _};
    let any = || std::hash::RandomState::new().build_hasher().finish();
    format!("canary-{source}-{:016x}{:016x}", any(), any())
}

/// Plays a vault, and the application that requests go to, which gives back what it was sent.
struct Server {
    port: u16,
    /// What the vault has, by the field's name.
    vault: Arc<Mutex<BTreeMap<String, String>>>,
    /// Requests to the application, whole.
    seen: Arc<Mutex<String>>,
}

impl Server {
    fn start(token: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (vault, seen) = (Arc::<Mutex<BTreeMap<_, _>>>::default(), Arc::default());
        let served = (Arc::clone(&vault), Arc::clone(&seen));
        let token = token.to_owned();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                Self::answer(stream, &token, &served.0, &served.1);
            }
        });
        Self { port, vault, seen }
    }

    fn answer(
        mut stream: TcpStream,
        token: &str,
        vault: &Mutex<BTreeMap<String, String>>,
        seen: &Mutex<String>,
    ) {
        stream
            .set_read_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        let mut request = vec![];
        let mut chunk = [0; 4096];
        while let Ok(length @ 1..) = stream.read(&mut chunk) {
            request.extend_from_slice(&chunk[..length]);
            let words = String::from_utf8_lossy(&request).into_owned();
            let Some((head, body)) = words.split_once("\r\n\r\n") else {
                continue;
            };
            let length = head
                .lines()
                .find_map(|line| line.strip_prefix("content-length: "));
            if body.len() >= length.map_or(0, |length| length.parse().unwrap()) {
                break;
            }
        }
        let request = String::from_utf8_lossy(&request).into_owned();
        let (status, body) = if request.starts_with("GET /v1/kv/data/app ") {
            let data = serde_json::to_value(&*vault.lock().unwrap()).unwrap();
            let known = request.contains(&format!("x-vault-token: {token}\r\n"));
            let data = serde_json::json!({"data": {"data": data, "metadata": {"version": 1}}});
            if known {
                (200, data.to_string())
            } else {
                (403, r#"{"errors": []}"#.to_owned())
            }
        } else {
            seen.lock().unwrap().push_str(&request);
            (200, request)
        };
        let length = body.len();
        let _ = write!(
            stream,
            "HTTP/1.1 {status} x\r\ncontent-length: {length}\r\n\r\n{body}"
        );
    }
}

/// The tables of the application's host. `@HOST@` becomes its directory.
fn tables(port: u16) -> String {
    format!(
        "[secrets.file]\nfile = \"secrets/of-file\"\n\
         [secrets.credential]\ncredential = \"of-credential\"\n\
         [secrets.variable]\nenv = \"CANARY\"\n\
         [secrets.command]\ncommand = [\"cat\", \"@HOST@/secrets/of-command\"]\n\
         [secrets.vault]\nvault = {{ path = \"kv/data/app\", field = \"vault\" }}\n\
         [secrets.migrator_password]\nvault = {{ path = \"kv/data/app\", field = \"password\" }}\n\
         [vault]\naddress = \"http://127.0.0.1:{port}\"\ntoken = \"secret://vault_token\"\n\
         [apps.canary]\nroot = \"@HOST@/canary\"\n[apps.canary.env]\n{}",
        slots(
            |source| format!("APP_{} = \"secret://{source}\"\n", source.to_uppercase()),
            ""
        ),
    )
}

fn slots(slot: impl Fn(&str) -> String, between: &str) -> String {
    SOURCES.map(slot).join(between)
}

const DATABASE_HOST: &str =
    "[secrets.superuser_password]\ncommand = [\"cat\", \"@HOST@/secrets/superuser_password\"]\n";

/// All a plan can do with them: each program shows its whole environment.
fn plan(port: u16, show: &str, exit: u8) -> String {
    let map = |prefix: &str| {
        slots(
            |source| format!("{prefix}{}: secret://{source}", source.to_uppercase()),
            ", ",
        )
    };
    format!(
        "version: 1\nplan: canary\ndeadline: 5m\n\
         fleet: {{app: {{labels: {{role: app}}}}, db: {{labels: {{role: db}}}}}}\n\
         phases:\n\
         \x20 - name: use\n    on: [app, db]\n    steps:\n\
         \x20     - postgres.backup: {{database: employee_system, on: db}}\n\
         \x20     - check.sql: {{database: employee_system, sql: select 1, equals: '1', on: app}}\n\
         \x20     - env.render: {{path: '${{host.data}}/canary/env', set: {{{set}}}, on: app}}\n\
         \x20     - check.http:\n          url: 'http://127.0.0.1:{port}/form'\n\
         \x20         method: POST\n          headers: {{{headers}}}\n          form: {{{set}}}\n\
         \x20         on: app\n\
         \x20     - exec.run:\n          name: show\n          argv: [python3, -c, \"{show}\"]\n\
         \x20         dir: '${{host.data}}/canary'\n          env: {{{set}}}\n\
         \x20         exit: {exit}\n          on: app\n\
         \x20 - name: last\n    on: app\n    steps:\n\
         \x20     - check.http:\n          url: 'http://127.0.0.1:{port}/echo'\n\
         \x20         method: POST\n          form: {{{set}}}\n\
         \x20         expect: {{status: 418}}\n",
        set = map("S_"),
        headers = map("X-"),
    )
}

const POLICY: &str = "[[allow]]\naction = 'postgres.*'\n[[allow]]\naction = 'check.sql'\n";

/// What may have them: the hosts' files of secrets, what the agent hands to its steps, and what
/// `env.render` was told to write.
fn belongs(path: &Path) -> bool {
    let parent = path.parent().and_then(Path::file_name).unwrap_or_default();
    let kept = ["secrets", "credentials", "environment"];
    kept.iter().any(|kept| parent == *kept)
        || path.ends_with("canary/env")
        || path.ends_with("postgres/pgpass")
}

/// Looks at every process of the machine until it is told to stop: who has a value in its arguments,
/// and who, of the programs that are not meant to have it, in its environment.
fn sample(
    canaries: &BTreeMap<&str, String>,
    ended: &AtomicBool,
    looks: &AtomicUsize,
) -> BTreeSet<String> {
    let mut leaks = BTreeSet::new();
    while !ended.load(Ordering::Relaxed) {
        for process in processes::all() {
            looks.fetch_add(1, Ordering::Relaxed);
            let environ = String::from_utf8_lossy(&process.environ);
            let is = |words: &[&str]| {
                let argv = process.argv.iter().map(String::as_str);
                argv.zip(words).all(|(word, own)| word.ends_with(own))
            };
            let daemon = is(&["lockstep-agent", "run"]) || is(&["setpriv"]);
            let program = is(&["python3", "-c"]);
            for (source, canary) in canaries {
                if process.argv.iter().any(|word| word.contains(canary)) {
                    leaks.insert(format!("argv of {}", process.line()));
                }
                // The daemon was given one of them that way.
                let meant = program || (daemon && *source == "variable");
                if environ.contains(canary) && !meant {
                    leaks.insert(format!("environment of {}", process.line()));
                }
            }
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    leaks
}

#[test]
fn no_source_and_no_slot_lets_a_secret_out() {
    // Cores are written wherever the kernel may.
    let limit = getrlimit(Resource::Core);
    let all = Rlimit {
        current: limit.maximum,
        ..limit
    };
    setrlimit(Resource::Core, all).unwrap();

    let mut canaries: BTreeMap<&str, String> =
        SOURCES.map(|source| (source, canary(source))).into();
    canaries.insert("token", canary("token"));
    let server = Server::start(&canaries["token"]);
    let listed = |prefix: &str| {
        let slot =
            |source: &str| format!("{prefix}{} = 'secret://{source}'", source.to_uppercase());
        format!("[{{ {} }}, '(default)']", slots(slot, ", "))
    };
    let (set, headers) = (listed("S_"), listed("X-"));
    let policy = format!(
        "{POLICY}[[allow]]\naction = 'exec.run'\n[allow.where]\nenv = {set}\n\
         [[allow]]\naction = 'env.render'\n[allow.where]\nset = {set}\n\
         [[allow]]\naction = 'check.http'\n[allow.where]\nform = {set}\nheaders = {headers}\n"
    );
    let cluster = Cluster::builder()
        .hosts(&[("db-1", "db"), ("app-1", "app")])
        .policy("app-1", Some(&policy))
        .policy("db-1", Some(POLICY))
        .tables("app-1", &tables(server.port))
        .tables("db-1", DATABASE_HOST)
        .agent_env("app-1", "CANARY", &canaries["variable"])
        .agent_env("app-1", "CREDENTIALS_DIRECTORY", "@HOST@/credentials")
        .start()
        .unwrap();
    let host = cluster.host("app-1");
    std::fs::create_dir_all(host.root.join("canary")).unwrap();
    std::fs::create_dir_all(host.root.join("credentials")).unwrap();
    let credential = host.root.join("credentials/of-credential");
    std::fs::write(credential, &canaries["credential"]).unwrap();
    for (name, source) in [
        ("stored", "stored"),
        ("of-file", "file"),
        ("of-command", "command"),
        ("vault_token", "token"),
    ] {
        host.secret(name, &canaries[source]).unwrap();
    }
    let password = cluster.secrets["migrator_password"].clone();
    let in_vault = [
        ("vault", canaries["vault"].clone()),
        ("password", password.clone()),
    ];
    let in_vault = in_vault.map(|(name, value)| (name.to_owned(), value));
    server.vault.lock().unwrap().extend(in_vault);
    canaries.insert("password", password);
    canaries.insert("superuser", cluster.secrets["superuser_password"].clone());

    let show = "import os; [print(k, v, flush=True) for k, v in os.environ.items()]; os.abort()";
    let (ended, looks) = (AtomicBool::new(false), AtomicUsize::new(0));
    let (leaks, document) = std::thread::scope(|scope| {
        let sampler = scope.spawn(|| sample(&canaries, &ended, &looks));
        let ran = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            // The program shows what it was given, and then crashes.
            run_plan(&cluster, &plan(server.port, show, 134))
        }));
        ended.store(true, Ordering::Relaxed);
        (sampler.join().unwrap(), ran)
    });
    let document = document.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    assert_eq!(leaks, BTreeSet::new());
    let looks = looks.into_inner();
    assert!(looks > 1000, "only {looks} looks at processes");

    // The last check gives everything back that it was sent, and is the one that fails.
    let failed = failures(&document);
    assert_eq!(
        text(&document["state"]),
        "rolled_back",
        "{}",
        cluster.explain(&document)
    );
    assert!(
        failed
            .iter()
            .any(|why| why.contains("418") && why.contains("***")),
        "{failed:?}"
    );

    // Each was where it was meant to be.
    let rollout = text(&document["rollout"]);
    let operator = cluster.requester();
    let logs = operator.run(&["logs", rollout]).unwrap();
    let seen = server.seen.lock().unwrap().clone();
    for source in SOURCES {
        let name = source.to_uppercase();
        assert_eq!(
            seen.matches(&canaries[source]).count(),
            3,
            "{source}: a header and two forms"
        );
        for slot in [format!("S_{name} ***"), format!("APP_{name} ***")] {
            assert!(logs.stdout.contains(&slot), "{slot} in {}", logs.text());
        }
    }

    // And nowhere else.
    let mut found = String::new();
    for command in [
        &["report", rollout, "--format", "md"][..],
        &["report", rollout, "--format", "html"],
        &["report", rollout, "--format", "json"],
        &["status", rollout, "--output", "json"],
        &["logs", rollout],
    ] {
        let said = operator.run(command).unwrap();
        assert_eq!(said.code, 0, "{command:?}: {}", said.text());
        for (source, canary) in &canaries {
            if said.text().contains(canary) {
                writeln!(found, "{source} in {command:?}").unwrap();
            }
        }
    }
    for (source, canary) in &canaries {
        for file in files_with(cluster.root(), canary, &belongs) {
            writeln!(found, "{source} in {file}").unwrap();
        }
    }
    assert_eq!(found, "");
    let cores = files_with(&host.root.join("canary"), "\u{7f}ELF", &|_| false);
    assert_eq!(
        cores,
        Vec::<String>::new(),
        "a program that crashes leaves no core"
    );

    // The host's own check has each, and shows none.
    let check = std::process::Command::new(&cluster.binaries().agent)
        .args(["check", "--config"])
        .arg(host.config())
        .env("CREDENTIALS_DIRECTORY", host.root.join("credentials"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&check.stdout).into_owned()
        + &String::from_utf8_lossy(&check.stderr);
    assert!(check.status.success(), "{said}");
    for (source, canary) in &canaries {
        assert!(!said.contains(canary), "`check` shows {source}");
    }
}
