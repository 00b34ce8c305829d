//! Writes that only the owner of a key may do.

use std::sync::Arc;

use etcd_client::proto::{PbTxnOpResponse, PbTxnRequest, PbTxnResponse};
use etcd_client::{Compare, CompareOp, GetOptions, PutOptions, Txn, TxnOp, TxnResponse};
use tokio::sync::oneshot;

use super::Owned;
use crate::error::{Error, Result};
use crate::name;
use crate::session::rpc::{Failure, KeyFacts, RangeAnswer, revision};
use crate::session::runtime::Backoff;
use crate::session::slots::Slot;

/// The operations around a guarded transaction of the user's.
const GUARD_OPS: usize = 2;

impl Owned {
    /// Puts a new value, if the last put of the key is still the one at `last`. Follows the request to its end.
    pub(crate) async fn update(&self, value: Vec<u8>, last: &mut i64) -> Result<()> {
        let mut unanswered = false;
        let mut backoff = Backoff::of_requests();
        loop {
            let options = PutOptions::new().with_lease(self.generation.lease.get());
            let txn = Txn::new()
                .when([Compare::mod_revision(self.key.clone(), CompareOp::Equal, *last)])
                .and_then([TxnOp::put(self.key.clone(), value.clone(), Some(options))])
                .or_else([TxnOp::get(self.key.clone(), None)]);
            let attempt = tokio::select! {
                biased;
                // What is under way can only come before the first put of the next guard.
                () = self.detached.cancelled() => return Err(self.unresolved(true)),
                attempt = self.core.rpc.txn(&self.key, txn) => attempt,
                () = self.generation.ended() => return Err(self.unresolved(unanswered)),
            };
            match attempt {
                Ok(response) if response.succeeded() => {
                    *last = revision(response.header());
                    return Ok(());
                }
                Ok(response) => {
                    let found = RangeAnswer::of(&response.0.responses, 0);
                    let found = found.and_then(|found| found.first_value());
                    let ours = |(facts, _): &(KeyFacts, _)| facts.create_revision == self.create_revision;
                    let Some((facts, found)) = found.filter(ours) else {
                        self.set_gone();
                        // An attempt may have been applied before the key was gone.
                        return Err(self.unresolved(unanswered));
                    };
                    *last = facts.mod_revision;
                    // An earlier copy of this put, or somebody who wrote over our value: then it is put again.
                    if unanswered && found == value {
                        return Ok(());
                    }
                }
                Err(Failure::LeaseGone(_)) => {
                    self.generation.end();
                    return Err(self.unresolved(unanswered));
                }
                Err(Failure::Refused(error)) => {
                    return Err(if unanswered { self.unresolved(true) } else { error });
                }
                Err(failure) => {
                    unanswered |= !matches!(failure, Failure::Again(_) | Failure::Login(_));
                    backoff.wait(&self.core.runtime).await;
                }
            }
        }
    }

    /// Runs the user's transaction if the key is there, at most once.
    pub(crate) async fn txn(self: &Arc<Self>, txn: Txn) -> Result<TxnResponse> {
        let request = PbTxnRequest::from(txn.clone());
        name::check_txn(&request, GUARD_OPS)?;
        if !self.is_held() {
            return Err(self.error());
        }
        let plain = request.compare.is_empty();
        let (answer, answered) = oneshot::channel();
        let facts = self.clone();
        self.core.runtime.spawn(async move {
            let result = facts.guarded(txn, plain).await;
            let _ = answer.send(result);
        });
        answered.await.unwrap_or(Err(Error::Closed))
    }

    /// Follows the user's transaction to its end; `plain` if it has no compares of its own.
    async fn guarded(&self, txn: Txn, plain: bool) -> Result<TxnResponse> {
        let mut slot = self.generation.slots.take();
        let mut unanswered = false;
        let mut backoff = Backoff::of_requests();
        let result = loop {
            let step = slot.step(&self.core.namespace, self.generation.lease.get());
            let guarded = Txn::new()
                .when([self.compare(), step.compare()])
                .and_then([step.put(), TxnOp::txn(txn.clone())])
                .or_else([
                    step.get(),
                    TxnOp::get(self.key.clone(), Some(GetOptions::new().with_keys_only())),
                ]);
            let attempt = tokio::select! {
                biased;
                attempt = self.core.rpc.txn(&self.key, guarded) => attempt,
                // The slot is on the lease as well: nobody will use it again.
                () = self.generation.ended() => return Err(self.unresolved(unanswered)),
            };
            match attempt {
                Ok(response) if response.succeeded() => {
                    slot.revision = revision(response.header());
                    break self.inner(response);
                }
                Ok(TxnResponse(response)) => {
                    let now = RangeAnswer::of(&response.responses, 0).and_then(|keys| keys.keys().next());
                    let now = now.map_or(0, |slot| slot.mod_revision);
                    let moved = std::mem::replace(&mut slot.revision, now) != now;
                    let ours = RangeAnswer::of(&response.responses, 1).is_some_and(|keys| {
                        keys.keys().any(|key| key.create_revision == self.create_revision)
                    });
                    if moved && unanswered {
                        // Applied by an attempt whose answer was lost. Without compares of the user's there is only
                        // one thing it can have done.
                        let (header, responses) = (response.header, Vec::new());
                        let applied = TxnResponse(PbTxnResponse { header, succeeded: true, responses });
                        break if plain { Ok(applied) } else { Err(self.unresolved(true)) };
                    }
                    if !ours {
                        self.set_gone();
                        break Err(self.error());
                    }
                }
                Err(Failure::LeaseGone(error)) => {
                    return Err(self.lease_gone(&slot, error, unanswered).await);
                }
                Err(Failure::Refused(error)) if !unanswered => break Err(error),
                Err(Failure::Refused(_)) => return Err(self.unresolved(true)),
                Err(failure) => {
                    unanswered |= !matches!(failure, Failure::Again(_) | Failure::Login(_));
                    backoff.wait(&self.core.runtime).await;
                }
            }
        };
        self.generation.slots.give_back(slot);
        result
    }

    /// Some lease in the user's transaction does not exist. Finds out whether it is ours.
    async fn lease_gone(&self, slot: &Slot, source: etcd_client::Error, unanswered: bool) -> Error {
        let step = slot.step(&self.core.namespace, self.generation.lease.get());
        let only_ours = Txn::new().when([step.compare()]).and_then([step.put()]);
        if let Err(Failure::LeaseGone(_)) = self.core.rpc.txn(&self.key, only_ours).await {
            self.generation.end();
        }
        if unanswered || !self.is_held() {
            return self.unresolved(unanswered);
        }
        Error::Etcd { key: name::display(&self.key), source }
    }

    /// The answer to the user's transaction, out of that to ours.
    fn inner(&self, TxnResponse(mut outer): TxnResponse) -> Result<TxnResponse> {
        match outer.responses.pop().and_then(|op| op.response) {
            Some(PbTxnOpResponse::ResponseTxn(mut inner)) => {
                inner.header = outer.header;
                Ok(TxnResponse(inner))
            }
            _ => Err(self.unresolved(true)),
        }
    }

    /// The error of a write that ended with its key: only if some attempt was never answered it may have been applied.
    fn unresolved(&self, unanswered: bool) -> Error {
        if unanswered { Error::OutcomeUnknown { key: name::display(&self.key) } } else { self.error() }
    }
}
