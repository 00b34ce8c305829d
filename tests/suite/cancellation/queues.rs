//! Queues: no item is lost or doubled, and no claim is left, wherever a call is dropped.

use std::time::{Duration, Instant};

use etcd_recipes::{Claim, Queue, TypedQueue};

use super::guards::Written;
use super::stage::{Knife, PATIENCE, Stage, every_cut};
use crate::support::check::eventually;

/// A queue of its own, on the session whose calls are cut.
fn ours(stage: &Stage<'_>) -> Queue {
    Queue::builder(&stage.ours, stage.scope.key("queue")).bound(100).build().unwrap()
}

fn unbounded(stage: &Stage<'_>) -> Queue {
    Queue::new(&stage.ours, stage.scope.key("queue")).unwrap()
}

/// Takes what is there when nothing is under way any more, by another session; nothing is left of the queue then.
async fn rest(stage: &Stage<'_>) -> Vec<String> {
    stage.idle().await;
    let queue = Queue::new(&stage.other, stage.scope.key("queue")).unwrap();
    let mut found = Vec::new();
    let began = Instant::now();
    while queue.length().await.unwrap() > 0 {
        assert!(began.elapsed() < PATIENCE, "an item cannot be had");
        if let Ok(item) = tokio::time::timeout(PATIENCE / 10, queue.dequeue()).await {
            found.push(String::from_utf8(item.unwrap().value).unwrap());
        }
    }
    for letter in queue.dead_letters().await.unwrap() {
        assert!(queue.purge(&letter).await.unwrap());
        found.push(format!("dead {}", String::from_utf8_lossy(&letter.value)));
    }
    drop(queue);
    stage.idle().await;
    let books = format!("_etcd-recipes/queue/{}%2Fqueue/work/", stage.scope.name());
    eventually(PATIENCE, "nothing is noted of its items", async || {
        let options = etcd_client::GetOptions::new().with_prefix().with_count_only();
        stage.scope.client().get(books.as_str(), Some(options)).await.unwrap().count() == 0
    })
    .await;
    found
}

/// Cuts a call that puts items, all or none.
async fn puts(call: impl AsyncFn(&Stage<'_>, Knife<'_>) -> Option<()>, items: &[&str]) {
    every_cut(async |stage, knife| {
        let put = call(stage, knife).await;
        let found = rest(stage).await;
        assert!(found == items || (put.is_none() && found.is_empty()), "{found:?}");
        put
    })
    .await;
}

pub(super) async fn dropped_enqueue_puts_once_at_most() {
    puts(
        async |stage, knife| {
            knife.of(unbounded(stage).enqueue("1")).await.map(|put| assert!(put.unwrap() > 0))
        },
        &["1"],
    )
    .await;
}

pub(super) async fn dropped_enqueue_of_a_bounded_queue() {
    puts(
        async |stage, knife| knife.of(ours(stage).enqueue("1")).await.map(|put| assert!(put.unwrap() > 0)),
        &["1"],
    )
    .await;
}

pub(super) async fn dropped_enqueue_all_puts_all_or_none() {
    let call = async |stage: &Stage<'_>, knife: Knife<'_>| {
        knife.of(unbounded(stage).enqueue_all(["1", "2"])).await.map(|put| assert!(put.unwrap() > 0))
    };
    puts(call, &["1", "2"]).await;
}

pub(super) async fn dropped_try_enqueue_puts_once_at_most() {
    puts(
        async |stage, knife| {
            knife.of(ours(stage).try_enqueue("1")).await.map(|put| assert!(put.unwrap().is_some()))
        },
        &["1"],
    )
    .await;
}

pub(super) async fn dropped_enqueue_once_puts_once_at_most() {
    every_cut(async |stage, knife| {
        let queue = unbounded(stage);
        let id = uuid::Uuid::new_v4().to_string();
        let put = knife.of(queue.enqueue_once(&id, "1")).await;
        drop(queue);
        let found = rest(stage).await;
        assert!(found == ["1"] || (put.is_none() && found.is_empty()), "{found:?}");
        assert!(put?.unwrap().is_some());
        Some(())
    })
    .await;
}

pub(super) async fn dropped_enqueue_on_a_typed_queue() {
    puts(
        async |stage, knife| {
            let queue: TypedQueue<u32> = unbounded(stage).typed();
            knife.of(queue.enqueue(&1)).await.map(|put| assert!(put.unwrap() > 0))
        },
        &["1"],
    )
    .await;
}

pub(super) async fn dropped_enqueue_all_on_a_typed_queue() {
    puts(
        async |stage, knife| {
            let queue: TypedQueue<u32> = unbounded(stage).typed();
            knife.of(queue.enqueue_all(&[1, 2])).await.map(|put| assert!(put.unwrap() > 0))
        },
        &["1", "2"],
    )
    .await;
}

