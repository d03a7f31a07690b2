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
