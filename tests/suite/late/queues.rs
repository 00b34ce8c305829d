//! Requests of a queue: no item is doubled, lost or taken in another's place, and nothing reappears.

use std::time::Duration;

use etcd_client::{GetOptions, Txn, TxnOp};
use etcd_recipes::{Claim, Error, Item, Queue};
use tokio::time::timeout;

use super::no_space::{fill, make_space};
use super::{PATIENCE, Rig, arrive, side_by_side};
use crate::support::check::{Scope, eventually, scoped_on};
use crate::support::faults::{Fault, Injection, Until};
use crate::support::needs::{Needs, lacking};
use crate::support::server::{Options, Server};

/// What becomes of the first attempt.
#[derive(Debug, Clone, Copy)]
enum Way {
    /// It is applied, and its answer is lost.
    Lost,
    /// It is applied, and a copy arrives when everything is over.
    Twice,
    /// It is held back until everything is over; the session sends it again.
    Resent,
}

const WAYS: [Way; 3] = [Way::Lost, Way::Twice, Way::Resent];

/// A queue on a session with faults.
struct Stage<'a> {
    rig: Rig<'a>,
    queue: Queue,
    way: Way,
}

impl<'a> Stage<'a> {
    async fn open(scope: &'a Scope, way: Way, items: &[&str]) -> Self {
        let rig = Rig::new(scope, "queue").await;
        let queue = Queue::new(&rig.session, &rig.name).unwrap();
        queue.enqueue_all(items.to_vec()).await.unwrap();
        Self { rig, queue, way }
    }

    /// The next transaction with this in it has bad luck.
    fn bad_luck(&self, containing: &str) -> Injection {
        let fault = match self.way {
            Way::Lost => Fault::LoseAnswer,
            Way::Twice => Fault::Twice(Until::Released),
            Way::Resent => Fault::Hold(Until::Released),
        };
        self.rig.faults.on("Txn").containing(containing).inject(fault)
    }

    async fn claim(&self) -> Claim {
        timeout(PATIENCE, self.queue.claim()).await.expect("nothing to claim").unwrap()
    }

    async fn dequeue(&self) -> Item {
        timeout(PATIENCE, self.queue.dequeue()).await.expect("no item").unwrap()
    }

    /// After the late copies have come, these items are there and nothing else.
    async fn ends_with(self, copies: Injection, items: &[&str]) {
        assert_eq!(copies.hits(), 1, "the request met no fault");
        arrive(&copies).await;
        assert_eq!(self.queue.length().await.unwrap(), items.len() as u64);
        for item in items {
            assert_eq!(self.dequeue().await.value, item.as_bytes());
        }
        assert!(self.queue.dead_letters().await.unwrap().is_empty());
        let Self { rig, queue, .. } = self;
        drop(queue);
        let books = format!("_etcd-recipes/queue/{}/work/", rig.name.replace('/', "%2F"));
        eventually(PATIENCE, "nothing is noted of the queue any more", async || {
            let options = GetOptions::new().with_prefix().with_count_only();
            rig.scope.client().get(books.as_str(), Some(options)).await.unwrap().count() == 0
        })
        .await;
        rig.close().await;
    }
}

#[test]
fn an_item_is_put_once() {
    side_by_side(WAYS, async |scope, way| {
        let stage = Stage::open(scope, way, &[]).await;
        let copies = stage.bad_luck("the value");
        stage.queue.enqueue("the value").await.unwrap();
        assert_eq!(stage.dequeue().await.value, b"the value");
        stage.ends_with(copies, &[]).await;
    });
}

#[test]
fn items_are_put_together_once_also_in_a_bounded_queue() {
    side_by_side(WAYS, async |scope, way| {
        let stage = Stage::open(scope, way, &[]).await;
        let bounded = Queue::builder(&stage.rig.session, &stage.rig.name).bound(2).build().unwrap();
        let copies = stage.bad_luck("the value");
        bounded.enqueue_all(["the value", "another"]).await.unwrap();
        drop(bounded);
        assert_eq!(stage.dequeue().await.value, b"the value");
        stage.ends_with(copies, &["another"]).await;
    });
}

