//! Findings: what is wrong with a plan, where, and what to do about it.

use std::fmt;

use serde::Serialize;

use super::node::Span;

macro_rules! codes {
    ($($name:ident $number:literal $meaning:literal;)*) => {
        /// The kind of a finding. Its text form, such as `LS0004`, never changes its meaning.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Code {
            $(#[doc = $meaning] $name,)*
        }

        impl Code {
            /// Every code, in order.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// The text form.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$name => concat!("LS", $number),)* }
            }

            /// What it means, as a sentence.
            pub fn meaning(self) -> &'static str {
                match self { $(Self::$name => $meaning,)* }
            }
        }
    };
}

codes! {
    Syntax "0001" "The file is not YAML 1.2, or larger than a plan may be.";
    DuplicateKey "0002" "A key stands twice in the same mapping.";
    NotPlain "0003" "Anchors, aliases, tags, directives, further documents and keys that are no text have no place in a plan.";
    UnknownKey "0004" "A key that the language does not have.";
    NotInThisVersion "0005" "A key, action or value that the language has, but this version does not do.";
    MissingKey "0006" "A key that must be there is missing.";
    WrongValue "0007" "A value of the wrong type, or outside its range.";
    UnknownAction "0008" "A step names an action that the catalogue does not have.";
    OneAction "0009" "A step does not have exactly one action.";
    UnknownVariable "0010" "`${...}` names an input that the plan does not declare, or is not closed.";
    MisplacedVariable "0011" "`${host.}`, `${capture.}` or `${rollout.}` in a place where nobody puts it in.";
    BadInputDeclaration "0012" "An input is declared in a way that no value can satisfy.";
    BadInputValue "0013" "An input was given no value, or one that its declaration does not allow.";
    UnusedInput "0014" "An input is declared and never used.";
    UnknownGroup "0020" "A group that `fleet` does not have.";
    EmptyGroup "0021" "A group without labels would mean every host.";
    DuplicateName "0022" "Two phases have the same name.";
    ControllerStepOnHosts "0023" "Gates and notices run on the controller, and so have no `on`.";
    NoHosts "0024" "A step that runs on hosts, without `on`.";
    MixedStrategy "0025" "A rolling or canary phase has steps with another target, or gates.";
    MissingBackup "0026" "A step that needs a backup, or a verified one, without such a step before it (INV-7).";
    BadFence "0027" "A fence that does not end in a later phase.";
    BadTime "0028" "Times that cannot be kept together.";
    UnusedGroup "0029" "A group is declared, and no step is meant for it.";
    BadRegex "0030" "A regular expression that does not compile.";
    BadJsonPath "0031" "A JSONPath that cannot be read.";
    BadUrl "0032" "A URL that is not absolute, or holds a password.";
    BadCommand "0033" "A command without a program, or through a shell.";
    MisplacedSecret "0034" "A secret in a place where it could be seen.";
    BadName "0035" "A name or path that a tool would take for something else.";
    NothingAsked "0036" "A list or mapping that must not be empty, is.";
    NeverFetched "0037" "A release is used that no earlier step fetches.";
    UnknownCapture "0038" "`${capture.}` names something that no earlier request captures.";
    UndoOfNothing "0039" "`undo` on a step that a rollback leaves alone anyway.";
    NotACheck "0040" "`after_rollback` holds checks only.";
    TooLarge "0041" "The compiled plan is larger than an agent holds.";
    RepeatedEffect "0042" "A check would repeat a request that changes something.";
    KeptLock "0043" "A gate cannot free the lock: something is changed before it, or it halts.";
    DestroysData "0044" "A command or target that destroys data, or the only copy of it.";
    MisusedTool "0045" "A database tool is used for what it does not do, or beside the action that does it safely.";
    LossWindow "0046" "What is written between a backup and the migration behind it is in no backup.";
    UnevenComparison "0047" "Rows are held against a backup's while applications may write.";
    CodeFirst "0048" "New code runs before its migration.";
    TwoWaysBack "0049" "A restore and a downgrade of the same database.";
    BadDowngrade "0050" "A downgrade to no certain revision, or with a release that does not know the way down.";
    CopiesTogether "0051" "Copies of a backup that are lost together.";
    ElsewhereLookedFor "0052" "A backup is looked for on hosts that have not made it.";
    MisleadingQuery "0053" "A statement that answers another question than the one asked.";
    NothingToCompare "0054" "A comparison with how a database was, and no earlier step looks.";
    NeverVerified "0055" "A backup that no later step restores and compares.";
    NoPointToRecover "0056" "A migration that a recovery undoes, and no earlier restore point that one could lead to, or one that is older than another change of the database.";
    WholeServer "0057" "A way back that takes all databases of a server along.";
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for Code {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

/// Whether a plan with a finding can run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// It cannot.
    Error,
    /// It can, and probably does not do what was meant.
    Warning,
}

/// One problem of a plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Its kind.
    pub code: Code,
    /// Whether the plan can run nevertheless.
    pub severity: Severity,
    /// The file, as it was named to [`Plan::parse`](super::Plan::parse).
    pub file: String,
    /// From 1.
    pub line: usize,
    /// From 1, in characters.
    pub column: usize,
    /// How many characters of the line are meant; at least 1.
    pub width: usize,
    /// The line, with control characters replaced; of a long one, its beginning.
    pub source_line: String,
    /// What is wrong.
    pub message: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// What is shown of the line, and the marker below it.
    #[serde(skip)]
    excerpt: (String, String),
}

