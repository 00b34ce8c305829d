//! Payloads that are encoded and decoded.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Claim, Queue};
use crate::error::{Error, Result};
use crate::name;

/// A [`Queue`] whose items are values of one type, as JSON.
///
/// What does not decode does not hold up the others: it is put among the dead letters, with the decoder's message as
/// the reason. Everything that does not depend on the type is done through [`queue`](TypedQueue::queue).
///
/// # Examples
///
/// ```no_run
/// # async fn example() -> etcd_recipes::Result<()> {
/// use etcd_recipes::{Queue, Session};
///
/// #[derive(serde::Serialize, serde::Deserialize)]
/// struct Mail { to: String }
///
/// let session = Session::connect(["127.0.0.1:2379"]).await?;
/// let mails = Queue::new(&session, "mails")?.typed::<Mail>();
/// mails.enqueue(&Mail { to: "anna".into() }).await?;
/// let claim = mails.claim().await?;
/// assert_eq!(claim.payload().to, "anna");
/// claim.into_claim().ack().await?;
/// # Ok(()) }
/// ```
pub struct TypedQueue<T> {
    queue: Queue,
    payload: PhantomData<fn(T) -> T>,
}

/// A [`Claim`] with its payload decoded; it derefs to the claim.
///
/// Dropping it gives the item back.
#[derive(Debug)]
#[must_use = "a claim that is not kept gives the item back at once"]
pub struct TypedClaim<T> {
    claim: Claim,
    payload: T,
}

impl<T: Serialize + DeserializeOwned> TypedQueue<T> {
    pub(super) fn new(queue: Queue) -> Self {
        Self { queue, payload: PhantomData }
    }

    /// The queue of bytes.
    pub fn queue(&self) -> &Queue {
        &self.queue
    }

    /// As [`Queue::enqueue`].
    ///
    /// # Errors
    ///
    /// As [`Queue::enqueue`], and [`Error::Malformed`] if the payload cannot be encoded.
    ///
    /// # Cancel safety
    ///
    /// As [`Queue::enqueue`].
    pub async fn enqueue(&self, payload: &T) -> Result<i64> {
        self.queue.enqueue(self.encode(payload)?).await
    }

    /// As [`Queue::enqueue_all`].
    ///
    /// # Errors
    ///
    /// As [`Queue::enqueue_all`], and [`Error::Malformed`] if a payload cannot be encoded.
    ///
    /// # Cancel safety
    ///
    /// As [`Queue::enqueue_all`].
    pub async fn enqueue_all(&self, payloads: &[T]) -> Result<i64> {
        let values: Vec<Vec<u8>> =
            payloads.iter().map(|payload| self.encode(payload)).collect::<Result<_>>()?;
        self.queue.enqueue_all(values).await
    }

    /// As [`Queue::claim`]. Items that do not decode are put among the dead letters.
    ///
    /// # Errors
    ///
    /// As [`Queue::claim`] and [`Claim::reject`].
    ///
    /// # Cancel safety
    ///
    /// As [`Queue::claim`].
    pub async fn claim(&self) -> Result<TypedClaim<T>> {
        loop {
            let claim = self.queue.claim().await?;
            match serde_json::from_slice(claim.value()) {
                Ok(payload) => return Ok(TypedClaim { claim, payload }),
                Err(error) => self.reject(claim, &error).await?,
            }
        }
    }

    /// Takes the first item out of the queue. It is claimed and acked, so that one that does not decode can be put among
    /// the dead letters: two requests.
    ///
    /// # Errors
    ///
    /// As [`claim`](TypedQueue::claim) and [`Claim::ack`].
    ///
    /// # Cancel safety
    ///
    /// When dropped, the item stays in the queue, or is taken out of it if the ack was under way.
    pub async fn dequeue(&self) -> Result<T> {
        loop {
            let TypedClaim { claim, payload } = self.claim().await?;
            match claim.ack().await {
                Ok(()) => return Ok(payload),
                // Somebody else has it.
                Err(Error::Lost { .. }) => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn encode(&self, payload: &T) -> Result<Vec<u8>> {
        let key = name::display(self.queue.name());
        serde_json::to_vec(payload).map_err(|source| Error::Malformed { key, source })
    }

    async fn reject(&self, claim: Claim, error: &serde_json::Error) -> Result<()> {
        tracing::warn!(key = %name::display(&claim.item().key), "an item does not decode");
        // Where, and what was expected: the message could quote the value, the reason may.
        match claim.reject(&format!("it does not decode: {error}")).await {
            Err(Error::Lost { .. }) => Ok(()),
            result => result,
        }
    }
}

impl<T> TypedClaim<T> {
    /// What was enqueued.
    pub fn payload(&self) -> &T {
        &self.payload
    }

    /// The claim, to ack it or give it back.
    pub fn into_claim(self) -> Claim {
        self.claim
    }

    /// Both.
    pub fn into_parts(self) -> (T, Claim) {
        (self.payload, self.claim)
    }
}

impl<T> Deref for TypedClaim<T> {
    type Target = Claim;

    fn deref(&self) -> &Claim {
        &self.claim
    }
}

impl<T> DerefMut for TypedClaim<T> {
    fn deref_mut(&mut self) -> &mut Claim {
        &mut self.claim
    }
}

impl<T> Clone for TypedQueue<T> {
    fn clone(&self) -> Self {
        Self { queue: self.queue.clone(), payload: PhantomData }
    }
}

impl<T> std::fmt::Debug for TypedQueue<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TypedQueue").field("queue", &self.queue).finish_non_exhaustive()
    }
}
