//! The coordinator's values as `lockstep.control.v1`, and its refusals as gRPC statuses.

use lockstep_core::event::{EventKind, Lock};
use lockstep_core::{Refused, RolloutEvent, Summary};
use lockstep_proto::ids::StepKey;
use lockstep_proto::wire::{control_v1 as wire, signatures};
use tonic::{Code, Status};

/// At most one signature, armoured; none if the field is empty.
pub(super) fn one_signature(
    field: impl Into<Vec<u8>> + AsRef<[u8]>,
) -> Result<Option<String>, Status> {
    let given = Some(field).filter(|field| !field.as_ref().is_empty());
    let read = signatures(given.into_iter().collect());
    let mut read = read.map_err(|error| Status::invalid_argument(error.to_string()))?;
    Ok(read.pop())
}

/// A person's word, if it is signed: the attempt that it is about, and the armoured signature.
pub(super) fn signed_word(
    field: impl Into<Vec<u8>> + AsRef<[u8]>,
    about: &str,
) -> Result<Option<(StepKey, String)>, Status> {
    let Some(signature) = one_signature(field)? else {
        return Ok(None);
    };
    let about = about
        .parse()
        .map_err(|error| Status::invalid_argument(format!("`signed_key`: {error}")))?;
    Ok(Some((about, signature)))
}

/// An event.
pub(crate) fn event(event: &RolloutEvent) -> wire::RolloutEvent {
    let RolloutEvent {
        number,
        at,
        kind,
        state,
        phase,
        step,
        action,
        host,
        direction,
        attempt,
        message,
        detail,
        took_ms,
    } = event;
    wire::RolloutEvent {
        number: *number,
        at_ms: at.0,
        kind: self::kind(*kind).into(),
        state: (*state).to_owned(),
        phase: phase.clone(),
        step: step.map(|step| step.to_string()).unwrap_or_default(),
        action: (*action).to_owned(),
        host: host.as_ref().map(ToString::to_string).unwrap_or_default(),
        direction: (*direction).to_owned(),
        attempt: (*attempt).into(),
        message: message.clone(),
        detail: detail.clone(),
        took_ms: *took_ms,
        progress_permille: None,
    }
}

fn kind(kind: EventKind) -> wire::EventKind {
    match kind {
        EventKind::Submitted => wire::EventKind::Submitted,
        EventKind::Consent => wire::EventKind::Consent,
        EventKind::PhaseOpened => wire::EventKind::PhaseOpened,
        EventKind::PhaseClosed => wire::EventKind::PhaseClosed,
        EventKind::StepOrdered => wire::EventKind::StepOrdered,
        EventKind::StepStarted => wire::EventKind::StepStarted,
        EventKind::StepOk => wire::EventKind::StepOk,
        EventKind::StepFailed => wire::EventKind::StepFailed,
        EventKind::GateOpened => wire::EventKind::GateOpened,
        EventKind::GateDecided => wire::EventKind::GateDecided,
        EventKind::GateClosed => wire::EventKind::GateClosed,
        EventKind::GlassBroken => wire::EventKind::GlassBroken,
        EventKind::Quarantined => wire::EventKind::Quarantined,
        EventKind::RollbackStarted => wire::EventKind::RollbackStarted,
        EventKind::Paused => wire::EventKind::Paused,
        EventKind::Resumed => wire::EventKind::Resumed,
        EventKind::Ended => wire::EventKind::Ended,
        EventKind::Host => wire::EventKind::Host,
        EventKind::Note => wire::EventKind::Note,
    }
}

/// A rollout without its document.
pub(crate) fn rollout(summary: Summary) -> wire::Rollout {
    let Summary {
        rollout,
        plan,
        digest,
        state,
        ended: _,
        open: _,
        reason,
        requester,
        dry_run,
        waits_for,
        submitted,
        ended_at,
    } = summary;
    wire::Rollout {
        rollout: rollout.into(),
        plan,
        plan_digest: digest.to_string(),
        state: state.to_owned(),
        reason,
        requester,
        submitted_ms: submitted.0,
        ended_ms: ended_at.map_or(0, |at| at.0),
        document_json: bytes::Bytes::new(),
        dry_run,
        waits_for,
    }
}

/// Why an operator is refused, as a status.
pub(crate) fn refused(refused: &Refused) -> Status {
    let code = match refused {
        Refused::NotFound(_) | Refused::Archived(_) => Code::NotFound,
        Refused::SerialUsed(..) => Code::AlreadyExists,
        Refused::Locked(_) | Refused::NotNow(_) => Code::FailedPrecondition,
        Refused::NotAllowed(_) => Code::PermissionDenied,
        Refused::Invalid(_) => Code::InvalidArgument,
    };
    let message = match refused {
        // For people: a time, not a number.
        Refused::Locked(lock) => {
            let Lock {
                host,
                holder,
                plan,
                state,
                phase,
                since_ms,
                until_ms,
            } = &**lock;
            let since = time(*since_ms);
            let until = match until_ms {
                Some(until) => format!(
                    "it ends, or halts and waits for a person, by {} at the latest: `lockstep watch \
                     {holder}`, or end it with `lockstep cancel {holder} --reason TEXT` or \
                     `lockstep rollback {holder} --reason TEXT`",
                    time(*until)
                ),
                None => format!(
                    "it waits for a person: `lockstep resume {holder}`, `lockstep rollback {holder} \
                     --reason TEXT` or `lockstep close {holder} --accept --reason TEXT`"
                ),
            };
            format!(
                "{host} is locked by {holder} ({plan}), {state} in phase `{phase}`, submitted \
                 {since}; {until}"
            )
        }
        other => other.to_string(),
    };
    Status::new(code, message)
}

fn time(ms: u64) -> String {
    let time = i64::try_from(ms).ok();
    let time = time.and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
    time.map_or_else(|| "?".to_owned(), |time| format!("{time:.0}"))
}

#[cfg(test)]
mod tests {
    use lockstep_proto::ids::RolloutId;

    use super::*;

    #[test]
    fn a_lock_is_refused_with_its_holder_and_a_readable_time() {
        let status = refused(&Refused::Locked(Box::new(Lock {
            host: "db-1".parse().unwrap(),
            holder: RolloutId::from_random([1; 6]),
            plan: "p".into(),
            state: "running",
            phase: "backup".into(),
            since_ms: 1_700_000_000_000,
            until_ms: Some(1_700_000_060_000),
        })));
        assert_eq!(status.code(), Code::FailedPrecondition);
        assert_eq!(
            status.message(),
            "db-1 is locked by ro_010101010101 (p), running in phase `backup`, submitted \
             2023-11-14T22:13:20Z; it ends, or halts and waits for a person, by \
             2023-11-14T22:14:20Z at the latest: `lockstep watch ro_010101010101`, or end it with \
             `lockstep cancel ro_010101010101 --reason TEXT` or `lockstep rollback \
             ro_010101010101 --reason TEXT`"
        );
    }
}
