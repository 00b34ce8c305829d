//! The task that looks after all kept keys of a session.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use etcd_client::GetOptions;
use futures::future::{AbortHandle, Abortable, Aborted, BoxFuture};
use futures::stream::{FuturesUnordered, StreamExt};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};
use tokio::time::Instant;

use super::key::{Key, Next};
use super::{Command, Core};
use crate::name::Prefix;
use crate::session::batch::{self, Op, Outcome, What};
use crate::session::generation::Generation;
use crate::session::rpc::{KeyFacts, revision};
use crate::session::watch::{Changed, Event, News, Range, Subscription};

/// How many batches may be under way.
const FLIGHTS: usize = 4;
/// How long writing may go on before the watch of a prefix is opened all the same.
const RUSH: Duration = Duration::from_millis(100);
/// How long a watch that etcd denies is left alone.
const DENIED: Duration = Duration::from_secs(5);

/// All kept keys of a session.
pub(super) struct Task {
    core: Arc<Core>,
    inbox: UnboundedReceiver<Command>,
    commands: UnboundedSender<Command>,
    keys: BTreeMap<Arc<[u8]>, Key>,
    prefixes: BTreeMap<Arc<Prefix>, Watched>,
    /// Some prefix wants a watch.
    wanting: bool,
    /// Keys that may have something to write. Empty while there is no generation.
    ready: VecDeque<Arc<[u8]>>,
    generation: Option<Arc<Generation>>,
    flights: FuturesUnordered<BoxFuture<'static, Flight>>,
    heard: FuturesUnordered<Abortable<BoxFuture<'static, Heard>>>,
    retries: FuturesUnordered<BoxFuture<'static, Arc<[u8]>>>,
}

/// A batch that was answered.
struct Flight {
    lease: i64,
    ops: Arc<[Op]>,
    outcomes: Vec<Outcome>,
}

/// What the watch of a prefix told.
struct Heard {
    prefix: Arc<Prefix>,
    watch: Subscription,
    what: Told,
}

enum Told {
    Events(Arc<[Event]>),
    /// Changes may have been missed: this is there now.
    List(Vec<KeyFacts>, i64),
}

/// A prefix with kept keys.
#[derive(Default)]
struct Watched {
    keys: usize,
    /// Changes from this revision on are told.
    watch: Option<(i64, AbortHandle)>,
    /// A put of this revision asks for a watch from there on, since then.
    wanted: Option<(i64, Instant)>,
}

impl Drop for Watched {
    fn drop(&mut self) {
        if let Some((_, watch)) = &self.watch {
            watch.abort();
        }
    }
}

impl Task {
    pub(super) fn new(core: Arc<Core>, inbox: UnboundedReceiver<Command>) -> Self {
        let commands = core.kept().commands.clone();
        Self {
            core,
            inbox,
            commands,
            keys: BTreeMap::new(),
            prefixes: BTreeMap::new(),
            wanting: false,
            ready: VecDeque::new(),
            generation: None,
            flights: FuturesUnordered::new(),
            heard: FuturesUnordered::new(),
            retries: FuturesUnordered::new(),
        }
    }

