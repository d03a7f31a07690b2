//! SSH public keys and signatures, as `ssh-keygen` writes them: Ed25519, in software or on a
//! hardware token.
//!
//! ```text
//! key        ssh-ed25519 BASE64 [name]            one line
//! signature  -----BEGIN SSH SIGNATURE-----        `ssh-keygen -Y sign -n NAMESPACE`
//!            SSHSIG | version | key | namespace | reserved | hash | signature
//! signed     SSHSIG | namespace | reserved | hash | H(message)
//! ```
//!
//! A signature is good for one namespace only, so that what was signed for one purpose serves no
//! other. There is one accepted form of each: no other wrapping, no bytes after the end.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use ring::digest;
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey};

use crate::seal::{MAX_SIGNATURE_BYTES, MAX_SIGNATURES};

/// The largest line that holds a public key, in bytes.
pub const MAX_KEY_LINE: usize = 1 << 10;

const MAGIC: &[u8; 6] = b"SSHSIG";
const BEGIN: &str = "-----BEGIN SSH SIGNATURE-----\n";
const END: &str = "-----END SSH SIGNATURE-----\n";
const ARMOUR_WIDTH: usize = 70;

const VERSION: u32 = 1;
const SHA512: &str = "sha512";
const SHA256: &str = "sha256";

const SOFTWARE: &str = "ssh-ed25519";
const TOKEN: &str = "sk-ssh-ed25519@openssh.com";

/// In a token's flags: somebody touched it.
const USER_PRESENT: u8 = 1;

/// A key that is none, or of a kind that is not used here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidKey {
    /// Not `TYPE BASE64 [name]` on one line.
    #[error("it is not one line of `ssh-ed25519 BASE64 [name]`")]
    Form,
    /// Another type of key.
    #[error("keys of type `{0}` are not used here: make one with `ssh-keygen -t ed25519`")]
    Type(String),
    /// The base64 part is not a key of this type.
    #[error("what follows `{0}` is no key of that type")]
    Content(&'static str),
}

/// A signature that proves nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSignature {
    /// More than [`MAX_SIGNATURE_BYTES`].
    #[error("it has more than {MAX_SIGNATURE_BYTES} bytes")]
    TooLarge,
    /// Not an armoured SSH signature, or not in its one form.
    #[error("it is not an SSH signature as `ssh-keygen -Y sign` writes it")]
    Form,
    /// Made with a key that is not used here.
    #[error("it was made with a key that is not used here")]
    Key(#[source] InvalidKey),
    /// Made for something else.
    #[error("it was made for `{found}`, not for `{expected}`")]
    Namespace {
        /// What it has to be for.
        expected: String,
        /// What it is for, its unprintable characters escaped.
        found: String,
    },
    /// Another digest than those that `ssh-keygen` offers.
    #[error("its hash is neither sha512 nor sha256")]
    Hash,
    /// Made by a hardware token that nobody touched.
    #[error("the hardware token made it without being touched")]
    NotTouched,
    /// It is not the key's signature of this message.
    #[error("it does not match what was signed")]
    Mismatch,
}

/// An Ed25519 public key in SSH's form.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey {
    point: [u8; 32],
    /// Only for a key on a hardware token.
    application: Option<String>,
}

impl PublicKey {
    /// A key held in software, from its 32 bytes.
    pub fn ed25519(point: [u8; 32]) -> Self {
        Self {
            point,
            application: None,
        }
    }

    /// The 32 bytes of the key itself.
    pub fn point(&self) -> &[u8; 32] {
        &self.point
    }

    /// Whether the key is on a hardware token that has to be touched.
    pub fn is_on_token(&self) -> bool {
        self.application.is_some()
    }

    /// As `ssh-keygen -l` shows it: `SHA256:` and 43 characters.
    pub fn fingerprint(&self) -> String {
        let digest = digest::digest(&digest::SHA256, &self.blob());
        format!("SHA256:{}", STANDARD_NO_PAD.encode(digest))
    }

    /// Whether these 64 bytes are this key's signature of `message` for this purpose, with sha512.
    /// Only for keys held in software: a token signs more than the message.
    pub fn verify_bare(
        &self,
        namespace: &str,
        message: &[u8],
        signature: &[u8],
    ) -> Result<(), InvalidSignature> {
        if self.is_on_token() {
            return Err(InvalidSignature::Form);
        }
        let digest = digest::digest(&digest::SHA512, message);
        let signed = signed(namespace, SHA512, digest.as_ref());
        UnparsedPublicKey::new(&ED25519, &self.point)
            .verify(&signed, signature)
            .map_err(|_| InvalidSignature::Mismatch)
    }

