//! What people sign with their SSH keys, and what hosts make of it: over real processes, with the
//! real `ssh-keygen`.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use lockstep_tests::cluster::{Cluster, REQUESTER};
use lockstep_tests::operator::{Said, attempts, text};
use lockstep_tests::{story, wait};
use serde_json::Value;

const HOSTS: [&str; 2] = ["app-1", "app-2"];

/// A cluster whose hosts take sealed plans and signed approvals only, and people with SSH keys.
struct Place {
    cluster: Cluster,
    keys: tempfile::TempDir,
}

/// Makes somebody's key.
fn make_key(keys: &Path, name: &str) -> String {
    let path = keys.join(name);
    let made = Command::new("ssh-keygen")
        .args(["-q", "-t", "ed25519", "-N", "", "-C", name, "-f"])
        .arg(&path)
        .status()
        .unwrap();
    assert!(made.success());
    let line = fs::read_to_string(path.with_extension("pub")).unwrap();
    line.trim().to_owned()
}

impl Place {
    fn new() -> Self {
        let keys = tempfile::tempdir().unwrap();
        let signers = ["ann", "ben", "cat"].map(|name| make_key(keys.path(), name));
        let approver = |name: &str, group: &str| {
            let key = make_key(keys.path(), name);
            format!("[[approver]]\nname = \"{name}\"\ngroups = [\"{group}\"]\nkey = \"{key}\"\n")
        };
        let policy = format!(
            "approvals = \"signed\"\n[seal]\nfleet = \"prod\"\nthreshold = 2\nkeys = {signers:?}\n\
             {}{}[[allow]]\naction = \"exec.run\"\n",
            approver("bob", "dba"),
            approver("carol", "qa_lead"),
        );
        let mut builder = Cluster::builder()
            .without_database()
            .hosts(&HOSTS.map(|name| (name, "app")));
        for name in HOSTS {
            builder = builder.policy(name, Some(&policy));
        }
        fs::write(keys.path().join("signers"), signers.join("\n")).unwrap();
        Self {
            cluster: builder.start().unwrap(),
            keys,
        }
    }

    fn key(&self, name: &str) -> PathBuf {
        self.keys.path().join(name)
    }

    fn run(&self, who: &str, arguments: &[&str]) -> Said {
        self.cluster.operator(who).run(arguments).unwrap()
    }

    fn run_well(&self, who: &str, arguments: &[&str]) -> Said {
        let said = self.run(who, arguments);
        assert_eq!(said.code, 0, "{arguments:?}: {}", said.text());
        said
    }

    /// Compiles a plan that notes `line` on each host, after a gate if one is wanted.
    fn compile(&self, line: &str, fleet: &str, gated: bool) -> PathBuf {
        let script = "import sys; open(sys.argv[1], 'a').write(sys.argv[2] + '\\\\n')";
        let gate = "  - name: approve\n    steps:\n      - gate.approval: {from: {dba: 1, qa_lead: 1}, \
                    timeout: 5m}\n";
        let plan = format!(
            "version: 1\nplan: note\nfleet:\n  app: {{labels: {{role: app}}}}\nphases:\n{}  - name: \
             note\n    on: app\n    steps:\n      - exec.run: {{name: note, argv: [python3, -c, \
             \"{script}\", \"${{host.effects_file}}\", {line}]}}\n",
            if gated { gate } else { "" },
        );
        let root = self.cluster.root();
        let (file, out) = (
            root.join(format!("{line}.yaml")),
            root.join(format!("{line}.json")),
        );
        fs::write(&file, plan).unwrap();
        let arguments = [
            "compile",
            file.to_str().unwrap(),
            "--fleet",
            fleet,
            "-o",
            out.to_str().unwrap(),
        ];
        self.run_well(REQUESTER, &arguments);
        out
    }

    fn sign(&self, plan: &Path, names: &[&str]) {
        for name in names {
            let key = self.key(name);
            let arguments = [
                "sign",
                plan.to_str().unwrap(),
                "--key",
                key.to_str().unwrap(),
            ];
            self.run_well(REQUESTER, &arguments);
        }
    }

    fn submit(&self, plan: &Path) -> String {
        self.cluster.requester().submit(plan, &[]).unwrap()
    }

    fn apply(&self, plan: &Path) -> Value {
        let rollout = self.submit(plan);
        let ended = self.cluster.requester().wait(&rollout, wait::ROLLOUT);
        ended.unwrap_or_else(|error| panic!("{error:#}\n{}", self.cluster.last_words()))
    }

    #[track_caller]
    fn refused(&self, plan: &Path, words: &str) {
        let document = self.apply(plan);
        let whole = document.to_string();
        assert_ne!(text(&document["state"]), "succeeded", "{words}");
        assert!(whole.contains(words), "{words}: {whole}");
    }

