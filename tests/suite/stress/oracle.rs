//! What must hold: one at a time, tokens that grow, and a counter that only the holder writes.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use etcd_client::{Client, EventType, WatchOptions};

use crate::support::background;
use crate::support::check::{Scope, eventually};

pub(super) struct Oracle {
    client: Client,
    /// The counter's key.
    key: String,
    inside: AtomicBool,
    /// The highest token so far.
    token: AtomicI64,
    holds: AtomicU64,
    /// Numbers the writes.
    writes: AtomicU64,
    /// Those that were confirmed, and those of which it is unknown.
    confirmed: Mutex<BTreeSet<u64>>,
    unknown: Mutex<BTreeSet<u64>>,
    /// What etcd says was written, in its order.
    history: Arc<Mutex<Vec<Write>>>,
}

/// One value of the counter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Write {
    count: u64,
    /// Of the hold in which it was written.
    token: i64,
    number: u64,
}

impl fmt::Display for Write {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.count, self.token, self.number)
    }
}

impl Write {
    fn read(text: &str) -> Self {
        let fields: Vec<i64> = text.split(' ').map(|field| field.parse().expect("not ours")).collect();
        let [count, token, number] = fields[..] else { panic!("not ours: {text}") };
        Self { count: count.unsigned_abs(), token, number: number.unsigned_abs() }
    }
}

impl Oracle {
    /// An oracle that hears of every write of the counter from now on.
    pub(super) async fn watching(scope: &Scope, name: &str) -> Self {
        let key = format!("{name}-counter");
        let history = Arc::new(Mutex::new(Vec::new()));
        let (mut client, heard) = (scope.client(), history.clone());
        let from = client.get(key.as_str(), None).await.unwrap().header().unwrap().revision() + 1;
        let options = WatchOptions::new().with_start_revision(from);
        let mut watch = client.watch(key.as_str(), Some(options)).await.unwrap();
        // On the tools' runtime, so that it is no task of the test's. It ends when the key is deleted.
        background().spawn(async move {
            while let Ok(Some(message)) = watch.message().await {
                for event in message.events() {
                    if event.event_type() == EventType::Delete {
                        return;
                    }
                    let value = event.kv().expect("an event without key").value_str().unwrap();
                    heard.lock().unwrap().push(Write::read(value));
                }
            }
        });
        Self {
            client: scope.client(),
            key,
            inside: AtomicBool::new(false),
            token: AtomicI64::new(0),
            holds: AtomicU64::new(0),
            writes: AtomicU64::new(0),
            confirmed: Mutex::default(),
            unknown: Mutex::default(),
            history,
        }
    }

    pub(super) fn key(&self) -> &str {
        &self.key
    }

    /// Somebody was given the lock.
    pub(super) fn enters(&self, token: i64) {
        assert!(!self.inside.swap(true, Ordering::SeqCst), "two hold the lock, one with token {token}");
        let before = self.token.swap(token, Ordering::SeqCst);
        assert!(before < token, "token {token} after {before}");
        self.holds.fetch_add(1, Ordering::SeqCst);
    }

    /// It is about to give it back.
    pub(super) fn leaves(&self) {
        assert!(self.inside.swap(false, Ordering::SeqCst));
    }

    /// The next value of the counter, and the revision it follows.
    pub(super) async fn next(&self, token: i64) -> (Write, i64) {
        let found = self.client.clone().get(self.key.as_str(), None).await.unwrap();
        let number = self.writes.fetch_add(1, Ordering::SeqCst);
        match found.kvs().first() {
            Some(kv) => {
                let last = Write::read(kv.value_str().unwrap());
                (Write { count: last.count + 1, token, number }, kv.mod_revision())
            }
            None => (Write { count: 1, token, number }, 0),
        }
    }

    pub(super) fn wrote(&self, write: &Write) {
        self.confirmed.lock().unwrap().insert(write.number);
    }

    pub(super) fn may_have_written(&self, write: &Write) {
        self.unknown.lock().unwrap().insert(write.number);
    }

    /// Looks at all that was written.
    pub(super) async fn judge(&self, scope: &Scope) {
        let holds = self.holds.load(Ordering::SeqCst);
        assert!(holds > 5, "hardly anything happened: {holds} holds");
        let mut client = scope.client();
        let found = client.get(self.key.as_str(), None).await.unwrap();
        let Some(kv) = found.kvs().first() else {
            assert!(self.confirmed.lock().unwrap().is_empty());
            return;
        };
        let last = Write::read(kv.value_str().unwrap());
        eventually(Duration::from_secs(10), "the history is complete", async || {
            self.history.lock().unwrap().last() == Some(&last)
        })
        .await;
        client.delete(self.key.as_str(), None).await.unwrap();

        let history = self.history.lock().unwrap();
        for (at, write) in history.iter().enumerate() {
            assert_eq!(write.count, at as u64 + 1, "written twice, or lost: {history:?}");
        }
        assert!(history.is_sorted_by_key(|write| write.token), "an old holder wrote: {history:?}");
        let written: BTreeSet<u64> = history.iter().map(|write| write.number).collect();
        assert_eq!(written.len(), history.len(), "written twice: {history:?}");
        let confirmed = self.confirmed.lock().unwrap();
        let unknown = self.unknown.lock().unwrap();
        assert!(confirmed.is_subset(&written), "lost: {:?}", confirmed.difference(&written));
        let either: BTreeSet<u64> = confirmed.union(&unknown).copied().collect();
        assert!(written.is_subset(&either), "not known of: {:?}", written.difference(&either));
        println!("{holds} holds, {} writes, {} of them unknown", history.len(), unknown.len());
    }
}
