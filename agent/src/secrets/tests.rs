use super::*;
use crate::testing::Host;

fn host(tables: &str) -> Host {
    #[derive(serde::Deserialize)]
    struct Tables {
        #[serde(default)]
        secrets: BTreeMap<String, Source>,
        vault: Option<Vault>,
    }
    let Tables { secrets, vault } = toml::from_str(tables).unwrap();
    let mut host = Host::new();
    (host.config.secrets, host.config.vault) = (secrets, vault);
    host
}

async fn get(host: &Host, name: &str) -> Result<String, Failure> {
    let secret = resolve(&host.config, name).await?;
    assert_eq!(format!("{secret:?}"), "***", "INV-10");
    Ok(secret.expose().to_owned())
}

async fn refused(host: &Host, name: &str) -> String {
    let why = get(host, name).await.unwrap_err();
    let words = format!("{}; {}", why.message, why.hint.unwrap_or_default());
    assert!(!words.contains("canary"), "INV-10: {words}");
    words
}

#[tokio::test]
async fn a_secret_without_a_table_is_a_file_of_its_name() {
    let host = Host::new();
    host.secret("db", "pa55 word\n\n");
    assert_eq!(get(&host, "db").await.unwrap(), "pa55 word");
    let none = refused(&host, "none").await;
    assert!(
        none.contains("no secret `none`") && none.contains("[secrets.none]"),
        "{none}"
    );
    for name in ["", ".x", "../db", "a/b", "a\0b"] {
        assert!(get(&host, name).await.is_err(), "{name:?}");
    }
}

#[tokio::test]
async fn a_file_is_read_unless_everybody_can() {
    use std::os::unix::fs::PermissionsExt as _;
    let mut host = Host::new();
    let file = host.path().join("key");
    host.config.secrets = [("key".to_owned(), Source::File(file.clone()))].into();
    assert!(refused(&host, "key").await.contains("there is no file"));
    std::fs::write(&file, "canary\n").unwrap();
    let mode = |mode| std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode));
    mode(0o644).unwrap();
    assert!(refused(&host, "key").await.contains("chmod 0600"));
    mode(0o640).unwrap();
    assert_eq!(get(&host, "key").await.unwrap(), "canary");
    std::fs::write(&file, "\n").unwrap();
    assert!(refused(&host, "key").await.contains("is empty"));
    std::fs::write(&file, "canary".repeat(12_000)).unwrap();
    assert!(refused(&host, "key").await.contains("64 KiB"));
    std::fs::write(&file, b"canary\xff").unwrap();
    assert!(refused(&host, "key").await.contains("UTF-8"));
}

#[tokio::test]
async fn a_command_gives_what_it_prints_and_nothing_it_says_is_shown() {
    let command = |name: &str, script: &str| {
        format!("[secrets.{name}]\ncommand = ['python3', '-c', \"\"\"{script}\"\"\"]\n")
    };
    let mut tables = command("good", "print('canary')");
    tables += &command(
        "bad",
        "import sys; w = 'can' + 'ary'; print(w); sys.exit(w)",
    );
    tables += &command("much", "w = 'can' + 'ary'; print(w * 99999)");
    tables += &command("none", "pass");
    tables += &command(
        "env",
        "import os; print(len([v for v in os.environ if 'CARGO' in v]))",
    );
    tables += "[secrets.gone]\ncommand = ['/no/such/program']\n";
    let host = host(&tables);
    assert_eq!(get(&host, "good").await.unwrap(), "canary");
    assert_eq!(
        get(&host, "env").await.unwrap(),
        "0",
        "its environment is clean"
    );
    let bad = refused(&host, "bad").await;
    assert!(
        bad.contains("exited with 1") && bad.contains("by hand"),
        "{bad}"
    );
    assert!(refused(&host, "much").await.contains("64 KiB"));
    assert!(refused(&host, "none").await.contains("is empty"));
    assert!(refused(&host, "gone").await.contains("/no/such/program"));
}

#[tokio::test]
async fn a_command_that_hangs_is_ended_with_its_children() {
    let pid = tempfile::NamedTempFile::new().unwrap();
    let script = format!(
        "import os, time; open({:?}, 'w').write(str(os.getpid())); time.sleep(600)",
        pid.path()
    );
    let program = Program {
        argv: ["python3", "-c", &script].map(str::to_owned).into(),
        // Time enough to write its number, on a busy machine too.
        timeout: Some(Duration::from_secs(5)),
        ..Program::default()
    };
    let hung = program.capture(10).await.err().unwrap();
    assert_eq!(hung.cause, Cause::TimedOut);
    let pid = std::fs::read_to_string(pid.path()).unwrap();
    assert!(!Path::new("/proc").join(pid).exists());
}

