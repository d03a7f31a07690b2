//! `lockstep serve` as a process: who gets in, what is refused, and how it ends.

#[allow(dead_code, reason = "other tests of this crate use the rest of it")]
#[path = "support/agent.rs"]
mod agent;
#[allow(dead_code, reason = "other tests of this crate use the rest of it")]
mod support;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use lockstep_proto::wire::agent_v1::{Epoch, Report, Up, down, up};
use lockstep_proto::wire::control_v1 as control;
use rustix::process::Signal;
use support::{Identity, Place, SOON, hello, pki};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

/// What becomes of a call with this identity: a code, or words from below gRPC.
async fn list_hosts(
    controller: &support::Controller,
    identity: Option<&Identity>,
) -> Result<control::ListHostsResponse, (Code, String)> {
    let channel = controller.dial(identity).await;
    let channel = channel.map_err(|error| (Code::Unavailable, error))?;
    let mut client = control::control_service_client::ControlServiceClient::new(channel);
    let answer = client.list_hosts(control::ListHostsRequest {}).await;
    answer
        .map(tonic::Response::into_inner)
        .map_err(|status| (status.code(), format!("{status:?}")))
}

#[tokio::test]
async fn only_a_certificate_of_its_roles_issuer_gets_in() {
    let place = Place::new();
    let controller = place.start();
    let operator = place.operator("dora", &["dba"]);
    list_hosts(&controller, Some(&operator)).await.unwrap();

    // Another installation's operator, of the same domain and name.
    let elsewhere = Place::new();
    let foreign = elsewhere.operator("dora", &["dba"]);
    // An operator's name, signed by the agents' issuer.
    let crossed = place.path().join("crossed");
    fs::create_dir(&crossed).unwrap();
    fs::copy(place.pki().join("domain"), crossed.join("domain")).unwrap();
    for kind in ["crt", "key"] {
        let agents = place.pki().join(format!("ca-agents.{kind}"));
        fs::copy(agents, crossed.join(format!("ca-operators.{kind}"))).unwrap();
    }
    let controllers = "ca-controllers.crt";
    fs::copy(place.pki().join(controllers), crossed.join(controllers)).unwrap();
    let crossed = Identity::of(
        pki::issue_operator(&crossed, &pki::Person::new("eve", &[]), &crossed).unwrap(),
    );
    let server = Identity {
        certificate: place.path().join("controller-c1.crt"),
        key: place.path().join("controller-c1.key"),
    };
    for (what, identity) in [
        ("no certificate", None),
        ("a foreign issuer", Some(&foreign)),
        ("the agents' issuer", Some(&crossed)),
        ("a controller", Some(&server)),
    ] {
        let (code, error) = list_hosts(&controller, identity).await.unwrap_err();
        assert!(
            !matches!(code, Code::PermissionDenied | Code::Unauthenticated),
            "{what} was let through the handshake: {error}"
        );
    }
    // The client is told little; the reasons stand in the controller's log.
    for reason in [
        "no certificate was shown",
        "it was not signed by the issuer that it names",
        "of an issuer that is not trusted",
        "spiffe://example.com/controller/c1",
    ] {
        wait_for(|| place.log().contains(reason)).await;
    }
    list_hosts(&controller, Some(&operator)).await.unwrap();
}

#[tokio::test]
async fn a_role_makes_its_own_calls_only() {
    let place = Place::new();
    let controller = place.start();
    let agent = place.agent("app-1");
    let (code, error) = list_hosts(&controller, Some(&agent)).await.unwrap_err();
    assert_eq!(code, Code::PermissionDenied, "{error}");
    let operator = place.operator("dora", &[]);
    let refused = controller.session(&operator, hello("app-1")).await;
    assert_eq!(refused.unwrap_err().code(), Code::PermissionDenied);
}

#[test]
fn tls_1_2_is_refused() {
    let place = Place::new();
    let controller = place.start();
    // A ClientHello of TLS 1.2 with one of its cipher suites, and no `supported_versions`.
    let mut body = vec![3, 3];
    body.extend([7; 32]);
    body.extend([0, 0, 2, 0xc0, 0x2b, 1, 0, 0, 14]);
    body.extend([0, 13, 0, 4, 0, 2, 4, 3, 0, 10, 0, 2, 0, 0]);
    let length = u8::try_from(body.len()).unwrap();
    let mut record = vec![22, 3, 1, 0, length + 4, 1, 0, 0, length];
    record.extend(body);
    let mut stream = TcpStream::connect(controller.address).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.write_all(&record).unwrap();
    let mut answer = [0; 7];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(answer[0], 21, "an alert: {answer:?}");
    assert_eq!(answer[5], 2, "a fatal one: {answer:?}");
}

