//! How a generation begins and ends at etcd: its lease is granted, its first op slot is put, and it is revoked.

use std::num::NonZeroI64;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Client, GetOptions, LeaseGrantOptions};
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt as _};
use futures::{FutureExt as _, TryFutureExt as _};

use super::{Keeper, local_deadline};
use crate::error::{Error, Result};
use crate::session::generation::Generation;
use crate::session::rpc::{Failure, RangeAnswer, Rpc, is_user_missing, revision};
use crate::session::runtime::{Backoff, Time};
use crate::session::slots::Slots;

/// A lease that was granted, and no generation has begun with it. Revoked in the background when dropped.
struct Unused<'a> {
    keeper: &'a Keeper,
    lease: Option<NonZeroI64>,
}

impl Drop for Unused<'_> {
    fn drop(&mut self) {
        if let Some(lease) = self.lease {
            self.keeper.rpc().runtime.spawn(self.keeper.revoke(lease, true));
        }
    }
}

impl Keeper {
    /// Grants the first lease within the connect timeout.
    ///
    /// # Cancel safety
    ///
    /// A dropped call leaves a lease without keys only if the request for it was on its way; it expires after its TTL.
    pub(crate) async fn first(&self) -> Result<Arc<Generation>> {
        let (mut last, limit) = (None, self.options.connect_timeout);
        let first = async {
            self.admitted(&mut last).await?;
            self.grant(1, &mut last).await
        };
        let granted = tokio::time::timeout(limit, first).await;
        granted.unwrap_or_else(|_| Err(self.rpc().unreachable(limit, last)))
    }

    /// Grants the lease that follows one that is lost.
    pub(super) async fn replace(&self, lost: &Generation) -> Arc<Generation> {
        // Before the first write of the next generation: keys of the old one may still be there.
        self.revoke(lost.lease, false).await;
        while !self.application_lives() {
            tokio::time::sleep(self.patience()).await;
        }
        self.grant_until_done(lost.number + 1).await
    }

