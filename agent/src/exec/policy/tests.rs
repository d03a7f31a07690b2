use super::*;
use serde_json::json;

mod copies;

fn action(name: &str, args: Value) -> Action {
    Action::deserialize_args(name, args).unwrap().unwrap()
}

fn policy(text: &str) -> Policy {
    Policy::parse(Path::new("/etc/lockstep/policy.toml"), text).unwrap()
}

#[test]
fn what_reaches_further_than_its_name_is_listed_or_refused() {
    let apply = |more: Value| {
        let mut args = json!({"database": "shop", "app": "shop", "release": "v1", "dir": "db"});
        let fields = args.as_object_mut().unwrap();
        fields.extend(more.as_object().unwrap().clone());
        action("migration.apply", args)
    };
    let plain = policy("[[allow]]\naction = 'migration.*'\nwhere = { database = ['shop'] }");
    plain.check(&apply(json!({"undo_by": "keep"}))).unwrap();
    for (argument, value) in [
        ("undo_by", "restore"),
        ("undo_by", "recover"),
        ("on_long_tx", "end"),
    ] {
        let reaching = apply(json!({argument: value}));
        let refusal = plain.check(&reaching).unwrap_err();
        assert!(refusal.contains("must be listed"), "{refusal}");
        let listed = format!(
            "[[allow]]\naction = 'migration.apply'\nwhere = {{ {argument} = ['{value}'] }}"
        );
        policy(&listed).check(&reaching).unwrap();
    }
}

#[test]
fn without_a_policy_only_probes_that_run_nothing_are_allowed() {
    let dir = tempfile::tempdir().unwrap();
    let none = Policy::load(&dir.path().join("policy.toml")).unwrap();
    assert!(!none.exists());
    let allowed = action("check.disk", json!({"path": "/", "free": "1GiB"}));
    assert_eq!(none.check(&allowed), Ok(()));
    for (name, args) in [
        ("check.command", json!({"argv": ["true"]})),
        ("check.sql", json!({"database": "d", "sql": "select 1"})),
        ("check.log", json!({"path": "/etc/shadow"})),
        ("service.stop", json!({"service": "web"})),
        ("exec.run", json!({"name": "x", "argv": ["true"]})),
        ("check.http", json!({"url": "http://localhost"})),
    ] {
        let refusal = none.check(&action(name, args)).unwrap_err();
        assert!(
            refusal.contains(name) && refusal.contains("[[allow]]"),
            "{refusal}"
        );
    }
}

#[test]
fn a_rule_allows_only_the_values_it_lists() {
    let policy =
        policy("[[allow]]\naction = 'service.*'\nwhere = { service = ['employee-*', 'web'] }");
    let stop = |service: &str| action("service.stop", json!({"service": service}));
    assert_eq!(policy.check(&stop("employee-backend")), Ok(()));
    assert_eq!(policy.check(&stop("web")), Ok(()));
    let refusal = policy.check(&stop("sshd")).unwrap_err();
    assert!(
        refusal.contains("`service`") && refusal.contains("\"sshd\""),
        "{refusal}"
    );
    let other = action("release.previous", json!({"app": "x"}));
    assert_eq!(policy.check(&other), Ok(()), "it only looks");
}

#[test]
fn a_pattern_that_ends_within_the_suffix_of_a_unit_denies_it_too() {
    let allow = "[[allow]]\naction = 'service.*'\n";
    for pattern in ["web.*", "web.serv*", "*.service", "web", "web.service"] {
        let text = format!(
            "{allow}[[deny]]\naction = 'service.stop'\nwhere = {{ service = ['{pattern}'] }}"
        );
        let policy = policy(&text);
        for service in ["web", "web.service"] {
            let stop = action("service.stop", json!({"service": service}));
            assert!(policy.check(&stop).is_err(), "{pattern} {service}");
        }
        let other = action("service.stop", json!({"service": "db"}));
        assert_eq!(
            policy.check(&other).is_ok(),
            pattern != "*.service",
            "{pattern}"
        );
    }
}

