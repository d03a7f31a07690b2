//! Live events on their way to whoever watches a rollout.
//!
//! What is published here was persisted before, but for progress, which is kept nowhere. A
//! watcher that falls behind is told so, and reads the coordinator's events again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lockstep_proto::ids::RolloutId;
use lockstep_proto::wire::control_v1::RolloutEvent;
use tokio::sync::broadcast;

/// Events that a watcher may be behind before it has to read again: a step on 1,000 hosts makes
/// about 2,000 of them at once, each of them one pointer here.
const WATCHER_LAG: usize = 4096;

/// One channel for each rollout that is watched.
#[derive(Debug, Clone, Default)]
pub(crate) struct Hub {
    channels: Arc<Mutex<HashMap<RolloutId, broadcast::Sender<Arc<RolloutEvent>>>>>,
}

impl Hub {
    /// Everything that is published about a rollout from now on.
    pub(crate) fn subscribe(&self, rollout: &RolloutId) -> broadcast::Receiver<Arc<RolloutEvent>> {
        let mut channels = self.channels();
        let channel = channels.entry(rollout.clone());
        let channel = channel.or_insert_with(|| broadcast::Sender::new(WATCHER_LAG));
        channel.subscribe()
    }

    /// Publishes an event, which is made only if anybody watches.
    pub(crate) fn publish(&self, rollout: &RolloutId, event: impl FnOnce() -> RolloutEvent) {
        let mut channels = self.channels();
        let Some(channel) = channels.get(rollout) else {
            return;
        };
        // An error says that the last watcher is gone.
        if channel.receiver_count() == 0 || channel.send(Arc::new(event())).is_err() {
            channels.remove(rollout);
        }
    }

    fn channels(&self) -> MutexGuard<'_, HashMap<RolloutId, broadcast::Sender<Arc<RolloutEvent>>>> {
        // Nothing that holds the lock leaves the map half changed.
        self.channels.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_reach_the_watchers_of_their_rollout_only() {
        let hub = Hub::default();
        let one = RolloutId::from_random([1; 6]);
        let other = RolloutId::from_random([2; 6]);
        let event = |number| RolloutEvent {
            number,
            ..RolloutEvent::default()
        };
        hub.publish(&one, || unreachable!("nobody watches"));
        let mut watcher = hub.subscribe(&one);
        let mut bystander = hub.subscribe(&other);
        hub.publish(&one, || event(7));
        assert_eq!(watcher.try_recv().unwrap().number, 7);
        assert!(bystander.try_recv().is_err());
        drop(watcher);
        hub.publish(&one, || unreachable!("nobody watches any more"));
        assert!(!hub.channels().contains_key(&one));
    }
}
