//! Keys that are trusted, and how many of them must have signed.

use std::collections::BTreeSet;
use std::fmt;

use crate::sshsig::{self, NamedKey};

/// Trusted keys, of which a number must have signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keyring {
    threshold: usize,
    keys: Vec<NamedKey>,
}

/// Keys that cannot be used together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidKeyring {
    /// Nothing would have to be signed.
    #[error("`threshold` is at least 1")]
    NoThreshold,
    /// More signers are asked for than there are.
    #[error("`threshold` is {threshold}, and there are {people} signers")]
    TooFew {
        /// How many must sign.
        threshold: usize,
        /// How many there are.
        people: usize,
    },
    /// A key stands there twice.
    #[error("the key {0} stands there twice")]
    Twice(String),
}

/// Too few good signatures, with what is known of each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotSigned {
    /// How many must have signed.
    pub threshold: usize,
    /// Who has, by name.
    pub signers: BTreeSet<String>,
    /// What is wrong with the others.
    pub others: Vec<String>,
}

impl fmt::Display for NotSigned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            threshold,
            signers,
            others,
        } = self;
        write!(f, "{} of {threshold} signatures", signers.len())?;
        if !signers.is_empty() {
            let names: Vec<&str> = signers.iter().map(String::as_str).collect();
            write!(f, " (by {})", names.join(", "))?;
        }
        for other in others {
            write!(f, "; not counted: {other}")?;
        }
        Ok(())
    }
}

impl std::error::Error for NotSigned {}

impl Keyring {
    /// Trusts these keys. Keys with one name are one person's: they count once, however many of
    /// them sign.
    pub fn new(threshold: usize, keys: Vec<NamedKey>) -> Result<Self, InvalidKeyring> {
        let mut seen = BTreeSet::new();
        if let Some(twice) = keys.iter().find(|named| !seen.insert(&named.key)) {
            return Err(InvalidKeyring::Twice(twice.key.fingerprint()));
        }
        if threshold == 0 {
            return Err(InvalidKeyring::NoThreshold);
        }
        let people: BTreeSet<String> = keys.iter().map(name).collect();
        if people.len() < threshold {
            let people = people.len();
            return Err(InvalidKeyring::TooFew { threshold, people });
        }
        Ok(Self { threshold, keys })
    }

    /// How many must sign.
    pub fn threshold(&self) -> usize {
        self.threshold
    }

    /// The keys.
    pub fn keys(&self) -> &[NamedKey] {
        &self.keys
    }

    /// Who has signed `message` for this purpose, if they are enough.
    pub fn check(
        &self,
        namespace: &str,
        message: &[u8],
        signatures: &[impl AsRef<[u8]>],
    ) -> Result<BTreeSet<String>, NotSigned> {
        let mut signers = BTreeSet::new();
        let mut others = Vec::new();
        for (signature, number) in signatures.iter().zip(1..) {
            match sshsig::verify(signature.as_ref(), namespace, message) {
                Ok(key) => match self.keys.iter().find(|named| named.key == key) {
                    Some(named) if signers.insert(name(named)) => {}
                    Some(named) => others.push(format!("another one by {}", name(named))),
                    None => others.push(format!(
                        "one by the key {}, which is not trusted",
                        key.fingerprint()
                    )),
                },
                Err(error) => others.push(format!("signature {number}: {error}")),
            }
        }
        if signers.len() >= self.threshold {
            Ok(signers)
        } else {
            Err(NotSigned {
                threshold: self.threshold,
                signers,
                others,
            })
        }
    }
}

/// What a signer is called: a key without a name by its fingerprint.
fn name(named: &NamedKey) -> String {
    if named.name.is_empty() {
        named.key.fingerprint()
    } else {
        named.name.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sshsig::{PublicKey, SigningKey};

    fn keyring(
        threshold: usize,
        signers: &[(&SigningKey, &str)],
    ) -> Result<Keyring, InvalidKeyring> {
        let named = |(signer, name): &(&SigningKey, &str)| NamedKey {
            key: signer.public(),
            name: (*name).to_owned(),
        };
        Keyring::new(threshold, signers.iter().map(named).collect())
    }

    #[test]
    fn each_person_counts_once() {
        let [ann, spare, ben, eve] = [1, 2, 3, 4].map(|seed| SigningKey::from_seed(&[seed; 32]));
        let keys = [(&ann, "ann"), (&spare, "ann"), (&ben, "ben")];
        let ring = keyring(2, &keys).unwrap();
        let sign = |signer: &SigningKey| signer.sign("n", b"m");
        let count = |signatures: &[String]| match ring.check("n", b"m", signatures) {
            Ok(_) => 2,
            Err(error) => error.signers.len(),
        };
        assert_eq!(count(&[sign(&ann), sign(&ben)]), 2);
        assert_eq!(count(&[]), 0);
        assert_eq!(count(&[sign(&ann)]), 1);
        assert_eq!(count(&[sign(&ann), sign(&ann)]), 1);
        assert_eq!(count(&[sign(&ann), sign(&spare)]), 1);
        assert_eq!(count(&[sign(&ann), sign(&eve)]), 1);
        assert_eq!(count(&[sign(&ann), ben.sign("other", b"m")]), 1);
        assert_eq!(count(&[sign(&ann), ben.sign("n", b"other")]), 1);
        let error = ring.check("n", b"m", &[sign(&ann), sign(&eve), "x".into()]);
        let said = error.unwrap_err().to_string();
        assert!(said.starts_with("1 of 2 signatures (by ann)"), "{said}");
        assert!(said.contains(&eve.public().fingerprint()), "{said}");
        assert!(said.contains("signature 3: it is not"), "{said}");
    }

    #[test]
    fn keys_that_can_never_suffice_are_refused() {
        let [ann, spare] = [1, 2].map(|seed| SigningKey::from_seed(&[seed; 32]));
        let refused =
            |threshold, keys: &[(&SigningKey, &str)]| keyring(threshold, keys).unwrap_err();
        let none = refused(0, &[(&ann, "ann")]);
        assert_eq!(none, InvalidKeyring::NoThreshold);
        let few = refused(2, &[(&ann, "ann"), (&spare, "ann")]);
        assert!(matches!(few, InvalidKeyring::TooFew { people: 1, .. }));
        let twice = refused(1, &[(&ann, "ann"), (&ann, "ben")]);
        assert!(matches!(twice, InvalidKeyring::Twice(_)));
        // Keys without a name are told apart by what they are.
        assert!(keyring(2, &[(&ann, ""), (&spare, "")]).is_ok());
        let unnamed = NamedKey {
            key: PublicKey::ed25519([5; 32]),
            name: String::new(),
        };
        assert!(name(&unnamed).starts_with("SHA256:"));
    }
}