#[test]
fn an_argument_that_the_plan_leaves_out_is_its_default() {
    let policy =
        policy("[[allow]]\naction = 'service.stop'\nwhere = { driver = ['(default)', 'process'] }");
    let stop = |driver: Value| {
        let mut args = json!({"service": "web"});
        if !driver.is_null() {
            args["driver"] = driver;
        }
        policy.check(&action("service.stop", args))
    };
    assert_eq!(stop(Value::Null), Ok(()));
    assert_eq!(stop(json!("process")), Ok(()));
    assert!(stop(json!("command")).is_err());
}

#[test]
fn deny_wins() {
    let policy = policy("[[allow]]\naction = '*'\n[[deny]]\naction = 'exec.*'");
    let run = action("exec.run", json!({"name": "x", "argv": ["true"]}));
    assert!(policy.check(&run).unwrap_err().contains("denies"));
    let stop = action("service.stop", json!({"service": "web"}));
    assert_eq!(policy.check(&stop), Ok(()));
}

#[test]
fn commands_are_listed_word_by_word() {
    let policy = policy(
        "[[allow]]\naction = 'exec.run'\n[allow.where]\n\
         argv = [['/usr/bin/python3', 'scripts/*.py'], ['npm', 'run', '**']]",
    );
    let run = |argv: &[&str]| policy.check(&action("exec.run", json!({"name": "x", "argv": argv})));
    assert_eq!(run(&["/usr/bin/python3", "scripts/smoke.py"]), Ok(()));
    assert_eq!(run(&["npm", "run", "build", "--", "x"]), Ok(()));
    for bad in [
        &["/usr/bin/python3"][..],
        &["/usr/bin/python3", "scripts/smoke.py", "-c"],
        &["/usr/bin/python3", "scripts/../../tmp/x.py"],
        &["npm"],
        &["npm", "install"],
        &["scripts/x.py"],
    ] {
        assert!(run(bad).is_err(), "{bad:?}");
    }
    let flat = "[[allow]]\naction = 'exec.run'\nwhere = { argv = ['true', '*'] }";
    assert!(Policy::parse(Path::new("p"), flat).is_err());
}

#[test]
fn every_build_command_must_be_listed() {
    let policy = policy(
        "[[allow]]\naction = 'release.build'\n[allow.where]\napp = ['web']\n\
         run = [['make', '**'], { argv = ['npm', 'ci'], in = 'frontend' }]",
    );
    let build = |run: Value| {
        let args = json!({"app": "web", "release": "v1", "run": run});
        policy.check(&action("release.build", args))
    };
    let make = json!({"argv": ["make", "all"], "in": "backend"});
    let npm = json!({"argv": ["npm", "ci"], "in": "frontend"});
    assert_eq!(build(json!([make, npm])), Ok(()));
    assert!(build(json!([make, {"argv": ["npm", "ci"]}])).is_err());
    assert!(build(json!([make, {"argv": ["curl", "x"]}])).is_err());
}

#[test]
fn a_rule_for_no_action_is_an_error() {
    for bad in [
        "[[allow]]\naction = 'servce.stop'",
        "[[alow]]\naction = '*'",
        "allow = 1",
    ] {
        assert!(Policy::parse(Path::new("p"), bad).is_err(), "{bad}");
    }
}

#[test]
fn a_word_that_no_action_knows_is_an_error_with_its_line() {
    for (text, words) in [
        (
            "[[allow]]\naction = 'exec.run'\n\n[[deny]]\naction = 'exec.run'\n\
             where = { agrv = [['/x', '**']] }",
            ["line 6", "`agrv`", "did you mean `argv`?"],
        ),
        (
            "[[allow]]\naction = 'service.*'\nwhere = { servcie = ['web'] }",
            ["line 3", "`servcie`", "did you mean `service`?"],
        ),
        (
            "# it starts here\n[[allow]]\naction = 'servce.stop'",
            ["line 3", "`servce.stop`", "did you mean `service.stop`?"],
        ),
        (
            "[[deny]]\naction = 'check.disk'\nwhere = { url = ['http://x/*'] }",
            ["line 3", "`url`", "there are free, path"],
        ),
    ] {
        let error = Policy::parse(Path::new("p"), text).unwrap_err().to_string();
        for word in words {
            assert!(error.contains(word), "`{word}`: {error}");
        }
    }
    // One that some of the actions have.
    policy("[[deny]]\naction = '*'\nwhere = { database = ['shop'] }");
}

