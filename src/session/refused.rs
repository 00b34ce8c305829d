//! Operations that etcd refused and may accept later: for want of permission or space, or because of a password.
//!
//! A refusal is an answer, and nothing is sent again. But the network may have a second copy of the request, which would be
//! applied if it came when the reason is gone. So the operation's slot is moved as soon as etcd accepts that. What a copy has
//! done that was faster is undone.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use super::Core;
use super::generation::Generation;
use super::once::{Done, Fenced, fence};
use super::rpc::Failure;
use super::runtime::Backoff;
use super::slots::Slot;

/// How many are kept in mind. The slots of more are never used again, and a copy of such an operation is not fenced.
const MOST: usize = 10_000;

/// An operation that was refused.
pub(super) trait Refused: Send {
    fn slot(&mut self) -> &mut Slot;

    /// The slot was moved: no copy will be applied any more. One was, perhaps, and did this.
    fn fenced(self: Box<Self>, done: Option<Done>);
}

/// The refused operations of one generation; `None` while nobody looks after them.
#[derive(Default)]
pub(super) struct Refusals(Mutex<Option<VecDeque<Box<dyn Refused>>>>);

impl Refusals {
    /// Tells whether somebody must look after them.
    fn push(&self, refused: Box<dyn Refused>) -> bool {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let alone = all.is_none();
        let all = all.get_or_insert_default();
        if all.len() < MOST {
            all.push_back(refused);
        }
        alone
    }

    /// The next; without one, nobody looks after them any more.
    fn next(&self) -> Option<Box<dyn Refused>> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let next = all.as_mut().and_then(VecDeque::pop_front);
        if next.is_none() {
            *all = None;
        }
        next
    }
}

impl Core {
    /// Keeps an operation in mind that was refused, until its slot is moved.
    pub(super) fn refused(self: &Arc<Self>, generation: &Arc<Generation>, refused: impl Refused + 'static) {
        if generation.slots.refused.push(Box::new(refused)) {
            self.runtime.spawn(look_after(self.clone(), generation.clone()));
        }
    }
}

/// Moves one slot after the other.
async fn look_after(core: Arc<Core>, generation: Arc<Generation>) {
    while let Some(mut refused) = generation.slots.refused.next() {
        let mut backoff = Backoff::of_refusals();
        let fenced = loop {
            match fence(&core, &generation, b"an op slot", refused.slot()).await {
                Ok(fenced) => break fenced,
                Err(Failure::Refused(error)) => tracing::debug!(%error, "a slot cannot be moved yet"),
                Err(_) => {}
            }
            tokio::select! {
                biased;
                () = generation.ended() => break Fenced::Ended,
                () = backoff.wait(&core.runtime) => {}
            }
        };
        match fenced {
            Fenced::Never => refused.fenced(None),
            Fenced::Applied(done) => refused.fenced(Some(done)),
            // The lease has gone, and all slots with it.
            Fenced::Ended => while generation.slots.refused.next().is_some() {},
        }
    }
}

impl std::fmt::Debug for Refusals {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Refusals").finish_non_exhaustive()
    }
}
