//! Live events on their way to whoever watches a rollout.
//!
//! What is published here was persisted before, but for progress, which is kept nowhere. Events that
//! are published together are encoded once, for everybody. A watcher that falls behind is told so,
//! and reads the coordinator's events again. One whose channel is gone subscribes again: a rollout
//! may go on after it has halted.

mod piece;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lockstep_proto::ids::RolloutId;
use lockstep_proto::wire::control_v1::RolloutEvent;
use tokio::sync::broadcast;

pub(crate) use piece::{PIECE, Piece};

/// Pieces that a watcher may be behind before it has to read again: a step on 10,000 hosts makes
/// about 500 of them at once, and progress comes as pieces of one event. They are shared, so one
/// rollout's take at most 16 MB, whoever is behind.
const WATCHER_LAG: usize = 2048;

/// One channel for each rollout that is watched: it goes with the last watcher, or with the
/// rollout's end.
#[derive(Debug, Clone)]
pub(crate) struct Hub {
    channels: Arc<Mutex<HashMap<RolloutId, Channel>>>,
    lag: usize,
}

type Channel = broadcast::Sender<Arc<Piece>>;

impl Default for Hub {
    fn default() -> Self {
        Self::with_lag(WATCHER_LAG)
    }
}

impl Hub {
    /// One whose watchers may be so many pieces behind.
    pub(crate) fn with_lag(lag: usize) -> Self {
        Self {
            channels: Arc::default(),
            lag,
        }
    }

    /// Everything that is published about a rollout from now on.
    pub(crate) fn subscribe(&self, rollout: &RolloutId) -> broadcast::Receiver<Arc<Piece>> {
        let mut channels = self.channels();
        // A channel has room for many events. Where nothing is published any more, nobody else
        // finds out that its watchers are gone.
        channels.retain(|_, channel| channel.receiver_count() > 0);
        let channel = channels.entry(rollout.clone());
        let channel = channel.or_insert_with(|| broadcast::Sender::new(self.lag));
        channel.subscribe()
    }

    /// Publishes events, in the order of their numbers. They are made only if anybody watches.
    pub(crate) fn publish(
        &self,
        rollout: &RolloutId,
        events: impl IntoIterator<Item = RolloutEvent>,
    ) {
        let Some(channel) = self.watched(rollout) else {
            return;
        };
        let mut over = false;
        for piece in Piece::pack(events) {
            let has_end = piece.has_end();
            // An error says that the last watcher is gone. What was sent is still received after
            // the sender is dropped.
            over |= channel.send(Arc::new(piece)).is_err() || has_end;
        }
        if over {
            // Whoever subscribed meanwhile finds it closed, and subscribes again.
            self.channels().remove(rollout);
        }
    }

    /// The channel of a rollout that somebody watches.
    fn watched(&self, rollout: &RolloutId) -> Option<Channel> {
        let mut channels = self.channels();
        let channel = channels.get(rollout)?;
        if channel.receiver_count() == 0 {
            channels.remove(rollout);
            return None;
        }
        // Others need not wait while events are encoded.
        Some(channel.clone())
    }

    fn channels(&self) -> MutexGuard<'_, HashMap<RolloutId, Channel>> {
        // Nothing that holds the lock leaves the map half changed.
        self.channels.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::iter::{once, once_with};

    use lockstep_proto::wire::control_v1::EventKind;

    use super::piece::tests::event;
    use super::*;

    fn newest(piece: &Piece) -> u64 {
        piece.after(0).unwrap().1
    }

    #[test]
    fn events_reach_the_watchers_of_their_rollout_only() {
        let hub = Hub::default();
        let one = RolloutId::from_random([1; 6]);
        let other = RolloutId::from_random([2; 6]);
        hub.publish(&one, once_with(|| unreachable!("nobody watches")));
        let mut watcher = hub.subscribe(&one);
        let mut bystander = hub.subscribe(&other);
        hub.publish(&one, [7, 8].map(|number| event(number, EventKind::StepOk)));
        assert_eq!(newest(&watcher.try_recv().unwrap()), 8, "together");
        assert!(watcher.try_recv().is_err());
        assert!(bystander.try_recv().is_err());
        drop(watcher);
        hub.publish(&one, once_with(|| unreachable!("nobody watches any more")));
        assert!(!hub.channels().contains_key(&one));
    }

    #[test]
    fn what_many_receive_is_encoded_once() {
        let hub = Hub::default();
        let rollout = RolloutId::from_random([1; 6]);
        let mut watchers = [(); 3].map(|()| hub.subscribe(&rollout));
        hub.publish(&rollout, once(event(7, EventKind::StepOk)));
        let received = watchers.each_mut().map(|one| one.try_recv().unwrap());
        assert!(received.iter().all(|one| Arc::ptr_eq(one, &received[0])));
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
        let mut watcher = hub.subscribe(&rollout);
        hub.publish(&rollout, once(event(7, EventKind::Ended)));
        assert!(hub.channels().is_empty());
        assert_eq!(newest(&watcher.recv().await.unwrap()), 7);
        assert!(watcher.recv().await.is_err(), "the channel is closed");

        // It had only halted.
        let mut watcher = hub.subscribe(&rollout);
        hub.publish(&rollout, once(event(8, EventKind::Resumed)));
        assert_eq!(newest(&watcher.recv().await.unwrap()), 8);
    }
}
