//! Tokens, certificates and suspensions, one decision at a time.

use super::*;

const NOW: Timestamp = Timestamp(1_000_000_000);
const LIFE: Period = Period::seconds(3600);

fn host(name: &str) -> HostId {
    name.parse().unwrap()
}

fn after(seconds: u64) -> Timestamp {
    NOW.plus(Period::seconds(seconds))
}

fn secret() -> Digest {
    Digest::of(b"the token")
}

fn wanted(name: &str, key: u8) -> Wanted {
    Wanted {
        host: host(name),
        key: Digest::of(&[key]),
        serial: Serial::from_bytes(&[1, key]),
        life: LIFE,
    }
}

/// Decides and folds, as the coordinator does.
fn join(
    trust: &mut Trust,
    now: Timestamp,
    wanted: Result<Wanted, String>,
) -> Result<Grant, Refused> {
    let decided = trust.decide_join(now, secret(), wanted, false);
    if let Some(record) = &decided.record {
        trust.apply(now, record).unwrap();
    }
    decided.answer
}

fn renew(trust: &mut Trust, now: Timestamp, parent: &Grant, key: u8) -> Result<Grant, Refused> {
    let wanted = wanted(parent.host.as_str(), key);
    let (serial, ends) = (&parent.serial, parent.not_after);
    let decided = trust.decide_renewal(now, &parent.host, serial, ends, wanted);
    if let Some(record) = &decided.record {
        trust.apply(now, record).unwrap();
    }
    decided.answer
}

fn with_token() -> Trust {
    let mut trust = Trust::default();
    let ada = "ada".to_owned();
    let life = Period::seconds(600);
    let made = trust.decide_token(NOW, &ada, secret(), &host("app-1"), life, false);
    trust.apply(NOW, &made.unwrap()).unwrap();
    trust
}

#[test]
fn a_token_gives_one_certificate_to_one_key() {
    let mut trust = with_token();
    let first = join(&mut trust, NOW, Ok(wanted("app-1", 1))).unwrap();
    assert_eq!(first.not_after, NOW.plus(LIFE));
    // The answer was lost: the same machine asks again, perhaps after the token has ended.
    let mut again = wanted("app-1", 1);
    again.serial = Serial::from_bytes(&[9]);
    assert_eq!(join(&mut trust, after(700), Ok(again)).unwrap(), first);
    let other = join(&mut trust, NOW, Ok(wanted("app-1", 2))).unwrap_err();
    assert!(other.to_string().contains("used already"), "{other}");
    let late = join(&mut trust, after(3601), Ok(wanted("app-1", 1)));
    assert!(
        late.is_err(),
        "a certificate that has ended is not given again"
    );
}

#[test]
fn a_token_ends_by_time_by_word_and_by_misuse() {
    let ended = join(&mut with_token(), after(601), Ok(wanted("app-1", 1))).unwrap_err();
    assert!(ended.to_string().contains("has ended"), "{ended}");

    let mut trust = with_token();
    let token = token_name(secret());
    let ada = "ada".to_owned();
    let revoked = trust.decide_revocation(NOW, &ada, &token).unwrap();
    trust.apply(NOW, &revoked).unwrap();
    assert!(join(&mut trust, NOW, Ok(wanted("app-1", 1))).is_err());
    assert!(trust.decide_revocation(NOW, &ada, &token).is_err());

    let mut trust = with_token();
    for wrong in [
        Ok(wanted("app-2", 1)),
        Err("no request".to_owned()),
        Ok(wanted("db-1", 1)),
    ] {
        assert!(join(&mut trust, NOW, wrong).is_err());
    }
    let spent = join(&mut trust, NOW, Ok(wanted("app-1", 1))).unwrap_err();
    assert!(spent.to_string().contains("too often"), "{spent}");

    // A second token for a host takes the place of the first.
    let mut trust = with_token();
    let life = Period::seconds(600);
    let other = Digest::of(b"another");
    let made = trust
        .decide_token(NOW, &ada, other, &host("app-1"), life, false)
        .unwrap();
    trust.apply(NOW, &made).unwrap();
    assert!(join(&mut trust, NOW, Ok(wanted("app-1", 1))).is_err());
}

#[test]
fn a_name_is_given_once_until_it_is_forgotten() {
    let mut trust = with_token();
    let first = join(&mut trust, NOW, Ok(wanted("app-1", 1))).unwrap();
    let ada = "ada".to_owned();
    let life = Period::seconds(600);
    let again = |trust: &Trust, known| {
        let other = Digest::of(b"another");
        trust.decide_token(after(1), &ada, other, &host("app-1"), life, known)
    };
    assert!(again(&trust, false).is_err());
    assert!(
        again(&Trust::default(), true).is_err(),
        "a host with a certificate from elsewhere"
    );
    trust.forget(&host("app-1"), false);
    let made = again(&trust, false).unwrap();
    trust.apply(after(1), &made).unwrap();
    let decided = trust.decide_join(
        after(2),
        Digest::of(b"another"),
        Ok(wanted("app-1", 2)),
        false,
    );
    trust.apply(after(2), &decided.record.unwrap()).unwrap();
    // The machine that had the name before has it no more.
    assert!(trust.banned().replaced.contains(&first.serial));
    assert!(trust.revoked(after(2)).contains(&first.serial));
    assert!(
        trust.revoked(after(4000)).is_empty(),
        "it has ended by itself"
    );
}