#[test]
fn a_peer_that_does_not_shake_hands_is_left_and_harms_nobody() {
    let place = Place::new();
    let controller = place.start();
    let mut silent = TcpStream::connect(controller.address).unwrap();
    for _ in 0..300 {
        let mut garbage = TcpStream::connect(controller.address).unwrap();
        garbage.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let operator = place.operator("dora", &[]);
    runtime.block_on(async {
        list_hosts(&controller, Some(&operator)).await.unwrap();
    });
    let begun = Instant::now();
    silent.set_read_timeout(Some(SOON)).unwrap();
    assert_eq!(silent.read(&mut [0; 1]).unwrap_or(0), 0, "it is closed");
    assert!(begun.elapsed() < Duration::from_secs(10));
}

#[test]
fn connections_that_say_nothing_take_nobodys_turn() {
    let place = Place::new();
    let controller = place.start();
    let connect = |_| TcpStream::connect(controller.address).unwrap();
    let silent: Vec<TcpStream> = (0..640).map(connect).collect();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let operator = place.operator("dora", &[]);
    let begun = Instant::now();
    runtime.block_on(async {
        list_hosts(&controller, Some(&operator)).await.unwrap();
    });
    // One after another, 64 at a time, they would take 50 seconds.
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(20), "{took:?}");
    drop(silent);
}

