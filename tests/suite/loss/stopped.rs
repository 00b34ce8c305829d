//! The process is stopped past its TTL while others take its locks over, and goes on: it knows at once, and what it
//! writes is refused.

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Client, Txn, TxnOp};
use etcd_recipes::{Mutex, MutexGuard, Session};
use futures::future::join_all;

use crate::support::check::{Scope, scoped};
use crate::support::child::{Child, Role, role};
use crate::support::clock::boottime;
use crate::support::holds::{Belief, Deletions};
use crate::support::rounds;

const TTL: Duration = Duration::from_secs(2);

fn lock_name(name: &str, index: usize) -> String {
    format!("{name}/lock{index}")
}

fn data_key(name: &str, index: usize) -> String {
    format!("{name}/data{index}")
}

/// A process with locks. It obeys lines from its parent, and answers each.
#[test]
#[ignore = "run by other tests, in a process of its own"]
fn body() {
    let Some(role) = role() else { return };
    let runtime = match role.variable("FLAVOUR").as_str() {
        "current" => tokio::runtime::Builder::new_current_thread().enable_all().build(),
        _ => tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build(),
    };
    runtime.unwrap().block_on(hold(role));
}

async fn hold(mut role: Role) {
    let (endpoint, name) = (role.variable("ENDPOINT"), role.variable("NAME"));
    let locks: usize = role.variable("LOCKS").parse().unwrap();
    let session = Session::builder([endpoint.as_str()]).ttl(TTL).connect().await.unwrap();
    let mut guards = Vec::new();
    for index in 0..locks {
        guards.push(Mutex::new(&session, lock_name(&name, index)).unwrap().lock().await.unwrap());
    }
    let guards = Arc::new(guards);
    let asked = guards.clone();
    let belief = Belief::of(move || asked.iter().any(MutexGuard::is_held));
    role.say(session.lease_id().unwrap().to_string());

    assert_eq!(role.hear().await, "write");
    let client = Client::connect([endpoint], None).await.unwrap();
    let mut refused = 0;
    for (index, guard) in guards.iter().enumerate() {
        refused += usize::from(!writes(guard, &client, &data_key(&name, index)).await);
    }
    role.say(refused.to_string());
    let answers = belief.answers();
    assert!(!answers.revived);
    role.say(answers.last_yes.as_nanos().to_string());

    drop(belief);
    for guard in Arc::into_inner(guards).unwrap() {
        assert!(guard.unlock().await.unwrap_err().is_lost());
    }
    session.close().await.unwrap();
    role.say("bye");
}

/// Writes in both ways a guard offers. Whether one of them was let.
async fn writes(guard: &MutexGuard, client: &Client, key: &str) -> bool {
    let put = TxnOp::put(key, "old", None);
    let result = guard.txn(Txn::new().and_then([put.clone()])).await;
    let through_guard = match &result {
        Ok(response) => response.succeeded(),
        Err(error) => !error.is_lost(),
    };
    // The guard may have refused by itself; this asks etcd.
    let compared = client.clone().txn(Txn::new().when([guard.compare()]).and_then([put])).await.unwrap();
    through_guard || compared.succeeded()
}

/// One process, stopped and continued. How many writes were refused.
async fn stop_past_the_ttl(scope: &Scope, deletions: &Deletions, round: usize, locks: usize) -> usize {
    let name = scope.key(&round.to_string());
    let flavour = if round.is_multiple_of(2) { "multi" } else { "current" };
    let variables = [
        ("ENDPOINT", scope.endpoint()),
        ("NAME", &name),
        ("LOCKS", &locks.to_string()),
        ("FLAVOUR", flavour),
    ];
    let mut child = Child::spawn("loss::stopped::body", &variables);
    scope.owns_lease(child.line().await.parse().unwrap());
    let prefix = format!("{}/", lock_name(&name, 0));
    let key = scope.keys().await.into_iter().find(|key| key.starts_with(&prefix)).unwrap();
    // Any time between two renewals.
    tokio::time::sleep(fastrand::u32(..100) * TTL / 300).await;
    child.pause();
    let stopped = boottime();

    let session = Session::connect([scope.endpoint()]).await.unwrap();
    scope.owns_lease(session.lease_id().unwrap());
    let mut taken = Vec::new();
    for index in 0..locks {
        let guard = Mutex::new(&session, lock_name(&name, index)).unwrap().lock().await.unwrap();
        let put = TxnOp::put(data_key(&name, index), "new", None);
        guard.txn(Txn::new().and_then([put])).await.unwrap();
        taken.push(guard);
    }
    let deletion = deletions.of(key.as_bytes()).await;
    child.resume();
    child.tell("write");
    let refused = child.line().await.parse().unwrap();
    let last_yes = Duration::from_nanos(child.line().await.parse().unwrap());
    assert!(last_yes <= stopped, "believed when it woke up, {:?} after it stopped", last_yes - stopped);
    assert!(last_yes < deletion.at);
    child.expect("bye").await;
    assert!(child.wait().await.success());
    let mut client = scope.client();
    for (index, guard) in taken.into_iter().enumerate() {
        let key = data_key(&name, index);
        let value = client.get(key.as_str(), None).await.unwrap();
        assert_eq!(value.kvs()[0].value(), b"new", "an old holder wrote");
        client.delete(key, None).await.unwrap();
        guard.unlock().await.unwrap();
    }
    session.close().await.unwrap();
    refused
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_stopped_past_its_ttl_knows_when_it_wakes_up_and_cannot_write() {
    scoped(async |scope| {
        let deletions = Deletions::below(scope.endpoint(), scope.name()).await;
        let (rounds, locks) = (rounds(4, 40), 25);
        let mut refused = 0;
        for first in (0..rounds).step_by(4) {
            let round = |round| stop_past_the_ttl(scope, &deletions, round, locks);
            refused += join_all((first..first + 4).map(round)).await.into_iter().sum::<usize>();
        }
        println!("writes of an old holder: {refused} of {} refused", rounds * locks);
        assert_eq!(refused, rounds * locks);
    })
    .await;
}
