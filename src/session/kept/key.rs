//! What is known of one kept key, and what is to be done next.

use std::sync::Arc;

use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::oneshot;

use super::{Command, KeptKey, Settle, Standing, Status};
use crate::error::{Error, Result};
use crate::name::{self, Prefix};
use crate::session::batch::{Op, Outcome, What};
use crate::session::rpc::KeyFacts;
use crate::session::runtime::Backoff;

/// One kept key.
pub(super) struct Key {
    name: Arc<[u8]>,
    pub(super) prefix: Arc<Prefix>,
    owner: Arc<Status>,
    /// What is to be there.
    value: Arc<[u8]>,
    /// What is there, after our last put.
    put: Option<Arc<[u8]>>,
    /// The `mod_revision` of our last put.
    last: i64,
    /// The lease of our last put.
    lease: i64,
    /// Leases that ended before a put on them was answered: what is on them is ours as well.
    unanswered: Vec<i64>,
    phase: Phase,
    /// A write is under way, with this value if it puts one.
    pub(super) under_way: Option<Option<Arc<[u8]>>>,
    /// The last deletion heard of.
    deleted: i64,
    /// The last put of somebody else heard of.
    foreign: i64,
    /// Those that are not in effect yet; each contains those before it.
    updates: Vec<Update>,
    /// Waits between attempts that are refused.
    pub(super) refused: Option<Box<Backoff>>,
    /// Such a wait is under way.
    pub(super) waits: bool,
}

/// A value that its owner wants to be there.
struct Update {
    value: Arc<[u8]>,
    settle: Settle,
}

/// What its owner wants.
enum Phase {
    /// To take it over.
    Taking(oneshot::Sender<Result<KeptKey>>),
    /// To have it.
    Having,
    /// To be rid of it.
    Leaving(Vec<oneshot::Sender<Result<()>>>),
}

/// What becomes of a key.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// It may have something to write.
    Go,
    /// Something is to be written, later.
    Retry,
    /// It is not kept any more.
    Forget,
}

impl Key {
    pub(super) fn new(
        prefix: Arc<Prefix>,
        name: Arc<[u8]>,
        value: Arc<[u8]>,
        answer: oneshot::Sender<Result<KeptKey>>,
    ) -> Self {
        Self {
            name,
            prefix,
            owner: Arc::default(),
            value,
            put: None,
            last: 0,
            lease: 0,
            unanswered: Vec::new(),
            phase: Phase::Taking(answer),
            under_way: None,
            deleted: 0,
            foreign: 0,
            updates: Vec::new(),
            refused: None,
            waits: false,
        }
    }

    /// The same name is taken over within the session.
    pub(super) fn replace(&mut self, value: Arc<[u8]>, answer: oneshot::Sender<Result<KeptKey>>) {
        let error = self.superseded();
        self.owner.set(Standing::Superseded);
        match std::mem::replace(&mut self.phase, Phase::Taking(answer)) {
            Phase::Taking(earlier) => drop(earlier.send(Err(error))),
            Phase::Having => {}
            Phase::Leaving(answers) => answers.into_iter().for_each(|answer| drop(answer.send(Ok(())))),
        }
        for update in std::mem::take(&mut self.updates) {
            (update.settle)(Err(self.superseded()));
        }
        (self.owner, self.value) = (Arc::default(), value);
        (self.put, self.refused) = (None, None);
    }

    pub(super) fn is_owner(&self, owner: &Arc<Status>) -> bool {
        Arc::ptr_eq(&self.owner, owner)
    }

    pub(super) fn update(&mut self, value: Arc<[u8]>, settle: Settle) {
        self.value = value.clone();
        self.refused = None;
        self.updates.push(Update { value, settle });
    }

    /// To be deleted. `lease` is that of now, or 0.
    pub(super) fn leave(&mut self, answer: Option<oneshot::Sender<Result<()>>>, lease: i64) -> Next {
        self.refused = None;
        match &mut self.phase {
            Phase::Leaving(answers) => answers.extend(answer),
            phase => *phase = Phase::Leaving(answer.into_iter().collect()),
        }
        // A lease that is gone has taken it along.
        if self.under_way.is_none() && self.lease != lease { self.end(Ok(())) } else { Next::Go }
    }

