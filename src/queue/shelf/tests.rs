//! A queue in memory, as its views would show it.

use std::collections::BTreeMap;
use std::time::Duration;

use super::*;

/// The two views and the shelf that is told of them.
struct Rig {
    keys: Arc<Keys>,
    shelf: Shelf,
    items: BTreeMap<Vec<u8>, Arc<Entry>>,
    books: BTreeMap<Vec<u8>, Arc<Entry>>,
    now: Instant,
}

impl Rig {
    fn new() -> Self {
        let keys = Arc::new(Keys::new("_ns/", b"q").unwrap());
        let (items, books) = (BTreeMap::new(), BTreeMap::new());
        Self { shelf: Shelf::new(keys.clone()), keys, items, books, now: Instant::now() }
    }

    fn put(&mut self, id: &str, create_revision: i64, mod_revision: i64) {
        let key = self.keys.item(id.as_bytes());
        let entry = entry(key, Vec::new(), create_revision, mod_revision, 0);
        let before = self.items.insert(entry.key.clone(), entry.clone());
        self.shelf.item(&Change { before, after: Some(entry) }, self.now, true);
    }

    fn remove(&mut self, id: &str) {
        let before = self.items.remove(&self.keys.item(id.as_bytes()));
        self.shelf.item(&Change { before, after: None }, self.now, true);
    }

    fn book(&mut self, key: Vec<u8>, value: Option<Vec<u8>>, revision: i64, lease: i64) {
        let after = value.map(|value| entry(key.clone(), value, revision, revision, lease));
        let before = match &after {
            Some(after) => self.books.insert(key, after.clone()),
            None => self.books.remove(&key),
        };
        let items = &self.items;
        self.shelf
            .book(&Change { before, after }, self.now, SystemTime::now(), &|key| items.get(key).cloned());
    }

    fn claim(&mut self, id: &str, revision: i64, attempts: u32, item: i64) {
        self.book(self.keys.claim(id.as_bytes()), Some(Vec::new()), revision, 1);
        let attempts = keys::write(&Attempts { attempts, item });
        self.book(self.keys.attempts(id.as_bytes()), Some(attempts), revision, 0);
    }

    fn unclaim(&mut self, id: &str) {
        self.book(self.keys.claim(id.as_bytes()), None, 0, 1);
    }

    fn pick(&mut self, most: usize) -> Vec<Candidate> {
        self.shelf.pick(self.now, most, false)
    }

    fn settle(&mut self, candidates: &[Candidate], tried: Tried) {
        let items = &self.items;
        self.shelf.settle(candidates, tried, self.now, &|key| items.get(key).cloned());
    }

    fn wake(&mut self) {
        let items = &self.items;
        self.shelf.wake(self.now, &|key| items.get(key).cloned());
    }
}

fn entry(key: Vec<u8>, value: Vec<u8>, create_revision: i64, mod_revision: i64, lease: i64) -> Arc<Entry> {
    Arc::new(Entry { key, value, create_revision, mod_revision, lease })
}

fn ids(candidates: &[Candidate]) -> Vec<String> {
    let id = |candidate: &Candidate| String::from_utf8_lossy(&candidate.entry.key[2..]).into_owned();
    candidates.iter().map(id).collect()
}

#[test]
fn items_come_in_the_order_of_their_commit_then_of_their_keys() {
    let mut rig = Rig::new();
    for (id, revision) in [("z", 5), ("b", 7), ("a", 7), ("y", 6), ("x", 9)] {
        rig.put(id, revision, revision);
    }
    // A put over an item does not change its place.
    rig.put("z", 5, 10);
    let picked = rig.pick(10);
    assert_eq!(ids(&picked), ["z", "y", "a", "b", "x"]);
    assert_eq!(picked[0].entry.mod_revision, 10);
}

#[test]
fn what_is_picked_is_not_offered_again_until_it_is_settled() {
    let mut rig = Rig::new();
    (1..=5).for_each(|n| rig.put(&n.to_string(), n, n));
    let picked = rig.pick(3);
    assert_eq!(ids(&rig.shelf.pick(rig.now, 9, false)), ["4", "5"]);
    rig.settle(&picked, Tried::None);
    assert_eq!(ids(&rig.pick(9)), ["1", "2", "3"]);
}

#[test]
fn what_was_tried_in_vain_comes_back_only_with_news() {
    let mut rig = Rig::new();
    (1..=4).for_each(|n| rig.put(&n.to_string(), n, n));
    let picked = rig.pick(4);
    // 1 and 2 were gone, 3 was taken.
    rig.settle(&picked, Tried::Took(2));
    let rest = rig.pick(9);
    assert_eq!(ids(&rest), ["4"]);
    rig.settle(&rest, Tried::All);
    assert!(rig.pick(9).is_empty());
    // 1 had been claimed, and is given back; 2 is deleted.
    rig.claim("1", 10, 1, 1);
    assert!(rig.pick(9).is_empty());
    rig.unclaim("1");
    rig.remove("2");
    let again = rig.pick(9);
    assert_eq!(ids(&again), ["1"]);
    assert_eq!((again[0].attempts(), again[0].attempts_revision()), (1, 10));
}

