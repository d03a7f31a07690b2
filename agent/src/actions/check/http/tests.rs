use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde_json::json;

use super::*;
use crate::testing::Host;

/// A small real application: log in, create, read, delete, over HTTP.
#[derive(Default)]
struct State {
    /// What exists: id to who created it.
    items: std::sync::Mutex<std::collections::BTreeMap<u64, String>>,
    /// Requests as they came: method, path and authorization.
    seen: std::sync::Mutex<Vec<String>>,
    next: AtomicUsize,
    /// Answers 503 to so many requests for its health.
    sick: AtomicUsize,
    /// Answers 500 to so many creations, after it has created.
    hiccups: AtomicUsize,
    /// Does what it is asked to, and then gives no answer.
    mute: std::sync::atomic::AtomicBool,
    /// Answers 500 to reads.
    broken: std::sync::atomic::AtomicBool,
}

struct App {
    state: Arc<State>,
    base: String,
    server: tokio::task::JoinHandle<()>,
}

impl Drop for App {
    fn drop(&mut self) {
        self.server.abort();
    }
}

/// Whether there was something left to take one from.
fn count_down(count: &AtomicUsize) -> bool {
    let less = |left: usize| left.checked_sub(1);
    count
        .fetch_update(Ordering::SeqCst, Ordering::SeqCst, less)
        .is_ok()
}

const TOKEN: &str = "tok-canary-123456789";

async fn serve(state: Arc<State>, request: http::Request<Incoming>) -> http::Response<Full<Bytes>> {
    let (head, body) = request.into_parts();
    let body = String::from_utf8(body.collect().await.unwrap().to_bytes().to_vec()).unwrap();
    let header = |name: &str| {
        head.headers
            .get(name)
            .map_or("", |value| value.to_str().unwrap())
            .to_owned()
    };
    let path = head.uri.path().to_owned();
    state
        .seen
        .lock()
        .unwrap()
        .push(format!("{} {path}", head.method));
    let authorized = header("authorization") == format!("Bearer {TOKEN}");
    let id = path
        .strip_prefix("/items/")
        .and_then(|id| id.parse::<u64>().ok());
    let (status, answer) = match (head.method.as_str(), path.as_str(), id) {
        ("GET", "/health", _) => {
            if count_down(&state.sick) {
                (503, json!({"status": "starting"}))
            } else {
                (200, json!({"status": "healthy"}))
            }
        }
        (_, "/slow", _) => {
            sleep(Duration::from_millis(400)).await;
            (200, json!({}))
        }
        ("GET", "/large", _) => (200, json!("x".repeat(2 << 20))),
        ("POST", "/login", _) if body == "password=p%40ss%20word-canary&username=admin" => {
            (200, json!({"access_token": TOKEN}))
        }
        ("POST", "/login", _) => (401, json!({"detail": format!("wrong: {body}")})),
        _ if !authorized => (401, json!({"detail": "who are you"})),
        ("POST", "/items", _) => {
            assert_eq!(header("content-type"), "application/json");
            let id = state.next.fetch_add(1, Ordering::SeqCst) as u64 + 1000;
            state
                .items
                .lock()
                .unwrap()
                .insert(id, header("x-lockstep-step"));
            if state.mute.load(Ordering::SeqCst) {
                std::future::pending::<()>().await;
            }
            let hiccup = count_down(&state.hiccups);
            (
                if hiccup { 500 } else { 201 },
                json!({"id": id, "name": serde_json::from_str::<Value>(&body).unwrap()["name"]}),
            )
        }
        // Creates, though it should not.
        ("GET", "/items", _) => {
            let id = state.next.fetch_add(1, Ordering::SeqCst) as u64 + 1000;
            state.items.lock().unwrap().insert(id, String::new());
            let hiccup = count_down(&state.hiccups);
            (if hiccup { 500 } else { 200 }, json!({"id": id}))
        }
        ("GET", _, Some(_)) if state.broken.load(Ordering::SeqCst) => {
            (500, json!({"detail": format!("token was {TOKEN}")}))
        }
        ("GET", _, Some(id)) if state.items.lock().unwrap().contains_key(&id) => {
            (200, json!({"id": id, "name": "Smoke"}))
        }
        ("DELETE", _, Some(id)) => match state.items.lock().unwrap().remove(&id) {
            Some(_) => (204, Value::Null),
            None => (404, json!({})),
        },
        _ => (404, json!({"detail": "no such thing"})),
    };
    let body = if answer.is_null() {
        String::new()
    } else {
        answer.to_string()
    };
    http::Response::builder()
        .status(status)
        .body(Full::from(body))
        .unwrap()
}

