//! The task of a consumer: follows the queue, and serves in order of asking.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt as _};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::Instant;

use crate::error::Error;
use crate::queue::attempt::{Ask, Means, Settled};
use crate::queue::chain::MOST;
use crate::queue::item::{Item, Parcel};
use crate::queue::shelf::{Shelf, Tried};
use crate::session::owned_key::{Creation, Owned, OwnedKey};
use crate::session::view::{Batch, Change, View};

/// How long an item taken for a call that was dropped is kept for the next call before it is put back.
const KEEP: Duration = Duration::from_secs(1);
/// How long a consumer is known as one that waits after it last did.
const LEAVE: Duration = Duration::from_secs(5);
/// The pause after etcd refused what the consumer needs.
const PAUSE: Duration = Duration::from_secs(1);

/// The task, once it follows the queue.
pub(super) struct Task {
    means: Arc<Means>,
    inbox: UnboundedReceiver<Ask>,
    returned: UnboundedReceiver<Item>,
    items: View,
    books: View,
    shelf: Shelf,
    waiting: VecDeque<Waiting>,
    under_way: FuturesUnordered<BoxFuture<'static, Settled>>,
    /// Items taken for calls that were dropped, and when they go back into the queue.
    kept: VecDeque<(Item, Instant)>,
    /// How many candidates were tried in vain lately.
    reach: usize,
    /// Our claims, to be told when they are gone.
    claims: BTreeMap<Vec<u8>, Weak<Owned>>,
    /// The key that says that we wait.
    place: Place,
    waited: Instant,
    /// Nothing is heard until then.
    paused: Option<Instant>,
}

struct Waiting {
    ask: Ask,
    /// What was not known is known once the items' view has come to this revision.
    until: Option<i64>,
}

enum Place {
    None,
    /// Not before this.
    Later(Instant),
    Coming(BoxFuture<'static, Option<OwnedKey>>),
    Taken(OwnedKey),
}

/// What wakes the task.
enum Heard {
    Asked(Option<Ask>),
    Items(Result<Batch, Error>),
    Books(Result<Batch, Error>),
    Settled(Settled),
    Returned(Item),
    Placed(Option<OwnedKey>),
    Time,
    Closing,
}

impl Task {
    pub(super) fn new(
        means: Arc<Means>,
        inbox: UnboundedReceiver<Ask>,
        returned: UnboundedReceiver<Item>,
        first: Ask,
        (items, books): (View, View),
    ) -> Self {
        let (now, wall) = (Instant::now(), means.core.runtime.wall());
        let mut shelf = Shelf::new(means.keys.clone());
        let nothing = |_: &[u8]| None;
        for entry in books.entries() {
            let change = Change { before: None, after: Some(entry.clone()) };
            shelf.book(&change, now, wall, &nothing);
        }
        shelf.look_at_all(items.entries(), now);
        Self {
            means,
            inbox,
            returned,
            items,
            books,
            shelf,
            waiting: VecDeque::from([Waiting { ask: first, until: None }]),
            under_way: FuturesUnordered::new(),
            kept: VecDeque::new(),
            reach: 0,
            claims: BTreeMap::new(),
            place: Place::None,
            waited: now,
            paused: None,
        }
    }

    pub(super) async fn run(mut self) {
        loop {
            self.serve(Instant::now());
            match self.hear().await {
                Heard::Asked(Some(ask)) => self.waiting.push_back(Waiting { ask, until: None }),
                Heard::Asked(None) => return self.finish().await,
                Heard::Items(batch) => self.items_changed(batch),
                Heard::Books(batch) => self.books_changed(batch),
                Heard::Settled(settled) => self.settle(settled),
                Heard::Returned(item) => self.keep(item),
                Heard::Placed(key) => self.placed(key),
                Heard::Time => {}
                Heard::Closing => return,
            }
        }
    }

