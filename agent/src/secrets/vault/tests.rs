//! Against a server that answers as the API's documentation says:
//! /api-docs/secret/kv/kv-v1, /api-docs/secret/kv/kv-v2, and "errors" of /api-docs.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustls::ServerConfig;
use rustls::pki_types::PrivatePkcs8KeyDer;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpListener;

use super::*;
use crate::secrets::resolve;
use crate::testing::Host;

const TOKEN: &str = "hvs.canary-token";

/// What the server answers at a path.
fn answer(path: &str) -> (u16, String) {
    let body = |status: u16, text: &str| (status, text.to_owned());
    match path {
        "/v1/kv/app" => body(
            200,
            r#"{"request_id": "1", "lease_id": "", "renewable": false, "lease_duration": 2764800,
                "data": {"password": "canary-v1 \u00e4", "number": 7, "data": "text", "empty": ""},
                "wrap_info": null, "warnings": null, "auth": null}"#,
        ),
        "/v1/kv/data/app" => body(
            200,
            r#"{"request_id": "1", "data": {"data": {"password": "canary-v2"}, "metadata":
                {"created_time": "2026-01-01T00:00:00Z", "custom_metadata": null,
                 "deletion_time": "", "destroyed": false, "version": 3}}, "auth": null}"#,
        ),
        "/v1/kv/data/deleted" => body(
            404,
            r#"{"data": {"data": null, "metadata": {"deletion_time": "2026-01-01T00:00:00Z",
                "destroyed": false, "version": 4}}}"#,
        ),
        "/v1/kv/data/none" => body(404, r#"{"errors": []}"#),
        "/v1/kv/data/denied" => body(
            403,
            r#"{"errors": ["1 error occurred:\n\t* permission denied\n\n"]}"#,
        ),
        "/v1/kv/data/sealed" => body(503, r#"{"errors": ["Vault is sealed"]}"#),
        "/v1/kv/data/echo" => body(400, &format!(r#"{{"errors": ["bad token {TOKEN}"]}}"#)),
        "/v1/kv/data/standby" => body(307, ""),
        "/v1/kv/data/list" => body(200, r#"{"data": {"data": ["x"], "metadata": {}}}"#),
        "/v1/kv/data/huge" => body(200, &"x".repeat((1 << 20) + 1)),
        "/v1/kv/data/hangs" => body(0, ""),
        _ => body(200, "<html>welcome</html>"),
    }
}

/// Answers one request; those without the right token as the API does.
async fn serve(mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    let mut request = vec![];
    while !request.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => request.push(byte),
            Err(_) => return,
        }
    }
    let request = String::from_utf8(request).unwrap();
    let path = request.split(' ').nth(1).unwrap();
    let has = |header: String| request.contains(&format!("\r\n{header}\r\n"));
    let known = has(format!("x-vault-token: {TOKEN}")) && has("x-vault-namespace: ops".to_owned());
    let (status, body) = if known {
        answer(path)
    } else {
        (403, r#"{"errors": ["permission denied"]}"#.to_owned())
    };
    if status == 0 {
        std::future::pending::<()>().await;
    }
    let head = format!(
        "HTTP/1.1 {status} x\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    let _ = stream.write_all(head.as_bytes()).await;
    let _ = stream.write_all(body.as_bytes()).await;
    let _ = stream.shutdown().await;
}

/// A server on loopback; how often it was asked, and the port.
async fn server(tls: Option<tokio_rustls::TlsAcceptor>) -> (Arc<AtomicUsize>, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            count.fetch_add(1, Ordering::Relaxed);
            let tls = tls.clone();
            tokio::spawn(async move {
                match tls {
                    None => serve(stream).await,
                    Some(tls) => {
                        if let Ok(stream) = tls.accept(stream).await {
                            serve(stream).await;
                        }
                    }
                }
            });
        }
    });
    (asked, port)
}

fn host(address: &str, secrets: &[(&str, &str)]) -> Host {
    let mut host = Host::new();
    host.secret("token", TOKEN);
    host.config.vault = Some(Vault {
        address: address.to_owned(),
        ca: None,
        namespace: Some("ops".into()),
        token: "secret://token".into(),
    });
    for (path, field) in secrets {
        let source = Source::Vault {
            path: (*path).to_owned(),
            field: (*field).to_owned(),
        };
        host.config.secrets.insert(path.replace('/', "-"), source);
    }
    host
}

