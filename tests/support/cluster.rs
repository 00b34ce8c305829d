//! Three real etcd servers that form a cluster.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::needs::{Needs, asked_for};
use super::server::{Options, PATIENCE, Ports, Server, peer_url};

/// A three-node cluster. Dropping it kills all of it.
#[derive(Debug)]
pub(crate) struct Cluster {
    members: Vec<Server>,
    _turn: OwnedSemaphorePermit,
}

/// Clusters are heavy, and one that is short of processor time loses its leader: one at a time.
fn turn() -> Arc<Semaphore> {
    static TURN: OnceLock<Arc<Semaphore>> = OnceLock::new();
    TURN.get_or_init(|| Arc::new(Semaphore::new(1))).clone()
}

impl Cluster {
    /// Three members with [`Options::cluster`], all ready.
    pub(crate) async fn start() -> Self {
        Self::with(Options::cluster()).await
    }

    /// Three members, all ready. Waits until there is no other cluster in this process.
    pub(crate) async fn with(options: Options) -> Self {
        asked_for(Needs::Cluster);
        let turn = turn().acquire_owned().await.expect("the semaphore was closed");
        let mut reason = String::new();
        for _ in 0..5 {
            match Self::attempt(&options).await {
                Ok(members) => return Self { members, _turn: turn },
                Err(error) => reason = error,
            }
        }
        panic!("no etcd cluster: {reason}");
    }

    async fn attempt(options: &Options) -> Result<Vec<Server>, String> {
        let ports: Vec<Ports> = (0..3).map(|_| Ports::free()).collect();
        let names: Vec<String> =
            ports.iter().enumerate().map(|(i, ports)| format!("m{i}={}", peer_url(*ports))).collect();
        let names = names.join(",");
        let launch =
            |(i, ports): (usize, &Ports)| Server::launch_member(options, &format!("m{i}"), *ports, &names);
        let members: Vec<Server> = ports.iter().enumerate().map(launch).collect();
        for member in &members {
            member.try_ready().await?;
        }
        Ok(members)
    }

    /// A member by its index; stop, pause, restart and the like are its methods.
    pub(crate) fn member(&self, index: usize) -> &Server {
        &self.members[index]
    }

    /// All members.
    pub(crate) fn members(&self) -> &[Server] {
        &self.members
    }

    /// The addresses of all members.
    pub(crate) fn endpoints(&self) -> Vec<String> {
        self.members.iter().map(Server::endpoint).collect()
    }

    /// The index of the leader. Waits until there is one; a paused or dead member is not asked for long.
    pub(crate) async fn leader(&self) -> usize {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let mut best: Option<(u64, usize)> = None;
            for index in 0..self.members.len() {
                if let Some((_, true, term)) = self.status(index).await {
                    best = best.max(Some((term, index)));
                }
            }
            if let Some((_, index)) = best {
                return index;
            }
            assert!(Instant::now() < deadline, "the cluster found no leader in {PATIENCE:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Makes `to` the leader and returns when it is.
    pub(crate) async fn move_leader(&self, to: usize) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let from = self.leader().await;
            if from == to {
                return;
            }
            assert!(Instant::now() < deadline, "member {to} did not become the leader in {PATIENCE:?}");
            if let Some((id, ..)) = self.status(to).await {
                // Refused when the leader has just changed or `to` lags behind: look again.
                let mut client = self.members[from].client().await;
                let _ = tokio::time::timeout(Duration::from_secs(5), client.move_leader(id)).await;
            }
        }
    }

    /// Waits until every running member has the same leader and answers.
    pub(crate) async fn settled(&self) {
        for member in &self.members {
            member.ready().await;
        }
    }

    /// A member's id, whether it leads, and its term.
    async fn status(&self, index: usize) -> Option<(u64, bool, u64)> {
        let ask = async {
            let mut client = self.members[index].client().await;
            let status = client.status().await.ok()?;
            let id = status.header()?.member_id();
            Some((id, status.leader() == id, status.raft_term()))
        };
        tokio::time::timeout(Duration::from_secs(1), ask).await.ok().flatten()
    }
}
