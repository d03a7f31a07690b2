//! Times, periods and sizes in words.

use jiff::Timestamp;
use jiff::tz::TimeZone;

/// `2026-11-24 14:00:05Z`.
pub(crate) fn moment(ms: u64) -> String {
    format_utc(ms, "%Y-%m-%d %H:%M:%SZ")
}

/// `14:00:05`, in UTC.
pub(crate) fn clock(ms: u64) -> String {
    format_utc(ms, "%H:%M:%S")
}

fn format_utc(ms: u64, format: &str) -> String {
    let at = i64::try_from(ms)
        .ok()
        .and_then(|ms| Timestamp::from_millisecond(ms).ok());
    match at {
        Some(at) => at.to_zoned(TimeZone::UTC).strftime(format).to_string(),
        None => "?".to_owned(),
    }
}

/// `210ms`, `3.2s`, `2m 05s`, `1h 02m`.
pub(crate) fn took(ms: u64) -> String {
    let seconds = ms / 1000;
    match ms {
        0..1000 => format!("{ms}ms"),
        1000..60_000 => format!("{seconds}.{}s", ms % 1000 / 100),
        60_000..3_600_000 => format!("{}m {:02}s", seconds / 60, seconds % 60),
        _ => format!("{}h {:02}m", seconds / 3600, seconds % 3600 / 60),
    }
}

/// The same in whole seconds, for what is counted up on a screen.
pub(crate) fn since(ms: u64) -> String {
    if ms < 60_000 {
        format!("{}s", ms / 1000)
    } else {
        took(ms)
    }
}

/// `T+0`, `T+2m 05s`: from the rollout's start.
pub(crate) fn offset(ms: u64) -> String {
    if ms < 1000 {
        "T+0".to_owned()
    } else {
        format!("T+{}", since(ms))
    }
}

/// `12.4 MiB`.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [(&str, u64); 4] = [
        ("TiB", 1 << 40),
        ("GiB", 1 << 30),
        ("MiB", 1 << 20),
        ("KiB", 1 << 10),
    ];
    match UNITS.iter().find(|(_, unit)| bytes >= *unit) {
        // In tenths; the division by 10 keeps the product within 64 bits.
        Some((name, unit)) => {
            let tenths = bytes / (unit / 10).max(1);
            format!("{}.{} {name}", tenths / 10, tenths % 10)
        }
        None => format!("{bytes} B"),
    }
}

/// `1 host`, `3 hosts`.
pub(crate) fn count(number: usize, what: &str) -> String {
    if number == 1 {
        format!("1 {what}")
    } else {
        format!("{number} {what}s")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn periods_and_sizes_are_short_and_exact_enough() {
        let said: Vec<String> = [0, 210, 3_240, 59_999, 125_000, 3_720_000].map(took).into();
        assert_eq!(said, ["0ms", "210ms", "3.2s", "59.9s", "2m 05s", "1h 02m"]);
        assert_eq!(
            [size(900), size(1_536), size(13_002_342)],
            ["900 B", "1.5 KiB", "12.4 MiB"]
        );
        assert_eq!([offset(20), offset(125_000)], ["T+0", "T+2m 05s"]);
        assert_eq!(moment(1_795_528_805_000), "2026-11-24 14:00:05Z");
        assert_eq!(moment(u64::MAX), "?");
    }
}
