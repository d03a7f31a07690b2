//! Errors for people: the whole chain, and what to do next.

use std::error::Error;

/// An error with all its causes, each said once.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Some layers repeat what they wrap.
        if !text.ends_with(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_cause_is_said_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("cannot read /x")]
        struct Outer(#[source] std::io::Error);
        let error = Outer(std::io::Error::other("no such thing"));
        assert_eq!(super::chain(&error), "cannot read /x: no such thing");
    }
}
