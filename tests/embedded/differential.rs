//! The same random requests to the embedded server and to a real etcd: every answer and every event is the same.

mod observer;
mod operation;

use std::collections::BTreeSet;
use std::fmt::Debug;

use etcd_client::Client;
use etcd_recipes::embedded;

use crate::support;
use observer::Observer;
use operation::Operation;

/// How many operations a run has. Several runs, because a history that was compacted or grew long hides what a fresh
/// one shows.
const RUN: usize = 5_000;

/// A side of the comparison.
struct Side {
    client: Client,
    observer: Observer,
}

impl Side {
    async fn new(client: Client) -> Self {
        Self { observer: Observer::open(&client).await, client }
    }
}

/// Runs `operations` from a seed on both sides.
async fn compare(seed: u64, operations: usize) {
    let real = support::server::Server::fast().await;
    let embedded = embedded::Server::start();
    let mut real = Side::new(real.client().await).await;
    let mut ours = Side::new(embedded.client().await.unwrap()).await;
    let mut random = fastrand::Rng::with_seed(seed);
    let (mut revision, mut compacted) = (1, 0);
    let mut without_prev = BTreeSet::new();
    for number in 0..operations {
        let operation = Operation::random(&mut random, revision);
        if operation.needs_quiet() {
            same_events(seed, number, &events(&mut real, &mut ours, compacted).await, &mut without_prev);
            if matches!(operation, Operation::Compact(_)) {
                real.observer.cancel_all().await;
                ours.observer.cancel_all().await;
            }
        }
        let theirs = operation.run(&mut real.client, &mut real.observer).await;
        if let Operation::Compact(at) = operation
            && theirs.what.is_empty()
        {
            compacted = at;
        }
        let answer = operation.run(&mut ours.client, &mut ours.observer).await;
        revision = answer.revision.max(revision);
        same(seed, number, &operation, &(theirs, answer));
    }
    same_events(seed, operations, &events(&mut real, &mut ours, compacted).await, &mut without_prev);
    assert!(without_prev.len() <= 1, "seed {seed}: etcd told nothing of what was before to {without_prev:?}");
}

/// What both sides were told since the last time.
async fn events(real: &mut Side, ours: &mut Side, compacted: i64) -> (observer::Told, observer::Told) {
    let mut expected = ours.observer.told().await;
    if forgets_deletions() {
        let forgotten = format!("create_revision: 0, mod_revision: {compacted},");
        for told in expected.values_mut() {
            told.retain(|event| !event.contains(&forgotten));
        }
        expected.retain(|_, told| !told.is_empty());
    }
    (real.observer.told_at_least(&expected).await, expected)
}

/// Up to 3.4.33 and 3.5.15 a watch that starts at the very revision of a compaction is not told of a deletion there (etcd
/// issue 18089). The embedded server tells it.
fn forgets_deletions() -> bool {
    let version = support::binaries::binaries().version;
    version < (3, 4, 34) || ((3, 5, 0)..(3, 5, 16)).contains(&version)
}

fn same<T: Debug + PartialEq>(seed: u64, number: usize, operation: &impl Debug, both: &(T, T)) {
    let (real, embedded) = both;
    assert!(
        real == embedded,
        "seed {seed}, operation {number}: {operation:?}\n  etcd:     {real:?}\n  embedded: {embedded:?}"
    );
}

/// The same, watch by watch, so that a failure shows one event and not all.
///
/// etcd notes that a watch wants to know what was before only after it has made it, so one that starts in the past may be
/// told of it without, when the loop that serves those comes between. That is rare: `without_prev` has such watches.
fn same_events(
    seed: u64,
    number: usize,
    (real, embedded): &(observer::Told, observer::Told),
    without_prev: &mut BTreeSet<i64>,
) {
    for (id, theirs) in real {
        let ours = embedded.get(id).map_or(&[][..], Vec::as_slice);
        for at in 0..theirs.len().max(ours.len()) {
            let what = format!("event {at} of watch {id}");
            let (theirs, ours) = (theirs.get(at), ours.get(at));
            let told =
                theirs.zip(ours).and_then(|(theirs, ours)| ours.strip_prefix(theirs.strip_suffix("None")?));
            if told.is_some_and(|prev| prev.starts_with("Some")) {
                without_prev.insert(*id);
                continue;
            }
            same(seed, number, &what, &(theirs, ours));
        }
    }
    let unknown: Vec<_> = embedded.keys().filter(|id| !real.contains_key(id)).collect();
    assert!(unknown.is_empty(), "seed {seed}, operation {number}: etcd told nothing of {unknown:?}");
}

/// A seed that failed can be run alone: `SEED=… cargo test … differential`.
fn seeds(runs: usize) -> Vec<u64> {
    match std::env::var("SEED") {
        Ok(seed) => vec![seed.parse().expect("SEED is a number")],
        Err(_) => (0..runs as u64).map(|_| fastrand::u64(..)).collect(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_and_events_are_those_of_etcd() {
    // 100,000 operations, or a million.
    let runs = support::rounds(20, 200);
    for seed in seeds(runs) {
        compare(seed, RUN).await;
    }
}
