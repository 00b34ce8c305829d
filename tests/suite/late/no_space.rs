//! Giving up while etcd is out of space and takes nothing but deletions.

use std::time::Duration;

use etcd_client::{Client, CompactionOptions, DeleteOptions, Txn, TxnOp};
use etcd_recipes::service::Instance;
use etcd_recipes::{ConfigCache, Election, Error, Mutex, Queue, Result, Session, SessionState};
use tokio::time::timeout;

use super::{PATIENCE, Rig, arrive, assert_holds};
use crate::service_registration::services;
use crate::support::check::{alive_tasks, eventually, scoped_on};
use crate::support::faults::{Fault, Until};
use crate::support::line::text;
use crate::support::needs::{Needs, lacking};
use crate::support::server::{Options, Server};
use crate::support::sessions::connect;

/// Writes until etcd refuses.
pub(super) async fn fill(client: &mut Client) {
    for number in 0..1000 {
        match client.put(format!("fill/{number}"), vec![b'x'; 1024 * 1024], None).await {
            Ok(_) => {}
            Err(error) if error.to_string().contains("space exceeded") => return,
            Err(error) => panic!("{error}"),
        }
    }
    panic!("etcd has no quota");
}

/// Makes space again, as an operator does.
pub(super) async fn make_space(server: &Server) {
    let mut client = server.client().await;
    client.delete("fill/", Some(DeleteOptions::new().with_prefix())).await.unwrap();
    let revision = client.get("fill/", None).await.unwrap().header().unwrap().revision();
    client.compact(revision, Some(CompactionOptions::new().with_physical())).await.unwrap();
    client.defragment().await.unwrap();
    server.ctl(["alarm", "disarm"]).await;
}

#[tokio::test]
async fn cancelled_lock_leaves_no_key_without_space() {
    if lacking(Needs::Settings) {
        return;
    }
    let server = Server::with(Options::fast().arg("--quota-backend-bytes=8388608")).await;
    scoped_on(&server, async |scope| {
        let rig = Rig::new(scope, "lock").await;
        let entry = rig.txns().inject(Fault::NeverAnswer);
        let mutex = rig.mutex();
        let call = tokio::spawn(async move { mutex.lock().await });
        entry.answered(1).await;
        assert_eq!(rig.line().await.len(), 1);
        fill(&mut scope.client()).await;
        // What is refused meanwhile waits for space. The key does not.
        let refused = timeout(PATIENCE, rig.mutex().lock()).await.expect("stuck");
        assert!(matches!(refused, Err(Error::NoSpace { .. })), "{refused:?}");
        let late = rig.txns().always().inject(Fault::Twice(Until::Released));
        call.abort();
        eventually(PATIENCE, "the cancelled call leaves no key", async || rig.line().await.is_empty()).await;
        rig.faults.clear();
        let refused = timeout(PATIENCE, rig.mutex().lock()).await.expect("stuck");
        assert!(matches!(refused, Err(Error::NoSpace { .. })), "{refused:?}");

        make_space(&server).await;
        rig.idle().await;
        let next = timeout(PATIENCE, rig.mutex().lock()).await.expect("stuck").unwrap();
        assert_eq!(text(next.key()), rig.first_key(), "the name of the key was not used again");
        arrive(&late).await;
        assert_holds(&rig, &next).await;
        next.unlock().await.unwrap();
        assert!(rig.line().await.is_empty());
        rig.close().await;
    })
    .await;
}

/// A lock that was refused by its second attempt, while the first is still on its way.
#[tokio::test]
async fn refused_lock_takes_nothing_later() {
    if lacking(Needs::Settings) {
        return;
    }
    let server = Server::with(Options::fast().arg("--quota-backend-bytes=8388608")).await;
    scoped_on(&server, async |scope| {
        let rig = Rig::new(scope, "lock").await;
        let late = rig.txns().inject(Fault::Hold(Until::Released));
        let mutex = rig.mutex();
        let call = tokio::spawn(async move { mutex.lock().await });
        let lost = rig.txns().always().inject(Fault::FailBefore);
        lost.hit(1).await;
        fill(&mut scope.client()).await;
        rig.faults.clear();
        let refused = call.await.unwrap();
        assert!(matches!(refused, Err(Error::NoSpace { .. })), "{refused:?}");
        make_space(&server).await;
        arrive(&late).await;
        // The session goes on until the first attempt can do nothing.
        rig.idle().await;
        assert!(rig.line().await.is_empty(), "{:?}", rig.line().await);
        rig.pass().await;
        rig.close().await;
    })
    .await;
}

