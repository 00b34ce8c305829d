//! The keys of a queue, and what is written into those of the bookkeeping.
//!
//! | key | value | lives |
//! |---|---|---|
//! | `{name}/{id}` | the item | until it is taken, acked or given up |
//! | `{namespace}queue/{name}/work/claim/{id}` | who works on it | with the claim, on the consumer's lease |
//! | `{namespace}queue/{name}/work/attempts/{id}` | how often it was claimed | with the item |
//! | `{namespace}queue/{name}/work/delay/{id}` | until when it rests | until it is claimed or taken |
//! | `{namespace}queue/{name}/work/consumer/{lease}-{nonce}` | nothing | while a consumer waits, on its lease |
//! | `{namespace}queue/{name}/dead/item/{id}` | an item that was given up | until requeued or purged |
//! | `{namespace}queue/{name}/dead/why/{id}` | why, after how many attempts, when | as long |
//! | `{namespace}queue/{name}/once/{id}` | nothing | for the time in which an id is taken once |
//!
//! Nothing but items is under the queue's own name: etcd's Go package takes every key there for an item. In the
//! bookkeeping keys the name is escaped, so that it is one part of the path and no queue's keys are within another's.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::name::{self, Prefix};

/// The keys of one queue.
#[derive(Debug, Clone)]
pub(crate) struct Keys {
    /// The items.
    pub(crate) items: Prefix,
    /// What consumers tell each other of the items.
    pub(crate) work: Prefix,
    /// The dead letters: first all values, then all reasons.
    pub(crate) dead: Prefix,
    once: Vec<u8>,
}

/// What a bookkeeping key of the consumers is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Book<'a> {
    Claim(&'a [u8]),
    Attempts(&'a [u8]),
    Delay(&'a [u8]),
    Consumer,
}

/// How often an item was claimed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Attempts {
    pub(crate) attempts: u32,
    /// The create revision of the item that is meant: another may come under its key.
    pub(crate) item: i64,
}

/// How long an item rests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Delay {
    /// In milliseconds. No consumer waits longer than this, whatever the clocks say.
    delay: u64,
    /// Milliseconds since 1970, by the clock of who wrote it.
    until: u64,
}

/// Why an item was given up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Why {
    pub(crate) reason: String,
    pub(crate) attempts: u32,
    /// Seconds since 1970, by the clock of who gave it up.
    pub(crate) since: u64,
}

// === impl Keys ===

impl Keys {
    pub(crate) fn new(namespace: &str, name: &[u8]) -> Result<Self> {
        let items = Prefix::of_name(name)?;
        if items.overlaps(namespace) {
            let reason = "it is that of the session's bookkeeping keys, or contains it";
            return Err(Error::InvalidName { name: name::display(name), reason });
        }
        let of = |part: &str| [namespace.as_bytes(), b"queue/", &escape(name), part.as_bytes()].concat();
        Ok(Self {
            items,
            work: Prefix::of_bytes(&of("/work/"))?,
            dead: Prefix::of_bytes(&of("/dead/"))?,
            once: of("/once/"),
        })
    }

    pub(crate) fn item(&self, id: &[u8]) -> Vec<u8> {
        [self.items.as_bytes(), id].concat()
    }

    /// What comes after the queue's name in the key of an item.
    pub(crate) fn id<'a>(&self, key: &'a [u8]) -> &'a [u8] {
        key.strip_prefix(self.items.as_bytes()).unwrap_or(key)
    }

    pub(crate) fn claim(&self, id: &[u8]) -> Vec<u8> {
        [self.work.as_bytes(), b"claim/", id].concat()
    }

    pub(crate) fn attempts(&self, id: &[u8]) -> Vec<u8> {
        [self.work.as_bytes(), b"attempts/", id].concat()
    }

    pub(crate) fn delay(&self, id: &[u8]) -> Vec<u8> {
        [self.work.as_bytes(), b"delay/", id].concat()
    }

    pub(crate) fn consumer(&self, lease: i64, nonce: u32) -> Vec<u8> {
        [self.work.as_bytes(), format!("consumer/{lease:x}-{nonce:x}").as_bytes()].concat()
    }

    pub(crate) fn dead_item(&self, id: &[u8]) -> Vec<u8> {
        [self.dead.as_bytes(), b"item/", id].concat()
    }

    pub(crate) fn dead_why(&self, id: &[u8]) -> Vec<u8> {
        [self.dead.as_bytes(), b"why/", id].concat()
    }

    /// The record that an id was enqueued.
    pub(crate) fn once(&self, id: &[u8]) -> Vec<u8> {
        [&self.once, id].concat()
    }

    /// What a key of the consumers' bookkeeping is about; `None` if it is not ours.
    pub(crate) fn book<'a>(&self, key: &'a [u8]) -> Option<Book<'a>> {
        let rest = key.strip_prefix(self.work.as_bytes())?;
        let slash = rest.iter().position(|byte| *byte == b'/')?;
        let id = &rest[slash + 1..];
        match &rest[..slash] {
            b"claim" => Some(Book::Claim(id)),
            b"attempts" => Some(Book::Attempts(id)),
            b"delay" => Some(Book::Delay(id)),
            b"consumer" => Some(Book::Consumer),
            _ => None,
        }
    }
}

