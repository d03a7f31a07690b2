//! Chains of HTTP requests, which remove what they created, whatever happens in between.
//!
//! ```text
//! first request (again, until it is met) -> then ... -> cleanup
//!                  |                         |             |
//!                  +------- captures, durable before the next request
//!   mark, durable before a request whose captures the clean-up needs is sent
//! ```
//!
//! What an answer told is on the disk before the next request is sent. So an attempt that was
//! killed leaves a file that says what it created, and the next attempt removes that first. What
//! was killed before the answer was on the disk leaves a mark: nobody can say what was created, so
//! the outcome is unknown, and a person looks (INV-1).

use std::path::PathBuf;
use std::time::Duration;

use lockstep_proto::action::check::{Expect, Http, Method, Request, check_json_path};
use lockstep_proto::json;
use lockstep_proto::order::Fact;
use lockstep_proto::report::{Cause, Failure};
use serde_json::Value;
use serde_json_path::JsonPath;
use tokio::time::{Instant, sleep, timeout};

use self::captures::{Captures, FILE};
use self::client::Prepared;
use super::{Act, Done, Probe};
use crate::actions::exec::pattern;
use crate::actions::files;
use crate::process::{Redactor, head};
use crate::secrets::Secret;
use crate::step::{Context, failure};
use crate::web::{self, Answer};

mod captures;
mod client;
mod mark;

/// Between two tries of the first request.
const PAUSE: Duration = Duration::from_millis(300);

/// How much of an answer's body a failure shows, in bytes.
const SHOWN: usize = 300;

/// Captured texts from this length on are taken for tokens and hidden.
const TOKEN: usize = 8;

/// The most of the step's time that is kept for the clean-up.
const FOR_CLEANUP: Duration = Duration::from_secs(15);

/// How long a chain that is to stop waits for the answer it is at: only that says what to remove.
const LAST_ANSWER: Duration = Duration::from_secs(5);

/// How long its clean-up may take then.
const LAST_CLEANUP: Duration = Duration::from_secs(8);

/// A chain on its way.
struct Chain<'a> {
    cx: &'a Context,
    check: &'a Http,
    captures: Captures,
    /// Values that no message may show.
    secrets: Vec<Secret>,
    /// Requests with their response times, for the report.
    times: Vec<String>,
    /// Whether the first request was met.
    begun: bool,
}

/// Why a request is not met.
enum Unmet {
    /// There was no connection: nothing was asked.
    Unreached(Failure),
    /// It got no answer (status 0), or another one than expected.
    Answer(u16, Failure),
    /// It needs something that was not captured.
    NotCaptured(String),
    /// It cannot be sent as it is written.
    Unfit(Failure),
}

impl From<Unmet> for Failure {
    fn from(unmet: Unmet) -> Self {
        match unmet {
            Unmet::Unreached(failure) | Unmet::Answer(_, failure) | Unmet::Unfit(failure) => {
                failure
            }
            Unmet::NotCaptured(name) => Self {
                hint: Some(format!("capture `{name}` in a request before")),
                ..failure(
                    Cause::Refused,
                    format!("nothing has been captured as `{name}`"),
                )
            },
        }
    }
}

impl<'a> Chain<'a> {
    fn new(cx: &'a Context, check: &'a Http, captures: Captures) -> Self {
        let secrets = captures.tokens(TOKEN);
        Self {
            cx,
            check,
            captures,
            secrets,
            times: vec![],
            begun: false,
        }
    }

