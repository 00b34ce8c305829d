//! The contenders of one session in one line, and how they tell each other.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Bound::{Excluded, Unbounded};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use super::{Line, Standing};
use crate::session::owned_key::Owned;

/// Positions are shared, because a tree keeps room for several.
pub(super) type Contenders = BTreeMap<Arc<Position>, Arc<Mailbox>>;

/// A contender's place: in the line of its generation, by create revision, then key. A generation that is lost has no
/// say in the next, whoever still holds on to its guards.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Position {
    pub(super) generation: u64,
    pub(super) created: i64,
    pub(super) key: Vec<u8>,
}

impl Position {
    pub(super) fn of(facts: &Owned) -> Self {
        Self { generation: facts.generation.number, created: facts.create_revision, key: facts.key.clone() }
    }

    /// Where its generation begins.
    fn front(&self) -> Self {
        Self { generation: self.generation, created: 0, key: Vec::new() }
    }
}

/// How one contender of a session tells the next that it is its turn to look.
#[derive(Default)]
pub(super) struct Mailbox {
    pub(super) standing: Mutex<Option<Standing>>,
    pub(super) arrived: Notify,
}

/// A contender's membership in the session's part of the line; ends when dropped.
pub(super) struct Membership {
    pub(super) line: Arc<Line>,
    pub(super) position: Arc<Position>,
    pub(super) mailbox: Arc<Mailbox>,
}

impl Line {
    pub(super) fn contenders(&self) -> MutexGuard<'_, Contenders> {
        self.contenders.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The contender of this session behind `position`.
    pub(super) fn behind(&self, position: &Position) -> Option<Arc<Position>> {
        let contenders = self.contenders();
        let next = contenders.range::<Position, _>((Excluded(position), Unbounded)).next();
        next.filter(|(next, _)| next.generation == position.generation).map(|(next, _)| next.clone())
    }

    /// Takes a contender off the list, and tells the next of this session what is known of its place; true if that is
    /// that it is first.
    pub(super) fn leave(&self, position: &Position, next: Option<(Arc<Position>, Standing)>) -> bool {
        let mut contenders = self.contenders();
        let led = first_of(&contenders, position).is_some_and(|(first, _)| **first == *position);
        if contenders.remove(position).is_none() || !led {
            return false;
        }
        let Some((position, mailbox)) = first_of(&contenders, position) else { return false };
        let standing = next.filter(|(of, _)| of == position).map(|(_, standing)| standing);
        let first = standing.as_ref().is_some_and(Standing::is_first);
        *mailbox.standing.lock().unwrap_or_else(PoisonError::into_inner) = standing;
        mailbox.arrived.notify_one();
        first
    }
}

/// The first contender of the generation that `position` is of.
fn first_of<'a>(
    contenders: &'a Contenders,
    position: &Position,
) -> Option<(&'a Arc<Position>, &'a Arc<Mailbox>)> {
    contenders
        .range::<Position, _>(position.front()..)
        .next()
        .filter(|(first, _)| first.generation == position.generation)
}

impl Membership {
    pub(super) fn join(line: Arc<Line>, position: Position) -> Self {
        let position = Arc::new(position);
        let mailbox = Arc::new(Mailbox::default());
        line.contenders().insert(position.clone(), mailbox.clone());
        Self { line, position, mailbox }
    }

    /// The same; `None` if the place has its contender already.
    pub(super) fn try_join(line: Arc<Line>, position: Position) -> Option<Self> {
        let (position, mailbox) = (Arc::new(position), Arc::new(Mailbox::default()));
        match line.contenders().entry(position.clone()) {
            Entry::Vacant(place) => place.insert(mailbox.clone()),
            Entry::Occupied(_) => return None,
        };
        Some(Self { line, position, mailbox })
    }

    /// Whether no other contender of this session is ahead.
    pub(super) fn leads(&self) -> bool {
        first_of(&self.line.contenders(), &self.position).is_some_and(|(first, _)| *first == self.position)
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.line.leave(&self.position, None);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;
    use crate::name::Prefix;
    use crate::session::watch::Range;

    /// Two that take up one place at the same time.
    #[test]
    fn a_place_has_one_contender() {
        let prefix = Prefix::of_name(b"name").unwrap();
        let range = Range::prefix(&prefix);
        let line = Arc::new(Line {
            prefix: Arc::new(prefix),
            range,
            contenders: Mutex::default(),
            number: AtomicU32::new(0),
        });
        let position = Position { generation: 1, created: 7, key: b"name/a-0".to_vec() };
        let first = Membership::try_join(line.clone(), position.clone());
        assert!(first.is_some() && Membership::try_join(line.clone(), position.clone()).is_none());
        drop(first);
        assert!(Membership::try_join(line, position).is_some());
    }
}
