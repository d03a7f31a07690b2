//! `check.sql`: one read-only statement, one value.

use lockstep_proto::action::check::Sql;
use lockstep_proto::order::Fact;
use lockstep_proto::report::{Cause, Failure};
use serde_json::Value;

use crate::actions::{Act, Done, Probe};
use crate::sql::Database;
use crate::step::{Context, failure};

/// A value may be long; a person wants to see what it is.
const SHOWN: usize = 200;

impl Act for Sql {
    async fn probe(&self, cx: &Context) -> Result<Probe, Failure> {
        match self.apply(cx, &Value::Null).await {
            Ok(done) => Ok(Probe::Present(done.summary)),
            // A statement may fail for a table that is not there yet.
            Err(unmet) if matches!(unmet.cause, Cause::CheckUnmet | Cause::Step) => {
                Ok(Probe::Unmet(unmet))
            }
            Err(failure) => Err(failure),
        }
    }

    async fn apply(&self, cx: &Context, _before: &Value) -> Result<Done, Failure> {
        let session = Database::find(cx, &self.database)?.connect(cx).await?;
        let what = format!("the statement on `{}`", self.database);
        let value = session.value(&what, &self.sql).await?;
        let shown = shorten(value.as_deref().unwrap_or("NULL"));
        if let Some(why) = Wanted::from(self).unmet(value.as_deref()) {
            let message = format!("{what} returns {shown}, and {why}");
            return Err(failure(Cause::CheckUnmet, message));
        }
        let summary = format!("{what} returns {shown}");
        let note = Fact::Note {
            name: self.sql.clone(),
            value: shown.to_owned(),
        };
        Ok(Done {
            changed: false,
            summary,
            facts: vec![note],
        })
    }

    fn describe(&self) -> String {
        format!(
            "runs a read-only statement on `{}`: {}",
            self.database, self.sql
        )
    }
}

/// What is asked of a value.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted<'a> {
    /// The value, as PostgreSQL prints it.
    pub(super) equals: Option<&'a str>,
    /// The least number that it may be.
    pub(super) at_least: Option<i64>,
    /// The greatest.
    pub(super) at_most: Option<i64>,
}

impl<'a> From<&'a Sql> for Wanted<'a> {
    fn from(act: &'a Sql) -> Self {
        Self {
            equals: act.equals.as_deref(),
            at_least: act.at_least,
            at_most: act.at_most,
        }
    }
}

impl Wanted<'_> {
    /// Why a value is not as expected; `None` if it is.
    pub(super) fn unmet(self, value: Option<&str>) -> Option<String> {
        let text = value.unwrap_or("NULL");
        if let Some(equals) = self.equals.filter(|equals| *equals != text) {
            return Some(format!("must return {equals}"));
        }
        if self.at_least.is_none() && self.at_most.is_none() {
            return None;
        }
        let Some(number) = value
            .and_then(|value| value.parse::<f64>().ok())
            .filter(|number| !number.is_nan())
        else {
            return Some("must return a number".into());
        };
        #[expect(
            clippy::cast_precision_loss,
            reason = "bounds are small; values may be fractions"
        )]
        let as_float = |bound: i64| bound as f64;
        if let Some(low) = self.at_least.filter(|low| number < as_float(*low)) {
            return Some(format!("must return at least {low}"));
        }
        if let Some(high) = self.at_most.filter(|high| number > as_float(*high)) {
            return Some(format!("must return at most {high}"));
        }
        None
    }
}

/// The beginning of a value.
pub(super) fn shorten(value: &str) -> &str {
    crate::process::head(value, SHOWN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sql::cluster::{Bench, as_owner};

    fn check(sql: &str, equals: Option<&str>, bounds: (Option<i64>, Option<i64>)) -> Sql {
        let (at_least, at_most) = bounds;
        let equals = equals.map(str::to_owned);
        Sql {
            database: "staff".into(),
            sql: sql.into(),
            equals,
            at_least,
            at_most,
        }
    }

    #[tokio::test]
    async fn rows_that_a_policy_hides_are_no_answer() {
        let bench = Bench::with_rows().await;
        bench
            .sql(
                "CREATE TABLE public.hidden AS SELECT 1 AS n; \
                 ALTER TABLE public.hidden ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY",
            )
            .await;
        let none = check("SELECT count(*) FROM hidden", Some("0"), (None, None));
        let cx = as_owner(bench.cx(0, vec![]));
        let failed = none.apply(&cx, &Value::Null).await.unwrap_err();
        assert!(
            failed.message.contains("row-level security"),
            "{}",
            failed.message
        );
    }

    #[tokio::test]
    async fn a_value_is_held_against_what_is_expected() {
        let bench = Bench::with_rows().await;
        let count = "SELECT count(*) FROM users";
        let met = [
            check(count, Some("200"), (None, None)),
            check(count, None, (Some(200), Some(200))),
            check("SELECT 0.5", None, (Some(0), Some(1))),
            check("SELECT true", Some("t"), (None, None)),
            check("SELECT NULL::text", Some("NULL"), (None, None)),
        ];
        for check in met {
            let cx = bench.cx(0, vec![]);
            check.apply(&cx, &Value::Null).await.unwrap();
            assert!(matches!(check.probe(&cx).await, Ok(Probe::Present(_))));
        }
        let unmet = [
            (
                check(count, Some("201"), (None, None)),
                "returns 200, and must return 201",
            ),
            (check(count, None, (Some(201), None)), "at least 201"),
            (check(count, None, (None, Some(199))), "at most 199"),
            (check("SELECT 'NaN'", None, (Some(1), None)), "a number"),
            (check("SELECT 'x'", None, (Some(1), None)), "a number"),
            (
                check("DELETE FROM users RETURNING 1", None, (None, None)),
                "read-only",
            ),
        ];
        for (check, why) in unmet {
            let failed = check
                .apply(&bench.cx(0, vec![]), &Value::Null)
                .await
                .unwrap_err();
            assert!(failed.message.contains(why), "{}", failed.message);
        }
    }
}