    /// Makes sure that the session may do what it has to do: etcd grants leases to everybody, and a session that may not
    /// read would only find out when it cannot confirm its first keepalive.
    async fn admitted(&self, last: &mut Option<etcd_client::Error>) -> Result<()> {
        let mut backoff = Backoff::of_requests();
        loop {
            let call = |client: &Client| {
                let (mut client, options) = (client.kv_client(), GetOptions::new().with_count_only());
                let probe = self.rpc().probe.clone();
                async move { client.get(probe, Some(options)).await }
            };
            match self.rpc().attempt(&self.rpc().probe, call).await {
                Ok(_) => return Ok(()),
                Err(Failure::Refused(error)) => return Err(error),
                Err(Failure::Login(source)) if is_user_missing(&source) => {
                    return Err(Error::AuthFailed { source });
                }
                Err(Failure::Again(error) | Failure::Login(error) | Failure::LeaseGone(error)) => {
                    *last = Some(error);
                }
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

    /// Grants a lease, sending again until etcd answers, and begins a generation with it. `last` keeps the last failure
    /// for an error message.
    async fn grant(&self, number: u64, last: &mut Option<etcd_client::Error>) -> Result<Arc<Generation>> {
        let ttl = i64::try_from(self.options.ttl.as_secs()).unwrap_or(i64::MAX);
        let mut backoff = Backoff::new(Duration::from_millis(10), Duration::from_millis(150));
        let (mut lease, mut sent_before) = (self.random_lease(), false);
        loop {
            let id = lease.get();
            let grant = || {
                let sent = self.rpc().runtime.now();
                let call = move |client: &Client| {
                    let (mut client, options) = (client.lease_client(), LeaseGrantOptions::new().with_id(id));
                    async move { client.grant(ttl, Some(options)).await }
                };
                self.rpc()
                    .attempt(b"the session's lease", call)
                    .map_ok(move |granted| (sent, granted))
                    .boxed()
            };
            let (answer, several) = answer(self.rpc(), grant).await;
            sent_before |= several;
            let granted = match answer {
                Ok((sent, granted)) => {
                    let ttl = Duration::from_secs(u64::try_from(granted.ttl()).unwrap_or(0));
                    Some(local_deadline(sent, ttl))
                }
                // Ours, from an attempt whose answer was lost: a keepalive tells how long it lives, unless its time was
                // over before it was known.
                Err(Failure::LeaseExists) if sent_before => {
                    let mut unused = Unused { keeper: self, lease: Some(lease) };
                    let deadline = self.beat(lease, || {}).await;
                    unused.lease = None;
                    deadline
                }
                Err(Failure::LeaseExists) => {
                    lease = self.random_lease();
                    None
                }
                Err(Failure::Refused(error)) => return Err(error),
                Err(Failure::Unknown(error)) => {
                    sent_before = true;
                    *last = error;
                    None
                }
                Err(Failure::Again(error) | Failure::Login(error)) => {
                    *last = Some(error);
                    None
                }
                Err(Failure::LeaseGone(_)) => None,
            };
            if let Some(deadline) = granted {
                if let Some(generation) = self.begin(number, lease, deadline, last).await {
                    return Ok(generation);
                }
                (lease, sent_before) = (self.random_lease(), false);
            }
            backoff.wait(&self.rpc().runtime).await;
        }
    }

    /// Begins a generation with a lease just granted: puts op slot 0. `None` if the lease is over before that, or etcd is
    /// out of space.
    async fn begin(
        &self,
        number: u64,
        lease: NonZeroI64,
        deadline: Time,
        last: &mut Option<etcd_client::Error>,
    ) -> Option<Arc<Generation>> {
        let (runtime, namespace) = (&self.rpc().runtime, &self.options.namespace);
        let mut unused = Unused { keeper: self, lease: Some(lease) };
        let mut backoff = Backoff::of_requests();
        let first = loop {
            if runtime.now() >= deadline {
                return None;
            }
            let begin =
                || self.rpc().txn(b"the session's lease", Slots::begin(namespace, lease.get())).boxed();
            match answer(self.rpc(), begin).await.0 {
                Ok(response) if response.succeeded() => break revision(response.header()),
                Ok(response) => {
                    let found = RangeAnswer::of(&response.0.responses, 0).and_then(|slot| slot.keys().next());
                    break found?.create_revision;
                }
                Err(Failure::LeaseGone(_)) => return None,
                // Then no lease is granted either.
                Err(Failure::Refused(Error::NoSpace { .. })) => return None,
                // It may still read, and whatever it writes is refused as well.
                Err(Failure::Refused(_)) => break 0,
                Err(Failure::Again(error) | Failure::Login(error)) => *last = Some(error),
                Err(Failure::Unknown(error)) => *last = error,
                Err(Failure::LeaseExists) => {}
            }
            backoff.wait(runtime).await;
        };
        unused.lease = None;
        Some(Arc::new(Generation::new(number, lease, deadline, Slots::new(first), runtime.clone())))
    }

    fn random_lease(&self) -> NonZeroI64 {
        let bits = self.rpc().runtime.random() >> 1;
        i64::try_from(bits).ok().and_then(NonZeroI64::new).unwrap_or(NonZeroI64::MIN.saturating_abs())
    }

    /// Revokes a lease until etcd says that it is gone; when `closing`, until etcd refuses, and for no longer than it would
    /// live.
    pub(super) fn revoke(&self, lease: NonZeroI64, closing: bool) -> impl Future<Output = ()> + Send + use<> {
        let (transport, limit, id) = (self.transport.clone(), self.options.ttl, lease.get());
        let revoke = async move {
            let rpc = &transport.keepalives.rpc;
            let (mut backoff, mut told) = (Backoff::of_requests(), false);
            loop {
                let revoke = || {
                    let call = move |client: &Client| {
                        let mut client = client.lease_client();
                        async move { client.revoke(id).await }
                    };
                    rpc.attempt(b"the session's lease", call).boxed()
                };
                match answer(rpc, revoke).await.0 {
                    Ok(_) | Err(Failure::LeaseGone(_)) => return,
                    Err(Failure::Refused(error)) if closing => {
                        tracing::warn!(%error, "the lease cannot be revoked; it will expire");
                        return;
                    }
                    // Nobody renews it, so it will be gone. The next generation waits for that.
                    Err(Failure::Refused(error)) => {
                        if !std::mem::replace(&mut told, true) {
                            tracing::warn!(%error, "the lost lease cannot be revoked; waiting until it expires");
                        }
                        backoff.wait(&rpc.runtime).await;
                    }
                    Err(_) => backoff.wait(&rpc.runtime).await,
                }
            }
        };
        async move {
            if closing {
                let _ = tokio::time::timeout(limit, revoke).await;
            } else {
                revoke.await;
            }
        }
    }
}

/// Makes an attempt, and more through the other members while none is answered: one that stands still would hold
/// the next generation up for as long as an attempt may take. What follows goes to the member that answered. Tells whether
/// there were several.
async fn answer<'a, T>(
    rpc: &Rpc,
    attempt: impl Fn() -> BoxFuture<'a, Result<T, Failure>>,
) -> (Result<T, Failure>, bool) {
    const PAUSE: Duration = Duration::from_millis(150);
    const MOST: usize = 8;
    let through_current = || {
        let member = rpc.endpoints.current();
        attempt().map(move |answer| (member, answer))
    };
    let mut attempts = FuturesUnordered::new();
    attempts.push(through_current());
    let mut several = false;
    loop {
        tokio::select! {
            biased;
            Some((member, answer)) = attempts.next() => {
                if answer.is_ok() {
                    rpc.endpoints.prefer(member);
                }
                return (answer, several);
            }
            () = tokio::time::sleep(PAUSE), if attempts.len() < MOST => {
                rpc.endpoints.avoid(rpc.endpoints.current());
                several = true;
                attempts.push(through_current());
            }
        }
    }
}
