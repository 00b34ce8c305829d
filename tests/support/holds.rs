//! What decides every test of loss: when etcd deleted a key, and until when its holder believed in it. Also which
//! states the session went through meanwhile.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use etcd_client::{EventType, WatchOptions};
use etcd_recipes::{Session, SessionState};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::check::eventually;
use super::clock::boottime;
use super::server::PATIENCE;

/// A deletion, as a plain client heard of it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Deletion {
    /// When it was heard of, by [`boottime`].
    pub(crate) at: Duration,
    /// The revision of etcd that did it.
    pub(crate) revision: i64,
}

/// Notes every deletion below a prefix.
#[derive(Debug)]
pub(crate) struct Deletions {
    seen: watch::Receiver<HashMap<Vec<u8>, Deletion>>,
    task: JoinHandle<()>,
}

impl Deletions {
    /// Watches through a client of its own, so connect it straight to a server that stays well.
    pub(crate) async fn below(endpoint: &str, prefix: &str) -> Self {
        let mut client = super::client([endpoint]).await;
        let options = WatchOptions::new().with_prefix();
        let mut stream = client.watch(prefix, Some(options)).await.expect("cannot watch");
        let (noted, seen) = watch::channel(HashMap::new());
        let created = stream.message().await.expect("cannot watch").expect("cannot watch");
        assert!(created.created());
        let task = super::background().spawn(async move {
            while let Ok(Some(message)) = stream.message().await {
                let at = boottime();
                for event in message.events() {
                    if let (EventType::Delete, Some(kv)) = (event.event_type(), event.kv()) {
                        let deletion = Deletion { at, revision: kv.mod_revision() };
                        noted.send_modify(|all| {
                            all.entry(kv.key().to_vec()).or_insert(deletion);
                        });
                    }
                }
            }
        });
        Self { seen, task }
    }

    /// The first deletion of a key; waits for it.
    pub(crate) async fn of(&self, key: &[u8]) -> Deletion {
        let mut seen = self.seen.clone();
        let wait = tokio::time::timeout(PATIENCE, seen.wait_for(|all| all.contains_key(key)));
        let all = wait.await.expect("the key is not deleted").expect("the watch has ended");
        all[key]
    }

    /// Whether a key was deleted so far.
    pub(crate) fn has(&self, key: &[u8]) -> bool {
        self.seen.borrow().contains_key(key)
    }
}

impl Drop for Deletions {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What a holder believes, asked again and again in a thread of its own.
#[derive(Debug)]
pub(crate) struct Belief {
    shared: Arc<Shared>,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    answers: Mutex<Answers>,
    lost: watch::Sender<bool>,
}

/// The answers so far.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Answers {
    /// When the last question was asked that was answered with yes.
    pub(crate) last_yes: Duration,
    /// When the first no was there.
    pub(crate) first_no: Option<Duration>,
    /// A yes followed a no.
    pub(crate) revived: bool,
}

impl Answers {
    /// Asks once more.
    pub(crate) fn ask(&mut self, held: impl Fn() -> bool) {
        let asked = boottime();
        if held() {
            self.last_yes = asked;
            self.revived |= self.first_no.is_some();
        } else {
            self.first_no.get_or_insert_with(boottime);
        }
    }
}

impl Belief {
    /// Asks from now on.
    pub(crate) fn of(held: impl Fn() -> bool + Send + 'static) -> Self {
        let shared = Arc::new(Shared { answers: Mutex::default(), lost: watch::Sender::new(false) });
        let stop = Arc::new(AtomicBool::new(false));
        let (asked, stopped) = (shared.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let mut answers = asked.answers.lock().unwrap();
                answers.ask(&held);
                if answers.first_no.is_some() {
                    asked.lost.send_replace(true);
                }
                drop(answers);
                std::thread::sleep(Duration::from_micros(500));
            }
        });
        Self { shared, stop, thread: Some(thread) }
    }

    /// The answers so far.
    pub(crate) fn answers(&self) -> Answers {
        *self.shared.answers.lock().unwrap()
    }

    /// Waits for the first no; tells when it was.
    pub(crate) async fn end(&self) -> Duration {
        let mut lost = self.shared.lost.subscribe();
        let wait = tokio::time::timeout(PATIENCE, lost.wait_for(|lost| *lost));
        wait.await.expect("the holder believes on").expect("nobody asks any more");
        self.answers().first_no.expect("a no")
    }

    /// Panics unless the belief ended before the deletion, for ever. How much earlier it was.
    pub(crate) fn ended_before(&self, deletion: Deletion) -> Duration {
        let answers = self.answers();
        let Answers { last_yes, first_no, revived } = answers;
        assert!(last_yes < deletion.at, "believed {:?} after the deletion", last_yes - deletion.at);
        assert!(!revived, "a hold that was lost came back");
        deletion.at.saturating_sub(first_no.expect("still believed"))
    }
}

