use proptest::prelude::*;

use super::*;
use crate::exec::policy::{Policy, Refused};
use lockstep_proto::action::Action;
use serde_json::json;

const TUESDAY: u64 = 1_795_478_400_000; // tue 2026-11-24 00:00 UTC

fn policy(text: &str) -> Result<Policy, String> {
    Policy::parse(std::path::Path::new("policy.toml"), text)
        .map_err(|error| crate::errors::chain(&error))
}

fn stop(service: &str) -> Action {
    let args = json!({"service": service});
    Action::deserialize_args("service.stop", args)
        .unwrap()
        .unwrap()
}

fn boot(byte: u8) -> BootId {
    BootId::from_bytes([byte; 8])
}

/// A moment so many minutes after Tuesday's midnight and after the boot.
fn at(wall: u64, uptime: u64) -> Moment {
    Moment {
        wall: Timestamp(TUESDAY + wall * MINUTE),
        uptime: Period(uptime * MINUTE),
        boot: boot(1),
    }
}

fn begin(policy: &Policy, begun: &mut Begun, now: &Moment) -> Result<(), String> {
    match policy.admit(&stop("web"), begun, now) {
        Ok(rules) => {
            begun.note(&rules, now);
            Ok(())
        }
        Err(Refused::Later(why)) => Err(why),
        Err(Refused::Never(why)) => panic!("{why}"),
    }
}

#[test]
fn no_more_begin_within_an_hour_than_the_rate_allows() {
    let policy = policy("[[allow]]\naction = 'service.*'\nper_hour = 2").unwrap();
    let mut begun = Begun::default();
    assert_eq!(begin(&policy, &mut begun, &at(600, 100)), Ok(()));
    assert_eq!(begin(&policy, &mut begun, &at(620, 120)), Ok(()));
    let refused = begin(&policy, &mut begun, &at(630, 130)).unwrap_err();
    assert!(
        refused.contains("2 have begun within the hour, 2 may")
            && refused.contains("tue 2026-11-24 11:00 UTC, in 30 min"),
        "{refused}"
    );
    assert!(begin(&policy, &mut begun, &at(659, 159)).is_err());
    assert_eq!(begin(&policy, &mut begun, &at(660, 160)), Ok(()));
    assert!(begin(&policy, &mut begun, &at(661, 161)).is_err());
}

#[test]
fn a_clock_that_is_set_grants_nothing() {
    let policy = policy("[[allow]]\naction = 'service.*'\nper_hour = 1").unwrap();
    let mut begun = Begun::default();
    assert_eq!(begin(&policy, &mut begun, &at(600, 100)), Ok(()));
    // Within the boot, forth and back.
    assert!(begin(&policy, &mut begun, &at(6000, 101)).is_err());
    assert!(begin(&policy, &mut begun, &at(60, 102)).is_err());
    // After a reboot with a clock that stands before the attempt.
    let rebooted = |wall, uptime| Moment {
        boot: boot(2),
        ..at(wall, uptime)
    };
    assert!(begin(&policy, &mut begun, &rebooted(60, 1)).is_err());
    assert!(begin(&policy, &mut begun, &rebooted(60, 59)).is_err());
    assert_eq!(begin(&policy, &mut begun, &rebooted(60, 60)), Ok(()));
}

#[test]
fn other_limits_keep_the_count_and_other_arguments_begin_a_new_one() {
    let once = policy("[[allow]]\naction = 'service.*'\nper_hour = 1").unwrap();
    let mut begun = Begun::default();
    assert_eq!(begin(&once, &mut begun, &at(600, 100)), Ok(()));
    let twice = policy("[[allow]]\naction = 'service.*'\nper_hour = 2").unwrap();
    assert_eq!(begin(&twice, &mut begun, &at(601, 101)), Ok(()));
    assert!(begin(&twice, &mut begun, &at(602, 102)).is_err());
    // A rule that has room is enough.
    let more = "[[allow]]\naction = 'service.*'\nper_hour = 2\n[[allow]]\naction = 'service.stop'\n\
                where = { service = ['web'] }\nper_hour = 1";
    let more = policy(more).unwrap();
    assert_eq!(begin(&more, &mut begun, &at(603, 103)), Ok(()));
    assert!(begin(&more, &mut begun, &at(604, 104)).is_err());
}

#[test]
fn windows_open_on_their_days_and_may_last_past_midnight() {
    let text = "[[allow]]\naction = 'service.stop'\n\
                windows = [{ days = ['tue'], utc = '14:00-18:00' }, { days = ['tue'], utc = '22:00-02:00' }]";
    let policy = policy(text).unwrap();
    let begin = |minutes| begin(&policy, &mut Begun::default(), &at(minutes, 0));
    let refused = begin(13 * 60 + 59).unwrap_err();
    for words in [
        "tue 14:00-18:00 UTC",
        "tue 22:00-02:00 UTC",
        "tue 2026-11-24 14:00 UTC, in 1 min",
    ] {
        assert!(refused.contains(words), "{refused}");
    }
    for open in [14 * 60, 17 * 60 + 59, 22 * 60, 25 * 60 + 59] {
        assert_eq!(begin(open), Ok(()), "{open}");
    }
    for shut in [0, 60, 18 * 60, 26 * 60, 38 * 60] {
        assert!(begin(shut).is_err(), "{shut}");
    }
}

