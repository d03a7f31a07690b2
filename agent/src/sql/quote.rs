//! Names and values in texts that PostgreSQL reads.

use crate::config::Postgres;

/// An identifier in SQL.
pub(crate) fn ident(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// A text in SQL.
pub(crate) fn literal(text: &str) -> String {
    // `E''` reads backslashes the same way whatever the server's settings are.
    format!("E'{}'", text.replace('\\', "\\\\").replace('\'', "''"))
}

/// A database's name as an argument of `-d`: a bare name with `=` in it would be read as more.
pub(crate) fn conninfo_dbname(name: &str) -> String {
    format!(
        "dbname='{}'",
        name.replace('\\', "\\\\").replace('\'', "\\'")
    )
}

/// A database's URL, without the password.
pub(crate) fn url(config: &Postgres, dbname: &str) -> String {
    let Postgres {
        host, port, user, ..
    } = config;
    let (user, dbname) = (percent(user), percent(dbname));
    if host.starts_with('/') {
        return format!(
            "postgresql://{user}@/{dbname}?host={}&port={port}",
            percent(host)
        );
    }
    let host = if host.contains(':') {
        format!("[{host}]")
    } else {
        host.clone()
    };
    format!("postgresql://{user}@{host}:{port}/{dbname}")
}

fn percent(text: &str) -> String {
    use std::fmt::Write as _;
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_values_cannot_leave_their_quotes() {
        assert_eq!(ident(r#"a"b"#), r#""a""b""#);
        assert_eq!(literal(r"it's \n"), r"E'it''s \\n'");
        assert_eq!(conninfo_dbname(r"x' host='y\"), r"dbname='x\' host=\'y\\'");
    }

    #[test]
    fn urls_hold_sockets_and_odd_names() {
        let mut config: Postgres =
            toml::from_str("host = '/run/postgresql'\nuser = 'app@x'").unwrap();
        assert_eq!(
            url(&config, "my db"),
            "postgresql://app%40x@/my%20db?host=/run/postgresql&port=5432"
        );
        config.host = "::1".into();
        assert_eq!(url(&config, "db"), "postgresql://app%40x@[::1]:5432/db");
    }
}