#[test]
fn the_overview_shows_what_is_denied_with_what() {
    let policy = policy(
        "[[allow]]\naction = 'exec.run'\n\
         [[deny]]\naction = 'exec.run'\nwhere = { argv = [['/bin/rm', '**']] }\n\
         [[deny]]\naction = 'check.disk'\nwhere = { path = ['/root'] }",
    );
    let overview = policy.overview();
    let says = |name: &str| &overview.iter().find(|row| row.0 == name).unwrap().1;
    assert_eq!(
        says("exec.run"),
        "allowed; denied with argv: [\"/bin/rm\", \"**\"]"
    );
    assert!(says("check.disk").contains("denied with path: \"/root\""));
}

#[test]
fn the_rule_to_add_can_be_pasted_and_allows_nothing_else() {
    let long = "x".repeat(300);
    let run = json!({"argv": ["make"], "in": "a"});
    let chain = json!({"url": "http://h:8000/x", "method": "POST",
        "form": {"user": "a", "key": "secret://k"}, "expect": {"json": {"$.a": null}},
        "then": [{"url": "http://h:8000/x/${capture.id}", "json": {"a": [1, true, null, "*"]}}],
        "cleanup": [{"url": "http://h:8000/y?*", "headers": {"A-B": "secret://h"}}]});
    for (name, args, others) in [
        (
            "service.stop",
            json!({"service": "web"}),
            vec![json!({"driver": "process"}), json!({"service": "web2"})],
        ),
        (
            "exec.run",
            json!({"name": "x", "argv": ["/bin/echo", "a \"b\"", long], "env": {"A b": "secret://s"}}),
            vec![
                json!({"dir": "/tmp"}),
                json!({"env": {"LD_PRELOAD": "/tmp/x.so"}}),
                json!({"env": {"A b": "secret://t"}}),
            ],
        ),
        (
            "exec.run",
            json!({"name": "x", "argv": ["/bin/ls", r"a\*", "**"]}),
            vec![
                json!({"argv": ["/bin/ls", r"a\*"]}),
                json!({"argv": ["/bin/ls", r"a\*", "x"]}),
                json!({"argv": ["/bin/ls", r"a\b", "**"]}),
                json!({"env": {"A": "1"}}),
            ],
        ),
        (
            "release.build",
            json!({"app": "web", "release": "v1", "run": [run]}),
            vec![
                json!({"run": [run, {"argv": ["curl"]}]}),
                json!({"run": [{"argv": ["curl"]}]}),
                json!({"run": [{"argv": ["make"]}]}),
                json!({"release": "v2"}),
            ],
        ),
        (
            "check.sql",
            json!({"database": "shop", "sql": "select count(*) from t", "equals": "1"}),
            vec![json!({"sql": "select count(1); drop table t; select count(1) from t"})],
        ),
        (
            "postgres.backup",
            json!({"database": "shop"}),
            vec![json!({"copies": ["/tmp"]})],
        ),
        (
            "check.http",
            chain,
            vec![
                json!({"url": "http://h:8000/y"}),
                json!({"form": {"user": "a", "key": "secret://h"}}),
                json!({"then": [{"url": "http://h:8000/z"}]}),
                json!({"cleanup": []}),
            ],
        ),
    ] {
        let asked = action(name, args.clone());
        let none = policy("").check(&asked).unwrap_err();
        let (_, rule) = none.split_once('\n').unwrap();
        assert_eq!(policy(rule).check(&asked), Ok(()), "{none}");
        for other in others {
            let mut changed = args.clone();
            let fields = changed.as_object_mut().unwrap();
            fields.extend(other.as_object().unwrap().clone());
            let refused = policy(rule).check(&action(name, changed));
            assert!(refused.is_err(), "{other} under\n{rule}");
        }
    }
}