#[test]
fn limits_that_cannot_be_meant_are_errors_with_their_line() {
    for (bad, words) in [
        ("per_hour = 0", "from 1 to"),
        ("per_hour = 1001", "from 1 to"),
        ("windows = []", "empty"),
        ("windows = [{}]", "`days`, `utc`"),
        ("windows = [{ utc = '14-18' }]", "14:00-18:00"),
        ("windows = [{ utc = '14:00-14:00' }]", "14:00-18:00"),
        ("windows = [{ utc = '24:00-02:00' }]", "14:00-18:00"),
        ("windows = [{ utc = '14:00-18:60' }]", "14:00-18:00"),
        ("windows = [{ days = ['tuesday'] }]", "tuesday"),
        ("windows = [{ day = ['tue'] }]", "day"),
    ] {
        let why = policy(&format!("[[allow]]\naction = 'service.stop'\n{bad}")).unwrap_err();
        assert!(
            why.contains(words) && why.contains("line 3"),
            "{bad}: {why}"
        );
    }
    let deny = policy("[[deny]]\naction = 'service.stop'\nper_hour = 1").unwrap_err();
    assert!(deny.contains("always holds"), "{deny}");
    let looks = policy("[[allow]]\naction = 'check.disk'\nper_hour = 1").unwrap_err();
    assert!(looks.contains("only looks"), "{looks}");
}

#[test]
fn a_plan_that_can_never_fit_is_refused_as_a_whole() {
    let text = "[[allow]]\naction = 'service.stop'\nper_hour = 2\nwindows = [{ days = ['tue'] }]";
    let policy = policy(text).unwrap();
    let web = stop("web");
    let now = Timestamp(TUESDAY);
    let later = Timestamp(TUESDAY + DAY);
    assert_eq!(policy.never(&[&web, &web], now, later), []);
    let refused = policy.never(&[&web, &web, &web], now, later);
    assert_eq!(refused.len(), 1);
    assert!(
        refused[0].0 == 2 && refused[0].1.contains("3rd") && refused[0].1.contains("line 2"),
        "{refused:?}"
    );
    let wednesday = policy.never(&[&web], later, Timestamp(TUESDAY + 2 * DAY));
    assert!(wednesday[0].1.contains("expires"), "{wednesday:?}");
    assert_eq!(
        policy.never(&[&web], later, Timestamp(TUESDAY + 7 * DAY)),
        []
    );
}

#[test]
fn a_dry_run_is_no_way_around_a_limit() {
    let rule = "[[allow]]\naction = '*'\nper_hour = 1\n";
    let limited = policy(rule).unwrap();
    let free = policy(&format!("{rule}[[allow]]\naction = 'check.*'\n")).unwrap();
    for (name, args, asks) in [
        ("check.command", json!({"argv": ["true"]}), true),
        (
            "check.sql",
            json!({"database": "d", "sql": "select 1"}),
            true,
        ),
        ("check.http", json!({"url": "http://localhost"}), true),
        ("check.disk", json!({"path": "/", "free": "1B"}), false),
        ("service.stop", json!({"service": "web"}), false),
    ] {
        let action = Action::deserialize_args(name, args).unwrap().unwrap();
        assert_eq!(limited.limits_asking(&action), asks, "{name}");
        assert!(!free.limits_asking(&action), "{name}");
    }
}

#[test]
fn times_are_written_as_they_are_read() {
    assert_eq!(utc(Timestamp(TUESDAY)), "tue 2026-11-24 00:00 UTC");
    assert_eq!(parse_utc("2026-11-24T00:00Z"), Ok(Timestamp(TUESDAY)));
    assert_eq!(parse_utc("1970-01-01T00:00:01Z"), Ok(Timestamp(1000)));
    for bad in [
        "2026-02-29T00:00Z",
        "2026-11-24",
        "2026-11-24T24:00Z",
        "2026-13-01T00:00Z",
        "",
    ] {
        assert!(parse_utc(bad).is_err(), "{bad}");
    }
}

proptest! {
    #[test]
    fn every_day_is_written_as_it_is_read(days in 0_u64..2_900_000, minute in 0_u64..1440) {
        let at = Timestamp(days * DAY + minute * MINUTE);
        let words = utc(at);
        let (_, rest) = words.split_once(' ').unwrap();
        let (date, time) = rest.split_once(' ').unwrap();
        let text = format!("{date}T{}Z", time.trim_end_matches(" UTC"));
        prop_assert_eq!(parse_utc(&text), Ok(at));
    }

    /// Whatever becomes of the wall clock and however often the host is restarted, no more attempts
    /// begin within an hour of true time than the rate allows.
    #[test]
    fn no_hour_of_true_time_sees_more_than_the_rate(
        rate in 1_u32..4,
        steps in proptest::collection::vec((0_u64..40, prop::bool::ANY, 0_u64..3_000), 1..60),
    ) {
        let policy = policy(&format!("[[allow]]\naction = '*'\nper_hour = {rate}")).unwrap();
        let mut begun = Begun::default();
        let (mut truth, mut booted, mut boots, mut back) = (10_000, 10_000, 0, 0);
        let mut granted: Vec<u64> = vec![];
        for (pause, reboots, set_back) in steps {
            truth += pause;
            if reboots {
                (boots, booted) = (boots + 1, truth);
                // At each boot the clock may stand further back.
                back += set_back;
            }
            let now = Moment {
                wall: Timestamp((TUESDAY + truth * MINUTE) - back * MINUTE),
                uptime: Period((truth - booted) * MINUTE),
                boot: boot(boots),
            };
            if begin(&policy, &mut begun, &now).is_ok() {
                granted.push(truth);
            }
            let within = granted.iter().filter(|at| truth - **at < 60).count();
            prop_assert!(within <= rate as usize, "{granted:?}");
        }
        prop_assert!(!granted.is_empty());
    }
}
