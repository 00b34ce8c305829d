//! The names of queues in use by a session: a name within another's keys would be taken for its items.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use super::Core;
use crate::error::{Error, Result};
use crate::name::{self, Prefix};

/// The names of queues, as long as they are used.
#[derive(Debug, Default)]
pub(crate) struct Queues(Mutex<BTreeMap<Prefix, Weak<Used>>>);

/// A name that is used as long as this is kept.
#[derive(Debug)]
pub(crate) struct Used;

impl Queues {
    /// Whether the keys under `prefix` are those of a queue, or contain them, or are among them.
    pub(crate) fn meet(&self, prefix: &Prefix) -> bool {
        let queues = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let used = |(other, queue): (&Prefix, &Weak<Used>)| {
            (other == prefix || other.nested(prefix)) && queue.strong_count() > 0
        };
        queues.iter().any(used)
    }
}

impl Core {
    /// Begins to use a name for a queue; refuses it if a lock, an election or another queue of this session would have
    /// keys in common with it. `prefix` is that of its items.
    pub(crate) fn use_queue(&self, name: &[u8], prefix: &Prefix) -> Result<Arc<Used>> {
        // In this order, as who opens a line does it.
        let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        let mut queues = self.queues.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(used) = queues.get(prefix).and_then(Weak::upgrade) {
            return Ok(used);
        }
        queues.retain(|_, queue| queue.strong_count() > 0);
        let line = lines
            .iter()
            .any(|(other, line)| (**other == *prefix || other.nested(prefix)) && line.strong_count() > 0);
        if line || queues.keys().any(|other| other.nested(prefix)) {
            let reason =
                "another name in use by this session is the same up to a '/', and its keys would be items";
            return Err(Error::InvalidName { name: name::display(name), reason });
        }
        let used = Arc::new(Used);
        queues.insert(prefix.clone(), Arc::downgrade(&used));
        Ok(used)
    }
}