#[tokio::test]
async fn an_agent_that_introduces_itself_wrongly_is_refused() {
    let place = Place::new();
    let controller = place.start();
    let agent = place.agent("app-1");
    let with = |change: fn(&mut lockstep_proto::wire::agent_v1::Hello)| {
        let mut hello = hello("app-1");
        change(&mut hello);
        hello
    };
    for (what, hello, code) in [
        (
            "versions",
            with(|hello| (hello.min_version, hello.max_version) = (7, 9)),
            Code::FailedPrecondition,
        ),
        ("another host", hello("app-2"), Code::PermissionDenied),
        (
            "no instance",
            with(|hello| hello.instance.clear()),
            Code::InvalidArgument,
        ),
        (
            "huge labels",
            with(|hello| {
                let label = |number: usize| (format!("l{number}"), "\u{1}".repeat(400));
                hello.labels = (0..60).map(label).collect();
            }),
            Code::InvalidArgument,
        ),
    ] {
        let refused = controller.session(&agent, hello).await.unwrap_err();
        assert_eq!(refused.code(), code, "{what}: {}", refused.message());
    }
    let report = Up {
        message: Some(up::Message::Report(Report::default())),
    };
    let mut client = controller.agents(&agent).await;
    let refused = client.session(tokio_stream::once(report)).await;
    assert_eq!(refused.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test]
async fn one_host_has_one_session() {
    let place = Place::new();
    let controller = place.start();
    let agent = place.agent("app-1");
    let mut first = controller.session(&agent, hello("app-1")).await.unwrap();
    let mut other = hello("app-1");
    other.instance = "in_0000000000000002".to_owned();
    let refused = controller.session(&agent, other).await.unwrap_err();
    assert_eq!(refused.code(), Code::AlreadyExists);
    assert!(refused.message().contains("127.0.0.1"), "{refused:?}");

    let mut again = controller.session(&agent, hello("app-1")).await.unwrap();
    assert_eq!(again.epoch, first.epoch);
    let end = first.next().await.unwrap_err();
    assert_eq!(end.code(), Code::Aborted, "{end:?}");
    // The newer one is not disturbed by the older one's end.
    let quiet = tokio::time::timeout(Duration::from_millis(300), again.next()).await;
    assert!(quiet.is_err(), "{quiet:?}");
}

#[tokio::test]
async fn an_agent_speaks_for_its_own_host_only() {
    let place = Place::new();
    let controller = place.start();
    let agent = place.agent("app-1");
    let mut session = controller.session(&agent, hello("app-1")).await.unwrap();
    let key = r#"{"rollout":"ro_010203040506","host":"app-2","phase":0,"step":0,"direction":"do","attempt":1}"#;
    let report = Report {
        number: 1,
        body_json: format!(r#"{{"started":{{"key":{key}}}}}"#).into(),
        head: None,
    };
    let report = up::Message::Report(report);
    let message = Some(report);
    session.up.send(Up { message }).await.unwrap();
    let end = session.next().await.unwrap_err();
    assert_eq!(end.code(), Code::InvalidArgument);
    assert!(end.message().contains("app-2"), "{end:?}");
}

#[tokio::test]
async fn a_silent_stream_is_ended() {
    let place = Place::new();
    let controller = place.start();
    let agent = place.agent("app-1");
    let mut client = controller.agents(&agent).await;
    let (_up, receiver) = mpsc::channel::<Up>(1);
    let begun = Instant::now();
    let refused = client.session(ReceiverStream::new(receiver)).await;
    assert_eq!(refused.unwrap_err().code(), Code::DeadlineExceeded);
    assert!(begun.elapsed() < Duration::from_secs(15));
}

#[tokio::test]
async fn each_term_is_newer_and_a_newer_one_ends_the_controller() {
    let place = Place::new();
    let agent = place.agent("app-1");
    let controller = place.start();
    let first = controller.session(&agent, hello("app-1")).await.unwrap();
    controller.kill();

    let mut controller = place.start();
    let mut known = hello("app-1");
    known.highest_epoch = Some(first.epoch);
    let second = controller.session(&agent, known.clone()).await.unwrap();
    assert!(second.epoch.counter > first.epoch.counter);

    let newer = second.epoch.counter + 5;
    known.highest_epoch = Some(Epoch {
        counter: newer,
        id: 1,
    });
    let refused = controller.session(&agent, known.clone()).await;
    assert!(refused.is_err());
    assert_eq!(controller.wait(), Some(12), "{}", place.log());
    assert!(place.log().contains("--epoch-above"), "{}", place.log());

    let controller = place.start_with(&["--epoch-above", &newer.to_string()]);
    let third = controller.session(&agent, known).await.unwrap();
    assert_eq!(third.epoch.counter, newer + 1);
}

// With threads of its own, so that the client goes on while the test waits for the process.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_controller_drains_when_it_is_told_to_end() {
    let place = Place::new();
    let agent = place.agent("app-1");
    let mut controller = place.start();
    let mut session = controller.session(&agent, hello("app-1")).await.unwrap();
    let begun = Instant::now();
    controller.signal(Signal::TERM);
    match session.next().await.unwrap().message {
        Some(down::Message::Drain(drain)) => assert!(drain.reconnect_after_ms > 0),
        other => panic!("{other:?}"),
    }
    let end = session.next().await.unwrap_err();
    assert_eq!(end.code(), Code::Ok, "{end:?}");
    assert_eq!(controller.wait(), Some(0), "{}", place.log());
    assert!(begun.elapsed() < Duration::from_secs(2), "{}", place.log());
    place.start();
}

#[test]
fn a_second_controller_on_the_same_state_is_refused() {
    let place = Place::new();
    let _controller = place.start();
    let (code, log) = place.fail();
    assert_eq!(code, Some(12), "{log}");
    assert!(log.contains("another controller runs on"), "{log}");
}

#[test]
fn a_damaged_journal_is_quarantined_and_left_as_it_is() {
    let place = Place::new();
    for _ in 0..3 {
        assert_eq!(place.start().terminate(), Some(0));
    }
    let store = place.path().join("state/journal/store/db");
    let whole = fs::read(&store).unwrap();
    // Three terms are a few hundred bytes of it.
    fs::write(&store, &whole[..200]).unwrap();
    let damaged = fs::read(&store).unwrap();
    let (code, log) = place.fail();
    assert_eq!(code, Some(10), "{log}");
    assert!(log.contains("quarantined"), "{log}");
    assert_eq!(fs::read(&store).unwrap(), damaged);
    fs::write(&store, whole).unwrap();
    place.start();

    fs::rename(
        place.path().join("state/journal"),
        place.path().join("journal"),
    )
    .unwrap();
    let (code, log) = place.fail();
    assert_eq!(code, Some(10), "{log}");
}

#[tokio::test]
async fn new_certificates_are_taken_while_it_runs() {
    let place = Place::new();
    let controller = place.start();
    let agent = place.agent("app-1");
    let mut session = controller.session(&agent, hello("app-1")).await.unwrap();
    let old = place.operator("dora", &[]);
    let other = Place::new();
    let new = other.operator("erik", &[]);
    assert!(list_hosts(&controller, Some(&new)).await.is_err());

    // What cannot be used changes nothing.
    let issuers = place.path().join("ca-operators.crt");
    fs::write(&issuers, "not a certificate").unwrap();
    controller.signal(Signal::HUP);
    wait_for(|| place.log().contains("the old ones stay")).await;
    list_hosts(&controller, Some(&old)).await.unwrap();

    // Whoever is connected goes with the issuer: a thief that holds it must not stay.
    let mut open = controller.control(&old).await;
    let ask = control::ListHostsRequest {};
    open.list_hosts(ask).await.unwrap();
    fs::copy(other.path().join("ca-operators.crt"), &issuers).unwrap();
    controller.signal(Signal::HUP);
    wait_for(|| place.log().contains("were read again")).await;
    list_hosts(&controller, Some(&new)).await.unwrap();
    assert!(list_hosts(&controller, Some(&old)).await.is_err());
    assert!(open.list_hosts(ask).await.is_err(), "it is connected still");
    // Sessions that are up stay up.
    let quiet = tokio::time::timeout(Duration::from_millis(300), session.next()).await;
    assert!(quiet.is_err(), "{quiet:?}");

    fs::copy(
        other.path().join("ca-agents.crt"),
        place.path().join("ca-agents.crt"),
    )
    .unwrap();
    controller.signal(Signal::HUP);
    let ended = tokio::time::timeout(SOON, session.next()).await;
    let refused = ended.expect("its issuer is trusted no more").unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused:?}");
    wait_for(|| place.log().contains("a connection is cut")).await;
}