pub(super) async fn dropped_dequeue_keeps_the_item_for_the_next_call() {
    every_cut(async |stage, knife| {
        let queue = unbounded(stage);
        queue.enqueue_all(["1", "2"]).await.unwrap();
        let first = knife.of(queue.dequeue()).await;
        let cut = first.is_none();
        let taken = first.into_iter().map(|item| item.unwrap().value);
        let mut taken: Vec<_> = taken.collect();
        while taken.len() < 2 {
            let next = tokio::time::timeout(PATIENCE, queue.dequeue()).await.expect("an item is lost");
            taken.push(next.unwrap().value);
        }
        taken.sort();
        assert_eq!(taken, [b"1", b"2"]);
        drop(queue);
        assert!(rest(stage).await.is_empty());
        (!cut).then_some(())
    })
    .await;
}

pub(super) async fn dropped_dequeue_with_its_queue_puts_the_item_back() {
    every_cut(async |stage, knife| {
        let queue = unbounded(stage);
        queue.enqueue("1").await.unwrap();
        let taken = knife.of(queue.dequeue()).await;
        drop(queue);
        let found = rest(stage).await;
        assert_eq!(found.len(), usize::from(taken.is_none()));
        taken.map(|item| drop(item.unwrap()))
    })
    .await;
}

pub(super) async fn dropped_dequeue_of_an_empty_queue() {
    every_cut(async |stage, knife| {
        let queue = unbounded(stage);
        let fed = async {
            let feeder = Queue::new(&stage.other, stage.scope.key("queue")).unwrap();
            tokio::time::sleep(Duration::from_millis(20)).await;
            feeder.enqueue("1").await.unwrap();
        };
        let taken = knife.during(queue.dequeue(), fed).await;
        drop(queue);
        let found = rest(stage).await;
        assert!(found.len() + usize::from(taken.is_some()) <= 1);
        taken.map(|item| drop(item.unwrap()))
    })
    .await;
}

pub(super) async fn dropped_try_dequeue_loses_nothing() {
    every_cut(async |stage, knife| {
        let queue = unbounded(stage);
        queue.enqueue("1").await.unwrap();
        let taken = knife.of(queue.try_dequeue()).await;
        drop(queue);
        let found = rest(stage).await;
        assert_eq!(found.len(), usize::from(taken.is_none()));
        taken.map(|item| drop(item.unwrap().expect("it was there")))
    })
    .await;
}

/// What was claimed by a call that was dropped has not been tried.
async fn untried(stage: &Stage<'_>) {
    stage.idle().await;
    let queue = Queue::new(&stage.other, stage.scope.key("queue")).unwrap();
    let claim = tokio::time::timeout(PATIENCE, queue.claim()).await.expect("a claim is left").unwrap();
    assert_eq!(claim.attempt(), 1);
    claim.ack().await.unwrap();
}

pub(super) async fn dropped_claim_leaves_no_claim_and_counts_no_attempt() {
    every_cut(async |stage, knife| {
        let queue = unbounded(stage);
        queue.enqueue("1").await.unwrap();
        let claim = knife.of(queue.claim()).await;
        drop(queue);
        match claim {
            Some(claim) => claim.unwrap().ack().await.unwrap(),
            None => {
                untried(stage).await;
                return None;
            }
        }
        assert!(rest(stage).await.is_empty());
        Some(())
    })
    .await;
}

pub(super) async fn dropped_claim_on_a_typed_queue() {
    every_cut(async |stage, knife| {
        let queue: TypedQueue<u32> = unbounded(stage).typed();
        queue.enqueue(&1).await.unwrap();
        let claim = knife.of(queue.claim()).await;
        drop(queue);
        match claim {
            Some(claim) => claim.unwrap().into_claim().ack().await.unwrap(),
            None => {
                untried(stage).await;
                return None;
            }
        }
        assert!(rest(stage).await.is_empty());
        Some(())
    })
    .await;
}

pub(super) async fn dropped_dequeue_on_a_typed_queue() {
    every_cut(async |stage, knife| {
        let queue: TypedQueue<u32> = unbounded(stage).typed();
        queue.enqueue(&1).await.unwrap();
        let taken = knife.of(queue.dequeue()).await;
        drop(queue);
        let found = rest(stage).await;
        assert!(found.len() + usize::from(taken.is_some()) <= 1, "{found:?}");
        taken.map(|payload| assert_eq!(payload.unwrap(), 1))
    })
    .await;
}

/// One item, claimed.
async fn claimed(stage: &Stage<'_>) -> Claim {
    let queue = unbounded(stage);
    queue.enqueue("1").await.unwrap();
    tokio::time::timeout(PATIENCE, queue.claim()).await.expect("nothing to claim").unwrap()
}

pub(super) async fn dropped_ack_acks_or_gives_back() {
    every_cut(async |stage, knife| {
        let claim = claimed(stage).await;
        let acked = knife.of(claim.ack()).await;
        let found = rest(stage).await;
        assert!(found.len() <= usize::from(acked.is_none()), "{found:?}");
        acked.map(|acked| acked.unwrap())
    })
    .await;
}