    async fn hear(&mut self) -> Heard {
        let now = Instant::now();
        let paused = self.paused.is_some_and(|until| until > now);
        let next = self.next_time();
        let timer = async move {
            match next {
                Some(next) => tokio::time::sleep_until(next).await,
                None => std::future::pending().await,
            }
        };
        let placed = async {
            match &mut self.place {
                Place::Coming(place) => place.await,
                _ => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = self.means.core.closing.cancelled() => Heard::Closing,
            batch = self.items.next(), if !paused => Heard::Items(batch),
            batch = self.books.next(), if !paused => Heard::Books(batch),
            Some(settled) = self.under_way.next() => Heard::Settled(settled),
            Some(item) = self.returned.recv() => Heard::Returned(item),
            ask = self.inbox.recv() => Heard::Asked(ask),
            key = placed => Heard::Placed(key),
            () = timer => Heard::Time,
        }
    }

    /// When to look again without any news.
    fn next_time(&self) -> Option<Instant> {
        let asked = self.waiting.iter().any(|waiting| !waiting.ask.is_urgent());
        let shelf = if asked { self.shelf.next() } else { None };
        let kept = self.kept.iter().map(|(_, until)| *until).min();
        let leave = match &self.place {
            Place::Taken(_) if !asked => Some(self.waited + LEAVE),
            Place::Later(when) if asked => Some(*when),
            _ => None,
        };
        [shelf, kept, leave, self.paused].into_iter().flatten().min()
    }

    // --- What is heard ---

    fn items_changed(&mut self, batch: Result<Batch, Error>) {
        let batch = match batch {
            Ok(batch) => batch,
            Err(error) => return self.refused(error),
        };
        let now = Instant::now();
        for change in &batch.changes {
            self.shelf.item(change, now, !batch.listed);
        }
        if batch.listed {
            self.shelf.look_at_all(self.items.entries(), now);
        }
    }

    fn books_changed(&mut self, batch: Result<Batch, Error>) {
        let batch = match batch {
            Ok(batch) => batch,
            Err(error) => return self.refused(error),
        };
        let (now, wall) = (Instant::now(), self.means.core.runtime.wall());
        let items = &self.items;
        for change in &batch.changes {
            self.shelf.book(change, now, wall, &|key| items.get(key).cloned());
            if let (Some(before), None) = (&change.before, &change.after)
                && let Some(claim) = self.claims.remove(&before.key)
                && let Some(claim) = claim.upgrade()
            {
                if claim.create_revision == before.create_revision {
                    claim.set_gone();
                } else {
                    self.claims.insert(before.key.clone(), Arc::downgrade(&claim));
                }
            }
        }
        if batch.listed {
            self.shelf.look_at_all(items.entries(), now);
        }
    }

    /// etcd refuses to tell us of the queue, until somebody does something.
    fn refused(&mut self, error: Error) {
        tracing::warn!(%error, "cannot follow the queue");
        self.paused = Some(Instant::now() + PAUSE);
        if let Some(Waiting { ask, .. }) = self.waiting.pop_front() {
            ask.fail(error);
        }
    }

    fn settle(&mut self, settled: Settled) {
        let now = Instant::now();
        let Settled { candidates, tried, ask, claimed, unknown } = settled;
        let items = &self.items;
        self.shelf.settle(&candidates, tried, now, &|key| items.get(key).cloned());
        match tried {
            Tried::Took(index) => self.reach = (self.reach * 3 / 4).max(index * 2),
            Tried::All if !candidates.is_empty() => self.reach = (self.reach * 2).clamp(4, MOST),
            _ => {}
        }
        if let Some(claim) = claimed.and_then(|claim| claim.upgrade()) {
            if self.books.revision() >= claim.create_revision && self.books.get(&claim.key).is_none() {
                claim.set_gone();
            } else {
                self.claims.insert(claim.key.clone(), Arc::downgrade(&claim));
            }
        }
        if let Some(ask) = ask {
            self.waiting.push_front(Waiting { ask, until: unknown });
        }
    }

    /// Keeps an item for the next call.
    fn keep(&mut self, item: Item) {
        let order = |item: &Item| (item.create_revision, item.key.clone());
        let at = self.kept.partition_point(|(other, _)| order(other) < order(&item));
        self.kept.insert(at, (item, Instant::now() + KEEP));
    }

    fn placed(&mut self, key: Option<OwnedKey>) {
        self.shelf.me = key.as_ref().map(|key| key.facts().key.clone());
        self.place = key.map_or_else(|| Place::Later(Instant::now() + PAUSE), Place::Taken);
    }

    // --- What is done ---

    /// Serves whoever can be served now.
    fn serve(&mut self, now: Instant) {
        if self.paused.is_some_and(|until| until <= now) {
            self.paused = None;
        }
        let items = &self.items;
        self.shelf.wake(now, &|key| items.get(key).cloned());
        for waiting in std::mem::take(&mut self.waiting) {
            if !waiting.ask.is_closed()
                && let Some(waiting) = self.serve_one(waiting, now)
            {
                self.waiting.push_back(waiting);
            }
        }
        if self.kept.iter().any(|(_, until)| *until <= now) {
            let (expired, kept): (Vec<_>, _) = self.kept.drain(..).partition(|(_, until)| *until <= now);
            self.kept = kept.into();
            expired.into_iter().for_each(|(item, _)| self.put_back(item));
        }
        self.be_known(now);
    }

    /// Starts what serves this; gives it back if there is nothing for it now.
    fn serve_one(&mut self, waiting: Waiting, now: Instant) -> Option<Waiting> {
        let Waiting { ask, until } = waiting;
        let most = (self.reach + 1).min(MOST);
        let means = self.means.clone();
        match ask {
            Ask::Take { wait, reply } => {
                if let Some((item, _)) = self.kept.pop_front() {
                    let _ = reply.send(Ok(Some(Parcel::new(item, means.returns.clone()))));
                    return None;
                }
                let candidates = self.shelf.pick(now, most, !wait);
                if candidates.is_empty() {
                    return self.nothing_for(Ask::Take { wait, reply }, until);
                }
                self.under_way.push(Box::pin(means.take(wait, reply, candidates)));
            }
            Ask::Claim { reply } => loop {
                let candidates = self.shelf.pick(now, most, false);
                if candidates.is_empty() {
                    return Some(Waiting { ask: Ask::Claim { reply }, until });
                }
                let (exhausted, candidates): (Vec<_>, Vec<_>) =
                    candidates.into_iter().partition(|candidate| means.is_exhausted(candidate));
                for candidate in exhausted {
                    self.under_way.push(Box::pin(means.clone().bury(candidate)));
                }
                if !candidates.is_empty() {
                    self.under_way.push(Box::pin(means.claim(reply, candidates)));
                    break;
                }
            },
            Ask::Peek { reply } => match self.shelf.first() {
                Some(entry) => {
                    let key = entry.key.clone();
                    self.under_way.push(Box::pin(means.peek(reply, key)));
                }
                None => return self.nothing_for(Ask::Peek { reply }, until),
            },
        }
        None
    }

    /// The views show nothing to be had. Whoever wants to know now is told so once etcd confirms it.
    fn nothing_for(&mut self, ask: Ask, until: Option<i64>) -> Option<Waiting> {
        if !ask.is_urgent() {
            return Some(Waiting { ask, until });
        }
        match until {
            None => {
                let revision = self.items.revision();
                self.under_way.push(Box::pin(self.means.clone().look_for_more(ask, revision)));
                None
            }
            Some(unknown) if self.items.revision() >= unknown => {
                ask.nothing();
                None
            }
            Some(_) => Some(Waiting { ask, until }),
        }
    }

    /// Lets the other consumers know whether this one waits.
    fn be_known(&mut self, now: Instant) {
        let waits = self.waiting.iter().any(|waiting| !waiting.ask.is_urgent());
        if waits {
            self.waited = now;
        }
        match &self.place {
            Place::Taken(key) if !key.facts().is_held() || (!waits && now >= self.waited + LEAVE) => {
                self.shelf.me = None;
                self.place = Place::None;
            }
            Place::Later(when) if *when <= now => self.place = Place::None,
            _ => {}
        }
        if waits && matches!(self.place, Place::None) {
            self.place = Place::Coming(Box::pin(enlist(self.means.clone())));
        }
    }

    fn put_back(&mut self, item: Item) {
        let means = self.means.clone();
        self.means.core.runtime.spawn(means.put_back(item));
    }

    /// Nobody will ask any more: what is under way comes to its end, and nothing is kept.
    async fn finish(mut self) {
        let core = self.means.core.clone();
        self.waiting.clear();
        loop {
            tokio::select! {
                biased;
                () = core.closing.cancelled() => return,
                settled = self.under_way.next() => if settled.is_none() { break },
            }
        }
        while let Ok(item) = self.returned.try_recv() {
            self.keep(item);
        }
        for (item, _) in std::mem::take(&mut self.kept) {
            self.put_back(item);
        }
    }
}

/// Says that this consumer waits.
async fn enlist(means: Arc<Means>) -> Option<OwnedKey> {
    let generation = means.core.generation().await.ok()?;
    let nonce = generation.nonces.take(0);
    let key = means.keys.consumer(generation.lease.get(), nonce.number);
    let creation = Creation { key, nonce, value: Vec::new(), only_if: None, reads: Vec::new() };
    match creation.run(&means.core, &generation).await {
        Ok(created) => created.map(|created| created.key),
        Err(error) => {
            tracing::debug!(%error, "other consumers do not know of this one");
            None
        }
    }
}