    /// Sends the first request until it is met, then the others.
    async fn run(&mut self, end: Instant) -> Result<(), Failure> {
        let within = self.check.within.unwrap_or_default().to_std();
        let until = Instant::now()
            .checked_add(within)
            .map_or(end, |until| until.min(end));
        let first = self.check.first();
        let mut tries = 0_u32;
        loop {
            self.go_on()?;
            tries += 1;
            // The time of the last try is bounded too, but not to nothing.
            let left = until
                .saturating_duration_since(Instant::now())
                .max(Duration::from_secs(1));
            let left = left.min(end.saturating_duration_since(Instant::now()));
            let (failure, again) = match self.ask(0, &first, left).await {
                Ok(()) => break,
                Err(Unmet::Unreached(failure)) => (failure, true),
                // What was asked for may have been done.
                Err(Unmet::Answer(_, failure)) => (failure, only_asks(first.method)),
                Err(unmet) => return Err(unmet.into()),
            };
            if !again && self.check.within.is_some() {
                return Err(Failure {
                    hint: Some(
                        "it is not sent again, for it may have had its effect: begin with a GET"
                            .into(),
                    ),
                    ..failure
                });
            }
            if Instant::now() + PAUSE >= until {
                let message = match tries {
                    1 => failure.message,
                    _ => format!("{} (tried {tries} times)", failure.message),
                };
                return Err(Failure { message, ..failure });
            }
            self.cx.log.line(&failure.message);
            self.captures.begin_anew();
            sleep(PAUSE).await;
        }
        self.begun = true;
        for (index, request) in (1..).zip(&self.check.then) {
            self.go_on()?;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let message = "the step's time is over before the chain has ended";
                return Err(failure(Cause::TimedOut, message));
            }
            self.ask(index, request, left).await?;
        }
        Ok(())
    }

    /// Refuses to send more when the step is to stop.
    fn go_on(&self) -> Result<(), Failure> {
        if self.cx.stop.is_cancelled() {
            let message = "the rest of the chain was left out";
            return Err(failure(Cause::Cancelled, message));
        }
        Ok(())
    }

    /// Sends a request of the chain, by its place. One whose answer a clean-up needs is marked
    /// until that is on the disk.
    async fn ask(&mut self, index: usize, request: &Request, left: Duration) -> Result<(), Unmet> {
        let mark = mark::is_needed(self.check, request).then_some(index);
        self.exchange(request, left, mark).await
    }

    /// Sends one request, holds the answer against what is expected, and keeps what it told.
    async fn exchange(
        &mut self,
        request: &Request,
        left: Duration,
        mark: Option<usize>,
    ) -> Result<(), Unmet> {
        let prepared = Prepared::of(self.cx, request, &self.captures, &mut self.secrets);
        let Prepared {
            label,
            request: asked,
        } = prepared.await?;
        let limit = self.check.timeout.to_std().min(left);
        let began = Instant::now();
        let too_late = || format!("no answer within {limit:?}");
        let connection = timeout(limit, web::connect(&asked.uri, None)).await;
        let connection = match connection.unwrap_or_else(|_| Err(too_late())) {
            Ok(connection) => connection,
            Err(error) => return Err(Unmet::Unreached(self.failure(&label, &error, None))),
        };
        let connecting = began.elapsed();
        if let Some(index) = mark {
            self.captures.mark(index).map_err(Unmet::Unfit)?;
        }
        let left = limit.saturating_sub(connecting);
        let answer = timeout(left, web::send(asked, connection)).await;
        let mut answer = match answer.unwrap_or_else(|_| Err(too_late())) {
            Ok(answer) => answer,
            Err(error) => return Err(self.unmet(&label, &error, None)),
        };
        answer.took += connecting;
        self.cx.log.line(&format!(
            "{label}: status {}, {:?}",
            answer.status, answer.took
        ));
        self.times
            .push(format!("{label} {} ms", answer.took.as_millis()));
        let body = json::read::<Value>(&answer.body).ok();
        let (told, missing) = find_captures(request, body.as_ref()).map_err(Unmet::Unfit)?;
        if mark.is_some() && mark::is_settled(self.check, request, answer.status, &told) {
            self.captures.settle();
        }
        // Also what an unexpected answer told is a secret, and must be known to be removed.
        self.captures.add(told);
        self.secrets.extend(self.captures.tokens(TOKEN));
        if !request.capture.is_empty() {
            self.captures.save().map_err(Unmet::Unfit)?;
        }
        if let Some(wrong) =
            mismatch(&request.expect, &answer, body.as_ref()).map_err(Unmet::Unfit)?
        {
            return Err(self.unmet(&label, &wrong, Some(&answer)));
        }
        match missing {
            None => Ok(()),
            Some(path) => Err(self.unmet(
                &label,
                &format!("the answer has no `{path}` to capture"),
                Some(&answer),
            )),
        }
    }

    fn unmet(&self, label: &str, why: &str, answer: Option<&Answer>) -> Unmet {
        let status = answer.map_or(0, |answer| answer.status);
        Unmet::Answer(status, self.failure(label, why, answer))
    }

    fn failure(&self, label: &str, why: &str, answer: Option<&Answer>) -> Failure {
        let hide = Redactor::new(&self.secrets);
        let shown = answer.map(|answer| {
            let body = String::from_utf8_lossy(&answer.body);
            let body = hide.hide(&body);
            let body: String = body
                .chars()
                .map(|c| if c.is_control() { ' ' } else { c })
                .collect();
            format!(
                "; status {}, body: {}",
                answer.status,
                head(body.trim(), SHOWN)
            )
        });
        let message = format!("{label}: {}{}", hide.hide(why), shown.unwrap_or_default());
        failure(Cause::CheckUnmet, message)
    }

    /// Sends the requests that remove what was created, as far as it is known. All are tried; the
    /// first that fails is told.
    async fn clean_up(&mut self, end: Instant) -> Result<usize, Failure> {
        let mut first = None;
        let mut sent = 0;
        // What tries left that were not met goes first; the last is the chain itself.
        for set in 0..=self.captures.earlier() {
            let main = self.captures.turn_to(set);
            let begun = self.begun && main;
            self.clean_set(begun, end, &mut sent, &mut first).await?;
        }
        match first {
            Some(failure) => Err(failure),
            None => self.captures.remove().map(|()| sent),
        }
    }

    /// Sends those requests for what one try captured.
    async fn clean_set(
        &mut self,
        begun: bool,
        end: Instant,
        sent: &mut usize,
        first: &mut Option<Failure>,
    ) -> Result<(), Failure> {
        for (index, request) in self.check.cleanup.iter().enumerate() {
            // What needs no capture belongs to what the first request began.
            let not_begun = captures::used(request).is_empty() && !begun;
            if not_begun || self.captures.is_cleaned(index) {
                continue;
            }
            let left = end
                .saturating_duration_since(Instant::now())
                .max(Duration::from_secs(1));
            match self.exchange(request, left, None).await {
                Err(Unmet::NotCaptured(_)) => continue,
                Err(Unmet::Answer(status, failure)) if !is_gone(request, status) => {
                    first.get_or_insert_with(|| self.unclean(failure));
                    continue;
                }
                Err(Unmet::Unreached(failure)) => {
                    first.get_or_insert_with(|| self.unclean(failure));
                    continue;
                }
                Err(Unmet::Unfit(failure)) => {
                    first.get_or_insert(failure);
                    continue;
                }
                Ok(()) | Err(Unmet::Answer(..)) => {}
            }
            *sent += 1;
            self.captures.set_cleaned(index)?;
        }
        Ok(())
    }

    /// Adds what may have been created to why the chain was not met.
    fn with_open(&self, why: Failure) -> Failure {
        let Some(index) = self.captures.open() else {
            return why;
        };
        let words = mark::words(self.check, index, &self.cx.key);
        Failure {
            hint: Some(words),
            changed: true,
            ..why
        }
    }

    fn unclean(&self, failure: Failure) -> Failure {
        Failure {
            hint: Some(format!("remove by hand what step {} created", self.cx.key)),
            changed: true,
            message: format!("the clean-up failed: {}", failure.message),
            ..failure
        }
    }
}

