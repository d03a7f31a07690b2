//! For fuzzers: what must hold of a vault's answer.

use super::{Unfound, find, refused};
use crate::secrets::{MAX_VALUE, Secret};

/// The token that is shown to the vault.
const TOKEN: &str = "hvs.CANARY";

/// An answer's body, as one that holds the secret and as one that refuses it. Whatever it says, the
/// token is not repeated (INV-10), and what is shown does nothing on a screen.
pub fn vault_answer(body: &[u8]) {
    let token = Secret::from(TOKEN.to_owned());
    match find(body, "password") {
        Ok(secret) => assert!(secret.expose().len() <= MAX_VALUE),
        Err(unfound) => {
            let missing = matches!(&unfound, Unfound::NoField(there) if there.contains(&"password".to_owned()));
            assert!(!missing, "what is there is found");
        }
    }
    for status in [200, 302, 403, 404, 501, 503] {
        let failure = refused("db", "kv/app", status, body, &token);
        let shown = format!("{}{}", failure.message, failure.hint.unwrap_or_default());
        assert!(!shown.contains(TOKEN), "{shown}");
        assert!(!shown.contains(char::is_control), "{shown:?}");
        assert!(shown.len() < 2000 && failure.last_lines.is_empty());
    }
}
