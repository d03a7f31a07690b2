//! A store that fails in the ways in which stores fail.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use super::super::super::stored;
use super::*;

/// What a store does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whim {
    Well,
    /// It takes what comes, and never says that it wants it.
    Mute,
    /// It says no before it has read anything, and closes.
    Refuses,
    /// It says what it was asked, query and all.
    Echoes,
    CutsUploads,
    OtherBytes,
    /// It promises more than it gives.
    CutsDownloads,
    Shorter,
    Longer,
    /// It takes longer than a stall may, and never stops.
    Slow,
    Stalls,
}

#[derive(Default)]
struct State {
    files: BTreeMap<String, Vec<u8>>,
    /// The heads of the requests.
    seen: Vec<String>,
}

/// A server that serves until the test ends.
struct Failing {
    state: Arc<Mutex<State>>,
    whim: Arc<Mutex<Whim>>,
    address: std::net::SocketAddr,
}

impl Failing {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = Self {
            state: Arc::default(),
            whim: Arc::new(Mutex::new(Whim::Well)),
            address: listener.local_addr().unwrap(),
        };
        let (state, whim) = (server.state.clone(), server.whim.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (state, whim) = (state.clone(), *whim.lock().unwrap());
                // What the other side ends is no fault of the server's.
                std::thread::spawn(move || serve(&stream.unwrap(), whim, &state));
            }
        });
        server
    }

    fn is(&self, whim: Whim) {
        *self.whim.lock().unwrap() = whim;
    }

    fn store(&self) -> CopyStore {
        let mut store = store(&format!("http://{}/shop/", self.address));
        store.globals = None;
        store
    }

    fn place(&self, bench: &Bench) {
        for name in ["archive", "manifest.json"] {
            for verb in ["put", "get"] {
                let url = format!(
                    "http://{}/shop/{name}?X-Amz-Signature=canary-0123456789abcdef",
                    self.address
                );
                bench.host.secret(&format!("{verb}-{name}"), &url);
            }
        }
    }

    fn seen(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().unwrap().seen)
    }
}

fn serve(stream: &TcpStream, whim: Whim, state: &Mutex<State>) -> Option<()> {
    let (mut input, mut output) = (BufReader::new(stream), stream);
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        (input.read_line(&mut head).ok()? > 0).then_some(())?;
    }
    let path = head.split([' ', '?']).nth(1)?.to_owned();
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "))
        .map_or(0, |length| length.parse::<usize>().unwrap());
    state.lock().unwrap().seen.push(head.clone());
    let answer = |status: u16, body: &str| {
        let head = format!(
            "HTTP/1.1 {status} x\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        write!(&mut { stream }, "{head}{body}").ok()
    };
    if whim == Whim::Echoes {
        return answer(500, &format!("<Error>\u{1b}[2J {head}</Error>"));
    }
    if head.starts_with("PUT ") {
        if whim == Whim::Refuses {
            return answer(
                403,
                "<Error><Code>AccessDenied</Code><Message>no</Message></Error>",
            );
        }
        if whim != Whim::Mute {
            output.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").ok()?;
        }
        let taken = if whim == Whim::CutsUploads {
            length / 2
        } else {
            length
        };
        let mut body = vec![0; taken];
        input.read_exact(&mut body).ok()?;
        if taken == length {
            state.lock().unwrap().files.insert(path, body);
            return answer(200, "");
        }
        return None;
    }
    let mut body = state.lock().unwrap().files.get(&path)?.clone();
    let half = body.len() / 2;
    let promised = match whim {
        Whim::Longer => body.len() + 5,
        Whim::Shorter => half,
        _ => body.len(),
    };
    match whim {
        Whim::OtherBytes => body[half] ^= 1,
        Whim::CutsDownloads | Whim::Stalls | Whim::Shorter => body.truncate(half),
        Whim::Longer => body.extend(b"12345"),
        _ => {}
    }
    write!(
        output,
        "HTTP/1.1 200 x\r\ncontent-length: {promised}\r\n\r\n"
    )
    .ok()?;
    for piece in body.chunks(body.len().div_ceil(6)) {
        output.write_all(piece).ok()?;
        if whim == Whim::Slow {
            std::thread::sleep(Duration::from_millis(500));
        }
    }
    if whim == Whim::Stalls {
        std::thread::sleep(Duration::from_secs(30));
    }
    Some(())
}

