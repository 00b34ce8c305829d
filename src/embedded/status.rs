//! Refusals, in etcd's words: clients recognise them by their message.

use tonic::{Code, Status};

/// Why a request is refused. Nothing of it was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    EmptyKey,
    KeyNotFound,
    ValueProvided,
    LeaseProvided,
    TooManyOperations,
    DuplicateKey,
    InvalidSort,
    Compacted,
    FutureRevision,
    LeaseNotFound,
    LeaseExists,
    TtlTooLarge,
    RequestTooLarge,
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let (code, message) = match refusal {
            Refusal::EmptyKey => (Code::InvalidArgument, "key is not provided"),
            Refusal::KeyNotFound => (Code::InvalidArgument, "key not found"),
            Refusal::ValueProvided => (Code::InvalidArgument, "value is provided"),
            Refusal::LeaseProvided => (Code::InvalidArgument, "lease is provided"),
            Refusal::TooManyOperations => (Code::InvalidArgument, "too many operations in txn request"),
            Refusal::DuplicateKey => (Code::InvalidArgument, "duplicate key given in txn request"),
            Refusal::InvalidSort => (Code::InvalidArgument, "invalid sort option"),
            Refusal::Compacted => (Code::OutOfRange, "mvcc: required revision has been compacted"),
            Refusal::FutureRevision => (Code::OutOfRange, "mvcc: required revision is a future revision"),
            Refusal::LeaseNotFound => (Code::NotFound, "requested lease not found"),
            Refusal::LeaseExists => (Code::FailedPrecondition, "lease already exists"),
            Refusal::TtlTooLarge => (Code::OutOfRange, "too large lease TTL"),
            Refusal::RequestTooLarge => (Code::InvalidArgument, "request is too large"),
        };
        Status::new(code, format!("etcdserver: {message}"))
    }
}
