//! etcd cannot be heard: the holder stops to believe before etcd deletes the key, and not much too early.

use std::sync::Arc;
use std::time::Duration;

use etcd_recipes::{Mutex, MutexGuard, Session};
use futures::future::join_all;

use crate::support::check::{Scope, eventually, scoped};
use crate::support::clock::boottime;
use crate::support::holds::{Belief, Deletions, States, returns};
use crate::support::measure::Samples;
use crate::support::proxy::{Mode, Proxy};
use crate::support::rounds;
use crate::support::server::PATIENCE;

const TTL: Duration = Duration::from_secs(2);
/// What the local deadline is earlier than the lease's end by etcd.
const MARGIN: Duration = Duration::from_millis(100);

/// A hold of a session whose only way to etcd is a proxy.
struct Hold {
    proxy: Proxy,
    session: Session,
    mutex: Mutex,
    guard: Arc<MutexGuard>,
    belief: Belief,
    states: States,
}

impl Hold {
    async fn take(scope: &Scope, ttl: Duration, name: &str) -> Self {
        let proxy = Proxy::start(scope.endpoint()).await;
        let session = Session::builder([proxy.endpoint()]).ttl(ttl).connect().await.unwrap();
        scope.owns_lease(session.lease_id().unwrap());
        let states = States::of(&session);
        let mutex = Mutex::new(&session, scope.key(name)).unwrap();
        let guard = Arc::new(mutex.lock().await.unwrap());
        let asked = guard.clone();
        let belief = Belief::of(move || asked.is_held());
        Self { proxy, session, mutex, guard, belief, states }
    }

    /// Lets the network be well again: the session has another lease and locks again; nothing is left.
    async fn recover(self, scope: &Scope) {
        self.proxy.set(Mode::Pass).await;
        returns(&self.session).await;
        scope.owns_lease(self.session.lease_id().unwrap());
        let next = self.mutex.lock().await.unwrap();
        assert!(next.token() > self.guard.token());
        assert!(!self.guard.is_held() && next.is_held());
        next.unlock().await.unwrap();
        assert!(!self.belief.answers().revived, "a hold that was lost came back");
        drop(self.belief);
        let guard = Arc::into_inner(self.guard).expect("the guard is shared");
        assert!(guard.unlock().await.unwrap_err().is_lost());
        self.session.close().await.unwrap();
    }
}

