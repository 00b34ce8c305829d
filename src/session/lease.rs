//! The lease: granted, kept alive, and its end known locally before etcd acts on it.
//!
//! One lease at a time is a *generation* of the session. Its deadline is the time the last confirmed keepalive was
//! sent, plus the TTL of its answer, less a margin: etcd starts counting later than that, so the local clock always
//! ends first.

mod grant;

use std::num::NonZeroI64;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use futures::stream::{FuturesUnordered, StreamExt as _};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::SessionState;
use super::builder::Options;
use super::generation::{Current, Generation};
use super::keepalive::{Beat, Stream};
use super::rpc::Rpc;
use super::runtime::{Backoff, Time};
use super::transport::Transport;
use crate::error::{Error, Result};

/// The local end of a lease whose TTL was told by an answer to a request sent at `sent`.
fn local_deadline(sent: Time, ttl: Duration) -> Time {
    let margin = (ttl / 20).max(Duration::from_millis(100));
    sent.after(ttl.saturating_sub(margin))
}

/// Called before each keepalive when the application wants a say in whether it is still alive.
pub(crate) type Liveness = Arc<dyn Fn() -> bool + Send + Sync>;

/// The task that owns the lease of a session.
pub(crate) struct Keeper {
    pub(crate) transport: Arc<Transport>,
    pub(crate) options: Arc<Options>,
    pub(crate) state: watch::Sender<SessionState>,
    pub(crate) current: Arc<Current>,
    /// Cancelled when the session is to be closed.
    pub(crate) closing: CancellationToken,
}

impl Keeper {
    /// The connections of keepalives serve all that concerns the lease.
    fn rpc(&self) -> &Rpc {
        &self.transport.keepalives.rpc
    }

    /// Keeps one generation after the other until the session is closed.
    ///
    /// What happens seldom is boxed: a session spends its life in `keep`.
    pub(crate) async fn run(self, first: Arc<Generation>) {
        let mut generation = first;
        loop {
            let closing = self.keep(&generation).await;
            generation.end();
            self.current.replace(None);
            if closing {
                return Box::pin(self.revoke(generation.lease, true)).await;
            }
            tracing::warn!(lease = format_args!("{:x}", generation.lease), "lease lost");
            self.state.send_replace(SessionState::Lost { generation: generation.number });
            generation = tokio::select! {
                biased;
                next = Box::pin(self.replace(&generation)) => next,
                () = self.closing.cancelled() => return Box::pin(self.revoke(generation.lease, true)).await,
            };
            self.publish(&generation);
        }
    }

    /// Tells everybody of a new generation.
    pub(crate) fn publish(&self, generation: &Arc<Generation>) {
        let number = generation.number;
        tracing::info!(lease = format_args!("{:x}", generation.lease), generation = number, "lease granted");
        self.current.replace(Some(generation.clone()));
        self.state.send_replace(SessionState::Connected { generation: number });
    }

    /// Keeps a generation alive until it is lost (false) or the session is closing (true).
    async fn keep(&self, generation: &Generation) -> bool {
        let (runtime, third) = (&self.rpc().runtime, self.options.ttl / 3);
        // Sessions that began together are not to go on in step.
        let mut next = runtime.now().after(runtime.jitter(third));
        loop {
            tokio::select! {
                biased;
                () = self.closing.cancelled() => return true,
                () = generation.ended() => return false,
                () = runtime.sleep_until(next) => {}
            }
            next = runtime.now().after(third);
            tokio::select! {
                biased;
                () = self.closing.cancelled() => return true,
                () = generation.ended() => return false,
                // Boxed, because it runs for a moment in a task that is there all the time.
                renewed = Box::pin(self.renew(generation)) => if !renewed {
                    return false;
                },
            }
        }
    }

