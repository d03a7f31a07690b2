//! Who somebody is, and who has signed what.

use std::sync::OnceLock;

use lockstep_core::trust::{Serial, Subject};
use lockstep_proto::floor::Floor;
use lockstep_proto::ids::{BootId, Digest, HostId, InstanceId, RolloutId, StepKey};
use lockstep_proto::sshsig::{self, NamedKey, SigningKey};
use lockstep_proto::trust::Keyring;
use lockstep_proto::values::{ByteSize, Period};
use lockstep_proto::wire::control_v1::{DecideRequest, ResolveRequest};
use lockstep_proto::witness::{self, Account};

/// The trust domain of all certificates here.
const DOMAIN: &str = "example.com";

const NAMESPACE: &str = "lockstep-plan";
const MESSAGE: &[u8] = b"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\n";

/// Two people, and what they have signed. Nobody can make another signature of theirs: Ed25519 has
/// one of each message.
struct Signers {
    keyring: Keyring,
    signatures: [String; 2],
}

fn signers() -> &'static Signers {
    static SIGNERS: OnceLock<Signers> = OnceLock::new();
    SIGNERS.get_or_init(|| {
        let keys = [1, 2].map(|seed| SigningKey::from_seed(&[seed; 32]));
        let named = ["ann", "ben"]
            .into_iter()
            .zip(&keys)
            .map(|(name, key)| NamedKey {
                key: key.public(),
                name: name.to_owned(),
            });
        Signers {
            keyring: Keyring::new(1, named.collect()).expect("two keys"),
            signatures: keys.map(|key| key.sign(NAMESPACE, MESSAGE)),
        }
    })
}

/// A signature that counts.
pub(crate) fn genuine(index: usize) -> String {
    signers().signatures[index].clone()
}

/// A file of signatures, a key as `authorized_keys` has it, or (behind a 0) what is in the armour
/// of a signature. What counts is what was made, byte for byte.
pub(crate) fn signature(bytes: &[u8]) {
    let Signers {
        keyring,
        signatures,
    } = signers();
    let counts = |armoured: &[u8]| {
        let counted = keyring.check(NAMESPACE, MESSAGE, &[armoured]);
        let made = signatures.iter().any(|made| made.as_bytes() == armoured);
        assert_eq!(
            counted.is_ok(),
            made,
            "{}",
            String::from_utf8_lossy(armoured)
        );
        if let Err(error) = counted {
            let said = error.to_string();
            assert!(!said.contains(char::is_control), "{said:?}");
        }
        for (namespace, message) in [("lockstep-floor", MESSAGE), (NAMESPACE, b"other\n")] {
            assert!(keyring.check(namespace, message, &[armoured]).is_err());
        }
    };
    if let [0, content @ ..] = bytes {
        return counts(armoured(content).as_bytes());
    }
    counts(bytes);
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    if let Ok(parts) = sshsig::split(text) {
        let bare = |text: &str| text.replace('\n', "");
        assert_eq!(bare(&parts.concat()), bare(text), "nothing is passed over");
        for part in parts {
            counts(part.as_bytes());
        }
    }
    if let Ok(named) = text.parse::<NamedKey>() {
        let line = format!("{} {}", named.key, named.name);
        assert_eq!(line.parse().as_ref(), Ok(&named));
        assert!(!line.contains(char::is_control), "{line:?}");
    }
}

/// As `ssh-keygen` wraps it: 70 characters a line.
fn armoured(content: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::from("-----BEGIN SSH SIGNATURE-----\n");
    let mut column = 0;
    for three in content.chunks(3) {
        let padded = [
            0,
            three[0],
            *three.get(1).unwrap_or(&0),
            *three.get(2).unwrap_or(&0),
        ];
        let number = u32::from_be_bytes(padded);
        for place in 0..4 {
            let six = (number >> (18 - 6 * place)) & 63;
            text.push(if place > three.len() {
                '='
            } else {
                char::from(LETTERS[six as usize])
            });
            column += 1;
            if column == 70 {
                text.push('\n');
                column = 0;
            }
        }
    }
    if column > 0 {
        text.push('\n');
    }
    text.push_str("-----END SSH SIGNATURE-----\n");
    text
}

