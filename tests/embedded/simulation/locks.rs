//! Locks and elections: one at a time, tokens that grow, writes of old holders refused, everybody served in the end.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex as Shared};
use std::time::Duration;

use etcd_client::{Txn, TxnOp};
use etcd_recipes::{Election, Mutex, Session};
use fastrand::Rng;
use tokio::task::JoinSet;

use super::trace::Trace;
use super::world::{CALM, History, Process};

/// What holders of the lock write, with their tokens.
const WRITTEN: &str = "written";

/// What must hold of one lock.
struct Oracle {
    trace: Trace,
    what: &'static str,
    /// Who holds it, as they see it themselves.
    holders: Vec<(i64, Arc<dyn Fn() -> bool + Send + Sync>)>,
    /// All that were ever told.
    tokens: BTreeSet<i64>,
    /// Whether a holder can be overtaken before it hears of it.
    revokes: bool,
}

impl Oracle {
    fn enter(&mut self, token: i64, is_held: Arc<dyn Fn() -> bool + Send + Sync>) {
        self.trace.note(format!("{} taken with {token}", self.what));
        let last = self.tokens.last().copied().unwrap_or(0);
        assert!(self.tokens.insert(token), "token {token} for the second time");
        // A token grows with its turn, not with when its holder is told: one whose lease was revoked at its turn may hear of
        // it after the next has heard of its own. It is late, and its writes are refused.
        assert!(self.revokes || token > last, "token {token} after {last}");
        for (other, held) in &self.holders {
            assert!(self.revokes || !held(), "{other} holds it as well as {token}");
        }
        self.holders.push((token, is_held));
    }

    fn leave(&mut self, token: i64) {
        self.trace.note(format!("{} left with {token}", self.what));
        self.holders.retain(|(other, _)| *other != token);
    }

    /// Who wrote under the lock held it then. A token is a revision at which its holder was first in line, so nobody else's
    /// can lie between a holder's own and a write of its own.
    fn check_writes(&self, history: &History) {
        for (revision, _, value) in history.iter().filter(|(_, key, _)| key == WRITTEN.as_bytes()) {
            let value = value.as_deref().expect("nobody deletes it");
            let token: i64 = std::str::from_utf8(value).unwrap().parse().unwrap();
            assert!(self.tokens.contains(&token), "{token} was never told");
            let later = self.tokens.range(token + 1..=*revision).next();
            assert_eq!(later, None, "overtaken, {token} still wrote at {revision}");
        }
    }
}

/// Contenders and candidates at work.
pub(super) struct Locks {
    oracle: Arc<Shared<Oracle>>,
    tasks: JoinSet<()>,
}

impl Locks {
    pub(super) fn begin(processes: &[Process], revokes: bool, random: &mut Rng, trace: &Trace) -> Self {
        let oracle = |what| {
            let trace = trace.clone();
            Arc::new(Shared::new(Oracle {
                trace,
                what,
                holders: Vec::new(),
                tokens: BTreeSet::new(),
                revokes,
            }))
        };
        let (oracle, leaders, mut tasks) = (oracle("lock"), oracle("leadership"), JoinSet::new());
        for process in processes {
            for _ in 0..2 {
                tasks.spawn(contend(process.session.clone(), oracle.clone(), random.fork()));
            }
            tasks.spawn(lead(process.session.clone(), leaders.clone(), random.fork()));
        }
        Self { oracle, tasks }
    }

    /// Waits for them; then everybody gets the lock once more.
    pub(super) async fn end(&mut self, processes: &[Process]) {
        let all = async {
            while let Some(done) = self.tasks.join_next().await {
                done.unwrap();
            }
        };
        tokio::time::timeout(CALM, all).await.expect("somebody is stuck");
        for process in processes {
            let mutex = Mutex::new(&process.session, "lock").unwrap();
            let guard = tokio::time::timeout(CALM, mutex.lock()).await.expect("the lock is stuck").unwrap();
            self.oracle.lock().unwrap().enter(guard.token(), Arc::new(|| false));
            guard.unlock().await.unwrap();
        }
    }

    /// Only what is committed while the lock is held is written.
    pub(super) fn check_writes(&self, history: &History) {
        self.oracle.lock().unwrap().check_writes(history);
    }
}

/// Takes the lock again and again; gives some attempts up, and some holds without saying so.
async fn contend(session: Session, oracle: Arc<Shared<Oracle>>, mut random: Rng) {
    let mutex = Mutex::new(&session, "lock").unwrap();
    for _ in 0..random.usize(3..12) {
        tokio::time::sleep(Duration::from_millis(random.u64(..2_000))).await;
        let patience = Duration::from_millis(if random.bool() { random.u64(1..3_000) } else { 60_000 });
        let guard = if random.u8(..3) == 0 {
            let Ok(Ok(Some(guard))) = tokio::time::timeout(patience, mutex.try_lock()).await else {
                continue;
            };
            guard
        } else {
            let Ok(Ok(guard)) = tokio::time::timeout(patience, mutex.lock()).await else { continue };
            guard
        };
        let guard = Arc::new(guard);
        let token = guard.token();
        let seen = guard.clone();
        oracle.lock().unwrap().enter(token, Arc::new(move || seen.is_held()));
        if random.bool() {
            let write = Txn::new().and_then([TxnOp::put(WRITTEN, token.to_string(), None)]);
            let _ = tokio::time::timeout(Duration::from_secs(20), guard.txn(write)).await;
        }
        tokio::time::sleep(Duration::from_millis(random.u64(..1_000))).await;
        oracle.lock().unwrap().leave(token);
        if let Ok(guard) = Arc::try_unwrap(guard).map_err(drop)
            && random.u8(..4) > 0
        {
            let _ = guard.unlock().await;
        }
    }
}

async fn lead(session: Session, oracle: Arc<Shared<Oracle>>, mut random: Rng) {
    let election = Election::new(&session, "election").unwrap();
    for _ in 0..random.usize(2..6) {
        let patience = Duration::from_millis(random.u64(100..60_000));
        let campaign = election.campaign(random.u64(..).to_string());
        let Ok(Ok(leadership)) = tokio::time::timeout(patience, campaign).await else { continue };
        let leadership = Arc::new(leadership);
        let token = leadership.token();
        let seen = leadership.clone();
        oracle.lock().unwrap().enter(token, Arc::new(move || seen.is_held()));
        tokio::time::sleep(Duration::from_millis(random.u64(..3_000))).await;
        let _ = tokio::time::timeout(Duration::from_secs(20), leadership.proclaim("again")).await;
        oracle.lock().unwrap().leave(token);
        if let Ok(leadership) = Arc::try_unwrap(leadership) {
            let _ = leadership.resign().await;
        }
    }
}
