//! Text from elsewhere, made fit for a terminal. Hosts, plans and controllers write names, summaries,
//! output and notes; none of them may move a cursor, change a colour or hide a word on the screen of
//! whoever reads them.

use std::fmt::Write as _;

/// What stands in the place of a character that is not shown.
const REPLACED: char = '\u{fffd}';

/// One line without control characters; tabs and line breaks become spaces.
pub fn line(text: &str) -> String {
    let shown = text.chars().map(|c| match c {
        '\t' | '\n' | '\r' => ' ',
        c => visible(c),
    });
    shown.collect()
}

/// Several lines without control characters but the line breaks and tabs.
pub fn lines(text: &str) -> String {
    let shown = text.chars().map(|c| match c {
        '\t' | '\n' => c,
        c => visible(c),
    });
    shown.collect()
}

/// JSON text in which no control character stands as itself: what it says is unchanged, for
/// outside of its strings JSON has none of them but white space.
pub fn json(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    for c in text.chars() {
        if c != '\n' && visible(c) == REPLACED && c != REPLACED {
            let mut units = [0; 2];
            for unit in c.encode_utf16(&mut units) {
                let _ = write!(clean, "\\u{unit:04x}");
            }
        } else {
            clean.push(c);
        }
    }
    clean
}

/// Whether a character stands where it is and is seen there: control characters (C0, DEL, C1) and
/// those that reorder or hide text do not.
pub fn is_shown(c: char) -> bool {
    let hides = matches!(c,
        '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}'
        | '\u{feff}' | '\u{e0000}'..='\u{e007f}');
    !c.is_control() && !hides
}

fn visible(c: char) -> char {
    if is_shown(c) { c } else { REPLACED }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    const HOSTILE: &str = "a\u{1b}[2Jb\u{9b}31mc\rd\u{7}e\u{202e}f\ng";

    #[test]
    fn nothing_that_moves_a_cursor_survives() {
        assert_eq!(
            line(HOSTILE),
            "a\u{fffd}[2Jb\u{fffd}31mc d\u{fffd}e\u{fffd}f g"
        );
        assert!(!lines(HOSTILE).contains(['\u{1b}', '\u{9b}', '\r', '\u{7}', '\u{202e}']));
        assert!(lines(HOSTILE).contains('\n'));
    }

    #[test]
    fn names_in_any_script_stay() {
        assert_eq!(line("Zoë 東京 ✓ …"), "Zoë 東京 ✓ …");
    }

    #[test]
    fn cleaned_json_says_the_same() {
        let said = serde_json::json!({ HOSTILE: [HOSTILE, {"x": 1}] });
        let text = json(&serde_json::to_string_pretty(&said).unwrap());
        assert!(
            text.chars().all(|c| c == '\n' || visible(c) == c),
            "{text:?}"
        );
        assert_eq!(serde_json::from_str::<Value>(&text).unwrap(), said);
    }
}
