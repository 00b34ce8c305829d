//! The members of the cluster, one connection each, and which of them is used now.
//!
//! A balanced channel over all members would send a share of the calls to a dead one and fail them at once. Here calls
//! stay with one member until it fails, and then go to the next.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use etcd_client::{Client, KvClient};
use tokio::sync::{Mutex as AsyncMutex, OnceCell};
use tokio::time::Instant;
use tonic::Status;

use super::dial::Dial;
use super::runtime::{Backoff, Runtime};

/// The largest answer, in bytes. etcd's own have no limit, and the client's default is 4 MiB.
const MAX_ANSWER: usize = 256 * 1024 * 1024;

/// How many clients of a member are kept for the next requests.
const IDLE: usize = 64;

/// A set of connections. A session has two: one for requests and watches, one for keepalives, so that a burst of data
/// on the first cannot delay the second.
pub(crate) struct Endpoints {
    members: Vec<Member>,
    current: AtomicUsize,
    /// How connections are made, and where they run; `None` for a client that the user made.
    dial: Option<(Dial, Arc<Runtime>)>,
}

struct Member {
    name: String,
    client: OnceCell<Client>,
    /// Used before, and again by the next request: to make one costs more than to use it.
    idle: Mutex<Idle>,
    /// How many transactions and reads are on their way or being answered.
    under_way: Arc<AtomicUsize>,
    /// Whoever renews the token of the client has it.
    login: AsyncMutex<Option<Login>>,
}

/// The last time that another token was asked for.
struct Login {
    at: Instant,
    outcome: LoggedIn,
}

/// What came of asking for another token.
#[derive(Debug, Clone)]
pub(crate) enum LoggedIn {
    Yes,
    /// etcd did not answer, or not now.
    No,
    /// The password is wrong, or not that of before any more.
    Refused(Status),
}

impl LoggedIn {
    fn of(error: etcd_client::Error) -> Self {
        match error {
            etcd_client::Error::GRpcStatus(status) if status.message() == WRONG_PASSWORD => {
                Self::Refused(status)
            }
            _ => Self::No,
        }
    }
}

/// What etcd says then.
const WRONG_PASSWORD: &str = "etcdserver: authentication failed, invalid user ID or password";

/// After a token was asked for, the next is not for this long: each costs etcd much.
const LOGIN_PAUSE: Duration = Duration::from_secs(1);

/// Boxed, because a client is moved about, and large.
type Idle = Vec<Box<KvClient>>;

impl Endpoints {
    /// Connections of our own, made when they are first used.
    pub(crate) fn dial(names: &[String], dial: Dial, runtime: Arc<Runtime>) -> Self {
        let member = |name: &String| Member::new(name.clone(), OnceCell::new());
        let members = names.iter().map(member).collect();
        Self { members, current: AtomicUsize::new(0), dial: Some((dial, runtime)) }
    }

    /// The one client that the user made; which member it talks to is its own affair.
    pub(crate) fn given(client: Client) -> Self {
        let member = Member::new("the given client".into(), OnceCell::new_with(Some(client)));
        Self { members: vec![member], current: AtomicUsize::new(0), dial: None }
    }

    pub(crate) fn names(&self) -> Vec<String> {
        self.members.iter().map(|member| member.name.clone()).collect()
    }

    /// The index of the member used now.
    pub(crate) fn current(&self) -> usize {
        self.current.load(Ordering::Relaxed)
    }

