//! Two of three members stop: shorter than the local deadline nobody is hurt; longer, the session is lost at its
//! deadline, and everything goes on by itself when etcd answers again.

use std::sync::Arc;
use std::time::Duration;

use etcd_client::GetOptions;
use etcd_recipes::{Mutex, MutexGuard, Session, SessionState};
use futures::future::join_all;
use tokio::task::{JoinHandle, JoinSet};

use crate::support::check::{Scope, eventually, scoped_on};
use crate::support::clock::boottime;
use crate::support::cluster::Cluster;
use crate::support::holds::{Belief, Deletions, States, reaches};
use crate::support::measure::Samples;
use crate::support::needs::{Needs, lacking};
use crate::support::rounds;
use crate::support::server::PATIENCE;

const TTL: Duration = Duration::from_secs(6);
const MARGIN: Duration = Duration::from_millis(300);
/// How much later a thread may look, or a renewal may be sent, than it was meant to.
const BUSY: Duration = Duration::from_millis(500);
/// From when etcd answers to the next generation.
const PROMPT: Duration = Duration::from_millis(250);

/// Two sessions, each with a lock that the other waits for.
struct Pair {
    sessions: [Session; 2],
    states: [States; 2],
    held: [Arc<MutexGuard>; 2],
    beliefs: [Belief; 2],
    waiting: [JoinHandle<MutexGuard>; 2],
}

impl Pair {
    async fn start(scope: &Scope, cluster: &Cluster) -> Self {
        let connect = async || {
            let session = Session::builder(cluster.endpoints()).ttl(TTL).connect().await.unwrap();
            scope.owns_lease(session.lease_id().unwrap());
            session
        };
        let sessions = [connect().await, connect().await];
        let lock = async |session: usize, name: &str| {
            let mutex = Mutex::new(&sessions[session], scope.key(name)).unwrap();
            Arc::new(mutex.lock().await.unwrap())
        };
        let held = [lock(0, "a").await, lock(1, "b").await];
        let believe = |index: usize| {
            let asked: Arc<MutexGuard> = held[index].clone();
            Belief::of(move || asked.is_held())
        };
        let beliefs = [believe(0), believe(1)];
        let wait = |session: usize, name: &str| {
            let mutex = Mutex::new(&sessions[session], scope.key(name)).unwrap();
            tokio::spawn(async move { mutex.lock().await.unwrap() })
        };
        let waiting = [wait(0, "b"), wait(1, "a")];
        eventually(PATIENCE, "all are in line", async || scope.keys().await.len() == 4).await;
        let states = [States::of(&sessions[0]), States::of(&sessions[1])];
        Self { sessions, states, held, beliefs, waiting }
    }

    /// Nothing was lost: each gives its lock to the other.
    async fn give(self) {
        let Self { sessions, states, held, beliefs, waiting } = self;
        states.iter().for_each(States::never_lost);
        drop(beliefs);
        for guard in held {
            Arc::into_inner(guard).unwrap().unlock().await.unwrap();
        }
        for waiting in waiting {
            waiting.await.unwrap().unlock().await.unwrap();
        }
        for session in sessions {
            session.close().await.unwrap();
        }
    }
}

/// Stops the leader and another; returns when they stand still.
async fn stop_two(cluster: &Cluster) -> [usize; 2] {
    let leader = cluster.leader().await;
    let two = [leader, (leader + 1) % 3];
    two.iter().for_each(|index| cluster.member(*index).pause());
    two
}

/// Writes through every member to know since when etcd answers. That it answered once does not say so: a leader that
/// was stopped may answer what it finds in its buffers and only then step down, and nobody answers until the next
/// election is over.
struct Probes {
    seen: Arc<std::sync::Mutex<Answering>>,
    _tasks: JoinSet<()>,
}

#[derive(Default)]
struct Answering {
    /// Which members answered their last write.
    members: [bool; 3],
    /// When the first did after none had.
    since: Vec<Duration>,
}

impl Answering {
    fn note(&mut self, member: usize, answered: bool) {
        if answered && !self.members.contains(&true) {
            self.since.push(boottime());
        }
        self.members[member] = answered;
    }
}

