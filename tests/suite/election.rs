//! Elections: candidates, the leader, what it proclaims, and how it ends.

use std::time::{Duration, Instant};

use etcd_recipes::etcd_client::{Txn, TxnOp};
use etcd_recipes::{Election, Error, Leadership, Mutex, Session};
use futures::{StreamExt as _, poll};

use crate::support::check::{Scope, eventually, scoped};
use crate::support::faults::{Fault, Faults, Until};
use crate::support::server::PATIENCE;
use crate::support::sessions::{connect, create_revision, generation, session, waits};

const SHORT: Duration = Duration::from_millis(200);

fn election(session: &Session, scope: &Scope) -> Election {
    Election::new(session, scope.name()).unwrap()
}

/// What the leader says now.
async fn said(election: &Election) -> Option<String> {
    let leader = election.leader().await.unwrap();
    leader.map(|leader| String::from_utf8(leader.value).unwrap())
}

/// Waits until this many candidates are registered.
async fn candidates(election: &Election, count: usize) {
    let what = format!("{count} candidates");
    eventually(PATIENCE, &what, async || election.candidates().await.unwrap().len() == count).await;
}

/// The version of a key: how often it was written.
async fn version(scope: &Scope, key: &[u8]) -> Option<i64> {
    let answer = scope.client().get(key, None).await.unwrap();
    answer.kvs().first().map(etcd_recipes::etcd_client::KeyValue::version)
}

#[tokio::test]
async fn the_first_candidate_leads_and_the_others_follow_in_order() {
    scoped(async |scope| {
        let sessions = [session(scope).await, session(scope).await, session(scope).await];
        let [a, b, c] = sessions.each_ref().map(|session| election(session, scope));
        assert_eq!(c.leader().await.unwrap(), None);
        assert!(c.candidates().await.unwrap().is_empty());

        let first = a.campaign("a").await.unwrap();
        let leader = c.leader().await.unwrap().expect("a leads");
        assert_eq!((leader.key.as_slice(), leader.value.as_slice()), (first.key(), &b"a"[..]));
        assert_eq!(leader.create_revision, create_revision(first.compare()));
        assert_eq!(Some(leader.lease), sessions[0].lease_id());

        let mut second = Box::pin(b.campaign("b"));
        assert!(waits(SHORT, &mut second).await);
        let mut third = Box::pin(c.campaign("c"));
        assert!(waits(SHORT, &mut third).await);
        let order: Vec<_> = a.candidates().await.unwrap().iter().map(|candidate| candidate.lease).collect();
        let leases: Vec<_> = sessions.iter().map(|session| session.lease_id().unwrap()).collect();
        assert_eq!(order, leases);

        let tokens = [first.token()];
        first.resign().await.unwrap();
        let second = second.await.unwrap();
        assert_eq!(said(&a).await.as_deref(), Some("b"));
        assert!(waits(SHORT, &mut third).await);
        let tokens = [tokens[0], second.token()];
        drop(second);
        let third = third.await.unwrap();
        assert_eq!(said(&a).await.as_deref(), Some("c"));
        assert!(tokens[0] < tokens[1] && tokens[1] < third.token());
        third.resign().await.unwrap();
        assert_eq!(said(&a).await, None);
        for session in sessions {
            session.close().await.unwrap();
        }
    })
    .await;
}

