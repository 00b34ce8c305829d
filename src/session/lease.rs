//! The lease: granted, kept alive, and its end known locally before etcd acts on it.
//!
//! One lease at a time is a *generation* of the session. Its deadline is the time the last confirmed keepalive was
//! sent, plus the TTL of its answer, less a margin: etcd starts counting later than that, so the local clock always
//! ends first.

use std::num::NonZeroI64;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Client, GetOptions, LeaseGrantOptions};
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use futures::{FutureExt, TryFutureExt};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::SessionState;
use super::builder::Options;
use super::generation::{Current, Generation};
use super::keepalive::{Beat, Stream};
use super::rpc::{Failure, Rpc};
use super::runtime::{Backoff, Time};
use super::transport::Transport;
use crate::error::{Error, Result};

/// The local end of a lease whose TTL was told by an answer to a request sent at `sent`.
fn local_deadline(sent: Time, ttl: Duration) -> Time {
    let margin = (ttl / 20).max(Duration::from_millis(100));
    sent.after(ttl.saturating_sub(margin))
}

fn seconds(ttl: i64) -> Duration {
    Duration::from_secs(u64::try_from(ttl).unwrap_or(0))
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

    /// Grants the first lease within the connect timeout.
    ///
    /// # Cancel safety
    ///
    /// A dropped call may leave a lease without keys, which expires after its TTL.
    pub(crate) async fn first(&self) -> Result<Arc<Generation>> {
        let (mut last, limit) = (None, self.options.connect_timeout);
        let first = async {
            self.admitted(&mut last).await?;
            self.grant(1, &mut last).await
        };
        let granted = tokio::time::timeout(limit, first).await;
        granted.unwrap_or_else(|_| Err(self.rpc().unreachable(limit, last)))
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
                return Box::pin(self.revoke(&generation, true)).await;
            }
            tracing::warn!(lease = format_args!("{:x}", generation.lease), "lease lost");
            self.state.send_replace(SessionState::Lost { generation: generation.number });
            generation = tokio::select! {
                biased;
                next = Box::pin(self.replace(&generation)) => next,
                () = self.closing.cancelled() => return Box::pin(self.revoke(&generation, true)).await,
            };
            self.publish(&generation);
        }
    }

    /// Grants the lease that follows one that is lost.
    async fn replace(&self, lost: &Generation) -> Arc<Generation> {
        // Before the first write of the next generation: keys of the old one may still be there.
        self.revoke(lost, false).await;
        while !self.application_lives() {
            tokio::time::sleep(self.patience()).await;
        }
        self.grant_until_done(lost.number + 1).await
    }

    /// Tells everybody of a new generation.
    pub(crate) fn publish(&self, generation: &Arc<Generation>) {
        let number = generation.number;
        tracing::info!(lease = format_args!("{:x}", generation.lease), generation = number, "lease granted");
        self.current.replace(Some(generation.clone()));
        self.state.send_replace(SessionState::Connected { generation: number });
    }

    /// Makes sure that the session may do what it has to do: etcd grants leases to everybody, and a session that may not
    /// read would only find out when it cannot confirm its first keepalive.
    async fn admitted(&self, last: &mut Option<etcd_client::Error>) -> Result<()> {
        let (mut backoff, mut logins) = (Backoff::of_requests(), 0);
        loop {
            let probe = self.rpc().probe.clone();
            let call = move |client: &Client| -> BoxFuture<'static, _> {
                let (mut client, options) = (client.kv_client(), GetOptions::new().with_count_only());
                Box::pin(async move { client.get(probe, Some(options)).await })
            };
            match self.rpc().attempt(&self.rpc().probe, call).await {
                Ok(_) => return Ok(()),
                Err(Failure::Refused(error)) => return Err(error),
                // A new login did not help: the client has no user.
                Err(Failure::Login(source)) if logins == 3 => return Err(Error::AuthFailed { source }),
                Err(Failure::Login(error)) => {
                    logins += 1;
                    *last = Some(error);
                }
                Err(Failure::Again(error) | Failure::LeaseGone(error)) => *last = Some(error),
                Err(Failure::Unknown(error)) => *last = error,
                Err(Failure::LeaseExists) => {}
            }
            backoff.wait(&self.rpc().runtime).await;
        }
    }

    async fn grant_until_done(&self, number: u64) -> Arc<Generation> {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(5));
        loop {
            match self.grant(number, &mut None).await {
                Ok(generation) => return generation,
                // Credentials, permission or space: somebody has to act, so no hurry.
                Err(error) => tracing::warn!(%error, "no new lease"),
            }
            backoff.wait(&self.rpc().runtime).await;
        }
    }

    /// Grants a lease, sending again until etcd answers. `last` keeps the last failure for an error message.
    async fn grant(&self, number: u64, last: &mut Option<etcd_client::Error>) -> Result<Arc<Generation>> {
        let ttl = i64::try_from(self.options.ttl.as_secs()).unwrap_or(i64::MAX);
        let mut backoff = Backoff::new(Duration::from_millis(10), Duration::from_millis(150));
        let (mut lease, mut sent_before) = (self.random_lease(), false);
        loop {
            let id = lease.get();
            let grant = || {
                let sent = self.rpc().runtime.now();
                let call = move |client: &Client| -> BoxFuture<'static, _> {
                    let (mut client, options) = (client.lease_client(), LeaseGrantOptions::new().with_id(id));
                    Box::pin(async move { client.grant(ttl, Some(options)).await })
                };
                self.rpc()
                    .attempt(b"the session's lease", call)
                    .map_ok(move |granted| (sent, granted))
                    .boxed()
            };
            let (answer, several) = self.answer(grant).await;
            sent_before |= several;
            match answer {
                Ok((sent, granted)) => {
                    let deadline = local_deadline(sent, seconds(granted.ttl()));
                    return Ok(self.generation(number, lease, deadline));
                }
                // Ours, from an attempt whose answer was lost: a keepalive tells how long it lives.
                Err(Failure::LeaseExists) if sent_before => {
                    let keepalives = &self.transport.keepalives;
                    let stream = keepalives.stream();
                    match keepalives.renew(&stream, lease).await {
                        Beat::Confirmed(renewal) => {
                            let deadline = local_deadline(renewal.sent, renewal.ttl);
                            return Ok(self.generation(number, lease, deadline));
                        }
                        // Its time was over before it was known.
                        Beat::Gone => {}
                        Beat::Nothing => drop(keepalives.instead_of(&stream)),
                    }
                }
                Err(Failure::LeaseExists) => lease = self.random_lease(),
                Err(Failure::Refused(error)) => return Err(error),
                Err(Failure::Unknown(error)) => {
                    sent_before = true;
                    *last = error;
                }
                Err(Failure::Again(error) | Failure::Login(error)) => *last = Some(error),
                Err(Failure::LeaseGone(_)) => {}
            }
            backoff.wait(&self.rpc().runtime).await;
        }
    }

    /// Makes an attempt, and more through the other members while none is answered: one that stands still would hold
    /// the next generation up for as long as an attempt may take. Tells whether there were several.
    async fn answer<'a, T>(
        &'a self,
        attempt: impl Fn() -> BoxFuture<'a, Result<T, Failure>>,
    ) -> (Result<T, Failure>, bool) {
        const PAUSE: Duration = Duration::from_millis(150);
        const MOST: usize = 8;
        let mut attempts = FuturesUnordered::new();
        attempts.push(attempt());
        let mut several = false;
        loop {
            tokio::select! {
                biased;
                Some(answer) = attempts.next() => return (answer, several),
                () = tokio::time::sleep(PAUSE), if attempts.len() < MOST => {
                    self.rpc().endpoints.avoid(self.rpc().endpoints.current());
                    several = true;
                    attempts.push(attempt());
                }
            }
        }
    }

    fn generation(&self, number: u64, lease: NonZeroI64, deadline: Time) -> Arc<Generation> {
        Arc::new(Generation::new(number, lease, deadline, self.rpc().runtime.clone()))
    }

    fn random_lease(&self) -> NonZeroI64 {
        let bits = self.rpc().runtime.random() >> 1;
        i64::try_from(bits).ok().and_then(NonZeroI64::new).unwrap_or(NonZeroI64::MIN.saturating_abs())
    }

    /// Revokes a lease until etcd says that it is gone; when `closing`, for no longer than it would live.
    async fn revoke(&self, generation: &Generation, closing: bool) {
        let id = generation.lease.get();
        let revoke = async {
            let mut backoff = Backoff::of_requests();
            loop {
                let revoke = || {
                    let call = move |client: &Client| -> BoxFuture<'static, _> {
                        let mut client = client.lease_client();
                        Box::pin(async move { client.revoke(id).await })
                    };
                    self.rpc().attempt(b"the session's lease", call).boxed()
                };
                match self.answer(revoke).await.0 {
                    Ok(_) | Err(Failure::LeaseGone(_)) => return,
                    Err(Failure::Refused(error)) => {
                        tracing::warn!(%error, "the lease cannot be revoked; it will expire");
                        return;
                    }
                    Err(_) => backoff.wait(&self.rpc().runtime).await,
                }
            }
        };
        if closing {
            let _ = tokio::time::timeout(self.options.ttl, revoke).await;
        } else {
            revoke.await;
        }
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

    /// Renews the lease: first on the open stream; while no answer comes, on more streams through the other members.
    async fn renew(&self, generation: &Generation) -> bool {
        let (keepalives, runtime) = (&self.transport.keepalives, &self.rpc().runtime);
        let patience = self.patience();
        let mut backoff = Backoff::new(patience / 4, patience);
        while !self.application_lives() {
            self.suspend(generation);
            tokio::select! {
                biased;
                () = runtime.sleep_until(generation.deadline()) => return generation.is_alive(),
                () = tokio::time::sleep(patience) => {}
            }
        }
        let renew = |stream: Stream| async move { keepalives.renew(&stream, generation.lease).await };
        let (mut stream, mut beats) = (keepalives.stream(), FuturesUnordered::new());
        beats.push(renew(stream.clone()));
        let mut next = tokio::time::sleep(patience).boxed();
        loop {
            tokio::select! {
                biased;
                Some(beat) = beats.next() => match beat {
                    Beat::Confirmed(renewal) => {
                        let alive = generation.extend(local_deadline(renewal.sent, renewal.ttl));
                        if alive {
                            self.resume(generation);
                        }
                        return alive;
                    }
                    Beat::Gone => {
                        tracing::warn!("etcd says that the lease is gone");
                        return false;
                    }
                    Beat::Nothing if beats.is_empty() => {
                        next = tokio::time::sleep(backoff.pause(runtime)).boxed();
                    }
                    Beat::Nothing => {}
                },
                () = &mut next => {
                    self.suspend(generation);
                    stream = keepalives.instead_of(&stream);
                    beats.push(renew(stream.clone()));
                    next = tokio::time::sleep(patience + runtime.jitter(patience)).boxed();
                }
                () = runtime.sleep_until(generation.deadline()) => return generation.is_alive(),
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
