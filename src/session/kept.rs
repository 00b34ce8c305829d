//! Keys that are kept: they live on the session's lease, and are put again when they are lost.
//!
//! A kept key belongs to whoever put it last. Taking it over is unconditional; everything after that is tied to our own
//! last put: changes and the deletion compare its revision, and a key that was lost is put again only if nobody else has
//! put it since. A put of somebody else ends the keeping, for good.
//!
//! One task of the session looks after all of them. What is to be written is collected while a batch is under way, and
//! one watch tells what happens to all keys of a prefix.

mod key;
mod task;

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::{Notify, oneshot};

use self::task::Task;
use super::Core;
use crate::error::{Error, Result};
use crate::name::{self, Prefix};

/// The kept keys of a session.
#[derive(Debug)]
pub(crate) struct Kept {
    commands: UnboundedSender<Command>,
    /// What the task needs, until the first key starts it.
    idle: Mutex<Option<UnboundedReceiver<Command>>>,
}

/// A key that is kept until this is dropped, which deletes it in the background.
pub(crate) struct KeptKey {
    commands: UnboundedSender<Command>,
    status: Arc<Status>,
    key: Arc<[u8]>,
}

/// What the task and the owner of a key share.
#[derive(Debug, Default)]
struct Status {
    standing: AtomicU8,
    superseded: Notify,
}

/// Where a kept key stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// It is there, as far as is known.
    There,
    /// It was lost and will be put again.
    Away,
    /// Somebody else has put it.
    Superseded,
    /// It was removed, or is to be.
    Removed,
}

/// What is to be done when it is known what came of an update.
type Settle = Box<dyn FnOnce(Result<()>) + Send>;

enum Command {
    Keep { prefix: Prefix, key: Arc<[u8]>, value: Arc<[u8]>, answer: oneshot::Sender<Result<KeptKey>> },
    Update { key: Arc<[u8]>, owner: Arc<Status>, value: Arc<[u8]>, settle: Settle },
    Remove { key: Arc<[u8]>, owner: Arc<Status>, answer: Option<oneshot::Sender<Result<()>>> },
}

impl Kept {
    fn new() -> Self {
        let (commands, inbox) = unbounded_channel();
        Self { commands, idle: Mutex::new(Some(inbox)) }
    }
}

impl Core {
    fn kept(&self) -> &Kept {
        self.kept.get_or_init(Kept::new)
    }

    /// Puts a key, whatever is there, and keeps it. `prefix` is watched for what happens to it. Waits for a lease and
    /// for etcd.
    ///
    /// # Errors
    ///
    /// [`Error::TooLarge`], and what etcd refuses.
    ///
    /// # Cancel safety
    ///
    /// When dropped, the key is not put, or is deleted again.
    pub(crate) async fn keep(
        self: &Arc<Self>,
        prefix: Prefix,
        key: Vec<u8>,
        value: Vec<u8>,
    ) -> Result<KeptKey> {
        name::check_value(&value)?;
        let kept = self.kept();
        if let Some(inbox) = kept.idle.lock().unwrap_or_else(PoisonError::into_inner).take() {
            self.runtime.spawn(Task::new(self.clone(), inbox).run());
        }
        let (answer, answered) = oneshot::channel();
        let (key, value) = (key.into(), value.into());
        let _ = kept.commands.send(Command::Keep { prefix, key, value, answer });
        answered.await.unwrap_or(Err(Error::Closed))
    }
}

// === impl KeptKey ===

impl KeptKey {
    pub(crate) fn key(&self) -> &[u8] {
        &self.key
    }

    pub(crate) fn standing(&self) -> Standing {
        self.status.standing()
    }

    /// Waits until somebody else has put the key.
    pub(crate) fn superseded(&self) -> impl Future<Output = ()> + Send + 'static + use<> {
        let status = self.status.clone();
        async move {
            loop {
                let mut superseded = std::pin::pin!(status.superseded.notified());
                superseded.as_mut().enable();
                if status.standing() == Standing::Superseded {
                    return;
                }
                superseded.await;
            }
        }
    }

    /// Puts another value, if the key is still ours. Of several at once the last stands, and if etcd refuses that, the one
    /// before it. `settle` is called with what came of it, in the order of the updates that are in effect; it is dropped
    /// when the session ends.
    pub(crate) fn update(
        &self,
        value: Vec<u8>,
        settle: impl FnOnce(Result<()>) + Send + 'static,
    ) -> Result<()> {
        name::check_value(&value)?;
        let (key, owner) = (self.key.clone(), self.status.clone());
        let settle = Box::new(settle);
        let _ = self.commands.send(Command::Update { key, owner, value: value.into(), settle });
        Ok(())
    }

    /// Deletes the key, if it is still ours.
    ///
    /// # Cancel safety
    ///
    /// When dropped, the deletion goes on in the background.
    pub(crate) async fn remove(&self) -> Result<()> {
        let (answer, answered) = oneshot::channel();
        self.send_remove(Some(answer));
        // A session that ends takes all its keys with it.
        answered.await.unwrap_or(Ok(()))
    }

    fn send_remove(&self, answer: Option<oneshot::Sender<Result<()>>>) {
        let (key, owner) = (self.key.clone(), self.status.clone());
        let _ = self.commands.send(Command::Remove { key, owner, answer });
    }
}

impl Drop for KeptKey {
    fn drop(&mut self) {
        if matches!(self.standing(), Standing::There | Standing::Away) {
            self.send_remove(None);
        }
    }
}

impl std::fmt::Debug for KeptKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KeptKey").field("key", &name::display(&self.key)).finish_non_exhaustive()
    }
}

// === impl Status ===

impl Status {
    fn standing(&self) -> Standing {
        match self.standing.load(Ordering::Acquire) {
            0 => Standing::There,
            1 => Standing::Away,
            2 => Standing::Superseded,
            _ => Standing::Removed,
        }
    }

    fn set(&self, standing: Standing) {
        self.standing.store(standing as u8, Ordering::Release);
        if standing == Standing::Superseded {
            self.superseded.notify_waiters();
        }
    }
}

/// The error of whoever does not own the key any more.
fn over(key: &[u8], owner: &Status) -> Error {
    let key = name::display(key);
    if owner.standing() == Standing::Superseded { Error::Superseded { key } } else { Error::Lost { key } }
}