    fn kind(&self) -> &'static str {
        match self.application {
            None => SOFTWARE,
            Some(_) => TOKEN,
        }
    }

    fn blob(&self) -> Vec<u8> {
        let mut blob = Vec::new();
        put(&mut blob, self.kind().as_bytes());
        put(&mut blob, &self.point);
        if let Some(application) = &self.application {
            put(&mut blob, application.as_bytes());
        }
        blob
    }

    fn from_blob(blob: &[u8]) -> Result<Self, InvalidKey> {
        let mut rest = Reader(blob);
        let kind = rest.text().ok_or(InvalidKey::Form)?;
        let kind = match kind {
            SOFTWARE => SOFTWARE,
            TOKEN => TOKEN,
            other => return Err(InvalidKey::Type(printable(other))),
        };
        let mut read = || {
            let point = rest.string()?.try_into().ok()?;
            let application = match kind {
                TOKEN => Some(rest.text()?.to_owned()),
                _ => None,
            };
            rest.0.is_empty().then_some(Self { point, application })
        };
        read().ok_or(InvalidKey::Content(kind))
    }

    /// Whether `signature`, the innermost part of an SSH signature, is this key's of `signed`.
    fn check(&self, signed: &[u8], signature: &[u8]) -> Result<(), InvalidSignature> {
        let mut rest = Reader(signature);
        if rest.text() != Some(self.kind()) {
            return Err(InvalidSignature::Form);
        }
        let proof = rest.string().filter(|proof| proof.len() == 64);
        let proof = proof.ok_or(InvalidSignature::Form)?;
        let key = UnparsedPublicKey::new(&ED25519, &self.point);
        let mismatch = |_| InvalidSignature::Mismatch;
        let Some(application) = &self.application else {
            rest.ends()?;
            return key.verify(signed, proof).map_err(mismatch);
        };
        // A token signs with its own flags and counter between two digests.
        let extra = rest.take(5).ok_or(InvalidSignature::Form)?;
        rest.ends()?;
        let mut whole = Vec::with_capacity(32 + 5 + 32);
        let application = digest::digest(&digest::SHA256, application.as_bytes());
        whole.extend_from_slice(application.as_ref());
        whole.extend_from_slice(extra);
        whole.extend_from_slice(digest::digest(&digest::SHA256, signed).as_ref());
        key.verify(&whole, proof).map_err(mismatch)?;
        if extra[0] & USER_PRESENT == 0 {
            return Err(InvalidSignature::NotTouched);
        }
        Ok(())
    }
}

/// As in `authorized_keys`, without a name.
impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind(), STANDARD.encode(self.blob()))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({})", self.fingerprint())
    }
}

/// A key held in software, to sign with.
pub struct SigningKey(Ed25519KeyPair);

impl SigningKey {
    /// The key that 32 random bytes stand for.
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        let pair = Ed25519KeyPair::from_seed_unchecked(seed);
        Self(pair.expect("any 32 bytes are a seed"))
    }

    /// Its public half.
    pub fn public(&self) -> PublicKey {
        let point = self.0.public_key().as_ref().try_into();
        PublicKey::ed25519(point.expect("an Ed25519 key has 32 bytes"))
    }

    /// Only the 64 bytes that an SSH signature is built around; see [`PublicKey::verify_bare`].
    pub fn sign_bare(&self, namespace: &str, message: &[u8]) -> [u8; 64] {
        let digest = digest::digest(&digest::SHA512, message);
        let signature = self.0.sign(&signed(namespace, SHA512, digest.as_ref()));
        let bytes = signature.as_ref().try_into();
        bytes.expect("an Ed25519 signature has 64 bytes")
    }

    /// An armoured SSH signature.
    pub fn sign(&self, namespace: &str, message: &[u8]) -> String {
        let mut innermost = Vec::new();
        put(&mut innermost, SOFTWARE.as_bytes());
        put(&mut innermost, &self.sign_bare(namespace, message));
        envelope(&self.public(), namespace, &innermost)
    }
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SigningKey({})", self.public().fingerprint())
    }
}

/// An armoured signature around its innermost part.
fn envelope(key: &PublicKey, namespace: &str, innermost: &[u8]) -> String {
    let mut content = MAGIC.to_vec();
    content.extend_from_slice(&VERSION.to_be_bytes());
    let parts = [
        &key.blob()[..],
        namespace.as_bytes(),
        b"",
        SHA512.as_bytes(),
    ];
    for part in parts.into_iter().chain([innermost]) {
        put(&mut content, part);
    }
    armour(&content)
}

/// A public key with the name that its owner wrote after it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedKey {
    /// The key.
    pub key: PublicKey,
    /// What follows it on its line; empty if nothing does.
    pub name: String,
}

impl FromStr for NamedKey {
    type Err = InvalidKey;