impl App {
    async fn start() -> Self {
        Self::start_at("127.0.0.1:0").await
    }

    async fn start_at(address: &str) -> Self {
        let state = Arc::new(State::default());
        let listener = tokio::net::TcpListener::bind(address).await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let shared = state.clone();
        let server = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let state = shared.clone();
                let service = hyper::service::service_fn(move |request| {
                    let state = state.clone();
                    async move { Ok::<_, std::convert::Infallible>(serve(state, request).await) }
                });
                tokio::spawn(
                    hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service),
                );
            }
        });
        Self {
            state,
            base,
            server,
        }
    }

    /// A check in the form that plans have.
    fn check(&self, args: &Value) -> Http {
        let text = args.to_string().replace("BASE", &self.base);
        serde_json::from_str(&text).unwrap()
    }

    /// Health, login, create, read; the clean-up deletes.
    fn chain(&self) -> Http {
        let bearer = json!({"Authorization": "Bearer ${capture.token}"});
        self.check(&json!({
            "url": "BASE/health",
            "expect": {"status": 200, "json": {"$.status": "healthy"}},
            "within": "10s",
            "then": [
                {"url": "BASE/login", "method": "POST",
                 "form": {"username": "admin", "password": "secret://smoke"},
                 "capture": {"token": "$.access_token"}},
                {"url": "BASE/items", "method": "POST", "headers": bearer,
                 "json": {"name": "Smoke"}, "expect": {"status": 201}, "capture": {"id": "$.id"}},
                {"url": "BASE/items/${capture.id}", "headers": bearer,
                 "expect": {"status": 200, "json": {"$.name": "Smoke"}}},
            ],
            "cleanup": [
                {"url": "BASE/items/${capture.id}", "method": "DELETE", "headers": bearer,
                 "expect": {"status": 204}},
            ],
        }))
    }

    fn items(&self) -> usize {
        self.state.items.lock().unwrap().len()
    }
}

fn host() -> Host {
    let host = Host::new();
    host.secret("smoke", "p@ss word-canary\n");
    host
}

async fn apply(check: &Http, cx: &Context) -> Result<Done, Failure> {
    check.apply(cx, &Value::Null).await
}

#[tokio::test]
async fn a_chain_waits_for_health_captures_and_cleans_up() {
    let (app, host) = (App::start().await, host());
    app.state.sick.store(2, Ordering::SeqCst);
    let cx = host.context();
    let done = apply(&app.chain(), &cx).await.unwrap();
    assert_eq!(
        done.facts[0],
        Fact::Healthy {
            url: format!("{}/health", app.base)
        }
    );
    let Fact::Note { value, .. } = &done.facts[1] else {
        panic!("{:?}", done.facts)
    };
    assert!(value.contains("/items/${capture.id} "), "{value}");
    assert!(!done.changed);
    assert_eq!(app.items(), 0);
    assert!(!cx.dir.join(FILE).exists());
    let seen = app.state.seen.lock().unwrap().clone();
    let sent = [
        "GET /health",
        "GET /health",
        "GET /health",
        "POST /login",
        "POST /items",
    ];
    assert_eq!(seen[..5], sent);
    assert_eq!(seen[5..], ["GET /items/1000", "DELETE /items/1000"]);
    assert!(!format!("{done:?} {:?}", cx.log.last_lines()).contains("canary"));
}

#[tokio::test]
async fn a_failed_chain_says_which_request_and_cleans_up_all_the_same() {
    let (app, host) = (App::start().await, host());
    app.state.broken.store(true, Ordering::SeqCst);
    let cx = host.context();
    let failed = apply(&app.chain(), &cx).await.unwrap_err();
    assert_eq!(failed.cause, Cause::CheckUnmet);
    let wanted = format!(
        "GET {}/items/${{capture.id}}: expected status 200; status 500",
        app.base
    );
    assert!(failed.message.starts_with(&wanted), "{}", failed.message);
    assert!(
        failed.message.contains("token was ***"),
        "{}",
        failed.message
    );
    assert!(!failed.message.contains(TOKEN));
    assert_eq!(app.items(), 0);
    assert!(!cx.dir.join(FILE).exists());
}

