//! Writes that only the owner of a key may do.

use etcd_client::proto::{PbResponseHeader, PbTxnOpResponse, PbTxnRequest, PbTxnResponse};
use etcd_client::{Compare, CompareOp, PutOptions, Txn, TxnOp, TxnResponse};

use super::Owned;
use crate::error::{Error, Result};
use crate::name;
use crate::session::once::Record;
use crate::session::rpc::{Failure, KeyFacts, RangeAnswer, revision};
use crate::session::runtime::Backoff;

/// What etcd counts of the transactions around a guarded transaction of the user's.
const GUARD_OPS: usize = 4;

/// On record when the key was there, and when it was not.
const DONE: &[u8] = b"done";
const LOST: &[u8] = b"lost";

impl Owned {
    /// Puts a new value, if the last put of the key is still the one at `last`. Follows the request to its end.
    pub(crate) async fn update(&self, value: Vec<u8>, last: &mut i64) -> Result<()> {
        let mut unanswered = false;
        let mut backoff = Backoff::of_requests();
        loop {
            if !self.generation.is_alive() {
                return Err(self.unresolved(unanswered));
            }
            let options = PutOptions::new().with_lease(self.generation.lease.get());
            let txn = Txn::new()
                .when([Compare::mod_revision(self.key.clone(), CompareOp::Equal, *last)])
                .and_then([TxnOp::put(self.key.clone(), value.clone(), Some(options))])
                .or_else([TxnOp::get(self.key.clone(), None)]);
            let attempt = tokio::select! {
                biased;
                // What is under way can only come before the first put of the next guard.
                () = self.detached.wait() => return Err(self.unresolved(true)),
                attempt = self.core.rpc.txn_of(value.len(), &self.key, txn) => attempt,
                // The attempt under way may have been applied.
                () = self.generation.over() => return Err(self.unresolved(true)),
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
                    unanswered |= failure.is_unanswered();
                    backoff.wait(&self.core.runtime).await;
                }
            }
        }
    }

    /// Runs the user's transaction if the key is there, at most once.
    pub(crate) async fn txn(&self, txn: Txn) -> Result<TxnResponse> {
        let request = PbTxnRequest::from(txn.clone());
        name::check_txn(&request, GUARD_OPS)?;
        if !self.is_held() {
            return Err(self.error());
        }
        let own = self.compare();
        let body = move |record: &Record<'_>| {
            let then = [TxnOp::txn(txn.clone()), record.put(DONE)];
            Txn::new().when([own.clone()]).and_then(then).or_else([record.put(LOST)])
        };
        let done = self.core.once(&self.generation, &self.key, body, |done| done).await?;
        if done.record == LOST {
            self.set_gone();
            return Err(self.error());
        }
        let header = Some(PbResponseHeader { revision: done.revision, ..PbResponseHeader::default() });
        match done
            .answer
            .and_then(|answer| Some((answer.header, answer.responses.into_iter().next()?.response?)))
        {
            Some((outer, PbTxnOpResponse::ResponseTxn(mut inner))) => {
                inner.header = outer.or(header);
                Ok(TxnResponse(inner))
            }
            // The answer was lost. Without compares of the user's there is only one thing it can have done.
            _ if request.compare.is_empty() => {
                Ok(TxnResponse(PbTxnResponse { header, succeeded: true, responses: Vec::new() }))
            }
            _ => Err(self.unresolved(true)),
        }
    }

    /// The error of a write that ended with its key: only if some attempt was never answered it may have been applied.
    fn unresolved(&self, unanswered: bool) -> Error {
        if unanswered { Error::OutcomeUnknown { key: name::display(&self.key) } } else { self.error() }
    }
}
