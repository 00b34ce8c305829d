//! The options of a queue.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::keys::Keys;
use super::{Queue, Shared};
use crate::error::{Error, Result};
use crate::session::Session;
use crate::session::expiring::Expiring;

/// Options of a [`Queue`]. Each process has its own: those that should agree must be told so.
#[derive(Debug, Clone)]
#[must_use = "a builder does nothing before `build`"]
pub struct QueueBuilder {
    session: Session,
    name: Vec<u8>,
    bound: Option<u32>,
    max_attempts: Option<u32>,
    time_limit: Option<Duration>,
    once_window: Duration,
}

impl QueueBuilder {
    pub(super) fn new(session: &Session, name: &[u8]) -> Self {
        Self {
            session: session.clone(),
            name: name.to_vec(),
            bound: None,
            max_attempts: None,
            time_limit: None,
            once_window: Duration::from_secs(600),
        }
    }

    /// The most items in the queue, claimed ones included: who would put more waits. Others that put items without this
    /// bound, Go's programs for instance, are not held back. Defaults to none.
    pub fn bound(mut self, items: u32) -> Self {
        self.bound = Some(items);
        self
    }

    /// How often an item is delivered to those who claim; then it goes to the dead letters. Every claim counts, also one
    /// that is released. Defaults to no limit.
    pub fn max_attempts(mut self, attempts: u32) -> Self {
        self.max_attempts = Some(attempts);
        self
    }

    /// How long a claim may last: then the item is given back although the process lives, and the claim is lost. For
    /// handlers that may hang. Defaults to no limit.
    pub fn time_limit(mut self, limit: Duration) -> Self {
        self.time_limit = Some(limit);
        self
    }

    /// For how long an id given to [`Queue::enqueue_once`] is remembered, in whole seconds. Defaults to 10 minutes.
    pub fn once_window(mut self, window: Duration) -> Self {
        self.once_window = window;
        self
    }

    /// Names the queue. Nothing is sent.
    ///
    /// # Errors
    ///
    /// As [`Queue::new`]; [`Error::InvalidOption`] if the bound, the attempts, the time limit or the window is zero.
    pub fn build(self) -> Result<Queue> {
        let zero = [
            ("bound", self.bound == Some(0)),
            ("max_attempts", self.max_attempts == Some(0)),
            ("time_limit", self.time_limit == Some(Duration::ZERO)),
            ("once_window", self.once_window.as_secs() == 0),
        ];
        if let Some((option, _)) = zero.into_iter().find(|(_, zero)| *zero) {
            return Err(Error::InvalidOption { option, reason: "it is zero".into() });
        }
        let keys = Arc::new(Keys::new(&self.session.core().namespace, &self.name)?);
        let shared = Shared {
            _used: self.session.core().use_queue(&self.name, &keys.items)?,
            name: self.name,
            keys,
            bound: self.bound.map(i64::from),
            max_attempts: self.max_attempts,
            time_limit: self.time_limit,
            once: Arc::new(Expiring::new(self.once_window)),
            consumer: OnceLock::new(),
        };
        Ok(Queue { session: self.session, shared: Arc::new(shared) })
    }
}