#[test]
fn no_secret_goes_where_no_rule_lists_it() {
    let open = policy(
        "[[allow]]\naction = 'env.render'\n\
         [[allow]]\naction = 'check.http'\nwhere = { url = ['http://app/*'] }",
    );
    let render = |set: Value| action("env.render", json!({"path": "/srv/a.env", "set": set}));
    assert_eq!(open.check(&render(json!({"A": "1"}))), Ok(()));
    let refusal = open
        .check(&render(json!({"A": "secret://root"})))
        .unwrap_err();
    let add = "add `set = [{ A = \"secret://root\" }]` to its `where`";
    assert!(refusal.contains(add), "{refusal}");
    let any = policy("[[allow]]\naction = '*'");
    assert!(any.check(&render(json!({"A": "secret://root"}))).is_err());
    for hidden in [
        json!({"headers": {"A": "secret://root"}}),
        json!({"form": {"A": "secret://root"}}),
        json!({"json": {"a": ["secret://root"]}}),
        json!({"then": [{"url": "http://app/x", "headers": {"A": "secret://root"}}]}),
        json!({"cleanup": [{"url": "http://app/x", "json": "secret://root"}]}),
    ] {
        let mut args = json!({"url": "http://app/"});
        let fields = args.as_object_mut().unwrap();
        fields.extend(hidden.as_object().unwrap().clone());
        let refusal = http(&open, args).unwrap_err();
        assert!(refusal.contains("must be listed"), "{refusal}");
    }
    let listed = policy(
        "[[allow]]\naction = 'check.http'\nwhere = { url = ['http://app/*'], \
         form = ['(default)', { user = '*', key = 'secret://smoke' }] }",
    );
    let login = |key: &str| {
        let form = json!({"user": "ann", "key": key});
        let then = json!([{"url": "http://app/x"}]);
        http(
            &listed,
            json!({"url": "http://app/", "form": form, "then": then}),
        )
    };
    assert_eq!(login("secret://smoke"), Ok(()));
    assert!(login("secret://root").is_err());
}

#[test]
fn a_policy_that_others_can_write_is_not_used() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("policy.toml");
    std::fs::write(&path, "[[allow]]\naction = '*'").unwrap();
    let mode = |mode| std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
    mode(0o644);
    assert!(Policy::load(&path).is_ok());
    for unsafe_mode in [0o664, 0o646] {
        mode(unsafe_mode);
        let error = Policy::load(&path).unwrap_err().to_string();
        assert!(error.contains("chmod"), "{error}");
    }
}

fn http(policy: &Policy, args: Value) -> Result<(), String> {
    policy.check(&action("check.http", args))
}

#[test]
fn each_request_of_a_chain_is_held_against_the_rule() {
    let policy = policy(
        "[[allow]]\naction = 'check.http'\nwhere = { url = ['http://127.*:8000/*'], \
         method = ['(default)', 'POST'] }",
    );
    let chain = |then: &str, cleanup: &str| {
        http(
            &policy,
            json!({"url": "http://127.0.0.1:8000/login", "method": "POST",
                "then": [{"url": "http://127.0.0.1:8000/x/${capture.id}"}, {"url": then}],
                "cleanup": [{"url": cleanup}]}),
        )
    };
    let good = "http://127.0.0.9:8000/y";
    assert_eq!(chain(good, good), Ok(()));
    for bad in [
        "http://evil.test/:8000/y",
        "http://${capture.host}:8000/y",
        "http://127.0.0.1:8001/y",
    ] {
        assert!(chain(bad, good).unwrap_err().contains(bad));
        assert!(chain(good, bad).unwrap_err().contains(bad));
    }
    let delete = json!({"url": good, "cleanup": [{"url": good, "method": "DELETE"}]});
    let refusal = http(&policy, delete).unwrap_err();
    assert!(refusal.contains("\"DELETE\" to `method`"), "{refusal}");
}