#[tokio::test]
async fn a_candidate_that_gives_up_is_gone() {
    scoped(async |scope| {
        let (a, b) = (session(scope).await, session(scope).await);
        let (leading, waiting) = (election(&a, scope), election(&b, scope));
        let leadership = leading.campaign("a").await.unwrap();
        let mut second = Box::pin(waiting.campaign("b"));
        assert!(waits(SHORT, &mut second).await);
        drop(second);
        candidates(&leading, 1).await;
        leadership.resign().await.unwrap();
        assert_eq!(said(&leading).await, None);
        a.close().await.unwrap();
        b.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_leader_proclaims_as_often_as_it_likes() {
    scoped(async |scope| {
        let session = session(scope).await;
        let election = election(&session, scope);
        let leadership = election.campaign("0").await.unwrap();
        for value in ["1", "2", "", "2"] {
            leadership.proclaim(value).await.unwrap();
            assert_eq!(said(&election).await.as_deref(), Some(value));
        }
        assert_eq!(version(scope, leadership.key()).await, Some(5));
        // It is the same leadership, on the same lease.
        let leader = election.leader().await.unwrap().unwrap();
        assert_eq!(leader.create_revision, create_revision(leadership.compare()));
        assert_eq!(Some(leader.lease), session.lease_id());
        assert!(leadership.is_held());
        leadership.resign().await.unwrap();
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn proclamations_at_once_all_take_effect_and_the_value_is_one_of_them() {
    scoped(async |scope| {
        let session = session(scope).await;
        let election = election(&session, scope);
        let leadership = election.campaign("0").await.unwrap();
        let all = (1..=10).map(|number| leadership.proclaim(number.to_string()));
        let results = futures::future::join_all(all).await;
        assert!(results.iter().all(Result::is_ok), "{results:?}");
        assert_eq!(version(scope, leadership.key()).await, Some(11));
        let last: u32 = said(&election).await.unwrap().parse().unwrap();
        assert!((1..=10).contains(&last));
        leadership.resign().await.unwrap();
        session.close().await.unwrap();
    })
    .await;
}

/// As in a `select` that went on with something else. They take effect in the order of their calls all the same.
#[tokio::test]
async fn proclamations_that_are_not_polled_any_more_keep_nobody_waiting() {
    scoped(async |scope| {
        let faults = Faults::new(scope.endpoint());
        let session = connect(scope, Session::builder_with_client(faults.client().await)).await;
        let election = election(&session, scope);
        let leadership = election.campaign("0").await.unwrap();
        let held = faults.on("Txn").containing(scope.name()).inject(Fault::Hold(Until::Released));
        let mut under_way = Box::pin(leadership.proclaim("1"));
        let mut waiting = Box::pin(leadership.proclaim("2"));
        assert!(poll!(&mut under_way).is_pending() && poll!(&mut waiting).is_pending());
        held.hit(1).await;
        held.release();
        let next = tokio::time::timeout(PATIENCE, leadership.proclaim("3"));
        next.await.expect("it waits for the others").unwrap();
        under_way.await.unwrap();
        waiting.await.unwrap();
        assert_eq!(said(&election).await.unwrap(), "3");
        assert_eq!(version(scope, leadership.key()).await, Some(4));
        leadership.resign().await.unwrap();
        session.close().await.unwrap();
    })
    .await;
}

/// Nobody takes their answers, of more than the connection's window has room for by default.
#[tokio::test]
async fn large_reads_that_are_not_polled_any_more_keep_nobody_waiting() {
    scoped(async |scope| {
        let session = session(scope).await;
        let name = scope.key("election");
        let election = Election::new(&session, &name).unwrap();
        let mutex = Mutex::new(&session, scope.key("lock")).unwrap();
        for number in 0..3 {
            scope.client().put(format!("{name}/{number}"), vec![b'x'; 1 << 20], None).await.unwrap();
        }
        // Now it is connected: a read is sent with its first poll.
        mutex.lock().await.unwrap().unlock().await.unwrap();
        let mut reads: Vec<_> = (0..4).map(|_| Box::pin(election.candidates())).collect();
        for read in &mut reads {
            assert!(poll!(read).is_pending());
        }
        let started = Instant::now();
        while started.elapsed() < Duration::from_secs(1) {
            let guard = tokio::time::timeout(PATIENCE, mutex.lock()).await.expect("they wait for the reads");
            guard.unwrap().unlock().await.unwrap();
        }
        for read in reads {
            assert_eq!(read.await.unwrap().len(), 3);
        }
        for number in 0..3 {
            scope.client().delete(format!("{name}/{number}"), None).await.unwrap();
        }
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_value_that_somebody_else_wrote_over_is_proclaimed_again() {
    scoped(async |scope| {
        let session = session(scope).await;
        let election = election(&session, scope);
        let leadership = election.campaign("0").await.unwrap();
        // Without the lease, too: the key would stay for ever.
        scope.client().put(leadership.key(), "graffiti", None).await.unwrap();
        leadership.proclaim("1").await.unwrap();
        let leader = election.leader().await.unwrap().unwrap();
        assert_eq!((leader.value.as_slice(), Some(leader.lease)), (&b"1"[..], session.lease_id()));
        leadership.resign().await.unwrap();
        session.close().await.unwrap();
    })
    .await;
}

/// Fails unless a lost leadership can do nothing any more, to whatever key is there now.
async fn is_over(scope: &Scope, leadership: Leadership) {
    let key = leadership.key().to_vec();
    let before = version(scope, &key).await;
    let error = leadership.proclaim("late").await.unwrap_err();
    assert!(matches!(error, Error::Lost { .. }), "{error}");
    assert!(!leadership.is_held());
    let error = leadership.txn(Txn::new().and_then([TxnOp::delete(key.clone(), None)])).await.unwrap_err();
    assert!(matches!(error, Error::Lost { .. }), "{error}");
    let error = leadership.run(std::future::pending::<()>()).await.unwrap_err();
    assert!(matches!(error, Error::Lost { .. }), "{error}");
    tokio::time::timeout(PATIENCE, leadership.lost()).await.expect("the loss is told");
    let error = leadership.resign().await.unwrap_err();
    assert!(matches!(error, Error::Lost { .. }), "{error}");
    assert_eq!(version(scope, &key).await, before);
}

#[tokio::test]
async fn a_leader_whose_key_was_deleted_can_do_nothing() {
    scoped(async |scope| {
        let (a, b) = (session(scope).await, session(scope).await);
        let (old, new) = (election(&a, scope), election(&b, scope));
        let leadership = old.campaign("old").await.unwrap();
        let mut next = Box::pin(new.campaign("new"));
        assert!(waits(SHORT, &mut next).await);
        scope.client().delete(leadership.key(), None).await.unwrap();
        let next = next.await.unwrap();
        is_over(scope, leadership).await;
        assert_eq!(said(&old).await.as_deref(), Some("new"));

        // The same when the key's name exists again, made by somebody else.
        let key = next.key().to_vec();
        scope.client().delete(key.clone(), None).await.unwrap();
        scope.client().put(key.clone(), "another", None).await.unwrap();
        is_over(scope, next).await;
        assert_eq!(said(&old).await.as_deref(), Some("another"));
        scope.client().delete(key, None).await.unwrap();
        a.close().await.unwrap();
        b.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_leader_whose_lease_was_revoked_can_do_nothing() {
    scoped(async |scope| {
        let session = session(scope).await;
        let election = election(&session, scope);
        let leadership = election.campaign("old").await.unwrap();
        scope.client().lease_revoke(session.lease_id().unwrap()).await.unwrap();
        is_over(scope, leadership).await;
        assert_eq!(said(&election).await, None);
        // The session goes on with another lease, and may lead again.
        let again = election.campaign("new").await.unwrap();
        generation(scope, &session, 2).await;
        assert_eq!(said(&election).await.as_deref(), Some("new"));
        again.resign().await.unwrap();
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_detached_leadership_lasts_and_is_taken_up_again() {
    scoped(async |scope| {
        let (a, b) = (session(scope).await, session(scope).await);
        let (ours, theirs) = (election(&a, scope), election(&b, scope));
        let leadership = ours.campaign("a").await.unwrap();
        let (key, token) = (leadership.key().to_vec(), leadership.token());
        let detached = leadership.detach();
        assert_eq!(detached.key, key);
        let mut waiting = Box::pin(theirs.campaign("b"));
        assert!(waits(SHORT, &mut waiting).await, "it still leads");
        // Nobody but its session can take it up.
        assert!(theirs.resume(&detached).await.unwrap().is_none());

        let leadership = ours.resume(&detached).await.unwrap().expect("still ours");
        assert!(leadership.is_held() && leadership.token() >= token);
        assert_eq!(leadership.key(), key);
        leadership.proclaim("a2").await.unwrap();
        assert_eq!(said(&theirs).await.as_deref(), Some("a2"));
        let token = leadership.token();
        leadership.resign().await.unwrap();
        let next = waiting.await.unwrap();
        assert!(next.token() > token);
        assert!(ours.resume(&detached).await.unwrap().is_none(), "it is over");
        next.resign().await.unwrap();
        a.close().await.unwrap();
        b.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_leadership_resumed_after_a_proclamation_proclaims_on() {
    scoped(async |scope| {
        let session = session(scope).await;
        let election = election(&session, scope);
        let leadership = election.campaign("0").await.unwrap();
        leadership.proclaim("1").await.unwrap();
        let detached = leadership.detach();
        let leadership = election.resume(&detached).await.unwrap().expect("still ours");
        leadership.proclaim("2").await.unwrap();
        assert_eq!(said(&election).await.as_deref(), Some("2"));
        assert_eq!(version(scope, leadership.key()).await, Some(3));
        // A guard that was resumed notices a loss like any other.
        let lost = leadership.lost();
        scope.client().delete(leadership.key(), None).await.unwrap();
        tokio::time::timeout(PATIENCE, lost).await.expect("the loss is noticed");
        drop(leadership);
        session.close().await.unwrap();
    })
    .await;
}

/// As long as the key of a resignation that was refused is there, somebody is about to delete it.
#[tokio::test]
async fn a_leadership_that_is_being_given_up_is_not_taken_up_again() {
    scoped(async |scope| {
        let faults = Faults::new(scope.endpoint());
        let session = connect(scope, Session::builder_with_client(faults.client().await)).await;
        let election = election(&session, scope);
        let detached = election.campaign("0").await.unwrap().detach();
        let leadership = election.resume(&detached).await.unwrap().expect("still ours");
        let refused = tonic::Status::permission_denied("etcdserver: permission denied");
        let refused = faults.on("Txn").containing(&detached.key).always().inject(Fault::FailWith(refused));
        assert!(matches!(leadership.resign().await, Err(Error::PermissionDenied { .. })));
        assert!(election.resume(&detached).await.unwrap().is_none());
        assert!(refused.hits() > 0);
        faults.clear();
        eventually(PATIENCE, "it is given up", async || scope.keys().await.is_empty()).await;
        assert!(election.resume(&detached).await.unwrap().is_none());
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_detached_leadership_is_over_with_its_lease() {
    scoped(async |scope| {
        let session = session(scope).await;
        let election = election(&session, scope);
        let detached = election.campaign("0").await.unwrap().detach();
        scope.client().lease_revoke(session.lease_id().unwrap()).await.unwrap();
        generation(scope, &session, 2).await;
        assert!(election.resume(&detached).await.unwrap().is_none());
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn closing_the_session_ends_a_detached_leadership() {
    scoped(async |scope| {
        let (a, b) = (session(scope).await, session(scope).await);
        let watcher = election(&b, scope);
        let _detached = election(&a, scope).campaign("a").await.unwrap().detach();
        let mut seen = watcher.observe();
        assert!(seen.next().await.unwrap().unwrap().leader.is_some());
        a.close().await.unwrap();
        assert!(seen.next().await.unwrap().unwrap().leader.is_none());
        drop(seen);
        b.close().await.unwrap();
    })
    .await;
}
