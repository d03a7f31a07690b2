//! What is issued, and what is refused.

use std::os::unix::fs::PermissionsExt as _;

use super::*;

#[test]
fn issuers_are_never_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    init(dir.path(), "example.com").unwrap();
    let before = fs::read(dir.path().join("ca-agents.key")).unwrap();
    assert!(matches!(
        init(dir.path(), "example.com"),
        Err(PkiError::Exists(_))
    ));
    assert_eq!(fs::read(dir.path().join("ca-agents.key")).unwrap(), before);
}

#[test]
fn keys_are_readable_by_their_owner_only() {
    let dir = tempfile::tempdir().unwrap();
    init(dir.path(), "example.com").unwrap();
    let issued = issue_agent(dir.path(), "app-1", &dir.path().join("out")).unwrap();
    for key in [issued.key, dir.path().join("ca-agents.key")] {
        let mode = fs::metadata(&key).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{}", key.display());
    }
}

#[test]
fn what_is_issued_comes_with_the_issuers_that_its_owner_trusts() {
    let dir = tempfile::tempdir().unwrap();
    let (pki, out) = (dir.path().join("pki"), dir.path().join("out"));
    init(&pki, "example.com").unwrap();
    let files = |of: &Path| {
        let files = fs::read_dir(of).unwrap().map(|file| file.unwrap());
        let mut names: Vec<String> = files
            .map(|file| file.file_name().into_string().unwrap())
            .collect();
        names.sort();
        fs::remove_dir_all(of).unwrap();
        names
    };
    let issued = issue_controller(&pki, "main", &["localhost".to_owned()], &out).unwrap();
    let trusted = [out.join("ca-agents.crt"), out.join("ca-operators.crt")];
    assert_eq!(issued.trusts, trusted);
    let issuer = fs::read(pki.join("ca-agents.crt")).unwrap();
    assert_eq!(fs::read(&trusted[0]).unwrap(), issuer);
    let expected = ["ca-agents.crt", "ca-operators.crt", "controller-main.crt"];
    assert_eq!(files(&out)[..3], expected);
    issue_agent(&pki, "app-1", &out).unwrap();
    let expected = ["agent-app-1.crt", "agent-app-1.key", "ca-controllers.crt"];
    assert_eq!(files(&out), expected);
    issue_operator(&pki, &Person::new("olga", &[]), &out).unwrap();
    let expected = ["ca-controllers.crt", "operator-olga.crt"];
    assert_eq!(files(&out)[..2], expected);
}

/// Whoever follows the setting-up page ends with the files that its examples name.
#[test]
fn the_setting_up_page_names_what_is_issued() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/setup.md");
    let page = fs::read_to_string(page).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (pki, out) = (dir.path().join("pki"), dir.path().join("out"));
    init(&pki, "example.com").unwrap();
    issue_controller(&pki, "main", &["localhost".to_owned()], &out).unwrap();
    issue_agent(&pki, "app-1", &out).unwrap();
    issue_operator(&pki, &Person::new("olga", &[]), &out).unwrap();
    let words = page.split(['"', '`']).map(Path::new);
    let files = words.filter(|word| {
        let kind = word.extension().and_then(|kind| kind.to_str());
        matches!(kind, Some("crt" | "key"))
    });
    let named = files.filter_map(|file| file.file_name()?.to_str());
    let named: std::collections::BTreeSet<&str> = named.collect();
    let issued = fs::read_dir(&out)
        .unwrap()
        .map(|file| file.unwrap().file_name());
    let mut issued: Vec<String> = issued.map(|name| name.into_string().unwrap()).collect();
    // The one key of an issuer that a controller may be given.
    issued.push("ca-agents.key".to_owned());
    assert_eq!(named, issued.iter().map(String::as_str).collect());
}

#[test]
fn issuers_of_others_stay_as_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let (pki, out) = (dir.path().join("pki"), dir.path().join("out"));
    init(&pki, "example.com").unwrap();
    issue_agent(&pki, "app-1", &out).unwrap();
    // While an issuer is replaced, both are trusted.
    let file = out.join("ca-controllers.crt");
    let both = format!("# old\n{}", fs::read_to_string(&file).unwrap());
    fs::write(&file, &both).unwrap();
    issue_agent(&pki, "app-1", &out).unwrap();
    assert_eq!(fs::read_to_string(&file).unwrap(), both);

    let other = dir.path().join("other");
    init(&other, "example.com").unwrap();
    let before = fs::read(out.join("agent-app-1.crt")).unwrap();
    let refused = issue_agent(&other, "app-1", &out);
    assert!(matches!(refused, Err(PkiError::OtherIssuer { .. })));
    assert_eq!(fs::read_to_string(&file).unwrap(), both);
    assert_eq!(fs::read(out.join("agent-app-1.crt")).unwrap(), before);
    // Beside the issuers themselves nothing is copied.
    issue_agent(&pki, "app-1", &pki).unwrap();
}

#[test]
fn names_that_could_leave_their_directory_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    init(dir.path(), "example.com").unwrap();
    for name in ["", "../x", "a/b", "..", ".a", "APP-1", "a b"] {
        let refused = issue_agent(dir.path(), name, dir.path());
        assert!(matches!(refused, Err(PkiError::Host(_))), "{name:?}");
        let refused = issue_operator(dir.path(), &Person::new(name, &[]), dir.path());
        let fits = name == "APP-1";
        assert_eq!(refused.is_ok(), fits, "{name:?}");
    }
    let refused = issue_agent(dir.path(), "UPPER_host", dir.path()).unwrap_err();
    let refused = refused.to_string();
    assert!(
        refused.contains("a-z, 0-9") && !refused.contains("A-Z"),
        "{refused}"
    );
    assert!(matches!(
        init(&dir.path().join("x"), "not a domain"),
        Err(PkiError::Domain(_))
    ));
    let groups = ["a,b".to_owned()];
    assert!(matches!(
        issue_operator(dir.path(), &Person::new("dora", &groups), dir.path()),
        Err(PkiError::Group(_))
    ));
}

#[test]
fn a_controller_without_addresses_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    init(dir.path(), "example.com").unwrap();
    let refused = issue_controller(dir.path(), "c1", &[], dir.path());
    assert!(matches!(refused, Err(PkiError::NoAddress)));
    for address in [
        "",
        "foo bar",
        "http://x",
        "127.0.0.1:7443",
        "[::1]",
        "x:1",
        "a/b",
    ] {
        let addresses = ["localhost".to_owned(), address.to_owned()];
        let refused = issue_controller(dir.path(), "c1", &addresses, dir.path());
        assert!(matches!(refused, Err(PkiError::Address(_))), "{address:?}");
    }
    let addresses = ["control.example.com", "127.0.0.1", "::1"].map(ToOwned::to_owned);
    issue_controller(dir.path(), "c1", &addresses, dir.path()).unwrap();
}