#[test]
fn a_url_with_a_user_is_refused_under_any_rule() {
    let policy = policy("[[allow]]\naction = '*'");
    assert_eq!(http(&policy, json!({"url": "http://h/"})), Ok(()));
    for args in [
        json!({"url": "http://olga:canary@h/"}),
        json!({"url": "http://h/", "then": [{"url": "http://canary@h/"}]}),
        json!({"url": "http://h/", "cleanup": [{"url": "http://canary@h"}]}),
    ] {
        let refusal = http(&policy, args).unwrap_err();
        assert!(
            refusal.contains("header") && !refusal.contains("canary"),
            "{refusal}"
        );
    }
}

#[test]
fn one_denied_value_among_several_is_denied() {
    let policy = policy(
        "[[allow]]\naction = '*'\n\
         [[deny]]\naction = 'check.http'\nwhere = { url = ['http://evil.test/*'] }\n\
         [[deny]]\naction = 'release.build'\nwhere = { run = [['curl', '**']] }",
    );
    let good = "http://h/";
    assert_eq!(http(&policy, json!({"url": good})), Ok(()));
    for bad in ["http://evil.test/x", "http://${capture.host}/x"] {
        let chain = json!({"url": good, "then": [{"url": bad}]});
        assert!(
            http(&policy, chain).unwrap_err().contains("denies"),
            "{bad}"
        );
    }
    let run = json!([{"argv": ["make"]}, {"argv": ["curl", "x"]}]);
    let build = action(
        "release.build",
        json!({"app": "a", "release": "v1", "run": run}),
    );
    assert!(policy.check(&build).unwrap_err().contains("denies"));
}

#[test]
fn another_spelling_does_not_get_around_a_denial() {
    let policy = policy(
        "[[allow]]\naction = '*'\n\
         [[deny]]\naction = 'check.log'\nwhere = { path = ['/etc/*', '/var/log/auth.log'] }\n\
         [[deny]]\naction = 'check.http'\nwhere = { url = ['http://app/admin/*'] }\n\
         [[deny]]\naction = 'service.*'\nwhere = { service = ['postgresql', 'ssh*.service'] }\n\
         [[deny]]\naction = 'exec.run'\nwhere = { argv = [['/usr/bin/curl', '**']] }\n\
         [[deny]]\naction = 'exec.run'\nwhere = { env = [{ KEY = '*' }, { URL = 'http://evil/*' }] }",
    );
    let log = |path: &str| action("check.log", json!({"path": path}));
    let get = |url: &str| action("check.http", json!({"url": url}));
    let stop = |service: &str| action("service.stop", json!({"service": service}));
    let run = |program: &str, env: Value| {
        let argv = [program, "../x"];
        action("exec.run", json!({"name": "x", "argv": argv, "env": env}))
    };
    for denied in [
        log("/etc/shadow"),
        log("/etc/../etc/shadow"),
        log("/var/../etc/shadow"),
        log("//etc/shadow"),
        log("/./etc/shadow"),
        log("/var/log//auth.log"),
        log("/var/log/./auth.log"),
        log("/var/log/x/../auth.log"),
        get("http://app/admin/x"),
        get("http://app/x/../admin/y"),
        get("http://app/x/%2e%2E/admin/y"),
        get("http://app//admin/y?z"),
        get("http://app/./admin/y"),
        get("http://app/%61dmin/y"),
        get("http://app/x\\..\\admin/y"),
        get("http://APP.:80/admin/y"),
        stop("postgresql"),
        stop("postgresql.service"),
        stop("sshd"),
        run("/usr/bin/curl", json!({})),
        run("/usr//bin/./curl", json!({})),
        run("/usr/bin/../bin/curl", json!({})),
        run("true", json!({"KEY": "secret://key"})),
        run("true", json!({"URL": "http://evil//x"})),
        run("true", json!({"URL": "http://a@evil/x"})),
    ] {
        let refusal = policy.check(&denied).unwrap_err();
        assert!(refusal.contains("denies"), "{denied:?}: {refusal}");
    }
    for allowed in [
        log("/var/log/app.log"),
        get("http://app/health?of=/admin/x"),
        get("http://app/x/admin/y"),
        stop("postgres"),
        stop("postgresql.timer"),
        run("./curl", json!({})),
        run("true", json!({"URL": "none"})),
    ] {
        assert_eq!(policy.check(&allowed), Ok(()), "{allowed:?}");
    }
}

