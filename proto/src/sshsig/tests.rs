use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::*;

/// Signatures by the real `ssh-keygen`.
struct Ssh {
    dir: tempfile::TempDir,
}

impl Ssh {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { dir }
    }

    fn key(&self, kind: &str) -> PathBuf {
        let path = self.dir.path().join(kind);
        let made = Command::new("ssh-keygen")
            .args(["-q", "-t", kind, "-N", "", "-C", "ann@example.com", "-f"])
            .arg(&path)
            .status()
            .expect("ssh-keygen is installed");
        assert!(made.success());
        path
    }

    fn sign(key: &Path, namespace: &str, options: &[&str], message: &[u8]) -> Vec<u8> {
        let mut child = Command::new("ssh-keygen")
            .args(["-q", "-Y", "sign", "-n", namespace])
            .args(options)
            .arg("-f")
            .arg(key)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(message).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        output.stdout
    }
}

fn public(key: &Path) -> NamedKey {
    let line = std::fs::read_to_string(key.with_extension("pub")).unwrap();
    line.parse().unwrap()
}

const NAMESPACE: &str = "lockstep-plan";
const MESSAGE: &[u8] = b"sha256:0123\n";

#[test]
fn what_ssh_keygen_signs_is_verified() {
    let ssh = Ssh::new();
    let key = ssh.key("ed25519");
    let NamedKey { key: public, name } = public(&key);
    assert_eq!(name, "ann@example.com");
    let listed = Command::new("ssh-keygen").arg("-lf").arg(&key).output();
    let listed = String::from_utf8(listed.unwrap().stdout).unwrap();
    assert!(listed.contains(&public.fingerprint()), "{listed}");
    let line = std::fs::read_to_string(key.with_extension("pub")).unwrap();
    assert!(line.starts_with(&public.to_string()));
    for options in [&[][..], &["-O", "hashalg=sha256"]] {
        let signature = Ssh::sign(&key, NAMESPACE, options, MESSAGE);
        assert_eq!(verify(&signature, NAMESPACE, MESSAGE), Ok(public.clone()));
    }
}

#[test]
fn a_signature_serves_its_own_purpose_only() {
    let ssh = Ssh::new();
    let key = ssh.key("ed25519");
    let signature = Ssh::sign(&key, "git", &[], MESSAGE);
    let error = verify(&signature, NAMESPACE, MESSAGE).unwrap_err();
    assert!(matches!(error, InvalidSignature::Namespace { .. }));
    let signature = Ssh::sign(&key, NAMESPACE, &[], MESSAGE);
    let error = verify(&signature, NAMESPACE, b"sha256:4567\n").unwrap_err();
    assert_eq!(error, InvalidSignature::Mismatch);
}

#[test]
fn other_kinds_of_keys_are_named() {
    let ssh = Ssh::new();
    let key = ssh.key("ecdsa");
    let signature = Ssh::sign(&key, NAMESPACE, &[], MESSAGE);
    let error = verify(&signature, NAMESPACE, MESSAGE).unwrap_err();
    let InvalidSignature::Key(InvalidKey::Type(kind)) = error else {
        panic!("{error}");
    };
    assert_eq!(kind, "ecdsa-sha2-nistp256");
    let line = std::fs::read_to_string(key.with_extension("pub")).unwrap();
    assert!(matches!(line.parse::<NamedKey>(), Err(InvalidKey::Type(_))));
}

/// A fixed sequence that looks random: xorshift64*.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let drawn = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33;
        usize::try_from(drawn).unwrap() % bound
    }
}

/// Flips one bit a thousand times, anywhere in the armoured signature, in what it holds, or in the
/// message.
fn flip(signature: &[u8], message: &[u8]) {
    let mut random = Random(7);
    let content = dearmour(signature).unwrap();
    for round in 0..1_000 {
        let mut parts = [signature.to_vec(), content.clone(), message.to_vec()];
        let part = &mut parts[round % 3];
        let bit = random.below(part.len() * 8);
        part[bit / 8] ^= 1 << (bit % 8);
        let [armoured, content, message] = parts;
        let armoured = match round % 3 {
            1 => armour(&content).into_bytes(),
            _ => armoured,
        };
        assert!(
            verify(&armoured, NAMESPACE, &message).is_err(),
            "bit {bit} of part {}",
            round % 3
        );
    }
}

#[test]
fn no_bit_can_be_flipped() {
    let ssh = Ssh::new();
    let key = ssh.key("ed25519");
    flip(&Ssh::sign(&key, NAMESPACE, &[], MESSAGE), MESSAGE);
    let token = Token::new();
    let signature = token.sign(NAMESPACE, USER_PRESENT, MESSAGE);
    // The token's counter and flags are signed, too.
    flip(&signature, MESSAGE);
}

