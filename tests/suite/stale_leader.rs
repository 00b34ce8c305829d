//! A leader of etcd that was stopped, and replaced without knowing, still answers renewals when it goes on. Nobody else
//! knows of those, so they must not count.

use std::sync::Arc;
use std::time::Duration;

use etcd_recipes::{Mutex, MutexGuard, Session};
use futures::future::join_all;

use crate::support::check::{Scope, scoped_on};
use crate::support::cluster::Cluster;
use crate::support::holds::{Belief, Deletions, States, returns};
use crate::support::measure::Samples;
use crate::support::needs::{Needs, lacking};
use crate::support::proxy::{Mode, Proxy};
use crate::support::rounds;

const TTL: Duration = Duration::from_secs(6);
/// How long the leader is stopped: others elect another meanwhile, and the lease does not end.
const STOP: Duration = Duration::from_secs(4);
/// Sessions cut off in one round, each in its own way.
const SESSIONS: u32 = 8;

/// How a session is cut off.
#[derive(Debug, Clone, Copy)]
enum Cut {
    /// Answers arrive, the stopped leader's among them, and no request leaves any more.
    RequestsBefore,
    /// Nothing passes any more, so long after the leader went on.
    AllAfter(Duration),
}

/// A hold of a session with a proxy of its own in front of each member.
struct Hold {
    /// The leader's is the first.
    proxies: Vec<Proxy>,
    session: Session,
    guard: Arc<MutexGuard>,
    belief: Belief,
    states: States,
    cut: Cut,
}

impl Hold {
    async fn take(scope: &Scope, cluster: &Cluster, leader: usize, name: String, cut: Cut) -> Self {
        let mut proxies = Vec::new();
        for member in 0..3 {
            proxies.push(Proxy::start(cluster.member((leader + member) % 3).endpoint()).await);
        }
        let endpoints = proxies.iter().map(Proxy::endpoint);
        let session = Session::builder(endpoints).ttl(TTL).connect().await.unwrap();
        scope.owns_lease(session.lease_id().unwrap());
        let states = States::of(&session);
        let guard = Arc::new(Mutex::new(&session, name).unwrap().lock().await.unwrap());
        let asked = guard.clone();
        let belief = Belief::of(move || asked.is_held());
        Self { proxies, session, guard, belief, states, cut }
    }

    async fn cut_off_from(&self, members: impl IntoIterator<Item = usize>, mode: Mode) {
        for member in members {
            self.proxies[member].set(mode).await;
        }
    }

    /// From when the leader is about to go on: how much earlier than etcd the holder knew.
    async fn outcome(&self, deletions: &Deletions) -> Duration {
        if let Cut::AllAfter(time) = self.cut {
            tokio::time::sleep(time).await;
            self.cut_off_from([0], Mode::HoleBoth).await;
        }
        let deletion = deletions.of(self.guard.key()).await;
        self.belief.ended_before(deletion)
    }

    async fn recover(self, scope: &Scope) {
        self.cut_off_from(0..3, Mode::Pass).await;
        returns(&self.session).await;
        scope.owns_lease(self.session.lease_id().unwrap());
        self.states.suspended_before_lost().await;
        drop(self.belief);
        assert!(Arc::into_inner(self.guard).unwrap().unlock().await.unwrap_err().is_lost());
        self.session.close().await.unwrap();
    }
}

async fn round(cluster: &Cluster, round: usize) -> Samples {
    let leader = cluster.leader().await;
    let other = cluster.member((leader + 1) % 3);
    scoped_on(other, async |scope| {
        let deletions = Deletions::below(&other.endpoint(), scope.name()).await;
        let hold = |number: u32| {
            let cut = match number {
                0..4 => Cut::RequestsBefore,
                // From before the new term can be known there to some time after.
                later => Cut::AllAfter(Duration::from_millis(5) * 3u32.pow(later - 4)),
            };
            Hold::take(scope, cluster, leader, scope.key(&format!("{round}-{number}")), cut)
        };
        let holds = join_all((0..SESSIONS).map(hold)).await;
        // Right after a renewal: the next is sent to the stopped leader, as late as can be.
        tokio::time::sleep(TTL / 3 + Duration::from_millis(100)).await;
        // Nobody else is there to confirm it.
        join_all(holds.iter().map(|hold| hold.cut_off_from(1..3, Mode::HoleBoth))).await;
        cluster.member(leader).pause();
        tokio::time::sleep(STOP).await;
        for hold in holds.iter().filter(|hold| matches!(hold.cut, Cut::RequestsBefore)) {
            hold.cut_off_from([0], Mode::HoleToServer).await;
        }
        cluster.member(leader).resume();
        let ahead = join_all(holds.iter().map(|hold| hold.outcome(&deletions))).await;
        for hold in holds {
            hold.recover(scope).await;
        }
        ahead.into_iter().collect()
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_of_a_leader_that_was_replaced_do_not_count() {
    if lacking(Needs::Cluster) {
        return;
    }
    let cluster = Cluster::start().await;
    for number in 0..rounds(1, 8) {
        let ahead = round(&cluster, number).await;
        ahead.report("leader stopped, then cut off: known before the deletion by");
        cluster.settled().await;
    }
}
