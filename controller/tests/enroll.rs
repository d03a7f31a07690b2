//! How hosts get in, and how they are put out: real connections to the real controller.

#![allow(clippy::print_stdout, reason = "figures")]

#[allow(dead_code, reason = "other tests of this crate use the rest of it")]
mod support;

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use lockstep_proto::wire::control_v1 as wire;
use lockstep_proto::wire::enroll_v1::enroll_service_client::EnrollServiceClient;
use lockstep_proto::wire::enroll_v1::{JoinRequest, RenewRequest};
use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType};
use rustix::process::Signal;
use support::{Controller, Identity, Place, SOON, hello};
use tonic::{Code, Status};

/// A request for a certificate with these names.
fn request(key: &KeyPair, uris: &[&str]) -> Vec<u8> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    let names = uris
        .iter()
        .map(|uri| SanType::URI((*uri).try_into().unwrap()));
    params.subject_alt_names = names.collect();
    params.serialize_request(key).unwrap().der().to_vec()
}

fn uri(host: &str) -> String {
    format!("spiffe://{}/agent/{host}", support::DOMAIN)
}

/// Loopback has 16 million addresses, and each has five tries a minute.
fn address(number: usize) -> [u8; 4] {
    let [.., high, low] = u32::try_from(number).unwrap().to_be_bytes();
    [127, 77, high, low]
}

async fn join(
    controller: &Controller,
    from: [u8; 4],
    token: &str,
    csr: Vec<u8>,
) -> Result<Vec<u8>, Status> {
    let channel = controller.dial_from(None, from).await;
    let channel = channel.map_err(Status::unavailable)?;
    let mut client = EnrollServiceClient::new(channel);
    let token = token.to_owned();
    let csr = csr.into();
    let answer = client.join(JoinRequest { token, csr }).await?;
    Ok(answer.into_inner().certificates[0].to_vec())
}

async fn renew(
    controller: &Controller,
    identity: &Identity,
    key: &KeyPair,
    host: &str,
) -> Result<Vec<u8>, Status> {
    let channel = controller.dial(Some(identity)).await;
    let channel = channel.map_err(Status::unavailable)?;
    let mut client = EnrollServiceClient::new(channel);
    let csr = request(key, &[&uri(host)]).into();
    let answer = client.renew(RenewRequest { csr }).await?;
    Ok(answer.into_inner().certificates[0].to_vec())
}

async fn token(api: &mut support::Api, host: &str) -> Result<wire::CreateTokenResponse, Status> {
    let host = host.to_owned();
    let request = wire::CreateTokenRequest { host, life_ms: 0 };
    Ok(api.create_token(request).await?.into_inner())
}

/// A certificate with its key, in files.
fn keep(place: &Place, name: &str, der: &[u8], key: &KeyPair) -> Identity {
    let identity = Identity {
        certificate: place.path().join(format!("{name}.crt")),
        key: place.path().join(format!("{name}.key")),
    };
    let block = pem::Pem::new("CERTIFICATE", der);
    fs::write(&identity.certificate, pem::encode(&block)).unwrap();
    fs::write(&identity.key, key.serialize_pem()).unwrap();
    identity
}

async fn suspend(api: &mut support::Api, subject: &str) {
    let request = wire::SuspendRequest {
        subject: subject.to_owned(),
        reason: "lost on a train".to_owned(),
    };
    api.suspend(request).await.unwrap();
}

#[tokio::test]
async fn a_host_joins_once_by_a_token_for_its_name() {
    let place = Place::enrolling("1h");
    let controller = place.start();
    let mut api = controller.control(&place.admin()).await;
    let made = token(&mut api, "app-1").await.unwrap();
    assert!(made.secret.starts_with("app-1:") && made.secret.len() >= 6 + 32);
    let key = KeyPair::generate().unwrap();
    let csr = |uris: &[&str]| request(&key, uris);

    let own = uri("app-1");
    for (what, token, csr, code) in [
        (
            "another token",
            "app-1:00",
            csr(&[&own]),
            Code::PermissionDenied,
        ),
        (
            "another host",
            made.secret.as_str(),
            csr(&[&uri("app-2")]),
            Code::InvalidArgument,
        ),
        (
            "two names",
            made.secret.as_str(),
            csr(&[&own, &uri("app-2")]),
            Code::InvalidArgument,
        ),
    ] {
        let refused = join(&controller, address(1), token, csr).await.unwrap_err();
        assert_eq!(refused.code(), code, "{what}: {refused:?}");
    }
    let certificate = join(&controller, address(1), &made.secret, csr(&[&own]))
        .await
        .unwrap();
    // The answer was lost.
    let again = join(&controller, address(1), &made.secret, csr(&[&own]))
        .await
        .unwrap();
    let first = keep(&place, "first", &certificate, &key);
    let second = keep(&place, "second", &again, &key);
    assert_eq!(first.serial(), second.serial());
    let other = request(&KeyPair::generate().unwrap(), &[&own]);
    let refused = join(&controller, address(2), &made.secret, other)
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused:?}");

    let session = controller.session(&first, hello("app-1")).await.unwrap();
    let refused = token(&mut api, "app-1").await.unwrap_err();
    assert!(
        refused.message().contains("lockstep forget app-1"),
        "{refused:?}"
    );
    // Only the hash is at rest.
    let secret = made.secret.split_once(':').unwrap().1.as_bytes();
    drop(session);
    assert_eq!(controller.terminate(), Some(0));
    for file in walk(&place.path().join("state")) {
        let bytes = fs::read(&file).unwrap();
        let found = bytes.windows(secret.len()).any(|window| window == secret);
        assert!(!found, "{}", file.display());
    }
    assert!(!place.log().contains(made.secret.as_str()));
}

