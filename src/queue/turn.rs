//! Whose turn a new item is, among the consumers that wait.
//!
//! Everybody hears of an item at the same moment; if all tried to take it, all but one would ask etcd in vain. So the
//! consumers that wait are known by keys, and each computes the same order for an item: the one with the fewest claims
//! first, then by a hash. The first tries at once, the others after a while, if the item is still there then. A wrong
//! guess costs a request or a moment, never an item.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::time::Duration;

/// How long the second in order leaves an item to the first.
const FIRST: Duration = Duration::from_millis(50);
/// How much longer the next.
const STEP: Duration = Duration::from_millis(10);
/// The longest.
const MOST: Duration = Duration::from_millis(250);

/// The consumers that wait, and how busy they are.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    /// By key, with the lease.
    consumers: BTreeSet<(Vec<u8>, i64)>,
    claims: BTreeMap<i64, usize>,
}

impl Turns {
    pub(crate) fn arrived(&mut self, key: &[u8], lease: i64) {
        self.consumers.insert((key.to_vec(), lease));
    }

    pub(crate) fn left(&mut self, key: &[u8], lease: i64) {
        self.consumers.remove(&(key.to_vec(), lease));
    }

    pub(crate) fn claimed(&mut self, lease: i64) {
        *self.claims.entry(lease).or_default() += 1;
    }

    pub(crate) fn ended(&mut self, lease: i64) {
        if let Some(claims) = self.claims.get_mut(&lease) {
            *claims -= 1;
            if *claims == 0 {
                self.claims.remove(&lease);
            }
        }
    }

    /// How long the consumer with the key `me` leaves an item to others. One without a key leaves it to all that have
    /// one.
    pub(crate) fn patience(&self, item: &[u8], me: Option<&[u8]>) -> Duration {
        let order = |key: &[u8], lease: i64| {
            let mut hash = DefaultHasher::new();
            (item, key).hash(&mut hash);
            (self.claims.get(&lease).copied().unwrap_or(0), hash.finish())
        };
        let own = me.and_then(|me| self.consumers.iter().find(|(key, _)| key == me));
        let own = own.map(|(key, lease)| order(key, *lease));
        let before = |(key, lease): &&(Vec<u8>, i64)| own.is_none_or(|own| order(key, *lease) < own);
        match self.consumers.iter().filter(before).count() {
            0 => Duration::ZERO,
            rank => (FIRST + STEP * u32::try_from(rank).unwrap_or(u32::MAX).min(1000)).min(MOST),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn turns(consumers: &[&str]) -> Turns {
        let mut turns = Turns::default();
        for (lease, key) in (1..).zip(consumers) {
            turns.arrived(key.as_bytes(), lease);
        }
        turns
    }

    /// Who tries at once.
    fn first<'a>(turns: &Turns, item: u32, consumers: &[&'a str]) -> Vec<&'a str> {
        let item = item.to_be_bytes();
        let first = consumers.iter().filter(|key| turns.patience(&item, Some(key.as_bytes())).is_zero());
        first.copied().collect()
    }

    #[test]
    fn exactly_one_tries_at_once_and_each_has_its_share() {
        let consumers = ["a", "b", "c", "d"];
        let turns = turns(&consumers);
        let mut shares = BTreeMap::new();
        for item in 0..4000 {
            let first = first(&turns, item, &consumers);
            assert_eq!(first.len(), 1);
            *shares.entry(first[0]).or_insert(0) += 1;
        }
        assert!(shares.len() == 4 && shares.values().all(|share| (800..1200).contains(share)), "{shares:?}");
    }

    #[test]
    fn all_others_have_their_turn_soon_and_one_after_the_other() {
        let turns = turns(&["a", "b", "c", "d"]);
        let mut patience: Vec<_> =
            ["a", "b", "c", "d"].iter().map(|key| turns.patience(b"item", Some(key.as_bytes()))).collect();
        patience.sort();
        assert!(patience.windows(2).all(|pair| pair[0] < pair[1]), "{patience:?}");
        assert!(patience[3] <= MOST);
    }

    #[test]
    fn who_works_comes_after_who_is_free() {
        let mut turns = turns(&["a", "b"]);
        turns.claimed(1);
        assert!((0..100).all(|item| first(&turns, item, &["a", "b"]) == ["b"]));
        turns.ended(1);
        turns.ended(1);
        assert!((0..100).any(|item| first(&turns, item, &["a", "b"]) == ["a"]));
    }

    #[test]
    fn who_is_alone_never_waits_and_who_is_unknown_waits_for_all() {
        assert!(turns(&[]).patience(b"item", None).is_zero());
        assert!(turns(&["a"]).patience(b"item", Some(b"a")).is_zero());
        assert!(!turns(&["a"]).patience(b"item", None).is_zero());
        let mut turns = turns(&["a"]);
        turns.left(b"a", 1);
        assert!(turns.patience(b"item", None).is_zero());
    }
}
