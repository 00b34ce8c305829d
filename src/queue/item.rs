//! What is in a queue, and an item on its way to a caller who may be gone.

use tokio::sync::mpsc::UnboundedSender;

use crate::name::{self, Hidden};

/// An item of a queue.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Item {
    /// The key, unlike all others in the queue.
    pub key: Vec<u8>,
    /// What was enqueued.
    pub value: Vec<u8>,
    /// The revision at which it was enqueued: its place in the queue, together with the key.
    pub create_revision: i64,
}

impl std::fmt::Debug for Item {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Item")
            .field("key", &name::display(&self.key))
            .field("value", &Hidden(&self.value))
            .field("create_revision", &self.create_revision)
            .finish()
    }
}

/// An item that was taken out of the queue for somebody. Goes back to the consumer if it is not opened.
#[derive(Debug)]
pub(crate) struct Parcel {
    item: Option<Item>,
    returns: UnboundedSender<Item>,
}

impl Parcel {
    pub(crate) fn new(item: Item, returns: UnboundedSender<Item>) -> Self {
        Self { item: Some(item), returns }
    }

    pub(crate) fn open(mut self) -> Option<Item> {
        self.item.take()
    }
}

impl Drop for Parcel {
    fn drop(&mut self) {
        if let Some(item) = self.item.take() {
            // Without a consumer the session or its runtime is gone, and the item with it.
            let _ = self.returns.send(item);
        }
    }
}
