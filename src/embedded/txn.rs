//! Requests of the KV service: checked as etcd checks them, and applied.

use std::collections::BTreeSet;

use etcd_client::proto::{
    PbCompare, PbDeleteRequest, PbDeleteResponse, PbKeyValue, PbPutRequest, PbPutResponse, PbRangeRequest,
    PbRangeResponse, PbResponseHeader, PbResponseOp, PbTargetUnion, PbTxnOpRequest, PbTxnOpResponse,
    PbTxnRequest, PbTxnRequestOp, PbTxnResponse,
};

use super::lease::Leases;
use super::status::Refusal;
use super::store::{Range, Store};

/// etcd's limit of operations in one list of a transaction.
const MAX_OPS: usize = 128;

/// The keys and leases that a request works on.
pub(super) struct Apply<'a> {
    pub(super) store: &'a mut Store,
    pub(super) leases: &'a mut Leases,
}

// === checks that need no state ===

pub(super) fn check_range(request: &PbRangeRequest) -> Result<(), Refusal> {
    if request.key.is_empty() {
        return Err(Refusal::EmptyKey);
    }
    // An order that is none sorts nothing. Told to sort by such a target, etcds up to 3.5 end themselves; newer ones refuse.
    if (0..=2).contains(&request.sort_order) && !(0..=4).contains(&request.sort_target) {
        return Err(Refusal::InvalidSort);
    }
    Ok(())
}

pub(super) fn check_put(request: &PbPutRequest) -> Result<(), Refusal> {
    if request.key.is_empty() {
        return Err(Refusal::EmptyKey);
    }
    if request.ignore_value && !request.value.is_empty() {
        return Err(Refusal::ValueProvided);
    }
    if request.ignore_lease && request.lease != 0 {
        return Err(Refusal::LeaseProvided);
    }
    Ok(())
}

pub(super) fn check_delete(request: &PbDeleteRequest) -> Result<(), Refusal> {
    if request.key.is_empty() { Err(Refusal::EmptyKey) } else { Ok(()) }
}

pub(super) fn check_txn(request: &PbTxnRequest) -> Result<(), Refusal> {
    check_lists(request, MAX_OPS)?;
    written(&request.success)?;
    written(&request.failure)?;
    Ok(())
}

fn check_lists(request: &PbTxnRequest, most: usize) -> Result<(), Refusal> {
    let longest = request.compare.len().max(request.success.len()).max(request.failure.len());
    let left = most.checked_sub(longest).ok_or(Refusal::TooManyOperations)?;
    if request.compare.iter().any(|compare| compare.key.is_empty()) {
        return Err(Refusal::EmptyKey);
    }
    for op in request.success.iter().chain(&request.failure) {
        match &op.request {
            Some(PbTxnOpRequest::RequestRange(range)) => check_range(range)?,
            Some(PbTxnOpRequest::RequestPut(put)) => check_put(put)?,
            Some(PbTxnOpRequest::RequestDeleteRange(delete)) => check_delete(delete)?,
            Some(PbTxnOpRequest::RequestTxn(txn)) => check_lists(txn, left)?,
            // What the request says was not understood.
            None => return Err(Refusal::KeyNotFound),
        }
    }
    Ok(())
}

/// What a list of operations writes.
#[derive(Default)]
struct Written {
    puts: BTreeSet<Vec<u8>>,
    deletes: Vec<Range>,
}

/// Refuses lists that put a key twice, or put one and delete it, as far as etcd sees it: the two sides of a transaction
/// have nothing to do with each other, and what a later transaction within the list deletes an earlier one may put.
fn written(ops: &[PbTxnRequestOp]) -> Result<Written, Refusal> {
    let mut all = Written::default();
    for op in ops {
        if let Some(PbTxnOpRequest::RequestDeleteRange(delete)) = &op.request {
            all.deletes.push(Range::new(&delete.key, &delete.range_end));
        }
    }
    for op in ops {
        if let Some(PbTxnOpRequest::RequestTxn(txn)) = &op.request {
            let (then, or_else) = (written(&txn.success)?, written(&txn.failure)?);
            let twice = |key: &Vec<u8>| all.puts.contains(key) || deletes_key(&all.deletes, key);
            if then.puts.iter().chain(&or_else.puts).any(twice) {
                return Err(Refusal::DuplicateKey);
            }
            all.puts.extend(then.puts.into_iter().chain(or_else.puts));
            all.deletes.extend(then.deletes.into_iter().chain(or_else.deletes));
        }
    }
    for op in ops {
        let Some(PbTxnOpRequest::RequestPut(put)) = &op.request else { continue };
        if deletes_key(&all.deletes, &put.key) || !all.puts.insert(put.key.clone()) {
            return Err(Refusal::DuplicateKey);
        }
    }
    Ok(all)
}

