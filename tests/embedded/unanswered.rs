//! Writes whose answer is still awaited when the lease ends: each may have been applied, and says so.

use std::time::Duration;

use etcd_client::{Txn, TxnOp};
use etcd_recipes::embedded::{Fault, Link, Server};
use etcd_recipes::{Election, Error, Mutex, Queue, Session};
use tokio::time::{Instant, sleep_until};

pub(super) async fn begin() -> (Server, Link, Session) {
    let server = Server::start();
    let link = server.link();
    let session = server.session(&link).await.unwrap().ttl(Duration::from_secs(5)).connect().await.unwrap();
    (server, link, session)
}

/// Waits until something was written after this revision.
pub(super) async fn applied(server: &Server, before: i64) {
    let applied = async {
        while server.revision() == before {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(2), applied).await.expect("it is not applied");
}

/// Where a write stands when the lease ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    /// Its first request was given up, and it is sent again and again.
    Resent,
    /// Its first request is still waited for.
    UnderWay,
}

/// A session that is about to lose its lease.
struct Stage {
    server: Server,
    link: Link,
    session: Session,
    when: When,
    began: Instant,
}

impl Stage {
    async fn begin(when: When) -> Self {
        let began = Instant::now();
        let (server, link, session) = match when {
            When::Resent => begin().await,
            When::UnderWay => {
                let (server, second) = (Server::start(), Duration::from_secs(1));
                let link = server.link();
                // Never renewed, so it is known when the lease ends.
                link.inject("LeaseKeepAlive", Fault::Refuse, usize::MAX);
                let session = server.session(&link).await.unwrap().ttl(second).connect().await.unwrap();
                (server, link, session)
            }
        };
        Self { server, link, session, when, began }
    }

    /// Runs `write` so that it is applied and its answer never comes: the link stalls, the lease ends, the link works
    /// again.
    async fn without_answer<T: Send + 'static>(
        &self,
        write: impl Future<Output = Result<T, Error>> + Send + 'static,
    ) -> Result<T, Error> {
        if self.when == When::UnderWay {
            // A request may take half a second, and the lease ends after 900 ms.
            sleep_until(self.began + Duration::from_millis(600)).await;
        }
        let held = self.link.inject("Txn", Fault::Hold, 1);
        let write = tokio::spawn(write);
        held.hit(1).await;
        let before = self.server.revision();
        self.link.stall();
        held.release();
        applied(&self.server, before).await;
        assert!(self.session.is_alive());
        tokio::time::sleep(Duration::from_secs(20)).await;
        self.link.clear();
        self.link.restore();
        tokio::time::timeout(Duration::from_secs(60), write).await.expect("it never ends").unwrap()
    }
}

