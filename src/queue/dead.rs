//! Dead letters: items that were given up.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use etcd_client::{Compare, CompareOp, GetOptions, Txn, TxnOp};

use super::chain::Candidate;
use super::keys::{self, Keys, Why};
use crate::error::Result;
use crate::name::{self, Hidden};
use crate::session::Session;
use crate::session::once::Record;
use crate::session::removal::{Removal, Removed};
use crate::session::rpc::READ_LIMIT;

/// The most that is kept of a reason, in bytes.
const MAX_REASON: usize = 1024;
/// Letters read at once.
const PAGE: i64 = 64;

/// An item that was given up, as it was read.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeadLetter {
    /// The key the item had, and gets again when it is requeued.
    pub key: Vec<u8>,
    /// What was enqueued.
    pub value: Vec<u8>,
    /// Why it was given up.
    pub reason: String,
    /// How often it was claimed.
    pub attempts: u32,
    /// Since when, by the clock of who gave it up.
    pub since: Option<SystemTime>,
    id: Vec<u8>,
    mod_revision: i64,
}

impl std::fmt::Debug for DeadLetter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DeadLetter")
            .field("key", &name::display(&self.key))
            .field("value", &Hidden(&self.value))
            .field("reason", &self.reason)
            .field("attempts", &self.attempts)
            .field("since", &self.since)
            .finish_non_exhaustive()
    }
}

/// Why something is given up; `since` in seconds since 1970.
pub(super) fn why(reason: &str, attempts: u32, since: u64) -> Why {
    let end = (0..=reason.len().min(MAX_REASON)).rev().find(|end| reason.is_char_boundary(*end)).unwrap_or(0);
    Why { reason: reason[..end].to_owned(), attempts, since }
}

/// Puts a letter.
pub(super) fn letter(keys: &Keys, id: &[u8], value: &[u8], why: &Why) -> [TxnOp; 2] {
    [TxnOp::put(keys.dead_item(id), value, None), TxnOp::put(keys.dead_why(id), keys::write(why), None)]
}

/// Gives up an item that nobody has claimed now.
pub(super) fn bury(keys: &Keys, candidate: &Candidate, value: &[u8], why: &Why, record: &Record<'_>) -> Txn {
    let id = keys.id(&candidate.entry.key);
    let mut when = candidate.untouched(keys).to_vec();
    when.push(Compare::create_revision(keys.claim(id), CompareOp::Equal, 0));
    let mut then = vec![record.put("given up for good")];
    then.extend(letter(keys, id, value, why));
    then.extend(candidate.delete(keys));
    Txn::new().when(when).and_then(then).or_else([record.put("not")])
}

/// Reads all letters, the oldest first.
pub(super) async fn list(session: &Session, keys: &Keys) -> Result<Vec<DeadLetter>> {
    let mut reasons = BTreeMap::new();
    let start = keys.dead_why(b"");
    for (key, value, _) in read(session, &start).await? {
        let why = keys::read::<Why>(&value);
        reasons.insert(key[start.len()..].to_vec(), why);
    }
    let start = keys.dead_item(b"");
    let mut letters = Vec::new();
    for (key, value, mod_revision) in read(session, &start).await? {
        let id = key[start.len()..].to_vec();
        let why = reasons.remove(&id).flatten();
        let since = why.as_ref().and_then(|why| UNIX_EPOCH.checked_add(Duration::from_secs(why.since)));
        let (reason, attempts) = why.map_or_else(Default::default, |why| (why.reason, why.attempts));
        letters.push(DeadLetter { key: keys.item(&id), value, reason, attempts, since, id, mod_revision });
    }
    letters.sort_by_key(|letter| letter.mod_revision);
    Ok(letters)
}

/// Reads the keys that start so, with their values and revisions.
async fn read(session: &Session, start: &[u8]) -> Result<Vec<(Vec<u8>, Vec<u8>, i64)>> {
    let end = name::Prefix::of_bytes(start)?.end();
    let mut from = start.to_vec();
    let mut found = Vec::new();
    loop {
        let options = GetOptions::new().with_range(end.clone()).with_limit(PAGE);
        let mut page = session.core().rpc.get(&from, options, Some(READ_LIMIT)).await?;
        let more = page.more();
        for kv in page.take_kvs() {
            let revision = kv.mod_revision();
            let (key, value) = kv.into_key_value();
            found.push((key, value, revision));
        }
        match found.last() {
            Some((last, ..)) if more => from = [last.as_slice(), b"\0"].concat(),
            _ => return Ok(found),
        }
    }
}

/// Puts a letter back into the queue. False if somebody was faster.
pub(super) async fn requeue(session: &Session, keys: &Keys, letter: &DeadLetter) -> Result<bool> {
    const BACK: &str = "back";
    let (keys, letter) = (keys.clone(), letter.clone());
    let key = letter.key.clone();
    let body = move |record: &Record<'_>| {
        let when =
            [letter.unchanged(&keys), Compare::create_revision(letter.key.clone(), CompareOp::Equal, 0)];
        let mut then = vec![record.put(BACK), TxnOp::put(letter.key.clone(), letter.value.clone(), None)];
        then.extend(letter.delete(&keys));
        Txn::new().when(when).and_then(then).or_else([record.put("not")])
    };
    session.once(&key, body, |done| done.record == BACK.as_bytes()).await
}

/// Deletes a letter for good. False if somebody was faster.
pub(super) async fn purge(session: &Session, keys: &Keys, letter: &DeadLetter) -> Result<bool> {
    let (when, deletes) = (vec![letter.unchanged(keys)], letter.delete(keys).to_vec());
    let removal = Removal { when, deletes, otherwise: Vec::new() };
    let (core, key) = (session.core().clone(), letter.key.clone());
    let removed = session.core().to_the_end(async move { core.remove(None, &key, removal).await });
    match removed.await? {
        Removed::Now => Ok(true),
        Removed::Not { unanswered, .. } => Ok(unanswered),
    }
}

impl DeadLetter {
    fn unchanged(&self, keys: &Keys) -> Compare {
        Compare::mod_revision(keys.dead_item(&self.id), CompareOp::Equal, self.mod_revision)
    }

    fn delete(&self, keys: &Keys) -> [TxnOp; 2] {
        [keys.dead_item(&self.id), keys.dead_why(&self.id)].map(|key| TxnOp::delete(key, None))
    }
}
