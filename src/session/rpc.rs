//! Requests to etcd: a deadline for each attempt, and what its failure means.
//!
//! The one question after a failure is whether the request may still be applied. Only an answer that etcd itself gave,
//! with a message known to be a refusal, says no. A timeout, a lost connection, a leader change: the request may be
//! applied later, even seconds later.

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use etcd_client::proto::{PbResponseOp, PbTxnOpResponse};
use etcd_client::{Client, GetOptions, GetResponse, KeyValue, ResponseHeader, Txn, TxnResponse};
use futures::future::BoxFuture;
use tokio::time::Instant;

use super::endpoints::Endpoints;
use super::login::LoggedIn;
use super::runtime::{Backoff, Runtime};
use crate::error::{Error, Result};
use crate::name;

/// How long a read for the caller is tried before it fails as unreachable.
pub(crate) const READ_LIMIT: Duration = Duration::from_secs(10);

/// What each byte adds to the longest time of an attempt. With this, one at etcd's limit may take some 15 s, and a member
/// that is silent is not given up earlier.
const PER_BYTE: Duration = Duration::from_micros(10);

/// Why an attempt has no answer to use.
#[derive(Debug)]
pub(crate) enum Failure {
    /// A lease of the request does not exist (any more). Not applied.
    LeaseGone(etcd_client::Error),
    /// The lease id is taken. Not applied.
    LeaseExists,
    /// Not applied, and sending it again would not help.
    Refused(Error),
    /// Not applied; another attempt may succeed.
    Again(etcd_client::Error),
    /// Not applied, because the token is not accepted (any more).
    Login(etcd_client::Error),
    /// No answer (`None`), or one that does not tell: may still be applied.
    Unknown(Option<etcd_client::Error>),
}

impl Failure {
    /// Whether the attempt may have been applied, or may be yet. What is sent again after such a one has to find out.
    pub(crate) fn is_unanswered(&self) -> bool {
        matches!(self, Failure::Unknown(_))
    }

    /// The error of a write of `key` that is not sent again.
    pub(crate) fn for_good(self, key: &[u8]) -> Error {
        let key = name::display(key);
        match self {
            Failure::Refused(error) => error,
            Failure::Again(source) | Failure::Login(source) | Failure::LeaseGone(source) => {
                Error::Etcd { key, source }
            }
            Failure::Unknown(_) | Failure::LeaseExists => Error::OutcomeUnknown { key },
        }
    }
}

/// Sends requests to the member of choice.
#[derive(Debug)]
pub(crate) struct Rpc {
    pub(crate) endpoints: Endpoints,
    pub(crate) runtime: Arc<Runtime>,
    /// The longest one attempt may take, if it is small.
    pub(crate) timeout: Duration,
    /// Whether the client can, or might, log in again when its token is refused.
    pub(crate) has_user: bool,
    /// A key to read when only the answer's header is wanted.
    pub(crate) probe: Vec<u8>,
}