/// Whether a request of this method has no effect, so that it may be sent again.
fn only_asks(method: Method) -> bool {
    matches!(method, Method::Get | Method::Head)
}

/// Whether a clean-up found that what it was to remove had been removed by the chain itself.
fn is_gone(request: &Request, status: u16) -> bool {
    request.method == Method::Delete && matches!(status, 404 | 410)
}

type Told = Vec<(String, Value)>;

/// What an answer tells, and the first path that finds nothing in it.
fn find_captures(
    request: &Request,
    body: Option<&Value>,
) -> Result<(Told, Option<String>), Failure> {
    let mut told = vec![];
    let mut missing = None;
    for (name, path) in &request.capture {
        let query = json_path(path)?;
        match body.and_then(|body| query.query(body).first()) {
            Some(value) => told.push((name.clone(), value.clone())),
            None => missing = missing.or_else(|| Some(path.clone())),
        }
    }
    Ok((told, missing))
}

fn json_path(text: &str) -> Result<JsonPath, Failure> {
    let unfit = |why: &dyn std::fmt::Display| {
        failure(Cause::Refused, format!("`{text}` is no JSONPath: {why}"))
    };
    check_json_path(text).map_err(|why| unfit(&why))?;
    JsonPath::parse(text).map_err(|error| unfit(&error))
}