    fn from_str(line: &str) -> Result<Self, InvalidKey> {
        let line = line.trim();
        if line.len() > MAX_KEY_LINE || line.contains(char::is_control) {
            return Err(InvalidKey::Form);
        }
        let (kind, rest) = line.split_once(' ').ok_or(InvalidKey::Form)?;
        let (content, name) = rest.split_once(' ').unwrap_or((rest, ""));
        let blob = STANDARD.decode(content).map_err(|_| InvalidKey::Form)?;
        let key = PublicKey::from_blob(&blob)?;
        if key.kind() != kind {
            return Err(InvalidKey::Form);
        }
        let name = name.trim().to_owned();
        Ok(Self { key, name })
    }
}

/// Whether an armoured signature is one of `message` for this purpose; answers with the key that
/// made it. Whether that key is trusted is the caller's to say.
pub fn verify(
    armoured: &[u8],
    namespace: &str,
    message: &[u8],
) -> Result<PublicKey, InvalidSignature> {
    use InvalidSignature::Form;
    if armoured.len() > MAX_SIGNATURE_BYTES {
        return Err(InvalidSignature::TooLarge);
    }
    let content = dearmour(armoured).ok_or(Form)?;
    let mut rest = Reader(&content);
    if rest.take(MAGIC.len()) != Some(MAGIC) || rest.number() != Some(VERSION) {
        return Err(Form);
    }
    let key = PublicKey::from_blob(rest.string().ok_or(Form)?).map_err(InvalidSignature::Key)?;
    let purpose = rest.string().ok_or(Form)?;
    if purpose != namespace.as_bytes() {
        return Err(InvalidSignature::Namespace {
            expected: namespace.to_owned(),
            found: printable(&String::from_utf8_lossy(purpose)),
        });
    }
    if !rest.string().ok_or(Form)?.is_empty() {
        // Reserved, and what may stand there one day has a meaning that is not known here.
        return Err(Form);
    }
    let hash = rest.text().ok_or(Form)?;
    let algorithm = match hash {
        SHA512 => &digest::SHA512,
        SHA256 => &digest::SHA256,
        _ => return Err(InvalidSignature::Hash),
    };
    let signature = rest.string().ok_or(Form)?;
    rest.ends()?;
    let signed = signed(namespace, hash, digest::digest(algorithm, message).as_ref());
    key.check(&signed, signature)?;
    Ok(key)
}

/// What the key signs.
fn signed(namespace: &str, hash: &str, digest: &[u8]) -> Vec<u8> {
    let mut signed = MAGIC.to_vec();
    for part in [namespace.as_bytes(), b"", hash.as_bytes(), digest] {
        put(&mut signed, part);
    }
    signed
}

/// The armoured signatures in a file, one after the other. Nothing else may stand there but empty
/// lines between them.
pub fn split(text: &str) -> Result<Vec<&str>, InvalidSignature> {
    let mut found = Vec::new();
    let mut rest = text.trim_start_matches('\n');
    while !rest.is_empty() {
        let end = rest.find(END).ok_or(InvalidSignature::Form)? + END.len();
        let (one, others) = rest.split_at(end);
        if !one.starts_with(BEGIN) || found.len() == MAX_SIGNATURES {
            return Err(InvalidSignature::Form);
        }
        found.push(one);
        rest = others.trim_start_matches('\n');
    }
    Ok(found)
}

/// The content of an armoured signature, if it is in its one form.
fn dearmour(armoured: &[u8]) -> Option<Vec<u8>> {
    let text = std::str::from_utf8(armoured).ok()?;
    let body = text.strip_prefix(BEGIN)?.strip_suffix(END)?;
    let packed: String = body.split('\n').collect();
    let content = STANDARD.decode(packed).ok()?;
    (armour(&content) == text).then_some(content)
}

fn armour(content: &[u8]) -> String {
    let packed = STANDARD.encode(content);
    let mut text = String::from(BEGIN);
    let mut rest = packed.as_str();
    while !rest.is_empty() {
        let (line, others) = rest.split_at(rest.len().min(ARMOUR_WIDTH));
        text.push_str(line);
        text.push('\n');
        rest = others;
    }
    text.push_str(END);
    text
}

fn printable(text: &str) -> String {
    let short: String = text.chars().take(64).collect();
    short.escape_default().to_string()
}

/// Appends a length and the bytes.
fn put(bytes: &mut Vec<u8>, part: &[u8]) {
    let length = u32::try_from(part.len()).expect("a part of a signature is short");
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes.extend_from_slice(part);
}

/// What is left to be read.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    fn number(&mut self) -> Option<u32> {
        let bytes = self.take(4)?;
        Some(u32::from_be_bytes(bytes.try_into().expect("4 bytes")))
    }

    fn string(&mut self) -> Option<&'a [u8]> {
        let length = self.number()?;
        self.take(usize::try_from(length).ok()?)
    }

    fn text(&mut self) -> Option<&'a str> {
        std::str::from_utf8(self.string()?).ok()
    }

    fn ends(&self) -> Result<(), InvalidSignature> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(InvalidSignature::Form)
        }
    }
}

#[cfg(test)]
mod tests;