impl Probes {
    async fn start(cluster: &Cluster, key: &str) -> Self {
        let seen: Arc<std::sync::Mutex<Answering>> = Arc::default();
        let mut tasks = JoinSet::new();
        for (index, member) in cluster.members().iter().enumerate() {
            let (seen, key, mut client) = (seen.clone(), key.to_owned(), member.client().await);
            tasks.spawn(async move {
                loop {
                    let write = tokio::time::timeout(PROMPT, client.put(key.as_str(), "", None));
                    let answered = matches!(write.await, Ok(Ok(_)));
                    seen.lock().unwrap().note(index, answered);
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            });
        }
        Self { seen, _tasks: tasks }
    }

    /// How long etcd had been answering at a time.
    fn answered_for(&self, time: Duration) -> Duration {
        let seen = self.seen.lock().unwrap();
        // A session may be the first to be answered.
        let since = seen.since.iter().rev().find(|since| **since <= time);
        since.map_or(Duration::ZERO, |since| time - *since)
    }
}

/// An outage that sessions live through.
async fn short_outage(scope: &Scope, cluster: &Cluster) {
    let pair = Pair::start(scope, cluster).await;
    let stopped = stop_two(cluster).await;
    tokio::time::sleep(TTL / 3).await;
    stopped.iter().for_each(|index| cluster.member(*index).resume());
    cluster.settled().await;
    // Past the deadline that the outage put in question.
    tokio::time::sleep(TTL * 2 / 3).await;
    for belief in &pair.beliefs {
        assert_eq!(belief.answers().first_no, None);
    }
    pair.give().await;
}

/// An outage that no session outlives. For how long etcd had been answering when the sessions had their next
/// generation.
async fn long_outage(scope: &Scope, cluster: &Cluster) -> Vec<Duration> {
    let Pair { sessions, states, held, beliefs, waiting } = Pair::start(scope, cluster).await;
    let observer = Deletions::below(&cluster.member(0).endpoint(), scope.name()).await;
    let before = boottime();
    let stopped = stop_two(cluster).await;
    let after = boottime();
    for belief in &beliefs {
        let ended = belief.end().await;
        // The last renewal that counts was sent before the end of the quorum, a third of the TTL at most.
        assert!(ended < after + TTL - MARGIN + BUSY / 10, "believed for {:?}", ended - after);
        assert!(ended + BUSY > before + TTL * 2 / 3 - MARGIN, "gave up after {:?}", ended - before);
    }
    for states in &states {
        eventually(BUSY, "the state says so", async || {
            states.at(SessionState::Lost { generation: 1 }).is_some()
        })
        .await;
        states.suspended_before_lost().await;
    }
    // Longer than any request of theirs is tried.
    tokio::time::sleep(TTL / 2).await;
    let probe = format!("{}-probe", scope.name());
    let probes = Probes::start(cluster, &probe).await;
    stopped.iter().for_each(|index| cluster.member(*index).resume());

    let mut late = Vec::new();
    for (session, states) in sessions.iter().zip(&states) {
        let next = SessionState::Connected { generation: 2 };
        reaches(session, next).await;
        scope.owns_lease(session.lease_id().unwrap());
        eventually(PATIENCE, "noted", async || states.at(next).is_some()).await;
        late.push(probes.answered_for(states.at(next).unwrap()));
    }
    drop(probes);
    // The waiters are in line again and get the locks that nobody holds any more.
    let taken = join_all(waiting).await;
    let holds = held.into_iter().zip(beliefs).zip(&sessions);
    for (taken, ((held, belief), session)) in taken.into_iter().zip(holds) {
        let taken = taken.unwrap();
        assert!(taken.is_held());
        let deletion = observer.of(held.key()).await;
        belief.ended_before(deletion);
        let mut client = scope.client();
        let options = GetOptions::new().with_prefix();
        // A member that was away may still have to find the leader.
        let keys = tokio::time::timeout(PATIENCE, async {
            loop {
                match client.get(scope.name(), Some(options.clone())).await {
                    Ok(keys) => break keys,
                    Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                }
            }
        });
        let keys = keys.await.unwrap();
        let lease = session.lease_id().unwrap();
        for kv in keys.kvs().iter().filter(|kv| kv.lease() == lease) {
            assert!(kv.create_revision() > deletion.revision, "written before the old keys were gone");
        }
        drop(belief);
        assert!(Arc::into_inner(held).unwrap().unlock().await.unwrap_err().is_lost());
        taken.unlock().await.unwrap();
    }
    scope.client().delete(probe, None).await.unwrap();
    for session in sessions {
        session.close().await.unwrap();
    }
    late
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_quorum_away_costs_sessions_only_after_their_deadline() {
    if lacking(Needs::Cluster) {
        return;
    }
    let cluster = Cluster::start().await;
    scoped_on(cluster.member(2), async |scope| {
        let mut late = Samples::default();
        // One round among others on a machine that stands still for a moment is not to decide.
        for _ in 0..rounds(3, 20) {
            short_outage(scope, &cluster).await;
            for time in long_outage(scope, &cluster).await {
                late.add(time);
            }
        }
        late.report("next generation after etcd answers");
        assert!(late.median() <= PROMPT, "{late:?}");
    })
    .await;
}