/// Suspended, forgotten, and given to another machine, without a moment at which the one that it
/// was taken from may come back.
#[test]
fn a_stolen_host_is_out_while_another_machine_joins() {
    let mut trust = with_token();
    let first = join(&mut trust, NOW, Ok(wanted("app-1", 1))).unwrap();
    let second = renew(&mut trust, after(1), &first, 2).unwrap();
    let (name, ada) = (host("app-1"), "ada".to_owned());
    let subject = Subject::Host(name.clone());
    let suspended = trust.decide_suspension(&ada, subject.clone(), "stolen".to_owned());
    trust.apply(after(2), &suspended.unwrap()).unwrap();
    assert!(renew(&mut trust, after(3), &second, 3).is_err());
    trust.forget(&name, true);
    let void = [first.serial.clone(), second.serial.clone()];
    assert_eq!(trust.banned().replaced, BTreeSet::from(void));
    assert_eq!(trust.granted(&name), Some(BTreeSet::new()));

    // Lifting the suspension in between changes nothing for the thief.
    let mut lifted = trust.clone();
    let record = lifted.decide_unsuspension(&ada, subject.clone()).unwrap();
    lifted.apply(after(4), &record).unwrap();
    assert!(renew(&mut lifted, after(5), &second, 3).is_err());

    let other = Digest::of(b"another");
    let life = Period::seconds(600);
    let made = trust.decide_token(after(6), &ada, other, &name, life, false);
    trust.apply(after(6), &made.unwrap()).unwrap();
    let decided = trust.decide_join(after(7), other, Ok(wanted("app-1", 9)), false);
    trust.apply(after(7), &decided.record.unwrap()).unwrap();
    assert!(!trust.banned().subjects.contains_key(&subject));
    let granted = decided.answer.unwrap();
    assert_eq!(
        trust.granted(&name),
        Some(BTreeSet::from([granted.serial.clone()]))
    );
    // What the other machine asked for before it was cut is decided upon afterwards.
    assert!(renew(&mut trust, after(8), &second, 3).is_err());
    assert!(renew(&mut trust, after(8), &granted, 4).is_ok());
}

#[test]
fn a_token_from_before_a_suspension_lets_nobody_in() {
    let mut trust = with_token();
    let ada = "ada".to_owned();
    let subject = Subject::Host(host("app-1"));
    let suspended = trust.decide_suspension(&ada, subject, "the token leaked".to_owned());
    trust.apply(after(1), &suspended.unwrap()).unwrap();
    assert!(join(&mut trust, after(2), Ok(wanted("app-1", 1))).is_err());
}

/// Certificates that the issuer made by hand stand in no record until they are renewed.
#[test]
fn a_join_voids_certificates_that_were_made_elsewhere() {
    let by_hand = Grant {
        host: host("app-1"),
        key: Digest::of(b"made by hand"),
        serial: Serial::from_bytes(&[7]),
        not_before: NOW,
        not_after: after(100_000),
    };
    let mut trust = Trust::default();
    assert_eq!(trust.granted(&by_hand.host), None, "nobody has joined");
    let child = renew(&mut trust, after(1), &by_hand, 1).unwrap();
    assert_eq!(trust.granted(&by_hand.host), None);
    // Forgotten: the one that was renewed is known by its child.
    trust.forget(&by_hand.host, true);
    let void = BTreeSet::from([by_hand.serial.clone(), child.serial.clone()]);
    assert_eq!(trust.banned().replaced, void);
    assert_eq!(
        trust.revoked(after(4000)),
        BTreeSet::from([by_hand.serial.clone()])
    );
    assert!(renew(&mut trust, after(2), &by_hand, 2).is_err());
    assert!(renew(&mut trust, after(2), &child, 2).is_err());

    // One that was never renewed is nobody's once a machine has joined.
    let mut trust = with_token();
    let joined = join(&mut trust, NOW, Ok(wanted("app-1", 1))).unwrap();
    assert!(renew(&mut trust, after(1), &by_hand, 2).is_err());
    assert!(renew(&mut trust, after(1), &joined, 3).is_ok());
}

