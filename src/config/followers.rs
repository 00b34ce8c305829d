//! Those who follow the cache: streams, channels and handlers.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use tokio::sync::watch as channel;

use super::changes::{ConfigChange, ConfigChanges, Pattern, Queue};
use super::state::{ConfigEntry, State};
use super::typed::BadValue;
use crate::name;

/// What a handler may fail with.
pub(super) type BoxError = Box<dyn std::error::Error + Send + Sync>;

type Call = Box<dyn FnMut(&ConfigChange) -> Result<(), BoxError> + Send>;
type CallOnProblem = Box<dyn FnMut(&ConfigProblem) + Send>;

/// Something that went wrong inside the cache; see [`ConfigCache::on_problem`](super::ConfigCache::on_problem).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConfigProblem {
    /// A new value does not decode as the type its key is read as.
    BadValue(BadValue),
    /// A handler failed or panicked. It is called again for the next change.
    Handler {
        /// The key that had changed, without the prefix of the cache.
        key: Vec<u8>,
        /// What the handler said.
        reason: String,
    },
    /// etcd refuses to tell of the prefix. What is known stays, stale, and it is tried again.
    Refused {
        /// What etcd said.
        reason: String,
    },
}

/// A handler that is being called. Dropping it ends that; a call that is under way goes on.
#[must_use = "a handler that is not kept is not called"]
#[derive(Debug)]
pub struct ConfigHandler {
    _alive: Arc<()>,
}

/// Everybody who follows one cache. Its lock is never held while a handler runs, nor by readers of the cache.
#[derive(Default)]
pub(super) struct Followers {
    list: Mutex<List>,
}

#[derive(Default)]
struct List {
    number: u64,
    ended: bool,
    streams: Vec<(Pattern, Weak<Queue>)>,
    channels: Vec<(Pattern, Arc<dyn Channel>)>,
    /// All changes, for the task that calls the handlers.
    handlers: Option<Arc<Queue>>,
    /// Handlers that the task has not taken over yet.
    new: Vec<Handler>,
    on_problem: Vec<(Weak<()>, Arc<Mutex<CallOnProblem>>)>,
    /// Problems that nobody has been told of yet.
    problems: VecDeque<ConfigProblem>,
    /// Somebody is telling them.
    telling: bool,
}

pub(super) struct Handler {
    pattern: Pattern,
    alive: Weak<()>,
    /// It is told what was there before this, and then what came after.
    since: u64,
    state: Option<Arc<State>>,
    call: Call,
}

/// The sending side of a channel that shows one key.
trait Channel: Send + Sync {
    /// Shows what is there now.
    fn send(&self);
    fn is_closed(&self) -> bool;
}

struct Sender<T, F> {
    channel: channel::Sender<T>,
    /// Held until it is shown, so that nobody shows an older one after it.
    value: Mutex<F>,
}

impl<T: Send + Sync, F: Fn() -> Option<T> + Send> Channel for Sender<T, F> {
    fn send(&self) {
        let value = self.value.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(value) = value() {
            self.channel.send_replace(value);
        }
    }

    fn is_closed(&self) -> bool {
        self.channel.is_closed()
    }
}

impl Followers {
    fn list(&self) -> MutexGuard<'_, List> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Publishes a new state with `publish` and tells everybody, in one step as seen by those who join.
    pub(super) fn tell(&self, mut changes: Vec<ConfigChange>, publish: impl FnOnce(&[ConfigChange])) {
        let mut list = self.list();
        publish(&changes);
        list.number += 1;
        for change in &mut changes {
            change.number = list.number;
        }
        list.streams.retain(|(pattern, queue)| {
            let Some(queue) = queue.upgrade() else { return false };
            queue.push(changes.iter().filter(|change| pattern.matches(change.key())).cloned());
            true
        });
        list.channels.retain(|(_, channel)| !channel.is_closed());
        let changed = |pattern: &Pattern| changes.iter().any(|change| pattern.matches(change.key()));
        let channels = list.channels.iter().filter(|(pattern, _)| changed(pattern));
        let channels: Vec<_> = channels.map(|(_, channel)| channel.clone()).collect();
        if let Some(queue) = &list.handlers {
            queue.push(changes);
        }
        drop(list);
        channels.iter().for_each(|channel| channel.send());
    }

