//! Lookups of ascending keys: what is asked of every host of a fleet takes a step of its map each, not
//! a search each.

use std::collections::BTreeMap;
use std::collections::btree_map::Range;
use std::iter::Peekable;

/// A key that is further away is searched for.
const STEPS: usize = 8;

/// Goes through a map as its keys are asked for. Keys in another order, too, get what a search would
/// find; only slower.
pub(crate) struct Walk<'a, K, V> {
    map: Option<&'a BTreeMap<K, V>>,
    ahead: Option<Peekable<Range<'a, K, V>>>,
    last: Option<&'a K>,
}

impl<'a, K: Ord, V> Walk<'a, K, V> {
    /// Through this map; none has no keys.
    pub(crate) fn new(map: Option<&'a BTreeMap<K, V>>) -> Self {
        Self {
            map,
            ahead: None,
            last: None,
        }
    }

    /// What the map has for a key.
    pub(crate) fn get(&mut self, key: &'a K) -> Option<&'a V> {
        let map = self.map?;
        let is_ahead = self.last.replace(key).is_some_and(|last| last <= key);
        let ahead = match &mut self.ahead {
            Some(ahead) if is_ahead => ahead,
            ahead => ahead.insert(map.range(key..).peekable()),
        };
        for _ in 0..STEPS {
            if ahead.next_if(|(at, _)| *at < key).is_none() {
                return of(ahead, key);
            }
        }
        of(self.ahead.insert(map.range(key..).peekable()), key)
    }
}

/// What comes next, if it is this key's.
fn of<'a, K: Ord, V>(ahead: &mut Peekable<Range<'a, K, V>>, key: &K) -> Option<&'a V> {
    let (at, value) = ahead.peek()?;
    (*at == key).then_some(*value)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_finds_what_a_search_finds(
            keys in prop::collection::btree_set(0..200_u8, 0..60),
            mut asked in prop::collection::vec(0..200_u8, 0..60),
            ascending in any::<bool>(),
        ) {
            if ascending {
                asked.sort_unstable();
            }
            let map: BTreeMap<u8, String> = keys.iter().map(|key| (*key, key.to_string())).collect();
            let mut walk = Walk::new(Some(&map));
            for key in &asked {
                prop_assert_eq!(walk.get(key), map.get(key));
            }
        }
    }

    #[test]
    fn no_map_has_no_keys() {
        assert_eq!(Walk::<u8, u8>::new(None).get(&1), None);
    }
}
