//! What a consumer knows of a queue: which items are to be had, in order.
//!
//! Pure: it is told what the views of the items and of the consumers' bookkeeping show, and which candidates a request
//! tried. An item that was tried in vain was changed by somebody, and the change has been told already or will be; so it
//! is left out until it is told, and no item is forgotten.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::SystemTime;

use tokio::time::Instant;

use super::chain::Candidate;
use super::keys::{self, Attempts, Book, Delay, Keys};
use super::turn::Turns;
use crate::session::view::{Change, Entry};

/// With more items than this to be had, every consumer takes from the front at once.
const CROWD: usize = 32;

/// What a consumer knows.
#[derive(Debug)]
pub(crate) struct Shelf {
    keys: Arc<Keys>,
    /// What is to be had, in commit order, and from when on by this consumer.
    ready: BTreeMap<Place, Instant>,
    /// What is known of items beside themselves, by id.
    notes: BTreeMap<Vec<u8>, Note>,
    /// The items that rest, by when they are to be looked at again.
    resting: BTreeSet<(Instant, Vec<u8>)>,
    /// Candidates of requests under way, and whether something was told of them since.
    tried: BTreeMap<Vec<u8>, bool>,
    pub(crate) turns: Turns,
    /// The key of this consumer, once it has one.
    pub(crate) me: Option<Vec<u8>>,
}

/// An item's place in the order of the queue: that of its commit, then of its key.
#[derive(Debug, Clone)]
struct Place(Arc<Entry>);

#[derive(Debug, Default)]
struct Note {
    claimed: bool,
    attempts: Option<(Attempts, i64)>,
    resting: Option<Instant>,
    delayed: bool,
}

/// Finds an item by its key.
pub(crate) type Find<'a> = &'a dyn Fn(&[u8]) -> Option<Arc<Entry>>;

/// Which of a request's candidates were tried in vain, and what became of the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tried {
    /// Nothing is known: the request was not applied.
    None,
    /// The first so many were not to be had, and the next was taken.
    Took(usize),
    /// None was to be had.
    All,
}

// === impl Shelf ===

impl Shelf {
    pub(crate) fn new(keys: Arc<Keys>) -> Self {
        Self {
            keys,
            ready: BTreeMap::new(),
            notes: BTreeMap::new(),
            resting: BTreeSet::new(),
            tried: BTreeMap::new(),
            turns: Turns::default(),
            me: None,
        }
    }

    /// Takes in a change of an item. `new`: it has just come, so others hear of it now as well.
    pub(crate) fn item(&mut self, change: &Change, now: Instant, new: bool) {
        if let Some(before) = &change.before {
            self.ready.remove(&Place(before.clone()));
        }
        let Some(entry) = change.after.as_ref().or(change.before.as_ref()) else { return };
        self.touch(&entry.key);
        match &change.after {
            Some(entry) => self.look(entry, now, new),
            None => self.forget_rest(&entry.key),
        }
    }

    /// Takes in a change of the bookkeeping. `wall`: the time by which delays go.
    pub(crate) fn book(&mut self, change: &Change, now: Instant, wall: SystemTime, find: Find<'_>) {
        let Some(entry) = change.after.as_ref().or(change.before.as_ref()) else { return };
        let keys = self.keys.clone();
        let after = change.after.as_deref();
        let id = match keys.book(&entry.key) {
            Some(Book::Consumer) => {
                change.before.iter().for_each(|gone| self.turns.left(&gone.key, gone.lease));
                after.into_iter().for_each(|come| self.turns.arrived(&come.key, come.lease));
                return;
            }
            Some(Book::Claim(id)) => {
                change.before.iter().for_each(|gone| self.turns.ended(gone.lease));
                after.into_iter().for_each(|come| self.turns.claimed(come.lease));
                self.note(id).claimed = after.is_some();
                id
            }
            Some(Book::Attempts(id)) => {
                let attempts = after.and_then(|entry| Some((keys::read(&entry.value)?, entry.mod_revision)));
                self.note(id).attempts = attempts;
                id
            }
            Some(Book::Delay(id)) => {
                self.forget_rest(&keys.item(id));
                let delay = after.and_then(|entry| keys::read::<Delay>(&entry.value));
                let rest = delay.map(|delay| delay.rest(wall));
                let until = rest.and_then(|rest| now.checked_add(rest));
                let note = self.note(id);
                (note.delayed, note.resting) = (after.is_some(), until);
                if let Some(until) = until {
                    self.resting.insert((until, keys.item(id)));
                }
                id
            }
            None => return,
        };
        if self.notes.get(id).is_some_and(Note::is_empty) {
            self.notes.remove(id);
        }
        let key = keys.item(id);
        self.touch(&key);
        if let Some(entry) = find(&key) {
            self.look(&entry, now, true);
        }
    }

