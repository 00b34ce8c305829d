//! The first place of a line: held, watched, and given up.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::Duration;

use etcd_client::{Compare, GetOptions, KeyValue, Txn, TxnOp, TxnResponse};
use tokio::task::AbortHandle;

use super::{FRONT, Line, Membership, Position};
use crate::error::Result;
use crate::session::owned_key::{Deleted, Owned, OwnedKey};
use crate::session::rpc::RangeAnswer;
use crate::session::runtime::Runtime;
use crate::session::watch::{Event, News, Range, Subscription};
use crate::session::{Core, Session};

/// A hold younger than this is not watched: most are released earlier.
const UNWATCHED: Duration = Duration::from_millis(20);

/// The first place in a line: an acquired lock, or a leadership. Given up in the background when dropped.
pub(crate) struct Place {
    session: Session,
    token: i64,
    facts: Arc<Owned>,
    /// `None` once left.
    held: Option<Held>,
}

/// What is to be given back.
struct Held {
    hold: Hold,
    monitor: Monitoring,
    /// Tells the monitor that the deletion to come is our own.
    leaving: Arc<AtomicBool>,
    /// The line is being followed: it is contended.
    follows: bool,
}

/// The key, and the contender of the session that it stands for. When dropped, the key is deleted in the background, and
/// the contender leaves after that: until then nobody can take the place up.
struct Hold {
    key: Option<OwnedKey>,
    membership: Option<Membership>,
    runtime: Arc<Runtime>,
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Some(key) = self.key.take() {
            let membership = self.membership.take();
            self.runtime.spawn(async move {
                key.delete(Vec::new()).await;
                drop(membership);
            });
        }
    }
}

/// The task that watches the key; ends when dropped.
struct Monitoring(AbortHandle);

impl Drop for Monitoring {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Place {
    pub(super) fn new(
        session: Session,
        key: OwnedKey,
        membership: Membership,
        watch: Option<Subscription>,
        token: i64,
    ) -> Result<Self> {
        let facts = key.facts().clone();
        let follows = watch.is_some();
        let core = session.core();
        let leaving = Arc::new(AtomicBool::new(false));
        let monitor = Monitor {
            core: core.clone(),
            facts: facts.clone(),
            line: membership.line.clone(),
            leaving: leaving.clone(),
        };
        let monitor = Monitoring(core.runtime.spawn_abortable(monitor.run(watch)));
        let hold = Hold { key: Some(key), membership: Some(membership), runtime: core.runtime.clone() };
        let held = Some(Held { hold, monitor, leaving, follows });
        let place = Self { session, token, facts, held };
        // The wait may have outlasted the lease.
        if place.facts.is_held() { Ok(place) } else { Err(place.facts.error()) }
    }

    pub(crate) fn session(&self) -> &Session {
        &self.session
    }

    pub(crate) fn token(&self) -> i64 {
        self.token
    }

    pub(crate) fn facts(&self) -> &Arc<Owned> {
        &self.facts
    }

    pub(crate) fn compare(&self) -> Compare {
        self.facts.compare()
    }

    pub(crate) fn is_held(&self) -> bool {
        self.facts.is_held()
    }

    /// Waits until the place is lost; holds on to nothing of the place itself.
    pub(crate) fn lost(&self) -> impl Future<Output = ()> + Send + 'static + use<> {
        let facts = self.facts.clone();
        async move { facts.lost().await }
    }

    pub(crate) async fn txn(&self, txn: Txn) -> Result<TxnResponse> {
        self.facts.txn(txn).await
    }

    /// Runs `work` while the place is held.
    pub(crate) async fn run<T>(&self, work: impl Future<Output = T>) -> Result<T> {
        let done = tokio::select! {
            biased;
            () = self.facts.lost() => return Err(self.facts.error()),
            done = work => done,
        };
        if self.is_held() { Ok(done) } else { Err(self.facts.error()) }
    }

    /// Gives up the guard and keeps the key.
    pub(crate) fn detach(mut self) -> Arc<Owned> {
        let mut held = self.held.take();
        let key = held.as_mut().and_then(|held| held.hold.key.take());
        // Before the membership ends: this guard shall write no more when another can take the place up.
        key.into_iter().for_each(OwnedKey::keep);
        self.facts.clone()
    }

    /// Leaves the line. An error if the place was lost before, or etcd refuses; then it goes on trying.
    ///
    /// # Cancel safety
    ///
    /// When dropped, leaving goes on in the background.
    pub(crate) async fn leave(mut self) -> Result<()> {
        let Some(held) = self.held.take() else { return Err(self.facts.error()) };
        let core = self.session.core().clone();
        // In a task: others wait for the hand-over, and a caller that is not polled any more is not to hold it up.
        let leave = async move { held.leave(&core).await };
        if self.session.core().to_the_end(leave).await? { Ok(()) } else { Err(self.facts.error()) }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(held) = self.held.take() {
            let core = self.session.core().clone();
            self.session.core().runtime.spawn(async move {
                // What is refused is tried further.
                let _ = held.leave(&core).await;
            });
        }
    }
}

