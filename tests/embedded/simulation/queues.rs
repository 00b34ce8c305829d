//! Queues: what was enqueued is acked, or given to one, nothing twice, and nothing that nobody enqueued.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex as Shared};
use std::time::Duration;

use etcd_recipes::{Error, Queue, SessionState};
use fastrand::Rng;
use tokio::task::JoinSet;

use super::trace::Trace;
use super::world::{CALM, Process};

/// What became of the items, by their numbers.
struct Book {
    trace: Trace,
    next: u64,
    /// Certainly enqueued.
    enqueued: BTreeSet<u64>,
    acked: BTreeSet<u64>,
    /// Of these it is unknown whether they were acked.
    perhaps: BTreeSet<u64>,
}

impl Book {
    fn new(trace: &Trace) -> Arc<Shared<Self>> {
        let (enqueued, acked, perhaps) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        Arc::new(Shared::new(Self { trace: trace.clone(), next: 0, enqueued, acked, perhaps }))
    }

    /// What was enqueued, and is not there any more.
    fn lost(&self) -> Vec<u64> {
        let done: BTreeSet<u64> = self.acked.union(&self.perhaps).copied().collect();
        assert!(done.iter().all(|number| *number < self.next));
        self.enqueued.difference(&done).copied().collect()
    }

    fn ack(&mut self, number: u64, result: Option<Result<(), Error>>) {
        self.trace.note(format!("{number} is acked or given: {result:?}"));
        match result {
            Some(Ok(())) => {
                assert!(!self.acked.contains(&number), "{number} is acked or given twice");
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

/// Producers and consumers at work: on a queue whose items are claimed, and on one whose items are taken out at once.
pub(super) struct Queues {
    claimed: Arc<Shared<Book>>,
    taken: Arc<Shared<Book>>,
    tasks: JoinSet<()>,
}

impl Queues {
    pub(super) fn begin(processes: &[Process], random: &mut Rng, trace: &Trace) -> Self {
        let (claimed, taken, mut tasks) = (Book::new(trace), Book::new(trace), JoinSet::new());
        for process in processes {
            let queue = |name| Queue::new(&process.session, name).unwrap();
            tasks.spawn(produce(queue("claimed"), claimed.clone(), random.fork()));
            tasks.spawn(consume(queue("claimed"), claimed.clone(), random.fork()));
            tasks.spawn(produce(queue("taken"), taken.clone(), random.fork()));
            tasks.spawn(take(queue("taken"), taken.clone(), random.fork()));
        }
        Self { claimed, taken, tasks }
    }

    /// Waits for them, and takes out what is left.
    pub(super) async fn end(mut self, processes: &[Process]) {
        let all = async {
            while let Some(done) = self.tasks.join_next().await {
                done.unwrap();
            }
        };
        tokio::time::timeout(CALM, all).await.expect("a producer or a consumer is stuck");
        let queue = |name| Queue::new(&processes[0].session, name).unwrap();
        tokio::join!(claim_rest(queue("claimed"), &self.claimed), take_rest(queue("taken"), &self.taken));
        let lost = self.claimed.lock().unwrap().lost();
        assert!(lost.is_empty(), "lost: {lost:?}");
        // What is taken out is lost with the lease of who took it before it knew.
        let first = |process: &Process| process.session.state() == SessionState::Connected { generation: 1 };
        let lost = self.taken.lock().unwrap().lost();
        assert!(lost.is_empty() || !processes.iter().all(first), "lost: {lost:?}");
    }
}

const QUIET: Duration = Duration::from_secs(30);

async fn claim_rest(queue: Queue, book: &Shared<Book>) {
    while let Ok(claim) = tokio::time::timeout(QUIET, queue.claim()).await {
        let claim = claim.unwrap();
        let number = number(claim.value());
        let acked = tokio::time::timeout(CALM, claim.ack()).await.expect("an ack is stuck");
        book.lock().unwrap().ack(number, Some(acked));
    }
    assert_eq!(queue.length().await.unwrap(), 0);
}

async fn take_rest(queue: Queue, book: &Shared<Book>) {
    while let Ok(item) = tokio::time::timeout(QUIET, queue.dequeue()).await {
        book.lock().unwrap().ack(number(&item.unwrap().value), Some(Ok(())));
    }
    assert_eq!(queue.length().await.unwrap(), 0);
}

fn number(value: &[u8]) -> u64 {
    std::str::from_utf8(value).unwrap().parse().unwrap()
}

async fn produce(queue: Queue, book: Arc<Shared<Book>>, mut random: Rng) {
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

/// Takes items out; gives some attempts up.
async fn take(queue: Queue, book: Arc<Shared<Book>>, mut random: Rng) {
    for _ in 0..random.usize(1..12) {
        tokio::time::sleep(Duration::from_millis(random.u64(..1_500))).await;
        let patience = Duration::from_millis(random.u64(1..6_000));
        let taken = match random.u8(..3) {
            0 => tokio::time::timeout(patience, queue.try_dequeue()).await,
            _ => tokio::time::timeout(patience, async { queue.dequeue().await.map(Some) }).await,
        };
        if let Ok(Ok(Some(item))) = taken {
            book.lock().unwrap().ack(number(&item.value), Some(Ok(())));
        }
    }
}

async fn consume(queue: Queue, book: Arc<Shared<Book>>, mut random: Rng) {
    for _ in 0..random.usize(1..12) {
        let patience = Duration::from_millis(random.u64(1..6_000));
        let Ok(Ok(claim)) = tokio::time::timeout(patience, queue.claim()).await else { continue };
        tokio::time::sleep(Duration::from_millis(random.u64(..1_500))).await;
        let number = number(claim.value());
        match random.u8(..6) {
            0 => drop(claim),
            1 => {
                let delay = Duration::from_millis(if random.bool() { 0 } else { random.u64(..5_000) });
                let _ = claim.release(delay).await;
            }
            _ => {
                let patience = Duration::from_millis(random.u64(1..20_000));
                let acked = tokio::time::timeout(patience, claim.ack()).await.ok();
                book.lock().unwrap().ack(number, acked);
            }
        }
    }
}