fn walk(directory: &std::path::Path) -> Vec<std::path::PathBuf> {
    let entries = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let each = entries.flat_map(|path| {
        if path.is_dir() {
            walk(&path)
        } else {
            vec![path]
        }
    });
    each.collect()
}

#[tokio::test]
async fn a_token_survives_a_restart_and_so_does_its_end() {
    let place = Place::enrolling("1h");
    let controller = place.start();
    let admin = place.admin();
    let mut api = controller.control(&admin).await;
    let [one, two] = ["app-1", "app-2"].map(ToOwned::to_owned);
    let used = token(&mut api, &one).await.unwrap();
    let revoked = token(&mut api, &two).await.unwrap();
    let token = revoked.token.clone();
    api.revoke_token(wire::RevokeTokenRequest { token })
        .await
        .unwrap();
    controller.kill();

    let controller = place.start();
    let key = KeyPair::generate().unwrap();
    let csr = request(&key, &[&uri("app-1")]);
    join(&controller, address(3), &used.secret, csr)
        .await
        .unwrap();
    let csr = request(&key, &[&uri("app-2")]);
    let refused = join(&controller, address(3), &revoked.secret, csr)
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused:?}");
    controller.kill();

    let controller = place.start();
    let other = request(&KeyPair::generate().unwrap(), &[&uri("app-1")]);
    let refused = join(&controller, address(4), &used.secret, other)
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused:?}");
    let mut api = controller.control(&admin).await;
    let listed = api
        .list_tokens(wire::ListTokensRequest {})
        .await
        .unwrap()
        .into_inner();
    let states: Vec<&str> = listed
        .tokens
        .iter()
        .map(|token| token.state.as_str())
        .collect();
    assert_eq!(states, ["used", "revoked"]);
}

#[tokio::test]
async fn an_address_that_guesses_is_slowed_down_and_others_are_not() {
    let place = Place::enrolling("1h");
    let controller = place.start();
    let mut codes = Vec::new();
    for guess in 0..7 {
        let token = format!("app-1:{guess:040}");
        let csr = request(&KeyPair::generate().unwrap(), &[&uri("app-1")]);
        codes.push(
            join(&controller, address(5), &token, csr)
                .await
                .unwrap_err()
                .code(),
        );
    }
    assert_eq!(codes[..5], [Code::PermissionDenied; 5]);
    assert_eq!(codes[5..], [Code::ResourceExhausted; 2]);
    let csr = request(&KeyPair::generate().unwrap(), &[&uri("app-1")]);
    let other = join(&controller, address(6), "app-1:0", csr)
        .await
        .unwrap_err();
    assert_eq!(other.code(), Code::PermissionDenied);
    // What is too large is not looked at.
    let large = join(&controller, address(7), "app-1:0", vec![0; 64 << 10])
        .await
        .unwrap_err();
    assert_eq!(large.code(), Code::OutOfRange, "{large:?}");
}