    /// A stream of what is there now, and then of every change.
    pub(super) fn stream(&self, pattern: Pattern, state: impl FnOnce() -> Arc<State>) -> ConfigChanges {
        let mut list = self.list();
        let queue = Arc::new(Queue::new());
        queue.push(initial(&state(), &pattern, list.number));
        if list.ended {
            queue.end();
        }
        list.streams.push((pattern, Arc::downgrade(&queue)));
        ConfigChanges { queue }
    }

    /// A channel that shows the `value` of a key now; `None` keeps what it shows.
    pub(super) fn channel<T: Default + Send + Sync + 'static>(
        &self,
        key: &[u8],
        value: impl Fn() -> Option<T> + Send + 'static,
    ) -> channel::Receiver<T> {
        let (channel, mut receiver) = channel::channel(T::default());
        let sender = Arc::new(Sender { channel, value: Mutex::new(value) });
        let mut list = self.list();
        if !list.ended {
            list.channels.push((Pattern::Key(key.into()), sender.clone()));
        }
        drop(list);
        sender.send();
        receiver.mark_unchanged();
        receiver
    }

    /// Adds a handler. The second result is the queue of the task that is to call handlers, if it must be started.
    pub(super) fn handler(
        &self,
        pattern: Pattern,
        state: impl FnOnce() -> Arc<State>,
        call: Call,
    ) -> (ConfigHandler, Option<Arc<Queue>>) {
        let mut list = self.list();
        let alive = Arc::new(());
        let since = list.number;
        let state = Some(state());
        list.new.push(Handler { pattern, alive: Arc::downgrade(&alive), since, state, call });
        let handler = ConfigHandler { _alive: alive };
        match &list.handlers {
            Some(queue) => {
                queue.nudge();
                (handler, None)
            }
            None => {
                let queue = list.handlers.insert(Arc::new(Queue::new())).clone();
                queue.nudge();
                if list.ended {
                    queue.end();
                }
                (handler, Some(queue))
            }
        }
    }

    pub(super) fn on_problem(&self, call: CallOnProblem) -> ConfigHandler {
        let alive = Arc::new(());
        self.list().on_problem.push((Arc::downgrade(&alive), Arc::new(Mutex::new(call))));
        ConfigHandler { _alive: alive }
    }

    /// Tells those who want to know that something went wrong. What goes wrong while they are told is told after that.
    pub(super) fn report(&self, problem: ConfigProblem) {
        log(&problem);
        let mut list = self.list();
        list.problems.push_back(problem);
        if std::mem::replace(&mut list.telling, true) {
            return;
        }
        while let Some(problem) = list.problems.pop_front() {
            let handlers = std::mem::take(&mut list.on_problem).into_iter();
            let (alive, over): (Vec<_>, Vec<_>) = handlers.partition(|(alive, _)| alive.strong_count() > 0);
            list.on_problem.clone_from(&alive);
            drop(list);
            drop(over);
            for (_, call) in alive {
                let mut call = call.lock().unwrap_or_else(PoisonError::into_inner);
                let _ = catch_unwind(AssertUnwindSafe(|| call(&problem)));
            }
            list = self.list();
        }
        list.telling = false;
    }

    /// Nothing will change any more.
    pub(super) fn end(&self) {
        let mut list = self.list();
        list.ended = true;
        list.streams.iter().filter_map(|(_, queue)| queue.upgrade()).for_each(|queue| queue.end());
        list.channels.clear();
        list.handlers.iter().for_each(|queue| queue.end());
        list.new.clear();
    }

    /// Takes over the handlers that are new.
    pub(super) fn take_new(&self) -> Vec<Handler> {
        std::mem::take(&mut self.list().new)
    }

    /// Calls handlers, one after the other, for each change of theirs; new ones for what is there first.
    pub(super) fn call_all(&self, handlers: &mut Vec<Handler>, changes: &[ConfigChange]) {
        handlers.retain(|handler| handler.alive.strong_count() > 0);
        for handler in &mut *handlers {
            if let Some(state) = handler.state.take() {
                for change in initial(&state, &handler.pattern, handler.since) {
                    self.call(handler, &change);
                }
            }
        }
        for change in changes {
            for handler in &mut *handlers {
                if change.number > handler.since && handler.pattern.matches(change.key()) {
                    self.call(handler, change);
                }
            }
        }
    }

    fn call(&self, handler: &mut Handler, change: &ConfigChange) {
        if handler.alive.strong_count() == 0 {
            return;
        }
        let called = catch_unwind(AssertUnwindSafe(|| (handler.call)(change)));
        let reason = match called {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error.to_string(),
            Err(panic) => format!("it panicked: {}", panic_message(&*panic)),
        };
        self.report(ConfigProblem::Handler { key: change.key().to_vec(), reason });
    }
}