    /// What to write now, if anything, on this lease.
    pub(super) fn op(&mut self, lease: i64) -> Option<Op> {
        if self.under_way.is_some() {
            return None;
        }
        let current = self.lease == lease && self.deleted <= self.last;
        let what = match &self.phase {
            // Whoever asked for it is gone.
            Phase::Taking(answer) if answer.is_closed() => return None,
            Phase::Taking(_) => What::Take(self.value.clone()),
            Phase::Having if current && self.updates.is_empty() && self.put.is_some() => return None,
            Phase::Having => What::Put { value: self.value.clone(), last: self.last, absent: !current },
            Phase::Leaving(_) => What::Delete { last: self.last },
        };
        let value = match &what {
            What::Take(value) | What::Put { value, .. } => Some(value.clone()),
            What::Delete { .. } => None,
        };
        self.under_way = Some(value);
        Some(Op { key: self.name.clone(), what })
    }

    /// Its write is not sent now.
    pub(super) fn put_off(&mut self) {
        self.under_way = None;
    }

    /// Whether there is nothing to keep, and nothing to delete either.
    pub(super) fn is_void(&self) -> bool {
        self.under_way.is_none()
            && match &self.phase {
                Phase::Taking(answer) => answer.is_closed(),
                Phase::Having => false,
                Phase::Leaving(_) => self.last == 0,
            }
    }

    /// Takes in what came of the write that was under way.
    pub(super) fn settle(
        &mut self,
        outcome: Outcome,
        lease: i64,
        commands: &UnboundedSender<Command>,
    ) -> Next {
        let value = self.under_way.take().flatten();
        if !self.meant(value.as_ref()) {
            // Of an owner before this one.
            if let (Outcome::Done(revision), Some(_)) = (&outcome, &value) {
                (self.last, self.lease) = (*revision, lease);
            }
            return Next::Go;
        }
        match outcome {
            Outcome::Done(revision) => self.done(value, revision, lease, commands),
            Outcome::Not { found: Some(found), maybe }
                if found.lease != lease && found.mod_revision != self.last =>
            {
                // Deleted by an attempt of ours, and put by somebody else since.
                let gone = maybe && matches!(self.phase, Phase::Leaving(_)) && value.is_none();
                self.end(if gone { Ok(()) } else { Err(self.superseded()) })
            }
            Outcome::Not { found: Some(found), .. } => {
                // Our own.
                (self.last, self.lease) = (found.mod_revision, found.lease);
                Next::Go
            }
            Outcome::Not { found: None, .. } => match self.phase {
                Phase::Leaving(_) => self.end(Ok(())),
                _ => {
                    self.deleted = self.deleted.max(self.last + 1);
                    self.away();
                    Next::Go
                }
            },
            Outcome::Refused(error) => self.refuse(value, error),
            Outcome::Ended => match self.phase {
                // The lease takes it along.
                Phase::Leaving(_) => self.end(Ok(())),
                _ => {
                    self.unanswered.push(lease);
                    Next::Go
                }
            },
        }
    }

    fn done(
        &mut self,
        value: Option<Arc<[u8]>>,
        revision: i64,
        lease: i64,
        commands: &UnboundedSender<Command>,
    ) -> Next {
        let Some(value) = value else { return self.end(Ok(())) };
        (self.last, self.lease, self.refused) = (revision, lease, None);
        // Those leases were over before.
        self.unanswered = Vec::new();
        let newest = self.updates.iter().rposition(|update| Arc::ptr_eq(&value, &update.value));
        let updates = self.updates.drain(..newest.map_or(0, |newest| newest + 1));
        updates.for_each(|update| (update.settle)(Ok(())));
        self.put = Some(value);
        if self.foreign > revision {
            return self.end(Err(self.superseded()));
        }
        if self.deleted <= revision {
            self.owner.set(Standing::There);
        }
        if let Phase::Taking(_) = self.phase
            && let Phase::Taking(answer) = std::mem::replace(&mut self.phase, Phase::Having)
        {
            let (commands, status, key) = (commands.clone(), self.owner.clone(), self.name.clone());
            // If nobody waits for it any more, it is dropped here, and so removed.
            let _ = answer.send(Ok(KeptKey { commands, status, key }));
        }
        Next::Go
    }

