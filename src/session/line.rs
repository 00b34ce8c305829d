//! A place in a revision-ordered line of owned keys: what mutex and election have in common.
//!
//! Every contender creates a key `{name}/{lease}-{nonce}`; the line is ordered by create revision, then key; who is
//! first holds the lock. This is the layout of etcd's Go package `concurrency`, so its users and `etcdctl` stand in the
//! same line.
//!
//! # Waiting
//!
//! A contender that is close to the front follows the line: it knows who is ahead from one read, and one watch tells
//! their deletions, so it knows that its turn has come without asking. One further back watches a single key some
//! places ahead, and follows the line when that is gone: a release is told to a bounded number of processes, however
//! long the line. Contenders of one session wait for each other locally; a release reads, in its own transaction,
//! whether the session's next contender is first, and hands over directly.
//!
//! # What a watch may say
//!
//! Watch and answers are different streams, and a foreign key may be deleted and created again under its old name. So
//! a waiter has a *base*: the revision of the last read that showed its own key and all that are ahead. A deletion
//! counts if its revision is above the base, and the watch must tell everything above the base.
//!
//! A watch that is new may be told up to 100 ms late (`Subscription::may_lag`), which would hold up a line that moves
//! faster. So a waiter that has come forward in the line, and hears nothing when it should have moved on, watches anew
//! and reads.
//!
//! # The token
//!
//! The fencing token is a revision at which one snapshot shows the own key and nobody ahead: that of the entering
//! transaction, of a read, of a release by the same session that read the own key, or of the deletion that emptied the
//! set ahead. Later holders see a later revision, so tokens grow strictly from holder to holder.

mod contenders;
mod place;
mod wait;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use etcd_client::proto::PbResponseOp;
use etcd_client::{Compare, CompareOp, GetOptions, KeyValue, SortOrder, SortTarget, TxnOp};
use tokio::time::Instant;

use self::contenders::{Contenders, Membership, Position};
pub(crate) use self::place::Place;
use self::wait::Waiter;
use super::generation::Generation;
use super::owned_key::{Created, Creation, OwnedKey};
use super::rpc::{KeyFacts, RangeAnswer, revision};
use super::slots::Nonce;
use super::watch::Range;
use super::{Core, Session};
use crate::error::{Error, Result};
use crate::name::{self, Prefix};

/// How many places before the front a contender begins to follow the line. With it, the number of processes that hear
/// of one release is bounded.
const FRONT: i64 = 8;

/// The line of one name, as one session sees it. Shared by all who use the name in this session.
pub(crate) struct Line {
    prefix: Arc<Prefix>,
    range: Range,
    /// The session's own contenders, the holder included, in the order of the line.
    contenders: Mutex<Contenders>,
    /// The number in the name of the session's last key here.
    number: AtomicU32,
}

/// What one snapshot shows of a contender's place.
#[derive(Debug, Clone)]
struct Standing {
    /// The snapshot's revision.
    revision: i64,
    /// The keys ahead, the newest first: all of them, or when `more`, only some.
    ahead: Vec<Vec<u8>>,
    more: bool,
}

/// One key of a line, for people to look at.
#[derive(Debug, Clone)]
pub(crate) struct Member {
    pub(crate) facts: KeyFacts,
    pub(crate) value: Vec<u8>,
}

// === impl Line ===

impl Line {
    /// The line called `name`, the same for all who ask for it in this session.
    pub(crate) fn open(core: &Core, name: &[u8]) -> Result<Arc<Self>> {
        let prefix = Arc::new(Prefix::of_name(name)?);
        let mut lines = core.lines.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(line) = lines.get(&prefix).and_then(Weak::upgrade) {
            return Ok(line);
        }
        if lines.len() >= 1024 && lines.len().is_power_of_two() {
            lines.retain(|_, line| line.strong_count() > 0);
        }
        if prefix.overlaps(&core.namespace) {
            let reason = "it is that of the session's bookkeeping keys, or contains it";
            return Err(Error::InvalidName { name: name::display(name), reason });
        }
        let nested =
            |(other, line): (&Arc<Prefix>, &Weak<Self>)| prefix.nested(other) && line.strong_count() > 0;
        if Self::relatives(&lines, &prefix).any(nested) || core.queues.meet(&prefix) {
            let reason =
                "another name in use by this session is the same up to a '/', and the two would be one line";
            return Err(Error::InvalidName { name: name::display(name), reason });
        }
        let range = Range::prefix(&prefix);
        let (contenders, number) = (Mutex::default(), AtomicU32::new(0));
        let line = Arc::new(Self { prefix: prefix.clone(), range, contenders, number });
        // A line of this name that is over would leave its own copy of the name in the tree.
        lines.remove(&prefix);
        lines.insert(prefix, Arc::downgrade(&line));
        Ok(line)
    }

