//! Lookups of ascending keys: what is asked of every host of a fleet takes a step along its map each,
//! not a search each.

use std::collections::BTreeMap;
use std::collections::btree_map::Range;
use std::iter::Peekable;

/// About what a search compares on one level of a map: beyond as many steps it is the shorter way.
const STEPS: usize = 8;

/// Goes along a map as its keys are asked for. It finds what a search finds, in whatever order keys
/// are asked for; only ascending ones are quick.
pub(crate) struct Ascending<'a, K, V> {
    map: Option<&'a BTreeMap<K, V>>,
    /// Stands at the first key that is not below `last`; none before the second question.
    ahead: Option<Peekable<Range<'a, K, V>>>,
    /// What was asked for last.
    last: Option<&'a K>,
}

impl<'a, K: Ord, V> Ascending<'a, K, V> {
    /// Along this map; none has no keys.
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
        // Most often only one host is asked about.
        let Some(last) = self.last.replace(key) else {
            return map.get(key);
        };
        let ahead = match &mut self.ahead {
            Some(ahead) if last <= key => ahead,
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
            let map: BTreeMap<_, _> = keys.iter().map(|key| (*key, key.to_string())).collect();
            let mut along = Ascending::new(Some(&map));
            for key in &asked {
                prop_assert_eq!(along.get(key), map.get(key));
            }
        }
    }

    #[test]
    fn no_map_has_no_keys() {
        let mut along = Ascending::<u8, u8>::new(None);
        assert_eq!([along.get(&1), along.get(&2)], [None, None]);
    }
}
