//! Writes whose answer is still awaited when the lease ends: each may have been applied, and says so.

use std::time::Duration;

use etcd_client::{Txn, TxnOp};
use etcd_recipes::embedded::{Fault, Link, Server};
use etcd_recipes::{Election, Error, Mutex, Queue, Session};

async fn begin() -> (Server, Link, Session) {
    let server = Server::start();
    let link = server.link();
    let session = server.session(&link).await.unwrap().ttl(Duration::from_secs(5)).connect().await.unwrap();
    (server, link, session)
}

/// Runs `write` so that it is applied and its answer never comes: the link stalls, the lease ends, the link works again.
async fn without_answer<T: Send + 'static>(
    server: &Server,
    link: &Link,
    write: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Result<T, Error> {
    let held = link.inject("Txn", Fault::Hold, 1);
    let write = tokio::spawn(write);
    held.hit(1).await;
    let before = server.revision();
    link.stall();
    held.release();
    let applied = async {
        while server.revision() == before {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(2), applied).await.expect("it is not applied");
    tokio::time::sleep(Duration::from_secs(20)).await;
    link.restore();
    tokio::time::timeout(Duration::from_secs(60), write).await.expect("it never ends").unwrap()
}

#[tokio::test(start_paused = true)]
async fn an_item_is_not_enqueued_again() {
    let (server, link, session) = begin().await;
    let queue = Queue::new(&session, "queue").unwrap();
    let enqueued = without_answer(&server, &link, async move { queue.enqueue("once").await }).await;
    assert!(matches!(enqueued, Err(Error::OutcomeUnknown { .. })), "{enqueued:?}");
    assert_eq!(server.keys("queue/").len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_guarded_transaction_is_not_called_lost() {
    let (server, link, session) = begin().await;
    let guard = Mutex::new(&session, "lock").unwrap().lock().await.unwrap();
    let write = Txn::new().and_then([TxnOp::put("written", "", None)]);
    let written = without_answer(&server, &link, async move { guard.txn(write).await }).await;
    assert!(matches!(written, Err(Error::OutcomeUnknown { .. })), "{written:?}");
    assert_eq!(server.keys("written").len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_proclamation_is_not_called_lost() {
    let (server, link, session) = begin().await;
    let leadership = Election::new(&session, "election").unwrap().campaign("one").await.unwrap();
    let proclaimed = without_answer(&server, &link, async move { leadership.proclaim("two").await }).await;
    assert!(matches!(proclaimed, Err(Error::OutcomeUnknown { .. })), "{proclaimed:?}");
}

#[tokio::test(start_paused = true)]
async fn an_ack_is_not_called_lost() {
    let (server, link, session) = begin().await;
    let queue = Queue::new(&session, "queue").unwrap();
    queue.enqueue("item").await.unwrap();
    let claim = queue.claim().await.unwrap();
    let acked = without_answer(&server, &link, claim.ack()).await;
    assert!(matches!(acked, Err(Error::OutcomeUnknown { .. })), "{acked:?}");
    assert!(server.keys("queue/").is_empty());
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