    /// The lines that might contain `prefix` or be contained in it.
    fn relatives<'a>(
        lines: &'a BTreeMap<Arc<Prefix>, Weak<Self>>,
        prefix: &'a Prefix,
    ) -> impl Iterator<Item = (&'a Arc<Prefix>, &'a Weak<Self>)> {
        let bytes = prefix.as_bytes();
        let slashes = bytes.iter().enumerate().filter(|(at, byte)| **byte == b'/' && *at > 0);
        let above = slashes.filter_map(|(at, _)| lines.get_key_value(&Prefix::of_name(&bytes[..at]).ok()?));
        let below = lines
            .range::<Prefix, _>(prefix..)
            .take_while(|(other, _)| other.as_bytes().starts_with(prefix.as_bytes()));
        above.chain(below)
    }

    /// Waits for the first place. When the session's lease is lost meanwhile, takes a new place at the end of the line.
    /// `value` makes the value of each place's key.
    ///
    /// # Cancel safety
    ///
    /// When dropped, the place is given up.
    pub(crate) async fn enter(
        self: &Arc<Self>,
        session: &Session,
        value: impl Fn() -> Vec<u8>,
    ) -> Result<Place> {
        loop {
            let generation = session.generation().await?;
            match self.take_place(session, &generation, value()).await {
                Err(Error::Lost { key }) => tracing::debug!(key, "lost the place in line; taking another"),
                result => return result,
            }
        }
    }

    async fn take_place(
        self: &Arc<Self>,
        session: &Session,
        generation: &Arc<Generation>,
        value: Vec<u8>,
    ) -> Result<Place> {
        let core = session.core();
        // A watch that runs already is joined before the entry is sent: then it covers all that follows the entry.
        let watch = core.deletions.join(&self.range);
        let nonce = self.nonce(generation);
        // Behind a waiter of this session the standing does not matter, and reading it costs etcd a walk over the line.
        let alone = self.contenders().len() < 2;
        let creation = Creation {
            key: self.prefix.place(generation.lease.get(), nonce.number),
            nonce,
            value,
            only_if: None,
            reads: if alone { vec![self.standing_op(None)] } else { Vec::new() },
        };
        let lost = || Error::Lost { key: name::display(self.prefix.as_bytes()) };
        // Boxed, because it is over before the wait begins, and a waiter that only waits should be small.
        let Created { key, reads } = Box::pin(creation.run(core, generation)).await?.ok_or_else(lost)?;
        let (entered, position) = (Instant::now(), Position::of(key.facts()));
        let length = reads.as_ref().and_then(|(reads, _)| Some(RangeAnswer::of(reads, 0)?.count()));
        let ahead_at_entry = usize::try_from(length.unwrap_or(0)).unwrap_or(0).saturating_sub(1);
        let standing = match reads {
            Some((reads, revision)) if alone => {
                Some(self.standing(&reads, 0, &position, revision).ok_or_else(lost)?)
            }
            _ => None,
        };
        let membership = Membership::join(self.clone(), position);
        let mut waiter = Waiter {
            core,
            generation,
            line: self,
            facts: key.facts(),
            membership: &membership,
            watch,
            entered,
            ahead_at_entry,
            doubts: 0,
        };
        let token = waiter.wait(standing).await?;
        let watch = waiter.watch.take();
        Place::new(session.clone(), key, membership, watch, token)
    }

    /// A number for the next key here: that of the last one, if it can be.
    fn nonce(&self, generation: &Generation) -> Nonce {
        let nonce = generation.nonces.take(self.number.load(Ordering::Relaxed));
        self.number.store(nonce.number, Ordering::Relaxed);
        nonce
    }

    /// Takes the first place if nobody is in the line.
    ///
    /// # Cancel safety
    ///
    /// When dropped, the place is given up.
    pub(crate) async fn try_enter(
        self: &Arc<Self>,
        session: &Session,
        value: Vec<u8>,
    ) -> Result<Option<Place>> {
        let generation = session.generation().await?;
        let core = session.core();
        let nobody = Compare::create_revision(self.prefix.as_bytes(), CompareOp::Equal, 0)
            .with_range(self.prefix.end());
        let nonce = self.nonce(&generation);
        let creation = Creation {
            key: self.prefix.place(generation.lease.get(), nonce.number),
            nonce,
            value,
            only_if: Some(nobody),
            reads: Vec::new(),
        };
        let created = Box::pin(creation.run(core, &generation)).await?;
        let Some(Created { key, .. }) = created else { return Ok(None) };
        // Nobody was there when it was created, so that revision is the token, whoever told it.
        let token = key.facts().create_revision;
        let membership = Membership::join(self.clone(), Position::of(key.facts()));
        Place::new(session.clone(), key, membership, None, token).map(Some)
    }

    /// Takes up a place whose guard was detached. `None` if it is over, or not first.
    pub(crate) async fn resume(
        self: &Arc<Self>,
        session: &Session,
        key: &[u8],
        created: i64,
    ) -> Result<Option<Place>> {
        let generation = session.generation().await?;
        let core = session.core();
        let (first, revision) = self.first(core).await?;
        let ours = |first: &Member| {
            first.facts.key == key
                && first.facts.create_revision == created
                && first.facts.lease == generation.lease.get()
        };
        if !first.as_ref().is_some_and(ours) {
            return Ok(None);
        }
        let key = OwnedKey::resume(core, &generation, key.to_vec(), created);
        match Membership::try_join(self.clone(), Position::of(key.facts())) {
            Some(membership) => Place::new(session.clone(), key, membership, None, revision).map(Some),
            // It was taken up already, and has its guard.
            None => {
                key.keep();
                Ok(None)
            }
        }
    }

    /// All keys of the line in its order.
    pub(crate) async fn members(&self, core: &Core) -> Result<Vec<Member>> {
        let options = GetOptions::new().with_range(self.prefix.end());
        let response = core.rpc.get(self.prefix.as_bytes(), options, Some(super::rpc::READ_LIMIT)).await?;
        let member = |kv: &KeyValue| Member { facts: kv.into(), value: kv.value().to_vec() };
        let mut members: Vec<Member> = response.kvs().iter().map(member).collect();
        members.sort_by(|a, b| {
            (a.facts.create_revision, &a.facts.key).cmp(&(b.facts.create_revision, &b.facts.key))
        });
        members.iter().for_each(|member| warn_without_lease(&member.facts));
        Ok(members)
    }

    /// The first key of the line.
    pub(crate) async fn first(&self, core: &Core) -> Result<(Option<Member>, i64)> {
        let options = GetOptions::new()
            .with_range(self.prefix.end())
            .with_sort(SortTarget::Create, SortOrder::Ascend)
            .with_limit(1);
        let response = core.rpc.get(self.prefix.as_bytes(), options, Some(super::rpc::READ_LIMIT)).await?;
        let first = response.kvs().first().map(|kv| Member { facts: kv.into(), value: kv.value().to_vec() });
        Ok((first, revision(response.header())))
    }

    pub(crate) fn prefix(&self) -> &Prefix {
        &self.prefix
    }

    /// Reads who is ahead of a contender: the newest keys up to its own. A contender that just entered is the newest.
    fn standing_options(&self, created: Option<i64>) -> GetOptions {
        let options = GetOptions::new()
            .with_range(self.prefix.end())
            .with_sort(SortTarget::Create, SortOrder::Descend)
            .with_limit(FRONT + 1)
            .with_keys_only();
        match created {
            None => options,
            Some(revision) => options.with_max_create_revision(revision),
        }
    }

    fn standing_op(&self, created: Option<i64>) -> TxnOp {
        TxnOp::get(self.prefix.as_bytes(), Some(self.standing_options(created)))
    }

    /// Makes sense of such a read. `None` if the own key is not there.
    fn standing(
        &self,
        responses: &[PbResponseOp],
        op: usize,
        me: &Position,
        revision: i64,
    ) -> Option<Standing> {
        let range = RangeAnswer::of(responses, op)?;
        Standing::read(range.keys(), range.more(), me, revision)
    }
}

/// Such a key was not made by a lock or an election, and nobody but a person will remove it.
fn warn_without_lease(facts: &KeyFacts) {
    if facts.lease == 0 {
        tracing::warn!(key = %name::display(&facts.key), "a key without a lease blocks its line until it is deleted");
    }
}

impl Standing {
    fn read(keys: impl Iterator<Item = KeyFacts>, more: bool, me: &Position, revision: i64) -> Option<Self> {
        let mut found = false;
        let mut ahead = Vec::new();
        for facts in keys {
            match (facts.create_revision, &facts.key).cmp(&(me.created, &me.key)) {
                std::cmp::Ordering::Less => {
                    warn_without_lease(&facts);
                    ahead.push(facts.key);
                }
                std::cmp::Ordering::Equal => found = true,
                std::cmp::Ordering::Greater => {}
            }
        }
        found.then_some(Self { revision, ahead, more })
    }

    fn is_first(&self) -> bool {
        self.ahead.is_empty() && !self.more
    }
}