    /// What the hosts have noted.
    #[track_caller]
    fn noted(&self, lines: &[&str]) {
        for host in HOSTS {
            let effects = self.cluster.host(host).effects();
            let effects = fs::read_to_string(effects).unwrap_or_default();
            assert_eq!(effects.lines().collect::<Vec<_>>(), lines, "{host}");
        }
    }
}

#[test]
fn only_what_enough_people_have_signed_runs() {
    let place = Place::new();
    let one = place.compile("one", "prod", false);
    let two = place.compile("two", "prod", false);
    let (one_sig, two_sig) = (
        one.with_extension("json.sig"),
        two.with_extension("json.sig"),
    );

    place.refused(&two, "0 of 2 signatures");
    // A refused plan has used up its serial at the controller: compile it again.
    let two = place.compile("two", "prod", false);
    fs::remove_file(&two_sig).unwrap_or_default();
    place.sign(&two, &["ann"]);
    place.refused(&two, "1 of 2 signatures (by ann)");

    let two = place.compile("two", "prod", false);
    fs::remove_file(&two_sig).unwrap();
    place.sign(&two, &["ann"]);
    let again = ["sign", two.to_str().unwrap(), "--key"];
    let key = place.key("ann");
    let said = place.run(REQUESTER, &[&again[..], &[key.to_str().unwrap()]].concat());
    assert_eq!(said.code, 2, "{}", said.text());
    let once = fs::read_to_string(&two_sig).unwrap();
    fs::write(&two_sig, once.repeat(2)).unwrap();
    place.refused(&two, "another one by ann");

    let elsewhere = place.compile("elsewhere", "test", false);
    place.sign(&elsewhere, &["ann", "ben"]);
    place.refused(&elsewhere, "of the fleet `test`");

    // One bit of a plan is another plan, or none.
    let two = place.compile("two", "prod", false);
    fs::remove_file(&two_sig).unwrap();
    place.sign(&two, &["ann", "cat"]);
    let whole = fs::read_to_string(&two).unwrap();
    fs::write(&two, whole.replacen("two", "twp", 1)).unwrap();
    place.refused(&two, "does not match what was signed");
    place.noted(&[]);

    // Two of three.
    let two = place.compile("two", "prod", false);
    fs::remove_file(&two_sig).unwrap();
    place.sign(&one, &["ann", "ben"]);
    place.sign(&two, &["ann", "cat"]);
    let signers = place.key("signers");
    let verify = [
        "verify",
        two.to_str().unwrap(),
        "--threshold",
        "2",
        "--keys",
    ];
    let said = place.run_well(
        REQUESTER,
        &[&verify[..], &[signers.to_str().unwrap()]].concat(),
    );
    assert!(
        said.stdout.contains("ann") && said.stdout.contains("cat"),
        "{}",
        said.text()
    );
    let said = place.run_well(REQUESTER, &["plan", two.to_str().unwrap()]);
    assert!(said.stdout.contains("app-1"), "{}", said.text());
    let document = place.apply(&two);
    assert_eq!(
        text(&document["state"]),
        "succeeded",
        "{}",
        place.cluster.explain(&document)
    );
    place.noted(&["two"]);

    // It is older, however many have signed it.
    assert!(one_sig.exists());
    place.refused(&one, "this host takes none of `note` below");
    let said = place.run(REQUESTER, &["apply", two.to_str().unwrap(), "--yes"]);
    assert_eq!(said.code, 8, "{}", said.text());
    place.noted(&["two"]);
}

#[test]
fn what_follows_a_gate_waits_for_signed_approvals() {
    let place = Place::new();
    let approve = |plan: &Path, rollout: &str, name: &str, sign: bool| {
        let key = place.key(name);
        let gate = wait::until("the gate to be open", wait::SOON, || {
            let gates = place.cluster.requester().open_gates(rollout);
            let gates = gates.map_err(|error| format!("{error:#}"))?;
            gates.into_iter().next().ok_or_else(|| "no gate".to_owned())
        });
        let gate = gate.unwrap().at;
        let mut arguments = vec!["approve", rollout, "--gate", &gate, "--yes"];
        if sign {
            arguments.extend(["--sign", key.to_str().unwrap()]);
            // Whatever the controller shows is not signed unseen, nor for another plan.
            let said = place.run(name, &arguments);
            assert_eq!(said.code, 2, "{}", said.text());
            let other = place.compile("other", "prod", true);
            let asked = [&arguments[..], &["--plan", other.to_str().unwrap()]].concat();
            let said = place.run(name, &asked);
            assert_eq!(said.code, 2, "{}", said.text());
            assert!(said.text().contains("your plan is"), "{}", said.text());
            arguments.extend(["--plan", plan.to_str().unwrap()]);
        }
        place.run_well(name, &arguments);
    };
    for (line, bob_signs) in [("told", false), ("signed", true)] {
        let plan = place.compile(line, "prod", true);
        place.sign(&plan, &["ann", "ben"]);
        let rollout = place.submit(&plan);
        approve(&plan, &rollout, "bob", bob_signs);
        approve(&plan, &rollout, "carol", true);
        let document = place
            .cluster
            .requester()
            .wait(&rollout, wait::ROLLOUT)
            .unwrap();
        let whole = document.to_string();
        assert_eq!(
            text(&document["state"]) == "succeeded",
            bob_signs,
            "{whole}"
        );
        assert_eq!(whole.contains("1 of dba missing"), !bob_signs, "{whole}");
    }
    place.noted(&["signed"]);
}