impl Drop for Belief {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // What it asks, such as a guard, is dropped when this returns.
        let ended = self.thread.take().map(std::thread::JoinHandle::join);
        assert!(std::thread::panicking() || matches!(ended, Some(Ok(()))), "the asking thread panicked");
    }
}

/// Every state of a session, in order, with the time it was seen.
#[derive(Debug)]
pub(crate) struct States {
    seen: Arc<Mutex<Vec<(Duration, SessionState)>>>,
    task: JoinHandle<()>,
}

impl States {
    /// Notes the states from now on, on the tools' runtime.
    pub(crate) fn of(session: &Session) -> Self {
        let mut states = session.watch_state();
        let first = *states.borrow_and_update();
        let seen = Arc::new(Mutex::new(vec![(boottime(), first)]));
        let noted = seen.clone();
        let task = super::background().spawn(async move {
            while states.changed().await.is_ok() {
                let state = *states.borrow_and_update();
                noted.lock().unwrap().push((boottime(), state));
            }
        });
        Self { seen, task }
    }

    /// The states so far.
    pub(crate) fn seen(&self) -> Vec<SessionState> {
        self.seen.lock().unwrap().iter().map(|(_, state)| *state).collect()
    }

    /// When a state was first seen.
    pub(crate) fn at(&self, state: SessionState) -> Option<Duration> {
        self.seen.lock().unwrap().iter().find(|(_, seen)| *seen == state).map(|(at, _)| *at)
    }

    /// Panics if the session lost a lease.
    pub(crate) fn never_lost(&self) {
        let seen = self.seen();
        let fine = |state: &SessionState| {
            matches!(
                state,
                SessionState::Connected { generation: 1 } | SessionState::Suspended { generation: 1 }
            )
        };
        assert!(seen.iter().all(fine), "the session lost its lease: {seen:?}");
    }

    /// Panics unless the session was suspended before it lost its first lease. A hold may be over a moment before the
    /// state says so.
    pub(crate) async fn suspended_before_lost(&self) {
        let lost = SessionState::Lost { generation: 1 };
        eventually(PATIENCE, "the lease is said to be lost", async || self.at(lost).is_some()).await;
        let suspended = self.at(SessionState::Suspended { generation: 1 });
        assert!(suspended.is_some() && suspended < self.at(lost), "{:?}", self.seen());
    }
}

impl Drop for States {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Waits until a session is in a state.
pub(crate) async fn reaches(session: &Session, state: SessionState) {
    let mut states = session.watch_state();
    let reached = tokio::time::timeout(PATIENCE, states.wait_for(|now| *now == state)).await;
    let last = *session.watch_state().borrow();
    reached.unwrap_or_else(|_| panic!("{last:?}, never {state:?}")).expect("the session's task is gone");
}

/// Waits until a session that lost its first lease has another.
pub(crate) async fn returns(session: &Session) {
    let mut states = session.watch_state();
    let later = |now: &SessionState| matches!(now, SessionState::Connected { generation: 2.. });
    let returned = tokio::time::timeout(PATIENCE, states.wait_for(later)).await;
    let last = *session.watch_state().borrow();
    returned
        .unwrap_or_else(|_| panic!("{last:?}, never connected again"))
        .expect("the session's task is gone");
}