    pub(super) async fn run(mut self) {
        let closing = self.core.closing.clone();
        let mut state = self.core.state.clone();
        state.mark_changed();
        loop {
            tokio::select! {
                biased;
                () = closing.cancelled() => return,
                // Whatever changes the generation tells a new state after it.
                changed = state.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let generation = self.core.current.living();
                    if generation.as_ref().map(|new| new.number) != self.generation.as_ref().map(|old| old.number) {
                        self.enter(generation);
                    }
                }
                Some(flight) = self.flights.next() => self.land(flight),
                Some(heard) = self.heard.next() => {
                    if let Ok::<_, Aborted>(heard) = heard {
                        self.hear(heard);
                    }
                }
                Some(name) = self.retries.next() => {
                    if let Some(key) = self.keys.get_mut(&name) {
                        key.waits = false;
                    }
                    self.ready.push_back(name);
                }
                command = self.inbox.recv() => {
                    let Some(command) = command else { return };
                    self.obey(command);
                    while let Ok(command) = self.inbox.try_recv() {
                        self.obey(command);
                    }
                }
            }
            self.write();
            self.watch();
        }
    }

    fn lease(&self) -> i64 {
        self.generation.as_ref().map_or(0, |generation| generation.lease.get())
    }

    fn obey(&mut self, command: Command) {
        let key = match command {
            Command::Keep { prefix, key, value, answer } => {
                match self.keys.get_mut(&key) {
                    Some(kept) => kept.replace(value, answer),
                    None => {
                        let prefix = self.share(prefix);
                        self.keys.insert(key.clone(), Key::new(prefix, key.clone(), value, answer));
                    }
                }
                key
            }
            Command::Update { key, owner, value, settle } => {
                match self.keys.get_mut(&key).filter(|kept| kept.is_owner(&owner)) {
                    Some(kept) => kept.update(value, settle),
                    None => settle(Err(super::over(&key, &owner))),
                }
                key
            }
            Command::Remove { key, owner, answer } => {
                let lease = self.lease();
                match self.keys.get_mut(&key).filter(|kept| kept.is_owner(&owner)) {
                    Some(kept) => {
                        if kept.leave(answer, lease) == Next::Forget {
                            self.forget(&key);
                        }
                    }
                    None => {
                        // Removed already is fine.
                        let error = Some(super::over(&key, &owner)).filter(|error| !error.is_lost());
                        let _ = answer.map(|answer| answer.send(error.map_or(Ok(()), Err)));
                    }
                }
                key
            }
        };
        self.ready.push_back(key);
    }

    /// One copy of each prefix in use.
    fn share(&mut self, prefix: Prefix) -> Arc<Prefix> {
        let shared = self.prefixes.get_key_value(&prefix).map(|(shared, _)| shared.clone());
        let shared = shared.unwrap_or_else(|| Arc::new(prefix));
        self.prefixes.entry(shared.clone()).or_default().keys += 1;
        shared
    }

    fn forget(&mut self, key: &[u8]) {
        let Some(kept) = self.keys.remove(key) else { return };
        if let Some(watched) = self.prefixes.get_mut(&kept.prefix) {
            watched.keys -= 1;
            if watched.keys == 0 {
                self.prefixes.remove(&kept.prefix);
            }
        }
        if self.keys.is_empty() {
            // What ten thousand keys needed, one does not.
            self.keys = BTreeMap::new();
        }
    }

    /// The lease is another one, or none.
    fn enter(&mut self, generation: Option<Arc<Generation>>) {
        let before = self.lease();
        self.generation = generation;
        if self.lease() != before && before != 0 {
            let lost = self.keys.iter_mut().map(|(name, key)| (name, key.lose()));
            let lost = lost.filter(|(_, next)| *next == Next::Forget);
            let lost: Vec<_> = lost.map(|(name, _)| name.clone()).collect();
            lost.iter().for_each(|name| self.forget(name));
        }
        self.ready = self.keys.keys().cloned().collect();
    }

    /// Sends what there is to write: at once if nothing is under way, else in full batches.
    fn write(&mut self) {
        let Some(generation) = self.generation.clone().filter(|generation| generation.is_alive()) else {
            self.ready.clear();
            return;
        };
        while !self.ready.is_empty()
            && (self.flights.is_empty() || self.flights.len() < FLIGHTS && self.ready.len() >= batch::MOST)
        {
            let (mut puts, mut deletes, mut size) = (Vec::new(), Vec::new(), 0);
            while puts.len() < batch::MOST && deletes.len() < batch::MOST && size < batch::FULL {
                let Some(name) = self.ready.pop_front() else { break };
                let Some(key) = self.keys.get_mut(&name) else { continue };
                if key.is_void() {
                    self.forget(&name);
                    continue;
                }
                let Some(op) = key.op(generation.lease.get()) else { continue };
                if !puts.is_empty() && size + op.size() > batch::FULL {
                    key.put_off();
                    self.ready.push_front(name);
                    break;
                }
                size += op.size();
                let list = if matches!(op.what, What::Delete { .. }) { &mut deletes } else { &mut puts };
                list.push(op);
            }
            for ops in [puts, deletes] {
                if !ops.is_empty() {
                    self.send(&generation, ops.into());
                }
            }
        }
    }

    fn send(&mut self, generation: &Arc<Generation>, ops: Arc<[Op]>) {
        let (core, generation) = (self.core.clone(), generation.clone());
        self.flights.push(Box::pin(async move {
            let outcomes = batch::write(&core, &generation, ops.clone()).await;
            Flight { lease: generation.lease.get(), ops, outcomes }
        }));
    }

    fn land(&mut self, flight: Flight) {
        // An answer that is too short says nothing of the rest.
        let outcomes = flight.outcomes.into_iter().chain(std::iter::repeat_with(|| Outcome::Ended));
        for (op, outcome) in flight.ops.iter().zip(outcomes) {
            let Some(key) = self.keys.get_mut(&op.key) else { continue };
            if let (Outcome::Done(revision), Some(watched)) = (&outcome, self.prefixes.get_mut(&key.prefix)) {
                watched.cover(*revision);
                self.wanting |= watched.wanted.is_some();
            }
            let next = key.settle(outcome, flight.lease, &self.commands);
            self.follow(op.key.clone(), next);
        }
    }

    fn follow(&mut self, name: Arc<[u8]>, next: Next) {
        match next {
            Next::Go => self.ready.push_back(name),
            Next::Forget => self.forget(&name),
            Next::Retry => {
                let Some(key) = self.keys.get_mut(&name) else { return };
                if std::mem::replace(&mut key.waits, true) {
                    return;
                }
                let backoff = key.refused.as_mut();
                let pause = backoff.map(|backoff| backoff.pause(&self.core.runtime)).unwrap_or_default();
                self.retries.push(Box::pin(async move {
                    tokio::time::sleep(pause).await;
                    name
                }));
            }
        }
    }

    /// Opens the watches that are wanted, once there is time.
    fn watch(&mut self) {
        let idle = self.flights.is_empty() && self.ready.is_empty();
        if !std::mem::take(&mut self.wanting) {
            return;
        }
        for (prefix, watched) in &mut self.prefixes {
            let Some((from, since)) = watched.wanted else { continue };
            if !idle && since.elapsed() < RUSH {
                self.wanting = true;
                continue;
            }
            watched.wanted = None;
            let watch = self.core.changes.watch_from(&Range::prefix(prefix), from + 1);
            let next = listen(self.core.clone(), prefix.clone(), watch);
            watched.open(from + 1, next, &self.heard);
        }
    }

    fn hear(&mut self, heard: Heard) {
        let lease = self.lease();
        match &heard.what {
            Told::Events(events) => {
                for event in events.iter() {
                    let Some(key) = self.keys.get_mut(event.key()) else { continue };
                    let put = match &event.change {
                        Changed::Put(entry) => Some(entry.lease),
                        Changed::Deleted(_) => None,
                    };
                    if let next @ (Next::Forget | Next::Retry) = key.hear(event.revision, put, lease) {
                        self.follow(event.key().into(), next);
                    } else if put.is_none() {
                        self.ready.push_back(event.key().into());
                    }
                }
            }
            Told::List(found, at) => {
                let found: BTreeMap<&[u8], &KeyFacts> =
                    found.iter().map(|facts| (&*facts.key, facts)).collect();
                let ours = self.keys.iter_mut().filter(|(_, key)| key.prefix == heard.prefix);
                let next = ours
                    .map(|(name, key)| (name.clone(), key.compare(found.get(&**name).copied(), *at, lease)));
                for (name, next) in next.collect::<Vec<_>>() {
                    self.follow(name, next);
                }
            }
        }
        if let Some(watched) = self.prefixes.get_mut(&heard.prefix) {
            let from = watched.watch.as_ref().map_or(0, |(from, _)| *from);
            let from = if let Told::List(_, at) = heard.what { at + 1 } else { from };
            watched.open(from, listen(self.core.clone(), heard.prefix, heard.watch), &self.heard);
        }
    }
}