impl Rpc {
    /// Sends a small transaction once, and once more if its token was refused. `key` is what an error speaks of.
    pub(crate) fn txn<'a>(
        &'a self,
        key: &'a [u8],
        txn: Txn,
    ) -> impl Future<Output = Result<TxnResponse, Failure>> + Send + 'a {
        self.txn_of(0, key, txn)
    }

    /// The same with one of this many bytes: on a slow link they take their time.
    pub(crate) async fn txn_of(
        &self,
        bytes: usize,
        key: &[u8],
        mut txn: Txn,
    ) -> Result<TxnResponse, Failure> {
        let limit = self.timeout + PER_BYTE * u32::try_from(bytes).unwrap_or(u32::MAX);
        let mut again = self.has_user.then(|| Box::new(txn.clone()));
        loop {
            let (member, begun) = (self.endpoints.current(), Instant::now());
            let answer = {
                let call = pin!(async {
                    let mut request = self.endpoints.request(member).await?;
                    let answer = request.kv.txn(txn).await?;
                    request.answered();
                    Ok(answer)
                });
                self.bounded(member, key, limit, call).await
            };
            match (answer, again.take()) {
                (Err(Failure::Login(_)), Some(same)) if self.renew_token(member, begun).await? => txn = *same,
                (answer, _) => return answer,
            }
        }
    }

    /// Reads until etcd answers, linearizably. `limit` bounds the time; without one the caller does.
    pub(crate) async fn get(
        &self,
        key: &[u8],
        options: GetOptions,
        limit: Option<Duration>,
    ) -> Result<GetResponse> {
        let read = async {
            let mut backoff = Backoff::of_requests();
            loop {
                let (member, begun) = (self.endpoints.current(), Instant::now());
                // The attempt must be gone before the pause: it may hold what others wait for.
                let answer = {
                    let call = pin!(async {
                        let mut request = self.endpoints.request(member).await?;
                        let answer = request.kv.get(key, Some(options.clone())).await?;
                        request.answered();
                        Ok(answer)
                    });
                    self.bounded(member, key, self.timeout, call).await
                };
                match answer {
                    Ok(response) => return Ok(response),
                    Err(Failure::Refused(error)) => return Err(error),
                    Err(Failure::Login(_)) => match self.renew_token(member, begun).await {
                        Ok(true) => {}
                        Err(Failure::Refused(error)) => return Err(error),
                        _ => backoff.wait(&self.runtime).await,
                    },
                    Err(_) => backoff.wait(&self.runtime).await,
                }
            }
        };
        match limit {
            None => read.await,
            Some(limit) => {
                tokio::time::timeout(limit, read).await.unwrap_or_else(|_| Err(self.unreachable(limit, None)))
            }
        }
    }

    pub(crate) fn unreachable(&self, waited: Duration, source: Option<etcd_client::Error>) -> Error {
        Error::Unreachable { endpoints: self.endpoints.names(), waited, source }
    }

    /// Makes one attempt of a request, through the current member, and another if its token was refused.
    pub(crate) async fn attempt<T, F>(&self, key: &[u8], call: impl Fn(&Client) -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let mut again = true;
        loop {
            let (member, begun) = (self.endpoints.current(), Instant::now());
            let answer = {
                let call = pin!(async {
                    let client = self.endpoints.client(member).await?;
                    call(client).await
                });
                self.bounded(member, key, self.timeout, call).await
            };
            match answer {
                Err(Failure::Login(_)) if again && self.renew_token(member, begun).await? => again = false,
                answer => return answer,
            }
        }
    }

    /// Waits for an attempt, and finds out what its failure means. The attempt is pinned, because it is large, and each
    /// function it is handed to would copy it.
    async fn bounded<T>(
        &self,
        member: usize,
        key: &[u8],
        limit: Duration,
        attempt: Pin<&mut impl Future<Output = Result<T, etcd_client::Error>>>,
    ) -> Result<T, Failure> {
        let failure = match tokio::time::timeout(limit, attempt).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(error)) => classify(key, error, self.has_user),
            Err(_) => Failure::Unknown(None),
        };
        tracing::debug!(key = %name::display(key), ?failure, "attempt failed");
        match &failure {
            Failure::Again(_) | Failure::Unknown(_) => self.endpoints.avoid(member),
            Failure::LeaseGone(_) | Failure::LeaseExists | Failure::Login(_) | Failure::Refused(_) => {}
        }
        Err(failure)
    }

    /// Renews a token that was refused to a request begun at `begun`; true if it may be made again at once. Where each change
    /// of users and permissions makes every token void, and there are many of them, that moment is all there is.
    ///
    /// # Errors
    ///
    /// [`Error::AuthFailed`], as a refusal, when etcd does not accept the password any more.
    pub(crate) fn renew_token(&self, member: usize, begun: Instant) -> BoxFuture<'_, Result<bool, Failure>> {
        // Boxed, because it is large and rarely runs, and every request's future contains it.
        Box::pin(async move {
            if !self.has_user {
                return Ok(false);
            }
            match self.endpoints.renew_token(member, begun, self.timeout, &self.runtime).await {
                LoggedIn::Yes => Ok(true),
                LoggedIn::No => Ok(false),
                LoggedIn::Refused(status) => {
                    let source = etcd_client::Error::GRpcStatus(status);
                    Err(Failure::Refused(Error::AuthFailed { source }))
                }
            }
        })
    }

    /// The same for a stream, which tells nobody of a refusal.
    pub(crate) async fn renews_token(&self, member: usize, begun: Instant) -> bool {
        self.renew_token(member, begun).await.unwrap_or(false)
    }
}