#[test]
fn a_pattern_for_urls_that_means_nothing_is_an_error() {
    let rule = "[[allow]]\naction = 'check.http'\nwhere = { url = ['app-1:8000/*'] }";
    let error = Policy::parse(Path::new("p"), rule).unwrap_err().to_string();
    assert!(error.contains("https://example.com/*"), "{error}");
}

#[test]
fn commands_get_only_the_secrets_that_are_listed() {
    let run = |name: &str, env: Value| {
        let mut args = json!({"argv": ["true"], "env": env});
        if name == "exec.run" {
            args["name"] = "x".into();
        }
        action(name, args)
    };
    for name in ["exec.run", "check.command"] {
        let rule = format!("[[allow]]\naction = '{name}'\n");
        let open = policy(&rule);
        assert_eq!(open.check(&run(name, json!({"A": "1"}))), Ok(()));
        let secret = run(name, json!({"A": "1", "KEY": "secret://key"}));
        let refusal = open.check(&secret).unwrap_err();
        let add = "add `env = [{ A = \"1\", KEY = \"secret://key\" }]` to its `where`";
        assert!(refusal.contains(add), "{refusal}");
        // Whatever the rule is called by; then another one is named.
        let refusal = policy("[[allow]]\naction = '*'")
            .check(&secret)
            .unwrap_err();
        let add = format!("action = \"{name}\"\n[allow.where]\n");
        assert!(refusal.contains(&add), "{refusal}");
        assert!(
            refusal.contains("\nenv = [{ A = \"1\", KEY = \"secret://key\" }]"),
            "{refusal}"
        );

        let listed = policy(&format!(
            "{rule}where = {{ env = [{{ A = '*', KEY = 'secret://key' }}, '(default)'] }}"
        ));
        assert_eq!(listed.check(&secret), Ok(()));
        for bad in [
            json!({"A": "1", "KEY": "secret://root"}),
            json!({"A": "secret://key", "KEY": "secret://key"}),
            json!({"A": "1", "KEY": "secret://key", "MORE": "1"}),
            json!({"KEY": "secret://key"}),
        ] {
            assert!(listed.check(&run(name, bad.clone())).is_err(), "{bad}");
        }
    }
}

#[test]
fn a_url_in_an_environment_is_held_against_a_pattern_for_urls() {
    let policy = policy(
        "[[allow]]\naction = 'exec.run'\nwhere = { env = [{ BASE_URL = 'http://*:8000' }] }",
    );
    let run = |base: &str| {
        let args = json!({"name": "x", "argv": ["true"], "env": {"BASE_URL": base}});
        policy.check(&action("exec.run", args))
    };
    assert_eq!(run("http://app-1:8000"), Ok(()));
    assert!(run("http://evil.test/:8000").is_err());
    assert!(run("http://app-1@evil.test:8000").is_err());
}

