//! The server without its network: every request is one step under one lock.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use etcd_client::proto::{
    PbCompactionRequest, PbCompactionResponse, PbDeleteRequest, PbDeleteResponse, PbKeyValue,
    PbLeaseGrantRequest, PbLeaseGrantResponse, PbLeaseKeepAliveResponse, PbLeaseLeasesResponse,
    PbLeaseRevokeResponse, PbLeaseStatus, PbLeaseTimeToLiveRequest, PbLeaseTimeToLiveResponse, PbPutRequest,
    PbPutResponse, PbRangeRequest, PbRangeResponse, PbResponseHeader, PbTxnRequest, PbTxnResponse,
    PbWatchRequestUnion, PbWatchResponse,
};
use tokio::sync::Notify;
use tokio::sync::mpsc::UnboundedSender;

use super::lease::Leases;
use super::status::Refusal;
use super::store::{Range, Store};
use super::txn::{Apply, check_delete, check_put, check_range, check_txn};
use super::watch::Watches;

/// The one member, and its cluster.
pub(super) const MEMBER: u64 = 0x1;
const CLUSTER: u64 = 0x1;
const TERM: u64 = 2;

/// A server's state and what happens to it.
#[derive(Debug, Default)]
pub(super) struct Engine {
    state: Mutex<State>,
    /// Told when a lease may end earlier than was known.
    pub(super) leases_changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    store: Store,
    leases: Leases,
    watches: Watches,
    last_lease: i64,
}

impl State {
    fn header(&self) -> PbResponseHeader {
        PbResponseHeader {
            cluster_id: CLUSTER,
            member_id: MEMBER,
            revision: self.store.revision(),
            raft_term: TERM,
        }
    }

    fn apply(&mut self) -> Apply<'_> {
        Apply { store: &mut self.store, leases: &mut self.leases }
    }

    /// Ends a write: the watches hear of it.
    fn commit(&mut self) -> PbResponseHeader {
        let header = self.header();
        let changes = self.store.commit();
        if !changes.is_empty() {
            self.watches.tell(changes, &header);
        }
        header
    }

    fn revoke(&mut self, id: i64) -> Result<PbResponseHeader, Refusal> {
        for key in self.leases.remove(id)? {
            self.store.delete(&Range::new(&key, b""));
        }
        Ok(self.commit())
    }
}

impl Engine {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn header(&self) -> PbResponseHeader {
        self.state().header()
    }

    // === KV ===

    pub(super) fn range(&self, request: &PbRangeRequest) -> Result<PbRangeResponse, Refusal> {
        check_range(request)?;
        let state = self.state();
        let mut response = state.store.range(request)?;
        response.header = Some(state.header());
        Ok(response)
    }

    pub(super) fn put(&self, request: &PbPutRequest) -> Result<PbPutResponse, Refusal> {
        check_put(request)?;
        let mut state = self.state();
        let mut response = state.apply().put(request)?;
        response.header = Some(state.commit());
        Ok(response)
    }

    pub(super) fn delete(&self, request: &PbDeleteRequest) -> Result<PbDeleteResponse, Refusal> {
        check_delete(request)?;
        let mut state = self.state();
        let mut response = state.apply().delete(request);
        response.header = Some(state.commit());
        Ok(response)
    }

    pub(super) fn txn(&self, request: &PbTxnRequest) -> Result<PbTxnResponse, Refusal> {
        check_txn(request)?;
        let mut state = self.state();
        let mut response = state.apply().txn(request)?;
        response.header = Some(state.commit());
        Ok(response)
    }

    pub(super) fn compact(&self, request: PbCompactionRequest) -> Result<PbCompactionResponse, Refusal> {
        let mut state = self.state();
        state.store.compact(request.revision)?;
        Ok(PbCompactionResponse { header: Some(state.header()) })
    }

    // === Lease ===

    pub(super) fn grant(&self, request: PbLeaseGrantRequest) -> Result<PbLeaseGrantResponse, Refusal> {
        let mut state = self.state();
        let id = match request.id {
            0 => loop {
                // Ids that we choose need only differ from all others.
                state.last_lease += 1;
                if !state.leases.has(state.last_lease) {
                    break state.last_lease;
                }
            },
            id => id,
        };
        let ttl = state.leases.grant(id, request.ttl)?;
        self.leases_changed.notify_one();
        Ok(PbLeaseGrantResponse { header: Some(state.header()), id, ttl, error: String::new() })
    }

    pub(super) fn revoke(&self, id: i64) -> Result<PbLeaseRevokeResponse, Refusal> {
        Ok(PbLeaseRevokeResponse { header: Some(self.state().revoke(id)?) })
    }

    pub(super) fn renew(&self, id: i64) -> PbLeaseKeepAliveResponse {
        let mut state = self.state();
        let ttl = state.leases.renew(id).unwrap_or(0);
        PbLeaseKeepAliveResponse { header: Some(state.header()), id, ttl }
    }

    pub(super) fn time_to_live(&self, request: PbLeaseTimeToLiveRequest) -> PbLeaseTimeToLiveResponse {
        let state = self.state();
        let (header, id) = (Some(state.header()), request.id);
        match state.leases.facts(id) {
            None => PbLeaseTimeToLiveResponse { header, id, ttl: -1, ..PbLeaseTimeToLiveResponse::default() },
            Some((ttl, granted_ttl, keys)) => {
                let keys = keys.iter().filter(|_| request.keys).cloned().collect();
                PbLeaseTimeToLiveResponse { header, id, ttl, granted_ttl, keys }
            }
        }
    }

    pub(super) fn leases(&self) -> PbLeaseLeasesResponse {
        let state = self.state();
        let leases = state.leases.ids().map(|id| PbLeaseStatus { id }).collect();
        PbLeaseLeasesResponse { header: Some(state.header()), leases }
    }

    /// Revokes the leases whose time is over, and sleeps until that of the next is; for ever.
    pub(super) async fn expire(self: Arc<Self>) {
        loop {
            let next = {
                let mut state = self.state();
                for id in state.leases.ended() {
                    tracing::debug!(lease = format_args!("{id:x}"), "lease expired");
                    let _ = state.revoke(id);
                }
                state.leases.next_end()
            };
            let far = || tokio::time::Instant::now() + std::time::Duration::from_secs(3600);
            tokio::select! {
                biased;
                () = self.leases_changed.notified() => {}
                () = tokio::time::sleep_until(next.unwrap_or_else(far)) => {}
            }
        }
    }

    pub(super) fn hold_expiry(&self, hold: bool) {
        self.state().leases.held = hold;
        self.leases_changed.notify_one();
    }

    // === Watch ===

    pub(super) fn open_watches(&self, out: UnboundedSender<PbWatchResponse>) -> u64 {
        self.state().watches.open(out)
    }

    pub(super) fn close_watches(&self, stream: u64) {
        self.state().watches.close(stream);
    }

    pub(super) fn watch(&self, stream: u64, request: PbWatchRequestUnion) {
        let mut state = self.state();
        let header = state.header();
        let State { store, watches, .. } = &mut *state;
        watches.ask(stream, request, store, &header);
    }

    pub(super) fn tell_progress(&self, stream: u64) {
        let state = self.state();
        state.watches.progress(stream, &state.header());
    }

    // === what a test looks at ===

    pub(super) fn watch_count(&self) -> (usize, usize) {
        self.state().watches.count()
    }

    pub(super) fn keys(&self, range: &Range) -> Vec<PbKeyValue> {
        self.state().store.now(range).map(|kv| PbKeyValue::clone(kv)).collect()
    }
}