impl Watched {
    /// A put of ours, of this revision, has to be watched.
    fn cover(&mut self, revision: i64) {
        if self.watch.as_ref().is_some_and(|(from, _)| *from <= revision + 1) {
            return;
        }
        let (wanted, since) = self.wanted.unwrap_or((revision, Instant::now()));
        self.wanted = Some((wanted.min(revision), since));
    }

    fn open(
        &mut self,
        from: i64,
        next: BoxFuture<'static, Heard>,
        all: &FuturesUnordered<Abortable<BoxFuture<'static, Heard>>>,
    ) {
        let (abort, registration) = AbortHandle::new_pair();
        if let Some((_, before)) = self.watch.replace((from, abort)) {
            before.abort();
        }
        all.push(Abortable::new(next, registration));
    }
}

/// Waits for the next that a watch tells.
fn listen(core: Arc<Core>, prefix: Arc<Prefix>, mut watch: Subscription) -> BoxFuture<'static, Heard> {
    Box::pin(async move {
        match watch.next().await {
            Ok(News::Events(events)) => return Heard { prefix, watch, what: Told::Events(events) },
            Ok(News::Gap) => {}
            Err(error) => {
                tracing::warn!(?prefix, %error, "cannot watch kept keys");
                tokio::time::sleep(DENIED).await;
            }
        }
        loop {
            let options = GetOptions::new().with_range(prefix.end()).with_keys_only();
            match core.rpc.get(prefix.as_bytes(), options, None).await {
                Ok(list) => {
                    let at = revision(list.header());
                    let watch = core.changes.watch_from(&Range::prefix(&prefix), at + 1);
                    let found = list.kvs().iter().map(KeyFacts::from).collect();
                    return Heard { prefix, watch, what: Told::List(found, at) };
                }
                Err(_) => tokio::time::sleep(DENIED).await,
            }
        }
    })
}