/// Puts a line before a host's policy and tables after it: it is read again for each step.
fn add_to_policy(cluster: &Cluster, host: &str, first: &str, tables: &str) {
    let path = cluster.host(host).root.join("policy.toml");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, format!("{first}\n{text}\n{tables}")).unwrap();
}

#[test]
fn facts_travel_with_the_signature_of_the_host_that_proved_them() {
    let cluster = Cluster::builder().start().unwrap();
    cluster.install().unwrap();
    let mut evidence = String::new();
    for host in cluster.hosts() {
        let output = Command::new(&cluster.binaries().agent)
            .args(["evidence-key", "--config"])
            .arg(host.config())
            .output()
            .unwrap();
        let line = String::from_utf8(output.stdout).unwrap();
        let key = line.trim();
        assert!(key.ends_with(&host.name), "{key}");
        let _ = writeln!(
            evidence,
            "[[evidence]]\nhost = \"{}\"\nkey = \"{key}\"",
            host.name
        );
    }
    for host in cluster.hosts() {
        add_to_policy(&cluster, &host.name, "bindings = \"signed\"", &evidence);
    }
    let document = story::deploy(&cluster, "v1.0.0");
    let ended = text(&document["state"]);
    assert_eq!(ended, "succeeded", "{}", cluster.explain(&document));
    assert!(!attempts(&document, "migration.apply").is_empty());
}

/// A blind step is killed: only a person can say what it did, and where bindings are signed, the
/// host takes that word only with the person's signature.
#[test]
fn a_word_on_an_unknown_outcome_counts_with_its_signature() {
    let keys = tempfile::tempdir().unwrap();
    let key = make_key(keys.path(), "bob");
    let policy = format!(
        "bindings = \"signed\"\n[[approver]]\nname = \"bob\"\ngroups = [\"dba\"]\nkey = \"{key}\"\n\
         [[allow]]\naction = \"exec.run\"\n"
    );
    let cluster = Cluster::builder()
        .without_database()
        .hosts(&[("app-1", "app")])
        .policy("app-1", Some(&policy))
        .start()
        .unwrap();
    let (requester, bob) = (cluster.requester(), cluster.operator("bob"));
    let file = cluster.root().join("blind.yaml");
    let plan = "version: 1\nplan: blind\nfleet:\n  app: {labels: {role: app}}\nphases:\n  \
                - name: one\n    on: app\n    steps:\n";
    fs::write(&file, format!("{plan}{}", story::effect("work", 3))).unwrap();
    for signs in [false, true] {
        fs::write(cluster.host("app-1").effects(), "").unwrap();
        let rollout = requester.submit(&file, &[]).unwrap();
        story::under_way(&requester, &rollout, "exec.run", None);
        let host = cluster.host("app-1");
        wait::until("the step to be at work", wait::SOON, || {
            let effects = fs::read_to_string(host.effects()).unwrap_or_default();
            (!effects.is_empty()).then_some(()).ok_or(effects)
        })
        .unwrap();
        // Else it goes back by itself.
        let said = requester.run(&["pause", &rollout]).unwrap();
        assert_eq!(said.code, 0, "{}", said.text());
        host.kill_step_process().unwrap();
        wait::until("the outcome to be unknown", wait::SOON, || {
            let document = requester.rollout(&rollout);
            let document = document.map_err(|error| format!("{error:#}"))?;
            let outcome = &attempts(&document, "exec.run")[0]["outcome"];
            (outcome == "unknown")
                .then_some(())
                .ok_or_else(|| outcome.to_string())
        })
        .unwrap();
        let path = keys.path().join("bob");
        let mut word = vec!["resolve", &rollout, "app-1", "0.0", "--not-done"];
        word.extend(["--reason", "the file says so"]);
        if signs {
            word.extend(["--sign", path.to_str().unwrap()]);
        }
        let said = bob.run(&word).unwrap();
        assert_eq!(said.code, 0, "{}", said.text());
        let said = requester.run(&["resume", &rollout, "--failed"]).unwrap();
        assert_eq!(said.code, 0, "{}", said.text());
        let ended = cluster.finish(&rollout).unwrap();
        let effects = fs::read_to_string(host.effects()).unwrap();
        if signs {
            assert_eq!(text(&ended["state"]), "succeeded", "{ended}");
            assert_eq!(effects, "work\nwork\n");
        } else {
            assert_ne!(text(&ended["state"]), "succeeded", "{ended}");
            assert_eq!(effects, "work\n", "nothing was done on a bare word");
            assert!(ended.to_string().contains("signature"), "{ended}");
        }
    }
}