/// Whether one of the ranges is seen to delete a key. As etcd: a range to the end of all keys is taken for one that ends
/// before it begins, and so for empty.
fn deletes_key(ranges: &[Range], key: &[u8]) -> bool {
    ranges.iter().any(|range| match range.end.as_slice() {
        [] => range.key == key,
        end => range.key.as_slice() <= key && key < end,
    })
}

// === application ===

/// Which way a transaction goes, and those within it: decided before anything of it is written.
struct Path {
    succeeded: bool,
    inner: Vec<Path>,
}

impl Apply<'_> {
    pub(super) fn range(&self, request: &PbRangeRequest) -> Result<PbRangeResponse, Refusal> {
        let mut response = self.store.range(request)?;
        response.header = self.header();
        Ok(response)
    }

    pub(super) fn put(&mut self, request: &PbPutRequest) -> Result<PbPutResponse, Refusal> {
        // Alone, a put is checked in another order than in a transaction.
        self.check_lease(request)?;
        self.check_put_applies(request)?;
        Ok(self.apply_put(request))
    }

    pub(super) fn delete(&mut self, request: &PbDeleteRequest) -> PbDeleteResponse {
        let deleted = self.store.delete(&Range::new(&request.key, &request.range_end));
        for kv in &deleted {
            self.leases.detach(kv.lease, &kv.key);
        }
        let count = i64::try_from(deleted.len()).unwrap_or(i64::MAX);
        let before = deleted.iter().filter(|_| request.prev_kv).map(|kv| PbKeyValue::clone(kv));
        PbDeleteResponse { header: self.header(), deleted: count, prev_kvs: before.collect() }
    }

    pub(super) fn txn(&mut self, request: &PbTxnRequest) -> Result<PbTxnResponse, Refusal> {
        let path = self.path(request);
        self.check_applies(request, &path)?;
        let mut response = self.run(request, &path)?;
        response.header = self.header();
        Ok(response)
    }

    #[allow(clippy::unnecessary_wraps)] // The field it goes to is an option.
    fn header(&self) -> Option<PbResponseHeader> {
        Some(PbResponseHeader { revision: self.store.revision(), ..PbResponseHeader::default() })
    }

    fn path(&self, request: &PbTxnRequest) -> Path {
        let succeeded = request.compare.iter().all(|compare| self.holds(compare));
        let inner = chosen(request, succeeded).iter().filter_map(|op| match &op.request {
            Some(PbTxnOpRequest::RequestTxn(txn)) => Some(self.path(txn)),
            _ => None,
        });
        Path { succeeded, inner: inner.collect() }
    }

    fn holds(&self, compare: &PbCompare) -> bool {
        /// What the numbers of a compare's target mean.
        const VALUE: i32 = 3;
        let range = Range::new(&compare.key, &compare.range_end);
        let mut found = self.store.now(&range).peekable();
        if found.peek().is_none() {
            // A value that is not there is like no other.
            return compare.target != VALUE && matches(compare, &PbKeyValue::default());
        }
        found.all(|kv| matches(compare, kv))
    }

    /// Refuses the whole transaction for what would fail in the middle of it: as etcd, for its puts first.
    fn check_applies(&self, request: &PbTxnRequest, path: &Path) -> Result<(), Refusal> {
        let mut ops = Vec::new();
        flatten(request, path, &mut ops);
        for op in &ops {
            if let PbTxnOpRequest::RequestPut(put) = op {
                self.check_put_applies(put)?;
            }
        }
        for op in &ops {
            if let PbTxnOpRequest::RequestRange(range) = op {
                self.store.check_revision(range.revision)?;
            }
        }
        Ok(())
    }

    fn check_put_applies(&self, put: &PbPutRequest) -> Result<(), Refusal> {
        if (put.ignore_value || put.ignore_lease) && self.store.get(&put.key).is_none() {
            return Err(Refusal::KeyNotFound);
        }
        self.check_lease(put)
    }

    fn check_lease(&self, put: &PbPutRequest) -> Result<(), Refusal> {
        if put.lease != 0 && !self.leases.has(put.lease) {
            return Err(Refusal::LeaseNotFound);
        }
        Ok(())
    }

    fn run(&mut self, request: &PbTxnRequest, path: &Path) -> Result<PbTxnResponse, Refusal> {
        let mut responses = Vec::new();
        let mut inner = path.inner.iter();
        for op in chosen(request, path.succeeded) {
            let response = match &op.request {
                Some(PbTxnOpRequest::RequestRange(range)) => {
                    PbTxnOpResponse::ResponseRange(self.range(range)?)
                }
                Some(PbTxnOpRequest::RequestPut(put)) => PbTxnOpResponse::ResponsePut(self.apply_put(put)),
                Some(PbTxnOpRequest::RequestDeleteRange(delete)) => {
                    PbTxnOpResponse::ResponseDeleteRange(self.delete(delete))
                }
                Some(PbTxnOpRequest::RequestTxn(txn)) => {
                    let Some(path) = inner.next() else { continue };
                    PbTxnOpResponse::ResponseTxn(self.run(txn, path)?)
                }
                None => continue,
            };
            responses.push(PbResponseOp { response: Some(response) });
        }
        let header = Some(PbResponseHeader::default());
        Ok(PbTxnResponse { header, succeeded: path.succeeded, responses })
    }

    fn apply_put(&mut self, put: &PbPutRequest) -> PbPutResponse {
        let old = self.store.get(&put.key).cloned();
        let old_lease = old.as_ref().map_or(0, |kv| kv.lease);
        let value = match &old {
            Some(kv) if put.ignore_value => kv.value.clone(),
            _ => put.value.clone(),
        };
        let lease = if put.ignore_lease { old_lease } else { put.lease };
        self.store.put(&put.key, value, lease);
        self.leases.detach(old_lease, &put.key);
        self.leases.attach(lease, &put.key);
        let prev_kv = old.filter(|_| put.prev_kv).map(|kv| PbKeyValue::clone(&kv));
        PbPutResponse { header: self.header(), prev_kv }
    }
}