/// What is not as expected, if anything.
fn mismatch(
    expect: &Expect,
    answer: &Answer,
    body: Option<&Value>,
) -> Result<Option<String>, Failure> {
    let Expect {
        status,
        json,
        matches,
        faster_than,
    } = expect;
    if answer.status != *status {
        return Ok(Some(format!("expected status {status}")));
    }
    for (path, wanted) in json {
        let query = json_path(path)?;
        let Some(body) = body else {
            return Ok(Some("expected a JSON body".to_owned()));
        };
        let nodes = query.query(body).all();
        if !nodes.iter().any(|node| same(node, wanted)) {
            let found = nodes
                .first()
                .map_or_else(|| "nothing".to_owned(), ToString::to_string);
            let found = head(&found, SHOWN).to_owned();
            return Ok(Some(format!(
                "expected {wanted} at `{path}`, found {found}"
            )));
        }
    }
    if let Some(text) = matches
        && !pattern(text)?.is_match(&String::from_utf8_lossy(&answer.body))
    {
        return Ok(Some(format!("expected a body that matches `{text}`")));
    }
    if let Some(limit) = faster_than
        && answer.took > limit.to_std()
    {
        let took = answer.took.as_millis();
        return Ok(Some(format!(
            "expected an answer within {limit}, it took {took} ms"
        )));
    }
    Ok(None)
}

/// Equal as JSON, where 1 and 1.0 are the same number.
fn same(found: &Value, wanted: &Value) -> bool {
    match (found.as_f64(), wanted.as_f64()) {
        (Some(found_number), Some(wanted_number)) => {
            found == wanted || found_number.total_cmp(&wanted_number).is_eq()
        }
        _ => found == wanted,
    }
}

/// Files that earlier attempts at this step left, because they could not clean up.
fn leftovers(cx: &Context) -> Vec<PathBuf> {
    let dirs = files::attempts(cx).into_iter();
    dirs.map(|dir| dir.join(FILE))
        .filter(|file| file.exists())
        .collect()
}

/// Removes what earlier attempts created.
async fn clean_leftovers(cx: &Context, check: &Http, end: Instant) -> Result<usize, Failure> {
    let mut cleaned = 0;
    for file in leftovers(cx) {
        let mut captures = Captures::load(file.clone())?;
        // Another attempt was ordered, so a person knows of it.
        captures.settle();
        let mut chain = Chain::new(cx, check, captures);
        cleaned += chain.clean_up(end).await.map_err(|failure| Failure {
            message: format!(
                "what an earlier attempt created is still there: {}",
                failure.message
            ),
            hint: Some(format!("remove it by hand, then remove {}", file.display())),
            ..failure
        })?;
    }
    Ok(cleaned)
}

