use super::*;

fn backup(copies: &Value) -> Action {
    action(
        "postgres.backup",
        json!({"database": "shop", "copies": copies}),
    )
}

#[test]
fn no_command_copies_a_backup_where_no_rule_lists_it() {
    let sent = |host: &str| {
        json!([
            "/backups",
            {"command": ["rsync", "{file}", format!("{host}:/srv/{{id}}")],
             "read_back": ["ssh", host, "cat", "/srv/{id}"]},
        ])
    };
    for open in [
        "[[allow]]\naction = '*'",
        "[[allow]]\naction = 'postgres.*'\nwhere = { database = ['shop'] }",
        "[[allow]]\naction = 'postgres.backup'\nwhere = { copies = ['/backups', '*'] }",
    ] {
        let open = policy(open);
        assert_eq!(open.check(&backup(&json!(["/backups"]))), Ok(()));
        let refusal = open.check(&backup(&sent("vault"))).unwrap_err();
        assert!(refusal.contains("rsync"), "{refusal}");
    }
    let listed = policy(
        "[[allow]]\naction = 'postgres.backup'\n[allow.where]\ncopies = ['/backups', \
         { command = ['rsync', '{file}', 'vault:/srv/{id}'], read_back = ['ssh', 'vault', '**'] }]",
    );
    assert_eq!(listed.check(&backup(&sent("vault"))), Ok(()));
    assert!(listed.check(&backup(&sent("elsewhere"))).is_err());
    // What a refusal proposes allows the step, and no other.
    let none = policy("").check(&backup(&sent("vault"))).unwrap_err();
    let (_, rule) = none.split_once('\n').unwrap();
    assert_eq!(
        policy(rule).check(&backup(&sent("vault"))),
        Ok(()),
        "{none}"
    );
    assert!(policy(rule).check(&backup(&sent("elsewhere"))).is_err());
}

#[test]
fn no_store_gets_a_backup_where_no_rule_lists_it() {
    let request =
        |secret: &str| json!({"put": format!("secret://put_{secret}"), "get": "secret://get"});
    let sent = |store: &str, secret: &str| json!([{"store": store, "archive": request(secret), "manifest": request("manifest")}]);
    let own = sent("https://backups.test/shop/v1/", "archive");
    for open in [
        "[[allow]]\naction = '*'",
        "[[allow]]\naction = 'postgres.*'\nwhere = { database = ['shop'] }",
        "[[allow]]\naction = 'postgres.backup'\nwhere = { copies = ['/backups', '*', 'https://*'] }",
    ] {
        let refusal = policy(open).check(&backup(&own)).unwrap_err();
        assert!(refusal.contains("secret://put_archive"), "{refusal}");
    }
    let listed = policy(
        "[[allow]]\naction = 'postgres.backup'\n[allow.where]\ncopies = ['/backups', \
         { store = 'https://backups.test/shop/*', \
           archive = { put = 'secret://put_archive', get = 'secret://get' }, \
           manifest = { put = 'secret://put_manifest', get = 'secret://get' } }]",
    );
    assert_eq!(listed.check(&backup(&own)), Ok(()));
    // Another place, another secret of the host, and more than is listed.
    let mut more = own.clone();
    more[0]["headers"] = json!({"x-amz-acl": "public-read"});
    for other in [
        sent("https://evil.test/shop/v1/", "archive"),
        sent("https://backups.test/shop/../evil/", "archive"),
        sent("https://backups.test/evil/", "archive"),
        sent("http://backups.test/shop/v1/", "archive"),
        sent("https://backups.test/shop/v1/", "other"),
        more,
    ] {
        assert!(listed.check(&backup(&other)).is_err(), "{other}");
    }
    // What a refusal proposes allows the step, and no other.
    let none = policy("").check(&backup(&own)).unwrap_err();
    let (_, rule) = none.split_once('\n').unwrap();
    assert_eq!(policy(rule).check(&backup(&own)), Ok(()), "{none}");
    let other = sent("https://evil.test/shop/v1/", "archive");
    assert!(policy(rule).check(&backup(&other)).is_err());
}

#[test]
fn a_copy_is_restored_from_no_directory_that_no_rule_lists() {
    let verify = |args: Value| action("postgres.verify_backup", args);
    let own = verify(json!({"database": "shop"}));
    let from = |path: &str| verify(json!({"database": "shop", "from": path}));
    let open = policy("[[allow]]\naction = 'postgres.*'\nwhere = { database = ['shop'] }");
    assert_eq!(open.check(&own), Ok(()));
    let refusal = open.check(&from("/mnt/backups")).unwrap_err();
    assert!(refusal.contains("from = [\"/mnt/backups\"]"), "{refusal}");
    let listed = policy(
        "[[allow]]\naction = 'postgres.verify_backup'\nwhere = { from = ['(default)', '/mnt/backups'] }",
    );
    assert_eq!(listed.check(&own), Ok(()));
    assert_eq!(listed.check(&from("/mnt/backups")), Ok(()));
    assert!(listed.check(&from("/tmp")).is_err());
}