/// More is wrong with a plan than anybody reads: nothing further is looked for. Each of them may
/// quote a line of a megabyte.
pub(crate) const MOST: usize = 1000;

/// The longest part of a line that is kept, in characters.
const KEPT: usize = 1000;

/// The longest part of a line that is shown, in characters.
const SHOWN: usize = 120;

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = match self.severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
        };
        let (line, caret) = &self.excerpt;
        let gutter = " ".repeat(self.line.to_string().len());
        writeln!(f, "{severity}[{}]: {}", self.code, self.message)?;
        writeln!(f, "{gutter}--> {}:{}:{}", self.file, self.line, self.column)?;
        writeln!(f, "{gutter} |")?;
        writeln!(f, "{} | {line}", self.line)?;
        writeln!(f, "{gutter} | {caret}")?;
        if let Some(hint) = &self.hint {
            writeln!(f, "{gutter} = hint: {hint}")?;
        }
        Ok(())
    }
}

/// A line and the marker below it; of a long line, the part around the marker.
fn excerpt(line: &str, column: usize, width: usize) -> (String, String) {
    let chars: Vec<char> = line.chars().take(column + SHOWN).collect();
    let at = (column - 1).min(chars.len());
    let from = if at < SHOWN - 20 { 0 } else { at - SHOWN / 2 };
    let to = chars.len().min(from + SHOWN);
    let mut line: String = chars[from..to].iter().collect();
    let lead = if from > 0 { "... " } else { "" };
    if to < chars.len() {
        line.push_str(" ...");
    }
    let width = width.min(to.saturating_sub(at)).max(1);
    let indent = " ".repeat(lead.len() + at - from);
    (
        format!("{lead}{}", line.trim_end()),
        format!("{indent}{}", "^".repeat(width)),
    )
}

/// All problems of one plan, in the order of the file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Findings(Vec<Finding>);

impl Findings {
    pub(crate) fn sorted(mut findings: Vec<Finding>) -> Self {
        findings.sort_by(|a, b| {
            let place = |f: &Finding| (f.line, f.column, f.severity, f.code);
            place(a)
                .cmp(&place(b))
                .then_with(|| a.message.cmp(&b.message))
        });
        findings.dedup();
        Self(findings)
    }

    /// Whether any of them keeps the plan from running.
    pub fn has_errors(&self) -> bool {
        self.errors() > 0
    }

    /// How many of them keep the plan from running.
    pub fn errors(&self) -> usize {
        let is_error = |f: &&Finding| f.severity == Severity::Error;
        self.0.iter().filter(is_error).count()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// In the order of the file.
    pub fn iter(&self) -> std::slice::Iter<'_, Finding> {
        self.0.iter()
    }

    /// For programs: `{"version": 1, "errors": n, "warnings": n, "findings": [...]}`.
    pub fn to_json(&self) -> serde_json::Value {
        serde_json::json!({
            "version": 1,
            "errors": self.errors(),
            "warnings": self.len() - self.errors(),
            "findings": self.0,
        })
    }
}