#[test]
fn an_item_with_an_id_is_put_once() {
    side_by_side(WAYS, async |scope, way| {
        let stage = Stage::open(scope, way, &[]).await;
        let copies = stage.bad_luck("the value");
        let id = uuid::Uuid::new_v4().to_string();
        assert!(stage.queue.enqueue_once(&id, "the value").await.unwrap().is_some());
        assert_eq!(stage.dequeue().await.value, b"the value");
        assert_eq!(stage.queue.enqueue_once(&id, "again").await.unwrap(), None);
        stage.ends_with(copies, &[]).await;
    });
}

#[test]
fn one_item_is_taken() {
    side_by_side(WAYS, async |scope, way| {
        let stage = Stage::open(scope, way, &["1", "2", "3"]).await;
        let copies = stage.bad_luck("tried");
        assert_eq!(stage.dequeue().await.value, b"1");
        stage.ends_with(copies, &["2", "3"]).await;
    });
}

#[test]
fn one_item_is_claimed() {
    side_by_side(WAYS, async |scope, way| {
        let stage = Stage::open(scope, way, &["1", "2", "3"]).await;
        let copies = stage.bad_luck("tried");
        let claim = stage.claim().await;
        assert_eq!((claim.value(), claim.attempt()), (&b"1"[..], 1));
        claim.ack().await.unwrap();
        stage.ends_with(copies, &["2", "3"]).await;
    });
}

#[test]
fn a_claim_is_not_doubled_while_it_is_held() {
    side_by_side(WAYS, async |scope, way| {
        let stage = Stage::open(scope, way, &["1"]).await;
        let copies = stage.bad_luck("tried");
        let claim = stage.claim().await;
        arrive(&copies).await;
        assert!(claim.is_held());
        let found = scope.client().get(claim.key(), None).await.unwrap();
        assert_eq!((found.kvs()[0].create_revision(), found.kvs()[0].version()), (claim.token(), 1));
        claim.ack().await.unwrap();
        stage.ends_with(copies, &[]).await;
    });
}

#[test]
fn one_item_is_acked() {
    side_by_side(WAYS, async |scope, way| {
        let stage = Stage::open(scope, way, &["1", "2"]).await;
        let claim = stage.claim().await;
        let copies = stage.bad_luck("/claim/");
        claim.ack().await.unwrap();
        stage.ends_with(copies, &["2"]).await;
    });
}

#[test]
fn what_is_written_with_an_ack_is_written_once() {
    side_by_side(WAYS, async |scope, way| {
        let stage = Stage::open(scope, way, &["1", "2"]).await;
        let written = scope.key("written");
        let mut claim = stage.claim().await;
        let copies = stage.bad_luck("written");
        let put = Txn::new().and_then([TxnOp::put(written.as_str(), "", None)]);
        assert!(claim.ack_with(put).await.unwrap().succeeded());
        drop(claim);
        arrive(&copies).await;
        let found = scope.client().get(written.as_str(), None).await.unwrap();
        assert_eq!(found.kvs()[0].version(), 1);
        scope.client().delete(written, None).await.unwrap();
        stage.ends_with(copies, &["2"]).await;
    });
}

/// Gives an item back, and claims it again before the late copy comes.
async fn given_back(scope: &Scope, way: Way, delay: Duration) {
    let stage = Stage::open(scope, way, &["1"]).await;
    let claim = stage.claim().await;
    let copies = stage.bad_luck("/claim/");
    claim.release(delay).await.unwrap();
    let again = stage.claim().await;
    assert_eq!(again.attempt(), 2);
    arrive(&copies).await;
    let found = scope.client().get(again.key(), None).await.unwrap();
    assert_eq!(found.kvs()[0].create_revision(), again.token(), "a late copy released another claim");
    assert!(again.is_held());
    again.ack().await.unwrap();
    stage.ends_with(copies, &[]).await;
}

#[test]
fn one_claim_is_released() {
    side_by_side(WAYS, async |scope, way| given_back(scope, way, Duration::ZERO).await);
}

#[test]
fn one_claim_is_released_for_later() {
    side_by_side(WAYS, async |scope, way| given_back(scope, way, Duration::from_millis(50)).await);
}

