//! A burst of writes that the session has to hear of delays neither its keepalives nor its hand-offs.

use std::time::{Duration, Instant};

use etcd_client::{Txn, TxnOp};
use etcd_recipes::{Election, Mutex, Session, SessionState};
use futures::StreamExt as _;

use crate::support::check::scoped_on;
use crate::support::holds::States;
use crate::support::measure::Samples;
use crate::support::server::{PATIENCE, Server};
use crate::support::sessions::connect;

/// Puts of the burst, and in one transaction.
const WRITES: usize = 10_000;
const AT_ONCE: usize = 100;
/// A hand-off that takes longer is delayed, also on a machine under load.
const BOUND: Duration = Duration::from_secs(1);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_burst_of_writes_to_a_watched_prefix_delays_nothing() {
    let server = Server::fast().await;
    scoped_on(&server, async |scope| {
        let builder = || Session::builder([scope.endpoint()]).ttl(Duration::from_secs(3));
        let (one, two) = (connect(scope, builder()).await, connect(scope, builder()).await);
        let states = States::of(&one);
        // It hears of everything below its name, and does not look as long as the burst lasts.
        let mut observed = Election::new(&one, scope.key("election")).unwrap().observe();
        observed.next().await.unwrap().unwrap();
        let mutexes = [&one, &two].map(|session| Mutex::new(session, scope.key("lock")).unwrap());

        let client = scope.client();
        let prefix = scope.key("election");
        let burst = tokio::spawn(async move {
            for round in 0..WRITES / AT_ONCE {
                let put = |number| TxnOp::put(format!("{prefix}/{number}"), round.to_string(), None);
                let puts: Vec<TxnOp> = (0..AT_ONCE).map(put).collect();
                client.kv_client().txn(Txn::new().and_then(puts)).await.unwrap();
            }
            let options = etcd_client::DeleteOptions::new().with_prefix();
            client.kv_client().delete(format!("{prefix}/"), Some(options)).await.unwrap();
        });
        let mut hand_offs = Samples::default();
        let mut holder = mutexes[0].lock().await.unwrap();
        for turn in 1.. {
            if burst.is_finished() && turn > 20 {
                break;
            }
            let next = mutexes[turn % 2].clone();
            let waiter = tokio::spawn(async move { (next.lock().await.unwrap(), Instant::now()) });
            tokio::time::sleep(Duration::from_millis(10)).await;
            let released = Instant::now();
            holder.unlock().await.unwrap();
            let (guard, taken) = tokio::time::timeout(PATIENCE, waiter).await.expect("stuck").unwrap();
            holder = guard;
            hand_offs.add(taken.saturating_duration_since(released));
        }
        burst.await.unwrap();
        hand_offs.report("hand-offs during a burst");
        assert!(hand_offs.longest() < BOUND, "{hand_offs:?}");
        states.never_lost();
        assert_eq!(one.state(), SessionState::Connected { generation: 1 });
        holder.unlock().await.unwrap();
        // What was heard is told, and its end is the truth: nobody leads.
        let end = async { while observed.next().await.unwrap().unwrap().leader.is_some() {} };
        tokio::time::timeout(PATIENCE, end).await.expect("the observer does not get to the end");
        drop(observed);
        one.close().await.unwrap();
        two.close().await.unwrap();
    })
    .await;
}