impl<'a> IntoIterator for &'a Findings {
    type Item = &'a Finding;
    type IntoIter = std::slice::Iter<'a, Finding>;
    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl fmt::Display for Findings {
    /// Each finding with its line, then how many there are: plain text, without colour.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for finding in self {
            writeln!(f, "{finding}")?;
        }
        let count = |n: usize, what: &str| match n {
            0 => None,
            1 => Some(format!("1 {what}")),
            n => Some(format!("{n} {what}s")),
        };
        let counts = [
            count(self.errors(), "error"),
            count(self.len() - self.errors(), "warning"),
        ];
        let counts: Vec<_> = counts.into_iter().flatten().collect();
        match self.0.first() {
            Some(first) => {
                write!(f, "{} in {}", counts.join(" and "), first.file)?;
                if self.len() >= MOST {
                    f.write_str(", and perhaps more: no others were looked for")?;
                }
                Ok(())
            }
            None => f.write_str("nothing to complain about"),
        }
    }
}

impl std::error::Error for Findings {}

/// A plan file: what findings quote from.
#[derive(Debug, Clone)]
pub(crate) struct Source {
    file: String,
    pub(crate) text: String,
    /// Where each line begins.
    lines: Vec<usize>,
}

impl Source {
    pub(crate) fn new(file: &str, text: &str) -> Self {
        // As YAML counts them: a carriage return by itself ends a line too.
        let breaks = text.match_indices(['\n', '\r']);
        let ends = breaks.filter_map(|(end, found)| {
            let before_a_feed = found == "\r" && text[end + 1..].starts_with('\n');
            (!before_a_feed).then_some(end + 1)
        });
        Self {
            file: file.to_owned(),
            text: text.to_owned(),
            lines: std::iter::once(0).chain(ends).collect(),
        }
    }

    /// A line, from 1, without its end; empty after the last.
    pub(crate) fn line(&self, number: usize) -> &str {
        let begin = self.lines.get(number - 1).copied();
        let rest = begin.map_or("", |begin| &self.text[begin..]);
        rest.split(['\n', '\r']).next().unwrap_or_default()
    }

    /// A finding at a place of this file.
    pub(crate) fn finding(
        &self,
        code: Code,
        span: Span,
        message: impl Into<String>,
        hint: Option<String>,
    ) -> Finding {
        let line = self.line(span.line).trim_start_matches('\u{feff}');
        let rest = line.chars().count().saturating_sub(span.column - 1);
        let width = if span.end_line == span.line {
            span.end_column.saturating_sub(span.column)
        } else {
            rest
        };
        let width = width.clamp(1, rest.max(1));
        let around: String = line.chars().take(span.column + SHOWN).collect();
        let around = visible(&around);
        Finding {
            code,
            severity: Severity::Error,
            file: self.file.clone(),
            line: span.line,
            column: span.column,
            width,
            source_line: visible(&line.chars().take(KEPT).collect::<String>()),
            excerpt: excerpt(&around, span.column, width),
            message: visible(&message.into()),
            hint: hint.map(|hint| visible(&hint)),
        }
    }
}

/// A text of the file without what a terminal would obey, on one line.
fn visible(text: &str) -> String {
    let seen = |c: char| match c {
        '\t' => ' ',
        c if c.is_control() => char::REPLACEMENT_CHARACTER,
        c => c,
    };
    text.chars().map(seen).collect()
}

/// The known word that is most like `given`, if one is like enough to have been meant.
pub(crate) fn nearest<'a>(
    given: &str,
    known: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    // The distance costs the product of the lengths, and no known word is longer.
    if given.len() > 64 {
        return None;
    }
    let lower = given.to_lowercase();
    known
        .into_iter()
        .map(|word| {
            (
                strsim::damerau_levenshtein(&lower, &word.to_lowercase()),
                word,
            )
        })
        .filter(|(distance, word)| *distance <= (word.chars().count() / 3).max(1))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, word)| word)
}

/// The hint for an unknown word: the one that was probably meant, or, if they are few, all.
pub(crate) fn did_you_mean(given: &str, known: &[&str]) -> Option<String> {
    if let Some(word) = nearest(given, known.iter().copied()) {
        return Some(format!("did you mean `{word}`?"));
    }
    match known {
        [] => None,
        few if few.len() <= 12 => Some(format!("known here: {}", list(few, "and"))),
        _ => None,
    }
}

/// Words in backticks: `a`, `b` and `c`.
pub(crate) fn list(words: &[&str], last: &str) -> String {
    let quoted: Vec<String> = words.iter().map(|word| format!("`{word}`")).collect();
    match quoted.as_slice() {
        [] => String::new(),
        [one] => one.clone(),
        [most @ .., end] => format!("{} {last} {end}", most.join(", ")),
    }
}
