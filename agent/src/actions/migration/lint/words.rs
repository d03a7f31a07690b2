//! The words of a statement, one after another.

use crate::sql::{Kind, Token};

/// What is left of a statement.
#[derive(Debug, Clone, Copy)]
pub(super) struct Words<'t, 'a> {
    tokens: &'t [Token<'a>],
}

impl<'t, 'a> Words<'t, 'a> {
    pub(super) fn of(tokens: &'t [Token<'a>]) -> Self {
        Self { tokens }
    }

    pub(super) fn next(&mut self) -> Option<Token<'a>> {
        let (first, rest) = self.tokens.split_first()?;
        self.tokens = rest;
        Some(*first)
    }

    pub(super) fn peek(&self) -> Option<Token<'a>> {
        self.tokens.first().copied()
    }

    /// Passes this key word by. Says whether it was there.
    pub(super) fn skip(&mut self, word: &str) -> bool {
        let there = self.peek().is_some_and(|token| token.is(word));
        if there {
            self.next();
        }
        there
    }

    /// The same of several words, which must all be there.
    pub(super) fn skip_all(&mut self, words: &[&str]) -> bool {
        let there = self.begins(words);
        if there {
            self.tokens = &self.tokens[words.len()..];
        }
        there
    }

    pub(super) fn begins(&self, words: &[&str]) -> bool {
        words.len() <= self.tokens.len()
            && words
                .iter()
                .zip(self.tokens)
                .all(|(word, token)| token.is(word))
    }

    /// Whether this key word comes, wherever.
    pub(super) fn has(&self, word: &str) -> bool {
        self.tokens.iter().any(|token| token.is(word))
    }

    /// Whether these key words come in a row.
    pub(super) fn has_all(&self, words: &[&str]) -> bool {
        let mut places = self.tokens.windows(words.len());
        places.any(|place| words.iter().zip(place).all(|(word, token)| token.is(word)))
    }

    /// Whether this key word comes outside of parentheses.
    pub(super) fn has_outside(&self, word: &str) -> bool {
        let mut depth = 0_usize;
        self.tokens.iter().any(|token| {
            if token.is_sign("(") {
                depth += 1;
            } else if token.is_sign(")") {
                depth = depth.saturating_sub(1);
            }
            depth == 0 && token.is(word)
        })
    }

    /// What comes before the end of the parentheses that it stands in.
    pub(super) fn inside(&self) -> Self {
        let mut depth = 1_usize;
        let end = self.tokens.iter().position(|token| {
            if token.is_sign("(") {
                depth += 1;
            } else if token.is_sign(")") {
                depth -= 1;
            }
            depth == 0
        });
        Self::of(&self.tokens[..end.unwrap_or(self.tokens.len())])
    }

    /// Names of functions that are called.
    pub(super) fn calls(&self) -> impl Iterator<Item = &'a str> {
        self.tokens.windows(2).filter_map(|two| {
            let is_name = matches!(two[0].kind, Kind::Word | Kind::Name);
            (is_name && two[1].is_sign("(")).then_some(two[0].text)
        })
    }

    /// What comes behind a key word.
    pub(super) fn behind(&self, word: &str) -> Option<Self> {
        let at = self.tokens.iter().position(|token| token.is(word))?;
        Some(Self::of(&self.tokens[at + 1..]))
    }

    /// A name, perhaps with its schema: as the server knows it, without the schema `public`.
    pub(super) fn name(&mut self) -> String {
        let mut name = self.part();
        while self.peek().is_some_and(|token| token.is_sign(".")) {
            self.next();
            let part = self.part();
            name = if name == "public" {
                part
            } else {
                format!("{name}.{part}")
            };
        }
        name
    }

    fn part(&mut self) -> String {
        match self.peek() {
            Some(Token {
                kind: Kind::Name,
                text,
                ..
            }) => {
                self.next();
                text.trim_matches('"').replace("\"\"", "\"")
            }
            Some(Token {
                kind: Kind::Word,
                text,
                ..
            }) => {
                self.next();
                text.to_lowercase()
            }
            _ => String::new(),
        }
    }

    /// The parts between commas that stand outside of parentheses.
    pub(super) fn parts(self) -> Vec<Self> {
        let mut parts = Vec::new();
        let (mut depth, mut begin) = (0_usize, 0);
        for (at, token) in self.tokens.iter().enumerate() {
            if token.is_sign("(") {
                depth += 1;
            } else if token.is_sign(")") {
                depth = depth.saturating_sub(1);
            } else if depth == 0 && token.is_sign(",") {
                parts.push(Self::of(&self.tokens[begin..at]));
                begin = at + 1;
            }
        }
        parts.push(Self::of(&self.tokens[begin..]));
        parts
    }
}
