//! For fuzzers: nothing that hosts, plans or controllers say does anything on a screen or in a
//! report but stand there.

use lockstep_core::plan::Findings;
use lockstep_proto::seal::SealedPlan;
use lockstep_proto::wire::control_v1 as wire;
use serde_json::Value;

use super::clean;
use super::document::Document;
use super::event::Event;
use super::render::{self, Line, progress::Progress};

/// Any text, as it is made fit for a line, for several lines, for JSON and for a report.
pub fn text(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let line = clean::line(&text);
    assert!(
        line.chars().all(|c| is_shown(c) && c != '\n' && c != '\t'),
        "{line:?}"
    );
    assert_eq!(clean::line(&line), line);
    shown(&clean::lines(&text));
    shown(&crate::logs::harmless(&text));
    if let Ok(value) = serde_json::from_str::<Value>(&text) {
        let json = clean::json(&format!("{value:#}"));
        shown(&json);
        assert_eq!(
            serde_json::from_str::<Value>(&json).ok(),
            Some(value.clone())
        );
        let json = clean::json(&value.to_string());
        assert!(!json.contains(char::is_control), "{json:?}");
        shown(&clean::value(value).to_string());
    }
    let shown = Line::plain(text).render(true);
    assert!(shown.chars().all(is_shown), "{shown:?}");
}

/// A rollout's document as a controller sends it, with all that is made of it.
pub fn documents(bytes: &[u8]) {
    let Ok(document) = Document::read(bytes) else {
        return;
    };
    for lines in [
        render::status::detail(&document, 1_800_000_000_000),
        render::status::ending(&document),
        render::plan::dry_run(&document),
    ] {
        for line in lines {
            shown(&line.text);
        }
    }
    document.has_failures();
    let blocks = render::report::report(&document);
    shown(&render::markdown::markdown(&blocks));
    page(&render::html::html(&blocks));
}

/// Events of a rollout as a controller sends them, one after the other.
pub fn events(events: impl IntoIterator<Item = wire::RolloutEvent>) {
    let mut progress = Progress::new("ro_010203040506", true);
    for event in events {
        let event = Event::from(event);
        for line in progress.take(&event) {
            shown(&line.text);
        }
        shown(&progress.waiting(event.at_ms));
        for bar in progress.bars(4) {
            assert!(bar.permille <= 1000);
            shown(&bar.label);
            shown(&bar.message);
        }
        if let Some(line) = progress.remind(event.at_ms.saturating_add(60_000)) {
            shown(&line.text);
        }
        shown(&clean::json(&event.to_json("ro_010203040506").to_string()));
    }
}

/// A compiled plan, as it is shown to those who sign or submit it.
pub fn plan_summary(plan: &SealedPlan) {
    for line in render::plan::summary(plan) {
        assert!(
            !line.text.contains('\n'),
            "a plan adds no lines: {:?}",
            line.text
        );
        shown(&line.text);
    }
}

/// What is wrong with a plan file.
pub fn findings(findings: &Findings) {
    for finding in findings {
        assert!(finding.line >= 1 && finding.column >= 1 && finding.width >= 1);
        let text = Line::plain(finding.to_string()).render(false);
        shown(&text);
    }
}

fn shown(text: &str) {
    assert!(text.chars().all(is_shown), "{text:?}");
}

fn is_shown(c: char) -> bool {
    let hides = matches!(c,
        '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}'
        | '\u{e0000}'..='\u{e007f}');
    matches!(c, '\n' | '\t') || !c.is_control() && !hides
}

/// A page has the tags that reports are made of, and no others.
fn page(page: &str) {
    const TAGS: [&str; 19] = [
        "main", "body", "html", "head", "style", "title", "table", "thead", "tbody", "tr", "td",
        "th", "div", "pre", "h1", "h2", "h3", "meta", "!DOCTYPE",
    ];
    shown(page);
    let body = page.split_once("<body>").expect("a page has a body").1;
    for tag in body.split('<').skip(1) {
        let (tag, rest) = tag.split_once('>').expect("a tag ends");
        assert!(!rest.contains('>'), "{rest:?}");
        let (name, attributes) = tag.split_once(' ').unwrap_or((tag, ""));
        assert!(TAGS.contains(&name.trim_start_matches('/')), "{tag:?}");
        let known = ["", "class=\"wide\"", "scope=\"col\"", "scope=\"row\""];
        assert!(known.contains(&attributes), "{tag:?}");
    }
}
