//! Keys behind a passphrase: PKCS#8 with PBES2, as `openssl pkcs8` writes and reads it.
//!
//! PBKDF2 with HMAC-SHA-256 makes the key, AES-256 in CBC mode encrypts. Nothing else is read: a key
//! of another kind is encrypted anew with `openssl pkcs8 -topk8 -v2 aes-256-cbc`.

use std::fmt;
use std::num::NonZeroU32;

use aes::Aes256;
use cbc::cipher::block_padding::Pkcs7;
use cbc::cipher::{BlockModeDecrypt as _, BlockModeEncrypt as _, KeyIvInit as _};
use ring::pbkdf2;
use x509_parser::der_parser::asn1_rs::{Any, FromDer as _, Oid, Sequence};
use zeroize::Zeroizing;

/// The label of the PEM that this module writes and reads.
const LABEL: &str = "ENCRYPTED PRIVATE KEY";

/// As OWASP recommends for PBKDF2 with HMAC-SHA-256: about 0.2 s for each guess.
const ITERATIONS: u32 = if cfg!(test) { 1000 } else { 600_000 };

/// A file that asks for more work than this is refused: half a minute of it.
const MOST_ITERATIONS: u32 = 100_000_000;

const PBES2: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 5, 13];
const PBKDF2: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 5, 12];
const HMAC_SHA256: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 2, 9];
const AES256_CBC: &[u8] = &[0x60, 0x86, 0x48, 1, 0x65, 3, 4, 1, 42];

/// What a person types to use a key. It is wiped when it goes.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Passphrase(Zeroizing<String>);

impl Passphrase {
    /// The passphrase of this text.
    pub(crate) fn new(text: String) -> Self {
        Self(Zeroizing::new(text))
    }

    /// Whether it is none.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Passphrase(..)")
    }
}

/// Why a key cannot be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum KeyError {
    /// It was encrypted in another way.
    #[error(
        "the key is not encrypted with PBKDF2 (HMAC-SHA-256) and AES-256-CBC; encrypt it anew \
         with `openssl pkcs8 -topk8 -v2 aes-256-cbc`"
    )]
    Kind,
    /// The passphrase is another one.
    #[error("the passphrase is wrong")]
    Passphrase,
}

/// Whether a text in PEM holds a key that needs a passphrase.
pub(crate) fn is_encrypted(pem: &str) -> bool {
    pem.contains("-----BEGIN ENCRYPTED PRIVATE KEY-----")
}

/// Encrypts a key in PKCS#8, and puts it into PEM.
pub(crate) fn encrypt(pkcs8: &[u8], passphrase: &Passphrase) -> String {
    let (salt, iv): ([u8; 16], [u8; 16]) = (rand::random(), rand::random());
    let key = derive(
        passphrase,
        &salt,
        NonZeroU32::new(ITERATIONS).expect("above 0"),
    );
    let cipher = cbc::Encryptor::<Aes256>::new((&*key).into(), (&iv).into());
    let encrypted = cipher.encrypt_padded_vec::<Pkcs7>(pkcs8);

    let prf = sequence(&[tlv(6, HMAC_SHA256), tlv(5, &[])]);
    let parameters = sequence(&[tlv(4, &salt), integer(ITERATIONS), prf]);
    let derivation = sequence(&[tlv(6, PBKDF2), parameters]);
    let scheme = sequence(&[tlv(6, AES256_CBC), tlv(4, &iv)]);
    let algorithm = sequence(&[tlv(6, PBES2), sequence(&[derivation, scheme])]);
    let der = sequence(&[algorithm, tlv(4, &encrypted)]);
    pem::encode(&pem::Pem::new(LABEL, der))
}

/// The key in PKCS#8 that a text in PEM holds.
pub(crate) fn decrypt(pem: &str, passphrase: &Passphrase) -> Result<Zeroizing<Vec<u8>>, KeyError> {
    let blocks = pem::parse_many(pem).map_err(|_| KeyError::Kind)?;
    let block = blocks.iter().find(|block| block.tag() == LABEL);
    let block = block.ok_or(KeyError::Kind)?;
    let sealed = Sealed::read(block.contents()).ok_or(KeyError::Kind)?;
    let key = derive(passphrase, sealed.salt, sealed.iterations);
    let cipher = cbc::Decryptor::<Aes256>::new((&*key).into(), (&sealed.iv).into());
    let found = cipher.decrypt_padded_vec::<Pkcs7>(sealed.encrypted);
    // One wrong passphrase of 256 leaves a padding that fits; what it encloses is then no key.
    let found = Zeroizing::new(found.map_err(|_| KeyError::Passphrase)?);
    match Sequence::from_der(&found) {
        Ok(([], _)) => Ok(found),
        _ => Err(KeyError::Passphrase),
    }
}

fn derive(passphrase: &Passphrase, salt: &[u8], iterations: NonZeroU32) -> Zeroizing<[u8; 32]> {
    let mut key = Zeroizing::new([0; 32]);
    let secret = passphrase.0.as_bytes();
    pbkdf2::derive(
        pbkdf2::PBKDF2_HMAC_SHA256,
        iterations,
        salt,
        secret,
        &mut *key,
    );
    key
}

/// An encrypted key, taken apart.
struct Sealed<'a> {
    salt: &'a [u8],
    iterations: NonZeroU32,
    iv: [u8; 16],
    encrypted: &'a [u8],
}

