//! JSON as it comes from journals and peers.

use serde::de::{DeserializeOwned, Error as _};

/// Reads a value. Whether it is text is found out for all of it at once: `serde_json::from_slice`
/// asks that of each name and string it does not skip, which is a sixth of what a record takes. The
/// agent reads everything this way: a type that is read in two ways is in it twice.
///
/// # Errors
///
/// It is no JSON, or that of something else.
pub fn read<T: DeserializeOwned>(json: &[u8]) -> Result<T, serde_json::Error> {
    let text = std::str::from_utf8(json).map_err(serde_json::Error::custom)?;
    serde_json::from_str(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_text_is_refused_with_its_place() {
        assert_eq!(read::<String>("\"ö\"".as_bytes()).unwrap(), "ö");
        let why = read::<String>(b"\"o\xff\"").unwrap_err().to_string();
        assert_eq!(why, "invalid utf-8 sequence of 1 bytes from index 2");
        let why = read::<u8>(b"1 2").unwrap_err().to_string();
        assert!(why.contains("trailing"), "{why}");
    }
}