async fn refused(host: &Host, name: &str) -> String {
    let why = resolve(&host.config, name).await.unwrap_err();
    let words = format!("{}; {}", why.message, why.hint.unwrap_or_default());
    assert!(!words.contains("canary"), "INV-10: {words}");
    words
}

#[tokio::test]
async fn both_versions_of_the_engine_are_read() {
    let (asked, port) = server(None).await;
    let secrets = [("kv/app", "password"), ("kv/data/app", "password")];
    let host = host(&format!("http://127.0.0.1:{port}"), &secrets);
    let get = async |name| resolve(&host.config, name).await.unwrap();
    assert_eq!(get("kv-app").await.expose(), "canary-v1 ä");
    assert_eq!(get("kv-data-app").await.expose(), "canary-v2");
    // A step asks once for each, however often it needs it.
    let cx = host.context();
    let before = asked.load(Ordering::Relaxed);
    for _ in 0..3 {
        let value = cx.secret("secret://kv-app").await.unwrap();
        assert_eq!(value.expose(), "canary-v1 ä");
    }
    assert_eq!(asked.load(Ordering::Relaxed), before + 1);
}

#[tokio::test]
async fn what_the_vault_refuses_is_said_with_what_to_do() {
    let (_, port) = server(None).await;
    let cases = [
        ("kv/data/deleted", "nothing at `kv/data/deleted`"),
        ("kv/data/none", "nothing at `kv/data/none`"),
        ("kv/data/denied", "permission denied"),
        ("kv/data/sealed", "is sealed"),
        ("kv/data/echo", "bad token ***"),
        ("kv/data/standby", "not followed"),
        ("kv/data/list", "no field `password`; it has data, metadata"),
        ("kv/data/huge", "larger than 1 MiB"),
        ("ui", "no vault"),
    ];
    let secrets = cases.map(|(path, _)| (path, "password"));
    let mut host = host(&format!("http://127.0.0.1:{port}"), &secrets);
    for (path, words) in cases {
        let why = refused(&host, &path.replace('/', "-")).await;
        assert!(why.contains(words), "{path}: {why}");
    }
    for (field, words) in [
        ("passwort", "it has data, empty, number, password"),
        ("number", "is no text"),
        ("empty", "is empty"),
    ] {
        let source = Source::Vault {
            path: "kv/app".into(),
            field: field.into(),
        };
        host.config.secrets.insert("x".into(), source);
        let why = refused(&host, "x").await;
        assert!(why.contains(words), "{field}: {why}");
    }
    host.secret("token", "hvs.wrong-canary");
    let why = refused(&host, "kv-data-none").await;
    assert!(why.contains("vault token lookup"), "{why}");
    std::fs::remove_file(host.config.secrets_dir.as_ref().unwrap().join("token")).unwrap();
    let why = refused(&host, "kv-data-none").await;
    assert!(why.contains("needs the vault's token"), "{why}");
}

#[tokio::test]
async fn a_vault_that_is_silent_or_away_is_not_waited_for() {
    let (_, port) = server(None).await;
    let hangs = host(
        &format!("http://127.0.0.1:{port}"),
        &[("kv/data/hangs", "x")],
    );
    let why = refused(&hangs, "kv-data-hangs").await;
    assert!(why.contains("no answer within 1s"), "{why}");
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = closed.local_addr().unwrap().port();
    drop(closed);
    let away = host(&format!("http://127.0.0.1:{port}"), &[("kv/app", "x")]);
    assert!(refused(&away, "kv-app").await.contains("cannot connect"));
}

#[tokio::test]
async fn only_a_vault_that_the_authority_vouches_for_gets_the_token() {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let key = PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key.into())
        .unwrap();
    let (_, port) = server(Some(Arc::new(tls).into())).await;
    let mut host = host(
        &format!("https://localhost:{port}"),
        &[("kv/data/app", "password")],
    );
    let why = refused(&host, "kv-data-app").await;
    assert!(why.contains("TLS failed"), "{why}");
    let ca = host.path().join("ca.pem");
    std::fs::write(&ca, made.cert.pem()).unwrap();
    host.config.vault.as_mut().unwrap().ca = Some(ca);
    let value = resolve(&host.config, "kv-data-app").await.unwrap();
    assert_eq!(value.expose(), "canary-v2");
}