fn chosen(request: &PbTxnRequest, succeeded: bool) -> &[PbTxnRequestOp] {
    if succeeded { &request.success } else { &request.failure }
}

/// The operations on a path, those of inner transactions included.
fn flatten<'a>(request: &'a PbTxnRequest, path: &Path, ops: &mut Vec<&'a PbTxnOpRequest>) {
    let mut inner = path.inner.iter();
    for op in chosen(request, path.succeeded).iter().filter_map(|op| op.request.as_ref()) {
        match op {
            PbTxnOpRequest::RequestTxn(txn) => {
                if let Some(path) = inner.next() {
                    flatten(txn, path, ops);
                }
            }
            op => ops.push(op),
        }
    }
}

/// Whether a key is as a compare wants it; the numbers are etcd's.
fn matches(compare: &PbCompare, kv: &PbKeyValue) -> bool {
    let target = compare.target_union.as_ref();
    let order = match compare.target {
        0 => kv.version.cmp(&match target {
            Some(PbTargetUnion::Version(version)) => *version,
            _ => 0,
        }),
        1 => kv.create_revision.cmp(&match target {
            Some(PbTargetUnion::CreateRevision(revision)) => *revision,
            _ => 0,
        }),
        2 => kv.mod_revision.cmp(&match target {
            Some(PbTargetUnion::ModRevision(revision)) => *revision,
            _ => 0,
        }),
        3 => kv.value.as_slice().cmp(match target {
            Some(PbTargetUnion::Value(value)) => value.as_slice(),
            _ => &[],
        }),
        4 => kv.lease.cmp(&match target {
            Some(PbTargetUnion::Lease(lease)) => *lease,
            _ => 0,
        }),
        _ => std::cmp::Ordering::Equal,
    };
    match compare.result {
        0 => order.is_eq(),
        1 => order.is_gt(),
        2 => order.is_lt(),
        3 => order.is_ne(),
        _ => true,
    }
}
