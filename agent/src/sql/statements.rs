//! SQL texts taken apart: statements, and the words in them, each with its line.
//!
//! It reads as the server's own lexer does (with `standard_conforming_strings` on): comments nest,
//! strings may be dollar-quoted, and the body of an SQL-standard function holds semicolons.

/// A statement of an SQL text.
#[derive(Debug, Clone)]
pub(crate) struct Statement<'a> {
    /// From its first word to before the semicolon.
    pub(crate) text: &'a str,
    /// The line of its first word, counted from 1.
    pub(crate) line: usize,
    /// What it consists of, without comments.
    pub(crate) tokens: Vec<Token<'a>>,
}

/// A word, name, value or sign.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Token<'a> {
    /// What it is.
    pub(crate) kind: Kind,
    /// As it is written.
    pub(crate) text: &'a str,
    /// The line it begins on, counted from 1.
    pub(crate) line: usize,
}

/// What a token is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A key word, or a name without quotes.
    Word,
    /// A name in double quotes.
    Name,
    /// A string, of whatever quotes.
    Text,
    /// A number.
    Number,
    /// Anything else: one character, or `::`.
    Sign,
}

impl Token<'_> {
    /// Whether it is this key word.
    pub(crate) fn is(&self, word: &str) -> bool {
        self.kind == Kind::Word && self.text.eq_ignore_ascii_case(word)
    }

    /// Whether it is this sign.
    pub(crate) fn is_sign(&self, sign: &str) -> bool {
        self.kind == Kind::Sign && self.text == sign
    }
}

impl Statement<'_> {
    /// Whether it begins with these key words.
    pub(crate) fn begins(&self, words: &[&str]) -> bool {
        words.len() <= self.tokens.len()
            && words
                .iter()
                .zip(&self.tokens)
                .all(|(word, token)| token.is(word))
    }

    /// Whether it begins or ends a transaction.
    pub(crate) fn is_transaction_control(&self) -> bool {
        const VERBS: &[&str] = &["BEGIN", "START", "COMMIT", "END", "ROLLBACK", "ABORT"];
        let to_savepoint = || {
            let mut words = self.tokens.iter().skip(1).filter(|it| !it.is("WORK"));
            self.begins(&["ROLLBACK"]) && words.next().is_some_and(|word| word.is("TO"))
        };
        VERBS.iter().any(|verb| self.begins(&[verb])) && !to_savepoint()
            || self.begins(&["PREPARE", "TRANSACTION"])
    }
}

/// The statements of a text. What no quote closes goes to its end.
pub(crate) fn statements(sql: &str) -> Vec<Statement<'_>> {
    let mut reader = Reader {
        sql,
        at: 0,
        line: 1,
    };
    let mut found = Vec::new();
    let mut tokens: Vec<Token<'_>> = Vec::new();
    let mut begins = 0;
    let mut nesting = Nesting::default();
    while let Some((at, token)) = reader.next() {
        if token.is_sign(";") && nesting.is_outside() {
            finish(&mut found, &mut tokens, &sql[begins..at]);
            nesting = Nesting::default();
            continue;
        }
        if tokens.is_empty() {
            begins = at;
        }
        nesting.see(&tokens, token);
        tokens.push(token);
    }
    finish(&mut found, &mut tokens, &sql[begins.min(sql.len())..]);
    found
}

fn finish<'a>(found: &mut Vec<Statement<'a>>, tokens: &mut Vec<Token<'a>>, text: &'a str) {
    if let Some(first) = tokens.first() {
        found.push(Statement {
            text: text.trim_end(),
            line: first.line,
            tokens: std::mem::take(tokens),
        });
    }
}

/// How deep in parentheses, and in a function's body (`BEGIN ATOMIC ... END`), a token is.
#[derive(Default)]
struct Nesting {
    parentheses: usize,
    blocks: usize,
}

impl Nesting {
    fn is_outside(&self) -> bool {
        self.parentheses == 0 && self.blocks == 0
    }

    fn opens(&self, before: &[Token<'_>], token: Token<'_>) -> bool {
        let begins = before.last().is_some_and(|last| last.is("BEGIN"));
        token.is("ATOMIC") && begins || self.blocks > 0 && token.is("CASE")
    }

    fn see(&mut self, before: &[Token<'_>], token: Token<'_>) {
        if token.is_sign("(") {
            self.parentheses += 1;
        } else if token.is_sign(")") {
            self.parentheses = self.parentheses.saturating_sub(1);
        } else if self.opens(before, token) {
            self.blocks += 1;
        } else if self.blocks > 0 && token.is("END") {
            self.blocks -= 1;
        }
    }
}

struct Reader<'a> {
    sql: &'a str,
    at: usize,
    line: usize,
}

impl<'a> Reader<'a> {
    /// The next token and where it begins.
    fn next(&mut self) -> Option<(usize, Token<'a>)> {
        self.skip();
        let (at, line) = (self.at, self.line);
        let rest = &self.sql[at..];
        let first = rest.chars().next()?;
        let (kind, length) = if let Some(length) = string(rest) {
            (Kind::Text, length)
        } else if first == '"' {
            (Kind::Name, quoted(rest, 0, '"', false))
        } else if is_letter(first) {
            (Kind::Word, word(rest))
        } else if first.is_ascii_digit() {
            let fit = |c: char| c.is_ascii_alphanumeric() || c == '.' || c == '_';
            (Kind::Number, rest.find(|c| !fit(c)).unwrap_or(rest.len()))
        } else if rest.starts_with("::") {
            (Kind::Sign, 2)
        } else {
            (Kind::Sign, first.len_utf8())
        };
        let text = &rest[..length];
        self.advance(length);
        Some((at, Token { kind, text, line }))
    }

