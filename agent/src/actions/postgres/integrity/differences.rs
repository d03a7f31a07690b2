//! How what a database holds differs from what it held: what is wrong, and what is only said.

use lockstep_proto::action::postgres::Rows;

use super::holdings::{Held, Holdings, Values};
use crate::actions::postgres::written::LEDGERS;

/// What differs.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Differences {
    /// What must not differ.
    pub(crate) wrong: Vec<String>,
    /// What may: new tables, rows that were allowed to come.
    pub(crate) said: Vec<String>,
}

/// Compares what a database holds with what it held. Values count where they were looked at both
/// times; `rule` says how a table's rows may differ.
pub(crate) fn differences(
    was: &Holdings,
    is: &Holdings,
    rule: impl Fn(&str) -> Rows,
) -> Differences {
    let mut found = Differences::default();
    found.tables(was, is, rule);
    found.faults(was, is);
    found.rest(was, is);
    found
}

impl Differences {
    fn tables(&mut self, was: &Holdings, is: &Holdings, rule: impl Fn(&str) -> Rows) {
        for (name, before) in &was.tables {
            let rule = rule(name);
            let Some(now) = is.tables.get(name) else {
                let gone = format!("{name} is gone, with {} rows", before.rows);
                match rule {
                    Rows::Any => self.said.push(gone),
                    _ => self.wrong.push(gone),
                }
                continue;
            };
            // A migration changes them; the revisions are compared by themselves.
            if LEDGERS.contains(&name.rsplit('.').next().unwrap_or(name)) {
                continue;
            }
            let (rows, had) = (now.rows, before.rows);
            match unmet(rule, had, rows) {
                Some(why) => self.wrong.push(format!("{name} {why}")),
                None if rows != had => {
                    self.said
                        .push(format!("{name} has {rows} rows, and had {had}"));
                }
                None if rule == Rows::Unchanged => self.values(name, before, now),
                None => {}
            }
            self.columns(name, before, now);
        }
        for (name, now) in &is.tables {
            if !was.tables.contains_key(name) {
                self.said
                    .push(format!("{name} is new, with {} rows", now.rows));
            }
        }
    }

    fn values(&mut self, name: &str, before: &Held, now: &Held) {
        let (Some(was), Some(is)) = (&before.values, &now.values) else {
            self.said
                .push(format!("{name} is large: its rows were only counted"));
            return;
        };
        let changed = changed_columns(was, is);
        if !changed.is_empty() {
            let columns = changed.join(", ");
            self.wrong
                .push(format!("{name} has other values in {columns}"));
        } else if was.each.keys().eq(is.each.keys()) && was.rows != is.rows {
            let message = format!("{name} has the same values in other rows");
            self.wrong.push(message);
        }
    }

    fn columns(&mut self, name: &str, before: &Held, now: &Held) {
        for (what, of, other) in [("lost", before, now), ("got", now, before)] {
            let columns = of.columns.iter();
            let only = columns.filter(|column| !other.columns.contains(column));
            let only: Vec<&str> = only.map(String::as_str).collect();
            if !only.is_empty() {
                self.said
                    .push(format!("{name} has {what} the columns {}", only.join(", ")));
            }
        }
    }

    /// What is amiss now, and was not, or not so much. What was amiss before is said.
    fn faults(&mut self, was: &Holdings, is: &Holdings) {
        for (key, rows) in &is.orphans {
            let had = was.orphans.get(key).copied().unwrap_or_default();
            self.fault(*rows > 0, *rows > had, || {
                format!("{rows} rows have no parent by {key}, and {had} had none")
            });
        }
        for (name, sequence) in &is.sequences {
            let had = was.sequences.get(name).is_some_and(|it| it.behind);
            self.fault(sequence.behind, !had, || sequence.said(name));
        }
        for name in &is.invalid_indexes {
            let is_new = !was.invalid_indexes.contains(name);
            self.fault(true, is_new, || format!("the index {name} is not valid"));
        }
        let (bad, had) = (is.bad_pages.unwrap_or(0), was.bad_pages.unwrap_or(0));
        self.fault(bad > 0, bad > had, || {
            format!("{bad} pages had a wrong checksum, and {had} before")
        });
        for name in &is.unvalidated {
            if !was.unvalidated.contains(name) {
                self.said
                    .push(format!("{name} was not held against all rows"));
            }
        }
    }

    fn fault(&mut self, is_there: bool, is_new: bool, said: impl Fn() -> String) {
        if is_there && is_new {
            self.wrong.push(said());
        } else if is_there {
            self.said.push(format!("as before: {}", said()));
        }
    }

    fn rest(&mut self, was: &Holdings, is: &Holdings) {
        if is.large_objects < was.large_objects {
            let (now, had) = (is.large_objects, was.large_objects);
            self.wrong
                .push(format!("there are {now} large objects, and were {had}"));
        }
        if is.schema != was.schema {
            let (now, had) = (is.schema.short(), was.schema.short());
            self.said
                .push(format!("the schema's fingerprint is {now}, and was {had}"));
        }
        if is.revisions != was.revisions {
            let shown = |of: &Holdings| match of.revisions.as_slice() {
                [] => "none".to_owned(),
                revisions => revisions.join(" and "),
            };
            self.said.push(format!(
                "the revision is {}, and was {}",
                shown(is),
                shown(was)
            ));
        }
        if is.server_version != was.server_version {
            let (now, had) = (is.server_version, was.server_version);
            self.said
                .push(format!("the server's version is {now}, and was {had}"));
        }
    }
}

/// Columns of both that hold other values than they did.
fn changed_columns<'a>(was: &'a Values, is: &Values) -> Vec<&'a str> {
    let both = was.each.iter();
    let changed = both.filter(|(name, sum)| is.each.get(*name).is_some_and(|now| now != *sum));
    changed.map(|(name, _)| name.as_str()).collect()
}

/// Why so many rows are not what a rule allows; `None` if they are.
pub(crate) fn unmet(rule: Rows, had: u64, rows: u64) -> Option<String> {
    let differ = || format!("has {rows} rows, and had {had}");
    match rule {
        Rows::Any => None,
        Rows::Unchanged | Rows::SameCount => (rows != had).then(differ),
        Rows::Grown => (rows < had).then(differ),
        Rows::Within(share) => {
            let most = u128::from(had) * u128::from(share.0) / 100;
            let off = u128::from(rows.abs_diff(had));
            (off > most).then(|| format!("{}: more than {share} apart", differ()))
        }
    }
}