#[test]
fn the_rule_that_comes_nearest_is_the_one_to_extend() {
    let policy = policy(
        "[[allow]]\naction = 'exec.run'\nwhere = { argv = [['smoke']], env = [{ A = '1' }] }\n\
         [[allow]]\naction = 'exec.run'\nwhere = { argv = [['seed']], env = [{ B = '1' }] }",
    );
    let args = json!({"name": "x", "argv": ["smoke"], "env": {"A": "2"}});
    let refusal = policy.check(&action("exec.run", args)).unwrap_err();
    assert!(refusal.contains("add { A = \"2\" } to `env`"), "{refusal}");
}

#[test]
fn the_examples_policy_gives_each_script_its_own_secrets_and_nobody_else_a_request() {
    let policy = policy(include_str!(
        "../../../../deploy/examples/employee-system/hosts/app/policy.toml"
    ));
    let run = |name: &str, script: &[&str], env: Value| {
        let argv = [&["venv/bin/python"], script].concat();
        let dir = "/var/www/employee-system/releases/v1.0.0/backend";
        let mut args = json!({"argv": argv, "dir": dir, "env": env});
        if name == "exec.run" {
            args["name"] = "x".into();
        }
        policy.check(&action(name, args))
    };
    let smoke = &["scripts/smoke_tests.py"][..];
    let admin = |base: &str| json!({"BASE_URL": base, "SMOKE_PASSWORD": "secret://admin_password"});
    let data = json!({"DATABASE_URL": "secret://migrator_database_url"});
    let mut seed = data.clone();
    seed["ADMIN_PASSWORD"] = "secret://admin_password".into();
    let here = "http://127.0.0.1:8000";
    let benchmark = "scripts/performance_benchmark.py --list-ms=1 --search-ms=1 --create-ms=1 \
                     --update-ms=1";
    let benchmark: Vec<&str> = benchmark.split(' ').collect();
    let (seeds, verify) = (["scripts/seed.py"], ["scripts/verify_data_integrity.py"]);
    assert_eq!(run("exec.run", smoke, admin(here)), Ok(()));
    assert_eq!(run("exec.run", &benchmark, admin(here)), Ok(()));
    assert_eq!(run("exec.run", &seeds, seed.clone()), Ok(()));
    assert_eq!(run("check.command", &verify, data.clone()), Ok(()));
    assert_eq!(run("check.command", &["-m", "unittest"], json!({})), Ok(()));

    assert!(run("exec.run", smoke, admin("http://evil.test/:8000")).is_err());
    assert!(run("exec.run", smoke, admin("http://127.evil.test:8000")).is_err());
    assert!(run("exec.run", smoke, seed).is_err());
    assert!(
        run(
            "exec.run",
            smoke,
            json!({"BASE_URL": here, "PYTHONPATH": "/tmp"})
        )
        .is_err()
    );
    assert!(
        run(
            "exec.run",
            &[benchmark[0], "--base-url=http://evil.test"],
            admin(here)
        )
        .is_err()
    );
    assert!(run("check.command", &["-m", "unittest"], data).is_err());

    let login_with = |url: &str, password: &str| {
        http(
            &policy,
            json!({"url": format!("{here}/api/auth/login"), "method": "POST",
                "form": {"username": "admin", "password": password},
                "then": [{"url": format!("{here}/api/employees/${{capture.id}}")}, {"url": url}]}),
        )
    };
    let login = |url: &str| login_with(url, "secret://admin_password");
    assert_eq!(login(&format!("{here}/api/employees")), Ok(()));
    assert!(login_with(&format!("{here}/health"), "secret://secret_key").is_err());
    assert!(login("http://evil.test:8000/api/employees").is_err());
    assert!(login(&format!("{here}/admin")).is_err());
}

#[test]
fn the_examples_of_the_guide_are_valid() {
    let guide = include_str!("../../../../docs/policy.md");
    let examples = guide.split("```toml\n").skip(1);
    let mut seen = 0;
    for example in examples.filter_map(|rest| rest.split("```").next()) {
        let read = Policy::parse(Path::new("policy.md"), example);
        assert!(read.is_ok(), "{example}\n{read:?}");
        seen += 1;
    }
    assert!(seen >= 4, "{seen} examples");
}