/// A URI: both sides read the same names, and only as they are written.
pub(crate) fn san(bytes: &[u8]) {
    let Ok(uri) = std::str::from_utf8(bytes) else {
        return;
    };
    agree(
        lockstep::fuzzing::san(uri, DOMAIN),
        lockstep_agent::fuzzing::san(uri),
    );
}

/// A certificate: what the controller takes for an agent's or an operator's, the agent takes for
/// the same.
pub(crate) fn certificate(bytes: &[u8]) {
    agree(
        lockstep::fuzzing::certificate_name(bytes, DOMAIN),
        lockstep_agent::fuzzing::certificate_name(bytes),
    );
}

fn agree(controller: Option<(&str, String)>, agent: Option<(String, String, String)>) {
    match (controller, agent) {
        (Some((role, name)), Some(agent)) => {
            assert_eq!(
                (DOMAIN, role, name.as_str()),
                (&*agent.0, &*agent.1, &*agent.2)
            );
        }
        (Some(claimed), None) => panic!("only the controller reads {claimed:?}"),
        // The controller is asked by agents and operators of one domain only.
        (None, Some((domain, role, name))) => {
            let host = name.parse::<HostId>();
            assert!(
                domain != DOMAIN || role != "agent" || host.is_err(),
                "{name}"
            );
        }
        (None, None) => {}
    }
}

pub(crate) fn enrolment(bytes: &[u8]) {
    lockstep::fuzzing::csr(bytes);
}

/// Short texts and statements: each has one form, in which it comes back.
pub(crate) fn statements(bytes: &[u8]) {
    lockstep::fuzzing::head_slot(bytes);
    if let Ok(floor) = Floor::read(bytes) {
        assert_eq!(floor.encode(), bytes);
    }
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    macro_rules! one_form {
        ($($id:ty)*) => {$(
            if let Ok(id) = text.parse::<$id>() {
                assert_eq!(id.to_string(), text);
            }
        )*};
    }
    one_form!(HostId RolloutId InstanceId BootId StepKey);
    // These are read in several forms, and written in one.
    macro_rules! written_in_one_form {
        ($($id:ty)*) => {$(
            if let Ok(id) = text.parse::<$id>() {
                let written = id.to_string();
                let again = written.parse::<$id>();
                assert_eq!(again.expect("it was just written"), id);
            }
        )*};
    }
    written_in_one_form!(Digest Period ByteSize Serial Subject);
    if let Ok(serial) = text.parse::<Serial>() {
        assert_eq!(Serial::from_bytes(&serial.to_bytes()), serial);
    }
    let decide = DecideRequest {
        gate: text.to_owned(),
        ..DecideRequest::default()
    };
    if let Ok(Some(place)) = decide.place() {
        assert_eq!(place.to_string(), text);
    }
    let resolve = ResolveRequest {
        step: text.to_owned(),
        ..ResolveRequest::default()
    };
    if let Ok(place) = resolve.place() {
        assert_eq!(place.to_string(), text);
    }
    witnesses(text);
}

/// Heads that others have written down, held against a journal.
fn witnesses(text: &str) {
    let Ok(witnesses) = witness::read(text) else {
        return;
    };
    let lines: Vec<String> = witnesses
        .iter()
        .map(|witness| serde_json::to_string(witness).expect("it can be written"))
        .collect();
    assert_eq!(
        witness::read(&lines.join("\n")).expect("it was just written"),
        witnesses
    );
    let hash = |number: u64| Digest::of(&number.to_be_bytes());
    for witness in &witnesses {
        let account = Account {
            journal: &witness.head.journal,
            first: 3,
            last: 9,
            taken_over: &[(6, 2)],
        };
        // As if every head up to there were the journal's.
        for all in [true, false] {
            let known = |number: u64| {
                (number <= 9).then(|| if all { witness.head.hash } else { hash(number) })
            };
            let judgement = witness::judge(&witnesses, account, known);
            assert!(judgement.through <= 9);
            assert_eq!(judgement.why().is_some(), !judgement.against.is_empty());
            judgement.lines();
        }
    }
}
