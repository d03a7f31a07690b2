//! Plans that nobody, too few, or the wrong people have sealed; old ones; changed ones.

use anyhow::Result;
use lockstep_proto::ids::Digest;
use lockstep_proto::seal;
use lockstep_proto::values::Timestamp;

use super::place::key;
use super::thief::{Answer, Must, Offered, Thief, sign};

/// Plays them.
pub(super) async fn play(thief: &mut Thief) -> Result<()> {
    signatures(thief).await?;
    plans(thief).await?;
    serials(thief).await?;
    bits(thief).await
}

async fn signatures(thief: &mut Thief) -> Result<()> {
    let plan = thief.plan(&[thief.note("never")]);
    let message = seal::message(plan.digest());
    let with_namespace = |seed: u8, namespace: &str| key(seed).sign(namespace, message.as_bytes());
    let one = sign(plan.digest(), &[1]);
    let other = sign(Digest::of(b"another plan"), &[2]);
    let upper = one[0].replace("BEGIN SSH", "begin ssh");
    let cut = one[0][..one[0].len() / 2].to_owned();
    let cases: Vec<(&str, Vec<String>, &str)> = vec![
        ("nobody", vec![], "0 of 2 signatures"),
        ("one person", one.clone(), "1 of 2 signatures"),
        (
            "one person twice",
            sign(plan.digest(), &[1, 1]),
            "another one by signer-1",
        ),
        (
            "one and a stranger",
            sign(plan.digest(), &[1, 9]),
            "not trusted",
        ),
        (
            "two strangers",
            sign(plan.digest(), &[9, 10]),
            "0 of 2 signatures",
        ),
        (
            "one and an approver",
            sign(plan.digest(), &[1, 5]),
            "not trusted",
        ),
        (
            "one and a host",
            sign(plan.digest(), &[1, 8]),
            "not trusted",
        ),
        (
            "a floor's signature",
            vec![one[0].clone(), with_namespace(2, "lockstep-floor")],
            "was made for",
        ),
        (
            "an approval's signature",
            vec![one[0].clone(), with_namespace(2, "lockstep-approval")],
            "was made for",
        ),
        (
            "a file's signature",
            vec![one[0].clone(), with_namespace(2, "file")],
            "was made for",
        ),
        (
            "one of another plan",
            vec![one[0].clone(), other[0].clone()],
            "does not match what was signed",
        ),
        (
            "no armour",
            vec![one[0].clone(), "x".into()],
            "not counted: signature 2",
        ),
        (
            "other armour",
            vec![one[0].clone(), upper],
            "1 of 2 signatures",
        ),
        (
            "half a signature",
            vec![one[0].clone(), cut],
            "not counted: signature 2",
        ),
        (
            "an empty one",
            vec![one[0].clone(), String::new()],
            "1 of 2 signatures",
        ),
        (
            "control characters",
            vec![one[0].clone(), "\u{1b}[2J\r\n\0".into()],
            "not counted: signature 2",
        ),
        (
            "strangers in great number",
            sign(plan.digest(), &(20..36).collect::<Vec<u8>>()),
            "0 of 2 signatures",
        ),
    ];
    for (name, signatures, words) in cases {
        let offered = Offered {
            signatures,
            ..thief.keep(&plan, &[])
        };
        thief.hostile_offer("seal", name, &offered, words).await?;
    }
    Ok(())
}