/// Decides what a failed attempt means.
pub(crate) fn classify(key: &[u8], error: etcd_client::Error, has_user: bool) -> Failure {
    let etcd_client::Error::GRpcStatus(status) = &error else {
        return match error {
            // Found before anything is sent: an option of the user's is wrong.
            etcd_client::Error::InvalidArgs(_) | etcd_client::Error::InvalidUri(_) => {
                Failure::Refused(Error::InvalidOption { option: "endpoints", reason: error.to_string() })
            }
            other => Failure::Unknown(Some(other)),
        };
    };
    let refused = |source| Failure::Refused(Error::Etcd { key: name::display(key), source });
    let Some(message) = status.message().strip_prefix("etcdserver: ") else {
        // Said by the server's gRPC layer, before etcd sees the request.
        let too_large = status.message().starts_with("grpc: received message larger than max");
        return if too_large { refused(error) } else { Failure::Unknown(Some(error)) };
    };
    match message {
        "requested lease not found" => Failure::LeaseGone(error),
        "lease already exists" => Failure::LeaseExists,
        "mvcc: database space exceeded" => Failure::Refused(Error::NoSpace { key: name::display(key) }),
        "permission denied" => {
            Failure::Refused(Error::PermissionDenied { key: name::display(key), source: error })
        }
        "authentication failed, invalid user ID or password" | "authentication is not enabled" => {
            Failure::Refused(Error::AuthFailed { source: error })
        }
        _ if !has_user && is_user_missing(&error) => Failure::Refused(Error::AuthFailed { source: error }),
        _ if is_token_refused(&error) => Failure::Login(error),
        "too many requests" | "rpc not supported for learner" => Failure::Again(error),
        "request is too large"
        | "too many operations in txn request"
        | "duplicate key given in txn request"
        | "key is not provided"
        | "too large lease TTL"
        | "mvcc: required revision has been compacted"
        | "mvcc: required revision is a future revision" => refused(error),
        _ => Failure::Unknown(Some(error)),
    }
}

/// What etcd says to a client that has no token at all.
const NO_USER: &str = "etcdserver: user name is empty";

/// Whether etcd asks for another token.
pub(crate) fn is_token_refused(error: &etcd_client::Error) -> bool {
    let refusals = [NO_USER, "etcdserver: invalid auth token", "etcdserver: revision of auth store is old"];
    matches!(error, etcd_client::Error::GRpcStatus(status) if refusals.contains(&status.message()))
}

/// Whether the client has no user, where one is needed.
pub(crate) fn is_user_missing(error: &etcd_client::Error) -> bool {
    matches!(error, etcd_client::Error::GRpcStatus(status) if status.message() == NO_USER)
}

/// The revision of the store when it gave the answer; 0 when it did not say.
pub(crate) fn revision(header: Option<&ResponseHeader>) -> i64 {
    header.map_or(0, ResponseHeader::revision)
}

/// The answer of a range among the answers of a transaction.
pub(crate) struct RangeAnswer<'a>(&'a etcd_client::proto::PbRangeResponse);

impl<'a> RangeAnswer<'a> {
    /// The answer to operation `index`, if that was a range.
    pub(crate) fn of(responses: &'a [PbResponseOp], index: usize) -> Option<Self> {
        match responses.get(index)?.response.as_ref()? {
            PbTxnOpResponse::ResponseRange(range) => Some(Self(range)),
            _ => None,
        }
    }

    pub(crate) fn more(&self) -> bool {
        self.0.more
    }

