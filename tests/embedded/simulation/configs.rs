//! Config caches: changes in order, none twice, none missed; what is published is written once, and only over what was
//! seen; all caches show etcd's state in the end.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex as Shared};
use std::time::Duration;

use etcd_recipes::{ConfigCache, ConfigChange};
use fastrand::Rng;
use futures::StreamExt as _;
use tokio::task::JoinSet;

use super::trace::Trace;
use super::world::{CALM, History, Process, World};

const KEYS: [&str; 3] = ["a", "b", "c"];

/// What was asked for and what was heard.
#[derive(Default)]
struct Book {
    next: u64,
    /// Values that were published, with the revision that they were to replace.
    asked: BTreeMap<Vec<u8>, Option<i64>>,
    answered: Vec<Answer>,
    /// The revisions that deletions were to replace, by those at which they did.
    deleted: BTreeMap<i64, i64>,
}

/// What a write was said to have done.
struct Answer {
    key: &'static str,
    /// `None`: a deletion.
    value: Option<Vec<u8>>,
    /// When it was done, if it was.
    revision: Option<i64>,
}

/// What the changes of one cache came to.
#[derive(Default)]
struct Seen {
    revision: i64,
    /// The keys as they are now, with the revisions at which they were put.
    now: BTreeMap<Vec<u8>, (i64, Vec<u8>)>,
    /// All changes but the first list, in order: a key, and its revision unless it was deleted.
    changes: Vec<(i64, Vec<u8>, Option<i64>)>,
}

impl Seen {
    fn take(&mut self, change: &ConfigChange, first: bool) {
        let key = change.key().to_vec();
        assert!(change.revision >= self.revision, "{change:?} after {}", self.revision);
        self.revision = change.revision;
        let before = change.before.as_ref().map(etcd_recipes::ConfigEntry::revision);
        assert_eq!(before, self.now.get(&key).map(|(revision, _)| *revision), "missed before {change:?}");
        match &change.after {
            Some(after) => {
                assert!(Some(after.revision()) > before && after.revision() <= change.revision, "{change:?}");
                self.now.insert(key.clone(), (after.revision(), after.value().to_vec()));
            }
            None => assert!(self.now.remove(&key).is_some(), "{change:?} of nothing"),
        }
        if !first {
            let put = change.after.as_ref().map(etcd_recipes::ConfigEntry::revision);
            self.changes.push((change.revision, key, put));
        }
    }
}

/// Caches and those who publish through them.
pub(super) struct Configs {
    book: Arc<Shared<Book>>,
    tasks: JoinSet<()>,
    followed: Vec<Followed>,
    trace: Trace,
}

struct Followed {
    cache: ConfigCache,
    seen: Arc<Shared<Seen>>,
}

impl Configs {
    pub(super) fn begin(processes: &[Process], random: &mut Rng, trace: &Trace) -> Self {
        let (book, mut tasks, mut followed) =
            (Arc::new(Shared::new(Book::default())), JoinSet::new(), Vec::new());
        for process in processes {
            let cache = ConfigCache::new(&process.session, "config").unwrap();
            tasks.spawn(publish(cache.clone(), book.clone(), random.fork()));
            followed.push(Followed::begin(cache, trace.clone()));
        }
        Self { book, tasks, followed, trace: trace.clone() }
    }

    /// Waits for those who publish, and for the caches to catch up.
    pub(super) async fn end(&mut self, world: &World) {
        let all = async {
            while let Some(done) = self.tasks.join_next().await {
                done.unwrap();
            }
        };
        tokio::time::timeout(CALM, all).await.expect("a publisher is stuck");
        // One that begins late is told the same.
        let late = ConfigCache::open(&world.processes[0].session, "config");
        let late = tokio::time::timeout(CALM, late).await.unwrap().unwrap();
        self.followed.push(Followed::begin(late, self.trace.clone()));
        for followed in &self.followed {
            tokio::time::timeout(CALM, followed.caught_up(world)).await.expect("a cache does not catch up");
        }
        let history = world.history.lock().unwrap();
        for followed in &self.followed {
            followed.check(&history, world.compacts);
        }
    }

    /// Everything was written once at most, over what it was to replace, and as was answered.
    pub(super) fn check_writes(&self, history: &History) {
        let book = self.book.lock().unwrap();
        let (mut now, mut written) = (BTreeMap::new(), BTreeMap::new());
        for (revision, key, value) in of_configs(history) {
            let before = now.insert(key, *revision).unwrap_or(0);
            match value {
                Some(value) => {
                    assert_eq!(written.insert(value, (*revision, key)), None, "{value:?} is written twice");
                    if let Some(expected) = book.asked[value] {
                        assert_eq!(before, expected, "{value:?} replaced what it had not seen");
                    }
                }
                None => {
                    now.remove(key);
                    let expected = book.deleted.get(revision);
                    assert!(
                        expected.is_none_or(|expected| *expected == before),
                        "deleted what it had not seen"
                    );
                }
            }
        }
        for Answer { key, value, revision } in &book.answered {
            let full = format!("config/{key}").into_bytes();
            match (value, revision) {
                (Some(value), Some(revision)) => {
                    assert_eq!(written.get(value), Some(&(*revision, &full)), "{value:?}");
                }
                (Some(value), None) => assert_eq!(written.get(value), None, "{value:?}"),
                (None, Some(revision)) => {
                    let deletion = (*revision, full, None);
                    assert!(history.contains(&deletion), "there is no {deletion:?}");
                }
                (None, None) => {}
            }
        }
    }
}