/// Each from an address of its own, so that nothing but the token is in the way.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_thousand_redemptions_of_one_token_give_one_certificate() {
    const REDEMPTIONS: usize = 1000;
    let place = Place::enrolling("1h");
    let controller = Arc::new(place.start());
    let mut api = controller.control(&place.admin()).await;
    let made = token(&mut api, "app-1").await.unwrap();
    let begin = Arc::new(tokio::sync::Barrier::new(REDEMPTIONS));
    let retried = Arc::new(AtomicUsize::new(0));
    let mut tasks = Vec::new();
    for number in 0..REDEMPTIONS {
        let (controller, begin) = (Arc::clone(&controller), Arc::clone(&begin));
        let (secret, retried) = (made.secret.clone(), Arc::clone(&retried));
        tasks.push(tokio::spawn(async move {
            let key = KeyPair::generate().unwrap();
            begin.wait().await;
            let deadline = Instant::now() + 6 * SOON;
            // One that finds the door full comes back: what counts is the token's answer.
            for attempt in 0.. {
                assert!(Instant::now() < deadline, "no answer in time");
                let from = address(1000 + number + attempt / 4 * REDEMPTIONS);
                let csr = request(&key, &[&uri("app-1")]);
                match join(&controller, from, &secret, csr).await {
                    Ok(certificate) => return Some(certificate),
                    Err(status) if status.code() == Code::PermissionDenied => {
                        assert!(status.message().contains("used already"), "{status:?}");
                        return None;
                    }
                    Err(_) => {
                        retried.fetch_add(1, Ordering::Relaxed);
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                }
            }
            unreachable!("it ends by an answer");
        }));
    }
    let begun = Instant::now();
    let mut certificates = Vec::new();
    for task in tasks {
        certificates.extend(task.await.unwrap());
    }
    println!(
        "{REDEMPTIONS} redemptions: {} certificate in {:?}, {} turned away at the door first",
        certificates.len(),
        begun.elapsed(),
        retried.load(Ordering::Relaxed)
    );
    assert_eq!(certificates.len(), 1);
    let let_in = place.log().matches("a host was let in").count();
    assert_eq!(let_in, 1);
}

#[tokio::test]
async fn a_renewal_is_answered_again_and_a_copy_suspends_the_host() {
    let place = Place::enrolling("1h");
    let controller = place.start();
    let admin = place.admin();
    let first = place.agent("app-1");
    let key = KeyPair::generate().unwrap();
    let certificate = renew(&controller, &first, &key, "app-1").await.unwrap();
    let again = renew(&controller, &first, &key, "app-1").await.unwrap();
    let second = keep(&place, "second", &certificate, &key);
    assert_eq!(
        second.serial(),
        keep(&place, "again", &again, &key).serial()
    );
    let other = KeyPair::generate().unwrap();
    let refused = renew(&controller, &second, &other, "app-2")
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied, "{refused:?}");

    let mut session = controller.session(&second, hello("app-1")).await.unwrap();
    let copy = renew(&controller, &first, &other, "app-1")
        .await
        .unwrap_err();
    assert!(copy.message().contains("two machines"), "{copy:?}");
    let end = session.next().await.unwrap_err();
    assert_eq!(end.code(), Code::PermissionDenied, "{end:?}");
    controller.kill();

    let controller = place.start();
    assert!(controller.session(&second, hello("app-1")).await.is_err());
    let mut api = controller.control(&admin).await;
    let listed = api
        .list_suspended(wire::ListSuspendedRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(listed.suspended[0].subject, "host:app-1");
    assert!(
        listed.suspended[0].operator.is_empty(),
        "the controller said so"
    );
    let subject = "host:app-1".to_owned();
    api.unsuspend(wire::UnsuspendRequest { subject })
        .await
        .unwrap();
    controller.session(&second, hello("app-1")).await.unwrap();
}