#[tokio::test(start_paused = true)]
async fn an_item_is_not_enqueued_again() {
    for when in [When::Resent, When::UnderWay] {
        let stage = Stage::begin(when).await;
        let queue = Queue::new(&stage.session, "queue").unwrap();
        let enqueued = stage.without_answer(async move { queue.enqueue("once").await }).await;
        assert!(matches!(enqueued, Err(Error::OutcomeUnknown { .. })), "{when:?}: {enqueued:?}");
        assert_eq!(stage.server.keys("queue/").len(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_guarded_transaction_is_not_called_lost() {
    for when in [When::Resent, When::UnderWay] {
        let stage = Stage::begin(when).await;
        let guard = Mutex::new(&stage.session, "lock").unwrap().lock().await.unwrap();
        let write = Txn::new().and_then([TxnOp::put("written", "", None)]);
        let written = stage.without_answer(async move { guard.txn(write).await }).await;
        assert!(matches!(written, Err(Error::OutcomeUnknown { .. })), "{when:?}: {written:?}");
        assert_eq!(stage.server.keys("written").len(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_proclamation_is_not_called_lost() {
    for when in [When::Resent, When::UnderWay] {
        let stage = Stage::begin(when).await;
        let leadership = Election::new(&stage.session, "election").unwrap().campaign("one").await.unwrap();
        let proclaimed = stage.without_answer(async move { leadership.proclaim("two").await }).await;
        assert!(matches!(proclaimed, Err(Error::OutcomeUnknown { .. })), "{when:?}: {proclaimed:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_ack_is_not_called_lost() {
    for when in [When::Resent, When::UnderWay] {
        let stage = Stage::begin(when).await;
        let queue = Queue::new(&stage.session, "queue").unwrap();
        queue.enqueue("item").await.unwrap();
        let claim = queue.claim().await.unwrap();
        let acked = stage.without_answer(claim.ack()).await;
        assert!(matches!(acked, Err(Error::OutcomeUnknown { .. })), "{when:?}: {acked:?}");
        assert!(stage.server.keys("queue/").is_empty());
    }
}

/// Somebody revokes the lease, another consumer takes the item, and only then the ack arrives: it was not ours.
#[tokio::test(start_paused = true)]
async fn an_ack_is_not_claimed_for_what_another_did() {
    let (server, link, session) = begin().await;
    let other = server.session(&server.link()).await.unwrap().connect().await.unwrap();
    let queue = Queue::new(&session, "queue").unwrap();
    queue.enqueue("item").await.unwrap();
    let claim = queue.claim().await.unwrap();
    link.inject("Txn", Fault::Refuse, 1);
    let lease = session.lease_id().unwrap();
    let ack = async {
        // The first attempt is refused on its way; while it is awaited, the item goes elsewhere.
        tokio::join!(claim.ack(), async {
            server.expire(lease);
            let queue = Queue::new(&other, "queue").unwrap();
            queue.claim().await.unwrap().ack().await.unwrap();
        })
        .0
    };
    let acked = tokio::time::timeout(Duration::from_secs(60), ack).await.expect("it never ends");
    assert!(acked.is_err(), "the item was acked twice");
}

/// Somebody revokes the lease of the records of ids while a request is on its way, which is lost: it was not applied.
#[tokio::test(start_paused = true)]
async fn an_item_with_an_id_is_put_although_the_lease_of_ids_is_revoked() {
    let (server, link, session) = begin().await;
    let queue = Queue::new(&session, "queue").unwrap();
    queue.enqueue_once("1", "first").await.unwrap();
    let ids = server.leases().into_iter().find(|lease| Some(*lease) != session.lease_id()).unwrap();
    link.inject("Txn", Fault::Refuse, 1);
    server.expire(ids);
    let enqueued = queue.enqueue_once("2", "second").await;
    assert!(matches!(enqueued, Ok(Some(_))), "{enqueued:?}");
    assert_eq!(queue.enqueue_once("2", "again").await.unwrap(), None);
    assert_eq!(server.keys("queue/").len(), 2);
}

/// The first request is lost on its way, and meanwhile somebody deletes the claim, or the item: the other is still there,
/// so the ack was not applied.
#[tokio::test(start_paused = true)]
async fn an_ack_was_not_applied_if_it_left_something() {
    let claims = "_etcd-recipes/queue/queue/work/claim/";
    for (taken, left) in [(claims, "queue/"), ("queue/", claims)] {
        let (server, link, session) = begin().await;
        let queue = Queue::new(&session, "queue").unwrap();
        queue.enqueue("item").await.unwrap();
        let claim = queue.claim().await.unwrap();
        let (key, mut client) = (server.keys(taken).remove(0).key, server.client().await.unwrap());
        link.inject("Txn", Fault::Refuse, 1);
        let (acked, deleted) = tokio::join!(claim.ack(), client.delete(key, None));
        assert_eq!(deleted.unwrap().deleted(), 1, "the ack was faster");
        assert!(matches!(acked, Err(Error::Lost { .. })), "without {taken}: {acked:?}");
        assert!(taken == "queue/" || server.keys(left).len() == 1, "it is gone");
    }
}