/// In journals of earlier releases a host that was forgotten, and came back, goes on as it was.
#[test]
fn a_host_that_was_forgotten_by_an_earlier_release_keeps_its_certificates() {
    let mut trust = with_token();
    let first = join(&mut trust, NOW, Ok(wanted("app-1", 1))).unwrap();
    trust.forget(&host("app-1"), false);
    assert!(trust.banned().replaced.is_empty());
    assert!(renew(&mut trust, after(1), &first, 2).is_ok());
    let record: crate::record::Record =
        serde_json::from_str(r#"{"host_forgotten":{"host":"app-1","operator":"ada"}}"#).unwrap();
    assert!(matches!(
        record,
        crate::record::Record::HostForgotten { void: false, .. }
    ));
}

#[test]
fn tokens_live_for_ten_minutes_at_most() {
    let trust = Trust::default();
    let ada = "ada".to_owned();
    for (seconds, fits) in [(0, false), (1, true), (600, true), (601, false)] {
        let life = Period::seconds(seconds);
        let made = trust.decide_token(NOW, &ada, secret(), &host("app-1"), life, false);
        assert_eq!(made.is_ok(), fits, "{seconds}");
    }
}

#[test]
fn a_lost_answer_is_given_again_and_a_copy_suspends_the_host() {
    let mut trust = with_token();
    let first = join(&mut trust, NOW, Ok(wanted("app-1", 1))).unwrap();
    let second = renew(&mut trust, after(1800), &first, 2).unwrap();
    let again = renew(&mut trust, after(1801), &first, 2).unwrap();
    assert_eq!(again, second);
    assert!(trust.banned().subjects.is_empty());
    // The next ones, each from the one before.
    let third = renew(&mut trust, after(3500), &second, 3).unwrap();
    assert_eq!(renew(&mut trust, after(3501), &second, 3).unwrap(), third);

    let copy = renew(&mut trust, after(3502), &first, 4).unwrap_err();
    assert!(copy.to_string().contains("two machines"), "{copy}");
    let subject = Subject::Host(host("app-1"));
    assert!(trust.banned().subjects.contains_key(&subject));
    let revoked = trust.revoked(after(3502));
    assert!(revoked.contains(&second.serial) && revoked.contains(&third.serial));
}

/// A certificate from elsewhere may live longer than what it is renewed as.
#[test]
fn a_copy_is_found_for_as_long_as_the_first_certificate_lives() {
    let mut trust = Trust::default();
    let long = Grant {
        host: host("app-1"),
        key: Digest::of(b"made by hand"),
        serial: Serial::from_bytes(&[7]),
        not_before: NOW,
        not_after: after(100_000),
    };
    let mut last = renew(&mut trust, after(1), &long, 1).unwrap();
    for round in 2..10 {
        last = renew(&mut trust, after(u64::from(round) * 3000), &last, round).unwrap();
    }
    assert!(renew(&mut trust, after(90_000), &long, 99).is_err());
}

#[test]
fn an_agent_renews_its_own_name_only() {
    let mut trust = with_token();
    let first = join(&mut trust, NOW, Ok(wanted("app-1", 1))).unwrap();
    let other = wanted("app-2", 2);
    let (serial, ends) = (&first.serial, first.not_after);
    let refused = trust.decide_renewal(NOW, &host("app-1"), serial, ends, other);
    assert!(refused.answer.is_err() && refused.record.is_none());
}

#[test]
fn nobody_suspends_themselves_and_a_suspension_is_lifted_once() {
    let mut trust = Trust::default();
    let ada = "ada".to_owned();
    let suspend = |trust: &Trust, subject: &str| {
        trust.decide_suspension(&ada, subject.parse().unwrap(), "lost".to_owned())
    };
    assert!(suspend(&trust, "operator:ada").is_err());
    for subject in ["operator:olga", "host:app-1", "serial:0A:ff"] {
        let record = suspend(&trust, subject).unwrap();
        trust.apply(NOW, &record).unwrap();
        assert!(suspend(&trust, subject).is_err(), "{subject}");
    }
    assert_eq!(trust.banned().subjects.len(), 3);
    assert!(trust.revoked(NOW).contains(&"aff".parse().unwrap()));
    let subject: Subject = "serial:aff".parse().unwrap();
    let lifted = trust.decide_unsuspension(&ada, subject.clone()).unwrap();
    trust.apply(NOW, &lifted).unwrap();
    assert!(trust.decide_unsuspension(&ada, subject).is_err());
    assert_eq!(trust.banned().subjects.len(), 2);
}

#[test]
fn what_is_written_is_read_again() {
    for text in ["host:app-1", "operator:olga.m", "serial:a1b2"] {
        let subject: Subject = text.parse().unwrap();
        assert_eq!(subject.to_string(), text);
        let json = serde_json::to_string(&subject).unwrap();
        assert_eq!(serde_json::from_str::<Subject>(&json).unwrap(), subject);
    }
    for wrong in [
        "app-1",
        "host:",
        "host:A B",
        "serial:xyz",
        "serial:0",
        "operator:a/b",
        "role:x",
    ] {
        assert!(wrong.parse::<Subject>().is_err(), "{wrong}");
    }
    for bytes in [&[0, 1, 2][..], &[0x7f; 16], &[0x10]] {
        let serial = Serial::from_bytes(bytes);
        assert_eq!(Serial::from_bytes(&serial.to_bytes()), serial);
        assert_eq!(serial.to_string().parse::<Serial>().unwrap(), serial);
    }
}