#[test]
fn news_that_came_before_the_answer_count() {
    let mut rig = Rig::new();
    rig.put("1", 1, 1);
    let picked = rig.pick(1);
    // Claimed and released by somebody else while our request was under way.
    rig.claim("1", 5, 1, 1);
    rig.unclaim("1");
    assert!(rig.pick(1).is_empty(), "still under way");
    rig.settle(&picked, Tried::All);
    assert_eq!(rig.pick(1)[0].attempts_revision(), 5);
}

#[test]
fn after_missed_changes_everything_is_looked_at_again() {
    let mut rig = Rig::new();
    rig.put("1", 1, 1);
    let picked = rig.pick(1);
    rig.settle(&picked, Tried::All);
    assert!(rig.pick(1).is_empty());
    let items: Vec<_> = rig.items.values().cloned().collect();
    rig.shelf.look_at_all(items.iter(), rig.now);
    assert_eq!(ids(&rig.pick(1)), ["1"]);
}

#[test]
fn redelivered_items_keep_their_place() {
    let mut rig = Rig::new();
    (1..=3).for_each(|n| rig.put(&n.to_string(), n, n));
    rig.claim("1", 10, 1, 1);
    let picked = rig.pick(1);
    assert_eq!(ids(&picked), ["2"]);
    rig.settle(&picked, Tried::None);
    rig.unclaim("1");
    assert_eq!(ids(&rig.pick(3)), ["1", "2", "3"]);
}

#[test]
fn attempts_of_an_earlier_item_of_the_same_key_do_not_count() {
    let mut rig = Rig::new();
    rig.put("1", 20, 20);
    rig.claim("1", 10, 7, 3);
    rig.unclaim("1");
    let picked = rig.pick(1);
    assert_eq!((picked[0].attempts(), picked[0].attempts_revision()), (0, 10));
}

#[test]
fn a_delayed_item_rests_and_wakes() {
    let mut rig = Rig::new();
    rig.put("1", 1, 1);
    let delay = Delay::new(Duration::from_secs(5), std::time::SystemTime::now());
    rig.book(rig.keys.delay(b"1"), Some(keys::write(&delay)), 2, 0);
    assert!(rig.pick(1).is_empty());
    let due = rig.shelf.next().unwrap();
    assert!(due > rig.now + Duration::from_secs(4));
    rig.wake();
    assert!(rig.pick(1).is_empty());
    rig.now = due;
    rig.wake();
    let picked = rig.pick(1);
    assert!(picked[0].delayed, "its key is still there");
    rig.settle(&picked, Tried::None);
    rig.book(rig.keys.delay(b"1"), None, 0, 0);
    assert!(!rig.pick(1)[0].delayed);
}

#[test]
fn an_item_of_another_is_left_to_it_for_a_moment() {
    let mut rig = Rig::new();
    for lease in 1..=2 {
        rig.book(rig.keys.consumer(lease, 0), Some(Vec::new()), lease, lease);
    }
    rig.shelf.me = Some(rig.keys.consumer(1, 0));
    (1..=20).for_each(|n| rig.put(&n.to_string(), n, n));
    let own = rig.pick(99).len();
    assert!((1..20).contains(&own), "{own} of 20");
    let due = rig.shelf.next().unwrap();
    assert!(due > rig.now);
    rig.now = due;
    assert_eq!(rig.pick(99).len(), 20 - own);
    // But not when there is more than enough for all.
    (21..=80).for_each(|n| rig.put(&n.to_string(), n, n));
    assert_eq!(rig.pick(99).len(), 60);
}

#[test]
fn nothing_is_kept_of_what_is_gone() {
    let mut rig = Rig::new();
    rig.put("1", 1, 1);
    let delay = Delay::new(Duration::from_secs(5), std::time::SystemTime::now());
    rig.book(rig.keys.delay(b"1"), Some(keys::write(&delay)), 2, 0);
    rig.claim("1", 3, 1, 1);
    rig.remove("1");
    rig.unclaim("1");
    for key in [rig.keys.attempts(b"1"), rig.keys.delay(b"1")] {
        rig.book(key, None, 0, 0);
    }
    let Shelf { ready, notes, resting, tried, .. } = &rig.shelf;
    assert!(ready.is_empty() && notes.is_empty() && resting.is_empty() && tried.is_empty());
}
