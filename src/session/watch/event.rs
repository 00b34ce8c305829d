//! What a watch tells.

use std::sync::Arc;

use etcd_client::proto::PbEvent;

use crate::name::{self, Hidden};

/// A change of one key.
#[derive(Debug)]
pub(crate) struct Event {
    pub(crate) revision: i64,
    pub(crate) change: Changed,
}

/// What became of the key.
#[derive(Debug)]
pub(crate) enum Changed {
    Put(Arc<Entry>),
    Deleted(Vec<u8>),
}

/// A key as it is at etcd. Shared, so that its bytes are in memory once.
#[derive(PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) key: Vec<u8>,
    pub(crate) value: Vec<u8>,
    pub(crate) create_revision: i64,
    pub(crate) mod_revision: i64,
    pub(crate) lease: i64,
}

impl Event {
    pub(crate) fn key(&self) -> &[u8] {
        match &self.change {
            Changed::Put(entry) => &entry.key,
            Changed::Deleted(key) => key,
        }
    }

    pub(super) fn from_etcd(event: PbEvent) -> Option<Self> {
        let kv = event.kv?;
        let revision = kv.mod_revision;
        let change = match event.r#type {
            0 => Changed::Put(Arc::new(Entry {
                key: kv.key,
                value: kv.value,
                create_revision: kv.create_revision,
                mod_revision: revision,
                lease: kv.lease,
            })),
            1 => Changed::Deleted(kv.key),
            _ => return None,
        };
        Some(Self { revision, change })
    }
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Entry")
            .field("key", &name::display(&self.key))
            .field("value", &Hidden(&self.value))
            .field("create_revision", &self.create_revision)
            .field("mod_revision", &self.mod_revision)
            .field("lease", &format_args!("{:x}", self.lease))
            .finish()
    }
}