async fn plans(thief: &mut Thief) -> Result<()> {
    let kind = "plan";
    let note = thief.note("never");
    let far = Timestamp(u64::from(u32::MAX) * 1000 - 1);
    let fleets = [
        ("of another fleet", "test", "of the fleet `test`"),
        ("of no fleet", "", "names no fleet"),
        (
            "of a fleet with a longer name",
            "prod2",
            "of the fleet `prod2`",
        ),
        ("of the fleet in capitals", "PROD", "of the fleet `PROD`"),
    ];
    for (name, fleet, words) in fleets {
        let plan = thief.plan_with(std::slice::from_ref(&note), |plan| {
            plan.fleet_name = fleet.into();
        });
        let offered = thief.keep(&plan, &[1, 2]);
        thief.hostile_offer(kind, name, &offered, words).await?;
    }
    let times = [
        ("expired", Timestamp(0), Timestamp(1000), "expired"),
        (
            "not valid yet",
            far,
            Timestamp(far.0 + 1),
            "not valid before",
        ),
    ];
    for (name, from, to, words) in times {
        let plan = thief.plan_with(std::slice::from_ref(&note), |plan| {
            (plan.not_before, plan.expires) = (from, to);
        });
        let offered = thief.keep(&plan, &[1, 2]);
        thief.hostile_offer(kind, name, &offered, words).await?;
    }
    let plan = thief.plan_with(std::slice::from_ref(&note), |plan| {
        for selector in plan.fleet.values_mut() {
            selector.labels = [("role".to_owned(), "db".to_owned())].into();
        }
    });
    let offered = thief.keep(&plan, &[1, 2]);
    let words = "no step of the plan is meant for this host's labels";
    thief
        .hostile_offer(kind, "for other hosts", &offered, words)
        .await?;
    // A plan that people sealed, with another one under its digest; and the other way round.
    let good = thief.plan(&[thief.note("good")]);
    let bad = thief.plan(&[thief.note("bad")]);
    let swapped = thief.keep_as(good.digest(), bad.bytes());
    thief
        .hostile_offer(kind, "another one's bytes", &swapped, "has digest")
        .await?;
    let borrowed = Offered {
        signatures: sign(good.digest(), &[1, 2]),
        ..thief.keep(&bad, &[])
    };
    let words = "does not match what was signed";
    thief
        .hostile_offer(kind, "another one's signatures", &borrowed, words)
        .await?;
    // Bytes that say what a sealed plan says, in another way, or with something more.
    let text = String::from_utf8(good.bytes().to_vec())?;
    let unreadable = "cannot be read";
    let variants = [
        (
            "with a space",
            text.replacen(':', ": ", 1),
            "not in its canonical encoding",
        ),
        (
            "with a line's end",
            format!("{text}\n"),
            "not in its canonical encoding",
        ),
        (
            "with a key more",
            text.replacen('{', "{\"x\":1,", 1),
            unreadable,
        ),
        (
            "with a key twice",
            text.replacen('{', "{\"serial\":1,", 1),
            unreadable,
        ),
        (
            "of a later format",
            text.replacen("\"format\":1", "\"format\":9", 1),
            "has format 9",
        ),
        ("cut in half", text[..text.len() / 2].to_owned(), unreadable),
        ("empty", String::new(), unreadable),
        ("twice", text.repeat(2), unreadable),
        (
            "with a deep tail",
            format!("{}{}", "[".repeat(5000), text),
            unreadable,
        ),
        ("a list", "[]".into(), unreadable),
        ("larger than any", " ".repeat((1 << 20) + 1), "larger than"),
        (
            "with an unknown action",
            text.replacen("exec.run", "exec.sh", 1),
            unreadable,
        ),
    ];
    for (name, text, words) in variants {
        let offered = thief.keep_bytes(text.as_bytes());
        thief.hostile_offer(kind, name, &offered, words).await?;
    }
    let nowhere = Offered {
        digest: Digest::of(b"nowhere"),
        signatures: sign(Digest::of(b"nowhere"), &[1, 2]),
    };
    thief
        .hostile_offer(kind, "that is nowhere", &nowhere, "cannot be had")
        .await
}

