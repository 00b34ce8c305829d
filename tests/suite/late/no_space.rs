//! Giving up while etcd is out of space and takes nothing but deletions.

use etcd_client::{Client, CompactionOptions, DeleteOptions};
use etcd_recipes::Error;
use tokio::time::timeout;

use super::{PATIENCE, Rig, arrive, assert_holds};
use crate::support::check::{eventually, scoped_on};
use crate::support::faults::{Fault, Until};
use crate::support::line::text;
use crate::support::server::{Options, Server};

/// Writes until etcd refuses.
async fn fill(client: &mut Client) {
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
async fn make_space(server: &Server) {
    let mut client = server.client().await;
    client.delete("fill/", Some(DeleteOptions::new().with_prefix())).await.unwrap();
    let revision = client.get("fill/", None).await.unwrap().header().unwrap().revision();
    client.compact(revision, Some(CompactionOptions::new().with_physical())).await.unwrap();
    client.defragment().await.unwrap();
    server.ctl(["alarm", "disarm"]).await;
}

#[tokio::test]
async fn cancelled_lock_leaves_no_key_without_space() {
    let server = Server::with(Options::fast().arg("--quota-backend-bytes=8388608")).await;
    scoped_on(&server, async |scope| {
        let rig = Rig::new(scope, "lock").await;
        let entry = rig.txns().inject(Fault::NeverAnswer);
        let mutex = rig.mutex();
        let call = tokio::spawn(async move { mutex.lock().await });
        entry.answered(1).await;
        assert_eq!(rig.line().await.len(), 1);
        fill(&mut scope.client()).await;
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
