//! Level-triggered waiting: look until it is so, and say what was seen last if it never is.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// For what takes a moment on a quiet machine: the bound is for a busy one.
pub const SOON: Duration = Duration::from_mins(1);

/// For a whole rollout with builds in it.
pub const ROLLOUT: Duration = Duration::from_mins(4);

/// Between two looks.
const PACE: Duration = Duration::from_millis(50);

/// Looks until `look` answers, at most for `bound`. An `Err` is what is seen instead, for the
/// message of a failure; it must never hold a secret.
pub fn until<T>(
    what: &str,
    bound: Duration,
    mut look: impl FnMut() -> Result<T, String>,
) -> Result<T> {
    let begun = Instant::now();
    loop {
        match look() {
            Ok(found) => return Ok(found),
            Err(seen) if begun.elapsed() >= bound => {
                bail!("waited {}s for {what}; last seen: {seen}", bound.as_secs());
            }
            Err(_) => std::thread::sleep(PACE),
        }
    }
}

/// Waits until a condition holds, with nothing to say about why it does not.
pub fn until_true(what: &str, bound: Duration, mut holds: impl FnMut() -> bool) -> Result<()> {
    until(what, bound, || {
        holds().then_some(()).ok_or_else(|| "not yet".to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_that_ends_in_vain_says_what_it_saw_last() {
        let mut looks = 0;
        let seen = until("seven", Duration::from_millis(120), || {
            looks += 1;
            Err::<(), _>(format!("{looks}"))
        });
        let message = seen.unwrap_err().to_string();
        assert!(
            message.ends_with(&format!("last seen: {looks}")),
            "{message}"
        );
        assert_eq!(until("it", SOON, || Ok(3)).unwrap(), 3);
    }
}