#[tokio::test]
async fn a_chain_that_is_stopped_sends_no_more_and_removes_what_it_created() {
    let (app, host) = (App::start().await, host());
    let cx = host.context();
    let mut check = app.chain();
    let slow = app.check(&json!({"url": "BASE/slow"})).first();
    let read = check.then.pop().unwrap();
    check.then.extend([slow, read]);
    let (stopped, ()) = tokio::join!(apply(&check, &cx), async {
        while !app
            .state
            .seen
            .lock()
            .unwrap()
            .iter()
            .any(|it| it == "GET /slow")
        {
            sleep(Duration::from_millis(10)).await;
        }
        cx.stop.cancel();
    });
    let stopped = stopped.unwrap_err();
    assert_eq!(stopped.cause, Cause::Cancelled, "{stopped:?}");
    assert_eq!(app.items(), 0);
    let seen = app.state.seen.lock().unwrap().clone();
    assert_eq!(seen[3..], ["GET /slow", "DELETE /items/1000"]);
}

#[tokio::test]
async fn what_a_killed_attempt_created_is_removed_by_the_next_one() {
    let (app, host) = (App::start().await, host());
    let killed = host.context();
    let check = app.chain();
    {
        // Killed in the middle: dropped between creating and reading.
        let mut chain = Chain::new(&killed, &check, Captures::new(&killed));
        for (index, request) in (1..).zip(&check.then[..2]) {
            let asked = chain.ask(index, request, Duration::from_secs(5));
            assert!(asked.await.is_ok());
        }
    }
    assert_eq!(app.items(), 1);
    assert!(
        app.state
            .items
            .lock()
            .unwrap()
            .values()
            .all(|step| *step == killed.key.to_string())
    );
    let cx = host.context();
    let Probe::Absent(text) = check.probe(&cx).await.unwrap() else {
        panic!("nothing is proven")
    };
    assert!(
        text.starts_with("removes what an earlier attempt created"),
        "{text}"
    );
    let done = apply(&check, &cx).await.unwrap();
    assert!(done.summary.ends_with("2 cleaned up"), "{}", done.summary);
    assert_eq!(app.items(), 0);
    let seen = app.state.seen.lock().unwrap().clone();
    assert_eq!(
        seen[2], "DELETE /items/1000",
        "before anything else: {seen:?}"
    );
    assert!(!killed.dir.join(FILE).exists());
}

#[tokio::test]
async fn what_was_created_and_not_recorded_is_unknown_and_blocks_no_later_attempt() {
    let (app, host) = (App::start().await, host());
    let check = app.chain();
    let killed = host.context();
    app.state.mute.store(true, Ordering::SeqCst);
    {
        // Killed between sending and capturing: dropped once the application has created.
        let chain = apply(&check, &killed);
        tokio::select! {
            ended = chain => panic!("{ended:?}"),
            () = async {
                while app.items() == 0 {
                    sleep(Duration::from_millis(5)).await;
                }
            } => {}
        }
    }
    let Probe::NoProof(text) = check.probe(&killed).await.unwrap() else {
        panic!("INV-1: nothing says what was created");
    };
    let wanted = format!("POST {}/items may have created something", app.base);
    assert!(text.starts_with(&wanted), "{text}");
    let carries = format!("x-lockstep-step: {}", killed.key);
    assert!(text.contains("`id`") && text.contains(&carries), "{text}");

    // A person has looked, removed it, and said so: what was captured before is still used.
    app.state.mute.store(false, Ordering::SeqCst);
    app.state.items.lock().unwrap().clear();
    let cx = host.context();
    assert!(matches!(check.probe(&cx).await.unwrap(), Probe::Absent(_)));
    apply(&check, &cx).await.unwrap();
    assert_eq!(app.items(), 0);
    assert!(!killed.dir.join(FILE).exists());
}

#[tokio::test]
async fn a_mark_is_there_before_the_request_is_and_goes_with_the_answer() {
    let (app, host) = (App::start().await, host());
    let check = app.chain();
    let cx = host.context();
    let mut chain = Chain::new(&cx, &check, Captures::new(&cx));
    let open = || Captures::open_in(&cx).unwrap();
    let long = Duration::from_secs(5);
    assert!(chain.ask(0, &check.first(), long).await.is_ok());
    assert!(!cx.dir.join(FILE).exists(), "what only asks has no mark");
    assert!(chain.ask(1, &check.then[0], long).await.is_ok());
    assert_eq!(open(), None);
    assert!(chain.ask(2, &check.then[1], long).await.is_ok());
    assert_eq!((open(), app.items()), (None, 1));
    // One that is refused has created nothing.
    let mut refused = check.then[1].clone();
    refused.headers.clear();
    assert!(chain.ask(2, &refused, long).await.is_err());
    assert_eq!((open(), app.items()), (None, 1));
    // Nothing listens there: nothing was sent.
    let nowhere = Request {
        url: "http://127.0.0.1:1/items".into(),
        ..check.then[1].clone()
    };
    assert!(chain.ask(2, &nowhere, long).await.is_err());
    assert_eq!(open(), None);
    // A mark that cannot be written keeps the request back.
    std::fs::remove_dir_all(&cx.dir).unwrap();
    assert!(chain.ask(2, &check.then[1], long).await.is_err());
    assert_eq!((chain.captures.open(), app.items()), (None, 1));
}