    pub(crate) fn count(&self) -> i64 {
        self.0.count
    }

    /// The first key and its value.
    pub(crate) fn first_value(&self) -> Option<(KeyFacts, Vec<u8>)> {
        Some((self.keys().next()?, self.0.kvs.first()?.value.clone()))
    }

    /// What is told of each key beside its value.
    pub(crate) fn keys(&self) -> impl Iterator<Item = KeyFacts> + 'a {
        self.0.kvs.iter().map(|kv| KeyFacts {
            key: kv.key.clone(),
            create_revision: kv.create_revision,
            mod_revision: kv.mod_revision,
            lease: kv.lease,
        })
    }
}

/// What etcd tells of a key beside its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct KeyFacts {
    pub(crate) key: Vec<u8>,
    pub(crate) create_revision: i64,
    pub(crate) mod_revision: i64,
    pub(crate) lease: i64,
}

impl From<&KeyValue> for KeyFacts {
    fn from(kv: &KeyValue) -> Self {
        Self {
            key: kv.key().to_vec(),
            create_revision: kv.create_revision(),
            mod_revision: kv.mod_revision(),
            lease: kv.lease(),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
impl Rpc {
    /// To a server that never answers: connections are taken by the kernel, as long as the listener lives.
    pub(super) async fn silent() -> (Self, std::net::TcpListener) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let client = Client::connect([listener.local_addr().unwrap().to_string()], None).await.unwrap();
        let (endpoints, runtime) = (Endpoints::given(client), Arc::new(Runtime::current()));
        let timeout = Duration::from_millis(500);
        (Self { endpoints, runtime, timeout, has_user: false, probe: Vec::new() }, listener)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// What a status with this message means, for a client with a user.
    fn meaning(message: &str) -> Failure {
        let status = tonic::Status::unknown(message);
        classify(b"key", etcd_client::Error::GRpcStatus(status), true)
    }

    #[test]
    fn what_etcd_did_not_do_is_told_by_its_words() {
        for passes in ["etcdserver: too many requests", "etcdserver: rpc not supported for learner"] {
            assert!(matches!(meaning(passes), Failure::Again(_)), "{passes}");
        }
        for login in [
            "etcdserver: invalid auth token",
            "etcdserver: user name is empty",
            "etcdserver: revision of auth store is old",
        ] {
            assert!(matches!(meaning(login), Failure::Login(_)), "{login}");
        }
        for refusal in
            ["etcdserver: request is too large", "grpc: received message larger than max (3 vs. 2)"]
        {
            assert!(matches!(meaning(refusal), Failure::Refused(Error::Etcd { .. })), "{refusal}");
        }
        let full = meaning("etcdserver: mvcc: database space exceeded");
        assert!(matches!(full, Failure::Refused(Error::NoSpace { .. })));
        assert!(matches!(meaning("etcdserver: requested lease not found"), Failure::LeaseGone(_)));
        assert!(matches!(meaning("etcdserver: lease already exists"), Failure::LeaseExists));
    }

    #[test]
    fn what_may_still_be_done_is_unknown() {
        for message in [
            "etcdserver: request timed out",
            "etcdserver: leader changed",
            "etcdserver: no leader",
            "etcdserver: server stopped",
            // Not said by etcd itself.
            "too many requests",
            "transport is closing",
        ] {
            assert!(meaning(message).is_unanswered(), "{message}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_left_of_an_attempt_while_the_next_is_waited_for() {
        let (rpc, _silent) = Rpc::silent().await;
        let mut read = pin!(rpc.get(b"key", GetOptions::new(), None));
        tokio::select! {
            biased;
            _ = &mut read => unreachable!("nobody answers"),
            () = tokio::time::sleep(rpc.timeout / 2) => assert_eq!(rpc.endpoints.under_way(0), 1),
        }
        tokio::select! {
            biased;
            _ = &mut read => unreachable!("nobody answers"),
            () = tokio::time::sleep(rpc.timeout / 2) => assert_eq!(rpc.endpoints.under_way(0), 0),
        }
    }
}
