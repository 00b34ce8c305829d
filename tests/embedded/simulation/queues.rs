//! A queue: what was enqueued is acked, nothing twice, and nothing that nobody enqueued.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex as Shared};
use std::time::Duration;

use etcd_recipes::{Error, Queue, Session};
use fastrand::Rng;
use tokio::task::JoinSet;

use super::world::{CALM, Process};

/// What became of the items, by their numbers.
#[derive(Default)]
struct Book {
    next: u64,
    /// Certainly enqueued.
    enqueued: BTreeSet<u64>,
    acked: BTreeSet<u64>,
    /// Of these it is unknown whether they were acked.
    perhaps: BTreeSet<u64>,
}

impl Book {
    fn ack(&mut self, number: u64, result: Option<Result<(), Error>>) {
        match result {
            Some(Ok(())) => {
                assert!(!self.acked.contains(&number), "{number} is acked twice");
                self.acked.insert(number);
            }
            // Its consumer lost it before the ack was sent: it is delivered again.
            Some(Err(Error::Lost { .. })) => {}
            _ => {
                self.perhaps.insert(number);
            }
        }
    }
}

/// Producers and consumers at work.
pub(super) struct Queues {
    book: Arc<Shared<Book>>,
    tasks: JoinSet<()>,
}

impl Queues {
    pub(super) fn begin(processes: &[Process], random: &mut Rng) -> Self {
        let (book, mut tasks) = (Arc::new(Shared::new(Book::default())), JoinSet::new());
        for process in processes {
            tasks.spawn(produce(process.session.clone(), book.clone(), random.fork()));
            tasks.spawn(consume(process.session.clone(), book.clone(), random.fork()));
        }
        Self { book, tasks }
    }

    /// Waits for them, and takes out what is left.
    pub(super) async fn end(mut self, process: &Process) {
        let all = async {
            while let Some(done) = self.tasks.join_next().await {
                done.unwrap();
            }
        };
        tokio::time::timeout(CALM, all).await.expect("a producer or a consumer is stuck");
        let queue = Queue::new(&process.session, "queue").unwrap();
        let quiet = Duration::from_secs(30);
        while let Ok(claim) = tokio::time::timeout(quiet, queue.claim()).await {
            let claim = claim.unwrap();
            let number = number(claim.value());
            let acked = tokio::time::timeout(CALM, claim.ack()).await.expect("an ack is stuck");
            self.book.lock().unwrap().ack(number, Some(acked));
        }
        assert_eq!(queue.length().await.unwrap(), 0);
        let book = self.book.lock().unwrap();
        let done: BTreeSet<u64> = book.acked.union(&book.perhaps).copied().collect();
        let lost: Vec<_> = book.enqueued.difference(&done).collect();
        assert!(lost.is_empty(), "lost: {lost:?}");
        assert!(done.iter().all(|number| *number < book.next));
    }
}

fn number(value: &[u8]) -> u64 {
    std::str::from_utf8(value).unwrap().parse().unwrap()
}

async fn produce(session: Session, book: Arc<Shared<Book>>, mut random: Rng) {
    let queue = Queue::new(&session, "queue").unwrap();
    for _ in 0..random.usize(1..8) {
        tokio::time::sleep(Duration::from_millis(random.u64(..4_000))).await;
        let count = if random.bool() { 1 } else { random.u64(2..5) };
        let first = {
            let mut book = book.lock().unwrap();
            book.next += count;
            book.next - count
        };
        let values = (first..first + count).map(|number| number.to_string());
        let patience = Duration::from_millis(random.u64(10..30_000));
        let enqueued = match count {
            1 => tokio::time::timeout(patience, queue.enqueue(first.to_string())).await,
            _ => tokio::time::timeout(patience, queue.enqueue_all(values)).await,
        };
        if let Ok(Ok(_)) = enqueued {
            book.lock().unwrap().enqueued.extend(first..first + count);
        }
    }
}

async fn consume(session: Session, book: Arc<Shared<Book>>, mut random: Rng) {
    let queue = Queue::new(&session, "queue").unwrap();
    for _ in 0..random.usize(1..12) {
        let patience = Duration::from_millis(random.u64(1..6_000));
        let Ok(Ok(claim)) = tokio::time::timeout(patience, queue.claim()).await else { continue };
        tokio::time::sleep(Duration::from_millis(random.u64(..1_500))).await;
        let number = number(claim.value());
        match random.u8(..6) {
            0 => drop(claim),
            1 => {
                // Delays go by the clock on the wall, which is no part of a replay.
                let _ = claim.release(Duration::ZERO).await;
            }
            _ => {
                let patience = Duration::from_millis(random.u64(1..20_000));
                let acked = tokio::time::timeout(patience, claim.ack()).await.ok();
                book.lock().unwrap().ack(number, acked);
            }
        }
    }
}