    /// Whether a write that put this, or deleted, was for what the owner wants now.
    fn meant(&self, value: Option<&Arc<[u8]>>) -> bool {
        match &self.phase {
            Phase::Taking(_) => value.is_some_and(|value| Arc::ptr_eq(value, &self.value)),
            Phase::Having | Phase::Leaving(_) => true,
        }
    }

    fn refuse(&mut self, value: Option<Arc<[u8]>>, error: Error) -> Next {
        let newest = value.is_some_and(|value| Arc::ptr_eq(&value, &self.value));
        match &mut self.phase {
            Phase::Taking(_) => return self.end(Err(error)),
            Phase::Leaving(_) => {}
            Phase::Having if !newest => return Next::Go,
            Phase::Having => {
                if let Some(update) = self.updates.pop() {
                    // The one before it is tried by itself; with none, the last value that was good stays.
                    let before = self.updates.last().map(|update| &update.value).or(self.put.as_ref());
                    self.value = before.unwrap_or(&self.value).clone();
                    (update.settle)(Err(error));
                    // Heard of while this was under way.
                    if self.foreign > self.last {
                        return self.end(Err(self.superseded()));
                    }
                    return Next::Go;
                }
            }
        }
        tracing::warn!(key = %name::display(&self.name), %error, "a kept key is refused; trying again");
        self.refused.get_or_insert_with(|| Box::new(Backoff::of_refusals()));
        Next::Retry
    }

    /// Takes in a change of the key that was heard of. `put` is its lease if it was put.
    pub(super) fn hear(&mut self, revision: i64, put: Option<i64>, lease: i64) -> Next {
        match put {
            Some(owner) if owner == lease || owner == self.lease && owner != 0 => {}
            Some(owner) if self.unanswered.contains(&owner) => {}
            Some(_) => {
                self.foreign = self.foreign.max(revision);
                if self.under_way.is_none() && revision > self.last && matches!(self.phase, Phase::Having) {
                    return self.end(Err(self.superseded()));
                }
            }
            None => {
                self.deleted = self.deleted.max(revision);
                if revision > self.last && self.put.is_some() {
                    self.away();
                }
            }
        }
        Next::Go
    }

    fn away(&self) {
        if self.owner.standing() == Standing::There {
            self.owner.set(Standing::Away);
        }
    }

    /// Its lease is gone, and the key with it.
    pub(super) fn lose(&mut self) -> Next {
        self.away();
        if matches!(self.phase, Phase::Leaving(_)) && self.under_way.is_none() {
            self.end(Ok(()))
        } else {
            Next::Go
        }
    }

    /// Its facts as a list shows them: as if they had been heard of.
    pub(super) fn compare(&mut self, found: Option<&KeyFacts>, at: i64, lease: i64) -> Next {
        match found {
            Some(found) => self.hear(found.mod_revision, Some(found.lease), lease),
            None => self.hear(at, None, lease),
        }
    }

    /// It is not kept any more: tells everybody who waits.
    fn end(&mut self, result: Result<()>) -> Next {
        let lost = matches!(result, Err(Error::Superseded { .. }));
        if lost {
            tracing::warn!(key = %name::display(&self.name), "superseded by somebody else's put");
            self.owner.set(Standing::Superseded);
        } else {
            self.owner.set(Standing::Removed);
        }
        let updates = std::mem::take(&mut self.updates);
        for update in updates {
            (update.settle)(Err(super::over(&self.name, &self.owner)));
        }
        match std::mem::replace(&mut self.phase, Phase::Having) {
            Phase::Taking(answer) => drop(answer.send(Err(result.err().unwrap_or(Error::Closed)))),
            Phase::Having => {}
            Phase::Leaving(answers) => {
                for answer in answers {
                    let _ = answer.send(if lost { Err(self.superseded()) } else { Ok(()) });
                }
            }
        }
        Next::Forget
    }

    fn superseded(&self) -> Error {
        Error::Superseded { key: name::display(&self.name) }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