/// One serial licenses one rollout, and serials only go up.
async fn serials(thief: &mut Thief) -> Result<()> {
    let kind = "serial";
    let older = thief.plan(&[thief.note("older")]);
    let plan = thief.plan(&[thief.note("once")]);
    let rollout = thief.hold(&plan).await?;
    let offered = thief.keep(&plan, &[1, 2]);
    let step = Thief::at(&rollout, (0, 0), 1);
    thief.licensed_note(&plan, &step, vec![], "once").await?;
    thief
        .hostile_offer(
            kind,
            "while another rollout runs",
            &offered,
            "end that rollout first",
        )
        .await?;
    thief.release(&rollout).await?;
    let again = "the same rollout once more";
    thief
        .hostile_offer_of(kind, again, &rollout, &offered, "has ended on this host")
        .await?;
    thief
        .hostile_offer(kind, "another rollout", &offered, "has licensed")
        .await?;
    let others = thief.keep(&plan, &[2, 3]);
    thief
        .hostile_offer(kind, "by other signers", &others, "has licensed")
        .await?;
    let old = thief.keep(&older, &[1, 2]);
    thief
        .hostile_offer(kind, "an older one", &old, "none of `test` below")
        .await?;
    let low = thief.plan_with(&[thief.note("low")], |plan| plan.serial = 0);
    let low = thief.keep(&low, &[1, 2]);
    thief
        .hostile_offer(kind, "zero", &low, "none of `test` below")
        .await?;
    // Orders of what has ended.
    for attempt in [1, 2, 9] {
        let name = format!("attempt {attempt} after the release");
        thief.tally.play(kind, &name);
        let key = Thief::at(&rollout, (0, 0), attempt);
        let answer = thief.order(plan.digest(), &key, vec![]).await;
        thief
            .check(
                kind,
                &name,
                answer,
                Must::BeRefused("has ended on this host"),
            )
            .await?;
    }
    // None of it is forgotten by a restart of exec.
    thief.restart_exec().await?;
    for (name, offered, words) in [
        ("another rollout, after a restart", &offered, "has licensed"),
        (
            "an older one, after a restart",
            &old,
            "none of `test` below",
        ),
    ] {
        thief.hostile_offer(kind, name, offered, words).await?;
    }
    thief
        .hostile_offer_of(
            kind,
            "the same rollout, after a restart",
            &rollout,
            &offered,
            "has ended on this host",
        )
        .await
}

/// One bit of a sealed plan, or of its signatures.
async fn bits(thief: &mut Thief) -> Result<()> {
    let plan = thief.plan(&[thief.note("bit"), thief.render("allowed/bit.env", "1")]);
    let good = sign(plan.digest(), &[1, 2]);
    for (count, index) in spread(plan.bytes().len(), 32).enumerate() {
        let mut bytes = plan.bytes().to_vec();
        bytes[index] ^= 1 << (count % 8);
        let offered = Offered {
            signatures: good.clone(),
            ..thief.keep_as(plan.digest(), &bytes)
        };
        let name = format!("bit {} of byte {index}, under its digest", count % 8);
        thief
            .hostile_offer("bit of a plan", &name, &offered, "cannot be had")
            .await?;
        let offered = Offered {
            signatures: good.clone(),
            ..thief.keep_bytes(&bytes)
        };
        let name = format!("bit {} of byte {index}, under another", count % 8);
        thief
            .hostile_offer("bit of a plan", &name, &offered, "")
            .await?;
    }
    let offered = thief.keep(&plan, &[1, 2]);
    let armour = good[1].as_bytes();
    for (count, index) in spread(armour.len(), 24).enumerate() {
        let mut bytes = armour.to_vec();
        bytes[index] ^= 1 << (count % 7);
        let Ok(changed) = String::from_utf8(bytes) else {
            continue;
        };
        let offered = Offered {
            signatures: vec![good[0].clone(), changed],
            ..offered.clone()
        };
        let name = format!("bit {} of byte {index}", count % 7);
        thief
            .hostile_offer("bit of a signature", &name, &offered, "1 of 2 signatures")
            .await?;
    }
    for (count, index) in spread(32, 8).enumerate() {
        let mut digest = plan.digest();
        digest.0[index] ^= 1 << (count % 8);
        let name = format!("bit {} of byte {index}", count % 8);
        let offered = Offered {
            digest,
            signatures: good.clone(),
        };
        thief
            .hostile_offer("bit of a digest", &name, &offered, "cannot be had")
            .await?;
    }
    // Unchanged, it is good: what was refused was refused for the bit.
    let rollout = thief.hold(&plan).await?;
    let step = Thief::at(&rollout, (0, 0), 1);
    thief.licensed_note(&plan, &step, vec![], "bit").await?;
    let step = Thief::at(&rollout, (0, 1), 1);
    let file = thief.place.path("allowed/bit.env");
    thief.licensed(&plan, &step, vec![], &[file]).await?;
    let answer = thief.order(plan.digest(), &step, vec![]).await;
    anyhow::ensure!(matches!(answer, Answer::Done), "{answer:?}");
    thief.release(&rollout).await
}

/// So many places out of so many, apart from each other.
fn spread(length: usize, count: usize) -> impl Iterator<Item = usize> {
    (0..count).map(move |index| index * length / count)
}
