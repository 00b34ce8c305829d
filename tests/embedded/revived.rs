//! A lease that was granted twice: a copy of the grant arrives when the lease is over, and brings its id back with none of
//! its keys. What was sent on the lease before and arrives only then does nothing, and who goes on with it finds out.

mod late;
mod next;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use etcd_client::{Channel, Client};
use etcd_recipes::embedded::{Fault, Injection, Key, Link, Server};
use etcd_recipes::{Session, SessionState};
use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::time::{sleep, timeout};
use tonic::Status;
use tonic::body::Body;
use tower::util::BoxCloneSyncService;
use tower::{BoxError, Service};

const TTL: Duration = Duration::from_secs(60);
/// Longer than anything takes that is not stuck, and less than the lease would live by itself.
const SOON: Duration = Duration::from_secs(10);
/// Until what was let go has arrived.
const MOMENT: Duration = Duration::from_millis(1);

/// A link on which transactions are counted.
#[derive(Clone)]
struct Counted {
    link: Link,
    txns: Arc<AtomicUsize>,
}

impl Counted {
    /// More than that are a hot loop, in which a paused clock would stand still for ever.
    const MOST: usize = 200;
}

impl Service<http::Request<Body>> for Counted {
    type Response = http::Response<Body>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Self::Response, BoxError>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.link.poll_ready(cx)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let is_txn = request.uri().path().ends_with("/Txn");
        if is_txn && self.txns.fetch_add(1, Ordering::Relaxed) >= Self::MOST {
            return async {
                sleep(Duration::from_secs(1)).await;
                Err(Status::unavailable("too many").into())
            }
            .boxed();
        }
        self.link.call(request)
    }
}

/// A session whose first grant is still on its way.
struct Stage {
    server: Server,
    link: Link,
    session: Session,
    lease: i64,
    grant: Injection,
    txns: Arc<AtomicUsize>,
}

impl Stage {
    async fn begin() -> Self {
        let server = Server::start();
        Self::begin_over(server.link(), server).await
    }

    async fn begin_over(link: Link, server: Server) -> Self {
        let grant = link.inject("LeaseGrant", Fault::Hold, 1);
        let txns = Arc::default();
        let counted = Counted { link: link.clone(), txns: Arc::clone(&txns) };
        let client = Client::from_channel(Channel::Custom(BoxCloneSyncService::new(counted)), None);
        let builder = Session::builder_with_client(client.await.unwrap()).seed(1).ttl(TTL);
        let session = builder.connect().await.unwrap();
        assert_eq!(grant.hits(), 1);
        let lease = session.lease_id().unwrap();
        Self { server, link, session, lease, grant, txns }
    }

    /// Another session.
    async fn other(&self) -> Session {
        self.server.session(&self.server.link()).await.unwrap().seed(2).connect().await.unwrap()
    }

    /// Does `work`, whose first request stays on its way.
    async fn late<T>(&self, work: impl Future<Output = T>) -> (T, Injection) {
        let held = self.link.inject("Txn", Fault::Hold, 1);
        let done = timeout(SOON, work).await.expect("it is stuck");
        assert_eq!(held.hits(), 1);
        (done, held)
    }

    /// The lease is over, and comes back.
    async fn revive(&self) {
        assert!(self.server.expire(self.lease));
        self.come_back().await;
    }

    async fn come_back(&self) {
        self.grant.release();
        sleep(MOMENT).await;
        assert!(self.server.leases().contains(&self.lease), "it does not come back");
    }

    /// The lease is over and comes back, and the session hears nothing of it.
    async fn revive_unheard(&self) {
        self.link.stall();
        self.revive().await;
        self.link.restore();
        self.txns.store(0, Ordering::Relaxed);
    }

    /// How many transactions the session has sent since its lease came back: hardly any.
    fn no_hot_loop(&self, case: &str) {
        let txns = self.txns.load(Ordering::Relaxed);
        assert!(txns <= 16, "{case}: {txns} transactions");
    }

    async fn second_generation(&self) {
        let mut state = self.session.watch_state();
        let next = state.wait_for(|state| *state == SessionState::Connected { generation: 2 });
        timeout(SOON * 4, next).await.expect("there is no second generation").unwrap();
        assert_ne!(self.session.lease_id(), Some(self.lease));
    }

    /// What is there, but for bookkeeping.
    fn keys(&self) -> Vec<Key> {
        let slot = |key: &Key| key.key.windows(4).any(|part| part == b"/op/");
        self.server.keys("").into_iter().filter(|key| !slot(key)).collect()
    }

    /// Everything is over; nothing may be left.
    async fn end(self) {
        timeout(SOON, self.session.close()).await.expect("it does not close").unwrap();
        sleep(TTL + Duration::from_secs(1)).await;
        let left: Vec<_> = self.server.keys("").into_iter().filter(|key| key.lease != 0).collect();
        assert!(left.is_empty(), "left: {left:?}");
    }
}

/// What is done, over with it or not, when the lease ends.
#[derive(Debug, Clone, Copy)]
enum What {
    Lock,
    TryLock,
    Campaign,
    GuardedTxn,
    Publish,
    Enqueue,
    EnqueueAll,
    Claim,
    Register,
}

const ALL: [What; 9] = [
    What::Lock,
    What::TryLock,
    What::Campaign,
    What::GuardedTxn,
    What::Publish,
    What::Enqueue,
    What::EnqueueAll,
    What::Claim,
    What::Register,
];
