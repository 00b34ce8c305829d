//! A queue of work, in the order of commit.
//!
//! Items are handed out in the order in which etcd committed them, never by anybody's clock. Any number of processes put
//! items in and take them out.
//!
//! # Two ways to take an item
//!
//! - [`Queue::dequeue`] takes it out for good, *at most once*: what is taken by a process that dies is gone.
//! - [`Queue::claim`] delivers it *at least once*: the item stays in the queue, claimed by this process and hidden from
//!   others, until it is [acked](Claim::ack). If the process dies, the claim goes with its lease, and the item is
//!   delivered again, in its old place. Deliveries are counted; after [`QueueBuilder::max_attempts`] the item goes to
//!   the [dead letters](Queue::dead_letters), where it does not hold up the others.
//!
//! *Exactly once* is what [`Claim::ack_with`] gives to effects that are writes to the same etcd: the ack and the writes
//! are one transaction. For effects elsewhere, send [`Claim::token`] along and have the other store refuse older ones.
//!
//! # Order
//!
//! With one consumer, items come strictly in order. With several, each item is handed out after those before it, but the
//! handlers run at the same time, so they may end in another order; and an item that comes back keeps its place.
//!
//! # Other programs
//!
//! An item is a key `{name}/{id}` without a lease, as in Go's `recipe.Queue`: that can put items for us to take, and take
//! ours. It knows no claims and takes claimed items as well (our ack fails then), and it reads `{name}` without the
//! slash, so its queue `job` also takes the items of a queue `job2`. Bookkeeping is not under the name, but in the
//! [namespace](crate::SessionBuilder::namespace) of the session.
//!
//! # What it costs
//!
//! A consumer that was asked for an item follows the queue, keys only, until its [`Queue`] is dropped: some 300 bytes of
//! memory for each waiting item. An item costs one request to put, one to take or claim and one to ack, however long the
//! queue is. Of the consumers that wait, one tries to take a new item and the others see that it is gone.

mod attempt;
mod builder;
mod chain;
mod claim;
mod consumer;
mod dead;
mod enqueue;
mod hold;
mod item;
mod keys;
mod shelf;
mod turn;
mod typed;

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::oneshot;

use self::attempt::{Ask, Reply};
pub use self::builder::QueueBuilder;
pub use self::claim::Claim;
use self::consumer::Consumer;
pub use self::dead::DeadLetter;
use self::enqueue::Put;
pub use self::item::Item;
use self::keys::Keys;
pub use self::typed::{TypedClaim, TypedQueue};
use crate::error::{Error, Result};
use crate::name;
use crate::session::Session;
use crate::session::expiring::Expiring;
use crate::session::queues::Used;

/// A queue shared by everybody who uses its name on one etcd cluster.
///
/// Cheap to clone; clones share one consumer.
///
/// # Examples
///
/// ```no_run
/// # async fn example() -> etcd_recipes::Result<()> {
/// use etcd_recipes::{Queue, Session};
///
/// let session = Session::connect(["127.0.0.1:2379"]).await?;
/// let queue = Queue::new(&session, "thumbnails")?;
/// queue.enqueue("photo-17.jpg").await?;
///
/// let claim = queue.claim().await?;
/// // … make the thumbnail …
/// assert_eq!(claim.value(), b"photo-17.jpg");
/// claim.ack().await?;
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Queue {
    session: Session,
    shared: Arc<Shared>,
}

/// What the clones of a queue share.
struct Shared {
    name: Vec<u8>,
    keys: Arc<Keys>,
    /// Keeps the name from being used for something else.
    _used: Arc<Used>,
    bound: Option<i64>,
    max_attempts: Option<u32>,
    time_limit: Option<Duration>,
    once: Arc<Expiring>,
    /// Started when it is needed first.
    consumer: OnceLock<Consumer>,
}

impl Queue {
    /// Names a queue, with the defaults of [`QueueBuilder`]. Nothing is sent.
    ///
    /// The name is used byte for byte. Every key that starts with `{name}/` is an item, so a name and another below it,
    /// like `a` and `a/b`, would be one queue: do not use both.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidName`] if the name is empty, longer than 1,024 bytes, contains a NUL, or meets the session's
    /// namespace, or if this session uses one above or below it, or the same for a lock or an election.
    pub fn new(session: &Session, name: impl AsRef<[u8]>) -> Result<Self> {
        Self::builder(session, name).build()
    }

    /// Begins a queue with options.
    pub fn builder(session: &Session, name: impl AsRef<[u8]>) -> QueueBuilder {
        QueueBuilder::new(session, name.as_ref())
    }

    /// The same queue for payloads of one type, as JSON.
    pub fn typed<T: Serialize + DeserializeOwned>(self) -> TypedQueue<T> {
        TypedQueue::new(self)
    }