#[tokio::test]
async fn the_daemons_environment_reaches_steps_as_files() {
    use std::os::unix::fs::PermissionsExt as _;
    // Every process has this one.
    let host = host("[secrets.path]\nenv = 'PATH'\n[secrets.none]\nenv = 'LOCKSTEP_NO_SUCH_1'");
    let directory = host.config.run_dir.join("environment");
    hand_over(&host.config).unwrap();
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(
        (mode(&directory), mode(&directory.join("PATH"))),
        (0o700, 0o600)
    );
    assert_eq!(
        get(&host, "path").await.unwrap(),
        std::env::var("PATH").unwrap()
    );
    // What was handed over counts: a step has another environment.
    std::fs::write(directory.join("PATH"), "canary").unwrap();
    assert_eq!(get(&host, "path").await.unwrap(), "canary");
    let none = refused(&host, "none").await;
    assert!(
        none.contains("`LOCKSTEP_NO_SUCH_1`") && none.contains("EnvironmentFile="),
        "{none}"
    );
    // The next start has other names.
    std::fs::write(directory.join("OLD"), "canary").unwrap();
    hand_over(&host.config).unwrap();
    assert!(!directory.join("OLD").exists());
    let mut nothing = host.config.clone();
    nothing.secrets.clear();
    hand_over(&nothing).unwrap();
    assert!(!directory.exists());
}

#[test]
fn a_secret_comes_from_exactly_one_place() {
    let read = |text: &str| toml::from_str::<Source>(text).map_err(|error| error.to_string());
    assert!(read("").unwrap_err().contains("has one of"));
    assert!(
        read("env = 'A'\nfile = '/x'")
            .unwrap_err()
            .contains("one place")
    );
    for bad in [
        "env = 'A=B'",
        "env = ''",
        "command = []",
        "command = ['']",
        "credential = '../x'",
        "file = ''",
        "fil = '/x'",
        "vault = {path = 'kv/data/app'}",
        "vault = {path = '/kv/data/app', field = 'x'}",
        "vault = {path = 'kv/../sys/raw', field = 'x'}",
        "vault = {path = 'kv/a?version=1', field = 'x'}",
        "vault = {path = 'kv/data/app', field = ''}",
    ] {
        assert!(read(bad).is_err(), "{bad}");
    }
    assert!(read("vault = {path = 'kv/data/app', field = 'x'}").is_ok());
}

#[test]
fn a_vault_is_reached_over_tls_with_a_token_from_elsewhere() {
    let check = |vault: &str| {
        let host = host(&format!(
            "[secrets.a]\nfile = '/x'\n[secrets.v]\nvault = {{ path = 'kv/a', field = 'f' }}\n\
             [vault]\n{vault}"
        ));
        host.config
            .vault
            .as_ref()
            .unwrap()
            .check(&host.config.secrets)
    };
    for good in [
        "https://vault.test:8200",
        "https://vault.test/",
        "http://127.0.0.1:8200",
        "http://[::1]:1",
    ] {
        assert_eq!(
            check(&format!("address = '{good}'\ntoken = 'secret://a'")),
            Ok(()),
            "{good}"
        );
    }
    for bad in [
        "vault.test:8200",
        "http://vault.test:8200",
        "https://a@b",
        "https://x/v1",
        "ftp://x",
    ] {
        assert!(
            check(&format!("address = '{bad}'\ntoken = 'secret://a'")).is_err(),
            "{bad}"
        );
    }
    for token in ["hvs.canary", "secret://v", "secret://"] {
        let why = check(&format!("address = 'https://x'\ntoken = '{token}'")).unwrap_err();
        assert!(!why.contains("canary"), "INV-10: {why}");
    }
}

#[tokio::test]
async fn the_examples_of_the_guide_are_valid() {
    let guide = include_str!("../../../docs/secrets.md");
    let mut examples = guide.split("```toml\n").skip(1);
    let mut seen = 0;
    while let Some((example, _)) = examples.next().and_then(|rest| rest.split_once("```")) {
        let head = "host = 'h'\ncontroller = 'c:1'\n";
        let tls = "\n[tls]\ncontroller_ca = 'a'\ncert = 'b'\nkey = 'c'\n";
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("agent.toml");
        std::fs::write(&file, format!("{head}{example}{tls}")).unwrap();
        let loaded = Config::load(&file);
        assert!(loaded.is_ok(), "{example}\n{loaded:?}");
        seen += 1;
    }
    assert!(seen >= 3, "{seen} examples");
}