impl Act for Http {
    async fn probe(&self, cx: &Context) -> Result<Probe, Failure> {
        if !cx.dry_run {
            if let Some(index) = Captures::open_in(cx)? {
                return Ok(Probe::NoProof(format!(
                    "{}; `--not-done` lets the check be tried again",
                    mark::words(self, index, &cx.key)
                )));
            }
            let left = leftovers(cx).len();
            return Ok(Probe::Absent(match left {
                0 => format!("asks {}", self.url),
                _ => format!(
                    "removes what an earlier attempt created, then asks {}",
                    self.url
                ),
            }));
        }
        let more = self.then.len() + self.cleanup.len();
        let follow = if more == 0 {
            String::new()
        } else {
            format!("; {more} requests follow")
        };
        if !only_asks(self.method) {
            return Ok(Probe::Absent(format!(
                "sends {} something{follow}",
                self.url
            )));
        }
        // A dry run changes nothing: it sends the first request only, and only if that one asks.
        let first = Self {
            then: vec![],
            cleanup: vec![],
            capture: [].into(),
            ..self.clone()
        };
        let mut chain = Chain::new(cx, &first, Captures::none());
        Ok(
            match chain
                .ask(0, &first.first(), cx.deadline - Instant::now())
                .await
            {
                Ok(()) => Probe::Present(format!("{} is as expected{follow}", self.url)),
                Err(Unmet::Unreached(failure) | Unmet::Answer(_, failure)) => Probe::Unmet(failure),
                Err(unmet) => return Err(unmet.into()),
            },
        )
    }

    async fn apply(&self, cx: &Context, _before: &Value) -> Result<Done, Failure> {
        let left = cx.deadline.saturating_duration_since(Instant::now());
        let end = cx.deadline - FOR_CLEANUP.min(left / 4);
        let earlier = clean_leftovers(cx, self, end).await?;
        let mut chain = Chain::new(cx, self, Captures::new(cx));
        let stopped = async {
            cx.stop.cancelled().await;
            sleep(LAST_ANSWER).await;
        };
        let ran = tokio::select! {
            ran = chain.run(end) => ran,
            () = stopped => Err(Failure {
                hint: Some("see whether what the last request asked for was done".into()),
                changed: true,
                ..failure(Cause::Cancelled, "the last request got no answer")
            }),
        };
        let requests = chain.times.len();
        let mut last = cx.deadline;
        if cx.stop.is_cancelled() {
            last = last.min(Instant::now() + LAST_CLEANUP);
        }
        let cleaned = chain.clean_up(last).await;
        let ran = ran.map_err(|failure| chain.with_open(failure));
        match (ran, cleaned) {
            (Ok(()), Ok(cleaned)) => {
                let times = chain.times.join(", ");
                let note = Fact::Note {
                    name: "response times".into(),
                    value: head(&times, 4000).into(),
                };
                let facts = vec![
                    Fact::Healthy {
                        url: self.url.clone(),
                    },
                    note,
                ];
                let removed = match cleaned + earlier {
                    0 => String::new(),
                    count => format!(", {count} cleaned up"),
                };
                let summary = format!("{requests} of {requests} requests are as expected{removed}");
                Ok(Done {
                    changed: false,
                    summary,
                    facts,
                })
            }
            (Err(failure), Ok(_)) | (Ok(()), Err(failure)) => Err(failure),
            (Err(failure), Err(unclean)) => Err(Failure {
                message: format!("{}; and {}", failure.message, unclean.message),
                hint: unclean.hint,
                changed: true,
                ..failure
            }),
        }
    }

    fn describe(&self) -> String {
        match self.then.len() {
            0 => format!("check {}", self.url),
            more => format!("check {} and {more} more requests", self.url),
        }
    }
}

#[cfg(test)]
mod tests;