#[tokio::test]
async fn a_creation_without_an_answer_says_what_to_look_for_and_stays_marked() {
    let (app, host) = (App::start().await, host());
    app.state.mute.store(true, Ordering::SeqCst);
    let mut check = app.chain();
    check.timeout = lockstep_proto::values::Period(300);
    let cx = host.context();
    let failed = apply(&check, &cx).await.unwrap_err();
    assert!(failed.message.contains("no answer within"), "{failed:?}");
    assert!(failed.changed, "{failed:?}");
    assert!(failed.hint.unwrap().contains("/items may have created"));
    // Killed before its outcome was written, it would be unknown; no token is kept for that.
    assert!(matches!(check.probe(&cx).await.unwrap(), Probe::NoProof(_)));
    let kept = std::fs::read_to_string(cx.dir.join(FILE)).unwrap();
    assert!(!kept.contains(TOKEN), "{kept}");
}

#[tokio::test]
async fn a_clean_up_that_fails_keeps_what_the_next_attempt_needs() {
    let (app, host) = (App::start().await, host());
    let mut check = app.chain();
    check.cleanup[0].expect.status = 299;
    let cx = host.context();
    let failed = apply(&check, &cx).await.unwrap_err();
    assert!(
        failed.message.starts_with("the clean-up failed: DELETE"),
        "{}",
        failed.message
    );
    assert!(failed.changed && failed.hint.unwrap().contains(&cx.key.to_string()));
    let file = cx.dir.join(FILE);
    let mode =
        std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&file).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    // By now it is gone, and that is fine for a clean-up.
    check.cleanup[0].expect.status = 204;
    assert!(apply(&check, &host.context()).await.is_ok());
    assert!(!file.exists());
}

#[tokio::test]
async fn secrets_stay_hidden_when_the_server_echoes_them() {
    let (app, host) = (App::start().await, host());
    let check = app.check(&json!({
        "url": "BASE/login", "method": "POST", "json": {"password": "secret://smoke"},
    }));
    let failed = apply(&check, &host.context()).await.unwrap_err();
    assert!(failed.message.contains("wrong:"), "{}", failed.message);
    assert!(!failed.message.contains("canary"), "{}", failed.message);
}

#[tokio::test]
async fn answers_are_held_against_everything_that_is_expected() {
    let (app, host) = (App::start().await, host());
    let cx = host.context();
    let unmet = async |args: Value| apply(&app.check(&args), &cx).await.unwrap_err().message;
    let message = unmet(json!({"url": "BASE/slow", "expect": {"faster_than": "100ms"}})).await;
    assert!(
        message.contains("expected an answer within 100ms, it took 4"),
        "{message}"
    );
    let message = unmet(json!({"url": "BASE/slow", "timeout": "100ms"})).await;
    assert!(message.contains("no answer within 100ms"), "{message}");
    let message =
        unmet(json!({"url": "BASE/health", "expect": {"json": {"$.status": "sick"}}})).await;
    assert!(
        message.contains("expected \"sick\" at `$.status`, found \"healthy\""),
        "{message}"
    );
    let message = unmet(json!({"url": "BASE/health", "expect": {"matches": "^ok$"}})).await;
    assert!(message.contains("matches `^ok$`"), "{message}");
    let message = unmet(json!({"url": "BASE/health", "capture": {"x": "$.none"}})).await;
    assert!(
        message.contains("the answer has no `$.none` to capture"),
        "{message}"
    );
    let message = unmet(json!({"url": "BASE/large"})).await;
    assert!(message.contains("larger than 1 MiB"), "{message}");
    let message = unmet(json!({"url": "http://127.0.0.1:1/x", "within": "1s"})).await;
    assert!(
        message.contains("cannot connect") && message.contains("tried"),
        "{message}"
    );
    assert!(same(&json!(1), &json!(1.0)) && !same(&json!("1"), &json!(1)));
}