    /// Goes on behind blanks and comments.
    fn skip(&mut self) {
        loop {
            let rest = &self.sql[self.at..];
            let blanks = rest.len()
                - rest
                    .trim_start_matches([' ', '\t', '\r', '\n', '\u{feff}', '\x0b', '\x0c'])
                    .len();
            let length = if blanks > 0 {
                blanks
            } else if rest.starts_with("--") {
                rest.find('\n').unwrap_or(rest.len())
            } else if rest.starts_with("/*") {
                comment(rest)
            } else {
                return;
            };
            self.advance(length);
        }
    }

    fn advance(&mut self, length: usize) {
        let passed = &self.sql[self.at..self.at + length];
        self.line += passed.matches('\n').count();
        self.at += length;
    }
}

fn is_letter(c: char) -> bool {
    c.is_ascii_alphabetic() || c == '_' || !c.is_ascii()
}

fn word(rest: &str) -> usize {
    let fit = |c: char| is_letter(c) || c.is_ascii_digit() || c == '$';
    rest.find(|c| !fit(c)).unwrap_or(rest.len())
}

/// The length of a comment, with those inside of it.
fn comment(rest: &str) -> usize {
    let (mut depth, mut at) = (0, 0);
    while at < rest.len() {
        let here = &rest.as_bytes()[at..];
        if here.starts_with(b"/*") {
            (depth, at) = (depth + 1, at + 2);
        } else if here.starts_with(b"*/") {
            (depth, at) = (depth - 1, at + 2);
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    rest.len()
}

/// The length of a string, if one begins here.
fn string(rest: &str) -> Option<usize> {
    let bytes = rest.as_bytes();
    match bytes {
        [b'\'', ..] => Some(quoted(rest, 0, '\'', false)),
        [b'e' | b'E', b'\'', ..] => Some(quoted(rest, 1, '\'', true)),
        [b'b' | b'B' | b'x' | b'X' | b'n' | b'N', b'\'', ..] => Some(quoted(rest, 1, '\'', false)),
        [b'u' | b'U', b'&', b'\'', ..] => Some(quoted(rest, 2, '\'', false)),
        [b'$', ..] => {
            let tag = rest[1..].find('$')? + 2;
            let name = &rest[1..tag - 1];
            let is_tag = name.chars().all(|c| is_letter(c) || c.is_ascii_digit())
                && !name.starts_with(|c: char| c.is_ascii_digit());
            is_tag.then(|| {
                let close = rest[tag..].find(&rest[..tag]);
                close.map_or(rest.len(), |at| tag + at + tag)
            })
        }
        _ => None,
    }
}

/// The length of what is in quotes that begin at `open`; twice the quote is one of its own.
fn quoted(rest: &str, open: usize, quote: char, backslashes: bool) -> usize {
    let mut chars = rest[open + 1..].char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        if backslashes && c == '\\' {
            chars.next();
        } else if c == quote && chars.next_if(|(_, next)| *next == quote).is_none() {
            return open + 1 + at + 1;
        }
    }
    rest.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(sql: &str) -> Vec<&str> {
        statements(sql).iter().map(|one| one.text).collect()
    }

    #[test]
    fn semicolons_in_quotes_comments_and_bodies_end_nothing() {
        for one in [
            "SELECT ';', 'it''s;', E'\\';', \"a;\"\"b\", U&'\\003B;' FROM t",
            "SELECT 1 -- ; not yet\n + 2 /* ; /* ; */ ; */ + 3",
            "CREATE FUNCTION f() RETURNS int AS $body$ SELECT 1; $$ ; $body$ LANGUAGE sql",
            "CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT CASE WHEN true THEN 1 END; \
             SELECT 2; END",
            "CREATE RULE r AS ON INSERT TO t DO (INSERT INTO a VALUES (1); DELETE FROM b)",
            "PREPARE p AS SELECT $1, a$b FROM t",
        ] {
            assert_eq!(texts(&format!("{one};\n SELECT 9")), [one, "SELECT 9"]);
        }
    }

    #[test]
    fn empty_statements_are_none_and_open_quotes_go_to_the_end() {
        assert!(texts(" ; ;; -- nothing\n /* ; */ ").is_empty());
        for open in [
            "SELECT 'a; b",
            "SELECT \"a; b",
            "SELECT $x$ a; b $y$",
            "SELECT 1 /* ; ",
        ] {
            assert_eq!(texts(open).len(), 1, "{open}");
        }
    }

    #[test]
    fn lines_are_counted_through_everything() {
        let sql = "-- one\n/* two\nthree */ SELECT 'four\n' AS five;\n\n\nDROP\nTABLE t;";
        let found = statements(sql);
        let lines: Vec<usize> = found.iter().map(|one| one.line).collect();
        assert_eq!(lines, [3, 7]);
        let table = found[1].tokens[1];
        assert!(table.is("table") && table.line == 8);
    }

    #[test]
    fn what_ends_a_transaction_is_known() {
        for (sql, controls) in [
            ("BEGIN", true),
            ("begin work", true),
            ("START TRANSACTION", true),
            ("COMMIT", true),
            ("END", true),
            ("ROLLBACK", true),
            ("ABORT", true),
            ("PREPARE TRANSACTION 'x'", true),
            ("ROLLBACK TO SAVEPOINT s", false),
            ("ROLLBACK WORK TO s", false),
            ("SAVEPOINT s", false),
            ("DO $$ BEGIN PERFORM 1; END $$", false),
            ("SELECT 1 AS begin", false),
        ] {
            let found = statements(sql);
            assert_eq!(found[0].is_transaction_control(), controls, "{sql}");
        }
    }
}
