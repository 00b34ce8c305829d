//! A hash map that is copied cheaply: a copy shares everything, and a change copies only the small part it is in.
//!
//! Two levels of arrays lead to small hash tables. A reader of one copy is never in the way of the writer of the next.

use std::hash::BuildHasher;
use std::sync::Arc;

use hashbrown::{DefaultHashBuilder, HashTable};

/// How many branches each level has: 1,024 tables in all.
const FAN: usize = 32;

/// Something that is found by a key it holds itself.
pub(super) trait Keyed: Clone {
    fn key(&self) -> &[u8];
}

/// A persistent map of things by their keys.
#[derive(Debug, Clone)]
pub(super) struct Map<V> {
    root: Arc<[Arc<Group<V>>; FAN]>,
    hasher: DefaultHashBuilder,
    len: usize,
}

type Group<V> = [Arc<HashTable<V>>; FAN];

impl<V> Default for Map<V> {
    fn default() -> Self {
        // One empty table and one group stand in every place, until something is put there.
        let table = Arc::new(HashTable::new());
        let group: Arc<Group<V>> = Arc::new(std::array::from_fn(|_| table.clone()));
        let root = Arc::new(std::array::from_fn(|_| group.clone()));
        Self { root, hasher: DefaultHashBuilder::default(), len: 0 }
    }
}

impl<V: Keyed> Map<V> {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Everything, in no order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &V> {
        self.root.iter().flat_map(|group| group.iter()).flat_map(|table| table.iter())
    }

    pub(super) fn get(&self, key: &[u8]) -> Option<&V> {
        let hash = self.hasher.hash_one(key);
        let (first, second) = path(hash);
        self.root[first][second].find(hash, |value| value.key() == key)
    }

    /// Puts a value in the place of one with the same key.
    pub(super) fn insert(&mut self, value: V) {
        let hash = self.hasher.hash_one(value.key());
        let hasher = self.hasher.clone();
        let table = self.table(hash);
        match table.find_mut(hash, |held| held.key() == value.key()) {
            Some(held) => *held = value,
            None => {
                table.insert_unique(hash, value, |held| hasher.hash_one(held.key()));
                self.len += 1;
            }
        }
    }

    pub(super) fn remove(&mut self, key: &[u8]) {
        if self.get(key).is_none() {
            return;
        }
        let hash = self.hasher.hash_one(key);
        if let Ok(held) = self.table(hash).find_entry(hash, |held| held.key() == key) {
            held.remove();
            self.len -= 1;
        }
    }

    /// The table for a hash, for this map alone.
    fn table(&mut self, hash: u64) -> &mut HashTable<V> {
        let (first, second) = path(hash);
        let group = Arc::make_mut(&mut Arc::make_mut(&mut self.root)[first]);
        Arc::make_mut(&mut group[second])
    }
}

/// The way to a table: by bits that the table itself does not use first.
fn path(hash: u64) -> (usize, usize) {
    ((hash >> 32) as usize % FAN, (hash >> 37) as usize % FAN)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[derive(Debug, Clone, PartialEq)]
    struct Pair(Vec<u8>, u64);

    impl Keyed for Pair {
        fn key(&self) -> &[u8] {
            &self.0
        }
    }

    fn contents(map: &Map<Pair>) -> BTreeMap<Vec<u8>, u64> {
        map.iter().map(|pair| (pair.0.clone(), pair.1)).collect()
    }

    #[test]
    fn it_does_what_a_map_does_and_a_copy_stays_as_it_was() {
        let mut random = fastrand::Rng::with_seed(7);
        let (mut map, mut model) = (Map::default(), BTreeMap::new());
        for round in 0..200 {
            let (copy, before) = (map.clone(), model.clone());
            for _ in 0..100 {
                let key = random.u16(..3000).to_string().into_bytes();
                if random.u8(..3) == 0 {
                    map.remove(&key);
                    model.remove(&key);
                } else {
                    map.insert(Pair(key.clone(), round));
                    model.insert(key.clone(), round);
                }
                assert_eq!(map.get(&key).map(|pair| pair.1), model.get(&key).copied());
            }
            assert_eq!((map.len(), contents(&map)), (model.len(), model));
            assert_eq!((copy.len(), contents(&copy)), (before.len(), before));
            model = contents(&map);
        }
    }
}