#[tokio::test]
async fn what_is_too_large_or_no_plan_is_refused() {
    let place = Place::new();
    let controller = place.start();
    let operator = place.operator("dora", &[]);
    let mut client = controller.control(&operator).await;
    let mut submit = async |compiled_plan: Vec<u8>| {
        let request = control::SubmitRequest {
            compiled_plan: compiled_plan.into(),
            ..control::SubmitRequest::default()
        };
        client.submit(request).await.unwrap_err()
    };
    let refused = submit(vec![b'x'; 5 << 20]).await;
    assert_eq!(refused.code(), Code::OutOfRange, "{refused:?}");
    let refused = submit(b"{}".to_vec()).await;
    assert_eq!(refused.code(), Code::InvalidArgument);
    let mut client = controller.control(&operator).await;
    for rollout in ["", "ro_1", "../etc"] {
        let rollout = rollout.to_owned();
        let request = control::GetRolloutRequest { rollout };
        let refused = client.get_rollout(request).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
    }
    let rollout = "ro_010203040506".to_owned();
    let request = control::WatchRequest { rollout, after: 0 };
    let refused = client.watch(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
}

#[tokio::test]
async fn what_is_refused_leaves_nothing_on_the_disk() {
    let place = Place::new();
    let controller = place.start();
    let mut operator = controller.control(&place.operator("dora", &[])).await;
    let request = |serial, dry_run| control::SubmitRequest {
        compiled_plan: agent::plan(serial).bytes().to_vec().into(),
        source: "version: 1".to_owned(),
        dry_run,
        ..control::SubmitRequest::default()
    };
    let kept = || {
        fs::read_dir(place.path().join("state/blobs"))
            .unwrap()
            .count()
    };
    // There is no host for it.
    operator.submit(request(1, false)).await.unwrap_err();
    assert_eq!(kept(), 0);
    let identity = place.agent("app-1");
    let app = agent::Agent::connect(&controller, identity.clone(), 0).await;
    let submitted = operator
        .submit(request(1, false))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(kept(), 2);
    // The host is taken, and the plan is another rollout's.
    operator.submit(request(1, false)).await.unwrap_err();
    assert_eq!(kept(), 2);
    operator.submit(request(2, false)).await.unwrap_err();
    assert_eq!(kept(), 2);

    // Output of what was never ordered.
    for step in ["0.0.do.1", "9.9.do.1"] {
        let chunk = lockstep_proto::wire::agent_v1::LogChunk {
            key: format!("{}.{step}@app-1", submitted.rollout),
            data: vec![b'x'].into(),
            ..Default::default()
        };
        let mut client = controller.agents(&identity).await;
        let refused = client.logs(tokio_stream::iter([chunk])).await.unwrap_err();
        assert_eq!(refused.code(), Code::NotFound, "{refused:?}");
    }
    assert!(
        !place
            .path()
            .join("state/logs")
            .join(&submitted.rollout)
            .exists()
    );
    drop(app);

    // Somebody who cannot be asked for it is suspended at the start.
    controller.kill();
    let controller = place.start_with(&["--suspend", "host:app-1"]);
    controller
        .session(&identity, hello("app-1"))
        .await
        .unwrap_err();
}

async fn wait_for(mut met: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !met() {
        assert!(Instant::now() < deadline, "not met in time");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