fn of_configs(history: &History) -> impl Iterator<Item = &(i64, Vec<u8>, Option<Vec<u8>>)> {
    history.iter().filter(|(_, key, _)| key.starts_with(b"config/"))
}

impl Followed {
    fn begin(cache: ConfigCache, trace: Trace) -> Self {
        let seen = Arc::new(Shared::new(Seen::default()));
        let (mut changes, told) = (cache.changes(""), seen.clone());
        tokio::spawn(async move {
            let mut listed = None;
            while let Some(change) = changes.next().await {
                trace.note(format!("told of {} of {}", change.revision, change.key().escape_ascii()));
                let listed = *listed.get_or_insert(change.revision);
                told.lock().unwrap().take(&change, change.revision == listed);
            }
        });
        Self { cache, seen }
    }

    /// Waits until the cache and its changes say what etcd does.
    async fn caught_up(&self, world: &World) {
        let keys = world.server.keys("config/").into_iter();
        let truth: BTreeMap<_, _> =
            keys.map(|key| (key.key[b"config/".len()..].to_vec(), (key.mod_revision, key.value))).collect();
        loop {
            let snapshot = self.cache.snapshot();
            let shown: BTreeMap<_, _> = snapshot
                .iter()
                .map(|entry| (entry.key().to_vec(), (entry.revision(), entry.value().to_vec())))
                .collect();
            if shown == truth && self.seen.lock().unwrap().now == truth && self.cache.stale_since().is_none()
            {
                return;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// What was told did happen; and all of it was told, unless it may have been forgotten meanwhile.
    fn check(&self, history: &History, compacts: bool) {
        let seen = self.seen.lock().unwrap();
        let happened = of_configs(history).map(|(revision, key, value)| {
            (*revision, key[b"config/".len()..].to_vec(), value.is_some().then_some(*revision))
        });
        let Some((first, ..)) = seen.changes.first() else { return };
        if compacts {
            let happened: BTreeSet<_> = happened.map(|(_, key, put)| (key, put)).collect();
            let told = seen.changes.iter().map(|(_, key, put)| (key.clone(), *put));
            let untrue: Vec<_> = told.filter(|told| !happened.contains(told)).collect();
            assert!(untrue.is_empty(), "told, but did not happen: {untrue:?}");
        } else {
            let happened: Vec<_> = happened.filter(|(revision, ..)| revision >= first).collect();
            assert_eq!(seen.changes, happened);
        }
    }
}

/// Publishes and deletes, with conditions and without; gives some attempts up.
async fn publish(cache: ConfigCache, book: Arc<Shared<Book>>, mut random: Rng) {
    for _ in 0..random.usize(2..12) {
        tokio::time::sleep(Duration::from_millis(random.u64(..5_000))).await;
        let patience = Duration::from_millis(random.u64(1..20_000));
        let key = KEYS[random.usize(..KEYS.len())];
        let expected = cache.get(key).map_or(0, |entry| entry.revision());
        let value = {
            let mut book = book.lock().unwrap();
            book.next += 1;
            book.next.to_string().into_bytes()
        };
        let asked = |expected| {
            book.lock().unwrap().asked.insert(value.clone(), expected);
        };
        let (value, write) = match random.u8(..6) {
            0 | 1 => {
                asked(None);
                let write = async { cache.publish(key, value.clone()).await.map(Some) };
                (Some(value.clone()), tokio::time::timeout(patience, write).await)
            }
            2 | 3 => {
                asked(Some(expected));
                let write = cache.publish_if(key, expected, value.clone());
                (Some(value.clone()), tokio::time::timeout(patience, write).await)
            }
            4 => (None, tokio::time::timeout(patience, cache.delete(key)).await),
            _ => {
                let deleted = tokio::time::timeout(patience, cache.delete_if(key, expected)).await;
                if let Ok(Ok(Some(revision))) = deleted {
                    book.lock().unwrap().deleted.insert(revision, expected);
                }
                (None, deleted)
            }
        };
        let Ok(Ok(revision)) = write else { continue };
        book.lock().unwrap().answered.push(Answer { key, value, revision });
        if let Some(revision) = revision
            && let Ok(waited) = tokio::time::timeout(patience, cache.wait_for(revision)).await
        {
            waited.unwrap();
            let shown = cache.get(key);
            assert!(shown.is_none_or(|entry| entry.revision() >= revision), "not what was waited for");
        }
    }
}