#[test]
fn nothing_may_follow_or_be_left_out() {
    let ssh = Ssh::new();
    let signature = Ssh::sign(&ssh.key("ed25519"), NAMESPACE, &[], MESSAGE);
    let content = dearmour(&signature).unwrap();
    let refused = |armoured: &[u8]| verify(armoured, NAMESPACE, MESSAGE).is_err();
    for cut in 0..content.len() {
        assert!(refused(armour(&content[..cut]).as_bytes()), "{cut}");
    }
    let mut longer = content.clone();
    longer.push(0);
    assert!(refused(armour(&longer).as_bytes()));
    let text = String::from_utf8(signature).unwrap();
    assert!(refused(format!("{text}\n").as_bytes()));
    assert!(refused(text.replacen('\n', "\r\n", 1).as_bytes()));
    assert!(refused(text.trim_end().as_bytes()));
    let huge = "A".repeat(MAX_SIGNATURE_BYTES);
    assert!(refused(format!("{BEGIN}{huge}\n{END}").as_bytes()));
}

#[test]
fn a_file_holds_several_signatures_and_nothing_else() {
    let ssh = Ssh::new();
    let key = ssh.key("ed25519");
    let one = String::from_utf8(Ssh::sign(&key, NAMESPACE, &[], MESSAGE)).unwrap();
    let two = format!("{one}\n{one}");
    assert_eq!(split(&two), Ok(vec![one.as_str(), one.as_str()]));
    assert_eq!(split(""), Ok(vec![]));
    assert!(split(&format!("{one}x")).is_err());
    assert!(split(&format!("x{one}")).is_err());
    assert!(split(&one.repeat(MAX_SIGNATURES + 1)).is_err());
}

/// A hardware token as OpenSSH describes it in `PROTOCOL.u2f`: there is none to sign with here.
struct Token {
    pair: Ed25519KeyPair,
}

impl Token {
    fn new() -> Self {
        let pair = Ed25519KeyPair::from_seed_unchecked(&[9; 32]).unwrap();
        Self { pair }
    }

    fn public(&self) -> PublicKey {
        PublicKey {
            point: self.pair.public_key().as_ref().try_into().unwrap(),
            application: Some("ssh:".into()),
        }
    }

    fn sign(&self, namespace: &str, flags: u8, message: &[u8]) -> Vec<u8> {
        let digest = digest::digest(&digest::SHA512, message);
        let signed = signed(namespace, "sha512", digest.as_ref());
        let mut extra = vec![flags];
        extra.extend_from_slice(&7_u32.to_be_bytes());
        let mut whole = digest::digest(&digest::SHA256, b"ssh:").as_ref().to_vec();
        whole.extend_from_slice(&extra);
        whole.extend_from_slice(digest::digest(&digest::SHA256, &signed).as_ref());
        let mut innermost = Vec::new();
        put(&mut innermost, TOKEN.as_bytes());
        put(&mut innermost, self.pair.sign(&whole).as_ref());
        innermost.extend_from_slice(&extra);
        envelope(&self.public(), namespace, &innermost).into_bytes()
    }
}

#[test]
fn a_token_must_have_been_touched() {
    let token = Token::new();
    let touched = token.sign(NAMESPACE, USER_PRESENT, MESSAGE);
    let key = verify(&touched, NAMESPACE, MESSAGE).unwrap();
    assert_eq!(key, token.public());
    assert!(key.is_on_token());
    let again: NamedKey = format!("{key} ann").parse().unwrap();
    assert_eq!(again.key, key);
    let untouched = token.sign(NAMESPACE, 0, MESSAGE);
    let error = verify(&untouched, NAMESPACE, MESSAGE).unwrap_err();
    assert_eq!(error, InvalidSignature::NotTouched);
    // `ssh-keygen` agrees with this reading of the format.
    let ssh = Ssh::new();
    let write = |name: &str, content: &[u8]| {
        let path = ssh.dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    };
    let signers = write("signers", format!("ann {key}\n").as_bytes());
    let signature = write("signature", &touched);
    let mut child = Command::new("ssh-keygen")
        .args(["-q", "-Y", "verify", "-n", NAMESPACE, "-I", "ann", "-f"])
        .args([&signers, Path::new("-s"), &signature])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(MESSAGE).unwrap();
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_key_of_our_own_signs_as_ssh_keygen_does() {
    let key = SigningKey::from_seed(&[4; 32]);
    let armoured = key.sign(NAMESPACE, MESSAGE);
    assert_eq!(
        verify(armoured.as_bytes(), NAMESPACE, MESSAGE),
        Ok(key.public())
    );
    let bare = key.sign_bare(NAMESPACE, MESSAGE);
    let holds = |namespace, message: &[u8], bare: &[u8]| {
        key.public().verify_bare(namespace, message, bare).is_ok()
    };
    assert!(holds(NAMESPACE, MESSAGE, &bare));
    assert!(!holds("other", MESSAGE, &bare));
    assert!(!holds(NAMESPACE, b"other", &bare));
    assert!(!holds(NAMESPACE, MESSAGE, &bare[..63]));
}

#[test]
fn a_key_is_one_line() {
    let key = PublicKey::ed25519([3; 32]);
    assert_eq!(key.to_string().parse::<NamedKey>().unwrap().key, key);
    for bad in [
        "",
        "ssh-ed25519",
        "ssh-ed25519 AAAA",
        "ssh-ed25519 !!!!",
        &key.to_string().replace("ssh-ed25519", TOKEN),
        &format!("{key} a\nb"),
        &format!("{key} {}", "a".repeat(MAX_KEY_LINE)),
    ] {
        assert!(bad.parse::<NamedKey>().is_err(), "{bad}");
    }
}
