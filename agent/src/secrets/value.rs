//! The type of a secret's value.

use std::fmt;

use zeroize::Zeroizing;

/// A text that may be secret: it is wiped when it is dropped, and is in no output. There is no
/// `Display` and no `Serialize`; `Debug` shows nothing of it, nor its length. Whoever needs the
/// value says [`Secret::expose`].
#[derive(Clone, Default, PartialEq, Eq)]
pub(crate) struct Secret(Zeroizing<String>);

impl Secret {
    /// The value: for whoever needs it, and for no message.
    pub(crate) fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl From<&str> for Secret {
    fn from(value: &str) -> Self {
        Self(Zeroizing::new(value.to_owned()))
    }
}

impl From<String> for Secret {
    fn from(value: String) -> Self {
        Self(Zeroizing::new(value))
    }
}
