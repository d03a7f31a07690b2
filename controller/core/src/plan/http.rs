//! Checks of `check.http`: a chain of requests, each of which may use what was captured before.

use std::collections::BTreeSet;

use lockstep_proto::action::check::{Expect, Http, Method, Request, check_json_path};

use super::args::{Args, Path, is_known, later_names};
use super::finding::{Code, did_you_mean};
use super::node::{NodeId, Step};

impl Args<'_> {
    /// A chain of requests: each may use what those before it captured.
    pub(super) fn http(&self, http: &Http) {
        let mut captured = BTreeSet::new();
        self.asked_again(http);
        self.request(&http.first(), &[], &mut captured);
        for (key, requests) in [("then", &http.then), ("cleanup", &http.cleanup)] {
            for (index, request) in requests.iter().enumerate() {
                self.request(request, &[key.into(), index.into()], &mut captured);
            }
        }
    }

    /// `within` repeats the first request until its answer is the expected one.
    fn asked_again(&self, http: &Http) {
        if http.within.is_some() && !matches!(http.method, Method::Get | Method::Head) {
            let message = "`within` would repeat a request that changes something";
            let hint = "wait with a `GET` in a step before, or begin the chain with one and put \
                        this request under `then`";
            self.report(Code::RepeatedEffect, &["within".into()], message, hint);
        }
    }

    fn request(&self, request: &Request, path: &Path<'_>, captured: &mut BTreeSet<String>) {
        let tree = self.reader.tree;
        let holder = self.reader.at(self.args, path);
        let below = |keys: &[&'static str]| -> Vec<Step<'_>> {
            let keys = keys.iter().map(|key| Step::Key(key));
            path.iter().copied().chain(keys).collect()
        };
        self.url(&request.url, &below(&["url"]));
        self.expect(&request.expect, &below(&["expect"]));
        for (key, value) in tree.entries(holder) {
            if ["then", "cleanup"].contains(&tree.text(*key)) {
                continue;
            }
            tree.each_scalar(*value, &mut |id, scalar| {
                for name in later_names(&scalar.text) {
                    let Some(name) = name.strip_prefix("capture.") else {
                        continue;
                    };
                    if !captured.contains(name) {
                        let known: Vec<&str> = captured.iter().map(String::as_str).collect();
                        let message = format!("no earlier request captures `{name}`");
                        let hint = did_you_mean(name, &known);
                        self.reader.report(Code::UnknownCapture, id, message, hint);
                    }
                }
            });
        }
        for (name, json_path) in &request.capture {
            let mut at = below(&["capture"]);
            at.push(Step::Key(name));
            self.json_path(json_path, self.reader.at(self.args, &at));
        }
        captured.extend(request.capture.keys().cloned());
    }

    fn expect(&self, expect: &Expect, path: &Path<'_>) {
        for json_path in expect.json.keys() {
            let mut at = path.to_vec();
            at.extend([Step::Key("json"), Step::Key(json_path)]);
            // The path is the key.
            let value = self.reader.at(self.args, &at);
            let key = self.reader.tree.node(value).parent.and_then(|(_, key)| key);
            self.json_path(json_path, key.unwrap_or(value));
        }
        let mut at = path.to_vec();
        at.push(Step::Key("matches"));
        self.some_regex(expect.matches.as_deref(), &at);
        if !(100..=599).contains(&expect.status) {
            at.pop();
            at.push(Step::Key("status"));
            let message = format!("{} is no HTTP status", expect.status);
            self.report(Code::WrongValue, &at, message, "");
        }
    }

    fn json_path(&self, text: &str, at: NodeId) {
        let read = || {
            check_json_path(text).map_err(str::to_owned)?;
            serde_json_path::JsonPath::parse(text).map_err(|error| error.to_string())
        };
        if is_known(text)
            && let Err(error) = read()
        {
            let message = format!("`{text}` is no JSONPath: {error}");
            let hint = Some("such as `$.items[0].id`".to_owned());
            self.reader.report(Code::BadJsonPath, at, message, hint);
        }
    }
}