/// A name as one part of a path.
fn escape(name: &[u8]) -> Vec<u8> {
    let mut escaped = Vec::with_capacity(name.len());
    for byte in name {
        match byte {
            b'/' => escaped.extend_from_slice(b"%2F"),
            b'%' => escaped.extend_from_slice(b"%25"),
            byte => escaped.push(*byte),
        }
    }
    escaped
}

// === impl of what is written ===

/// Reads a value of ours. Anything else says nothing.
pub(crate) fn read<'a, T: Deserialize<'a>>(value: &'a [u8]) -> Option<T> {
    serde_json::from_slice(value).ok()
}

/// The bytes of a value of ours.
pub(crate) fn write(value: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(value).unwrap_or_default()
}

impl Delay {
    pub(crate) fn new(delay: Duration, now: SystemTime) -> Self {
        let delay = millis(delay);
        Self { delay, until: since_1970(now).saturating_add(delay) }
    }

    /// How long to wait from now on, when it is seen now for the first time.
    pub(crate) fn rest(&self, now: SystemTime) -> Duration {
        Duration::from_millis(self.until.saturating_sub(since_1970(now)).min(self.delay))
    }
}

fn since_1970(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, millis)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn keys(name: &str) -> Keys {
        Keys::new("_ns/", name.as_bytes()).unwrap()
    }

    #[test]
    fn an_item_is_all_that_is_under_the_name() {
        let keys = keys("/jobs");
        assert_eq!(keys.item(b"1"), b"/jobs/1");
        assert_eq!(keys.id(b"/jobs/a/b"), b"a/b");
        for book in [keys.claim(b"1"), keys.attempts(b"1"), keys.delay(b"1"), keys.dead_item(b"1")] {
            assert!(book.starts_with(b"_ns/queue/%2Fjobs/"), "{}", String::from_utf8_lossy(&book));
        }
    }

    #[test]
    fn books_are_told_apart() {
        let keys = keys("a");
        assert_eq!(keys.book(&keys.claim(b"x/y")), Some(Book::Claim(b"x/y")));
        assert_eq!(keys.book(&keys.attempts(b"x")), Some(Book::Attempts(b"x")));
        assert_eq!(keys.book(&keys.delay(b"")), Some(Book::Delay(b"")));
        assert_eq!(keys.book(&keys.consumer(10, 1)), Some(Book::Consumer));
        assert_eq!(keys.book(b"_ns/queue/a/work/other/x"), None);
        assert_eq!(keys.book(b"_ns/queue/a/work/"), None);
        assert_eq!(keys.book(b"elsewhere"), None);
    }

    #[test]
    fn no_books_of_a_queue_are_within_those_of_another() {
        let names = ["a", "a/", "a/work", "a/work/claim", "a%2Fwork", "a%", "%2F", "/", "//"];
        for (at, one) in names.iter().enumerate() {
            for other in &names[at + 1..] {
                let (one, other) = (keys(one), keys(other));
                assert!(!one.work.nested(&other.work) && one.work != other.work, "{one:?} {other:?}");
                assert!(!one.work.nested(&other.dead) && !one.dead.nested(&other.work));
            }
        }
    }

    #[test]
    fn names_that_meet_the_bookkeeping_are_refused() {
        for name in ["_ns", "_ns/queue", "_ns/queue/a/work"] {
            assert!(matches!(Keys::new("_ns/", name.as_bytes()), Err(Error::InvalidName { .. })), "{name}");
        }
        assert!(Keys::new("_ns/", b"").is_err() && Keys::new("_ns/", b"a\0b").is_err());
    }

    #[test]
    fn a_delay_is_never_longer_than_it_was_asked_for() {
        let now = SystemTime::now();
        let delay = Delay::new(Duration::from_secs(10), now);
        assert_eq!(delay.rest(now), Duration::from_secs(10));
        assert_eq!(delay.rest(now + Duration::from_secs(4)).as_secs(), 6);
        assert_eq!(delay.rest(now + Duration::from_secs(11)), Duration::ZERO);
        // The clock of who reads it is an hour behind.
        assert_eq!(delay.rest(now - Duration::from_secs(3600)), Duration::from_secs(10));
        assert_eq!(Delay::new(Duration::MAX, now).until, u64::MAX);
    }

    #[test]
    fn what_is_not_ours_says_nothing() {
        assert_eq!(read::<Attempts>(b"garbage"), None);
        let attempts = Attempts { attempts: 2, item: 7 };
        assert_eq!(read(&write(&attempts)), Some(attempts));
    }
}