impl Held {
    /// Deletes the key and hands over to the next contender of this session. Tells whether the place was held until
    /// then. To be run to its end in the session; what etcd refuses is tried further after that.
    async fn leave(self, core: &Core) -> Result<bool> {
        let Self { mut hold, monitor, leaving, follows } = self;
        let (Some(key), Some(membership)) = (&mut hold.key, &hold.membership) else { return Ok(false) };
        let line = membership.line.clone();
        let next = line.behind(&membership.position);
        let mut reads = Vec::new();
        if let Some(next) = &next {
            reads.push(line.standing_op(Some(next.created)));
        }
        if follows {
            // How long the line is decides whether it is worth following further.
            let count = GetOptions::new().with_range(line.prefix.end()).with_count_only();
            reads.push(TxnOp::get(line.prefix.as_bytes(), Some(count)));
        }
        let held = key.facts().is_held();
        leaving.store(true, Ordering::Relaxed);
        // Or it might open a watch just now. That of the line must live until it is known whether it lingers.
        let _monitor = follows.then_some(monitor);
        let deleted = key.delete_or_tell(reads).await?;
        hold.key = None;
        let mut standing = None;
        if let Deleted::Now(responses, revision) = &deleted {
            standing =
                next.and_then(|next| Some((next.clone(), line.standing(responses, 0, &next, *revision)?)));
            let count = responses.len().checked_sub(1).and_then(|op| RangeAnswer::of(responses, op));
            if follows && count.is_some_and(|count| count.count() <= FRONT) {
                core.deletions.linger(&line.range);
            }
        }
        if line.leave(&membership.position, standing) {
            // Who holds now goes first, as a rule: a caller that enters the line again at once would send that before
            // the new holder could send anything, and etcd would commit it first.
            let_others_go_first().await;
        }
        Ok(held && !matches!(deleted, Deleted::Lost))
    }
}

/// Lets tasks run that are ready now. `yield_now` waits until none is ready, which in a busy program may be long.
async fn let_others_go_first() {
    let mut again = false;
    std::future::poll_fn(|cx| {
        if std::mem::replace(&mut again, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// Watches the key of a hold, so that its deletion by somebody else is noticed.
struct Monitor {
    core: Arc<Core>,
    facts: Arc<Owned>,
    line: Arc<Line>,
    leaving: Arc<AtomicBool>,
}

impl Monitor {
    async fn run(self, watch: Option<Subscription>) {
        tokio::select! {
            biased;
            () = self.facts.generation.ended() => {}
            gone = self.deletion(watch) => if gone && !self.leaving.load(Ordering::Relaxed) {
                self.facts.set_gone();
                // The session's next contender need not wait for the guard to be dropped.
                self.line.leave(&Position::of(&self.facts), None);
            }
        }
    }

    /// Waits until the key is deleted; false if that cannot be known.
    async fn deletion(&self, watch: Option<Subscription>) -> bool {
        let facts = &self.facts;
        let watch = match watch {
            Some(watch) => watch,
            None => {
                tokio::time::sleep(UNWATCHED).await;
                self.core.deletions.watch_from(&Range::key(&facts.key), facts.create_revision)
            }
        };
        // Boxed, because most holds end before it begins.
        Box::pin(self.told(watch)).await
    }

    async fn told(&self, mut watch: Subscription) -> bool {
        let facts = &self.facts;
        let deleted = |event: &Event| event.key() == facts.key && event.revision > facts.create_revision;
        loop {
            match watch.next().await {
                Ok(News::Events(events)) => {
                    // Our own deletion is no news, and the watch must live until it is known whether it lingers.
                    if events.iter().any(deleted) && !self.leaving.load(Ordering::Relaxed) {
                        return true;
                    }
                }
                Ok(News::Gap) => {
                    watch = self.core.deletions.watch(&Range::key(&facts.key));
                    match watch.covered().await {
                        Ok(Some(_)) => {}
                        Ok(None) => continue,
                        Err(_) => return false,
                    }
                    let options = GetOptions::new().with_keys_only();
                    let Ok(read) = self.core.rpc.get(&facts.key, options, None).await else { return false };
                    if read.kvs().first().map(KeyValue::create_revision) != Some(facts.create_revision) {
                        return true;
                    }
                }
                // Without permission to watch, the loss is found by the lease and by what is written.
                Err(_) => return false,
            }
        }
    }
}
