//! etcd is out of space: what would take some is refused with a clear error, and what gives some back works.

use std::time::{Duration, Instant};

use etcd_client::{AlarmAction, AlarmType, Client, Txn, TxnOp};
use etcd_recipes::{Election, Error, Mutex, Session, SessionState};

use crate::support::check::{Scope, eventually, scoped_on};
use crate::support::holds::{States, reaches};
use crate::support::server::{Options, PATIENCE, Server};

const TTL: Duration = Duration::from_secs(2);

async fn session(scope: &Scope) -> Session {
    let session = Session::builder([scope.endpoint()]).ttl(TTL).connect().await.unwrap();
    scope.owns_lease(session.lease_id().unwrap());
    session
}

/// Writes one key until etcd raises its alarm.
async fn fill(client: &mut Client, key: &str) {
    for _ in 0..1000 {
        match client.put(key, vec![b'x'; 1024 * 1024], None).await {
            Ok(_) => {}
            Err(error) if error.to_string().contains("database space exceeded") => return,
            Err(error) => panic!("cannot fill etcd: {error}"),
        }
    }
    panic!("etcd has no end");
}

/// What an operator does.
async fn make_space(server: &Server, client: &mut Client, key: &str) {
    client.delete(key, None).await.unwrap();
    server.compact().await;
    client.defragment().await.unwrap();
    client.alarm(AlarmAction::Deactivate, AlarmType::Nospace, None).await.unwrap();
}

fn no_space<T: std::fmt::Debug>(what: &str, result: Result<T, Error>) {
    assert!(matches!(result, Err(Error::NoSpace { .. })), "{what}: {result:?}");
}

/// Everything that would write a key says why it does not, soon.
async fn refused(scope: &Scope, session: &Session) {
    let started = Instant::now();
    let mutex = Mutex::new(session, scope.key("refused")).unwrap();
    no_space("lock", mutex.lock().await);
    no_space("try_lock", mutex.try_lock().await);
    let election = Election::new(session, scope.key("refused election")).unwrap();
    no_space("campaign", election.campaign("x").await);
    no_space("connect", Session::connect([scope.endpoint()]).await);
    assert_eq!(election.leader().await.unwrap(), None);
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_space_locks_are_refused_and_released_but_not_lost() {
    let server = Server::with(Options::fast().arg("--quota-backend-bytes=16777216")).await;
    scoped_on(&server, async |scope| {
        let (first, second, third) = (session(scope).await, session(scope).await, session(scope).await);
        let states = [States::of(&first), States::of(&second)];
        let name = scope.key("lock");
        let held = Mutex::new(&first, &name).unwrap().lock().await.unwrap();
        let leads = Election::new(&first, scope.key("election")).unwrap().campaign("before").await.unwrap();
        let waits = Mutex::new(&second, &name).unwrap();
        let waiting = tokio::spawn(async move { waits.lock().await.unwrap() });
        eventually(PATIENCE, "all are in line", async || scope.keys().await.len() == 3).await;

        let (mut client, filler) = (scope.client(), format!("{}-filler", scope.name()));
        fill(&mut client, &filler).await;
        refused(scope, &second).await;
        no_space("proclaim", leads.proclaim("after").await);
        no_space("txn", held.txn(Txn::new().and_then([TxnOp::put(scope.key("data"), "", None)])).await);
        assert_eq!(scope.keys().await.len(), 3, "something was written");
        // A session that loses its lease now cannot have another.
        client.lease_revoke(third.lease_id().unwrap()).await.unwrap();
        reaches(&third, SessionState::Lost { generation: 1 }).await;
        // What is held stays held, past the TTL.
        tokio::time::sleep(TTL * 2).await;
        assert!(held.is_held() && leads.is_held());
        assert_eq!(third.lease_id(), None);

        leads.resign().await.unwrap();
        held.unlock().await.unwrap();
        let next = tokio::time::timeout(PATIENCE, waiting).await.expect("no turn without space").unwrap();
        next.unlock().await.unwrap();
        states.iter().for_each(States::never_lost);

        make_space(&server, &mut client, &filler).await;
        for session in [&first, &second] {
            let guard = Mutex::new(session, scope.key("refused")).unwrap().lock().await.unwrap();
            guard.unlock().await.unwrap();
        }
        reaches(&third, SessionState::Connected { generation: 2 }).await;
        scope.owns_lease(third.lease_id().unwrap());
        for session in [first, second, third] {
            session.close().await.unwrap();
        }
    })
    .await;
}
