//! Requests whose effect only their answer tells how to remove, and what people are told when that
//! answer was not recorded.

use lockstep_proto::action::check::{Http, Request};
use lockstep_proto::ids::StepKey;

use super::captures::used;
use super::client::{STEP, label};
use super::{Told, only_asks};

/// Whether a clean-up needs what the answer to this request tells: a mark is to be on the disk
/// before it is sent (INV-1). One that only asks can be sent again.
pub(super) fn is_needed(check: &Http, request: &Request) -> bool {
    !only_asks(request.method) && needed(check, request).next().is_some()
}

/// The captures of a request that a clean-up needs.
fn needed<'a>(check: &'a Http, request: &'a Request) -> impl Iterator<Item = &'a String> {
    let names = request.capture.keys();
    names.filter(|name| {
        let uses = |cleanup: &Request| used(cleanup).contains(*name);
        check.cleanup.iter().any(uses)
    })
}

/// Whether an answer settles the mark: it told all that a clean-up needs, or the server refused.
pub(super) fn is_settled(check: &Http, request: &Request, status: u16, told: &Told) -> bool {
    let tells = |name: &String| {
        told.iter()
            .any(|(of, value)| of == name && !value.is_null())
    };
    (400..500).contains(&status) || needed(check, request).all(tells)
}

/// What a mark that stands open says: which request, what is not known of it, and what to look for.
pub(super) fn words(check: &Http, index: usize, key: &StepKey) -> String {
    let first = check.first();
    let request = match index.checked_sub(1) {
        None => &first,
        Some(then) => check.then.get(then).unwrap_or(&first),
    };
    let names: Vec<_> = needed(check, request)
        .map(|name| format!("`{name}`"))
        .collect();
    // A plan may put a value of its own into the header.
    let own = |name: &String| name.eq_ignore_ascii_case(STEP);
    let carries = if request.headers.keys().any(own) {
        String::new()
    } else {
        format!(" (it was asked for with the header {STEP}: {key})")
    };
    format!(
        "{} may have created something, and its answer was not recorded, so no clean-up has its \
         {}: look for what it created{carries} and remove it",
        label(request),
        names.join(" and "),
    )
}