    /// Renews the lease; false if it is lost.
    async fn renew(&self, generation: &Generation) -> bool {
        let (runtime, patience) = (&self.rpc().runtime, self.patience());
        while !self.application_lives() {
            self.suspend(generation);
            tokio::select! {
                biased;
                () = runtime.sleep_until(generation.deadline()) => return generation.is_alive(),
                () = tokio::time::sleep(patience) => {}
            }
        }
        tokio::select! {
            biased;
            beat = self.beat(generation.lease, || self.suspend(generation)) => {
                let Some(deadline) = beat else {
                    tracing::warn!("etcd says that the lease is gone");
                    return false;
                };
                let alive = generation.extend(deadline);
                if alive {
                    self.resume(generation);
                }
                alive
            }
            () = runtime.sleep_until(generation.deadline()) => generation.is_alive(),
        }
    }

    /// Sends keepalives until one counts: first on the open stream; while no answer comes, on more streams through the
    /// other members, and `late` is called each time. The new local deadline; `None` if the lease is gone.
    async fn beat(&self, lease: NonZeroI64, late: impl Fn()) -> Option<Time> {
        let (keepalives, runtime) = (&self.transport.keepalives, &self.rpc().runtime);
        let patience = self.patience();
        let mut backoff = Backoff::new(patience / 4, patience);
        let renew = |stream: Stream| async move { keepalives.renew(&stream, lease).await };
        let (mut stream, mut beats) = (keepalives.stream(), FuturesUnordered::new());
        beats.push(renew(stream.clone()));
        let mut next = tokio::time::sleep(patience).boxed();
        loop {
            tokio::select! {
                biased;
                Some(beat) = beats.next() => match beat {
                    Beat::Confirmed(renewal) => return Some(local_deadline(renewal.sent, renewal.ttl)),
                    Beat::Gone => return None,
                    Beat::Nothing if beats.is_empty() => {
                        next = tokio::time::sleep(backoff.pause(runtime)).boxed();
                    }
                    Beat::Nothing => {}
                },
                () = &mut next => {
                    late();
                    stream = keepalives.instead_of(&stream);
                    beats.push(renew(stream.clone()));
                    next = tokio::time::sleep(patience + runtime.jitter(patience)).boxed();
                }
            }
        }
    }

    /// How long something is waited for before something else is tried.
    fn patience(&self) -> Duration {
        (self.options.ttl / 10).min(Duration::from_millis(500))
    }

    /// Asks the application, if it wants to be asked. One that panics does not live.
    fn application_lives(&self) -> bool {
        let ask = |alive: &Liveness| std::panic::catch_unwind(AssertUnwindSafe(|| alive())).unwrap_or(false);
        self.options.liveness.as_ref().is_none_or(ask)
    }

    fn suspend(&self, generation: &Generation) {
        self.publish_state(SessionState::Suspended { generation: generation.number });
    }

    fn resume(&self, generation: &Generation) {
        self.publish_state(SessionState::Connected { generation: generation.number });
    }

    fn publish_state(&self, state: SessionState) {
        let changed = self.state.send_if_modified(|old| std::mem::replace(old, state) != state);
        if changed {
            tracing::info!(?state, "session state");
        }
    }
}

impl Drop for Keeper {
    /// The session is over, whatever ended its keeper; nobody shall wait for a renewal that will not come.
    fn drop(&mut self) {
        self.current.end();
        self.transport.leave();
        self.state.send_replace(SessionState::Closed);
    }
}

/// Refuses TTLs that etcd would change or refuse.
pub(crate) fn check_ttl(ttl: Duration) -> Result<()> {
    /// etcd's maximum, in seconds.
    const MAX: u64 = 9_000_000_000;
    let reason = match ttl.as_secs() {
        0 => "it is less than a second",
        seconds if seconds > MAX => "it is more than etcd's maximum of 9,000,000,000 s",
        _ if ttl.subsec_nanos() != 0 => "etcd counts leases in whole seconds",
        _ => return Ok(()),
    };
    Err(Error::InvalidOption { option: "ttl", reason: format!("{ttl:?}: {reason}") })
}
