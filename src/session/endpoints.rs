//! The members of the cluster, one connection each, and which of them is used now.
//!
//! A balanced channel over all members would send a share of the calls to a dead one and fail them at once. Here calls
//! stay with one member until it fails, and then go to the next.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use etcd_client::{Client, KvClient};
use tokio::sync::{OnceCell, oneshot};
use tokio::time::Instant;

use super::dial::{CONNECT_LIMIT, Dial};
use super::login::{LoggedIn, Logins};
use super::runtime::{Backoff, Runtime};

/// The largest answer, in bytes. etcd's own have no limit, and the client's default is 4 MiB.
const MAX_ANSWER: usize = 256 * 1024 * 1024;

/// How many clients of a member are kept for the next requests.
const IDLE: usize = 64;

/// A set of connections. A session has two: one for requests and watches, one for keepalives, so that a burst of data
/// on the first cannot delay the second.
pub(crate) struct Endpoints {
    members: Vec<Arc<Member>>,
    current: AtomicUsize,
    /// How connections are made, and where they run; `None` for a client that the user made.
    dial: Option<(Arc<Dial>, Arc<Runtime>)>,
}

struct Member {
    name: String,
    client: OnceCell<Client>,
    /// Used before, and again by the next request: to make one costs more than to use it.
    idle: Mutex<Idle>,
    /// How many transactions and reads are on their way or being answered.
    under_way: Arc<AtomicUsize>,
    logins: Arc<Logins>,
}

/// Boxed, because a client is moved about, and large.
type Idle = Vec<Box<KvClient>>;

impl Endpoints {
    /// Connections of our own, made when they are first used.
    pub(crate) fn dial(names: &[String], dial: Dial, runtime: Arc<Runtime>) -> Self {
        let member = |name: &String| Member::new(name.clone(), OnceCell::new());
        let members = names.iter().map(member).collect();
        Self { members, current: AtomicUsize::new(0), dial: Some((Arc::new(dial), runtime)) }
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
        if member.client.get().is_none() {
            // Boxed, because it is large and rarely runs, and every request's future contains it.
            Box::pin(self.connect(member)).await?;
        }
        member.client.get().ok_or_else(no_client)
    }

    /// Renews the token that member `index` refused to a request begun at `begun`. After that it may be made again at once.
    pub(crate) async fn renew_token(
        &self,
        index: usize,
        begun: Instant,
        limit: Duration,
        runtime: &Runtime,
    ) -> LoggedIn {
        let member = self.member(index);
        let Some(client) = member.client.get() else { return LoggedIn::No };
        let outcome = member.logins.after(begun, client, limit, runtime).await;
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

    fn member(&self, index: usize) -> &Arc<Member> {
        &self.members[index % self.members.len()]
    }

    /// Connects in a task: whoever asks first may not be polled any more, and others wait as well.
    async fn connect(&self, member: &Arc<Member>) -> Result<(), etcd_client::Error> {
        // A client that the user made is there from the beginning.
        let (dial, runtime) = self.dial.as_ref().ok_or_else(no_client)?;
        let (answer, answered) = oneshot::channel();
        let (dial, member, in_runtime) = (dial.clone(), member.clone(), runtime.clone());
        runtime.spawn_connection(async move {
            let connect = || dial.member(&member.name, in_runtime, member.under_way.clone());
            let connected = tokio::time::timeout(CONNECT_LIMIT, member.client.get_or_try_init(connect)).await;
            let connected = connected.unwrap_or_else(|_| Err(no_client()));
            let _ = answer.send(connected.map(|_| ()));
        });
        answered.await.unwrap_or_else(|_| Err(no_client()))
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

/// No connection can be made, or none in time.
fn no_client() -> etcd_client::Error {
    etcd_client::Error::IoError(std::io::ErrorKind::NotConnected.into())
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
    fn new(name: String, client: OnceCell<Client>) -> Arc<Self> {
        let (idle, under_way, logins) = (Mutex::default(), Arc::default(), Arc::default());
        Arc::new(Self { name, client, idle, under_way, logins })
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
