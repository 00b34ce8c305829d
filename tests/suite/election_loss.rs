//! Candidates that lose their lease while they wait.

use std::time::{Duration, Instant};

use etcd_recipes::{Election, Leadership, Session};

use crate::support::check::{Scope, eventually, scoped};
use crate::support::faults::{Fault, Faults, Until};
use crate::support::rounds;
use crate::support::server::PATIENCE;
use crate::support::sessions::{connect, generation, session};

/// How soon after the loss a candidate has to stand in line again.
const SOON: Duration = Duration::from_millis(250);

fn election(session: &Session, scope: &Scope) -> Election {
    Election::new(session, scope.name()).unwrap()
}

/// The leases of all candidates, in order.
async fn leases(election: &Election) -> Vec<i64> {
    election.candidates().await.unwrap().iter().map(|candidate| candidate.lease).collect()
}

async fn revoke(scope: &Scope, lease: i64) {
    scope.client().lease_revoke(lease).await.unwrap();
}

/// A campaign in a task.
fn campaign(election: &Election, value: &str) -> tokio::task::JoinHandle<Leadership> {
    let (election, value) = (election.clone(), value.to_owned());
    tokio::spawn(async move { election.campaign(value).await.unwrap() })
}

async fn finished(task: tokio::task::JoinHandle<Leadership>) -> Leadership {
    tokio::time::timeout(PATIENCE, task).await.expect("it never leads").unwrap()
}

/// Fails unless this leadership is the one etcd shows, on the session's lease of now.
async fn really_leads(election: &Election, session: &Session, leadership: &Leadership) {
    let leader = election.leader().await.unwrap().expect("somebody leads");
    assert_eq!(leader.key, leadership.key());
    assert_eq!(Some(leader.lease), session.lease_id());
    assert!(leadership.is_held());
}

#[tokio::test]
async fn a_candidate_whose_lease_is_revoked_stands_in_line_again_soon() {
    const ROUNDS: u64 = 9;
    scoped(async |scope| {
        let (a, c) = (session(scope).await, session(scope).await);
        let b = connect(scope, Session::builder([scope.endpoint()]).ttl(Duration::from_secs(60))).await;
        let [first, second, third] = [&a, &b, &c].map(|session| election(session, scope));
        let leader = first.campaign("a").await.unwrap();
        let b_campaign = campaign(&second, "b");
        eventually(PATIENCE, "b stands in line", async || leases(&first).await.len() == 2).await;
        let c_campaign = campaign(&third, "c");
        eventually(PATIENCE, "c stands in line", async || leases(&first).await.len() == 3).await;

        let mut times = Vec::new();
        for round in 1..=ROUNDS {
            let old = b.lease_id().unwrap();
            revoke(scope, old).await;
            let begin = Instant::now();
            eventually(PATIENCE, "b stands in line again", async || {
                let leases = leases(&first).await;
                assert!(!leases.contains(&old), "its keys went with the lease");
                leases.len() == 3
            })
            .await;
            times.push(begin.elapsed());
            let new = generation(scope, &b, round + 1).await;
            // At the end of the line, whatever place it had.
            assert_eq!(leases(&first).await, [a.lease_id().unwrap(), c.lease_id().unwrap(), new]);
        }
        times.sort();
        // A busy machine is late at times. Who waits for the next keepalive is never in time.
        assert!(times[times.len() / 4] < SOON, "{times:?}");

        leader.resign().await.unwrap();
        let leadership = finished(c_campaign).await;
        really_leads(&first, &c, &leadership).await;
        assert!(!b_campaign.is_finished());
        leadership.resign().await.unwrap();
        let leadership = finished(b_campaign).await;
        really_leads(&first, &b, &leadership).await;
        leadership.resign().await.unwrap();
        for session in [a, b, c] {
            session.close().await.unwrap();
        }
    })
    .await;
}

#[tokio::test]
async fn a_candidate_whose_turn_comes_when_its_lease_is_gone_leads_with_another() {
    let rounds = rounds(8, 50);
    scoped(async |scope| {
        let a = session(scope).await;
        // A short one, since an idle session hears of a revoked lease with its next keepalive.
        let b = connect(scope, Session::builder([scope.endpoint()]).ttl(Duration::from_secs(3))).await;
        let (ours, theirs) = (election(&a, scope), election(&b, scope));
        for round in 1..=rounds {
            let leader = ours.campaign("a").await.unwrap();
            let token = leader.token();
            let waiting = campaign(&theirs, "b");
            eventually(PATIENCE, "b stands in line", async || leases(&ours).await.len() == 2).await;
            // Both at once: the way is free for a candidate that is not there any more.
            let (mut client, old) = (scope.client(), b.lease_id().unwrap());
            let (revoked, resigned) = tokio::join!(client.lease_revoke(old), leader.resign());
            revoked.unwrap();
            resigned.unwrap();
            let leadership = finished(waiting).await;
            // Either it led before its lease was revoked, and then that is lost; or it leads with a new one.
            if leadership.key().starts_with(scope.key(&format!("{old:x}-")).as_bytes()) {
                tokio::time::timeout(PATIENCE, leadership.lost()).await.expect("lost with its lease");
                assert!(!leadership.is_held());
            } else {
                really_leads(&ours, &b, &leadership).await;
                leadership.proclaim("b2").await.unwrap();
            }
            assert!(leadership.token() > token);
            drop(leadership);
            generation(scope, &b, round + 1).await;
            eventually(PATIENCE, "nobody is left", async || leases(&ours).await.is_empty()).await;
        }
        a.close().await.unwrap();
        b.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_candidacy_that_was_sent_before_the_loss_and_applied_after_it_leads_nothing() {
    scoped(async |scope| {
        let faults = Faults::new(scope.endpoint());
        let session = connect(scope, Session::builder_with_client(faults.client().await)).await;
        let election = election(&session, scope);
        let old = session.lease_id().unwrap();
        let held = faults.on("Txn").containing(scope.name()).inject(Fault::Hold(Until::Released));
        let waiting = campaign(&election, "b");
        held.hit(1).await;
        revoke(scope, old).await;
        held.release();
        let leadership = finished(waiting).await;
        generation(scope, &session, 2).await;
        really_leads(&election, &session, &leadership).await;
        assert_eq!(scope.keys().await.len(), 1);
        leadership.resign().await.unwrap();
        session.close().await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn many_candidates_of_a_session_whose_lease_is_revoked_all_lead_later() {
    const MANY: usize = 20;
    scoped(async |scope| {
        let (a, b) = (session(scope).await, session(scope).await);
        let (ours, theirs) = (election(&a, scope), election(&b, scope));
        let leader = ours.campaign("a").await.unwrap();
        let waiting: Vec<_> = (0..MANY).map(|_| campaign(&theirs, "b")).collect();
        eventually(PATIENCE, "all stand in line", async || leases(&ours).await.len() == 1 + MANY).await;
        revoke(scope, b.lease_id().unwrap()).await;
        generation(scope, &b, 2).await;
        eventually(PATIENCE, "all stand in line again", async || leases(&ours).await.len() == 1 + MANY).await;
        leader.resign().await.unwrap();
        // They come in the order of their new places, which nobody knows: each has its turn.
        let turns = waiting.into_iter().map(|task| async { finished(task).await.resign().await.unwrap() });
        futures::future::join_all(turns).await;
        a.close().await.unwrap();
        b.close().await.unwrap();
    })
    .await;
}