/// A refusal is an answer, and nothing is sent again. But the network may have a second copy.
#[tokio::test]
async fn a_copy_of_what_was_refused_does_nothing_when_there_is_space_again() {
    if lacking(Needs::Settings) {
        return;
    }
    let server = Server::with(Options::fast().arg("--quota-backend-bytes=8388608")).await;
    scoped_on(&server, async |scope| {
        let rig = Rig::new(scope, "line").await;
        let watches = async |count| {
            let there = async || rig.faults.messages_received("Watch") >= count;
            eventually(PATIENCE, "the watch is there", there).await;
        };
        // One stream for what is held, one for views, and a task for registrations: all that stays.
        let guard = Mutex::new(&rig.session, scope.key("held")).unwrap().lock().await.unwrap();
        watches(1).await;
        let config = ConfigCache::open(&rig.session, scope.key("config")).await.unwrap();
        watches(2).await;
        let services = services(scope, &rig.session);
        let other = Instance::new("other", "127.0.0.1:8400");
        services.register(other).await.unwrap().deregister().await.unwrap();
        let queue = Queue::new(&rig.session, scope.key("queue")).unwrap();
        let tasks = alive_tasks();
        fill(&mut scope.client()).await;

        let late =
            rig.faults.on("Txn").containing(scope.name()).always().inject(Fault::Twice(Until::Released));
        let refused =
            |result: Result<()>| assert!(matches!(result, Err(Error::NoSpace { .. })), "{result:?}");
        let (mutex, election) = (rig.mutex(), rig.election());
        let write = Txn::new().and_then([TxnOp::put(scope.key("written"), "", None)]);
        // At once, so that none of them serves another.
        tokio::join!(
            async { refused(mutex.lock().await.map(drop)) },
            async { refused(mutex.try_lock().await.map(drop)) },
            async { refused(election.campaign("value").await.map(drop)) },
            async { refused(guard.txn(write).await.map(drop)) },
            async { refused(config.publish("key", "value").await.map(drop)) },
            async { refused(queue.enqueue("item").await.map(drop)) },
            async { refused(services.register(Instance::new("new", "127.0.0.1:8400")).await.map(drop)) },
        );
        assert!(late.hits() >= 7);
        // Whatever is sent later may have copies as well, but not here.
        rig.faults.clear();

        make_space(&server).await;
        eventually(PATIENCE, "what was refused is settled", async || alive_tasks() <= tasks).await;
        arrive(&late).await;
        assert_eq!(scope.keys().await, [text(guard.key())]);
        guard.unlock().await.unwrap();
        rig.pass().await;
        drop((config, queue));
        rig.close().await;
    })
    .await;
}

/// What needs no space goes on without it, and the rest as soon as there is some again.
#[tokio::test]
async fn holds_outlive_the_space_and_are_released_without_it() {
    if lacking(Needs::Settings) {
        return;
    }
    let server = Server::with(Options::fast().arg("--quota-backend-bytes=8388608")).await;
    scoped_on(&server, async |scope| {
        let session = connect(scope, Session::builder([scope.endpoint()]).ttl(Duration::from_secs(3))).await;
        let mutex = |name| Mutex::new(&session, scope.key(name)).unwrap();
        let [guard, contended] =
            [mutex("lock").lock().await.unwrap(), mutex("contended").lock().await.unwrap()];
        let waiter = tokio::spawn({
            let mutex = mutex("contended");
            async move { mutex.lock().await.unwrap() }
        });
        eventually(PATIENCE, "it waits", async || scope.keys().await.len() == 3).await;
        let leadership = Election::new(&session, scope.key("election")).unwrap().campaign("v").await.unwrap();
        fill(&mut scope.client()).await;

        let refused = timeout(PATIENCE, mutex("new").lock()).await.expect("stuck");
        assert!(matches!(refused, Err(Error::NoSpace { .. })), "{refused:?}");
        assert!(matches!(leadership.proclaim("w").await, Err(Error::NoSpace { .. })));
        // Longer than the lease lives without keepalives.
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert!(guard.is_held() && contended.is_held() && leadership.is_held());
        assert_eq!(session.state(), SessionState::Connected { generation: 1 });
        timeout(PATIENCE, contended.unlock()).await.expect("stuck").unwrap();
        let next = timeout(PATIENCE, waiter).await.expect("not handed over").unwrap();
        for guard in [guard, next] {
            timeout(PATIENCE, guard.unlock()).await.expect("stuck").unwrap();
        }
        timeout(PATIENCE, leadership.resign()).await.expect("stuck").unwrap();
        assert!(scope.keys().await.is_empty());

        make_space(&server).await;
        let guard = timeout(PATIENCE, mutex("new").lock()).await.expect("stuck").unwrap();
        guard.unlock().await.unwrap();
        session.close().await.unwrap();
    })
    .await;
}
