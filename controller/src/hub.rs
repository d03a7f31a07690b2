//! Live events on their way to whoever watches a rollout.
//!
//! What is published here was persisted before, but for progress, which is kept nowhere. A
//! watcher that falls behind is told so, and reads the coordinator's events again. One whose
//! channel is gone subscribes again: a rollout may go on after it has halted.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lockstep_proto::ids::RolloutId;
use lockstep_proto::wire::control_v1::{EventKind, RolloutEvent};
use tokio::sync::broadcast;

/// Events that a watcher may be behind before it has to read again: a step on 1,000 hosts makes
/// about 2,000 of them at once, each of them one pointer here.
const WATCHER_LAG: usize = 4096;

/// One channel for each rollout that is watched: it goes with the last watcher, or with the
/// rollout's end.
#[derive(Debug, Clone, Default)]
pub(crate) struct Hub {
    channels: Arc<Mutex<HashMap<RolloutId, broadcast::Sender<Arc<RolloutEvent>>>>>,
}

impl Hub {
    /// Everything that is published about a rollout from now on.
    pub(crate) fn subscribe(&self, rollout: &RolloutId) -> broadcast::Receiver<Arc<RolloutEvent>> {
        let mut channels = self.channels();
        // A channel has room for many events. Where nothing is published any more, nobody else
        // finds out that its watchers are gone.
        channels.retain(|_, channel| channel.receiver_count() > 0);
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
        if channel.receiver_count() == 0 {
            channels.remove(rollout);
            return;
        }
        let event = Arc::new(event());
        let ended = event.kind() == EventKind::Ended;
        // An error says that the last watcher is gone. What was sent is still received after the
        // sender is dropped.
        if channel.send(event).is_err() || ended {
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

    #[test]
    fn channels_without_watchers_are_dropped() {
        let hub = Hub::default();
        for number in 0..100 {
            // Seen once, and nothing is published about it afterwards.
            drop(hub.subscribe(&RolloutId::from_random([number; 6])));
        }
        let watched = RolloutId::from_random([200; 6]);
        let _watcher = hub.subscribe(&watched);
        let _another = hub.subscribe(&RolloutId::from_random([201; 6]));
        assert_eq!(hub.channels().len(), 2);
        assert!(hub.channels().contains_key(&watched));
    }

    #[tokio::test]
    async fn a_channel_goes_with_the_end_and_comes_back_with_a_new_watcher() {
        let hub = Hub::default();
        let rollout = RolloutId::from_random([1; 6]);
        let event = |number, kind: EventKind| RolloutEvent {
            number,
            kind: kind.into(),
            ..RolloutEvent::default()
        };
        let mut watcher = hub.subscribe(&rollout);
        hub.publish(&rollout, || event(7, EventKind::Ended));
        assert!(hub.channels().is_empty());
        assert_eq!(watcher.recv().await.unwrap().number, 7);
        assert!(watcher.recv().await.is_err(), "the channel is closed");

        // It had only halted.
        let mut watcher = hub.subscribe(&rollout);
        hub.publish(&rollout, || event(8, EventKind::Resumed));
        assert_eq!(watcher.recv().await.unwrap().number, 8);
    }
}