    /// The name.
    pub fn name(&self) -> &[u8] {
        &self.shared.name
    }

    // --- Putting items in ---

    /// Puts an item at the end, and returns the revision at which it is there. In a queue with a
    /// [bound](QueueBuilder::bound) it waits until there is room.
    ///
    /// One request; the item is put once, whatever happens to the answers.
    ///
    /// # Errors
    ///
    /// [`Error::TooLarge`] for more than 1.48 MiB; [`Error::NoSpace`]; [`Error::OutcomeUnknown`] when the session's lease
    /// ended while an answer was missing; otherwise as etcd says, and nothing was put.
    ///
    /// # Cancel safety
    ///
    /// When dropped, the item is in the queue, or never will be.
    pub async fn enqueue(&self, value: impl Into<Vec<u8>>) -> Result<i64> {
        self.put_when_room(vec![value.into()]).await
    }

    /// Puts an item at the end if the queue has room; `None` if it is full.
    ///
    /// # Errors
    ///
    /// As [`enqueue`](Queue::enqueue).
    ///
    /// # Cancel safety
    ///
    /// As [`enqueue`](Queue::enqueue).
    pub async fn try_enqueue(&self, value: impl Into<Vec<u8>>) -> Result<Option<i64>> {
        let Shared { keys, bound, .. } = &*self.shared;
        if let Some(bound) = *bound
            && enqueue::length(self.session.core(), keys).await? >= bound
        {
            return Ok(None);
        }
        match enqueue::put(&self.session, keys, vec![value.into()], None, *bound).await? {
            Put::Done(revision) => Ok(Some(revision)),
            Put::Known | Put::Full => Ok(None),
        }
    }

    /// Puts several items at the end, in this order: all of them or none, with nothing between them. The limit is 124
    /// items and 1.48 MiB. Waits for room as [`enqueue`](Queue::enqueue) does.
    ///
    /// # Errors
    ///
    /// As [`enqueue`](Queue::enqueue); [`Error::TooLarge`] over the limit, or over the bound of the queue.
    ///
    /// # Cancel safety
    ///
    /// When dropped, all items are in the queue, or none ever will be.
    pub async fn enqueue_all<V: Into<Vec<u8>>>(&self, values: impl IntoIterator<Item = V>) -> Result<i64> {
        self.put_when_room(values.into_iter().map(Into::into).collect()).await
    }

    /// Puts an item at the end unless one was put under the same id lately; `None` in that case. Lately means within
    /// [`QueueBuilder::once_window`], or up to half as long again, no matter whether the item is still in the queue.
    ///
    /// # Errors
    ///
    /// As [`enqueue`](Queue::enqueue); [`Error::InvalidName`] for an id that is empty or longer than 1,024 bytes.
    ///
    /// # Cancel safety
    ///
    /// As [`enqueue`](Queue::enqueue).
    pub async fn enqueue_once(&self, id: impl AsRef<[u8]>, value: impl Into<Vec<u8>>) -> Result<Option<i64>> {
        let Shared { keys, bound, once, .. } = &*self.shared;
        let (id, value) = (id.as_ref(), value.into());
        loop {
            match enqueue::put(&self.session, keys, vec![value.clone()], Some((id, once)), *bound).await? {
                Put::Done(revision) => return Ok(Some(revision)),
                Put::Known => return Ok(None),
                Put::Full => self.wait_for_room(1).await?,
            }
        }
    }

    async fn put_when_room(&self, values: Vec<Vec<u8>>) -> Result<i64> {
        let Shared { keys, bound, .. } = &*self.shared;
        let Some(bound) = *bound else {
            return match enqueue::put(&self.session, keys, values, None, None).await? {
                Put::Done(revision) => Ok(revision),
                Put::Known | Put::Full => Ok(0),
            };
        };
        let limit = usize::try_from(bound).unwrap_or(usize::MAX);
        if values.len() > limit {
            return Err(Error::TooLarge { what: "the number of items", size: values.len(), limit });
        }
        loop {
            self.wait_for_room(values.len()).await?;
            if let Put::Done(revision) =
                enqueue::put(&self.session, keys, values.clone(), None, Some(bound)).await?
            {
                return Ok(revision);
            }
        }
    }

    async fn wait_for_room(&self, items: usize) -> Result<()> {
        let Shared { keys, bound, .. } = &*self.shared;
        enqueue::wait_for_room(self.session.core(), keys, items, bound.unwrap_or(i64::MAX)).await
    }

    // --- Taking items out ---