pub(super) async fn dropped_ack_with_does_both_or_neither() {
    every_cut(async |stage, knife| {
        let written = Written::new(stage);
        let mut claim = claimed(stage).await;
        let acked = knife.of(claim.ack_with(written.txn())).await;
        drop(claim);
        let (found, times) = (rest(stage).await, written.times(stage).await);
        assert_eq!(found.len(), usize::from(times == 0), "{found:?}");
        assert!(times <= 1);
        acked.map(|acked| assert!(acked.unwrap().succeeded() && times == 1))
    })
    .await;
}

pub(super) async fn dropped_txn_of_a_claim_commits_once_at_most() {
    every_cut(async |stage, knife| {
        let written = Written::new(stage);
        let claim = claimed(stage).await;
        let done = knife.of(claim.txn(written.txn())).await;
        claim.ack().await.unwrap();
        stage.idle().await;
        let times = written.times(stage).await;
        assert!(times <= 1 && rest(stage).await.is_empty());
        done.map(|done| assert!(done.unwrap().succeeded() && times == 1))
    })
    .await;
}

pub(super) async fn dropped_release_gives_back() {
    every_cut(async |stage, knife| {
        let claim = claimed(stage).await;
        let released = knife.of(claim.release(Duration::ZERO)).await;
        assert_eq!(rest(stage).await, ["1"]);
        released.map(|released| released.unwrap())
    })
    .await;
}

pub(super) async fn dropped_release_with_a_delay_gives_back() {
    every_cut(async |stage, knife| {
        let claim = claimed(stage).await;
        let released = knife.of(claim.release(Duration::from_millis(30))).await;
        assert_eq!(rest(stage).await, ["1"]);
        released.map(|released| released.unwrap())
    })
    .await;
}

pub(super) async fn dropped_reject_gives_up_or_gives_back() {
    every_cut(async |stage, knife| {
        let claim = claimed(stage).await;
        let rejected = knife.of(claim.reject("bad")).await;
        let found = rest(stage).await;
        assert!(found == ["dead 1"] || (rejected.is_none() && found == ["1"]), "{found:?}");
        rejected.map(|rejected| rejected.unwrap())
    })
    .await;
}

pub(super) async fn dropped_lost_of_a_claim_does_nothing() {
    every_cut(async |stage, knife| {
        let claim = claimed(stage).await;
        let lost = claim.lost();
        let key = claim.key().to_vec();
        let deleted = async {
            stage.scope.client().delete(key, None).await.unwrap();
        };
        let lost = match knife.cut {
            super::stage::Cut::After(0) => knife.of(lost).await,
            _ => knife.during(lost, deleted).await,
        };
        drop(claim);
        assert_eq!(rest(stage).await, ["1"]);
        lost
    })
    .await;
}

pub(super) async fn dropped_length() {
    every_cut(async |stage, knife| {
        let queue = unbounded(stage);
        knife.of(queue.length()).await.map(|length| assert_eq!(length.unwrap(), 0))
    })
    .await;
}

pub(super) async fn dropped_peek() {
    every_cut(async |stage, knife| {
        let queue = unbounded(stage);
        queue.enqueue("1").await.unwrap();
        let peeked = knife.of(queue.peek()).await;
        drop(queue);
        assert_eq!(rest(stage).await, ["1"]);
        peeked.map(|item| drop(item.unwrap().expect("it was there")))
    })
    .await;
}

/// A queue with one dead letter.
async fn dead(stage: &Stage<'_>) -> (Queue, etcd_recipes::DeadLetter) {
    claimed(stage).await.reject("bad").await.unwrap();
    let queue = unbounded(stage);
    let letter = queue.dead_letters().await.unwrap().remove(0);
    (queue, letter)
}

pub(super) async fn dropped_dead_letters() {
    every_cut(async |stage, knife| {
        let (queue, _) = dead(stage).await;
        let letters = knife.of(queue.dead_letters()).await;
        drop(queue);
        assert_eq!(rest(stage).await, ["dead 1"]);
        letters.map(|letters| assert_eq!(letters.unwrap().len(), 1))
    })
    .await;
}

pub(super) async fn dropped_requeue_moves_or_leaves() {
    every_cut(async |stage, knife| {
        let (queue, letter) = dead(stage).await;
        let requeued = knife.of(queue.requeue(&letter)).await;
        drop(queue);
        let found = rest(stage).await;
        assert!(found == ["1"] || (requeued.is_none() && found == ["dead 1"]), "{found:?}");
        requeued.map(|requeued| assert!(requeued.unwrap()))
    })
    .await;
}

pub(super) async fn dropped_purge_deletes_or_leaves() {
    every_cut(async |stage, knife| {
        let (queue, letter) = dead(stage).await;
        let purged = knife.of(queue.purge(&letter)).await;
        drop(queue);
        let found = rest(stage).await;
        assert!(found.is_empty() || (purged.is_none() && found == ["dead 1"]), "{found:?}");
        purged.map(|purged| assert!(purged.unwrap()))
    })
    .await;
}