/// Cuts a hold off, `wait` after it was taken. How long before the deletion its holder knew.
async fn cut_off(scope: &Scope, deletions: &Deletions, mode: Mode, wait: Duration) -> Duration {
    let hold = Hold::take(scope, TTL, &format!("{mode:?}-{wait:?}")).await;
    let lost = hold.guard.lost();
    let resolved = tokio::spawn(async move {
        lost.await;
        boottime()
    });
    tokio::time::sleep(wait).await;
    let cut = boottime();
    hold.proxy.set(mode).await;
    let ended = hold.belief.end().await;
    // The last renewal was sent a third of the TTL before, or earlier by what a busy machine takes.
    let busy = Duration::from_millis(500);
    assert!(ended + busy > cut + TTL * 2 / 3 - MARGIN, "given up after {:?}", ended - cut);
    let told = resolved.await.unwrap().saturating_sub(ended);
    assert!(told < busy, "is_held() was false, and lost() resolved {told:?} later");
    let deletion = deletions.of(hold.guard.key()).await;
    let ahead = hold.belief.ended_before(deletion);
    hold.states.suspended_before_lost().await;
    hold.recover(scope).await;
    ahead
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_holder_in_a_black_hole_knows_before_etcd_deletes_its_key() {
    scoped(async |scope| {
        let deletions = Deletions::below(scope.endpoint(), scope.name()).await;
        let trials = rounds(4, 20);
        for mode in [Mode::HoleBoth, Mode::HoleToServer, Mode::HoleToClient] {
            // From right after the grant, before any renewal, on to over one interval between renewals.
            let waits = (0..trials).map(|trial| TTL / 2 * trial / trials);
            let ahead: Samples = join_all(waits.map(|wait| cut_off(scope, &deletions, mode, wait)))
                .await
                .into_iter()
                .collect();
            ahead.report(&format!("{mode:?}: known before the deletion by"));
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_that_come_too_late_do_not_prolong_a_hold() {
    scoped(async |scope| {
        let deletions = Deletions::below(scope.endpoint(), scope.name()).await;
        // etcd hears every renewal in time, and each answer is on its way for more than half the TTL.
        let late = |wait| {
            let to_client = TTL * 6 / 10;
            cut_off(scope, &deletions, Mode::Delay { to_server: Duration::ZERO, to_client }, wait)
        };
        let trials = rounds(4, 20);
        let ahead = join_all((0..trials).map(|trial| late(TTL / 2 * trial / trials))).await;
        ahead.into_iter().collect::<Samples>().report("answers late: known before the deletion by");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_link_keeps_its_session() {
    scoped(async |scope| {
        let hold = Hold::take(scope, Duration::from_secs(4), "slow").await;
        // A round trip of a tenth of the TTL.
        let delay = Duration::from_millis(200);
        hold.proxy.set(Mode::Delay { to_server: delay, to_client: delay }).await;
        let enough = tokio::time::Instant::now() + Duration::from_secs(12);
        while tokio::time::Instant::now() < enough {
            let other = Mutex::new(&hold.session, scope.key("other")).unwrap();
            other.lock().await.unwrap().unlock().await.unwrap();
        }
        assert!(hold.guard.is_held());
        hold.states.never_lost();
        hold.proxy.set(Mode::Pass).await;
        drop(hold.belief);
        Arc::into_inner(hold.guard).unwrap().unlock().await.unwrap();
        hold.session.close().await.unwrap();
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_hold_stays_lost_although_its_lease_lives_on() {
    scoped(async |scope| {
        let deletions = Deletions::below(scope.endpoint(), scope.name()).await;
        let hold = Hold::take(scope, TTL, "revived").await;
        let (lease, key) = (hold.session.lease_id().unwrap(), hold.guard.key().to_vec());
        // Somebody else renews the lease: as a new leader of etcd does, which begins every lease anew.
        let (mut renewer, mut answers) = scope.client().lease_keep_alive(lease).await.unwrap();
        let renewing = tokio::spawn(async move {
            loop {
                renewer.keep_alive().await.unwrap();
                match answers.message().await.unwrap() {
                    Some(answer) if answer.ttl() > 0 => {}
                    _ => return,
                }
                tokio::time::sleep(TTL / 4).await;
            }
        });
        // A second call waits for a lock on the session that is about to lose its lease.
        let other = Session::connect([scope.endpoint()]).await.unwrap();
        scope.owns_lease(other.lease_id().unwrap());
        let name = scope.key("waited for");
        let held = Mutex::new(&other, &name).unwrap().lock().await.unwrap();
        let mutex = Mutex::new(&hold.session, &name).unwrap();
        let waiting = tokio::spawn(async move { mutex.lock().await.unwrap() });
        let (mut client, prefix) = (scope.client(), format!("{name}/"));
        let options = || Some(etcd_client::GetOptions::new().with_prefix());
        eventually(PATIENCE, "two are in line", async || {
            client.get(prefix.as_str(), options()).await.unwrap().kvs().len() == 2
        })
        .await;

        hold.proxy.set(Mode::HoleBoth).await;
        hold.belief.end().await;
        assert!(!deletions.has(&key), "the lease was to live on");
        hold.proxy.set(Mode::Pass).await;
        let deletion = deletions.of(&key).await;
        hold.belief.ended_before(deletion);
        renewing.await.unwrap();
        // What the new generation wrote first came after the old one's keys were gone.
        returns(&hold.session).await;
        eventually(PATIENCE, "the waiter is in line again", async || {
            client.get(prefix.as_str(), options()).await.unwrap().kvs().len() == 2
        })
        .await;
        let line = client.get(prefix.as_str(), options()).await.unwrap();
        let newest = line.kvs().iter().max_by_key(|kv| kv.create_revision()).unwrap();
        assert_eq!(Some(newest.lease()), hold.session.lease_id());
        assert!(newest.create_revision() > deletion.revision, "written before the old keys were gone");
        held.unlock().await.unwrap();
        waiting.await.unwrap().unlock().await.unwrap();
        hold.recover(scope).await;
        other.close().await.unwrap();
    })
    .await;
}
