//! URLs in policies. What is compared is what a connection is made to: `*` in a host or port
//! never stands for anything of the path, the query, or a user before an `@`.

use std::net::Ipv4Addr;

use super::matching::{Way, plain, stands_for};
use crate::web::unescaped;

/// A URL or a pattern for URLs, by its parts.
#[derive(Debug, PartialEq, Eq)]
struct Parts {
    scheme: &'static str,
    /// In lower case; an IPv6 address with its brackets.
    host: String,
    port: String,
    /// Path and query, from `/` or `?` on. What follows `#` is never sent.
    rest: String,
}

/// Whether a text is to be read as a URL.
pub(super) fn is_url(text: &str) -> bool {
    scheme_of(text).is_some()
}

/// Whether a URL names a user, and so perhaps a password, before its host.
pub(super) fn names_a_user(text: &str) -> bool {
    let after = text.split_once("://").map_or(text, |(_, after)| after);
    let end = after.find(['/', '?', '#', '\\']).unwrap_or(after.len());
    after[..end].contains('@')
}

/// Says what is wrong with a pattern for URLs.
pub(super) fn check(pattern: &str) -> Result<(), String> {
    if pattern == ANY || parts(pattern, true).is_some() {
        return Ok(());
    }
    Err(format!(
        "`{pattern}` is no pattern for URLs, such as \"https://example.com/*\""
    ))
}

/// Stands for any URL.
const ANY: &str = "*";

/// Whether a URL is one that a pattern stands for. One that cannot be read may be any: that is
/// not allowed, and denied.
pub(super) fn fits(pattern: &str, url: &str, way: Way<'_>) -> bool {
    let Some(url) = parts(url, false) else {
        return matches!(way, Way::Deny(_));
    };
    if pattern == ANY {
        return true;
    }
    parts(pattern, true).is_some_and(|pattern| {
        pattern.scheme == url.scheme
            && fits_host(&pattern.host, &url.host, way)
            && stands_for(&pattern.port, &url.port, way)
            && fits_rest(&pattern.rest, &url.rest, way)
    })
}

/// A pattern such as `127.*` allows addresses, not names that begin like one.
fn fits_host(pattern: &str, host: &str, way: Way<'_>) -> bool {
    if matches!(way, Way::Deny(_)) {
        // A dot at its end changes nothing about a name.
        let (pattern, host) = (pattern.trim_end_matches('.'), host.trim_end_matches('.'));
        return stands_for(pattern, host, way);
    }
    let digits = |c: char| c.is_ascii_digit();
    let for_addresses =
        pattern.contains(digits) && pattern.chars().all(|c| digits(c) || matches!(c, '.' | '*'));
    stands_for(pattern, host, way) && (!for_addresses || host.parse::<Ipv4Addr>().is_ok())
}

fn fits_rest(pattern: &str, rest: &str, way: Way<'_>) -> bool {
    // As servers read it: `..` must not hide behind escapes, nor anything else that is denied.
    let read = unescaped(rest).replace('\\', "/");
    let climbs = read.split(['/', '?', '=']).any(|part| part == "..");
    match way {
        Way::Allow => !(climbs && pattern.contains('*')) && stands_for(pattern, rest, way),
        Way::Deny(_) => {
            let path = read.split('?').next().unwrap_or_default();
            let query = rest.find('?').map_or("", |at| &rest[at..]);
            climbs
                || stands_for(pattern, rest, way)
                || stands_for(pattern, &format!("{}{query}", plain(path)), way)
        }
    }
}

/// Scheme, host and port of a URL, as they are held against patterns.
#[cfg(feature = "fuzzing")]
pub(super) fn read_for_fuzzing(text: &str) -> Option<(&'static str, String, String)> {
    parts(text, false).map(|parts| (parts.scheme, parts.host, parts.port))
}

fn scheme_of(text: &str) -> Option<(&'static str, &str)> {
    let (scheme, after) = text.split_once("://")?;
    let scheme = ["http", "https"]
        .into_iter()
        .find(|known| scheme.eq_ignore_ascii_case(known))?;
    Some((scheme, after))
}