    /// Moves on from a member that failed, unless somebody else did already.
    pub(crate) fn avoid(&self, index: usize) {
        let next = (index + 1) % self.members.len();
        let _ = self.current.compare_exchange(index, next, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Goes on with a member that answers.
    pub(crate) fn prefer(&self, index: usize) {
        self.current.store(index, Ordering::Relaxed);
    }

    /// The client of member `index`. The first call may log in; the caller bounds its time.
    pub(crate) async fn client(&self, index: usize) -> Result<&Client, etcd_client::Error> {
        let member = self.member(index);
        // Boxed, because it is large and rarely runs, and every request's future contains it.
        let connect = || Box::pin(self.connect(member));
        member.client.get_or_try_init(connect).await
    }

    /// Renews the token that member `index` refused to a request begun at `begun`: the client does so by itself only for
    /// some of the errors that ask for it. If it could, the request may be made again at once. All that ask while there is a
    /// pause get the same token after it.
    pub(crate) async fn renew_token(&self, index: usize, begun: Instant, limit: Duration) -> LoggedIn {
        let mut login = self.member(index).login.lock().await;
        if let Some(Login { at, outcome }) = &*login {
            if *at > begun {
                return outcome.clone();
            }
            tokio::time::sleep_until(*at + LOGIN_PAUSE).await;
        }
        // The caller may give up meanwhile.
        *login = Some(Login { at: Instant::now(), outcome: LoggedIn::No });
        let renew = async { self.client(index).await?.refresh_token().await };
        let outcome = match tokio::time::timeout(limit, renew).await {
            Ok(Ok(())) => LoggedIn::Yes,
            Ok(Err(error)) => LoggedIn::of(error),
            Err(_) => LoggedIn::No,
        };
        *login = Some(Login { at: Instant::now(), outcome: outcome.clone() });
        if matches!(outcome, LoggedIn::No) {
            self.avoid(index);
        }
        outcome
    }

    /// What one request to member `index` is sent with.
    pub(crate) async fn request(&self, index: usize) -> Result<Request<'_>, etcd_client::Error> {
        let member = self.member(index);
        member.under_way.fetch_add(1, Ordering::Relaxed);
        let under_way = UnderWay(&member.under_way);
        let idle = member.idle().pop();
        let kv = match idle {
            Some(kv) => kv,
            None => Box::new(self.client(index).await?.kv_client().max_decoding_message_size(MAX_ANSWER)),
        };
        Ok(Request { member, kv, _under_way: under_way })
    }

    /// How many requests to member `index` are on their way or being answered.
    #[cfg(test)]
    pub(crate) fn under_way(&self, index: usize) -> usize {
        self.member(index).under_way.load(Ordering::Relaxed)
    }

    fn member(&self, index: usize) -> &Member {
        &self.members[index % self.members.len()]
    }

    async fn connect(&self, member: &Member) -> Result<Client, etcd_client::Error> {
        // A client that the user made is there from the beginning.
        let no_client = || etcd_client::Error::InvalidArgs("no client".into());
        let (dial, runtime) = self.dial.as_ref().ok_or_else(no_client)?;
        dial.member(&member.name, runtime.clone(), member.under_way.clone()).await
    }

    /// A client for the user's own requests, over all members. It may have to log in, and a member may be dead, so it
    /// is tried until the caller's time is up; `last` keeps the last failure.
    pub(crate) async fn for_user(&self, runtime: &Runtime, last: &mut Option<etcd_client::Error>) -> Client {
        let mut backoff = Backoff::of_requests();
        loop {
            let connected = match &self.dial {
                None => self.client(0).await.cloned(),
                Some((dial, _)) => Box::pin(dial.all(&self.names())).await,
            };
            match connected {
                Ok(client) => return client,
                Err(error) => *last = Some(error),
            }
            backoff.wait(runtime).await;
        }
    }
}

/// A request to one member.
pub(crate) struct Request<'a> {
    pub(crate) kv: Box<KvClient>,
    member: &'a Member,
    _under_way: UnderWay<'a>,
}

/// Counts one request while it exists.
struct UnderWay<'a>(&'a AtomicUsize);

impl Request<'_> {
    /// The next request may use the client. Only when it was answered: another may have a place reserved on the way to
    /// the connection.
    pub(crate) fn answered(self) {
        let mut idle = self.member.idle();
        if idle.len() < IDLE {
            idle.push(self.kv);
        }
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Member {
    fn new(name: String, client: OnceCell<Client>) -> Self {
        Self { name, client, idle: Mutex::default(), under_way: Arc::default(), login: AsyncMutex::default() }
    }

    fn idle(&self) -> MutexGuard<'_, Idle> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// By hand: what the connections are made with holds a password.
impl std::fmt::Debug for Endpoints {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Endpoints").field("members", &self.names()).finish_non_exhaustive()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_a_client_whose_request_was_answered_is_used_again() {
        // Nothing is sent before the first request.
        let endpoints = Endpoints::given(Client::connect(["127.0.0.1:1"], None).await.unwrap());
        let member = endpoints.member(0);
        let state = || (member.idle().len(), endpoints.under_way(0));
        let (given_up, answered) = (endpoints.request(0).await.unwrap(), endpoints.request(0).await.unwrap());
        assert_eq!(state(), (0, 2));
        drop(given_up);
        assert_eq!(state(), (0, 1));
        answered.answered();
        assert_eq!(state(), (1, 0));
        let again = endpoints.request(0).await.unwrap();
        assert_eq!(state(), (0, 1));
        drop(again);
    }
}
