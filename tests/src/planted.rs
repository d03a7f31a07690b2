//! Faults that are planted in the product, one at a time, so that what looks for faults is seen to
//! find them. With the feature `faults` only: binaries for users know nothing of it.

use std::cell::Cell;
use std::sync::OnceLock;

/// A fault that can be planted: the promise that it breaks stands with each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// INV-2: the agent's journal does not sync what it writes.
    AgentSkipsSync,
    /// INV-4: the agent obeys a term that has ended.
    AgentIgnoresEpoch,
    /// INV-1: an attempt that left no proof is ordered again by the controller.
    RetryUnknown,
    /// INV-2: the controller acknowledges and sends before it persists.
    SendBeforePersist,
    /// INV-2: the agent forgets its newest report when it reconnects.
    DropLastReport,
    /// INV-6: an undo that is done is done again.
    UndoTwice,
    /// INV-3: a phase opens before the one before it is closed everywhere.
    OpenPhaseEarly,
    /// INV-5: a host that cannot be reached counts as ok.
    UnreachableIsOk,
    /// INV-1: an order that was carried out is carried out again under its own key.
    ReuseStepKey,
    /// INV-1: a step process acts although the attempt was claimed before.
    ExecuteClaimed,
    /// INV-1: the claim is not synced.
    ClaimSkipsSync,
    /// INV-1: an attempt without an outcome is settled as not done, without asking the host.
    SettleWithoutProbe,
    /// INV-2: the intent is written after the step process was started.
    IntentAfterStart,
    /// INV-1: an outcome that is there is not read; the attempt counts as interrupted.
    ForgetOutcome,
    /// INV-8: a process of this boot counts as the one that claimed in the boot before: a host waits
    /// for it for ever.
    IgnoreBoot,
    /// An order past its not-after time is carried out.
    IgnoreNotAfter,
    /// INV-6: a rollback leaves out one host that was touched, and does not look at the end.
    SkipAnUndo,
    /// INV-2: the controller drops the last record of its journal when it starts.
    ForgetLastRecord,
    /// INV-8: deadlines are not looked at.
    IgnoreDeadlines,
    /// INV-5: more hosts are left behind than the plan allows.
    IgnoreBudget,
    /// INV-4: the agent keeps the newest term in memory only.
    EpochNotWritten,
    /// INV-1: an attempt is settled while processes that it started are alive.
    SettleTooEarly,
}

impl Fault {
    /// All of them.
    pub const ALL: &[Self] = &[
        Self::AgentSkipsSync,
        Self::AgentIgnoresEpoch,
        Self::RetryUnknown,
        Self::SendBeforePersist,
        Self::DropLastReport,
        Self::UndoTwice,
        Self::OpenPhaseEarly,
        Self::UnreachableIsOk,
        Self::ReuseStepKey,
        Self::ExecuteClaimed,
        Self::ClaimSkipsSync,
        Self::SettleWithoutProbe,
        Self::IntentAfterStart,
        Self::ForgetOutcome,
        Self::IgnoreBoot,
        Self::IgnoreNotAfter,
        Self::SkipAnUndo,
        Self::ForgetLastRecord,
        Self::IgnoreDeadlines,
        Self::IgnoreBudget,
        Self::EpochNotWritten,
        Self::SettleTooEarly,
    ];

    /// How what is found of it begins: the promise that it breaks. Whatever else is found, such as
    /// a panic, is no proof that this one would be.
    pub fn breaks(self) -> &'static [&'static str] {
        match self {
            Self::RetryUnknown
            | Self::UndoTwice
            | Self::ReuseStepKey
            | Self::ExecuteClaimed
            | Self::ClaimSkipsSync
            | Self::SettleWithoutProbe
            | Self::SettleTooEarly => &["INV-1:"],
            Self::AgentSkipsSync
            | Self::SendBeforePersist
            | Self::DropLastReport
            | Self::IntentAfterStart
            | Self::ForgetOutcome
            | Self::ForgetLastRecord => &["INV-2:"],
            Self::OpenPhaseEarly => &["INV-3:"],
            Self::AgentIgnoresEpoch | Self::EpochNotWritten => &["INV-4:"],
            Self::UnreachableIsOk | Self::IgnoreBudget => &["INV-5:"],
            Self::SkipAnUndo => &["INV-6:"],
            Self::IgnoreBoot | Self::IgnoreNotAfter | Self::IgnoreDeadlines => &["INV-8:"],
        }
    }

    /// The first of what was found that shows this fault.
    pub fn shown(self, found: &[String]) -> Option<&String> {
        let mine = |what: &&String| self.breaks().iter().any(|it| what.starts_with(it));
        found.iter().find(mine)
    }

    /// Whether only real processes show it: simulated ones start no others.
    pub fn needs_processes(self) -> bool {
        self == Self::SettleTooEarly
    }

    /// Its name on command lines, as in the source.
    pub fn name(self) -> String {
        format!("{self:?}")
    }

    /// The fault of a name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|fault| fault.name() == name)
    }
}

thread_local! {
    static PLANTED: Cell<Option<Fault>> = const { Cell::new(None) };
}

/// Plants a fault on this thread, or takes it out again.
pub fn plant(fault: Option<Fault>) {
    PLANTED.set(fault);
}

/// Whether a fault is planted: on this thread, or in the whole process by `LOCKSTEP_PLANTED`.
pub fn is(fault: Fault) -> bool {
    static PROCESS: OnceLock<Option<Fault>> = OnceLock::new();
    let process = PROCESS.get_or_init(|| {
        let name = std::env::var("LOCKSTEP_PLANTED").ok()?;
        Some(Fault::named(&name).expect("the name of a planted fault"))
    });
    PLANTED.get() == Some(fault) || *process == Some(fault)
}