/// A backup with nothing copied, to be sent.
async fn taken() -> (Bench, Manifest, PathBuf) {
    let bench = Bench::with_rows().await;
    backup().apply(&bench.cx(1, vec![]), &NULL).await.unwrap();
    let (cx, made) = (bench.cx(0, vec![]), made(&bench).remove(0));
    let own = Store::of(&cx, &Database::find(&cx, "staff").unwrap()).path(&made.id);
    (bench, made, own)
}

#[tokio::test]
async fn a_store_that_fails_is_told_by_name_and_never_believed() {
    let (bench, made, own) = taken().await;
    let server = Failing::start();
    server.place(&bench);
    let to = server.store();
    let archive = format!("{}archive", to.store);
    for (whim, cause, words) in [
        (Whim::Refuses, Cause::Host, "status 403: AccessDenied: no"),
        (
            Whim::Echoes,
            Cause::Host,
            "status 500: <Error> [2J PUT /shop/archive?***",
        ),
        (Whim::CutsUploads, Cause::Host, "cannot send archive"),
        (
            Whim::OtherBytes,
            Cause::CheckUnmet,
            "archive comes back as ",
        ),
        (
            Whim::CutsDownloads,
            Cause::CheckUnmet,
            "archive does not come back: ",
        ),
        (Whim::Shorter, Cause::CheckUnmet, "archive comes back as "),
        (
            Whim::Longer,
            Cause::CheckUnmet,
            "it is longer than what was sent",
        ),
        (Whim::Stalls, Cause::CheckUnmet, "nothing has moved for 2s"),
    ] {
        server.is(whim);
        let cx = bench.cx(2, vec![]);
        let failed = stored::send(&cx, &own, &made, &to).await.unwrap_err();
        assert_eq!(failed.cause, cause, "{whim:?} {}", failed.message);
        for words in [words, &archive, &made.id] {
            assert!(
                failed.message.contains(words),
                "{whim:?} {}",
                failed.message
            );
        }
        assert!(failed.hint.is_some());
        assert!(!failed.message.contains('\u{1b}'));
        assert_hidden(&format!("{failed:?} {:?}", cx.log.last_lines()));
    }
    server.seen();
    for whim in [Whim::Well, Whim::Mute, Whim::Slow] {
        server.is(whim);
        stored::send(&bench.cx(2, vec![]), &own, &made, &to)
            .await
            .unwrap();
    }
    // A presigned request wants its length beforehand.
    let seen = server.seen();
    let put = &seen[0];
    assert!(
        put.contains(&format!("content-length: {}", made.size)),
        "{put}"
    );
    assert!(put.contains("expect: 100-continue"), "{put}");
    assert!(!seen.iter().any(|head| head.contains("transfer-encoding")));
    // The step's time is its end.
    server.is(Whim::Slow);
    let mut cx = bench.cx(2, vec![]);
    cx.deadline = Instant::now() + Duration::from_secs(1);
    let failed = stored::send(&cx, &own, &made, &to).await.unwrap_err();
    assert_eq!(failed.cause, Cause::TimedOut, "{}", failed.message);
    assert!(failed.message.contains(&to.store), "{}", failed.message);
}