/// What is there now, as changes.
fn initial(state: &State, pattern: &Pattern, number: u64) -> Vec<ConfigChange> {
    let revision = state.revision;
    let change =
        |entry: &ConfigEntry| ConfigChange { revision, before: None, after: Some(entry.clone()), number };
    match pattern {
        Pattern::Key(key) => state.entries.get(key).map(change).into_iter().collect(),
        Pattern::Prefix(_) => {
            let mut entries: Vec<_> =
                state.entries.iter().filter(|entry| pattern.matches(entry.key())).collect();
            entries.sort_unstable_by_key(|entry| (entry.revision(), entry.key()));
            entries.into_iter().map(change).collect()
        }
    }
}

/// Neither values nor what a handler said of them get into the log.
fn log(problem: &ConfigProblem) {
    match problem {
        ConfigProblem::BadValue(BadValue { key, revision, reason, replaced }) => {
            tracing::warn!(key = %name::display(key), revision, reason, replaced, "bad config value");
        }
        ConfigProblem::Handler { key, .. } => {
            tracing::warn!(key = %name::display(key), "config handler failed");
        }
        ConfigProblem::Refused { reason } => tracing::warn!(reason, "config cache refused by etcd"),
    }
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("without a message")
}

impl std::fmt::Debug for Followers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Followers").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::view::Entry;

    /// The change still waits for the handlers when another begins, with the state that has it already.
    #[test]
    fn a_new_handler_is_not_told_twice() {
        let entry =
            Entry { key: b"key".to_vec(), value: Vec::new(), create_revision: 1, mod_revision: 1, lease: 0 };
        let after = Some(ConfigEntry::new(Arc::new(entry), 0));
        let change = ConfigChange { revision: 1, before: None, after, number: 0 };
        let mut state = State::default();
        state.apply(&change);
        let (followers, state, calls) =
            (Followers::default(), Arc::new(state), Arc::new(Mutex::new(Vec::new())));
        let handler = |name: &'static str, state: Arc<State>| {
            let calls = calls.clone();
            let call = move |_: &ConfigChange| {
                calls.lock().unwrap_or_else(PoisonError::into_inner).push(name);
                Ok(())
            };
            followers.handler(Pattern::Prefix(Box::default()), move || state, Box::new(call)).0
        };
        let _first = handler("first", Arc::default());
        followers.tell(vec![change.clone()], |_| ());
        let _second = handler("second", state.clone());
        followers.call_all(&mut followers.take_new(), &[ConfigChange { number: 1, ..change }]);
        assert_eq!(*calls.lock().unwrap_or_else(PoisonError::into_inner), ["second", "first"]);
    }
}
