use super::*;

#[test]
fn what_was_spent_comes_back_by_the_minute_and_no_more_than_there_was() {
    let begun = Instant::now();
    let mut allowance = Allowance::new(begun);
    let spend = |allowance: &mut Allowance, at, bytes| {
        let tries = 0..1_000_000;
        tries.take_while(|_| allowance.take(at, bytes)).count() as u64
    };
    assert_eq!(spend(&mut allowance, begun, 100), AT_ONCE / LEAST);
    assert!(!allowance.take(begun, 1), "short ones are synced, too");
    let minute = begun + Duration::from_mins(1);
    assert_eq!(spend(&mut allowance, minute, 100), A_MINUTE / LEAST);
    // Whoever asks all the time gets what others get.
    let hour = (1..3_600_000).map(|milli| minute + Duration::from_millis(milli));
    let answered = hour.filter(|at| allowance.take(*at, 30 << 10)).count() as u64;
    let most = 60 * A_MINUTE / (30 << 10);
    assert!(answered <= most && answered >= most - 2, "{answered}");
    let later = begun + Duration::from_hours(1000);
    assert_eq!(spend(&mut allowance, later, 100), AT_ONCE / LEAST);
}
