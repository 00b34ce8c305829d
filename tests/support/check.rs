//! Names of a test's own, and the check that nothing is left behind.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use etcd_client::{Client, GetOptions};

use super::server::Server;

/// How long what a test left may take to go away.
const GRACE: Duration = Duration::from_secs(20);

/// Polls a condition until it holds. Panics with `what` after `timeout`.
pub(crate) async fn eventually(timeout: Duration, what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + timeout;
    while !condition().await {
        assert!(Instant::now() < deadline, "not within {timeout:?}: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A test's part of an etcd: everything it makes carries a name that nobody else uses.
pub(crate) struct Scope {
    name: String,
    endpoint: String,
    client: Client,
    leases: Mutex<Vec<i64>>,
    /// The server serves this test alone, so it is to have no lease at all at the end.
    alone: bool,
    tasks: usize,
}

impl Scope {
    /// Begins one. Tasks that run on the test's runtime now may run at its end.
    pub(crate) async fn open(server: &Server) -> Self {
        Self {
            name: format!("test-{}", uuid::Uuid::new_v4().simple()),
            endpoint: server.endpoint(),
            client: server.client().await,
            leases: Mutex::new(Vec::new()),
            alone: !super::is_shared(server),
            tasks: alive_tasks(),
        }
    }

    /// The unique prefix, good as the name of a mutex or an election.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// A name below the prefix.
    pub(crate) fn key(&self, rest: &str) -> String {
        format!("{}/{rest}", self.name)
    }

    /// The address of the server.
    pub(crate) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// A plain client whose tasks are not counted as the test's.
    pub(crate) fn client(&self) -> Client {
        self.client.clone()
    }

    /// Has the end check that this lease is gone, and every bookkeeping key of it.
    pub(crate) fn owns_lease(&self, lease: i64) {
        self.leases.lock().unwrap().push(lease);
    }

    /// All keys below the prefix, in order of creation.
    pub(crate) async fn keys(&self) -> Vec<String> {
        keys(&mut self.client(), &self.name, |_, _| true).await
    }

    /// Panics unless, within a grace time, no key below the prefix is left, no lease and no bookkeeping key
    /// named with [`Scope::owns_lease`], no lease at all on a server of the test's own, and no task on the test's runtime.
    pub(crate) async fn close(self) {
        let mut client = self.client.clone();
        let leases = self.leases.lock().unwrap().clone();
        let deadline = Instant::now() + GRACE;
        loop {
            let mut left = keys(&mut client, &self.name, |_, _| true).await;
            left.extend(keys(&mut client, "_etcd-recipes/", |key, lease| belongs(key, lease, &leases)).await);
            let alive = client.leases().await.expect("cannot list leases");
            let alive = alive.leases().iter().map(etcd_client::LeaseStatus::id);
            left.extend(
                alive.filter(|id| self.alone || leases.contains(id)).map(|id| format!("lease {id:x}")),
            );
            let tasks = alive_tasks();
            if left.is_empty() && tasks <= self.tasks {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "left behind: {left:?}; tasks: {tasks}, {} at the start",
                self.tasks
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// Runs a test body in a [`Scope`] of the shared server and checks that it leaves nothing.
pub(crate) async fn scoped<T>(body: impl AsyncFnOnce(&Scope) -> T) -> T {
    scoped_on(super::etcd(), body).await
}

/// As [`scoped`], on a server of the test's own.
pub(crate) async fn scoped_on<T>(server: &Server, body: impl AsyncFnOnce(&Scope) -> T) -> T {
    let scope = Scope::open(server).await;
    let result = body(&scope).await;
    scope.close().await;
    result
}

/// How many tasks the current runtime has.
pub(crate) fn alive_tasks() -> usize {
    tokio::runtime::Handle::current().metrics().num_alive_tasks()
}

/// A bookkeeping key belongs to a lease it is attached to or named after.
fn belongs(key: &str, lease: i64, leases: &[i64]) -> bool {
    leases.iter().any(|own| *own == lease || key.contains(&format!("/{own:x}/")))
}

async fn keys(client: &mut Client, prefix: &str, keep: impl Fn(&str, i64) -> bool) -> Vec<String> {
    use etcd_client::{SortOrder, SortTarget};
    let options =
        GetOptions::new().with_prefix().with_keys_only().with_sort(SortTarget::Create, SortOrder::Ascend);
    let answer = client.get(prefix, Some(options)).await.expect("cannot read");
    let found = answer.kvs().iter();
    let found = found.map(|kv| (String::from_utf8_lossy(kv.key()).into_owned(), kv.lease()));
    found.filter(|(key, lease)| keep(key, *lease)).map(|(key, _)| key).collect()
}