#[test]
fn one_item_is_given_up_and_put_back() {
    side_by_side(WAYS, async |scope, way| {
        let stage = Stage::open(scope, way, &["1", "2"]).await;
        let claim = stage.claim().await;
        let rejected = stage.bad_luck("the reason");
        claim.reject("the reason").await.unwrap();
        let letters = stage.queue.dead_letters().await.unwrap();
        assert_eq!(letters.len(), 1);
        let requeued = stage.bad_luck("/dead/");
        assert!(stage.queue.requeue(&letters[0]).await.unwrap());
        assert_eq!(stage.dequeue().await.value, b"2");
        assert_eq!(stage.dequeue().await.value, b"1");
        arrive(&rejected).await;
        stage.ends_with(requeued, &[]).await;
    });
}

#[test]
fn one_dead_letter_is_purged() {
    side_by_side(WAYS, async |scope, way| {
        let stage = Stage::open(scope, way, &["1"]).await;
        stage.claim().await.reject("").await.unwrap();
        let letters = stage.queue.dead_letters().await.unwrap();
        let copies = stage.bad_luck("/dead/");
        assert!(stage.queue.purge(&letters[0]).await.unwrap());
        stage.ends_with(copies, &[]).await;
    });
}

/// An ack without an answer whose lease ends: nobody says that it was done.
#[tokio::test]
async fn an_ack_that_cannot_be_told_is_not_called_done() {
    crate::support::check::scoped(async |scope| {
        let stage = Stage::open(scope, Way::Lost, &["1"]).await;
        let claim = stage.claim().await;
        let held = stage.rig.faults.on("Txn").containing("/claim/").always().inject(Fault::NeverSend);
        let acked = tokio::spawn(claim.ack());
        held.hit(1).await;
        scope.client().lease_revoke(stage.rig.session.lease_id().unwrap()).await.unwrap();
        crate::support::sessions::generation(scope, &stage.rig.session, 2).await;
        assert!(matches!(acked.await.unwrap(), Err(Error::OutcomeUnknown { .. })));
        stage.rig.faults.clear();
        let again = stage.claim().await;
        assert_eq!(again.attempt(), 2);
        again.ack().await.unwrap();
        let Stage { rig, queue, .. } = stage;
        drop(queue);
        rig.close().await;
    })
    .await;
}

#[tokio::test]
async fn without_space_items_are_acked_and_taken_but_not_put_or_claimed() {
    if lacking(Needs::Settings) {
        return;
    }
    let server = Server::with(Options::fast().arg("--quota-backend-bytes=8388608")).await;
    scoped_on(&server, async |scope| {
        let stage = Stage::open(scope, Way::Lost, &["1", "2", "3", "4", "5"]).await;
        let queue = &stage.queue;
        let (first, second) = (stage.claim().await, stage.claim().await);
        stage.claim().await.reject("bad").await.unwrap();
        fill(&mut scope.client()).await;
        let full = async || scope.client().put("fill/last", "", None).await.is_err();
        eventually(PATIENCE, "nothing at all is taken any more", full).await;

        let put = queue.enqueue("6").await;
        assert!(matches!(put, Err(Error::NoSpace { .. })), "{put:?}");
        let claimed = timeout(PATIENCE, queue.claim()).await.expect("stuck");
        assert!(matches!(claimed, Err(Error::NoSpace { .. })), "{claimed:?}");
        let mut second = second;
        let put = Txn::new().and_then([TxnOp::put("x", "", None)]);
        assert!(matches!(second.ack_with(put).await, Err(Error::NoSpace { .. })));
        assert!(second.is_held(), "it can be tried again");
        first.ack().await.unwrap();
        second.ack().await.unwrap();
        assert_eq!(stage.dequeue().await.value, b"4");
        for letter in queue.dead_letters().await.unwrap() {
            assert!(queue.purge(&letter).await.unwrap());
        }
        assert_eq!(queue.length().await.unwrap(), 1);

        make_space(&server).await;
        eventually(PATIENCE, "there is space", async || queue.enqueue("6").await.is_ok()).await;
        for value in ["5", "6"] {
            let claim = stage.claim().await;
            assert_eq!(claim.value(), value.as_bytes());
            claim.ack().await.unwrap();
        }
        let Stage { rig, queue, .. } = stage;
        drop(queue);
        rig.close().await;
    })
    .await;
}