    /// Waits for an item and takes it out of the queue, at most once: if this process dies now, the item is gone.
    ///
    /// There is no limit of time: wrap it in `tokio::time::timeout`. Faults of the network and of etcd are waited out.
    /// It works when etcd is out of space, but an answer lost then is [`Error::OutcomeUnknown`].
    ///
    /// # Errors
    ///
    /// [`Error::Closed`]; [`Error::OutcomeUnknown`] when the session's lease ended while an answer was missing, so that
    /// an item may have been taken; otherwise as etcd says.
    ///
    /// # Cancel safety
    ///
    /// When dropped, no item is lost: one that was taken already is given to the next call on this queue or its clones,
    /// and if none comes within a second, or the last clone is dropped, it is put back, at the end.
    pub async fn dequeue(&self) -> Result<Item> {
        let parcel = self.ask(|reply| Ask::Take { wait: true, reply }).await?;
        parcel.and_then(item::Parcel::open).ok_or(Error::Closed)
    }

    /// Takes the first item out of the queue if there is one that nobody has claimed.
    ///
    /// # Errors
    ///
    /// As [`dequeue`](Queue::dequeue).
    ///
    /// # Cancel safety
    ///
    /// As [`dequeue`](Queue::dequeue).
    pub async fn try_dequeue(&self) -> Result<Option<Item>> {
        let parcel = self.ask(|reply| Ask::Take { wait: false, reply }).await?;
        Ok(parcel.and_then(item::Parcel::open))
    }

    /// Waits for an item and claims it: it is delivered to nobody else as long as the claim is held.
    ///
    /// Items that were claimed [as often as they may be](QueueBuilder::max_attempts) are put among the dead letters on
    /// the way. When the session's lease is lost meanwhile, the call goes on with the next one.
    ///
    /// # Errors
    ///
    /// [`Error::Closed`], [`Error::NoSpace`], [`Error::PermissionDenied`] and [`Error::Etcd`] as etcd says.
    ///
    /// # Cancel safety
    ///
    /// When dropped, nothing is claimed, or the claim is undone and does not count as an attempt.
    pub async fn claim(&self) -> Result<Claim> {
        let claimed = self.ask(|reply| Ask::Claim { reply }).await?;
        let hold = claimed.open().ok_or(Error::Closed)?;
        Ok(Claim::new(self.clone(), hold))
    }

    async fn ask<T>(&self, ask: impl FnOnce(Reply<T>) -> Ask) -> Result<T> {
        let Shared { keys, max_attempts, time_limit, consumer, .. } = &*self.shared;
        let core = self.session.core();
        let consumer = consumer.get_or_init(|| Consumer::start(core, keys, *max_attempts, *time_limit));
        let (reply, answer) = oneshot::channel();
        consumer.ask(ask(reply));
        answer.await.unwrap_or(Err(Error::Closed))
    }

    // --- Looking ---

    /// Reads how many items are in the queue, claimed ones included.
    ///
    /// # Errors
    ///
    /// [`Error::Unreachable`] after 10 s without an answer, or as etcd says.
    ///
    /// # Cancel safety
    ///
    /// Only reads.
    pub async fn length(&self) -> Result<u64> {
        let length = enqueue::length(self.session.core(), &self.shared.keys).await?;
        Ok(u64::try_from(length).unwrap_or(0))
    }

    /// Looks at the item that would be taken next; `None` if there is none.
    ///
    /// # Errors
    ///
    /// As etcd says.
    ///
    /// # Cancel safety
    ///
    /// Only reads.
    pub async fn peek(&self) -> Result<Option<Item>> {
        self.ask(|reply| Ask::Peek { reply }).await
    }

    // --- Dead letters ---

    /// Reads the items that were given up, the oldest first.
    ///
    /// # Errors
    ///
    /// [`Error::Unreachable`] after 10 s without an answer, or as etcd says.
    ///
    /// # Cancel safety
    ///
    /// Only reads.
    pub async fn dead_letters(&self) -> Result<Vec<DeadLetter>> {
        dead::list(&self.session, &self.shared.keys).await
    }

    /// Puts a dead letter back into the queue, at the end and with no attempts. False if it was not among the dead
    /// letters any more.
    ///
    /// # Errors
    ///
    /// As [`enqueue`](Queue::enqueue).
    ///
    /// # Cancel safety
    ///
    /// When dropped, it is done or never will be.
    pub async fn requeue(&self, letter: &DeadLetter) -> Result<bool> {
        dead::requeue(&self.session, &self.shared.keys, letter).await
    }

    /// Deletes a dead letter for good. False if it was not there any more.
    ///
    /// # Errors
    ///
    /// As etcd says.
    ///
    /// # Cancel safety
    ///
    /// When dropped, it goes on in the background.
    pub async fn purge(&self, letter: &DeadLetter) -> Result<bool> {
        dead::purge(&self.session, &self.shared.keys, letter).await
    }
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue").field("name", &name::display(&self.shared.name)).finish_non_exhaustive()
    }
}
