//! Who is there at one moment, and the difference between two.

use std::cmp::Ordering;
use std::iter::Peekable;
use std::sync::Arc;

use crate::service::{FormatError, Instance};

/// The instances of a service at one revision of etcd.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Snapshot {
    /// The revision.
    pub revision: i64,
    /// The instances, in the order of their ids. Of several entries with one id the last put counts.
    pub instances: Vec<Arc<Instance>>,
    /// The entries that cannot be read.
    pub malformed: Vec<Malformed>,
    /// How many of the instances are not registered any more, and only kept because too many vanished; see
    /// [`DiscoveryBuilder::protect`](super::DiscoveryBuilder::protect).
    pub kept: usize,
}

/// An entry that cannot be read.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Malformed {
    /// Its key.
    pub key: Vec<u8>,
    /// What is wrong with it.
    pub error: FormatError,
}

impl std::fmt::Debug for Malformed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let key = crate::name::display(&self.key);
        f.debug_struct("Malformed").field("key", &key).field("error", &self.error).finish()
    }
}

/// What has changed.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Change {
    /// An instance has come.
    Added(Arc<Instance>),
    /// An instance is another than before, under the same id.
    Updated {
        /// As it was.
        before: Arc<Instance>,
        /// As it is.
        after: Arc<Instance>,
    },
    /// An instance has gone.
    Removed(Arc<Instance>),
    /// An entry cannot be read.
    Malformed(Malformed),
}

/// What leads from one snapshot to another.
pub(super) fn differences(before: &Snapshot, after: &Snapshot) -> Vec<Change> {
    let mut changes = Vec::new();
    let (mut old, mut new) = (before.instances.iter().peekable(), after.instances.iter().peekable());
    while let Some(order) = first(&mut old, &mut new) {
        let before = if order == Ordering::Greater { None } else { old.next().cloned() };
        let after = if order == Ordering::Less { None } else { new.next().cloned() };
        changes.extend(match (before, after) {
            (Some(before), Some(after)) => (before != after).then_some(Change::Updated { before, after }),
            (Some(before), None) => Some(Change::Removed(before)),
            (None, after) => after.map(Change::Added),
        });
    }
    let new = after.malformed.iter().filter(|malformed| !before.malformed.contains(malformed));
    changes.extend(new.cloned().map(Change::Malformed));
    changes
}

/// Which of two lists goes on with the smaller id.
fn first<'a>(
    old: &mut Peekable<impl Iterator<Item = &'a Arc<Instance>>>,
    new: &mut Peekable<impl Iterator<Item = &'a Arc<Instance>>>,
) -> Option<Ordering> {
    match (old.peek(), new.peek()) {
        (Some(old), Some(new)) => Some(old.id.cmp(&new.id)),
        (Some(_), None) => Some(Ordering::Less),
        (None, Some(_)) => Some(Ordering::Greater),
        (None, None) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(instances: &[(&str, u32)]) -> Snapshot {
        let instance = |(id, weight): &(&str, u32)| Arc::new(Instance::new("s", *id).weight(*weight));
        Snapshot { instances: instances.iter().map(instance).collect(), ..Snapshot::default() }
    }

    #[test]
    fn differences_are_who_came_changed_and_went() {
        let before = snapshot(&[("a", 1), ("b", 1), ("d", 1), ("e", 1)]);
        let after = snapshot(&[("b", 2), ("c", 1), ("e", 1), ("f", 1)]);
        let [a, b, d, _] = &before.instances[..] else { unreachable!() };
        let [b2, c, _, f] = &after.instances[..] else { unreachable!() };
        let expected = vec![
            Change::Removed(a.clone()),
            Change::Updated { before: b.clone(), after: b2.clone() },
            Change::Added(c.clone()),
            Change::Removed(d.clone()),
            Change::Added(f.clone()),
        ];
        assert_eq!(differences(&before, &after), expected);
        assert!(differences(&after, &after).is_empty());
    }
}
