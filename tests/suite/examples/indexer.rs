//! `indexer`: a leader that works, and others that take over.

use std::collections::BTreeMap;

use etcd_client::{DeleteOptions, GetOptions, KeyValue};
use nix::sys::signal::Signal;

use super::{Program, example};
use crate::support::check::{Scope, eventually, scoped};
use crate::support::server::PATIENCE;

/// Small, so that leaders change in the midst of them.
const DOCUMENTS: usize = 200;

fn indexer(scope: &Scope, id: &str, ttl: u32, documents: usize) -> Program {
    let mut command = example("indexer", scope.endpoint());
    command.args(["--id", id, "--election", scope.name(), "--interval-ms", "5"]);
    command.arg(format!("--ttl={ttl}")).arg(format!("--documents={documents}"));
    Program::start(command)
}

async fn all(scope: &Scope, prefix: &str) -> Vec<KeyValue> {
    let options = Some(GetOptions::new().with_prefix());
    scope.client().get(format!("{}{prefix}", scope.name()), options).await.unwrap().take_kvs()
}

/// Waits until so many documents are indexed.
async fn indexed(scope: &Scope, count: usize) {
    eventually(PATIENCE, &format!("{count} documents are indexed"), async || {
        let cursor = all(scope, "-cursor").await;
        cursor.first().is_some_and(|cursor| cursor.value_str().unwrap().parse::<usize>().unwrap() >= count)
    })
    .await;
}

/// The number a leader begins with.
async fn leading(program: &mut Program) -> usize {
    let line = program.line("leading token=").await;
    line.split_once(" from=").unwrap().1.parse().unwrap()
}

/// Waits until one of these leads: which.
async fn leader(scope: &Scope, programs: &BTreeMap<&'static str, Program>) -> &'static str {
    let mut leader = None;
    eventually(PATIENCE, "one that is alive leads", async || {
        let mut candidates = all(scope, "/").await;
        candidates.sort_by_key(KeyValue::create_revision);
        let id = candidates.first().map(|candidate| candidate.value_str().unwrap());
        leader = programs.keys().copied().find(|program| Some(*program) == id);
        leader.is_some()
    })
    .await;
    leader.unwrap()
}

/// Panics unless each document is indexed completely, once, and in order. Removes everything.
async fn check_index(scope: &Scope) {
    let documents = all(scope, "-docs/").await;
    let mut steps = BTreeMap::new();
    let mut entries = 0;
    for entry in all(scope, "-index/").await {
        assert_eq!(entry.version(), 1, "indexed twice: {}", entry.key_str().unwrap());
        let number: usize = entry.key_str().unwrap().rsplit_once('/').unwrap().1.parse().unwrap();
        let revision = steps.entry(number).or_insert(entry.mod_revision());
        assert_eq!(*revision, entry.mod_revision(), "document {number} was indexed in one transaction");
        entries += 1;
    }
    assert_eq!(steps.keys().copied().collect::<Vec<_>>(), (1..=documents.len()).collect::<Vec<_>>());
    assert!(steps.values().is_sorted(), "indexed in order");
    // "7: the leader takes the lock": five words of which one is there twice.
    assert_eq!(entries, documents.len() * 5);
    assert_eq!(all(scope, "-cursor").await[0].version(), i64::try_from(documents.len()).unwrap());
    scope.client().delete(scope.name(), Some(DeleteOptions::new().with_prefix())).await.unwrap();
}

#[tokio::test]
async fn after_a_kill_another_goes_on_without_gap_or_duplicate() {
    scoped(async |scope| {
        let mut programs = BTreeMap::new();
        for id in ["first", "second", "third"] {
            programs.insert(id, indexer(scope, id, 1, DOCUMENTS));
        }
        for killed_at in [DOCUMENTS / 5, DOCUMENTS / 2] {
            indexed(scope, killed_at).await;
            // On a slow machine leaders may change without us; then another is killed, which must not matter either.
            let leader = leader(scope, &programs).await;
            programs.remove(leader).unwrap().process.kill();
        }
        let (_, mut last) = programs.pop_first().unwrap();
        indexed(scope, DOCUMENTS).await;
        while leading(&mut last).await <= DOCUMENTS / 2 {}
        last.signal(Signal::SIGTERM);
        assert_eq!(last.code().await, 0);
        check_index(scope).await;
    })
    .await;
}

#[tokio::test]
async fn a_leader_that_stood_still_does_not_index_on() {
    scoped(async |scope| {
        let mut first = indexer(scope, "first", 2, DOCUMENTS);
        leading(&mut first).await;
        let mut second = indexer(scope, "second", 10, 0);
        second.line("following leader=first").await;
        indexed(scope, DOCUMENTS / 5).await;
        first.process.pause();
        leading(&mut second).await;
        first.process.resume();
        first.line("lost").await;
        first.line("following leader=second").await;
        indexed(scope, DOCUMENTS).await;
        for program in [&mut second, &mut first] {
            program.signal(Signal::SIGTERM);
            assert_eq!(program.code().await, 0);
        }
        check_index(scope).await;
    })
    .await;
}

#[tokio::test]
async fn who_lost_the_leadership_campaigns_again_and_who_resigns_hands_over() {
    scoped(async |scope| {
        let mut first = indexer(scope, "first", 20, 50);
        assert_eq!(leading(&mut first).await, 1);
        indexed(scope, 5).await;
        let line = Some(DeleteOptions::new().with_prefix());
        scope.client().delete(scope.key(""), line).await.unwrap();
        first.line("lost").await;
        assert!(leading(&mut first).await > 5);
        indexed(scope, 15).await;
        let mut second = indexer(scope, "second", 20, 0);
        second.line("following leader=first").await;
        first.signal(Signal::SIGTERM);
        assert_eq!(first.code().await, 0);
        first.line("resigned").await;
        leading(&mut second).await;
        indexed(scope, 50).await;
        second.signal(Signal::SIGTERM);
        assert_eq!(second.code().await, 0);
        check_index(scope).await;
    })
    .await;
}