/// Reads a URL so strictly that nobody else can read another host out of it.
fn parts(text: &str, is_pattern: bool) -> Option<Parts> {
    let (scheme, after) = scheme_of(text)?;
    let end = after.find(['/', '?', '#']).unwrap_or(after.len());
    let (authority, rest) = after.split_at(end);
    let star = |c: char| is_pattern && c == '*';
    let (host, port) = if let Some(address) = authority.strip_prefix('[') {
        let (address, port) = address.split_once(']')?;
        let fits = |c: char| c.is_ascii_hexdigit() || matches!(c, ':' | '.') || star(c);
        if address.is_empty() || !address.chars().all(fits) {
            return None;
        }
        let port = match port {
            "" => None,
            port => Some(port.strip_prefix(':')?),
        };
        (format!("[{address}]"), port)
    } else {
        let (host, port) = match authority.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        };
        let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_') || star(c);
        if host.is_empty() || !host.chars().all(fits) {
            return None;
        }
        (host.to_owned(), port)
    };
    let usual = if scheme == "https" { "443" } else { "80" };
    let port = port.unwrap_or(usual);
    if port.is_empty() || !port.chars().all(|c| c.is_ascii_digit() || star(c)) {
        return None;
    }
    let rest = rest.split('#').next().unwrap_or_default();
    let rest = match rest {
        "" => "/".to_owned(),
        rest => rest.to_owned(),
    };
    if rest.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return None;
    }
    Some(Parts {
        scheme,
        host: host.to_ascii_lowercase(),
        port: port.to_owned(),
        rest,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exec::policy::names::Names;

    #[test]
    fn each_part_is_held_against_its_own() {
        for (pattern, url) in [
            ("http://*:8000/*", "http://app-1:8000/api/x?y=1#z"),
            ("http://*:8000/*", "HTTP://App-1:8000/"),
            ("http://*:8000/*", "http://[::1]:8000/x"),
            ("http://app-1", "http://app-1/"),
            ("https://app-1:443/", "https://app-1"),
            (
                "https://*.example.com/health",
                "https://a.b.example.com/health",
            ),
            ("http://127.*:8000/health", "http://127.9.8.7:8000/health"),
            ("http://[::1]:*/x", "http://[::1]:81/x"),
            ("*", "https://anywhere/at/all"),
        ] {
            assert!(fits(pattern, url, Way::Allow), "{pattern} {url}");
        }
        for (pattern, url) in [
            ("http://*:8000/*", "http://evil.test/:8000/x"),
            ("http://*:8000/*", "http://evil.test?:8000/x"),
            ("http://*:8000/*", "http://evil.test#:8000/x"),
            ("http://*:8000/*", "http://evil.test\\:8000/x"),
            ("http://*:8000/*", "http://app-1:8000@evil.test:8000/x"),
            ("http://*:8000/*", "http://app-1@evil.test:8000/x"),
            ("http://*:8000/*", "http://app-1:8000:8000/x"),
            ("http://*:8000/*", "http://${capture.host}:8000/x"),
            ("http://*:8000/*", "http://a b:8000/x"),
            ("http://*:8000/*", "http://:8000/x"),
            ("http://*:8000/*", "https://app-1:8000/x"),
            ("http://*:8000/*", "http://app-1/x"),
            ("http://app-1:*/x", "http://app-1:80@evil/x"),
            ("http://127.*:8000/*", "http://127.evil.test:8000/x"),
            ("http://127.*:8000/*", "http://127.1:8000/x"),
            ("http://app-1", "http://app-1/x"),
            ("http://app-1/health", "http://app-1/health?all"),
            ("http://app-1/api/*", "http://app-1/api/../admin"),
            ("http://app-1/api/*", "http://app-1/api/%2e%2E/admin"),
            ("http://app-1/api/*", "http://app-1/api/..%2Fadmin"),
            ("*", "http://user:password@app-1/"),
            ("*", "ftp://app-1/"),
        ] {
            assert!(!fits(pattern, url, Way::Allow), "{pattern} {url}");
        }
    }

    #[test]
    fn a_dot_at_the_end_of_a_host_keeps_nobody_from_being_denied() {
        let names = Names::default();
        for pattern in ["http://evil.test/*", "http://evil.test./*"] {
            for url in ["http://evil.test/x", "http://evil.test./x"] {
                assert!(fits(pattern, url, Way::Deny(&names)), "{pattern} {url}");
            }
        }
        assert!(!fits(
            "http://evil.test./*",
            "http://app-1/x",
            Way::Deny(&names)
        ));
    }

    #[test]
    fn patterns_say_what_they_mean() {
        assert!(check("http://*:8000/*").is_ok() && check("*").is_ok());
        for bad in ["*://x/", "app-1/*", "http://a@b/", "http:*", "http://a:b/"] {
            assert!(check(bad).is_err(), "{bad}");
        }
        assert!(names_a_user("https://token@git/") && names_a_user("http://a:b@c"));
        assert!(!names_a_user("http://a/b@c") && !names_a_user("http://a?b@c"));
    }
}
