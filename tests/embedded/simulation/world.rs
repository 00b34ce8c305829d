//! The server, the processes on it, and what is recorded of them.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use etcd_client::{EventType, GetOptions, WatchOptions};
use etcd_recipes::Session;
use etcd_recipes::embedded::{Link, Server};
use fastrand::Rng;
use tokio::task::JoinHandle;

use super::faults::{Faults, Kinds};
use super::trace::Trace;

/// The TTL of all sessions.
pub(super) const TTL: Duration = Duration::from_secs(5);
/// How long there are faults.
pub(super) const STORM: Duration = Duration::from_secs(40);
/// How long anything may take once they are over: leases that nobody renews must end, and what waited must go on.
pub(super) const CALM: Duration = Duration::from_secs(120);

/// What was written: at which revision, the key, and its value unless it was deleted.
pub(super) type History = Vec<(i64, Vec<u8>, Option<Vec<u8>>)>;

pub(super) struct World {
    pub(super) server: Arc<Server>,
    pub(super) random: Rng,
    pub(super) processes: Vec<Process>,
    /// Whether somebody revokes leases of others, who can only hear of it afterwards.
    pub(super) revokes: bool,
    /// Whether history is compacted now and then, so that watchers may miss some.
    pub(super) compacts: bool,
    pub(super) history: Arc<Mutex<History>>,
    faults: Faults,
    observer: JoinHandle<()>,
}

/// One process: a link and a session on it.
#[derive(Clone)]
pub(super) struct Process {
    pub(super) session: Session,
    pub(super) link: Link,
}

impl World {
    pub(super) async fn new(seed: u64, trace: &Trace) -> Self {
        let mut random = Rng::with_seed(seed);
        let server = Arc::new(Server::start());
        let history = Arc::new(Mutex::new(Vec::new()));
        let observer = observe(&server, history.clone(), trace.clone()).await;
        let mut processes = Vec::new();
        for number in 0..random.usize(2..5) {
            let link = server.link();
            let client = trace.client(&link, format!("process {number}")).await;
            let session =
                Session::builder_with_client(client).seed(random.u64(..)).identity("simulated").ttl(TTL);
            processes.push(Process { session: session.connect().await.unwrap(), link });
        }
        let revokes = random.u8(..4) == 0;
        let compacts = random.bool();
        let kinds = Kinds { revokes, compacts };
        let faults = Faults::begin(&server, &processes, kinds, random.fork(), trace.clone());
        Self { server, random, processes, revokes, compacts, history, faults, observer }
    }

    /// The end of the faults, from where everything must come right.
    pub(super) async fn calm(&mut self) {
        self.faults.end().await;
    }

    /// Closes everything; nothing may be left, also not when the last late request has arrived.
    pub(super) async fn end(&mut self) {
        self.calm().await;
        for process in &self.processes {
            tokio::time::timeout(CALM, process.session.close())
                .await
                .expect("a session does not close")
                .unwrap();
        }
        self.faults.release().await;
        // A grant that comes so late gives a lease to nobody; etcd has nothing to compare there.
        tokio::time::sleep(TTL + Duration::from_secs(1)).await;
        let left: Vec<_> = self.server.keys("").into_iter().filter(|key| key.lease != 0).collect();
        assert!(left.is_empty(), "left: {left:?}");
        assert_eq!(self.server.leases(), [0; 0], "leases are left");
        self.observer.abort();
    }
}

/// Puts down every change.
async fn observe(server: &Server, history: Arc<Mutex<History>>, trace: Trace) -> JoinHandle<()> {
    let mut client = server.client().await.unwrap();
    // An empty key asks for all.
    let all = WatchOptions::new().with_from_key().with_start_revision(1);
    let mut watch = client.watch("\0", Some(all)).await.unwrap();
    let _ = client.get("\0", Some(GetOptions::new().with_count_only())).await;
    tokio::spawn(async move {
        while let Ok(Some(message)) = watch.message().await {
            for event in message.events() {
                let kv = event.kv().unwrap();
                let put = event.event_type() == EventType::Put;
                let what = if put { "put" } else { "delete" };
                let (key, value) = (kv.key().escape_ascii(), kv.value().escape_ascii());
                trace.note(format!("{} {what} {key}={value} {:x}", kv.mod_revision(), kv.lease()));
                let change = (kv.mod_revision(), kv.key().to_vec(), put.then(|| kv.value().to_vec()));
                history.lock().unwrap().push(change);
            }
        }
    })
}