#[tokio::test]
async fn what_cannot_be_sent_is_refused() {
    let (app, host) = (App::start().await, host());
    let cx = host.context();
    let cause = async |args: Value| apply(&app.check(&args), &cx).await.unwrap_err().cause;
    for url in [
        "BASE/${capture.none}",
        "ftp://x/",
        "/relative",
        "http://user:pw@localhost/",
    ] {
        assert_eq!(cause(json!({"url": url})).await, Cause::Refused, "{url}");
    }
    let header = json!({"url": "BASE/health", "headers": {"X-A": "a\r\nX-B: b"}});
    assert_eq!(cause(header).await, Cause::Refused);
    assert_eq!(
        cause(json!({"url": "BASE/health", "expect": {"json": {"$[": 1}}})).await,
        Cause::Refused
    );
    let missing = json!({"url": "BASE/health", "headers": {"X-Key": "secret://none"}});
    assert_eq!(cause(missing).await, Cause::Host);
}

#[tokio::test]
async fn a_dry_run_sends_nothing_that_changes() {
    let (app, host) = (App::start().await, host());
    let cx = Context {
        dry_run: true,
        ..host.context()
    };
    let Probe::Present(text) = app.chain().probe(&cx).await.unwrap() else {
        panic!("healthy now")
    };
    assert!(text.ends_with("4 requests follow"), "{text}");
    let post = app.check(&json!({"url": "BASE/login", "method": "POST"}));
    assert!(matches!(post.probe(&cx).await.unwrap(), Probe::Absent(_)));
    assert_eq!(app.state.seen.lock().unwrap().clone(), ["GET /health"]);
}

#[tokio::test]
async fn a_request_that_may_have_had_its_effect_is_not_repeated() {
    let (app, host) = (App::start().await, host());
    app.state.hiccups.store(1, Ordering::SeqCst);
    let bearer = json!({"Authorization": format!("Bearer {TOKEN}")});
    let check = app.check(&json!({
        "url": "BASE/items", "method": "POST", "headers": bearer, "json": {"name": "Smoke"},
        "expect": {"status": 201}, "capture": {"id": "$.id"}, "within": "10s",
        "cleanup": [{"url": "BASE/items/${capture.id}", "method": "DELETE", "headers": bearer,
            "expect": {"status": 204}}],
    }));
    let failed = apply(&check, &host.context()).await.unwrap_err();
    assert!(failed.message.contains("status 500"), "{}", failed.message);
    assert!(failed.hint.unwrap().contains("not sent again"));
    let seen = app.state.seen.lock().unwrap().clone();
    assert_eq!(seen, ["POST /items", "DELETE /items/1000"]);
    assert_eq!(app.items(), 0);
    // Nor is one that got no answer.
    let slow = app.check(&json!({
        "url": "BASE/slow", "method": "POST", "headers": bearer, "timeout": "100ms",
        "within": "2s",
    }));
    app.state.seen.lock().unwrap().clear();
    assert!(apply(&slow, &host.context()).await.is_err());
    assert_eq!(app.state.seen.lock().unwrap().clone(), ["POST /slow"]);
}

#[tokio::test]
async fn a_request_that_reached_nobody_is_repeated_whatever_it_asks() {
    let host = host();
    let check = |base: &str| -> Http {
        let args = json!({"url": format!("{base}/login"), "method": "POST", "within": "10s",
            "form": {"username": "admin", "password": "secret://smoke"}});
        serde_json::from_value(args).unwrap()
    };
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = port.local_addr().unwrap();
    drop(port);
    let cx = host.context();
    let check = check(&format!("http://{address}"));
    let (done, app) = tokio::join!(apply(&check, &cx), async {
        sleep(Duration::from_millis(500)).await;
        App::start_at(&address.to_string()).await
    });
    done.unwrap();
    assert_eq!(app.state.seen.lock().unwrap().clone(), ["POST /login"]);
}

#[tokio::test]
async fn what_each_try_captured_is_removed() {
    let (app, host) = (App::start().await, host());
    app.state.hiccups.store(2, Ordering::SeqCst);
    let bearer = json!({"Authorization": format!("Bearer {TOKEN}")});
    let check = app.check(&json!({
        "url": "BASE/items", "headers": bearer, "capture": {"id": "$.id"}, "within": "10s",
        "cleanup": [{"url": "BASE/items/${capture.id}", "method": "DELETE", "headers": bearer,
            "expect": {"status": 204}}],
    }));
    let killed = host.context();
    {
        // Killed after three tries: all of them are known on the disk.
        let mut chain = Chain::new(&killed, &check, Captures::new(&killed));
        let end = Instant::now() + Duration::from_secs(20);
        chain.run(end).await.unwrap();
    }
    assert_eq!(app.items(), 3);
    app.state.hiccups.store(1, Ordering::SeqCst);
    let done = apply(&check, &host.context()).await.unwrap();
    assert!(done.summary.ends_with("5 cleaned up"), "{}", done.summary);
    assert_eq!(app.items(), 0);
}