impl<'a> Sealed<'a> {
    /// None if it is of another kind.
    fn read(der: &'a [u8]) -> Option<Self> {
        let [algorithm, encrypted] = elements(Any::from_der(der).ok()?.1.data)?;
        let [kind, parameters] = elements(algorithm.data)?;
        let [derivation, scheme] = elements(parameters.data)?;
        let [derivation_kind, derivation] = elements(derivation.data)?;
        let [scheme_kind, iv] = elements(scheme.data)?;
        // The length of the key may stand there; AES-256 has one only.
        let [salt, iterations, prf] = elements(derivation.data).or_else(|| {
            let [salt, iterations, _, prf] = elements(derivation.data)?;
            Some([salt, iterations, prf])
        })?;
        let prf = elements::<2>(prf.data)?;
        let is = |element: &Any<'_>, oid: &[u8]| {
            element
                .clone()
                .oid()
                .is_ok_and(|found: Oid<'_>| found.as_bytes() == oid)
        };
        let known = is(&kind, PBES2)
            && is(&derivation_kind, PBKDF2)
            && is(&scheme_kind, AES256_CBC)
            && is(&prf[0], HMAC_SHA256);
        let iterations = iterations
            .u32()
            .ok()
            .filter(|count| *count <= MOST_ITERATIONS);
        known.then_some(Self {
            salt: salt.data,
            iterations: NonZeroU32::new(iterations?)?,
            iv: iv.data.try_into().ok()?,
            encrypted: encrypted.data,
        })
    }
}

/// The elements of a sequence's content, if it has as many as that.
fn elements<const N: usize>(mut content: &[u8]) -> Option<[Any<'_>; N]> {
    let mut found = Vec::with_capacity(N);
    while !content.is_empty() {
        let (rest, element) = Any::from_der(content).ok()?;
        found.push(element);
        content = rest;
    }
    found.try_into().ok()
}

fn sequence(elements: &[Vec<u8>]) -> Vec<u8> {
    tlv(0x30, &elements.concat())
}

/// In as few bytes as DER wants, and positive.
fn integer(value: u32) -> Vec<u8> {
    let bytes = value.to_be_bytes();
    let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
    let mut digits = bytes[zeros.min(3)..].to_vec();
    if digits[0] & 0x80 != 0 {
        digits.insert(0, 0);
    }
    tlv(2, &digits)
}

/// Tag, length and value in DER. Keys are shorter than 64 KiB.
fn tlv(tag: u8, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(value.len()).expect("keys are short");
    let [high, low] = length.to_be_bytes();
    let mut der = vec![tag];
    match length {
        0..=0x7f => der.push(low),
        0x80..=0xff => der.extend([0x81, low]),
        _ => der.extend([0x82, high, low]),
    }
    der.extend(value);
    der
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::process::{Command, Stdio};

    use super::*;

    fn passphrase(text: &str) -> Passphrase {
        Passphrase::new(text.to_owned())
    }

    fn key() -> Vec<u8> {
        rcgen::KeyPair::generate().unwrap().serialize_der()
    }

    #[test]
    fn only_the_passphrase_gives_the_key_back() {
        let key = key();
        let sealed = encrypt(&key, &passphrase("correct horse"));
        assert!(is_encrypted(&sealed));
        assert_eq!(
            *decrypt(&sealed, &passphrase("correct horse")).unwrap(),
            key
        );
        for wrong in ["", "correct horsf", "correct horse "] {
            let refused = decrypt(&sealed, &passphrase(wrong));
            assert_eq!(refused, Err(KeyError::Passphrase), "{wrong:?}");
        }
        let shown = format!("{:?}", passphrase("correct horse"));
        assert!(!shown.contains("horse"), "{shown}");
    }

    #[test]
    fn openssl_reads_what_is_written_and_writes_what_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let key = key();
        let run = |arguments: &[&str], input: &[u8]| {
            std::fs::write(dir.path().join("passphrase"), "correct horse").unwrap();
            let mut child = Command::new("openssl")
                .args(arguments)
                .current_dir(dir.path())
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .expect("openssl is needed for this test");
            child.stdin.take().unwrap().write_all(input).unwrap();
            let output = child.wait_with_output().unwrap();
            assert!(output.status.success(), "{arguments:?}");
            output.stdout
        };
        let sealed = encrypt(&key, &passphrase("correct horse"));
        let open = ["pkcs8", "-passin", "file:passphrase", "-outform", "DER"];
        let opened = run(&open, sealed.as_bytes());
        // It gives back the same key as text of another form: without PKCS#8's public half.
        assert!(!opened.is_empty());
        let plain = pem::encode(&pem::Pem::new("PRIVATE KEY", key.clone()));
        let close = [
            "pkcs8",
            "-topk8",
            "-v2",
            "aes-256-cbc",
            "-passout",
            "file:passphrase",
        ];
        let sealed = String::from_utf8(run(&close, plain.as_bytes())).unwrap();
        let found = decrypt(&sealed, &passphrase("correct horse")).unwrap();
        rcgen::KeyPair::try_from(found.as_slice()).unwrap();
        let other = [
            "pkcs8",
            "-topk8",
            "-v2",
            "aes-128-cbc",
            "-passout",
            "file:passphrase",
        ];
        let other = String::from_utf8(run(&other, plain.as_bytes())).unwrap();
        let refused = decrypt(&other, &passphrase("correct horse"));
        assert_eq!(refused, Err(KeyError::Kind));
    }
}