    /// Looks at every item again, after changes were missed.
    pub(crate) fn look_at_all<'a>(&mut self, items: impl Iterator<Item = &'a Arc<Entry>>, now: Instant) {
        for entry in items {
            self.touch(&entry.key);
            if !self.ready.contains_key(&Place(entry.clone())) {
                self.look(entry, now, false);
            }
        }
    }

    /// Looks at the items that have rested long enough.
    pub(crate) fn wake(&mut self, now: Instant, find: Find<'_>) {
        while let Some((until, key)) = self.resting.first().cloned() {
            if until > now {
                return;
            }
            self.forget_rest(&key);
            if let Some(entry) = find(&key) {
                self.look(&entry, now, true);
            }
        }
    }

    /// When there is something to do without any news.
    pub(crate) fn next(&self) -> Option<Instant> {
        let resting = self.resting.first().map(|(until, _)| *until);
        let ready = self.ready.values().take(CROWD).min().copied();
        resting.into_iter().chain(ready).min()
    }

    /// The first items to be had now, in order; they are not offered again until settled. `all`: also those that are left
    /// to others for a moment.
    pub(crate) fn pick(&mut self, now: Instant, most: usize, all: bool) -> Vec<Candidate> {
        let all = all || self.ready.len() > CROWD;
        let due = self.ready.iter().filter(|(_, due)| all || **due <= now);
        let places: Vec<Place> = due.take(most).map(|(place, _)| place.clone()).collect();
        places.into_iter().map(|place| self.candidate(place)).collect()
    }

    /// The first item to be had, without picking it.
    pub(crate) fn first(&self) -> Option<&Arc<Entry>> {
        self.ready.keys().next().map(|Place(entry)| entry)
    }

    /// Takes back what was picked.
    pub(crate) fn settle(&mut self, candidates: &[Candidate], tried: Tried, now: Instant, find: Find<'_>) {
        for (index, candidate) in candidates.iter().enumerate() {
            let key = &candidate.entry.key;
            let touched = self.tried.remove(key).unwrap_or(false);
            let untried = match tried {
                Tried::None => true,
                Tried::Took(taken) => index > taken,
                Tried::All => false,
            };
            // What was tried has changed. If that was told already, the item is as it seems; else it will be.
            if (untried || touched)
                && let Some(entry) = find(key)
            {
                self.look(&entry, now, false);
            }
        }
    }

    fn candidate(&mut self, place: Place) -> Candidate {
        self.ready.remove(&place);
        let Place(entry) = place;
        self.tried.insert(entry.key.clone(), false);
        let note = self.notes.get(self.keys.id(&entry.key));
        Candidate {
            attempts: note.and_then(|note| note.attempts_of(&entry)),
            delayed: note.is_some_and(|note| note.delayed),
            entry,
        }
    }

    /// Puts an item where it belongs.
    fn look(&mut self, entry: &Arc<Entry>, now: Instant, new: bool) {
        let place = Place(entry.clone());
        let due = self.ready.remove(&place);
        if self.tried.contains_key(&entry.key) {
            return;
        }
        let note = self.notes.get(self.keys.id(&entry.key));
        if note.is_some_and(|note| note.claimed || note.resting.is_some()) {
            return;
        }
        let due = due.unwrap_or_else(|| {
            let own = self.me.as_deref();
            if new { now + self.turns.patience(&entry.key, own) } else { now }
        });
        self.ready.insert(place, due);
    }

    fn touch(&mut self, key: &[u8]) {
        if let Some(touched) = self.tried.get_mut(key) {
            *touched = true;
        }
    }

    fn forget_rest(&mut self, key: &[u8]) {
        let note = self.notes.get_mut(self.keys.id(key));
        if let Some(until) = note.and_then(|note| note.resting.take()) {
            self.resting.remove(&(until, key.to_vec()));
        }
    }

    fn note(&mut self, id: &[u8]) -> &mut Note {
        self.notes.entry(id.to_vec()).or_default()
    }
}

// === impl Note, Place ===

impl Note {
    fn is_empty(&self) -> bool {
        !self.claimed && self.attempts.is_none() && !self.delayed
    }

    /// The count of attempts, if it is about this very item; else it counts as none, but its key is there.
    fn attempts_of(&self, entry: &Entry) -> Option<(Attempts, i64)> {
        let (attempts, revision) = self.attempts?;
        if attempts.item == entry.create_revision {
            return Some((attempts, revision));
        }
        Some((Attempts { attempts: 0, item: entry.create_revision }, revision))
    }
}

impl Place {
    fn order(&self) -> (i64, &[u8]) {
        (self.0.create_revision, &self.0.key)
    }
}

impl PartialEq for Place {
    fn eq(&self, other: &Self) -> bool {
        self.order() == other.order()
    }
}

impl Eq for Place {}

impl PartialOrd for Place {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Place {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.order().cmp(&other.order())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
