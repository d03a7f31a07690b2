//! What a thief of the controller can do on a host, in short; `make redteam` shows it in full.

use lockstep_tests::redteam;

#[test]
fn a_stolen_controller_gets_nothing_done_that_people_have_not_licensed() {
    let (figures, judged) = redteam::stolen_controller().unwrap();
    judged.unwrap_or_else(|error| panic!("{figures:#}\n{error:?}"));
}

#[test]
fn a_hostile_host_is_believed_of_nothing_but_itself() {
    let (figures, judged) = redteam::hostile_host().unwrap();
    judged.unwrap_or_else(|error| panic!("{figures:#}\n{error:?}"));
}

#[test]
fn malformed_frames_and_slow_connections_crash_nobody() {
    let (figures, judged) = redteam::hostile_load(redteam::SAMPLE).unwrap();
    judged.unwrap_or_else(|error| panic!("{figures:#}\n{error:?}"));
}