#[tokio::test]
async fn the_agents_list_holds_whoever_is_suspended() {
    let place = Place::enrolling("1h");
    let controller = place.start();
    let mut api = controller.control(&place.admin()).await;
    let first = place.agent("app-1");
    let key = KeyPair::generate().unwrap();
    let certificate = renew(&controller, &first, &key, "app-1").await.unwrap();
    let second = keep(&place, "second", &certificate, &key);
    suspend(&mut api, "serial:ab12").await;
    suspend(&mut api, "host:app-1").await;
    let deadline = Instant::now() + SOON;
    loop {
        let listed = api
            .list_suspended(wire::ListSuspendedRequest {})
            .await
            .unwrap();
        let list = listed.into_inner().agent_crl;
        fs::write(place.path().join("agents.crl"), &list).unwrap();
        let output = std::process::Command::new("openssl")
            .args([
                "crl",
                "-noout",
                "-text",
                "-CAfile",
                "ca-agents.crt",
                "-in",
                "agents.crl",
            ])
            .current_dir(place.path())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout).to_lowercase();
        if said.contains("ab12") && said.contains(&second.serial()) {
            let verified = String::from_utf8_lossy(&output.stderr).contains("verify OK");
            assert!(verified, "{output:?}");
            break;
        }
        assert!(Instant::now() < deadline, "{said}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn an_operators_revocation_list_is_taken_while_it_runs() {
    let place = Place::new();
    let list = place.path().join("operators.crl");
    let file = place.path().join("controller.toml");
    let config = fs::read_to_string(&file).unwrap();
    let config = config.replace("[tls]", "[tls]\noperator_crl = \"operators.crl\"");
    fs::write(&file, config).unwrap();
    let (olga, dora) = (place.operator("olga", &[]), place.operator("dora", &[]));
    fs::write(&list, place.operators_list(&[], 3600)).unwrap();
    let controller = place.start();
    let read = async |identity: &Identity| {
        let channel = controller
            .dial(Some(identity))
            .await
            .map_err(Status::unavailable)?;
        let mut api = wire::control_service_client::ControlServiceClient::new(channel);
        api.list_hosts(wire::ListHostsRequest {}).await.map(|_| ())
    };
    read(&olga).await.unwrap();
    let mut connected = controller.control(&olga).await;
    connected
        .list_hosts(wire::ListHostsRequest {})
        .await
        .unwrap();

    fs::write(&list, place.operators_list(&[&olga], 3600)).unwrap();
    controller.signal(Signal::HUP);
    let deadline = Instant::now() + SOON;
    while connected
        .list_hosts(wire::ListHostsRequest {})
        .await
        .is_ok()
    {
        assert!(Instant::now() < deadline, "{}", place.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(read(&olga).await.is_err());
    read(&dora).await.unwrap();

    // One that has ended is no list: nobody knows who was revoked since.
    fs::write(&list, place.operators_list(&[], -10)).unwrap();
    controller.signal(Signal::HUP);
    let deadline = Instant::now() + SOON;
    while read(&dora).await.is_ok() {
        assert!(Instant::now() < deadline, "{}", place.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // Agents are not concerned.
    let agent = place.agent("app-1");
    controller.session(&agent, hello("app-1")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_thousand_agents_are_put_out_each_within_two_seconds() {
    const AGENTS: usize = 1000;
    let place = Place::enrolling("1h");
    let controller = Arc::new(place.start());
    let mut api = controller.control(&place.admin()).await;
    let mut sessions = Vec::new();
    for first in (0..AGENTS).step_by(20) {
        let batch = (first..first + 20).map(|number| {
            let controller = Arc::clone(&controller);
            let host = format!("h-{number}");
            let agent = place.agent(&host);
            tokio::spawn(async move {
                let session = controller.session(&agent, hello(&host)).await.unwrap();
                (host, session)
            })
        });
        for task in batch.collect::<Vec<_>>() {
            sessions.push(task.await.unwrap());
        }
    }
    // One who watches is put out as well; it stays for last.
    let mut ends = Vec::new();
    let mut asked = Vec::new();
    for (host, mut session) in sessions {
        let end = tokio::spawn(async move {
            let deadline = Instant::now() + 10 * SOON;
            while Instant::now() < deadline {
                let next = tokio::time::timeout(10 * SOON, session.down.message()).await;
                if let Err(status) = next.expect("an end in time") {
                    return (Instant::now(), status);
                }
            }
            panic!("the session goes on");
        });
        let begun = Instant::now();
        suspend(&mut api, &format!("host:{host}")).await;
        asked.push(begun.elapsed());
        ends.push((Instant::now(), end));
    }
    let mut took = Vec::new();
    for (answered, end) in ends {
        let (at, status) = end.await.unwrap();
        assert_eq!(status.code(), Code::PermissionDenied, "{status:?}");
        took.push(at.saturating_duration_since(answered));
    }
    took.sort();
    asked.sort();
    let of = |all: &[Duration], part: usize| all[(all.len() - 1) * part / 100];
    println!(
        "{AGENTS} agents: a suspension is durable after {:?} (p99 {:?}); the stream has ended after \
         another {:?} (p99 {:?}, longest {:?})",
        of(&asked, 50),
        of(&asked, 99),
        of(&took, 50),
        of(&took, 99),
        of(&took, 100)
    );
    assert!(of(&took, 100) < Duration::from_secs(2));
    // And none of them comes back.
    let agent = place.agent("h-1");
    let begun = Instant::now();
    assert!(controller.session(&agent, hello("h-1")).await.is_err());
    assert!(begun.elapsed() < Duration::from_secs(1));
}

#[test]
fn an_issuer_that_is_not_the_agents_is_found_at_the_start() {
    let place = Place::enrolling("1h");
    let file = place.path().join("controller.toml");
    let config = fs::read_to_string(&file).unwrap();
    fs::write(&file, config.replace("ca-agents.key", "ca-operators.key")).unwrap();
    let (code, log) = place.fail();
    assert_eq!(code, Some(2), "{log}");
    assert!(log.contains("is that of no issuer in"), "{log}");
}