#[tokio::test]
async fn what_leads_elsewhere_is_refused_before_anything_is_made() {
    let bench = Bench::with_rows().await;
    let server = Failing::start();
    let to = server.store();
    let at = server.address;
    for (url, words) in [
        ("canary-of-another-kind".to_owned(), "holds no URL"),
        (
            "https://hooks.test/services/canary".to_owned(),
            "to hooks.test, and not below",
        ),
        (
            format!("http://{at}/other/canary?sig=x"),
            "leads elsewhere: to 127.0.0.1, and",
        ),
        (
            format!("https://{at}/shop/archive?canary"),
            "leads elsewhere",
        ),
        (
            format!("http://{at}/shop/../canary?sig=x"),
            "leads elsewhere",
        ),
        (
            format!("http://{at}/shop/%2e%2E/canary?sig=x"),
            "leads elsewhere",
        ),
        (
            format!("http://{at}/shop/..%2fcanary?sig=x"),
            "leads elsewhere",
        ),
        (
            format!("http://canary@{at}/shop/archive?sig=x"),
            "holds no URL",
        ),
        (format!("http://{at}/shop/archive"), "without a signature"),
    ] {
        server.place(&bench);
        bench.host.secret("put-archive", &url);
        let mut cx = bench.cx(1, vec![]);
        for dry_run in [true, false] {
            cx.dry_run = dry_run;
            let failed = if dry_run {
                let probe = act(&to).probe(&cx).await.unwrap();
                let Probe::Unmet(failed) = probe else {
                    panic!("{probe:?}")
                };
                failed
            } else {
                act(&to).apply(&cx, &NULL).await.unwrap_err()
            };
            assert!(failed.message.contains(words), "{}", failed.message);
            assert!(
                failed.message.contains("`put-archive`"),
                "{}",
                failed.message
            );
            assert_hidden(&format!("{failed:?}"));
        }
    }
    // Without TLS only to the host itself; and one that is not there is found at once.
    let open = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    for (base, words) in [
        (
            "http://store.test/shop/".to_owned(),
            "without TLS everybody",
        ),
        (
            format!("http://{open}/shop/"),
            "cannot be reached: cannot connect",
        ),
    ] {
        let mut to = store(&base);
        to.globals = None;
        for name in ["archive", "manifest.json"] {
            for verb in ["put", "get"] {
                let url = format!("{base}{name}?X-Amz-Signature=canary-0123456789");
                bench.host.secret(&format!("{verb}-{name}"), &url);
            }
        }
        let failed = act(&to)
            .apply(&bench.cx(1, vec![]), &NULL)
            .await
            .unwrap_err();
        assert!(failed.message.contains(words), "{}", failed.message);
        assert_hidden(&format!("{failed:?}"));
    }
    assert_eq!(made(&bench), [], "nothing was made");
    assert!(server.seen().is_empty(), "nothing was asked");
}

#[tokio::test]
async fn a_store_with_a_certificate_is_believed_only_if_its_authority_is() {
    let (bench, made, own) = taken().await;
    let server = Failing::start();
    let key = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let ca_file = bench.host.path().join("ca.pem");
    fs::write(&ca_file, key.cert.pem()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![key.cert.der().clone()],
            rustls::pki_types::PrivateKeyDer::try_from(key.signing_key.serialize_der()).unwrap(),
        )
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
    let front = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base = format!(
        "https://localhost:{}/shop/",
        front.local_addr().unwrap().port()
    );
    let behind = server.address;
    tokio::spawn(async move {
        loop {
            let (stream, _) = front.accept().await.unwrap();
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let Ok(mut stream) = acceptor.accept(stream).await else {
                    return;
                };
                let mut plain = tokio::net::TcpStream::connect(behind).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut stream, &mut plain).await;
            });
        }
    });
    let mut to = store(&base);
    to.globals = None;
    for name in ["archive", "manifest.json"] {
        for verb in ["put", "get"] {
            let url = format!("{base}{name}?X-Amz-Signature=canary-0123456789");
            bench.host.secret(&format!("{verb}-{name}"), &url);
        }
    }
    let failed = stored::find(&bench.cx(2, vec![]), &to).await.unwrap_err();
    assert!(failed.message.contains("TLS failed"), "{}", failed.message);
    assert!(server.seen().is_empty());
    to.ca_file = Some(ca_file.display().to_string());
    stored::find(&bench.cx(2, vec![]), &to).await.unwrap();
    stored::send(&bench.cx(2, vec![]), &own, &made, &to)
        .await
        .unwrap();
    assert_eq!(server.seen().len(), 4);
}
