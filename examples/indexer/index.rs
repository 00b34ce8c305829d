//! The index: documents, words, and the cursor between what is indexed and what is not.
//!
//! Documents are the keys `{name}-docs/00000001`, `…2` and so on; the key `{name}-cursor` holds the number of the last
//! one indexed. A step puts a key `{name}-index/{word}/{number}` for each word of the next document and moves the
//! cursor, in one transaction. etcd commits it only while the leadership lasts (the fence) and the cursor is where it
//! was read, so each document is indexed once and in order, whoever else believes to lead. And when an answer is lost
//! nobody has to guess: the cursor tells what was done.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use etcd_recipes::Leadership;
use etcd_recipes::etcd_client::{Client, Compare, CompareOp, KeyValue, Txn, TxnOp};

/// Of longer documents only so many words are indexed: one transaction has at most 128 operations.
const WORDS: usize = 100;

/// An index in etcd.
pub(crate) struct Index {
    client: Client,
    name: String,
}

/// What a step did.
pub(crate) struct Step {
    /// The document whose turn it was.
    pub(crate) number: u64,
    /// False if it is not there yet.
    pub(crate) done: bool,
}

impl Index {
    pub(crate) fn new(client: Client, name: &str) -> Self {
        Self { client, name: name.to_owned() }
    }

    /// Indexes the next document.
    pub(crate) async fn step(&self, leadership: &Leadership) -> Result<Step> {
        let name = &self.name;
        let key = format!("{name}-cursor");
        let cursor = self.get(&key).await?;
        let last = cursor.as_ref().map_or(Ok("0"), KeyValue::value_str)?;
        let number = 1 + last.parse::<u64>().with_context(|| format!("{key} is no number"))?;
        let Some(document) = self.get(&self.document(number)).await? else {
            return Ok(Step { number, done: false });
        };
        let mut writes = vec![TxnOp::put(key.as_str(), number.to_string(), None)];
        for (word, count) in words(&String::from_utf8_lossy(document.value())) {
            writes.push(TxnOp::put(format!("{name}-index/{word}/{number:08}"), count.to_string(), None));
        }
        let read_at = cursor.map_or(0, |cursor| cursor.mod_revision());
        let unmoved = Compare::mod_revision(key, CompareOp::Equal, read_at);
        let response = leadership.txn(Txn::new().when([unmoved]).and_then(writes)).await?;
        ensure!(response.succeeded(), "somebody moved the cursor");
        Ok(Step { number, done: true })
    }

    /// Writes documents 1 to `count` where they are missing.
    pub(crate) async fn write_samples(&self, count: u64) -> Result<()> {
        for number in 1..=count {
            let key = self.document(number);
            let absent = Compare::version(key.as_str(), CompareOp::Equal, 0);
            let put = TxnOp::put(key, sample(number), None);
            self.client.clone().txn(Txn::new().when([absent]).and_then([put])).await?;
        }
        Ok(())
    }

    async fn get(&self, key: &str) -> Result<Option<KeyValue>> {
        Ok(self.client.clone().get(key, None).await?.take_kvs().pop())
    }

    fn document(&self, number: u64) -> String {
        format!("{}-docs/{number:08}", self.name)
    }
}

/// The words of a text, and how often each occurs.
fn words(text: &str) -> impl Iterator<Item = (String, u32)> {
    let mut counts = BTreeMap::new();
    for word in text.split(|letter: char| !letter.is_alphanumeric()).filter(|word| !word.is_empty()) {
        *counts.entry(word.to_lowercase()).or_insert(0) += 1;
    }
    counts.into_iter().take(WORDS)
}

/// A document for trying things out.
fn sample(number: u64) -> String {
    const WHO: [&str; 5] = ["leader", "follower", "holder", "waiter", "observer"];
    const DOES: [&str; 3] = ["takes", "loses", "watches"];
    const WHAT: [&str; 7] = ["lock", "lease", "key", "token", "revision", "session", "election"];
    let pick = |words: &[&'static str]| words[(number % words.len() as u64) as usize];
    format!("{number}: the {} {} the {}", pick(&WHO), pick(&DOES), pick(&WHAT))
}
